"""Snapshots: machines that were booted ahead and frozen, disk, memory and devices; a run restores one within seconds.

    snapshots/NAME/ID/{manifest.json,node.qcow2,node.ram,node.state,kernel,initrd,identity}   and   snapshots/NAME/latest

A set is complete in itself and final: `latest` is moved to it, by a rename, only after it was restored once and ssh
answered. It fits one image, one version of QEMU and one command line; the manifest says which, and any other is refused.
Once a day, its files' checksums are compared, and once a job if a file was touched since; at each restore only their sizes
are, since reading a gigabyte may take longer than the restore.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from pkgci.artifacts import File, Record
from pkgci.command import run
from pkgci.config import Config, Target
from pkgci.errors import InfrastructureError
from pkgci.locks import locked
from pkgci.upstream import apt_sources, rpm_repositories
from pkgci.vm.image import Image, image, image_key
from pkgci.vm.machine import Accelerator, Hardware, Machine, accelerator, qemu_version
from pkgci.vm.proxy import Proxy, Rule
from pkgci.vm.remote import Access, GuestError

log = logging.getLogger(__name__)

NODE = "node"
BOOT_SECONDS = 300
SETUP_SECONDS = 600
RESTORE_SECONDS = 60
# the files of a set, and what a machine calls them
FILES = {
    f"{NODE}.qcow2": "disk",
    f"{NODE}.ram": "ram",
    f"{NODE}.state": "state",
    "kernel": "kernel",
    "initrd": "initrd",
    "identity": "identity",
}
# The clock first, since it stood still; then random numbers of the host's: all who restore a snapshot would draw the same.
# 0x5207 is RNDRESEEDCRNG of random(4): what was written counts at once.
AWAKE = """
date -s "@$1" >/dev/null
exec perl -e 'read(STDIN, $seed, 256) == 256 or die "no seed";
    open($pool, ">", "/dev/urandom") or die $!; syswrite($pool, $seed) or die $!; ioctl($pool, 0x5207, 0) or die $!'
"""
PACKAGES = {
    "debian": "dpkg-query -W -f '${Package} ${Version}\\n'",
    "rpm": "rpm -qa --qf '%{NAME} %{EVR}\\n' | sort",
}
# the kernel's caches stay: what the preparation read or looked at, a run finds in memory
FREEZE = "sync"


class UnfitError(InfrastructureError):
    """A snapshot that cannot be used, or is not there: another one has to be made."""


class Manifest(Record):
    """`manifest.json`: what a snapshot fits, and what is in it."""

    name: str
    key: str
    image: str
    qemu: str
    accelerator: Accelerator
    memory_mib: int
    command: tuple[str, ...]
    host_key: str
    created: datetime
    packages: tuple[str, ...]
    files: tuple[File, ...]


class Verified(Record):
    """`verified.json`: when the files of a snapshot had their checksums, and what would have changed with their content."""

    time: datetime
    files: dict[str, tuple[int, ...]]


class Snapshot:
    """A snapshot on this host.

    Args:
        directory: its directory.

    Raises:
        UnfitError: (from any member) it is incomplete, damaged, or does not fit this host's QEMU.
        InfrastructureError: (from any member) a tool is missing, or fails.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self.manifest = Manifest.read(directory / "manifest.json")
        except InfrastructureError as error:
            raise UnfitError(str(error)) from error

    @property
    def id(self) -> str:
        """NAME/ID: what artifacts call it."""
        return f"{self.manifest.name}/{self.directory.name}"

    def check(self) -> None:
        """Check that it fits this host's QEMU and our command line, and that its files have their sizes."""
        manifest = self.manifest
        if manifest.qemu != qemu_version():
            raise UnfitError(f"snapshot {self.id} was made by {manifest.qemu}, here is {qemu_version()}")
        if list(manifest.command) != self._hardware.command():
            raise UnfitError(f"snapshot {self.id} was made with another command line of QEMU")
        for file in manifest.files:
            path = self.directory / file.name
            if not path.is_file() or path.stat().st_size != file.size:
                raise UnfitError(f"snapshot {self.id} is damaged: {file.name} is missing or has another size")

    def verify(self) -> None:
        """Check all that `check` does, and the files' content, unless that was done within a day and none was touched since."""
        self.check()
        stats = {file.name: (self.directory / file.name).stat() for file in self.manifest.files}
        now = {
            name: (one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for name, one in stats.items()
        }
        record = self.directory / "verified.json"
        with suppress(InfrastructureError):
            before = Verified.read(record)
            if before.files == now and _within(timedelta(days=1), before.time):
                return
        for file in self.manifest.files:
            try:
                same = _sha256(self.directory / file.name) == file.sha256
            except OSError as error:
                raise UnfitError(f"snapshot {self.id} is damaged: {file.name}: {error.strerror}") from error
            if not same:
                raise UnfitError(f"snapshot {self.id} is damaged: the content of {file.name} has changed")
        Verified(time=datetime.now(UTC), files=now).write(record)

    @contextmanager
    def restored(self, config: Config, proxy: Proxy, console: Path | None = None) -> Iterator[Machine]:
        """Restore it; the machine runs, with the right time and random numbers of its own, while the context lasts.

        All that the machine writes goes to a directory of its own, which is removed at the end.

        Args:
            config: says where runs have their directories.
            proxy: what the machine may reach.
            console: takes what it said on its console, when it has ended; up to `machine.CONSOLE_BYTES`.
        """
        with locked(self.directory, shared=True) as held:
            if not held:
                raise InfrastructureError(f"snapshot {self.id} was removed meanwhile; start again")
            self.check()
            with _run_directory(config) as directory, proxy.listening(directory):
                _link(self.directory, directory, [name for name in FILES.values() if name != "disk"])
                disk = self.directory / f"{NODE}.qcow2"
                create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "qcow2", directory / "disk"]
                run(create, quiet=True)
                with ExitStack() as stack:
                    if console:
                        stack.callback(_take, directory / "serial.log", console)
                    machine = stack.enter_context(Machine(directory, self._hardware, self.access))
                    machine.restore()
                    machine.connect(RESTORE_SECONDS)
                    seed = secrets.token_bytes(256)
                    done = machine.run(AWAKE, f"{time.time():.3f}", timeout=RESTORE_SECONDS, input=seed)
                    if done.status:
                        raise GuestError(f"cannot wake the machine: {done.text().strip()}")
                    yield machine

    @property
    def _hardware(self) -> Hardware:
        return Hardware(self.manifest.accelerator, self.manifest.memory_mib)

    @property
    def access(self) -> Access:
        """How to log in to machines that are restored from it."""
        return Access(self.directory / "identity", self.manifest.host_key)


