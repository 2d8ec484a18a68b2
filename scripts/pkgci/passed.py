"""Tests that passed, remembered: one whose input is that of a test that passed is not repeated, and leaves the same records.

Its key is the digest of everything that decides a result, our own code and libraries among it. A pass counts as long as
roots and snapshots do; what fails is never remembered. Each is one file, below the state directory of the host that ran
the test: nothing of what is under test sees that. Whether to repeat a test all the same, `Parameters.repeat` says.
"""

import hashlib
import json
import logging
import tarfile
import tempfile
import time
import uuid
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from pkgci.artifacts import Tested
from pkgci.config import ROOT, Config
from pkgci.disk import fsync
from pkgci.errors import InfrastructureError, PackageError

log = logging.getLogger(__name__)

SUFFIX = ".tar.gz"

Test = TypeVar("Test", bound=Tested)


def once(
    config: Config,
    record: Path,
    model: type[Test],
    made_from: Callable[[], object],
    run: Callable[[], Test],
    *,
    repeat: bool,
    **now: object,
) -> Test:
    """Run a test, unless it passed before with the same input: then leave the artifacts of that time.

    Args:
        config: says where passes are kept, and for how long.
        record: the path of the record that the test leaves; the directory around it holds all that it leaves.
        model: the record's model.
        made_from: returns all that decides the result, as of JSON. Where something cannot be read, the test just runs.
        run: the test; it returns the record, or raises an error when it does not pass.
        repeat: run it in any case.
        now: fields of the record that belong to this run, whenever the test itself ran.

    Returns:
        The record: with `passed_before` when the test was not run.

    Raises:
        PkgciError: what `run` raises.
    """
    place = config.state / "passed"
    try:
        made = json.dumps([record.name, made_from(), _code()], sort_keys=True)
    except InfrastructureError as error:
        log.info("whether it has passed before is not known: %s", error)
        return run()
    path = place / f"{hashlib.sha256(made.encode()).hexdigest()}{SUFFIX}"
    age = timedelta(days=config.settings.root_days)
    former = None if repeat else _take(path, record, model, age)
    if former is None:
        try:
            passed = run()
        except PackageError:
            # it passes sometimes only, which is not to pass
            with suppress(OSError):
                path.unlink()
            raise
        _remember(path, record.parent, age)
        return passed
    former = former.model_copy(update=now)
    former.write(record)
    _note(record.parent, former.note)
    log.info("%s", former.note)
    return former


def files(directory: Path, pattern: str = "**/*") -> list[tuple[str, str]]:
    """Return the files in a directory that match, by their relative paths, with the sha256 of each one's content."""
    found = (path for path in sorted(directory.glob(pattern)) if path.is_file() and "__pycache__" not in path.parts)
    return [(str(path.relative_to(directory)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in found]


@cache
def _code() -> list:
    """Return what tells this program from any other version of it: its files, and the libraries that it finds."""
    return [files(ROOT / "scripts" / "pkgci"), sorted({(one.name, one.version) for one in metadata.distributions()})]


def _take(path: Path, record: Path, model: type[Test], age: timedelta) -> Test | None:
    """Put what a pass left beside where `record` will be, and return its record; None if there is no young, whole one."""
    try:
        with tempfile.TemporaryDirectory(dir=record.parent) as scratch, tarfile.open(path, "r:gz") as tar:
            then = datetime.fromtimestamp(tar.getmember(record.name).mtime, UTC)
            # by a clock that was wrong then, or is now, it is from the future
            if abs(datetime.now(UTC) - then) > age:
                return None
            tar.extractall(scratch, members=[one for one in tar if one.isreg() or one.isdir()])  # noqa: S202 - we made it
            former = model.read(Path(scratch, record.name)).model_copy(update={"passed_before": then})
            for one in sorted(Path(scratch).iterdir()):
                one.rename(record.parent / one.name)
            return former
    except FileNotFoundError:
        return None
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error, InfrastructureError) as error:
        log.warning("%s is damaged and not used: %s", path, error)
        return None


def _remember(path: Path, artifacts: Path, age: timedelta) -> None:
    """Keep what a test left that passed, whole or not at all; what is too old for anybody goes."""
    new = path.with_name(f"{uuid.uuid4()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.iterdir():
            # another process may be faster
            with suppress(FileNotFoundError):
                if abs(time.time() - other.lstat().st_mtime) > age.total_seconds():
                    other.unlink()
        with tarfile.open(new, "w:gz", compresslevel=1) as tar:
            for one in sorted(artifacts.iterdir()):
                tar.add(one, one.name)
        # on disk before it has its name: a crash of the machine leaves none or a whole one
        fsync(new)
        new.replace(path)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        log.warning("that it passed cannot be remembered: %s", error)


def _note(artifacts: Path, note: str) -> None:
    """Say in each JUnit file that its tests were not run this time."""
    for path in (artifacts / "junit").glob("*.xml"):
        tree = ET.parse(path)  # noqa: S314 - we wrote it
        for suite in tree.iter("testsuite"):
            ET.SubElement(suite, "system-out").text = note
        tree.write(path, encoding="utf-8", xml_declaration=True)
