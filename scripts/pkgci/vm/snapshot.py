"""Snapshots: sets of machines that were booted ahead and frozen, disks, memory and devices; a run restores one in seconds.

    snapshots/NAME/ID/{manifest.json,NODE.{qcow2,ram,state,kernel,initrd,identity}}   and   snapshots/NAME/latest

NODE.disk1.qcow2 and so on are a machine's further disks.

A set is complete in itself and final: `latest` is moved to it, by a rename, only after it was restored once and ssh
answered. It fits its images, one version of QEMU and its command lines; the manifest says which, and others are refused.
All machines of a set stand still before the first one is saved, and none runs before the last one is loaded: so what they
have to do with each other, a TCP connection for example, goes on in a restored set.
Once a day, its files' checksums are compared, and once a job if a file was touched since; at each restore only their sizes
are, since reading a gigabyte may take longer than the restore.
"""

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO

from pkgci.artifacts import File, Part, Record
from pkgci.command import run
from pkgci.config import Config, Target
from pkgci.errors import InfrastructureError
from pkgci.locks import locked, scratch
from pkgci.text import plain, printable
from pkgci.upstream import apt_sources, rpm_repositories
from pkgci.vm import lan
from pkgci.vm.image import DISK_MIB as BLANK_MIB
from pkgci.vm.image import Image, directory_of, image, image_key
from pkgci.vm.machine import PACKED, Accelerator, Clock, Hardware, Machine, accelerator, blaming_the_host, qemu_version
from pkgci.vm.proxy import Proxy, Rule
from pkgci.vm.remote import Access, Completed, DeafError, Fault, FaultError, GuestError

log = logging.getLogger(__name__)

BOOT_SECONDS = 300
SETUP_SECONDS = 600
RESTORE_SECONDS = 60
# of a machine that does not come up, bytes
CONSOLE_SHOWN = 4000
# a product's deployment says a lot, and only its end is shown
SAID_BYTES = 64 << 20
# what of a machine's disk is kept at most: a package under test can fill it
DISK_MIB = 1024
# what the names of unfinished snapshots begin with
NEW = ".new-"
# where a kept run has the snapshot that it began as
BASE = "base"
# the files of each node by their suffixes in a set: what a machine calls them
FILES = {
    "qcow2": "disk",
    "ram": "ram",
    "state": "state",
    "kernel": "kernel",
    "initrd": "initrd",
    "identity": "identity",
}
# The clock first, since it stood still, unless it is to go on from there; then random numbers of the host's: all who restore
# a snapshot would draw the same.
# 0x5207 is RNDRESEEDCRNG of random(4): what was written counts at once.
AWAKE = """
[ -z "$1" ] || date -s "@$1" >/dev/null
exec perl -e 'read(STDIN, $seed, 256) == 256 or die "no seed";
    open($pool, ">", "/dev/urandom") or die $!; syswrite($pool, $seed) or die $!; ioctl($pool, 0x5207, 0) or die $!'
"""
PACKAGES = {
    "debian": "dpkg-query -W -f '${Package} ${Version}\\n'",
    "rpm": "rpm -qa --qf '%{NAME} %{EVR}\\n' | sort",
}
# usage: NAME [INTERFACE ADDRESS/PREFIX]...; the lines of /etc/hosts on stdin. By a unit, so that it survives a restart.
NETWORK = """
cat >>/etc/hosts
echo "$1" >/etc/hostname
# a distribution may have no command for it
echo "$1" >/proc/sys/kernel/hostname
shift
while [ "$#" -gt 0 ]; do
    cat >"/etc/systemd/system/pkgci-$1.service" <<X
[Unit]
BindsTo=sys-subsystem-net-devices-$1.device
After=sys-subsystem-net-devices-$1.device
Wants=network.target
Before=network.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=ip link set $1 up
ExecStart=ip address add $2 dev $1
[Install]
WantedBy=multi-user.target
X
    systemctl enable --now "pkgci-$1"
    shift 2
done
"""
# usage: SCRIPT [ARGUMENT...]; a tar archive of its directory on stdin. It stays, since what it starts may need the other files.
DEPLOY = """
mkdir -p /opt/pkgci
cd "$(mktemp -d /opt/pkgci/XXXXXX)"
tar -xf -
script=$1
shift
exec sh -eu "./$script" "$@" 2>&1 </dev/null
"""
# the kernel's caches stay: what the preparation read or looked at, a run finds in memory
FREEZE = "sync"
# of a run's directory, which has one for each machine by its name: what no machine is called
PROXY = ".host"


