"""Roots of failed builds as the builds left them, kept on the machine that built, for `pkgci shell`.

They stay some days, and all together no more than the configured size: the oldest go first. Each is a directory of the
state directory that appears whole by one rename; whoever reads it holds a shared lock on it.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pkgci.artifacts import Record
from pkgci.config import Config, Limits
from pkgci.errors import InfrastructureError
from pkgci.locks import locked

log = logging.getLogger(__name__)

ROOT = "root.tar.zst"
RECORD = "failed.json"


class FailedBuild(Record):
    """`failed.json`: a build whose root is kept; `parent` is the build that started it, `limits` are what it had."""

    job: str
    number: int
    parent: str
    target: str
    package: str
    version: str
    reason: str
    ended: datetime
    limits: Limits

    def __str__(self) -> str:
        return f"{self.job}/{self.number}"


@contextmanager
def room(config: Config) -> Iterator[Path]:
    """Yield a new directory in which a build may make `ROOT`; it goes away unless `keep` is called on it."""
    place = config.state / "failed"
    place.mkdir(parents=True, exist_ok=True)
    prune(config, datetime.now(UTC))
    new = Path(tempfile.mkdtemp(prefix=".", dir=place))
    try:
        with locked(new):
            yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def keep(config: Config, new: Path, build: FailedBuild) -> None:
    """Keep what a failed build made in its room, if it made anything, and say so in the log."""
    days, largest = config.settings.failed_root_days, config.settings.failed_roots_mib
    if not (new / ROOT).exists():
        log.info("its root is not kept: it ended before there was one, or the disk has no place for it")
        return
    if (new / ROOT).stat().st_size > largest << 20:
        log.info("its root is not kept: packed it is larger than failed_roots_mib, %d", largest)
        return
    build.write(new / RECORD)
    final = new.with_name(f"{build.job}-{build.number}")
    # of a build of that number in a state directory that has begun anew since
    shutil.rmtree(final, ignore_errors=True)
    new.rename(final)
    prune(config, datetime.now(UTC))
    log.info("its root is kept for %d days: pkgci shell %s", days, build)


def kept(config: Config) -> list[tuple[Path, FailedBuild]]:
    """Return the builds whose roots are kept, each with its directory, newest first."""
    found = []
    for record in (config.state / "failed").glob(f"[!.]*/{RECORD}"):
        # it may go away at this moment
        with suppress(InfrastructureError):
            found.append((record.parent, FailedBuild.read(record)))
    return sorted(found, key=lambda one: one[1].ended, reverse=True)


def surplus(config: Config, now: datetime) -> list[Path]:
    """Return the directories of kept roots that are too old or too many, and what killed builds left."""
    oldest = now - timedelta(days=config.settings.failed_root_days)
    left = config.settings.failed_roots_mib << 20
    gone = []
    for directory, build in kept(config):
        with suppress(FileNotFoundError):
            left -= (directory / ROOT).stat().st_size
        if build.ended < oldest or left < 0:
            gone.append(directory)
    return [*gone, *(config.state / "failed").glob(".*")]


def prune(config: Config, now: datetime) -> list[Path]:
    """Remove what is `surplus`, unless someone uses it just now; return what is gone."""
    gone = []
    for directory in surplus(config, now):
        with locked(directory, wait=False) as held:
            if held:
                shutil.rmtree(directory, ignore_errors=True)
                gone.append(directory)
    return gone
