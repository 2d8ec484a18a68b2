"""What may be shown of text that a package, a tool that reads one, or a guest said."""


def printable(text: str, largest: int = 1000) -> str:
    """Return at most `largest` characters of `text` on one line; what a terminal or a page would obey becomes `?`."""
    return "".join(char if char.isprintable() else "?" for char in text).strip()[:largest]