class UnfitError(InfrastructureError):
    """A snapshot that cannot be used, or is not there: another one has to be made."""


class OldError(UnfitError):
    """A snapshot that is too old, and fits otherwise."""

    def __init__(self, snapshot: "Snapshot", days: int) -> None:
        super().__init__(f"the former one was not made within the last {days} days")
        self.snapshot = snapshot


class FrozenNode(Part):
    """A machine of a set: what it fits, and what is in it.

    `boot` is the machine that it boots from by the network, if any, `further_disks` how many it has beside the first one.
    """

    name: str
    image: str
    boot: str | None = None
    further_disks: int = 0
    memory_mib: int
    addresses: tuple[str, ...]
    networks: tuple[str, ...]
    command: tuple[str, ...]
    host_key: str
    packages: tuple[str, ...]


class Manifest(Record):
    """`manifest.json`: what a set of machines fits, and what is in it; `seconds` is how long they took to boot and deploy."""

    name: str
    key: str
    qemu: str
    accelerator: Accelerator
    clock: Clock = "host"
    created: datetime
    seconds: float = 0
    nodes: tuple[FrozenNode, ...]
    files: tuple[File, ...]
    # of all else in it
    sha256: str = ""

    def digest(self) -> str:
        """Return what `sha256` has to be: of what is in its file, not of fields that are newer than that."""
        return hashlib.sha256(self.model_dump_json(exclude={"sha256"}, exclude_unset=True).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write it with its checksum; see `Record.write`."""
        # as it is read again: with all fields
        whole = Manifest.model_validate_json(self.model_dump_json(by_alias=True))
        super(Manifest, whole.model_copy(update={"sha256": whole.digest()})).write(path)


class Verified(Record):
    """`verified.json`: when the files of a snapshot had their checksums, and what would have changed with their content."""

    time: datetime
    files: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Planned:
    """A machine to make.

    Args:
        target: what its image is made of.
        addresses: as `192.168.77.1/24` by the networks' names.
        build: the script that its image is made by as well.
        boot: the machine that it boots from by the network, if it has no image.
        disks: the sizes of further disks, which are empty, in MiB.
    """

    target: Target
    addresses: Mapping[str, str] = field(default_factory=dict)
    build: Path | None = None
    boot: str | None = None
    disks: tuple[int, ...] = ()

    @property
    def key(self) -> list:
        """All that it is made from, as of JSON."""
        memory, image = self.target.machine.memory_mib, image_key(self.target, self.build)
        return [image, memory, dict(self.addresses), self.boot, self.disks]


@dataclass(frozen=True)
class Step:
    """A shell script to run on a machine: its file, whose whole directory goes with it, and what it may take."""

    node: str
    script: Path
    seconds: int


@dataclass(frozen=True)
class Plan:
    """What a set of machines is made from.

    Args:
        name: what it is called: the target's name, for its plain machine.
        nodes: its machines by name, in the order in which they are started.
        setup: a shell script that prepares each of them.
        deploy: what makes the product of them, in order.
        health: what must succeed before they are frozen, and when they were restored.
        clock: the time that they have when they were restored.
    """

    name: str
    nodes: Mapping[str, Planned]
    setup: str
    deploy: tuple[Step, ...] = ()
    health: tuple[Step, ...] = ()
    clock: Clock = "host"

    def key(self) -> str:
        """Return the key of all that the set is made from.

        Raises:
            RequestError: a script cannot be read, or a target has no upstream.
        """
        nodes = [[name, *node.key] for name, node in self.nodes.items()]
        scripts = [self.setup, NETWORK, DEPLOY, AWAKE, FREEZE]
        steps = [
            [step.node, step.script.name, hashlib.sha256(directory_of(step.script)).hexdigest(), step.seconds]
            for step in (*self.deploy, *self.health)
        ]
        made_from = [nodes, scripts, steps, len(self.deploy), self.clock]
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]


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
        self.check_qemu()
        if any(list(node.command) != self.hardware(node).command() for node in manifest.nodes):
            raise UnfitError(f"snapshot {self.id} was made with another command line of QEMU")
        for file in manifest.files:
            path = self.directory / file.name
            if not path.is_file() or path.stat().st_size != file.size:
                raise UnfitError(f"snapshot {self.id} is damaged: {file.name} is missing or has another size")

    def check_qemu(self) -> None:
        """Check that it was made by this host's QEMU."""
        if self.manifest.qemu != qemu_version():
            raise UnfitError(f"snapshot {self.id} was made by {self.manifest.qemu}, here is {qemu_version()}")

    def verify(self) -> None:
        """Check all that `check` does, and the files' content, unless that was done within a day and none was touched since."""
        self.check()
        if self.manifest.sha256 != self.manifest.digest():
            raise UnfitError(f"snapshot {self.id} is damaged: the content of manifest.json has changed")
        stats = {file.name: (self.directory / file.name).stat() for file in self.manifest.files}
        # not the time of a change of the inode: a run that is kept, or removed, is a link more, or less
        now = {name: (one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for name, one in stats.items()}
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
    def restored(
        self, config: Config, proxy: Proxy, consoles: Sequence[Path] = (), as_kept: bool = False
    ) -> Iterator[tuple[Machine, ...]]:
        """Restore it; its machines run, with random numbers of their own, while the context lasts.

        Their time is the host's, or, if the manifest says so, that at which they were frozen, or kept.

        All that they write goes to a directory of its own, which is removed at the end.

        Args:
            config: says where runs have their directories.
            proxy: what the machines may reach.
            consoles: take what each machine says on its console, as it comes; up to `machine.CONSOLE_BYTES`.
            as_kept: as they were when `keep` left them beside this directory, also where one does not let us in any more.

        Returns:
            The machines, in the order of `running`.
        """
        nodes = self.running(as_kept)
        with locked(self.directory, shared=True) as held:
            if not held:
                raise InfrastructureError(f"snapshot {self.id} was removed meanwhile; start again")
            self.check()
            with _run_directory(config) as directory, proxy.listening(directory / PROXY), ExitStack() as stack:
                # left last: a thread that waits for a machine ends with it
                threads = stack.enter_context(ThreadPoolExecutor(len(nodes)))
                backends = lan.backends({node.name: node.networks for node in nodes})
                made = [self._machine(directory, node, as_kept, backends[node.name]) for node in nodes]
                for machine, console in zip(made, consoles, strict=False):
                    (machine.directory / "serial.log").symlink_to(console.absolute())
                machines = tuple(stack.enter_context(machine) for machine in made)
                for machine in machines:
                    machine.load()
                for machine in machines:
                    machine.go_on()
                for node, done in zip(
                    nodes, [threads.submit(_wake, machine, RESTORE_SECONDS) for machine in machines], strict=True
                ):
                    try:
                        done.result()
                    except GuestError as error:
                        if not as_kept and isinstance(error, DeafError):
                            raise FaultError(Fault.NOT_RESTORED, f"{node.name}: {error}") from error
                        if not as_kept:
                            raise
                        log.warning("%s: %s", node.name, error)
                yield machines

    def running(self, as_kept: bool) -> tuple[FrozenNode, ...]:
        """Return the machines that can be restored: all; `as_kept` those that had not ended by themselves.

        Raises:
            InfrastructureError: there is none.
        """
        nodes = tuple(node for node in self.manifest.nodes if not as_kept or self._packed(node).exists())
        if not nodes:
            raise InfrastructureError(
                f"all machines had ended when they were kept; their disks are in {self.directory.parent}"
            )
        return nodes

    def _packed(self, node: FrozenNode) -> Path:
        return self.directory.parent / f"{node.name}.{PACKED}"

    def _machine(self, directory: Path, node: FrozenNode, as_kept: bool, backends: Sequence[str]) -> Machine:
        """Return a machine of a run's directory, on an overlay over its frozen disk."""
        own = directory / node.name
        own.mkdir()
        hardware = self.hardware(node)
        files, disks = _files(hardware), _disks(hardware)
        _link(self.directory, own, node.name, {suffix: name for suffix, name in files.items() if suffix not in disks})
        if as_kept:
            (own / PACKED).symlink_to(self._packed(node))
        for suffix, name in disks.items():
            disk = (self.directory.parent if as_kept else self.directory) / f"{node.name}.{suffix}"
            run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "qcow2", own / name], quiet=True)
        return Machine(own, hardware, self.access(node), backends)

    def hardware(self, node: FrozenNode) -> Hardware:
        """Return the hardware of a machine of it."""
        return Hardware(
            self.manifest.accelerator,
            node.memory_mib,
            node.addresses,
            bool(node.boot),
            self.manifest.clock,
            node.further_disks,
        )

    def access(self, node: FrozenNode) -> Access:
        """How to log in to a machine that is restored from it."""
        return Access(self.directory / f"{node.name}.identity", node.host_key)


