"""Logs that grow while something runs: what was said is in the file at once, so that a crash leaves it there.

They are plain text, and of a very long one there are the beginning and, once it is whole, the end.
"""

import logging
import threading
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from pkgci.text import PlainLog

log = logging.getLogger(__name__)

LOG_BYTES = 16 << 20


class LogFile(PlainLog):
    """A log to write to; closing it ends the file.

    Args:
        path: the file; its directory is made.
        stamped: each line has the time at which it was said in front.
        largest: bytes that are kept of it.
    """

    def __init__(self, path: Path, stamped: bool = False, largest: int = LOG_BYTES) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._kept = _Kept(path, stamped, largest // 2)
        super().__init__(self._kept)

    def close(self) -> None:
        """Write what is left."""
        if not self.closed:
            super().close()
            self._kept.close()


class _Kept:
    """The first `half` bytes of a log, at once, and its last ones at its end."""

    def __init__(self, path: Path, stamped: bool, half: int) -> None:
        self._file = path.open("wb", buffering=0)
        self._stamped = stamped
        self._left, self._half = half, half
        self._last: deque[bytes] = deque()
        self._bytes, self._omitted = 0, 0
        self._begins = True

    def write(self, text: bytes) -> None:
        if self._stamped:
            stamp = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}"[:-3].encode() + b"Z "
            lines = [stamp + line for line in text.splitlines(keepends=True)]
            if not self._begins and lines:
                lines[0] = lines[0].removeprefix(stamp)
            self._begins = text.endswith(b"\n") if text else self._begins
            text = b"".join(lines)
        self._keep(text)

    def _keep(self, text: bytes) -> None:
        now, later = text[: self._left], text[self._left :]
        self._left -= len(now)
        self._file.write(now)
        if later:
            self._last.append(later)
            self._bytes += len(later)
        while self._bytes > self._half:
            gone = len(self._last.popleft())
            self._bytes -= gone
            self._omitted += gone

    def flush(self) -> None:
        """All is written at once."""

    def close(self) -> None:
        with self._file:
            if self._omitted:
                self._file.write(b"\n[%d bytes are left out]\n" % self._omitted)
            self._file.write(b"".join(self._last))


def record(source: IO[bytes], to: LogFile) -> threading.Thread:
    """Write what a pipe says to a log, in a thread that ends when all who write to the pipe have; both are closed then.

    When the log cannot be written any more, the pipe is read on: whoever writes to it shall not wait.

    Args:
        source: the pipe, unbuffered.
        to: the log.
    """

    def copy() -> None:
        with source:
            try:
                with to:
                    while block := source.read(1 << 16):
                        to.write(block)
            except OSError as error:
                log.warning("a log is not whole: %s", error)
                while source.read(1 << 16):
                    pass

    thread = threading.Thread(target=copy, name="log", daemon=True)
    thread.start()
    return thread
