"""The report of a run of `build`, `gate` or `systest`: one self-contained page, readable without scripts, of its artifacts.

What it shows is hostile: packages choose names, logs and scripts. All of it is escaped, no character is left that a
browser or a terminal obeys, and the page itself allows nothing but its own style.
"""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from pkgci.report.brief import brief
from pkgci.report.view import PAGE, View, read
from pkgci.text import spelled_out

__all__ = ["PAGE", "View", "brief", "read", "write"]


def write(artifacts: Path) -> Path:
    """Write the page of a run to its artifacts.

    Args:
        artifacts: what a build of the job `build`, `gate` or `systest` left, with `result.json`.

    Returns:
        The page.

    Raises:
        InfrastructureError: there is no `result.json`.
        OSError: the page cannot be written.
    """
    path = artifacts / PAGE
    path.write_text(render(read(artifacts)), encoding="utf-8")
    return path


def render(view: View) -> str:
    """Return the page of a run."""
    environment = Environment(
        loader=PackageLoader("pkgci.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters.update(bytes=_bytes, seconds=_seconds)
    style = Path(__file__).with_name("page.css").read_text()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = environment.get_template("page.html.j2")
    return page.render(view=view, style=Markup(style), style_digest=digest, newline=Markup("\n"))  # noqa: S704


def _shown(value: object) -> object:
    """Return what is put into the page for a value: nothing of it is left to be obeyed."""
    if isinstance(value, Markup):
        return value
    return escape(spelled_out(str(value)))


def _bytes(number: int) -> str:
    """Return a size for people."""
    size = float(number)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _seconds(number: float) -> str:
    """Return a duration for people."""
    if number < 60:
        return f"{number:.1f} s"
    minutes, seconds = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