def ensure(config: Config, name: str, target: Target, setup: str) -> Snapshot:
    """Return the snapshot `name` of a machine of a target; make it unless there is a young one that fits.

    Args:
        config: the configuration.
        name: what it is called: the target's name, for its plain machine.
        target: the target.
        setup: a shell script that prepares the guest before it is frozen; part of what the snapshot is made from.

    Raises:
        RequestError: the target's base cannot be made.
        InfrastructureError: it cannot be made.
    """
    place = config.data / "snapshots" / name
    place.mkdir(parents=True, exist_ok=True)
    with suppress(UnfitError):
        return _latest(config, name, target, setup)
    with locked(place):
        try:
            # another process may have been faster
            return _latest(config, name, target, setup)
        except UnfitError as reason:
            log.info("%s: a snapshot is made: %s", name, reason)
            return _make(config, name, target, setup)


def upstream_rules(target: Target) -> tuple[Rule, ...]:
    """Return what machines of a target may fetch from the upstream."""
    if target.base == "rpm":
        uris = set(rpm_repositories(target))
    else:
        uris = {source.uri.rstrip("/") + "/" for source in apt_sources(target)}
    return tuple(Rule(uri, immutable=True) for uri in sorted(uris) if uri.startswith(("http://", "https://")))


def _latest(config: Config, name: str, target: Target, setup: str) -> Snapshot:
    """Return the latest snapshot `name` if it fits; else UnfitError says why not."""
    pointer = config.data / "snapshots" / name / "latest"
    if not pointer.exists():
        raise UnfitError("there is none yet")
    snapshot = Snapshot(pointer.resolve())
    snapshot.verify()
    if snapshot.manifest.key != _key(image_key(target), setup, target.machine.memory_mib):
        raise UnfitError("what the former one was made from has changed")
    if not _within(timedelta(days=config.settings.root_days), snapshot.manifest.created):
        raise UnfitError(f"the former one was not made within the last {config.settings.root_days} days")
    if snapshot.manifest.accelerator == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise UnfitError("the former one needs /dev/kvm, which is not accessible")
    return snapshot


def _within(age: timedelta, then: datetime) -> bool:
    """Return whether `then` is not longer ago than `age`, nor, by a clock that was wrong then, longer ahead."""
    return abs(datetime.now(UTC) - then) < age


def _key(image: str, setup: str, memory_mib: int) -> str:
    return hashlib.sha256(json.dumps([image, setup, memory_mib]).encode()).hexdigest()[:32]