def keep(snapshot: Snapshot, machines: Sequence[Machine], place: Path) -> None:
    """End restored machines, and keep them in the new directory `place` as they are; of one that has ended, its disk.

    Beside what has changed, the directory `BASE` has the snapshot, by hard links: it may be superseded meanwhile.

    Raises:
        InfrastructureError: there is no space for them, or what ran there has written so much that others' would go without.
    """
    for machine in machines:
        written = sum(disk.stat().st_blocks * 512 for disk in machine.disks) >> 20
        if written > DISK_MIB:
            raise InfrastructureError(f"{written} MiB were written to the disks; up to {DISK_MIB} MiB are kept")
    base = place / BASE
    base.mkdir(parents=True)
    for name in ("manifest.json", *(file.name for file in snapshot.manifest.files)):
        path = snapshot.directory / name
        try:
            os.link(path, base / name)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            run(["cp", "--preserve=mode", "--sparse=always", path, base / name], quiet=True)
    running = []
    for machine in machines:
        with suppress(InfrastructureError):
            machine.stop()
            running.append(machine)
    for node, machine in zip(snapshot.manifest.nodes, machines, strict=True):
        if machine in running:
            machine.pack(place / f"{node.name}.{PACKED}")
        machine.kill()
        for suffix, own in zip(_disks(snapshot.hardware(node)), machine.disks, strict=True):
            disk = place / f"{node.name}.{suffix}"
            shutil.move(own, disk)
            run(["qemu-img", "rebase", "-u", "-F", "qcow2", "-b", f"{BASE}/{disk.name}", disk], quiet=True)


