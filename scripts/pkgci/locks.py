"""Locks on directories, for processes of one host: they end with their holder, however that one ends.

What is yet to be made, and appears by a rename, cannot be locked itself: a file beside it is, by `filelock`.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