def _make(config: Config, name: str, target: Target, setup: str) -> Snapshot:
    """Boot the image, prepare the guest, freeze it, try the set once, and make it the latest."""
    place = config.data / "snapshots" / name
    for leftover in place.glob(".new-*"):
        shutil.rmtree(leftover)
    origin = image(config, target, name)
    log.info("%s: booting a machine to take a snapshot of it (once; about a minute)", name)
    with TemporaryDirectory(prefix=".new-", dir=place) as scratch:
        new = Path(scratch, f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}")
        new.mkdir()
        _freeze(config, name, target, setup, origin, new)
        snapshot = Snapshot(new)
        log.info("%s: trying the snapshot", name)
        with snapshot.restored(config, Proxy((), config.cache / "proxy")):
            pass
        for file in snapshot.manifest.files:
            (new / file.name).chmod(0o400 if file.name == "identity" else 0o444)
        # QEMU opens a file of memory for writing, though a run never writes into this one
        (new / f"{NODE}.ram").chmod(0o644)
        final = place / new.name
        new.rename(final)
    pointer = place / ".latest.new"
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(final.name)
    pointer.replace(place / "latest")
    _remove_others(place, final)
    return Snapshot(final)


def _freeze(config: Config, name: str, target: Target, setup: str, origin: Image, new: Path) -> None:
    """Make the files and the manifest of a snapshot in `new`."""
    memory_mib = target.machine.memory_mib
    for file in ("kernel", "initrd", "identity"):
        shutil.copy(origin.directory / file, new / file)
    hardware = Hardware(accelerator(new / "kernel"), memory_mib)
    log.info("%s: the machine runs by %s", name, hardware.accelerator)
    run(["cp", "--sparse=always", "--reflink=auto", origin.directory / "disk", new / f"{NODE}.qcow2"], quiet=True)
    (new / f"{NODE}.qcow2").chmod(0o644)
    proxy = Proxy(upstream_rules(target), config.cache / "proxy")
    with _run_directory(config) as directory, proxy.listening(directory):
        for file in (f"{NODE}.ram", f"{NODE}.state"):
            (new / file).touch()
        _link(new, directory, list(FILES.values()))
        with Machine(directory, hardware, Access(new / "identity", origin.host_key)) as machine:
            started = time.monotonic()
            machine.boot()
            machine.connect(BOOT_SECONDS)
            log.info("%s: booted in %.0f s; preparing it", name, time.monotonic() - started)
            for script, seconds in ((AWAKE, RESTORE_SECONDS), (setup, SETUP_SECONDS), (FREEZE, RESTORE_SECONDS)):
                seed = secrets.token_bytes(256)
                done = machine.run(script, f"{time.time():.3f}", timeout=seconds, input=seed)
                if done.status:
                    log.error("%s", done.text()[-4000:])
                    said = done.text().strip().splitlines() or ["it said nothing"]
                    raise GuestError(f"cannot prepare the machine of {name}: {said[-1]}")
            listed = machine.run(PACKAGES[target.base], timeout=RESTORE_SECONDS).text()
            machine.save()
    Manifest(
        name=name,
        key=_key(origin.key, setup, memory_mib),
        image=origin.key,
        qemu=qemu_version(),
        accelerator=hardware.accelerator,
        memory_mib=memory_mib,
        command=tuple(hardware.command()),
        host_key=origin.host_key,
        created=datetime.now(UTC),
        packages=tuple(listed.splitlines()),
        files=tuple(File(name=file, size=(new / file).stat().st_size, sha256=_sha256(new / file)) for file in FILES),
    ).write(new / "manifest.json")
    log.info("%s: frozen after %.0f s", name, time.monotonic() - started)


def _take(source: Path, to: Path) -> None:
    # there is none when QEMU did not start
    if source.exists():
        shutil.copyfile(source, to)


def _link(snapshot: Path, directory: Path, names: list[str]) -> None:
    for file, name in FILES.items():
        if name in names:
            (directory / name).symlink_to(snapshot / file)


@contextmanager
def _run_directory(config: Config) -> Iterator[Path]:
    """Yield a new directory for one machine; it is removed at the end, and so are those of processes that were killed."""
    runs = config.cache / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with locked(runs):
            for leftover in runs.iterdir():
                with locked(leftover, wait=False) as dead:
                    if dead:
                        shutil.rmtree(leftover)
            directory = runs / secrets.token_hex(8)
            directory.mkdir(mode=0o700)
            stack.enter_context(locked(directory))
        stack.callback(shutil.rmtree, directory)
        yield directory


def _remove_others(place: Path, latest: Path) -> None:
    """Remove the older snapshots of a target that no run has restored."""
    for other in place.iterdir():
        if other.is_dir() and not other.is_symlink() and other != latest:
            with locked(other, wait=False) as unused:
                if unused:
                    shutil.rmtree(other)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