def unneeded(config: Config, names: Collection[str], before: float) -> list[Path]:
    """Return the directories of snapshots that nothing refers to, and what killed preparations left.

    Args:
        config: says where they are.
        names: those of which the latest ones are needed.
        before: a time stamp. The latest one of another name stays if it was made or used since: another configuration may
            have its snapshots here, too.
    """
    places = sorted(place for place in (config.data / "snapshots").glob("*") if place.is_dir())
    return [path for place in places for path in _unneeded(place, names, before)]


def _unneeded(place: Path, names: Collection[str], before: float) -> list[Path]:
    old = place.name not in names and (place / "latest").exists() and (place / "latest").stat().st_mtime < before
    return _left(place) + _superseded(place) + ([(place / "latest").resolve()] if old else [])


def _left(place: Path) -> list[Path]:
    return sorted(place.glob(f"{NEW}*"))


def _superseded(place: Path) -> list[Path]:
    return [
        path
        for path in sorted(place.iterdir())
        if path.is_dir()
        and not path.name.startswith(".")
        and not path.is_symlink()
        and path.resolve() != (place / "latest").resolve()
    ]


def discard(directory: Path, names: Collection[str], before: float) -> bool:
    """Remove what `unneeded` returned, if it still does and nothing uses it; return whether it is gone."""
    # while one is made, it has its name already, and is not the latest yet
    latest = directory.parent / "latest"
    with locked(directory.parent, wait=False) as quiet:
        gone = quiet and directory in _unneeded(directory.parent, names, before) and _discard(directory)
        if gone and not latest.exists():
            latest.unlink(missing_ok=True)
        return gone


def _discard(directory: Path) -> bool:
    with locked(directory, wait=False) as unused:
        if unused:
            shutil.rmtree(directory)
    return unused


def ensure(config: Config, plan: Plan, renew: bool = False, anew: bool = False) -> Snapshot:
    """Return the snapshot of a plan; make it unless there is a young one that fits. One that is only too old is a last resort.

    Args:
        config: the configuration.
        plan: what it is made from.
        renew: for who makes it ahead: replace also one that would be too old within a day, or fail.
        anew: replace it in any case.

    Raises:
        RequestError: the base of a target cannot be made, or a script cannot be read.
        InfrastructureError: it cannot be made; a former one is as it was.
    """
    place = config.data / "snapshots" / plan.name
    place.mkdir(parents=True, exist_ok=True)
    days = 0 if anew else config.settings.root_days - renew
    with suppress(UnfitError):
        return _latest(config, plan, days)
    with locked(place):
        try:
            # another process may have been faster
            return _latest(config, plan, days)
        except UnfitError as reason:
            log.info("%s: a snapshot is made: %s", plan.name, reason)
            try:
                return _make(config, plan)
            except InfrastructureError as error:
                if renew or not isinstance(reason, OldError):
                    raise
                log.warning("%s: the former one stays in use: %s", plan.name, error)
                return reason.snapshot


def unfit(config: Config, plan: Plan) -> str:
    """Return why `ensure` would make the snapshot of a plan; empty if there is one that it would return."""
    try:
        _latest(config, plan, config.settings.root_days)
    except UnfitError as reason:
        return str(reason)
    return ""


