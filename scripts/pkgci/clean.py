"""`pkgci clean`: removes expired test repositories, and builds in the store that nothing refers to any more.

What is in use stays: a repository that is being written, a build that is being made or read, that a repository refers to,
or that was used within the configured minimum age.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from pkgci import repository
from pkgci.config import Config
from pkgci.store import Store


@dataclass(frozen=True)
class Report:
    """What was removed, or would be: directories of repositories, keys of builds, and the disk space in bytes."""

    removed: bool
    repositories: tuple[Path, ...]
    builds: tuple[str, ...]
    freed: int

    def lines(self) -> list[str]:
        """Return the report for a person, a line each."""
        did = "removed" if self.removed else "would remove"
        total = f"{len(self.repositories)} repositories, {len(self.builds)} builds: {self.freed / (1 << 20):.1f} MiB"
        hint = "" if self.removed or not self.freed else "; nothing is removed without --yes"
        return [
            *(f"{did} repository {directory}" for directory in self.repositories),
            *(f"{did} build {key}" for key in self.builds),
            f"{did} {total}{hint}",
        ]


def clean(config: Config, remove: bool, now: datetime) -> Report:
    """Remove what has expired, or say what would be removed.

    Args:
        config: says how old a build must be.
        remove: really remove.
        now: the time, with a time zone, that ages are counted from.

    Raises:
        InfrastructureError: a `repository.json` cannot be read: then what it refers to is unknown, and all stays.
    """
    store = Store(config)
    before = (now - timedelta(days=config.settings.store_days)).timestamp()
    repositories = list(repository.expired(config, now))
    builds = list(store.unreferenced(repository.referenced(config, without=repositories), before))
    sizes = {path: _links(path) for path in [*repositories, *map(store.place, builds)]}
    if remove:
        repositories = [directory for directory in repositories if repository.remove(directory)]
        # asked again: a repository that stayed keeps its builds
        referenced = repository.referenced(config)
        builds = [key for key in builds if key not in referenced and store.remove(key, before)]
        store.sweep()
    gone = [sizes[path] for path in [*repositories, *map(store.place, builds)]]
    return Report(remove, tuple(repositories), tuple(builds), _freed(gone))


def _links(directory: Path) -> list[os.stat_result]:
    found = []
    for parent, _, files in os.walk(directory):
        for name in files:
            with suppress(FileNotFoundError):
                found.append(Path(parent, name).lstat())
    return found


def _freed(gone: list[list[os.stat_result]]) -> int:
    """Return the bytes of those files whose last link is among the ones removed."""
    left: dict[int, int] = {}
    freed = 0
    for stat in (stat for links in gone for stat in links):
        left[stat.st_ino] = left.get(stat.st_ino, stat.st_nlink) - 1
        if left[stat.st_ino] == 0:
            freed += stat.st_size
    return freed
