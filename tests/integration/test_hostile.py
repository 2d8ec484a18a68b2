"""Hostile and broken input, with the real sandbox, store and machines: it harms itself, and the next run succeeds.

`test_ordinary_user.py` runs all of this once more as a user without any rights.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import trees

from pkgci import sandbox
from pkgci.config import EMBEDDED, Config
from pkgci.vm import guest
from pkgci.vm.proxy import Proxy
from pkgci.vm.snapshot import Snapshot

TARGET = "bookworm-amd64"
# a user with a systemd, in a machine without logind, which would make its runtime directory
USER_WITH_SYSTEMD = """
useradd -m -u 1000 tester
install -d -o tester -m 700 /run/user/1000
cd /run/systemd/system
mkdir user-runtime-dir@.service.d user@.service.d
printf '[Service]\nExecStart=\nExecStart=/bin/true\nExecStop=\n' >user-runtime-dir@.service.d/test.conf
printf '[Service]\nPAMName=\nEnvironment=XDG_RUNTIME_DIR=/run/user/%%i\n' >user@.service.d/test.conf
systemctl daemon-reload
systemctl start user@1000.service
"""
LARGE = """
import re, resource, sys
from pathlib import Path
from pkgci import source
from pkgci.formats import base
from pkgci.sandbox import Files
files = Files()
base.add_tree(files, source.tree(Path(sys.argv[1]), "large", sys.argv[2]), "/build/tree")
own = re.search(r"VmHWM:\\s+([0-9]+)", Path("/proc/self/status").read_text())
print(files.stream.tell() >> 20, int(own[1]) >> 10, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)
"""


@pytest.fixture(scope="session")
def config() -> Config:
    return Config(EMBEDDED)


@pytest.fixture(scope="session")
def snapshot(config: Config) -> Snapshot:
    """This machine's snapshot: the one that the jobs use."""
    return guest.plain(config, TARGET)


def test_a_tree_of_300_mib_does_not_need_that_memory(tmp_path: Path):
    files = {f"file-{number}": bytes([number]) * (1 << 20) for number in range(150)} | {"large": bytes(150 << 20)}
    commit = trees.commit(tmp_path / "large", files)
    command = [sys.executable, "-c", LARGE, tmp_path / "large", commit]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    size, own, git = map(int, done.stdout.split())
    assert size >= 300
    assert own < 120
    assert git < 120


def test_the_memory_of_all_processes_is_limited_by_a_users_systemd(config, snapshot, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    scope = shlex.join(sandbox._scope(100 << 20))
    with snapshot.restored(config, Proxy((), config.cache / "proxy")) as machine:
        assert machine.run(USER_WITH_SYSTEMD, timeout=120).status == 0
        # each of them takes less than the limit
        hungry = """perl -e '$x = "a" x (40 << 20); print "had it\\n"; sleep 2' & """
        done = machine.run(
            f'runuser -u tester -- {scope} sh -c "$1" || echo "ended $?"', hungry * 4 + "wait", timeout=60
        )
    assert "ended 143" in done.text()
    assert done.text().count("had it") < 4
