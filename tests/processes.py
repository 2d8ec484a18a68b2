"""Looking for processes on this machine, for tests of what must not outlive what."""

import time
from pathlib import Path


def with_marker(marker: str) -> list[int]:
    """Return the processes on this machine with `marker` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_until_gone(marker: str, seconds: float = 20) -> None:
    """Wait until no process has `marker` in its command line."""
    deadline = time.monotonic() + seconds
    while with_marker(marker):
        assert time.monotonic() < deadline, f"{marker} still runs"
        time.sleep(0.05)
