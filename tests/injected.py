"""Faults for code under test: a kill at each point where it touches the machine, and a disk of its own."""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from clients import run


class Fault:
    """Kills this process when it comes to its `number`-th fault point: whatever Python's audit events name.

    So the points are all those calls that touch the file system, run a program or reach the database, found by running
    the code; see https://docs.python.org/3/library/audit_events.html.
    """

    EVENTS = ("open", "os.", "shutil.", "subprocess.", "sqlite3.", "pathlib.", "tempfile.")

    def __init__(self, number: int) -> None:
        self.number, self.count, self.armed = number, 0, True
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if not event.startswith(self.EVENTS) or not self.armed:
            return
        if (
            event == "open"
            and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
            and not (arguments[1] is None and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        ):
            return  # reading changes nothing
        self.count += 1
        if self.count == self.number:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_at(number: int, work: Callable[[], object]) -> int | None:
    """Do `work` in a process that is killed at a fault point; return None if it was, else how many there are."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        fault = Fault(number)
        try:
            work()
            fault.armed = False
            os.write(writing, str(fault.count).encode())
        except BaseException:
            fault.armed = False
            traceback.print_exc()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        said = stream.read()
    _, status = os.waitpid(child, 0)
    assert said or os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    return int(said) if said else None


def with_own_disk(place: Path, size: str, work: Callable[[], None]) -> None:
    """Do `work` in a process of its own, for which the directory `place` is a file system of a size, as mount(8) names it."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        said = b""
        try:
            # CLONE_NEWNS, and CLONE_NEWUSER where it needs that
            flags = 0x00020000 if os.getuid() == 0 else 0x10020000
            ids = os.getuid(), os.getgid()
            assert ctypes.CDLL(None, use_errno=True).unshare(flags) == 0
            if ids[0]:
                Path("/proc/self/setgroups").write_text("deny")
                Path("/proc/self/uid_map").write_text(f"0 {ids[0]} 1")
                Path("/proc/self/gid_map").write_text(f"0 {ids[1]} 1")
            run("mount", "--make-rprivate", "/")
            place.mkdir(parents=True, exist_ok=True)
            run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place)
            work()
        except BaseException:
            said = traceback.format_exc().encode()
        os.write(writing, said or b"well")
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        said = stream.read()
    os.waitpid(child, 0)
    assert said == b"well", said.decode()
