"""The job `host-prepare` and `pkgci doctor --host`: what system tests need on their host, and what takes its disk.

Networks are not among it: those of machines are made of QEMU's own parts, and nothing of the host's is set up for them.
"""

import grp
import logging
import os
import pwd
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pkgci.command import run
from pkgci.config import ROOT, Config
from pkgci.doctor import Finding, places, system
from pkgci.errors import InfrastructureError, PkgciError
from pkgci.locks import locked
from pkgci.roots import has_tools_root, tools_root
from pkgci.vm import guest, lan, snapshot
from pkgci.vm.machine import MACHINE_TYPE, QEMU, accelerator, qemu_version
from pkgci.vm.snapshot import Snapshot

log = logging.getLogger(__name__)

SETUP = ROOT / "scripts" / "setup.sh"
KVM = Path("/dev/kvm")
PROBE_SECONDS = 30


@dataclass(frozen=True)
class _Thing:
    """Something that system tests need: how it is looked at, and how it is made, where this program can."""

    look: Callable[[], Iterable[Finding]]
    make: Callable[[], object] | None = None


def prepare(config: Config) -> str:
    """Run the job: make what is missing; what is there stays as it is. What is what is said in a line each.

    Returns:
        What was done, in a few words.

    Raises:
        InfrastructureError: something is missing that only a person can mend; all the rest is made.
    """
    done, missing = 0, []
    for thing in _things(config):
        found = list(thing.look())
        lacking = {number for number, one in enumerate(found) if not one.good}
        why = ""
        if thing.make and lacking:
            try:
                thing.make()
            except (PkgciError, OSError) as error:
                why = str(error)
            found = list(thing.look())
        for number, one in enumerate(found):
            if not one.good:
                missing.append(f"{one.what}: {why or one.mend}")
                log.info("missing: %s", missing[-1])
            elif number in lacking:
                done += 1
                log.info("done     %s", one.what)
            else:
                log.info("ok       %s", one.what)
    if missing:
        raise InfrastructureError(f"{len(missing)} things are missing; first: {missing[0]}")
    return f"{done} things were made" if done else "everything was there"


def examine(config: Config) -> Iterator[Finding]:
    """Look at all that system tests need, and at the snapshots that there are; nothing is changed."""
    for thing in _things(config):
        yield from thing.look()
    yield Finding(f"machines run by {qemu_version()}", True)
    yield from _snapshots(config)


def _things(config: Config) -> Iterator[_Thing]:
    yield _Thing(system, _set_up)
    # whoever runs out of space, or may not write, reads here which key of the configuration helps
    yield _Thing(lambda: places(config))
    for place in (config.data / "snapshots", config.data / "runs", config.cache / "images", config.cache / "runs"):
        yield _Thing(
            lambda place=place: [_directory(place)], lambda place=place: place.mkdir(parents=True, exist_ok=True)
        )
    yield _Thing(lambda: [_locks(config.data / "snapshots")])
    yield _Thing(lambda: [_kvm()])
    yield _Thing(lambda: [_networks()])
    for name in config.names("targets"):
        yield _Thing(lambda name=name: [_plain(config, name)], lambda name=name: guest.plain(config, name))
        yield _Thing(lambda name=name: [_tools(config, name)], lambda name=name: tools_root(config, name))
    yield _Thing(lambda: _accelerator(config))


def _set_up() -> None:
    """Install packages and set sub-ids, as root or by sudo; else the error is the command for an administrator."""
    done = run([SETUP, "host"], check=False, quiet=True)
    if done.returncode:
        said = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        command = next((line for line in said if line.startswith("sudo ")), None)
        last = said[-1] if said else f"status {done.returncode}"
        raise InfrastructureError(f"an administrator runs: {command}" if command else f"{SETUP}: {last}")


def _directory(place: Path) -> Finding:
    good = place.is_dir() and os.access(place, os.R_OK | os.W_OK | os.X_OK)
    mend = "pkgci host-prepare" if not place.exists() else f"sudo chown {os.getuid()}:{os.getgid()} {place}"
    return Finding(f"directory {place}", good, mend)


def _locks(place: Path) -> Finding:
    """Look whether locks work where snapshots are: it may be a file system that hosts share."""
    if not place.is_dir():
        return Finding(f"locks in {place}", False, "pkgci host-prepare")
    kind = run(["stat", "--file-system", "--format=%T", place], quiet=True).stdout.decode().strip()
    what = f"locks work in {place} ({kind})"
    try:
        with (
            tempfile.TemporaryDirectory(dir=place, prefix=".") as new,
            locked(Path(new)),
            locked(Path(new), wait=False) as two,
        ):
            return Finding(what, not two, "mount its file system with locks")
    except OSError as error:
        return Finding(what, False, f"make it a directory that can be written, with locks ({error.strerror})")


