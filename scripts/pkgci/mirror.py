"""The jobs `mirror-sync-deb` and `mirror-sync-rpm`: what is released goes to the mirrors; and `pkgci mirror status`.

Each repository's mirrors are a set of their own: what fails in one holds no other back.
"""

import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
from pydantic import ValidationError

from pkgci.artifacts import Sync, SyncedRepository
from pkgci.config import Config, Mirror
from pkgci.errors import Exit, InfrastructureError, PkgciError
from pkgci.mirrors.remote import fetch
from pkgci.mirrors.transaction import RECORD, sync
from pkgci.released.records import Generation
from pkgci.released.repository import CURRENT, Repository, repositories

# where a mirror says how many bytes are free there, below its own URL
FREE = "free"


def mirror_sync(config: Config, form: str, release: str, artifacts: Path, *, everything: bool = False) -> Sync:
    """Bring the mirrors of released repositories of one format to their current generations.

    Args:
        config: the configuration.
        form: `deb` or `rpm`.
        release: the release; if empty all, as the timer starts it: what was not gone through for a day is so then.
        artifacts: the directory that takes `sync.json`.
        everything: go through all that the mirrors have, not only through what has changed.

    Returns:
        What was done.

    Raises:
        RequestError: there is no such release.
        InfrastructureError: the mirrors of a repository are not at its current generation; the others may be.
    """
    whole_after = timedelta(0) if everything else None if release else timedelta(days=1)
    if release:
        config.release(release)
    mirrored = (one for one, _ in _mirrored(config) if one.format == form)
    chosen = [one for one in mirrored if release in ("", one.release)]

    def one(repository: Repository) -> SyncedRepository:
        try:
            return sync(repository, whole_after)
        except (PkgciError, OSError) as error:
            about = {"release": repository.release, "codename": repository.codename, "generation": 0, "seconds": 0}
            return SyncedRepository(**about, notice="", fault=str(error), mirrors=())

    with ThreadPoolExecutor(max_workers=max(1, len(chosen))) as pool:
        done = Sync(repositories=tuple(pool.map(one, chosen)))
    done.write(artifacts / "sync.json")
    faults = [f"{one.release}/{one.codename}: {one.fault}" for one in done.repositories if one.fault]
    if faults:
        raise InfrastructureError("; ".join(faults))
    return done


def summary(done: Sync) -> str:
    """Return what was done in one line."""
    said = [
        f"{one.release}/{one.codename}: {one.notice or f'generation {one.generation} on {len(one.mirrors)} mirrors'}"
        for one in done.repositories
    ]
    return "; ".join(said) or "no release has mirrors for this format"


def _mirrored(config: Config) -> Iterator[tuple[Repository, Mapping[str, Mirror]]]:
    """Yield each repository that has mirrors, and those."""
    for one in repositories(config):
        mirrors = config.release(one.release).mirrors
        if mirrors:
            yield one, mirrors


@dataclass(frozen=True)
class Standing:
    """Where a mirror is beside its repository: generation, when that was made, how many behind, since when; free bytes."""

    repository: str
    mirror: str
    generation: int | None
    made: datetime | None
    behind: int
    since: datetime | None
    free: int | None
    fault: str

    def line(self, now: datetime) -> str:
        """Return it for a person."""
        free = "free space unknown" if self.free is None else f"{self.free / (1 << 30):.1f} GiB free"
        if self.generation is None or self.made is None:
            return f"{self.repository} {self.mirror}: unknown: {self.fault}"
        lag = "up to date"
        if self.behind and self.since:
            lag = f"{self.behind} behind, for {_span(now, self.since)}"
        aside = f"; {self.fault}" if self.fault else ""
        age = f"generation {self.generation}, {_span(now, self.made)} old"
        return f"{self.repository} {self.mirror}: {age}, {lag}, {free}{aside}"


def standings(config: Config) -> Iterator[Standing]:
    """Yield where each mirror is, as its readers see it."""
    for repository, mirrors in _mirrored(config):
        current = repository.current()
        for name, one in mirrors.items():
            aside = f"aside: {one.aside}" if one.aside else ""
            try:
                shown = Generation.model_validate_json(fetch(f"{one.url}{repository.codename}/{CURRENT}/{RECORD}"))
            except (InfrastructureError, ValidationError) as error:
                reason = f"no {RECORD} of ours" if isinstance(error, ValidationError) else str(error)
                yield Standing(repository.name, name, None, None, 0, None, None, aside or reason)
                continue
            behind = max(0, current.number - shown.number) if current else 0
            since = repository.generation(shown.number + 1).time if behind else None
            yield Standing(
                repository.name, name, shown.number, shown.time, behind, since, _free(f"{one.url}{FREE}"), aside
            )


def _free(url: str) -> int | None:
    try:
        return int(fetch(url))
    except (InfrastructureError, ValueError):
        return None


def _span(now: datetime, then: datetime) -> str:
    seconds = max(0, int((now - then).total_seconds()))
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


@click.group("mirror")
def mirror() -> None:
    """Look after the mirrors of released repositories."""


@mirror.command("status")
def _status() -> None:
    """Show where each mirror is, as its readers see it. Exit code 3 when one is behind or unknown and not put aside."""
    late = False
    for one in standings(Config()):
        late |= not one.fault.startswith("aside") and (one.generation is None or one.behind > 0)
        click.echo(one.line(datetime.now(UTC)))
    sys.exit(int(Exit.INFRASTRUCTURE if late else Exit.PASSED))
