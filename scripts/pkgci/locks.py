"""Locks on directories, for processes of one host: they end with their holder, however that one ends.

What is yet to be made, and appears by a rename, cannot be locked itself: a file beside it is, by `filelock`.
"""

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock

from pkgci.disk import fsync_all
from pkgci.errors import InfrastructureError

OWNER = "owner"
POLL = 0.05


@contextmanager
def locked(directory: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold a `flock(2)` on an existing directory.

    Args:
        directory: what to lock.
        shared: with other holders of shared locks.
        wait: wait for the lock rather than give up.

    Returns:
        Whether the lock is held. It is not when another process holds it (without `wait`), or when the directory is
        gone or was replaced by the time the lock was there.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            held = os.path.samestat(os.fstat(descriptor), directory.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        yield held
    finally:
        os.close(descriptor)


@contextmanager
def scratch(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new directory, which is removed at the end; first, those that killed processes of this user left.

    Args:
        parent: where it is made, also by others, such as `/tmp`.
        prefix: what the names of these directories begin with.
    """
    for left in parent.glob(f"{prefix}*"):
        with suppress(OSError):
            if left.lstat().st_uid == os.getuid():
                with locked(left, wait=False) as dead:
                    if dead:
                        shutil.rmtree(left)
    while True:
        with TemporaryDirectory(prefix=prefix, dir=parent) as made, locked(Path(made), wait=False) as held:
            # until it was locked, another process may have taken it for one that was left
            if held:
                yield Path(made)
                return


def make_once(place: Path, usable: Callable[[], bool], make: Callable[[Path], None]) -> None:
    """Make a directory, unless it is there and usable: one process does, others wait; it appears whole, or not at all.

    Args:
        place: the directory.
        usable: whether it is, now.
        make: makes the content in the new directory that it is given; of files only it is sure that they are on the disk.
            What a killed process left of one is removed by the next.
    """
    if usable():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if usable():
            return
        new, old = place.with_name(f".{place.name}.new"), place.with_name(f".{place.name}.old")
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir()
        try:
            make(new)
            # on disk before it has its name
            fsync_all(new.iterdir())
            if place.exists():
                place.rename(old)
            new.rename(place)
        finally:
            for leftover in (new, old):
                shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def waiting(directory: Path, what: str, *, seconds: float, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold an existing directory, in which `owner` says who does, or wait for it so long.

    Args:
        directory: what to lock.
        what: what it is, for the messages.
        seconds: how long to wait.
        on_wait: called with one line that says who is waited for, each time that it is another one.

    Raises:
        InfrastructureError: another process still holds it.
    """
    deadline = time.monotonic() + seconds
    waited_for = None
    while True:
        with locked(directory, wait=False) as held:
            if held:
                write_owner(directory)
                yield
                return
        owner = read_owner(directory) or "another process"
        if time.monotonic() > deadline:
            raise InfrastructureError(f"{what} is still held by {owner} after {seconds:.0f} s; retry later")
        if owner != waited_for:
            on_wait(f"{what} is held by {owner}; waiting up to {deadline - time.monotonic():.0f} s")
            waited_for = owner
        time.sleep(POLL)


def write_owner(directory: Path) -> None:
    """Say in a directory that this process holds it: its id, host, and job."""
    new = directory / f".{OWNER}"
    new.write_text(describe_owner())
    new.rename(directory / OWNER)


def describe_owner() -> str:
    """Return who this process is, for a person."""
    job = "/".join(filter(None, map(os.environ.get, ("JOB_NAME", "BUILD_NUMBER"))))
    return f"process {os.getpid()} on {socket.gethostname()}" + (f" ({job})" if job else "")


def read_owner(directory: Path) -> str | None:
    """Return who said last that it holds a directory, for a person; None when nobody did."""
    with suppress(OSError, UnicodeDecodeError):
        return (directory / OWNER).read_text() or None
    return None