def _kvm() -> Finding:
    if not KVM.exists():
        return Finding(f"no {KVM}: machines are emulated", True)
    if os.access(KVM, os.R_OK | os.W_OK):
        return Finding(f"{KVM} can be opened", True)
    try:
        group, user = grp.getgrgid(KVM.stat().st_gid).gr_name, pwd.getpwuid(os.getuid()).pw_name
        mend = f"sudo usermod --append --groups {group} {user}, then log in again"
    except KeyError:
        # in a container, where the device comes from outside
        mend = f"let user {os.getuid()} into group {KVM.stat().st_gid}, which have no names here"
    return Finding(f"{KVM} can be opened", False, mend)


def _networks() -> Finding:
    """Look whether this QEMU has the parts that networks of machines are made of."""
    what = "networks of machines: hubs and Unix sockets of QEMU's, nothing of the host"
    with tempfile.TemporaryDirectory(prefix="pkgci-") as scratch:
        own = Path(scratch, "one")
        own.mkdir()
        try:
            run(
                [QEMU, "-machine", MACHINE_TYPE, "-nodefaults", "-display", "none", "-S", "-monitor", "stdio"]
                + lan.backends({"one": ["lan"], "two": ["lan"]})["one"],
                input=b"quit\n",
                cwd=own,
                timeout=PROBE_SECONDS,
                quiet=True,
            )
        except InfrastructureError as error:
            return Finding(what, False, f"QEMU 7.2 or later ({error})")
    return Finding(what, True)


def _plain(config: Config, target: str) -> Finding:
    return _found(f"plain machine of {target}", lambda: snapshot.unfit(config, guest.plain_plan(config, target)))


def _tools(config: Config, target: str) -> Finding:
    """Look for what runs a source package's own tests in a machine."""
    what = f"root with autopkgtest for {target}"
    return _found(what, lambda: "" if has_tools_root(config, target) else "there is none, or it is too old")


def _found(what: str, lacks: Callable[[], str]) -> Finding:
    try:
        why = lacks()
    except PkgciError as error:
        why = str(error)
    return Finding(f"{what}{why and f': {why}'}", not why, "pkgci host-prepare")


def _accelerator(config: Config) -> Iterator[Finding]:
    """Boot a kernel, if there is one, to see how machines run; a device that exists proves nothing."""
    for target in config.names("targets"):
        latest = config.data / "snapshots" / target / "latest" / f"{guest.PLAIN}.kernel"
        if latest.exists():
            by = accelerator(latest)
            yield Finding(
                f"a machine boots by {by}" + (f", not by {KVM}" if by == "tcg" and KVM.exists() else ""), True
            )
            return


def _snapshots(config: Config) -> Iterator[Finding]:
    for pointer in sorted((config.data / "snapshots").glob("*/latest")):
        try:
            found = Snapshot(pointer.resolve())
            found.check()
            made = f"{found.manifest.created:%Y-%m-%d %H:%M} UTC"
            yield Finding(f"snapshot {found.id} of {made}, {found.manifest.accelerator}", True)
        except PkgciError as error:
            name = pointer.parent.name
            job = f"snapshot-prepare-{name.partition('@')[0]}" if "@" in name else "host-prepare"
            yield Finding(f"snapshot of {name}: {error}", False, f"pkgci jobs run {job}")


def usage(config: Config) -> str:
    """Return a table of what takes space where, and how much is free there."""
    rows = [
        ("snapshots", config.data / "snapshots"),
        ("kept runs", config.data / "runs"),
        ("store", config.data / "store"),
        ("repositories", config.data / "repositories"),
        ("images", config.cache / "images"),
        ("roots", config.cache / "roots"),
        ("machines that run", config.cache / "runs"),
        ("builds", config.state / "jobs"),
    ]
    rows += [("other data", config.data), ("other cache", config.cache), ("other state", config.state)]
    seen: set[tuple[int, int]] = set()
    lines = [f"{'what':17}  {'MiB':>8}  {'MiB free':>9}  where\n"]
    for what, place in rows:
        if place.is_dir():
            taken = _taken(place, seen) >> 20
            lines.append(f"{what:17}  {taken:8}  {shutil.disk_usage(place).free >> 20:9}  {place}\n")
    return "".join(lines)


def _taken(place: Path, seen: set[tuple[int, int]]) -> int:
    """Return the bytes of the disk that a directory takes; a file with several names counts where it is seen first."""
    total = 0
    # a directory may be a link to another disk
    for parent, _, files in os.walk(place.resolve()):
        for name in files:
            try:
                stat = Path(parent, name).lstat()
            except OSError:
                continue
            if (stat.st_dev, stat.st_ino) not in seen:
                seen.add((stat.st_dev, stat.st_ino))
                total += stat.st_blocks * 512
    return total