def upstream_rules(target: Target) -> tuple[Rule, ...]:
    """Return what machines of a target may fetch from the upstream."""
    if target.base == "rpm":
        uris = set(rpm_repositories(target))
    else:
        uris = {source.uri.rstrip("/") + "/" for source in apt_sources(target)}
    return tuple(Rule(uri, immutable=True) for uri in sorted(uris) if uri.startswith(("http://", "https://")))


def _latest(config: Config, plan: Plan, days: int) -> Snapshot:
    """Return the latest snapshot of a plan if it fits, and was made within so many days; else UnfitError says why not."""
    pointer = config.data / "snapshots" / plan.name / "latest"
    if not pointer.exists():
        raise UnfitError("there is none yet")
    snapshot = Snapshot(pointer.resolve())
    with locked(snapshot.directory, shared=True) as held:
        if not held:
            raise UnfitError("the former one has just been removed")
        snapshot.verify()
    if snapshot.manifest.key != plan.key():
        raise UnfitError("what the former one was made from has changed")
    if snapshot.manifest.accelerator == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise UnfitError("the former one needs /dev/kvm, which is not accessible")
    if not _within(timedelta(days=days), snapshot.manifest.created):
        raise OldError(snapshot, days)
    return snapshot


def _within(age: timedelta, then: datetime) -> bool:
    """Return whether `then` is not longer ago than `age`, nor, by a clock that was wrong then, longer ahead."""
    return abs(datetime.now(UTC) - then) < age


def _make(config: Config, plan: Plan) -> Snapshot:
    """Boot the images, prepare and deploy them, freeze them, try the set once, and make it the latest."""
    place = config.data / "snapshots" / plan.name
    origins = _origins(config, plan)
    log.info("%s: booting what a snapshot is taken of (once; about a minute)", plan.name)
    with scratch(place, NEW) as directory:
        snapshot = _freeze(config, plan, origins, directory, Making())
        log.info("%s: trying the snapshot", plan.name)
        with snapshot.restored(config, Proxy((), config.cache / "proxy")) as machines:
            run_steps(plan, plan.health, dict(zip(plan.nodes, machines, strict=True)))
        final = place / snapshot.directory.name
        snapshot.directory.rename(final)
    pointer = place / ".latest.new"
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(final.name)
    pointer.replace(place / "latest")
    for other in _superseded(place):
        _discard(other)
    return Snapshot(final)


@dataclass(frozen=True)
class Making:
    """How the machines of a plan are made.

    Args:
        rules: what they may fetch besides the upstream.
        by: what runs machines on this host; it is found out if it is not known.
        consoles: take what machines say on their consoles, by their names.
    """

    rules: tuple[Rule, ...] = ()
    by: Accelerator | None = None
    consoles: Mapping[str, Path] = field(default_factory=dict)


@contextmanager
def redeployed(
    config: Config, plan: Plan, name: str, rebuild: Callable[[Machine], None], making: Making
) -> Iterator[Snapshot]:
    """Yield a set that is nobody else's: a plan deployed anew, with one machine's image rebuilt. It goes at the end.

    Args:
        config: the configuration.
        plan: the plan.
        name: the machine whose image is rebuilt.
        rebuild: does that, in a machine that was booted from the image as it is.
        making: how the machines are made.

    Raises:
        InfrastructureError: it cannot be made; and whatever `rebuild` raises.
    """
    origins = _origins(config, plan)
    with _run_directory(config) as directory:
        _check_space(directory, plan, origins)
        origins[name] = _rebuilt(config, plan, name, origins[name], rebuild, making, directory)
        log.info("%s: deploying it anew, with the image of %s that was rebuilt", plan.name, name)
        yield _freeze(config, plan, origins, directory, making)


def _check_space(directory: Path, plan: Plan, origins: Mapping[str, Image]) -> None:
    """Check that a set that is deployed anew, and the image that is rebuilt for it, fit where runs are.

    Raises:
        InfrastructureError: they may not.
    """
    disks = {name: image.directory / "disk" for name, image in origins.items() if not plan.nodes[name].boot}
    written = sum(disk.stat().st_blocks * 512 >> 20 for disk in disks.values())
    needed = 2 * written + sum(node.target.machine.memory_mib for node in plan.nodes.values())
    free = shutil.disk_usage(directory).free >> 20
    if free < needed:
        raise InfrastructureError(
            f"no space to deploy {plan.name} anew: {free} MiB free for {directory.parent}, {needed} MiB needed; "
            "see `pkgci doctor --host` for what takes the disk"
        )


