"""Where mirrors are beside their repositories, as their readers see them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from pydantic import ValidationError

from pkgci.config import Config, Mirror
from pkgci.errors import InfrastructureError, PkgciError, RequestError
from pkgci.mirrors.remote import fetch
from pkgci.mirrors.transaction import RECORD
from pkgci.released.records import Generation
from pkgci.released.repository import CURRENT, Repository

# where a mirror says how many bytes are free there, below its own URL
FREE = "free"
FREE_BYTES = re.compile(rb"\s*([0-9]{1,18})\s*")


def mirrored(config: Config, release: str) -> list[Repository]:
    """Return the repositories of a release that have mirrors.

    Args:
        config: the configuration; what is wrong with another release does not matter here.
        release: the release's name.

    Raises:
        RequestError: the release is not described as it must be, or one of its mirrors is where another one is.
    """
    mirrors = config.release(release).mirrors
    others = {(name, mirror): one for name in config.names("releases") for mirror, one in _mirrors(config, name)}
    for mirror, one in mirrors.items():
        for (name, other), two in others.items():
            if (name, other) != (release, mirror) and (one.place == two.place or one.url == two.url):
                where = config.place_of(f"releases/{release}.yaml", "mirrors", mirror)
                raise RequestError(
                    f"{where}: {other} of release {name} is at the same place; each needs one of its own"
                )
    codenames = {config.target(target).codename for target in config.release(release).targets} if mirrors else ()
    return [Repository(config, release, codename) for codename in sorted(codenames)]


def _mirrors(config: Config, release: str) -> list[tuple[str, Mirror]]:
    try:
        return list(config.release(release).mirrors.items())
    except RequestError:
        # who asks for its mirrors is told
        return []


@dataclass(frozen=True)
class Standing:
    """Where a mirror is beside its repository: generation, when that was made, how many behind, since when; free bytes.

    `fault` says why nothing is known of it, or that it is not as it must be; `aside` why it is left out.
    """

    repository: str
    mirror: str
    generation: int | None = None
    made: datetime | None = None
    behind: int = 0
    since: datetime | None = None
    free: int | None = None
    fault: str = ""
    aside: str = ""

    @property
    def late(self) -> bool:
        """Whether somebody has to look at it."""
        return not self.aside and (bool(self.fault) or self.behind > 0)

    def line(self, now: datetime) -> str:
        """Return it for a person."""
        place, aside = f"{self.repository} {self.mirror}".strip(), f"; aside: {self.aside}" if self.aside else ""
        if self.fault:
            return f"{place}: {self.fault}{aside}"
        if self.generation is None or self.made is None:
            return f"{place}: nothing is published yet{aside}"
        free = "free space unknown" if self.free is None else f"{self.free / (1 << 30):.1f} GiB free"
        lag = f"{self.behind} behind, for {_span(now, self.since)}" if self.since else "up to date"
        return f"{place}: generation {self.generation}, {_span(now, self.made)} old, {lag}, {free}{aside}"


def standings(config: Config) -> Iterator[Standing]:
    """Yield where each mirror is, as its readers see it; and each release whose mirrors are not described as they must be."""
    for release in config.names("releases"):
        try:
            repositories = mirrored(config, release)
        except PkgciError as error:
            yield Standing(release, "", fault=str(error))
            continue
        for repository in repositories:
            for name, one in config.release(release).mirrors.items():
                yield _standing(repository, name, one)


def _standing(repository: Repository, name: str, mirror: Mirror) -> Standing:
    current = repository.current()
    about = {"repository": repository.name, "mirror": name, "aside": mirror.aside}
    path = f"{repository.codename}/{CURRENT}/{RECORD}"
    try:
        served = fetch(f"{mirror.url}{path}")
        if served is None:
            return Standing(**about, fault=f"unknown: {mirror.url} has no {path}" if current else "")
        shown = Generation.model_validate_json(served)
        ours = repository.generation(shown.number)
    except ValidationError:
        return Standing(**about, fault=f"unknown: {mirror.url}{path} is none of ours")
    except InfrastructureError as error:
        return Standing(**about, fault=f"unknown: {error}")
    except RequestError:
        ours = None
    if current is None or shown != ours or shown.number > current.number:
        return Standing(**about, fault=f"shows a generation {shown.number} that {repository.name} does not have")
    behind = current.number - shown.number
    return Standing(
        **about,
        generation=shown.number,
        made=shown.time,
        behind=behind,
        since=repository.generation(shown.number + 1).time if behind else None,
        free=_free(f"{mirror.url}{FREE}"),
    )


def _free(url: str) -> int | None:
    try:
        said = FREE_BYTES.fullmatch(fetch(url) or b"")
    except InfrastructureError:
        return None
    return int(said[1]) if said else None


def _span(now: datetime, then: datetime) -> str:
    seconds = max(0, int((now - then).total_seconds()))
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
