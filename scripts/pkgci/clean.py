"""`pkgci clean`: removes expired test repositories, builds that nothing refers to any more, old gate records, roots of
failed builds, and what lies unused in the cache.

What is in use stays: a repository that is being written, a build that is being made or read, that a repository or a gate
record refers to, or that was used within the configured minimum age.
"""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from pkgci import failed, gaterecord, repository
from pkgci.config import Config
from pkgci.disk import freed, links
from pkgci.released import repository as released
from pkgci.store import Store

# all that can be made again: a name a directory of the cache, each with entries of their own age
CACHES = (
    "apt",
    "closure",
    "contents",
    "dependencies",
    "images",
    "jobs",
    "lint",
    "lists",
    "metadata",
    "packages",
    "projects",
    "proxy",
    "roots",
    "trees",
)


@dataclass(frozen=True)
class Report:
    """What was removed, or would be: directories of repositories, keys of builds, the cache, and the disk space in bytes.

    `failed` are roots of failed builds.
    """

    removed: bool
    repositories: tuple[Path, ...]
    builds: tuple[str, ...]
    cached: tuple[Path, ...]
    failed: tuple[Path, ...]
    freed: int

    def lines(self) -> list[str]:
        """Return the report for a person, a line each."""
        did = "removed" if self.removed else "would remove"
        count = (
            f"{len(self.repositories)} repositories, {len(self.builds)} builds, {len(self.cached)} entries of the cache, "
            f"{len(self.failed)} roots of failed builds"
        )
        total = f"{count}: {self.freed / (1 << 20):.1f} MiB"
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
    kept = released.referenced(config) | gaterecord.referenced(config, before)
    builds = list(store.unreferenced(repository.referenced(config, without=repositories) | kept, before))
    cached = [*_unused(config.cache, before), *released.unlinked(config, before), *gaterecord.older(config, before)]
    roots = failed.roots(config).surplus(now)
    sizes = {path: links(path) for path in [*repositories, *map(store.place, builds), *cached, *roots]}
    if remove:
        repositories = [directory for directory in repositories if repository.remove(directory)]
        # asked again: a repository that stayed keeps its builds
        referenced = repository.referenced(config) | released.referenced(config) | gaterecord.referenced(config, before)
        builds = [key for key in builds if key not in referenced and store.remove(key, before)]
        store.sweep()
        for path in cached:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        roots = [path for path in failed.roots(config).prune(now) if path in sizes]
    gone = [sizes[path] for path in [*repositories, *map(store.place, builds), *cached, *roots]]
    return Report(remove, tuple(repositories), tuple(builds), tuple(cached), tuple(roots), freed(gone))


def _unused(cache: Path, before: float) -> Iterator[Path]:
    """Yield the entries of the cache that were neither made nor used since the time stamp `before`."""
    for name in CACHES:
        for path in sorted((cache / name).glob("*")):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    yield path