def _rebuilt(
    config: Config,
    plan: Plan,
    name: str,
    origin: Image,
    rebuild: Callable[[Machine], None],
    making: Making,
    directory: Path,
) -> Image:
    """Return the image that a machine is after `rebuild`, in a directory for runs."""
    own, image = directory / f"{name}.before", directory / f"{name}.image"
    own.mkdir()
    image.mkdir()
    for file in ("kernel", "initrd", "identity"):
        shutil.copy(origin.directory / file, image / file)
        (own / file).symlink_to(image / file)
    for file in ("ram", "state"):
        (own / file).touch()
    (own / "proxy").symlink_to(f"../{PROXY}/proxy")
    run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", origin.directory / "disk", "-F", "qcow2", own / "disk"],
        quiet=True,
    )
    by = making.by or accelerator(image / "kernel")
    hardware = Hardware(by, plan.nodes[name].target.machine.memory_mib)
    proxy = _proxy(config, plan, making.rules)
    with (
        proxy.listening(directory / PROXY),
        Machine(own, hardware, Access(image / "identity", origin.host_key)) as machine,
    ):
        machine.boot()
        _come_up(plan, name, machine, time.monotonic())
        rebuild(machine)
        machine.shut_down(RESTORE_SECONDS)
    run(["qemu-img", "convert", "-O", "qcow2", own / "disk", image / "disk"], quiet=True)
    return Image(image, f"{origin.key}, rebuilt", origin.host_key)


def _origins(config: Config, plan: Plan) -> dict[str, Image]:
    """Return the image of each machine; of one that boots from the network, that of the machine that serves it."""
    made: dict[str, Image] = {}
    for name, node in plan.nodes.items():
        made[name] = made[node.boot] if node.boot else image(config, node.target, plan.name, node.build)
    return made


def _proxy(config: Config, plan: Plan, rules: Iterable[Rule]) -> Proxy:
    """Return what machines may fetch while they are made: the upstream, and what else `rules` allow."""
    upstream = {rule for node in plan.nodes.values() for rule in upstream_rules(node.target)}
    return Proxy((*rules, *sorted(upstream, key=lambda rule: rule.prefix)), config.cache / "proxy")


