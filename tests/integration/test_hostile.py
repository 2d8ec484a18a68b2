"""Hostile and broken input, with the real sandbox, store and machines: it harms itself, and the next run succeeds.

`test_ordinary_user.py` runs all of this once more as a user without any rights.
"""

import ctypes
import gzip
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import processes
import pytest
import trees

from pkgci import sandbox
from pkgci.artifacts import Build, Contents, Lint, Repository, Result
from pkgci.change import Parameters
from pkgci.compile import compile
from pkgci.config import EMBEDDED, Config
from pkgci.engines.local import LocalEngine
from pkgci.errors import InfrastructureError, PackageError
from pkgci.lint import lint
from pkgci.vm import guest
from pkgci.vm.proxy import Proxy
from pkgci.vm.snapshot import Snapshot

TARGET, RPM = "bookworm-amd64", "debianrpm-amd64"
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


# a title, a cleared screen, a line written over, invalid UTF-8, a very long line, text that runs backwards
TERMINAL = r"""printf '\033]0;title\007\033[2J bad\rgood \377\376\302\233 \007\n'; head -c 3M /dev/zero | tr '\0' x; \
	printf '\nerror: \033[31mowned\033[0m \342\200\256txt\n'; exit 1"""


@pytest.fixture(scope="session")
def config() -> Config:
    return Config(EMBEDDED)


@pytest.fixture(scope="session")
def snapshot(config: Config) -> Snapshot:
    """This machine's snapshot: the one that the jobs use."""
    return guest.plain(config, TARGET)


