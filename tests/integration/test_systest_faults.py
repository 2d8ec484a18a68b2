"""What the infrastructure does to system tests and to the preparation of their machines is never the package's fault.

Other faults are in `test_systest.py` (a connection that is cut, QEMU killed in a scenario, the job killed) and `test_vm.py`.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import packages
import pytest
import trees
from injected import with_own_disk
from local_jobs import end_all, until

from pkgci import repository
from pkgci import systest as job
from pkgci.artifacts import Result, Systest
from pkgci.change import Parameters
from pkgci.config import EMBEDDED, Config
from pkgci.engines.local import LocalEngine
from pkgci.errors import Exit, InfrastructureError, PkgciError
from pkgci.vm import guest, snapshot
from pkgci.vm.machine import Machine
from pkgci.vm.remote import Fault
from pkgci.vm.snapshot import Manifest, Snapshot

TARGET = "bookworm-amd64"
ENVIRONMENT = """
nodes: {lab: {}}
scenarios: {good: scenarios/good.py, filling: {path: scenarios/filling.py, test_seconds: 100}}
"""
SCENARIOS = {
    "good.py": "def test_use(node):\n    assert node.run('true').status == 0\n",
    "filling.py": "def test_fill(node):\n    node.run('dd if=/dev/zero of=/root/fill bs=1M count=200 oflag=direct')\n",
}
# usage: CONFIGURATION SNAPSHOT POINT; makes a plain machine's snapshot, and is killed on the way
PREPARATION = """
import os, signal, sys
from pathlib import Path
import test_systest_faults
from pkgci.config import Config
from pkgci.vm import guest, snapshot

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

configuration, prepared, point = sys.argv[1:]
link = Path.symlink_to
# to find out whether KVM boots something takes as long as all of this
snapshot.accelerator = lambda _: "tcg"
if point != "booting":
    snapshot._freeze = test_systest_faults.thawed(Path(prepared))
if point == "named":
    Path.symlink_to = lambda path, to: die() if path.name == ".latest.new" else link(path, to)
else:
    setattr(snapshot, {"booting": "_set_up", "restored": "run_steps"}[point], die)
guest.plain(Config(Path(configuration)), test_systest_faults.TARGET)
"""


def own_config(place: Path) -> Config:
    """Return a configuration whose machines are in nobody else's directory; images and the upstream are the user's."""
    theirs, paths = Config(EMBEDDED).cache, {name: str(place / name) for name in ("state", "data", "cache")}
    made = trees.config(place, paths=paths)
    made.cache.mkdir()
    for name in ("images", "proxy"):
        (theirs / name).mkdir(parents=True, exist_ok=True)
        (made.cache / name).symlink_to(theirs / name)
    return made


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    made = own_config(tmp_path_factory.mktemp("faults"))
    trees.write(made.directory, {f"scenarios/{name}": text for name, text in SCENARIOS.items()})
    trees.write(made.directory, {"environments/lab.yaml": ENVIRONMENT})
    return made


@pytest.fixture(scope="module")
def prepared() -> Path:
    """The directory of this machine's snapshot."""
    return guest.plain(Config(EMBEDDED), TARGET).directory


@pytest.fixture
def own(tmp_path: Path) -> Config:
    """A configuration with no snapshots yet."""
    made = own_config(tmp_path)
    (made.data / "snapshots").unlink()
    return made