def _freeze(config: Config, plan: Plan, origins: Mapping[str, Image], place: Path, making: Making) -> Snapshot:
    """Make a snapshot in the directory `place`."""
    new = place / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    new.mkdir()
    by = making.by or accelerator(next(iter(origins.values())).directory / "kernel")
    log.info("%s: the machines run by %s", plan.name, by)
    networks = list(dict.fromkeys(network for node in plan.nodes.values() for network in node.addresses))
    hardware = {
        name: Hardware(
            by,
            node.target.machine.memory_mib,
            tuple(lan.address(networks.index(network), number) for network in node.addresses),
            bool(node.boot),
            plan.clock,
            len(node.disks),
        )
        for number, (name, node) in enumerate(plan.nodes.items())
    }
    for name, origin in origins.items():
        for file in {"kernel", "initrd", "identity"} & set(_files(hardware[name])):
            shutil.copy(origin.directory / file, new / f"{name}.{file}")
        sizes = (BLANK_MIB, *plan.nodes[name].disks)
        for suffix, size in zip(_disks(hardware[name]), sizes, strict=True):
            disk = new / f"{name}.{suffix}"
            if suffix in FILES and not hardware[name].from_network:
                run(["cp", "--sparse=always", "--reflink=auto", origin.directory / "disk", disk], quiet=True)
            else:
                run(["qemu-img", "create", "-q", "-f", "qcow2", disk, f"{size}M"], quiet=True)
            disk.chmod(0o644)
        for file in ("ram", "state"):
            (new / f"{name}.{file}").touch()
    backends = lan.backends({name: list(node.addresses) for name, node in plan.nodes.items()})
    with (
        _run_directory(config) as directory,
        _proxy(config, plan, making.rules).listening(directory / PROXY),
        ExitStack() as stack,
    ):
        threads = stack.enter_context(ThreadPoolExecutor(len(plan.nodes)))
        machines = {}
        for name, origin in origins.items():
            own = directory / name
            own.mkdir()
            _link(new, own, name, _files(hardware[name]))
            if name in making.consoles:
                (own / "serial.log").symlink_to(making.consoles[name].absolute())
            access = Access(new / f"{name}.identity", origin.host_key)
            machines[name] = stack.enter_context(Machine(own, hardware[name], access, backends[name]))
        started = time.monotonic()
        from_disk = [name for name in machines if not hardware[name].from_network]
        for name in from_disk:
            machines[name].boot()
        for done in [threads.submit(_set_up, plan, name, machines[name], started) for name in from_disk]:
            done.result()
        run_steps(plan, plan.deploy, machines)
        others = [name for name in machines if hardware[name].from_network]
        for name in others:
            machines[name].boot()
        begun = time.monotonic()
        for done in [threads.submit(_come_up, plan, name, machines[name], begun) for name in others]:
            done.result()
        run_steps(plan, plan.health, machines)
        seconds = round(time.monotonic() - started, 1)
        for machine in machines.values():
            _succeed(machine, FREEZE, seconds=RESTORE_SECONDS, what=f"prepare the machine of {plan.name}")
        listed = {
            name: machine.run(PACKAGES[plan.nodes[name].target.base], timeout=RESTORE_SECONDS).text()
            for name, machine in machines.items()
        }
        for machine in machines.values():
            machine.stop()
        for machine in machines.values():
            machine.save()
    files = [f"{name}.{suffix}" for name in plan.nodes for suffix in _files(hardware[name])]
    Manifest(
        name=plan.name,
        key=plan.key(),
        qemu=qemu_version(),
        accelerator=by,
        clock=plan.clock,
        created=datetime.now(UTC),
        seconds=seconds,
        nodes=tuple(
            FrozenNode(
                name=name,
                image=origins[name].key,
                boot=node.boot,
                further_disks=len(node.disks),
                memory_mib=node.target.machine.memory_mib,
                addresses=hardware[name].addresses,
                networks=tuple(node.addresses),
                command=tuple(hardware[name].command()),
                host_key=origins[name].host_key,
                packages=tuple(listed[name].splitlines()),
            )
            for name, node in plan.nodes.items()
        ),
        files=tuple(File(name=file, size=(new / file).stat().st_size, sha256=_sha256(new / file)) for file in files),
    ).write(new / "manifest.json")
    for file in files:
        # QEMU opens a file of memory for writing, though a run never writes into this one
        modes = {".identity": 0o400, ".ram": 0o644}
        (new / file).chmod(modes.get(Path(file).suffix, 0o444))
    log.info("%s: frozen after %.0f s", plan.name, time.monotonic() - started)
    return Snapshot(new)


def _files(hardware: Hardware) -> dict[str, str]:
    """Return what the files of a machine are called, by their suffixes in a set."""
    own = {
        suffix: name for suffix, name in FILES.items() if not (hardware.from_network and suffix in ("kernel", "initrd"))
    }
    return own | _disks(hardware)


def _disks(hardware: Hardware) -> dict[str, str]:
    """Return the same of its disks only."""
    return {"qcow2" if name == FILES["qcow2"] else f"{name}.qcow2": name for name in hardware.disks()}


def _wake(machine: Machine, seconds: float) -> None:
    """Wait until a machine lets us in, and give it random numbers, and the host's time where it is to have that."""
    machine.connect(seconds)
    now = f"{time.time():.3f}" if machine.clock == "host" else ""
    _succeed(machine, AWAKE, now, input=secrets.token_bytes(256), what="wake the machine")


def _come_up(plan: Plan, name: str, machine: Machine, started: float) -> None:
    """Wait for a machine that boots, and give it the time and random numbers."""
    try:
        with blaming_the_host(machine, BOOT_SECONDS, f"{plan.name}: {name} does not come up"):
            machine.connect(BOOT_SECONDS)
    except InfrastructureError as error:
        # the file goes with the machine
        log.error("the console of %s ends with:\n%s", name, plain(machine.console()[-CONSOLE_SHOWN:]))
        if not isinstance(error, GuestError):
            raise
        raise GuestError(f"{plan.name}: {name} does not come up: {error}") from error
    log.info("%s: %s booted in %.0f s", plan.name, name, time.monotonic() - started)
    what = f"prepare the machine of {plan.name}"
    _succeed(machine, AWAKE, f"{time.time():.3f}", input=secrets.token_bytes(256), what=what)


def _set_up(plan: Plan, name: str, machine: Machine, started: float) -> None:
    """Prepare a machine that boots: its clock, its name and its networks, and what the plan says."""
    _come_up(plan, name, machine, started)
    what = f"prepare the machine of {plan.name}"
    own = plan.nodes[name].addresses
    if len(plan.nodes) > 1 or own:
        interfaces = [word for number, address in enumerate(own.values(), 1) for word in (f"eth{number}", address)]
        _succeed(machine, NETWORK, name, *interfaces, input=hosts(plan.nodes, name).encode(), what=what)
        _succeed(machine, "cat >/etc/ethers", input=ethers(plan.nodes, name).encode(), what=what)
    _succeed(machine, plan.setup, seconds=SETUP_SECONDS, what=what)


