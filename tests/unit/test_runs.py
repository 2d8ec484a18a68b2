"""Machines of system tests that are kept: how long, what goes with them, and when a run is refused for want of space."""

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from pkgci import runs
from pkgci.config import EMBEDDED, Config
from pkgci.debug import debug, login
from pkgci.errors import InfrastructureError, RequestError
from pkgci.kept import RECORD
from pkgci.locks import locked
from pkgci.vm.remote import Access
from pkgci.vm.snapshot import FrozenNode, Manifest

NOW = datetime.now(UTC)
TARGET = "bookworm-amd64"
Usage = namedtuple("Usage", "free")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    shutil.copytree(EMBEDDED / "targets", tmp_path / "etc" / "targets")
    (tmp_path / "etc" / "config.yaml").write_text(f"run_days: 3\npaths: {{data: {tmp_path / 'data'}}}\n")
    return Config(tmp_path / "etc")


def leave(config: Config, number: int, hours: float = 0) -> Path:
    """Keep the machines of a run that ended some hours ago, on the snapshot `lab/1`; return where."""
    kept = runs.runs(config)
    with kept.room(NOW) as room:
        base = room / "machines" / "base"
        base.mkdir(parents=True)
        for path in snapshot(config, "1").iterdir():
            os.link(path, base / path.name)
        (room / "machines" / "node.vm.zst").write_bytes(os.urandom(1 << 20))
        record = runs.KeptRun(
            job="systest-a",
            number=number,
            parent=f"build-a/{number}",
            target="a",
            ended=NOW - timedelta(hours=hours),
            environment="lab",
            passed=False,
            sets={"machines": "lab/1"},
        )
        kept.keep(room, record, NOW)
    return kept.place / f"systest-a-{number}"


def snapshot(config: Config, name: str) -> Path:
    """Return the directory of a prepared snapshot of `lab`, with a file of 2 MiB; it is the latest one."""
    place = config.data / "snapshots" / "lab"
    if not (place / name).exists():
        (place / name).mkdir(parents=True)
        (place / name / "node.ram").write_bytes(os.urandom(2 << 20))
        (place / "latest").unlink(missing_ok=True)
        (place / "latest").symlink_to(name)
    return place / name


def names(config: Config) -> list[str]:
    return [str(run) for _, run in runs.runs(config).all()]


def test_what_is_too_old_goes_and_what_is_in_use_stays(config):
    old = leave(config, 1, hours=71)
    used = leave(config, 2, hours=71)
    leave(config, 3, hours=70)
    later = NOW + timedelta(hours=1, minutes=1)
    assert runs.clean(config, False, later).startswith("would remove 2 runs and 0 snapshots: 2 MiB; nothing is removed")
    assert names(config) == ["systest-a/3", "systest-a/1", "systest-a/2"]
    with locked(used, shared=True), runs.runs(config).room(NOW):
        # a test's own room, too
        assert runs.clean(config, False, later).startswith("would remove 1 runs and 0 snapshots: 1 MiB;")
        assert runs.clean(config, True, later) == "removed 1 runs and 0 snapshots: 1 MiB"
    assert sorted(names(config)) == ["systest-a/2", "systest-a/3"]
    assert not old.exists()


def test_what_a_process_left_that_was_killed_at_its_removal_goes_with_the_next(config, monkeypatch):
    old = leave(config, 1, hours=71)

    def killed(directory: Path, **_: object) -> None:
        (Path(directory) / RECORD).unlink()
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            runs.runs(config).prune(NOW + timedelta(hours=2))
    runs.runs(config).prune(NOW + timedelta(hours=2))
    assert list(old.parent.iterdir()) == []


def test_a_snapshot_that_was_superseded_goes_and_a_run_that_began_as_it_keeps_its_files(config):
    directory = leave(config, 1)
    former, latest = snapshot(config, "1"), snapshot(config, "2")
    assert runs.clean(config, False, NOW).startswith("would remove 0 runs and 1 snapshots: 0 MiB")
    with locked(former, shared=True):
        runs.clean(config, True, NOW)
        assert former.exists()
    runs.clean(config, True, NOW)
    assert not former.exists()
    assert latest.exists()
    assert (directory / "machines" / "base" / "node.ram").stat().st_size == 2 << 20


def test_the_files_that_a_run_shares_with_its_snapshot_are_freed_when_both_go(config):
    leave(config, 1, hours=71)
    snapshot(config, "2")
    later = NOW + timedelta(hours=2)
    assert runs.clean(config, False, later).startswith("would remove 1 runs and 1 snapshots: 3 MiB")
    assert runs.clean(config, True, later) == "removed 1 runs and 1 snapshots: 3 MiB"


def test_the_latest_snapshot_of_what_is_no_longer_configured_goes_when_nobody_used_it_for_long(config):
    other = snapshot(config, "1")
    used = (NOW - timedelta(days=8)).timestamp()
    environment = config.directory / "environments" / "lab.yaml"
    environment.parent.mkdir()
    environment.write_text("targets: [bookworm-amd64]\nnodes: {one: {}, two: {}}\nscenarios: {any: any.py}\n")
    known = [config.data / "snapshots" / name for name in (f"lab@{TARGET}", f"default@{TARGET}", TARGET)]
    for place in known:
        shutil.copytree(other.parent, place, symlinks=True)
    for place in (*known, other.parent):
        os.utime(place / "1", (used, used))
    with locked(other, shared=True):
        assert runs.clean(config, True, NOW) == "removed 0 runs and 0 snapshots: 0 MiB"
    os.utime(other)
    assert runs.clean(config, True, NOW) == "removed 0 runs and 0 snapshots: 0 MiB"
    os.utime(other, (used, used))
    assert runs.clean(config, False, NOW).startswith("would remove 0 runs and 1 snapshots: 2 MiB;")
    assert runs.clean(config, True, NOW) == "removed 0 runs and 1 snapshots: 2 MiB"
    assert [*other.parent.iterdir()] == []
    assert all((place / "latest").exists() for place in known)