class Place:
    """A directory with a configuration, a store, a tree `small`, and all temporary files of what is built there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tree = directory / "small"
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        self.configuration = trees.config(directory, packages={"small": {"source": "small"}})

    def build(self, files: dict, target: str = TARGET, **limits: int) -> Build:
        """Commit exactly `files`, and build them."""
        entry = self.configuration.directory / "packages" / "small.yaml"
        entry.write_text(f"source: small\nlimits: {limits}\n")
        if self.tree.exists():
            trees.git(self.tree, "rm", "-rq", ".")
        trees.commit(self.tree, files)
        configuration = Config(self.configuration.directory)
        artifacts = self.directory / "artifacts"
        shutil.rmtree(artifacts, ignore_errors=True)
        artifacts.mkdir()
        return compile(configuration, target, trees.local(configuration, self.tree), artifacts)

    def lint(self, made: Build) -> Lint:
        """Lint the last build."""
        configuration = Config(self.configuration.directory)
        change = trees.local(configuration, self.tree).change(configuration)
        return lint(configuration, TARGET, change, made.key, (), self.directory / "artifacts")

    def log(self) -> str:
        """Return the log of the last build."""
        return (self.directory / "artifacts" / "logs" / "build.log").read_text(errors="replace")

    def left(self) -> list[Path]:
        """Return what there is of scratch files, of builds under way, and of files of another user."""
        own = os.getuid()
        scratch = [*self.temporary.iterdir(), *(self.configuration.data / "store" / "new").glob("*")]
        return scratch + [path for path in self.directory.rglob("*") if path.lstat().st_uid != own]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The place of all bad builds, where a good one follows."""
    return Place(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def place(shared: Place, monkeypatch) -> Place:
    monkeypatch.setattr(tempfile, "tempdir", str(shared.temporary))
    return shared


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def belonging(mark: str) -> list[int]:
    """Return the processes of this user, but this one, with `mark` in their command line or environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            text = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
            if mark.encode() in text and int(path.name) != os.getpid():
                found.append(int(path.name))
    return found


def doing(*commands: str) -> dict:
    """Return the files of a package that runs shell commands when it is built."""
    files = trees.deb()
    files["debian/rules"] += "\noverride_dh_auto_build:\n" + "".join(f"\t{one}\n" for one in commands)
    return files


@pytest.mark.parametrize(
    ("command", "limits", "said"),
    [
        ("head -c 2G /dev/zero >filled", {"disk_mib": 900}, "No space left on device"),
        ("perl -e 'fork while 1'", {"processes": 100, "seconds": 15}, "no end after 15 s"),
        ("perl -e '$$x = \"a\" x (1 << 30)'", {"memory_mib": 400}, "Out of memory"),
        ("kill -KILL -1", {}, "the build failed"),
        ("kill -STOP $$PPID; sleep 1000", {"seconds": 15}, "no end after 15 s"),
        (TERMINAL, {}, "the build failed: error: owned .txt"),
    ],
    ids=["disk", "forks", "memory", "kills", "stops", "terminal"],
)
def test_a_build_harms_itself_only(place: Place, capsys, command: str, limits: dict, said: str):
    marker = f"hostile-{uuid.uuid4()}"
    daemon = f"setsid sh -c 'sleep 1000; : {marker}' >/dev/null 2>&1 </dev/null &"
    with pytest.raises(PackageError) as caught:
        place.build(doing(daemon, command), **limits)
    assert re.search(said, f"{caught.value}\n{place.log()}")
    assert str(caught.value).isprintable()
    for shown in (place.log(), capsys.readouterr().out):
        assert "dh_auto_build" in shown
        assert re.sub(r"[\n\t]", "", shown).isprintable()
    processes.wait_until_gone(marker)
    assert place.left() == []


@pytest.mark.skipif(sandbox.memory_control() == "process", reason="no cgroup: memory is limited per process")
def test_a_build_that_eats_memory_in_many_processes_is_ended(place: Place):
    hungry = 'for i in 1 2 3 4 5 6 7 8; do perl -e \'$$x = "a" x (180 << 20); sleep 5; print "had it\\n"\' & done; wait'
    place.build(doing(hungry), memory_mib=256, disk_mib=900)
    assert place.log().count("\nhad it") < 8


def test_a_build_finds_nothing_of_the_host_and_leaves_nothing_there(place: Place):
    marker = f"hostile-{uuid.uuid4()}"
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as secret, socket.create_server(("127.0.0.1", 0)) as server:
        os.fchmod(secret.fileno(), 0o644)
        server.settimeout(0)
        connect = f"bash -c 'exec 3<>/dev/tcp/127.0.0.1/{server.getsockname()[1]}'"
        made = place.build(
            doing(
                f"! cat {secret.name}",
                f"! {connect}",
                f"setsid sh -c 'sleep 1000; : {marker}' >/dev/null 2>&1 </dev/null &",
                "mkdir -p /build/locked/in; mkfifo /build/locked/in/pipe; chmod 0 /build/locked/in /build/locked",
                "touch \"$$(printf '/build/\\033[2J\\n\\377')\"",
            )
        )
        with pytest.raises(BlockingIOError):
            server.accept()
    assert made.origin == "built"
    assert processes.with_marker(marker) == []
    assert place.left() == []


@pytest.mark.parametrize(
    ("files", "target", "limits", "said"),
    [
        (
            trees.deb(depends=", " + ", ".join(f"no-such-package-{number:06}" for number in range(60_000))),
            TARGET,
            {},
            "what it says of itself has more than 1048576 bytes",
        ),
        (
            trees.deb() | {"debian/control": trees.deb()["debian/control"] + " more\n" * (4 << 20)},
            TARGET,
            {},
            "debian/control has more than 16 MiB",
        ),
        (
            trees.deb() | {"debian/changelog": trees.deb()["debian/changelog"].replace("1.0-1", "1.0\033[2J-1")},
            TARGET,
            {},
            "small: ",
        ),
        (trees.rpm(more="%{lua: while true do end}\n"), RPM, {"seconds": 10}, "no end after 10 s"),
        (
            trees.rpm(more="%{lua: x = string.rep('x', 1 << 32)}\n"),
            RPM,
            {"memory_mib": 512},
            "cannot read rpm/small.spec",
        ),
        (trees.rpm(more="Summary(de): \033[2J\nBuildRequires: \033[2J\n"), RPM, {}, "small"),
    ],
    ids=["depends", "description", "version", "endless", "huge", "terminal"],
)
def test_metadata_that_are_a_bomb_are_the_packages_fault(
    place: Place, files: dict, target: str, limits: dict, said: str
):
    with pytest.raises(PackageError, match=said) as caught:
        place.build(files, target, **limits)
    assert str(caught.value).isprintable()
    assert place.left() == []


@pytest.mark.parametrize(
    ("former", "latter", "said"),
    [
        (
            "\n%files",
            "\nhead -c 300 /bin/sh >/build/rpm/RPMS/evil-1-1.noarch.rpm\n\n%files",
            "createrepo_c cannot read what the build made: ./evil",
        ),
        ("- Release.", f"- {'x' * (2 << 20)}", "small: index.other.xml has more than 1 MiB in changelog"),
    ],
    ids=["broken", "changelog"],
)
def test_an_rpm_package_that_no_repository_could_have_is_refused_by_its_build(place: Place, former, latter, said):
    files = trees.rpm()
    files["rpm/small.spec"] = files["rpm/small.spec"].replace(former, latter)
    with pytest.raises(PackageError, match=said) as caught:
        place.build(files, RPM)
    assert str(caught.value).isprintable()
    assert place.left() == []


def test_archives_that_are_a_bomb_are_not_unpacked_or_within_the_limits(place: Place):
    # half a gigabyte in half a megabyte; lintian reads the one, and nobody unpacks one from within another
    bomb = gzip.compress(bytes(64 << 20)) * 8
    files = trees.deb() | {"changelog.gz": bomb, "nested.gz": gzip.compress(bomb)}
    files["debian/small.install"] += "changelog.gz usr/share/doc/small\nnested.gz usr/share/small\n"
    files["debian/rules"] += "\noverride_dh_strip_nondeterminism:\n"
    made = place.build(files, memory_mib=400, disk_mib=900)
    assert [finding for finding in place.lint(made).findings if finding.severity == "error"] == []
    assert place.left() == []


def test_a_package_that_does_not_fit_when_it_is_unpacked_is_at_fault_itself(place: Place):
    files = trees.deb()
    files["debian/rules"] += "\noverride_dh_builddeb:\n\ttruncate -s 300M debian/small/one debian/small/two\n"
    files["debian/rules"] += "\tdh_builddeb -- -Zgzip -z1\n"
    made = place.build(files, disk_mib=900)
    with pytest.raises(PackageError, match="lint reached a limit of memory, processes or disk"):
        place.lint(made)
    assert place.left() == []


def test_a_package_of_tens_of_thousands_of_files_has_a_small_report(tmp_path: Path):
    files = trees.deb()
    touch = "mkdir -p debian/small/srv && cd debian/small/srv && seq -f file-%05.0f 30000 | xargs touch"
    files["debian/rules"] += f"\noverride_dh_builddeb:\n\t{touch}\n\tdh_builddeb -- -Zgzip\n"
    trees.commit(tmp_path / "small", files)
    configuration = trees.config(tmp_path)
    engine = LocalEngine(configuration)
    parameters = trees.local(configuration, tmp_path / "small", ONLY="compile")
    ref = engine.start(f"build-{TARGET}", parameters.values)
    assert engine.wait(ref, 300) == "SUCCESS"
    artifacts = engine.directory(ref) / "archive" / "artifacts"
    (inside,) = Contents.read(artifacts / f"compile-{TARGET}" / "contents.json").packages
    assert len(inside.files) + inside.more_files > 30_000
    page = artifacts / "index.html"
    assert page.stat().st_size < 200_000
    assert "file-00100" in page.read_text()


@pytest.mark.parametrize("target", [TARGET, RPM])
def test_after_all_of_that_the_next_build_succeeds(place: Place, target: str):
    assert place.build(trees.deb() | trees.rpm(), target).origin == "built"
    assert place.left() == []


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
    with snapshot.restored(config, Proxy((), config.cache / "proxy")) as (machine,):
        assert machine.run(USER_WITH_SYSTEMD, timeout=120).status == 0
        # each of them takes less than the limit
        hungry = """perl -e '$x = "a" x (40 << 20); print "had it\\n"; sleep 2' & """
        done = machine.run(
            f'runuser -u tester -- {scope} sh -c "$1" || echo "ended $?"', hungry * 4 + "wait", timeout=60
        )
    assert "ended 143" in done.text()
    assert done.text().count("had it") < 4


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file system of 64 MiB. An ordinary user is given one by whoever runs these tests."""
    if os.getuid():
        return Path(os.environ["PKGCI_SMALL"])
    directory = tmp_path_factory.mktemp("file-system")
    # CLONE_NEWNS: in a mount namespace of this process, so that it is gone with it
    assert ctypes.CDLL(None).unshare(0x20000) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "small", directory], check=True)
    return directory


