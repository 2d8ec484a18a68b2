"""What `scripts/setup.sh` asks of an administrator: what is missing, and that no server that comes with it runs."""

import os
import re
import subprocess
from pathlib import Path

from pkgci.config import ROOT

MASK = "ln -s /dev/null /etc/systemd/system/{}.service"


def asked(tmp_path: Path, installed: str) -> str:
    """Return the command for an administrator, as a user without sudo sees it where only `installed` is there."""
    fakes = {
        "id": "[ $# = 1 ] && [ $1 = -u ] && echo 4711 || echo somebody",
        "sudo": "exit 1",
        "dpkg-query": f'case " {installed} " in *" $4 "*) printf installed ;; *) exit 1 ;; esac',
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    # as where no server has been masked yet
    fresh = [
        "unshare",
        "-rm",
        "sh",
        "-euc",
        'mount -t tmpfs tmpfs /etc/systemd/system; PATH=$1; shift; exec "$@"',
        "sh",
    ]
    command = [*fresh, path, ROOT / "scripts" / "setup.sh", "test"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    (line,) = re.findall(r"^ +sudo sh -c '(.*)'$", done.stderr, re.MULTILINE)
    return line


def test_a_server_that_tests_need_is_masked_before_it_is_installed(tmp_path: Path):
    line = asked(tmp_path, "git make")
    assert re.search(r"install -y --no-install-recommends( \S+)* openssh-server ", line)
    assert line.index(MASK.format("ssh")) < line.index("apt-get")
    assert " git " not in line


def test_a_server_that_is_there_already_is_left_as_it_is(tmp_path: Path):
    assert MASK.format("ssh") not in asked(tmp_path, "openssh-server")
