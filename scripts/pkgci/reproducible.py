"""Whether a build comes out the same when it is done again: bit for bit, and if not, where, in diffoscope's words.

diffoscope reads hostile packages, so it runs in the sandbox, over a root of its own that is made when it is first needed.
"""

import hashlib
import logging
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pkgci.errors import PkgciError
from pkgci.formats.base import Request
from pkgci.roots import comparison_root
from pkgci.sandbox import Files, execute
from pkgci.store import Entry
from pkgci.text import lines

log = logging.getLogger(__name__)

SCRIPT = Path(__file__).with_suffix(".sh")
# a .buildinfo names the time of the build, a .changes the .buildinfo's checksum
COMPARED = re.compile(r".+\.(deb|dsc|rpm|tar\.[a-z0-9]+)", re.ASCII)
SECONDS = 600
LINES = 60


def compare(request: Request, entry: Entry, again: Path) -> list[str]:
    """Return the names of the files that differ between a build in the store and one in the directory `again`.

    A difference is explained in the build's log and, more of it, in `logs/diffoscope.txt` beside it.
    """
    built = {path.name: path for path in again.iterdir() if COMPARED.fullmatch(path.name)}
    stored = {file.name: file.sha256 for file in entry.record.files if COMPARED.fullmatch(file.name)}
    names = sorted(
        name for name in built.keys() | stored.keys() if name not in built or _digest(built[name]) != stored.get(name)
    )
    if not names:
        log.info("reproducible: all %d files came out the same", len(stored))
        return []
    for name in names:
        log.info(
            "not reproducible: %s", name if name in built and name in stored else f"{name} is in one of the two only"
        )
    report = request.log_path.with_name("diffoscope.txt")
    try:
        _explain(request, [entry.directory / name for name in names], [again / name for name in names], report)
    except PkgciError as error:
        log.info("diffoscope cannot say more: %s", error)
        return names
    said = report.read_text().splitlines()
    for line in said[:LINES]:
        log.info("%s", line)
    if len(said) > LINES:
        log.info("... and %d more lines in logs/%s", len(said) - LINES, report.name)
    return names


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _explain(request: Request, former: Sequence[Path], latter: Sequence[Path], report: Path) -> None:
    """Write what diffoscope says of two sets of files, as far as they exist, to `report`."""
    files = Files()
    for side, paths in (("first", former), ("second", latter)):
        files.add_directory(f"/in/{side}")
        for path in paths:
            if path.exists():
                files.add_file(f"/in/{side}/{path.name}", path)
    limits = request.limits.model_copy(update={"seconds": SECONDS})
    root = comparison_root(request.config, request.target_name)
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as said:
        output = Path(scratch)
        execute(root.path, SCRIPT.read_text(), files=files, output=output, limits=limits, log_to=said)
        report.write_text(lines((output / "differences").read_bytes()))