@contextmanager
def filled(small: Path, free: int) -> Iterator[None]:
    """Leave `free` bytes of a file system while the context lasts."""
    filler = small / "filler"
    with filler.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(small).free - free)
    yield
    filler.unlink()


def run_job(configuration: Config, job: str, parameters: Parameters) -> tuple[str, str, Result | None]:
    """Run a build of a job to its end; return how it ended, its log, and its `result.json` where it could be written."""
    engine = LocalEngine(configuration)
    ref = engine.start(job, {**parameters.values, "RUN_TESTS": "false"})
    ended = engine.wait(ref, 300)
    assert ended
    path = engine.directory(ref) / "archive" / "artifacts" / "result.json"
    result = Result.read(path) if path.exists() else None
    return ended, b"".join(engine.log(ref)).decode(errors="replace"), result


@pytest.mark.parametrize(
    ("kind", "free"), [("data", 0), ("data", 1 << 20), ("state", 0), ("state", 16 << 10), ("tmp", 4 << 10)]
)
def test_a_full_disk_is_the_machines_fault_and_the_next_run_succeeds(
    tmp_path: Path, small: Path, monkeypatch, kind: str, free: int
):
    # more than what is left, so that neither the store nor what goes into the sandbox takes it
    trees.commit(tmp_path / "small", trees.deb() | {"large": os.urandom(3 << 20), "debian/small.docs": "large\n"})
    paths = {name: str(tmp_path / name) for name in ("data", "state")}
    if kind == "tmp":
        monkeypatch.setenv("TMPDIR", str(small))
    else:
        paths[kind] = str(small / kind)
    configuration = trees.config(tmp_path, paths=paths)
    parameters = trees.local(configuration, tmp_path / "small")
    job = f"compile-{TARGET}"
    # without any space for its state it does not even start
    with filled(small, free), nullcontext() if kind != "state" else suppress(InfrastructureError):
        ended, log, result = run_job(configuration, job, parameters)
        assert (ended, "Traceback" in log) == ("FAILURE", False), log
        assert result is None or result.fault == "infrastructure"
    assert run_job(configuration, job, parameters)[0] == "SUCCESS"
    shutil.rmtree(small / kind, ignore_errors=True)