@pytest.fixture(scope="module")
def small(config: Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The record of a repository with a small package."""
    place = tmp_path_factory.mktemp("small")
    built = packages.deliver_debs(config, place, "small", "1", [packages.deb(place, "small", "1")], namespace="check")
    made = repository.write(config, TARGET, "small", [built], datetime.now(UTC) + timedelta(days=1))
    return f"{made.url}{repository.RECORD}"


def run_job(config: Config, url: str, artifacts: Path, scenario: str = "good") -> tuple[Systest, PkgciError | None]:
    """Run a scenario; return the record and how it failed. Nothing is left of its machines."""
    artifacts.mkdir()
    given = {"ENVIRONMENT": "lab", "REPOSITORIES": url, "SCENARIOS": scenario, "AGAIN": "true"}
    failure = None
    try:
        job.systest(config, TARGET, Parameters.read(given), artifacts)
    except PkgciError as error:
        failure = error
    assert (machines(config), [*(config.cache / "runs").iterdir()]) == ([], [])
    return Systest.read(artifacts / "systest.json"), failure


def machines(config: Config) -> list[int]:
    """Return the processes of machines of a configuration of our own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            if os.readlink(path).startswith(f"{config.cache}/runs/"):
                found.append(int(path.parent.name))
    return found


def while_installing(monkeypatch: pytest.MonkeyPatch, act: Callable[[Machine], None]) -> list[str]:
    """Have something done to the machine when the first installation begins; return what becomes the list of all."""
    install, attempts = job._install, []

    def acted(run, machine, packages, action, *seconds):
        attempts.append(action)
        if len(attempts) == 1:
            act(machine)
        return install(run, machine, packages, action, *seconds)

    monkeypatch.setattr(job, "_install", acted)
    return attempts


def test_qemu_killed_while_packages_are_installed_is_tried_again_and_said(config, small, tmp_path, monkeypatch):
    def kill(machine: Machine) -> None:
        threading.Timer(0.3, os.kill, (machine.pid, signal.SIGKILL)).start()

    attempts = while_installing(monkeypatch, kill)
    record, failure = run_job(config, small, tmp_path / "artifacts")
    assert (failure, attempts) == (None, ["together"] * 2)
    assert record.retried.startswith(Fault.KILLED.value)
    assert (tmp_path / "artifacts" / job.FIRST / "console.log").exists()


def test_an_installation_that_a_busy_host_does_not_get_on_with_is_not_the_packages_fault(
    config, small, tmp_path, monkeypatch
):
    busy = []

    def starve(machine: Machine) -> None:
        (first, *_) = os.sched_getaffinity(0)
        for task in Path(f"/proc/{machine.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {first})
        for _ in range(6):
            busy.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            os.sched_setaffinity(busy[-1].pid, {first})

    monkeypatch.setattr(job, "INSTALL_SECONDS", 4)
    while_installing(monkeypatch, starve)
    try:
        record, failure = run_job(config, small, tmp_path / "artifacts")
    finally:
        for one in busy:
            one.kill()
            one.wait()
    assert isinstance(failure, InfrastructureError)
    assert "the host had no processor for the machine" in str(failure)
    assert record.outcomes == ()


def test_a_host_whose_disk_is_full_in_the_middle_ends_the_machine_and_is_not_the_packages_fault(
    config, small, tmp_path
):
    artifacts = tmp_path / "artifacts"

    def work() -> None:
        began = time.monotonic()
        # the machine would stand still until the test's limit
        record, failure = run_job(config, small, artifacts, "filling")
        assert time.monotonic() - began < 100
        assert type(failure) is InfrastructureError
        assert failure.exit == Exit.INFRASTRUCTURE
        assert "this host cannot use its disk in " in str(failure)
        assert str(failure).endswith("No space left on device")
        assert record.retried == ""

    with_own_disk(config.cache / "runs", "64m", work)
    assert {"console.log", "filling.log"} <= {path.name for path in (artifacts / "logs").iterdir()}


def test_a_host_without_any_space_is_said_before_a_machine_runs(config, small, tmp_path):
    def work() -> None:
        _, failure = run_job(config, small, tmp_path / "artifacts")
        assert type(failure) is InfrastructureError
        assert "No space left on device" in str(failure)

    with_own_disk(config.cache / "runs", "64k", work)


# snapshots


@pytest.mark.parametrize("damaged", ["node.ram", "node.qcow2", "node.state", "manifest.json"])
def test_a_flipped_byte_anywhere_in_a_snapshot_makes_it_one_that_is_not_used(own, prepared, damaged):
    place = own.data / "snapshots" / TARGET
    place.mkdir(parents=True)
    subprocess.run(["cp", "-r", "--sparse=always", "--reflink=auto", prepared, place / "1"], check=True)
    (place / "latest").symlink_to("1")
    plan = guest.plain_plan(own, TARGET)
    assert snapshot.unfit(own, plan) == ""
    path = place / "1" / damaged
    path.chmod(0o600)
    with path.open("r+b") as stream:
        # of the manifest, where it stays one of its form: in the name of a package
        where = path.read_bytes().index(b"systemd") if damaged == "manifest.json" else path.stat().st_size // 2
        stream.seek(where)
        (byte,) = stream.read(1)
        stream.seek(where)
        stream.write(bytes([byte ^ 1]))
    assert snapshot.unfit(own, plan) == f"snapshot {TARGET}/1 is damaged: the content of {damaged} has changed"


def thawed(directory: Path) -> Callable[..., Snapshot]:
    """Return what takes the place of `_freeze`: it takes the files of a snapshot that was made before."""

    def freeze(_config: Config, plan: snapshot.Plan, _origins: object, place: Path, _making: object) -> Snapshot:
        new, manifest = place / uuid.uuid4().hex, Snapshot(directory).manifest
        new.mkdir()
        for file in manifest.files:
            subprocess.run(["cp", "--sparse=always", "--reflink=auto", directory / file.name, new], check=True)
        manifest.model_copy(update={"key": plan.key(), "created": datetime.now(UTC)}).write(new / "manifest.json")
        return Snapshot(new)

    return freeze


def former(config: Config) -> Path:
    """Make a snapshot that does not fit any more, the latest one; return its directory."""
    place = config.data / "snapshots" / TARGET / "1"
    place.mkdir(parents=True)
    known = {
        "name": TARGET,
        "key": "",
        "qemu": "QEMU emulator version 1",
        "accelerator": "tcg",
        "nodes": (),
        "files": (),
    }
    Manifest(**known, created=datetime.now(UTC)).write(place / "manifest.json")
    (place.parent / "latest").symlink_to("1")
    return place


def left(config: Config, before: Path) -> list[object]:
    """Return what a preparation that failed has left beside the former snapshot, which is still the latest one."""
    place = before.parent
    assert (place / "latest").resolve() == before
    beside = [path for path in place.iterdir() if path.name not in (before.name, "latest")]
    return [*machines(config), *(config.cache / "runs").iterdir(), *beside]


@pytest.mark.parametrize("point", ["booting", "restored", "named"])
def test_a_preparation_that_is_killed_changes_nothing_and_the_next_one_removes_what_it_left(
    own, prepared, monkeypatch, point
):
    before = former(own)
    place = before.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, "-c", PREPARATION, str(own.directory), str(prepared), point]
    killed = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    until(lambda: not machines(own), 10)
    assert (place / "latest").resolve() == before
    (new,) = {path.name for path in place.iterdir()} - {"1", "latest"}
    assert new.startswith(snapshot.NEW) == (point != "named")
    assert any((own.cache / "runs").iterdir()) == (point != "named")
    monkeypatch.setattr(snapshot, "_freeze", thawed(prepared))
    made = guest.plain(own, TARGET)
    assert {path.name for path in place.iterdir()} == {made.directory.name, "latest"}
    assert [*(own.cache / "runs").iterdir()] == []


def test_a_machine_that_does_not_come_up_ends_its_preparation_which_says_what_its_console_said(
    own, monkeypatch, caplog
):
    before = former(own)
    monkeypatch.setattr(snapshot, "accelerator", lambda _: "tcg")
    monkeypatch.setattr(snapshot, "BOOT_SECONDS", 1)
    monkeypatch.setattr("pkgci.ssh.CONNECT_SECONDS", 1)
    with pytest.raises(InfrastructureError, match=f"{TARGET}: node does not come up: no ssh to the machine within 1 s"):
        guest.plain(own, TARGET)
    assert "the console of node ends with:" in caplog.text
    assert left(own, before) == []


def test_qemu_killed_while_a_machine_is_prepared_ends_the_preparation(own, monkeypatch):
    before, boot = former(own), Machine.boot

    def killed(machine: Machine) -> None:
        boot(machine)
        os.kill(machine.pid, signal.SIGKILL)

    monkeypatch.setattr(snapshot, "accelerator", lambda _: "tcg")
    monkeypatch.setattr(Machine, "boot", killed)
    with pytest.raises(InfrastructureError, match=Fault.KILLED.value):
        guest.plain(own, TARGET)
    assert left(own, before) == []


def test_machines_of_another_qemu_end_the_test_with_3_and_their_preparation_begins_by_itself(config, prepared):
    trees.write(config.directory, {"environments/default.yaml": ENVIRONMENT.replace("lab: {}", "one: {}, two: {}")})
    place = config.data / "snapshots"
    theirs = place.resolve()
    place.unlink()
    shutil.copytree(prepared, place / f"default@{TARGET}" / "1", ignore=shutil.ignore_patterns("node.*"))
    (place / f"default@{TARGET}" / "latest").symlink_to("1")
    manifest = place / f"default@{TARGET}" / "1" / "manifest.json"
    manifest.chmod(0o600)
    manifest.write_text(manifest.read_text().replace("QEMU emulator version ", "QEMU emulator version 1"))
    engine = LocalEngine(config)
    try:
        ref = engine.start(f"systest-{TARGET}", {"REPOSITORIES": f"{config.settings.url}test/a/b/repository.json"})
        assert engine.wait(ref, 60) == "FAILURE"
        result = Result.read(engine.directory(ref) / "archive" / "artifacts" / "result.json")
        assert (result.exit, "environment default: snapshot " in result.reason) == (Exit.INFRASTRUCTURE, True)
        assert result.reason.endswith("it has to be prepared anew")
        (begun,) = engine.builds("snapshot-prepare-default")
        engine.abort(begun)
        assert engine.wait(begun, 60) == "ABORTED"
    finally:
        end_all(engine)
        shutil.rmtree(place)
        place.symlink_to(theirs)
    until(lambda: not machines(config), 10)
