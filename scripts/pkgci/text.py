"""What may be shown of text that a package, a tool that reads one, or a guest said."""

import io
import logging
import re
from collections.abc import Iterable
from typing import IO

# ECMA-48 control sequences (colours, cursor), control strings (OSC and others: titles, links), and two-character ones
ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b\r\n]*(\x07|\x1b\\)|\x1b[@-_]")
# of a line without an end
LINE_BYTES = 1 << 16


def printable(text: str, largest: int = 1000) -> str:
    """Return at most `largest` characters of `text` on one line; what a terminal or a page would obey becomes `?`."""
    return "".join(char if char.isprintable() else "?" for char in text).strip()[:largest]


def plain(text: str) -> str:
    """Return a text of several lines without control sequences; what a terminal or a page would obey becomes `?`.

    Tabs stay. A carriage return ends a line: nothing is hidden by what is written over it.
    """
    text = ESCAPE.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    return "\n".join(
        line
        if line.replace("\t", "").isprintable()
        else "".join(char if char.isprintable() or char == "\t" else "?" for char in line)
        for line in text.split("\n")
    )


def lines(said: bytes) -> str:
    """Return a log as `plain` text; what is no UTF-8 becomes `?`, too, so that it never gets longer."""
    return plain(said.decode(errors="replace").replace("\ufffd", "?"))


def spelled_out(text: str) -> str:
    """Return a text with each character spelled out that a terminal or a page would obey, bidirectional overrides too."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class PlainLog(io.RawIOBase):
    """A stream that takes a log as it is said, and writes what `lines` makes of it to another, each line at its end.

    Closing it writes what is left, and leaves the other stream open.

    Args:
        to: the other stream.
    """

    def __init__(self, to: IO[bytes]) -> None:
        super().__init__()
        self._to = to
        self._rest = b""

    def write(self, block) -> int:
        """Take a block."""
        said = self._rest + block
        end = said.rfind(b"\n") + 1 or (len(said) if len(said) > LINE_BYTES else 0)
        self._rest = said[end:]
        self._to.write(lines(said[:end]).encode())
        return len(block)

    def flush(self) -> None:
        """Flush the other stream."""
        self._to.flush()

    def close(self) -> None:
        """Write what is left."""
        if not self.closed:
            self._to.write(lines(self._rest).encode())
        super().close()


class PlainFormatter(logging.Formatter):
    """Writes messages as `plain` text: file names, and what tools say, are in them."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a message."""
        return plain(super().format(record))


def log_plainly(stream: IO[str], form: str = "%(message)s") -> None:
    """Write this package's messages to a stream, as plain text, and of libraries only warnings.

    Args:
        stream: takes them.
        form: as of `logging.Formatter`.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PlainFormatter(form, datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("pkgci").setLevel(logging.INFO)


def listed(words: Iterable[str], most: int = 20) -> str:
    """Return words joined by commas, the first of very many."""
    kept = tuple(words)
    more = [f"{len(kept) - most} more"] if len(kept) > most else []
    return ", ".join([*kept[:most], *more])
