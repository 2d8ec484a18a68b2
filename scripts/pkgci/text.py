"""What may be shown of text that a package, a tool that reads one, or a guest said."""


def printable(text: str, largest: int = 1000) -> str:
    """Return at most `largest` characters of `text` on one line; what a terminal or a page would obey becomes `?`."""
    return "".join(char if char.isprintable() else "?" for char in text).strip()[:largest]


def lines(said: bytes) -> str:
    """Return a log of several lines as text; what a terminal or a page would obey beside line ends and tabs becomes `?`."""
    text = said.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    return "\n".join(
        line if line.isprintable() else "".join(char if char.isprintable() or char == "\t" else "?" for char in line)
        for line in text.split("\n")
    )


def spelled_out(text: str) -> str:
    """Return a text with each character spelled out that a terminal or a page would obey, bidirectional overrides too."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