def test_a_snapshot_that_does_not_fit_leaves_nothing(tmp_path: Path, small: Path):
    configuration = trees.config(tmp_path, paths={"data": str(small / "data")})
    # a step says the system's own error in one line, too
    with pytest.raises((InfrastructureError, OSError), match="No space left"):
        guest.plain(configuration, TARGET)
    assert list((small / "data" / "snapshots" / TARGET).iterdir()) == []
    shutil.rmtree(small / "data")


def test_two_checks_of_one_change_at_once_both_pass_and_build_once(tmp_path: Path):
    configuration = trees.config(tmp_path)
    trees.commit(tmp_path / "small", trees.deb())
    engine = LocalEngine(configuration)
    started = []
    for _ in range(2):
        parameters = trees.local(configuration, tmp_path / "small", ZUUL_UUID=uuid.uuid4().hex, RUN_TESTS="false")
        started.append(engine.start(f"build-{TARGET}", parameters.values))
    assert [engine.wait(ref, 300) for ref in started] == ["SUCCESS", "SUCCESS"]
    archives = [engine.directory(ref) / "archive" / "artifacts" for ref in started]
    made = [Build.read(archive / f"compile-{TARGET}" / "build.json") for archive in archives]
    assert sorted(one.origin for one in made) == ["built", "store"]
    published = [Repository.read(archive / f"publish-{TARGET}" / "repository.json") for archive in archives]
    assert published[0].url != published[1].url


def test_after_a_restart_of_the_machine_the_next_run_succeeds_and_removes_what_was_left(place: Place):
    marker = f"restart-{uuid.uuid4()}"
    trees.commit(place.tree, doing(f"perl -e 'sleep 1000; # {marker}'"))
    engine = LocalEngine(place.configuration)
    parameters = trees.local(place.configuration, place.tree, RUN_TESTS="false")
    interrupted = engine.start(f"build-{TARGET}", parameters.values)
    until(lambda: any(Path(f"/proc/{pid}/comm").read_text() == "perl\n" for pid in processes.with_marker(marker)))
    # all of them at once: what is on disk is all that there is afterwards
    cookies = [engine.record(ref).cookie for job in engine.jobs() for ref in engine.builds(job)]
    while doomed := [pid for mark in (*cookies, str(place.directory)) for pid in belonging(mark)]:
        for pid in doomed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    processes.wait_until_gone(marker)
    assert list((place.configuration.data / "store" / "new").iterdir())
    assert engine.record(interrupted).state == "ABORTED"
    assert place.build(trees.deb()).origin == "built"
    assert place.left() == []
    assert not any(engine.record(ref).alive for job in engine.jobs() for ref in engine.builds(job))
