"""By what the memory of a sandbox is limited. The limits themselves are in `tests/integration/test_hostile.py`."""

import os
from pathlib import Path

import pytest
import trees

from pkgci import sandbox
from pkgci.config import Limits
from pkgci.doctor import examine

# systemd's own is tried in a machine that has one, in the integration tests
SYSTEMD_RUN = """#!/bin/sh
[ "$XDG_RUNTIME_DIR" = /run/user/1000 ] || exit 1
echo "$@" >>"$(dirname "$0")/asked"
while [ "$1" != -- ]; do shift; done
shift
exec "$@"
"""


@pytest.fixture
def ordinary(tmp_path: Path, monkeypatch) -> Path:
    """An ordinary user's process, which may make no cgroup; return the first directory of its PATH."""
    monkeypatch.setattr(sandbox, "_new_cgroup", lambda *_: None)
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    sandbox._scope_works.cache_clear()
    yield tmp_path
    sandbox._scope_works.cache_clear()


def prefix(limits: Limits) -> list[str]:
    with sandbox._memory_limit(limits) as confined:
        assert confined.exceeded()
        return confined.prefix


def test_a_user_with_a_systemd_gets_a_scope_with_the_limit_of_memory_and_disk_together(ordinary):
    trees.write(ordinary, {"systemd-run": SYSTEMD_RUN})
    assert sandbox.memory_control() == "systemd"
    command = prefix(Limits(memory_mib=100, disk_mib=200))
    assert {"--user", "--scope", f"--property=MemoryMax={300 << 20}", "--property=MemorySwapMax=0"} < set(command)


@pytest.mark.parametrize("tool", ["#!/bin/sh\nexit 1\n", "#!/no/such/interpreter\n"])
def test_a_user_without_one_has_the_limit_of_each_process_only(ordinary, tool):
    trees.write(ordinary, {"systemd-run": tool})
    assert sandbox.memory_control() == "process"
    assert prefix(Limits()) == []


@pytest.mark.parametrize(("kind", "said"), [("cgroup", "a cgroup"), ("systemd", "a scope"), ("process", "itself only")])
def test_doctor_says_which_it_is_and_finds_no_fault(tmp_path, monkeypatch, kind, said):
    monkeypatch.setattr("pkgci.doctor.memory_control", lambda: kind)
    lines = [finding.line() for finding in examine(trees.config(tmp_path))]
    assert [line[:2] for line in lines if "memory of a build is limited" in line and said in line] == ["ok"]
