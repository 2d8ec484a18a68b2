"""`pkgci where`: where a change is on its way, from the queue to the mirrors, and why it waits there.

It asks the engine for the builds that are about the change, the gate records for what was tested with it, the released
repositories for the generation that has what was built, and the mirrors for what their readers see.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pkgci import gaterecord
from pkgci.artifacts import Repository as Published
from pkgci.artifacts import Result, Sync
from pkgci.config import Config
from pkgci.engines.base import BuildInfo, BuildRef, Engine
from pkgci.errors import RequestError
from pkgci.mirrors.standing import Standing, standings
from pkgci.released.repository import Repository, repositories

CHANGE = r"[0-9]{1,10}(,[0-9]{1,6})?|[0-9a-f]{7,40}"
# of a job, and of a repository, the newest so many
BUILDS = 200
GENERATIONS = 1000
# files of gate records
RECORDS = 2000


@dataclass(frozen=True)
class Made:
    """A build of the change: its target, source package, and what a person calls it."""

    target: str
    source: str
    name: str


def where(config: Config, engine: Engine, change: str) -> Iterator[str]:
    """Yield lines about a change: its builds, the generations that have it, each mirror.

    Args:
        config: the configuration.
        engine: knows the builds.
        change: `NUMBER`, `NUMBER,PATCHSET`, or the first digits of its source tree's id (as a local change is named), or of
            the commit that it was merged by.

    Raises:
        RequestError: `change` is no such name, or no build is about it.
        InfrastructureError: the engine or a repository cannot be read.
    """
    if not re.fullmatch(CHANGE, change):
        raise RequestError(f"{change[:100]!r} names no change; write NUMBER, NUMBER,PATCHSET, or digits of a commit")
    builds = sorted(_builds(engine, change), key=lambda one: one[1].queued)
    if not builds:
        raise RequestError(f"no build that the engine keeps is about {change}; `pkgci jobs list` shows all jobs")
    made: dict[str, Made] = {}
    for ref, info in builds:
        reason, built = _left(engine, ref)
        made |= built
        waits = f"for an executor of the label of {ref.job}" if info.state == "queued" else reason
        yield f"{info.queued:%Y-%m-%d %H:%M:%S}  {ref}: {info.state}{': ' if waits else ''}{waits}"
    for record in _gated(config, change):
        places = [place for place, one in enumerate(record.changes) if _named(one, change)]
        builds_of_it = [one for one in record.builds if {*places} & {*one.changes}]
        made |= {one.key: Made(one.target, one.package, one.package) for one in builds_of_it if one.key not in made}
        names = ", ".join(one.name for one in record.changes)
        yield f"{record.time:%Y-%m-%d %H:%M:%S}  gate record of {names}: {len(builds_of_it)} builds of it are tested"
    if not made:
        yield "nothing of it is published, for tests or for users"
        return
    generations: dict[str, int] = {}
    for repository in repositories(config) if config.settings.released else ():
        for key, one in made.items():
            if one.target in repository.targets:
                number = _generation(repository, key)
                generations[repository.name] = max(number, generations.get(repository.name, 0))
                yield f"repository {repository.name}: {_released(repository, one, number)}"
    faults = _faults(engine)
    for standing in standings(config):
        number = generations.get(standing.repository, 0)
        if number:
            there = _there(standing, number, faults.get(standing.repository, ""))
            yield f"mirror {standing.mirror} of {standing.repository}: {there}"


def _builds(engine: Engine, change: str) -> Iterator[tuple[BuildRef, BuildInfo]]:
    """Yield the builds that are about a change, without those that others had started and that have ended."""
    for job in engine.jobs():
        for ref in engine.builds(job)[-BUILDS:]:
            info = engine.record(ref)
            if _about(info.parameters, change) and (info.alive or not info.parameters.get("PARENT")):
                yield ref, info


def _about(parameters: Mapping[str, str], change: str) -> bool:
    number, _, patchset = change.partition(",")
    if parameters.get("ZUUL_CHANGE") == number:
        return patchset in ("", parameters.get("ZUUL_PATCHSET"))
    if re.search(rf"/{number}/{patchset or '[0-9]+'}(\^|$)", parameters.get("ZUUL_CHANGES", "")):
        return True
    ids = (parameters.get("SOURCE_TREE", ""), parameters.get("ZUUL_NEWREV", ""))
    return len(change) >= 7 and any(one.startswith(change) for one in ids)


def _left(engine: Engine, ref: BuildRef) -> tuple[str, dict[str, Made]]:
    """Return why a build ended as it did, and what it or those that it started published, by the keys."""
    with TemporaryDirectory() as scratch:
        engine.artifacts(ref, Path(scratch))
        place = Path(scratch, "artifacts")
        made = {
            package.key: Made(published.target, package.source, f"{package.source} {package.version}")
            for published in map(Published.read, sorted(place.rglob("repository.json")))
            for package in published.packages
        }
        result = place / "result.json"
        return Result.read(result).reason if result.exists() else "", made


def _gated(config: Config, change: str) -> list[gaterecord.GateRecord]:
    """Return the gate records of a change, oldest first."""
    newest = sorted(gaterecord.records(config), key=lambda path: path.stat().st_mtime)[-RECORDS:]
    found = {record.run: record for record in map(gaterecord.GateRecord.read, newest)}
    return [one for one in found.values() if any(_named(gated, change) for gated in one.changes)]


def _named(gated: gaterecord.GatedChange, change: str) -> bool:
    return change in (gated.number, gated.name) or (len(change) >= 7 and gated.tree.startswith(change))


def _generation(repository: Repository, key: str) -> int:
    """Return the newest generation that a build came into the repository with; 0 for none."""
    current = repository.current()
    newest = current.number if current else 0
    for number in range(newest, max(0, newest - GENERATIONS), -1):
        if any(build.key == key for build in repository.generation(number).added):
            return number
    return 0


def _released(repository: Repository, made: Made, generation: int) -> str:
    hold = repository.holds().get(made.source)
    held = f"; on hold since generation {hold.generation}: {hold.reason}" if hold else ""
    return f"{made.name} since generation {generation}{held}" if generation else f"{made.name} is not released{held}"


def _faults(engine: Engine) -> dict[str, str]:
    """Return why the last sync of each repository failed, by its name."""
    found: dict[str, str] = {}
    for job in (job for job in engine.jobs() if job.startswith("mirror-sync-")):
        ended = [ref for ref in engine.builds(job)[-BUILDS:] if engine.state(ref) not in ("queued", "running")]
        with TemporaryDirectory() as scratch:
            if ended:
                engine.artifacts(ended[-1], Path(scratch))
            record = Path(scratch, "artifacts", "sync.json")
            if record.exists():
                found |= {f"{one.release}/{one.codename}": one.fault for one in Sync.read(record).repositories}
    return found


def _there(one: Standing, number: int, fault: str) -> str:
    if one.generation is not None and one.generation >= number:
        return f"there, at generation {one.generation}"
    at = "unknown" if one.generation is None else f"at generation {one.generation}"
    return f"not there, {at}: {one.fault or fault or 'the next sync brings it'}"
