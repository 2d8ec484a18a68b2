"""Finding and killing all processes of a build, wherever they went: not only those in a process group or session.

A process belongs to a build when it descends from the build's supervisor (which adopts orphans), or when it, or a process
that it descends from, carries the build's cookie in its environment. Supervisors of other builds are never touched.
"""

import contextlib
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

COOKIE = "PKGCI_COOKIE"
SUPERVISOR = "PKGCI_SUPERVISOR"


def kill_all(
    cookie: str,
    ancestor: int | None = None,
    reap: Callable[[], None] = lambda: None,
    seconds: float = 10,
    variable: str = COOKIE,
) -> int:
    """Kill a build's processes with SIGKILL until there are none.

    Processes of other user ids (those in a sandbox) cannot be killed by an ordinary user: they die with the one that
    made the sandbox, so they are only waited for.

    Args:
        cookie: the build's cookie, the value of `variable` in its processes.
        ancestor: a process whose descendants are the build's too.
        reap: collects the status of ended children of this process.
        seconds: when to give up.
        variable: for what is no whole build, another one.

    Returns:
        How many are left; 0 unless it gave up.
    """
    until = time.monotonic() + seconds
    while True:
        found = _find(f"{variable}={cookie}\0".encode(), ancestor)
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        reap()
        if not found or time.monotonic() > until:
            return len(found)
        time.sleep(0.01)


def _find(mark: bytes, ancestor: int | None) -> set[int]:
    """Return the living processes of a build, without this one and `ancestor`."""
    children = defaultdict(list)
    roots = [] if ancestor is None else [ancestor]
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            # `PID (NAME) STATE PPID ...`, proc(5); the name may contain anything
            state, parent = (entry / "stat").read_bytes().rpartition(b")")[2].split()[:2]
            if state not in (b"Z", b"X"):
                children[int(parent)].append(int(entry.name))
                if mark in _environment(int(entry.name)):
                    roots.append(int(entry.name))
    found: set[int] = set()
    while roots:
        pid = roots.pop()
        if pid not in found:
            found.add(pid)
            roots += [child for child in children[pid] if f"{SUPERVISOR}=".encode() not in _environment(child)]
    return found - {ancestor, os.getpid()}


def _environment(pid: int) -> bytes:
    """Return the environment that a process was started with, or nothing where that is not for this user to see."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes() + b"\0"
    except OSError:
        return b""
