"""How a sync is stopped from outside: what it runs is ended and nothing more is begun, but a switch comes to its end."""

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pkgci.errors import Aborted


class Stop:
    """A sync's own; `now` is called by another thread."""

    def __init__(self) -> None:
        self.called = False
        self._lock = threading.Lock()
        self._shielded = False
        self._running: set[subprocess.Popen] = set()

    def now(self) -> None:
        """Stop the sync."""
        with self._lock:
            self.called = True
            self._end()

    def check(self) -> None:
        """Raise when the sync is to stop here.

        Raises:
            Aborted: it is.
        """
        if self.called and not self._shielded:
            raise Aborted("stopped")

    @contextmanager
    def running(self, process: subprocess.Popen) -> Iterator[None]:
        """End a process when the sync is stopped meanwhile.

        Raises:
            Aborted: it was.
        """
        with self._lock:
            self._running.add(process)
            self._end()
        try:
            yield
        finally:
            with self._lock:
                self._running.remove(process)
        self.check()

    @contextmanager
    def shielded(self) -> Iterator[bool]:
        """Let what follows come to its end; yields False when the sync was stopped before."""
        with self._lock:
            self._shielded = not self.called
        try:
            yield self._shielded
        finally:
            self._shielded = False

    def _end(self) -> None:
        if self.called and not self._shielded:
            for process in self._running:
                process.terminate()
