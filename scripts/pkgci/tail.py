"""Follows a growing log file in the background and copies it to another stream."""

import threading
from pathlib import Path
from typing import IO


class Tail:
    """A context manager: what is appended to `path` while it holds is written to `to`, completely at its end.

    Args:
        path: an existing file.
        to: a binary stream.
    """

    def __init__(self, path: Path, to: IO[bytes]) -> None:
        self._source = path.open("rb")
        self._source.seek(0, 2)
        self._to = to
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._copy, daemon=True)

    def __enter__(self) -> "Tail":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._source.close()

    def _copy(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(0.2)
            while block := self._source.read(1 << 16):
                self._to.write(block)
            self._to.flush()
