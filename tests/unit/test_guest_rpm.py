"""Whose fault it is that dnf fails in a machine. The real dnf is in the integration tests."""

import subprocess
from pathlib import Path

import pytest

from pkgci.vm import guest

UNREADABLE = "Error: Failed to download metadata for repo 'pkgci-0': Cannot download repomd.xml"
MOVED = "[MIRROR] a.rpm: Status code: 404 for http://mirror.example.org/a.rpm"
RUNNING = "Running transaction check"


@pytest.mark.parametrize(
    ("said", "status", "runs"),
    [
        ([UNREADABLE], 75, 1),
        ([RUNNING, UNREADABLE], 1, 1),
        ([f"a scriptlet: {UNREADABLE}"], 1, 1),
        (["Error: Unable to find a match"], 1, 1),
        ([MOVED], 1, 2),
        ([RUNNING, MOVED], 1, 1),
    ],
)
def test_only_what_dnf_says_before_it_installs_is_not_the_packages_fault(tmp_path: Path, said, status, runs):
    script = guest.HERE.joinpath("guest-rpm.sh").read_text()
    log, count = tmp_path / "log", tmp_path / "count"
    dnf = 'dnf() { echo run >>"$count"; printf "%s\\n" "$said"; return 1; }'
    act = f'{dnf}\n{script}\nexec >>"$log"\nadd a-1-1.noarch || exit 1'
    variables = {"log": str(log), "count": str(count), "said": "\n".join(said), "PATH": "/usr/bin:/bin"}
    log.touch()
    done = subprocess.run(["sh", "-euc", act], env=variables, check=False)
    assert (done.returncode, len(count.read_text().splitlines())) == (status, runs)
