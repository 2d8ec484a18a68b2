"""Where mirrors are beside their repositories, as their readers see them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from pydantic import ValidationError

from pkgci.config import Config, Mirror
from pkgci.errors import InfrastructureError, RequestError
from pkgci.mirrors.remote import fetch
from pkgci.mirrors.transaction import RECORD
from pkgci.released.records import Generation
from pkgci.released.repository import CURRENT, Repository

# where a mirror says how many bytes are free there, below its own URL
FREE = "free"


def mirrored(config: Config) -> Iterator[tuple[Repository, Mapping[str, Mirror]]]:
    """Yield each repository that has mirrors, and those.

    Raises:
        RequestError: two mirrors are at one place.
    """
    places: dict[str, str] = {}
    for name in config.names("releases"):
        release = config.release(name)
        for mirror, one in release.mirrors.items():
            other = places.setdefault(one.place, f"{mirror} of release {name}")
            if other != f"{mirror} of release {name}":
                where = config.place_of(f"releases/{name}.yaml", "mirrors", mirror)
                raise RequestError(f"{where}: {other} is at the same place; each needs one of its own")
        if release.mirrors:
            for codename in sorted({config.target(target).codename for target in release.targets}):
                yield Repository(config, name, codename), release.mirrors


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
    for repository, mirrors in mirrored(config):
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
