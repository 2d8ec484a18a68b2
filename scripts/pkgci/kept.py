"""What builds leave on the machine that ran them, for a person who has to understand a failure: each some days.

Each is a directory that appears whole by one rename, with a record of the build; whoever reads it holds a shared lock on it.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Generic, TypeVar

from pkgci.artifacts import Record
from pkgci.disk import freed, links
from pkgci.errors import InfrastructureError, RequestError
from pkgci.locks import locked, scratch

RECORD = "kept.json"


class KeptBuild(Record):
    """`kept.json`: a build of which something is kept; `parent` is the build that started it."""

    job: str
    number: int
    parent: str
    target: str
    ended: datetime

    def __str__(self) -> str:
        return f"{self.job}/{self.number}"

    def described(self) -> str:
        """Return it for a list of several."""
        return str(self)

    def names(self) -> set[str]:
        """Return all that a person may call it: the empty name is the latest of all."""
        return {str(self), str(self.number), self.parent, self.job, self.target, ""}


Build = TypeVar("Build", bound=KeptBuild)


class Kept(Generic[Build]):
    """What is kept of builds of one kind.

    Args:
        place: the directory that has a directory for each.
        record: what is known of each.
        days: how long each is kept.
        largest_mib: all of them together; the oldest go first. Without it, no limit.
    """

    def __init__(self, place: Path, record: type[Build], days: int, largest_mib: int | None = None) -> None:
        self.place = place
        self.days = days
        self._record = record
        self._largest_mib = largest_mib

    @contextmanager
    def room(self, now: datetime) -> Iterator[Path]:
        """Yield a new directory in which a build may leave something; it goes away unless `keep` is called on it."""
        self.place.mkdir(parents=True, exist_ok=True)
        self.prune(now)
        with scratch(self.place, ".") as new:
            yield new

    def keep(self, new: Path, build: Build, now: datetime) -> None:
        """Keep what a build has left in its room."""
        build.write(new / RECORD)
        final = new.with_name(f"{build.job}-{build.number}")
        # of a build of that number in a state directory that has begun anew since
        shutil.rmtree(final, ignore_errors=True)
        new.rename(final)
        self.prune(now)

    def all(self) -> list[tuple[Path, Build]]:
        """Return what is kept, each directory with what is known of the build, newest first."""
        found = []
        for record in self.place.glob(f"[!.]*/{RECORD}"):
            # it may go away at this moment
            with suppress(InfrastructureError):
                found.append((record.parent, self._record.read(record)))
        return sorted(found, key=lambda one: one[1].ended, reverse=True)

    def surplus(self, now: datetime) -> list[Path]:
        """Return the directories of what is too old or too much, and what killed builds left."""
        oldest = now - timedelta(days=self.days)
        taken = 0
        gone = []
        for directory, build in self.all():
            if self._largest_mib is not None:
                taken += freed([links(directory)])
            if build.ended < oldest or (self._largest_mib is not None and taken > self._largest_mib << 20):
                gone.append(directory)
        return [*gone, *self.place.glob(".*")]

    def prune(self, now: datetime) -> list[Path]:
        """Remove what is `surplus`, unless someone uses it just now; return what is gone."""
        gone = []
        for directory in self.surplus(now):
            with locked(directory, wait=False) as held, suppress(OSError):
                if held:
                    # out of sight first: what is left when this process is killed goes with the next
                    hidden = self.place / f".{directory.name.lstrip('.')}.gone"
                    directory.rename(hidden)
                    shutil.rmtree(hidden, ignore_errors=True)
                    gone.append(directory)
        return gone

    def find(self, wanted: str) -> tuple[Path, Build] | None:
        """Return what a person means, with its directory; None if nothing is kept of it.

        Args:
            wanted: JOB/NUMBER, of the build or of the one that started it; a number; a job, target or the like, of which it
                is the latest; or empty for the latest of all.

        Raises:
            RequestError: several have that number; the message names them.
        """
        found = [(directory, build) for directory, build in self.all() if wanted in build.names()]
        if len(found) > 1 and wanted.isdigit():
            raise RequestError(f"several builds have the number {wanted}: {', '.join(str(one) for _, one in found)}")
        return found[0] if found else None

    def listed(self) -> str:
        """Return the newest for an error."""
        return ", ".join(build.described() for _, build in self.all()[:10]) or "none"