def test_while_it_is_not_known_what_is_configured_all_snapshots_stay(config):
    former, _ = snapshot(config, "1"), snapshot(config, "2")
    environment = config.directory / "environments" / "lab.yaml"
    environment.parent.mkdir()
    environment.write_text("nodes: [\n")
    with pytest.raises(RequestError, match=r"lab\.yaml"):
        runs.clean(config, True, NOW)
    assert former.exists()


def test_what_a_killed_preparation_left_goes_and_not_what_one_is_at(config):
    place = snapshot(config, "1").parent
    left, new = place / ".new-1", place / ".new-2"
    for directory in (left, new):
        directory.mkdir()
        (directory / "node.ram").write_bytes(os.urandom(1 << 20))
    with locked(new):
        assert runs.clean(config, False, NOW).startswith("would remove 0 runs and 1 snapshots: 1 MiB;")
        assert runs.clean(config, True, NOW) == "removed 0 runs and 1 snapshots: 1 MiB"
    assert sorted(path.name for path in place.iterdir()) == [".new-2", "1", "latest"]


def test_a_snapshot_that_is_about_to_be_the_latest_stays(config, monkeypatch):
    former = snapshot(config, "1")
    new = former.with_name("2")
    new.mkdir()
    # the other process holds this lock until `latest` is moved
    with locked(former.parent):
        assert runs.clean(config, True, NOW) == "removed 0 runs and 0 snapshots: 0 MiB"
    # it is moved after it was found
    found = runs.unneeded(config, (), 0)
    assert found == [new]
    monkeypatch.setattr(runs, "unneeded", lambda *_: found)
    (former.parent / ".new").symlink_to("2")
    (former.parent / ".new").rename(former.parent / "latest")
    runs.clean(config, True, NOW)
    assert new.exists()


def test_the_latest_snapshot_stays_also_where_a_link_leads_to_them(config, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "snapshots").symlink_to(tmp_path / "elsewhere")
    latest = snapshot(config, "1")
    runs.clean(config, True, NOW)
    assert latest.exists()


def test_a_run_that_cannot_be_kept_is_refused_before_it_starts_and_nothing_is_removed_for_it(config, monkeypatch):
    leave(config, 1, hours=1)
    node = {"image": "", "addresses": (), "networks": (), "command": (), "host_key": "", "packages": ()}
    nodes = tuple(FrozenNode(name=name, memory_mib=1024, **node) for name in ("one", "two"))
    manifest = Manifest(name="lab", key="", qemu="", accelerator="tcg", created=NOW, nodes=nodes, files=())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(4096 << 20))
    runs.check_space(config, manifest)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage((4096 << 20) - 1))
    said = (
        r"no space for the machines of this run: 4095 MiB free for .*/runs, 4096 MiB needed; see `pkgci snapshot-clean`"
    )
    with pytest.raises(InfrastructureError, match=said):
        runs.check_space(config, manifest)
    assert names(config) == ["systest-a/1"]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("7", r"no machines are kept of 7; they are kept of: systest-a/1 \(for 3 days; `keep_runs`"),
        ("systest-a/1", r"systest-a/1 has no machines 'other'; it has: machines"),
    ],
)
def test_who_asks_for_what_is_not_kept_is_told_what_is(config, wanted, said):
    leave(config, 1)
    with pytest.raises(RequestError, match=said):
        debug(config, wanted, "other", at_start=False)


def test_the_login_gives_nothing_of_the_persons_to_the_machine(tmp_path):
    machine = SimpleNamespace(port=lambda: 2200, access=Access(tmp_path / "an identity", "ssh-ed25519 AAAA"))
    words = shlex.split(login(machine, tmp_path, "one"))
    # their own configuration may forward an agent to all hosts
    settings = subprocess.run([*words[:-1], "-G", words[-1]], capture_output=True, text=True, check=True).stdout
    assert words[1:3] == ["-F", "none"]
    assert {"forwardagent no", "forwardx11 no", "port 2200", f"userknownhostsfile {tmp_path}/one"} <= {
        *settings.splitlines()
    }
    assert (tmp_path / "one").read_text() == "[127.0.0.1]:2200 ssh-ed25519 AAAA\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_session_leaves_nothing_however_it_is_asked_to_end(config, tmp_path, monkeypatch, number):
    leave(config, 1)
    machine = SimpleNamespace(port=lambda: 2200, access=Access(tmp_path / "identity", "ssh-ed25519 AAAA"))
    ended = []

    @contextmanager
    def restored(*_: object) -> Iterator[dict]:
        try:
            yield {"one": machine}
        finally:
            ended.append(len(list((tmp_path / "scratch").iterdir())))

    monkeypatch.setattr(runs, "restored", restored)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    # what ends the process must not end the test
    before = {one: signal.signal(one, signal.SIG_IGN) for one in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(signal, "pause", lambda: signal.raise_signal(number) or pytest.fail("it goes on"))
    try:
        debug(config, "1", "machines", at_start=False)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert ended == [1]
    assert not list((tmp_path / "scratch").iterdir())