def hosts(nodes: Mapping[str, Planned], name: str) -> str:
    """Return the lines of /etc/hosts for a machine: of each one the address in the first network that it shares with this one.

    Of one that shares none it is the first address, in case that another machine is the way there.
    """
    known = {}
    for other, node in nodes.items():
        shared = [node.addresses[network] for network in nodes[name].addresses if network in node.addresses]
        known[other] = next(iter([*shared, *node.addresses.values()]), None)
    return "".join(f"{address.partition('/')[0]} {other}\n" for other, address in known.items() if address)


def ethers(nodes: Mapping[str, Planned], name: str) -> str:
    """Return the lines of /etc/ethers, ethers(5), for a machine: of each other one in its networks the MAC address there."""
    networks = list(dict.fromkeys(network for node in nodes.values() for network in node.addresses))
    return "".join(
        f"{lan.address(networks.index(network), number)} {other}\n"
        for number, (other, node) in enumerate(nodes.items())
        for network in node.addresses
        if other != name and network in nodes[name].addresses
    )


def run_steps(plan: Plan, steps: Sequence[Step], machines: Mapping[str, Machine]) -> None:
    """Run an environment's scripts, in order.

    Raises:
        GuestError: one of them fails.
    """
    for step in steps:
        log.info("%s: %s: %s", plan.name, step.node, step.script.name)
        what = f"run {step.script} on {step.node}"
        beside, machine = directory_of(step.script), machines[step.node]
        with blaming_the_host(machine, step.seconds, f"cannot {what}"):
            _succeed(machine, DEPLOY, step.script.name, input=beside, seconds=step.seconds, what=what)


def run_script(machine: Machine, script: Path, *arguments: str, seconds: float, to: IO[bytes]) -> Completed:
    """Run an environment's script on a machine, in a copy of the directory that it lies in; `to` takes what it says, too.

    Raises:
        RequestError: it cannot be read.
        GuestError: as of `Machine.run`.
    """
    beside = directory_of(script)
    return machine.run(DEPLOY, script.name, *arguments, timeout=seconds, input=beside, limit=SAID_BYTES, to=to)


def restart(machines: Mapping[str, Machine]) -> Iterator[tuple[str, float, str]]:
    """Restart machines at once, and wait until they are up.

    Returns:
        Of each its name, the seconds that it took, and, when it does not let us in, the reason.
    """
    begun = time.monotonic()
    for machine in machines.values():
        machine.reset()
    with ThreadPoolExecutor(len(machines)) as threads:
        ends = {name: threads.submit(_awake_since, machine, begun) for name, machine in machines.items()}
    for name, end in ends.items():
        yield name, *end.result()


def _awake_since(machine: Machine, begun: float) -> tuple[float, str]:
    reason = ""
    try:
        with blaming_the_host(machine, BOOT_SECONDS, "the machine is restarted"):
            _wake(machine, BOOT_SECONDS)
    except GuestError as error:
        reason = str(error)
    return round(time.monotonic() - begun, 1), reason


def _succeed(
    machine: Machine, script: str, *arguments: str, what: str, input: bytes = b"", seconds: float = RESTORE_SECONDS
) -> None:
    """Run a script that has to succeed; `what` says for an error what it is there for."""
    done = machine.run(script, *arguments, timeout=seconds, input=input, limit=SAID_BYTES)
    if done.status:
        log.error("%s", plain(done.text()[-4000:]))
        said = done.text().strip().splitlines() or ["it said nothing"]
        raise GuestError(f"cannot {what}: {printable(said[-1])}")


def _link(snapshot: Path, directory: Path, node: str, files: Mapping[str, str]) -> None:
    """Make links to a node's files, names by suffixes, in a machine's directory, and to where the run's proxy listens."""
    for suffix, name in files.items():
        (directory / name).symlink_to(snapshot / f"{node}.{suffix}")
    (directory / "proxy").symlink_to(f"../{PROXY}/proxy")


@contextmanager
def _run_directory(config: Config) -> Iterator[Path]:
    """Yield a new directory for a run's machines; it is removed at the end, and so are those of processes that were killed."""
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
            (directory / PROXY).mkdir()
            stack.enter_context(locked(directory))
        stack.callback(shutil.rmtree, directory)
        yield directory


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
