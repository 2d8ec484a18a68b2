"""`pkgci where`: where a change is on its way, from the queue to the mirrors, and why it waits there.

It asks the engine for the builds that are about the change, the gate records for what was tested with it, the released
repositories for the generation that has what was built, and the mirrors for what their readers see. A build after the merge
knows no change's number: Gerrit, or Git by the tree of the gate record, says as which commit it was merged.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pkgci import gaterecord, review
from pkgci.artifacts import Repository as Published
from pkgci.artifacts import Result, Sync
from pkgci.config import Config
from pkgci.engines.base import BuildInfo, BuildRef, Engine
from pkgci.errors import PkgciError, RequestError
from pkgci.merged import Branch
from pkgci.mirrors.standing import Standing, standings
from pkgci.released.repository import Repository, repositories

CHANGE = r"[0-9]{1,10}(,[0-9]{1,6})?|[0-9a-f]{7,40}"
# of a job, and of a repository, the newest so many
BUILDS = 200
GENERATIONS = 1000
# files of gate records
RECORDS = 2000
# of syncs
SYNCS = 50


@dataclass(frozen=True)
class Made:
    """A build of the change: its target, source package, and what a person calls it."""

    target: str
    source: str
    name: str


@dataclass(frozen=True)
class Merged:
    """The commit that the change is merged as, and the branch that has it."""

    branch: Branch
    commit: str

    def by(self, parameters: Mapping[str, str]) -> bool:
        """Return whether a build after a merge is about it."""
        branch = parameters.get("ZUUL_REFNAME", "").removeprefix("refs/heads/")
        if (parameters.get("ZUUL_PROJECT"), branch) != (self.branch.project, self.branch.name):
            return False
        old, new = parameters.get("ZUUL_OLDREV"), parameters.get("ZUUL_NEWREV", "")
        # one push may bring several changes
        return self.within(new) and not self.within(old) if old else new == self.commit

    def within(self, commit: str) -> bool:
        """Return whether a commit of the project has it in its history."""
        return self.branch.later(commit, self.commit)


@dataclass(frozen=True)
class Stay:
    """The first generation that has builds of the change, or later ones, and the one that took them back; 0 for none."""

    since: int = 0
    until: int = 0


def where(config: Config, engine: Engine, change: str) -> Iterator[str]:
    """Yield lines about a change: its builds, the generations that have it, each mirror.

    Args:
        config: the configuration.
        engine: knows the builds.
        change: `NUMBER`, `NUMBER,PATCHSET`, or the first digits of its source tree's id (as a local change is named), or of
            the commit that it was merged by.

    Raises:
        RequestError: `change` is no such name, or nothing is known about it.
        InfrastructureError: the engine or a repository cannot be read.
    """
    if not re.fullmatch(CHANGE, change):
        raise RequestError(f"{change[:100]!r} names no change; write NUMBER, NUMBER,PATCHSET, or digits of a commit")
    records = _gated(config, change)
    merged = None
    try:
        merged = _merged(config, change, records)
    except PkgciError as error:
        yield f"whether it is merged is not known: {error}"
    builds = sorted(_builds(engine, change, merged), key=lambda one: one[1].queued)
    if not builds and not records and not merged:
        raise RequestError(f"no build or gate record that is kept is about {change}; `pkgci jobs list` shows all jobs")
    made: dict[str, Made] = {}
    for ref, info in builds:
        reason, built = _left(engine, ref)
        made |= built
        waits = f"for an executor of the label of {ref.job}" if info.state == "queued" else reason
        yield f"{info.queued:%Y-%m-%d %H:%M:%S}  {ref}: {info.state}{': ' if waits else ''}{waits}"
    for record in records:
        places = [place for place, one in enumerate(record.changes) if _named(one, change)]
        builds_of_it = [one for one in record.builds if {*places} & {*one.changes}]
        made |= {one.key: Made(one.target, one.package, one.package) for one in builds_of_it if one.key not in made}
        names = ", ".join(one.name for one in record.changes)
        yield f"{record.time:%Y-%m-%d %H:%M:%S}  gate record of {names}: {len(builds_of_it)} builds of it are tested"
    if merged:
        yield f"merged into {merged.branch.name} of {merged.branch.project} as {merged.commit[:12]}"
    if not made:
        yield "nothing of it is published, for tests or for users"
        return
    yield from _published(config, engine, made, merged)


def _published(config: Config, engine: Engine, made: Mapping[str, Made], merged: Merged | None) -> Iterator[str]:
    """Yield where its builds are, for users."""
    stays: dict[str, list[Stay]] = {}
    for repository in repositories(config) if config.settings.released else ():
        for place in dict.fromkeys(
            (one.target, one.source) for one in made.values() if one.target in repository.targets
        ):
            keys = {key: one.name for key, one in made.items() if (one.target, one.source) == place}
            name, stay = _stay(repository, *place, keys, merged)
            stays.setdefault(repository.name, []).append(stay)
            yield f"repository {repository.name}: {name} {_said(stay)}{_held(repository, place[1])}"
    faults = _faults(engine, stays)
    for standing in standings(config):
        known = [stay for stay in stays.get(standing.repository, ()) if stay.since]
        if known:
            there = _there(standing, known, faults.get(standing.repository, ""))
            yield f"mirror {standing.mirror} of {standing.repository}: {there}"


def _merged(config: Config, change: str, records: Sequence[gaterecord.GateRecord]) -> Merged | None:
    """Return what a change is merged as, None when it is not, or nobody can say."""
    number = re.fullmatch(r"([0-9]{1,10})(,[0-9]+)?", change)
    found = review.merged(config, number[1]) if config.settings.review and number else None
    if found:
        project, branch, commit = found
        return Merged(Branch(config, project, branch), commit)
    for record in reversed(records) if config.settings.gerrit else ():
        for one in record.changes:
            branch = Branch(config, one.project, one.branch) if _named(one, change) else None
            commit = branch.commit_of(one.tree, one.count) if branch else None
            if branch and commit:
                return Merged(branch, commit)
    return None


def _builds(engine: Engine, change: str, merged: Merged | None) -> Iterator[tuple[BuildRef, BuildInfo]]:
    """Yield the builds that are about a change, without those that others had started and that have ended."""
    for job in engine.jobs():
        for ref in engine.builds(job)[-BUILDS:]:
            info = engine.record(ref)
            if info.parameters.get("PARENT") and not info.alive:
                continue
            if _about(info.parameters, change) or (merged and merged.by(info.parameters)):
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


def _stay(
    repository: Repository, target: str, source: str, keys: Mapping[str, str], merged: Merged | None
) -> tuple[str, Stay]:
    """Return what a person calls the builds of a package, and since when a repository has one of them, or a later one."""
    having, name, live, at = set(keys), next(iter(keys.values())), "", 0
    since = until = 0
    current = repository.current()
    newest = current.number if current else 0
    for number in range(max(1, newest - GENERATIONS + 1), newest + 1):
        record = repository.generation(number)
        added, removed = (
            next((one.key for one in builds if (one.target, one.source) == (target, source)), "")
            for builds in (record.added, record.removed)
        )
        if not added and not removed:
            continue
        if added and since and record.kind == "publish":
            # a branch only grows: what is published later has it too
            having.add(added)
        live, at = added, number
        if live in having:
            name, since, until = keys.get(live, name), number if until else since or number, 0
        elif since and not until:
            until = number
    if merged and live and (not since or until):
        # what a gate has tested is not always what is published
        origin = repository.origin(live, source)
        commits = [one.commit for one in origin.commits if one.project == merged.branch.project] if origin else []
        if any(map(merged.within, commits)):
            since, until = at, 0
    return name, Stay(since, until)


def _said(stay: Stay) -> str:
    if stay.until:
        return f"was there since generation {stay.since}; generation {stay.until} took it back"
    return f"since generation {stay.since}" if stay.since else "is not released"


def _held(repository: Repository, source: str) -> str:
    hold = repository.holds().get(source)
    return f"; on hold since generation {hold.generation}: {hold.reason}" if hold else ""


def _faults(engine: Engine, repositories: Collection[str]) -> dict[str, str]:
    """Return why the last sync of each of these repositories failed, by its name."""
    found: dict[str, str] = {}
    syncs = [(ref.number, ref) for job in engine.jobs() if job.startswith("mirror-sync-") for ref in engine.builds(job)]
    for _, ref in sorted(syncs, reverse=True)[:SYNCS]:
        if found.keys() >= set(repositories):
            break
        if engine.state(ref) in ("queued", "running"):
            continue
        with TemporaryDirectory() as scratch:
            engine.artifacts(ref, Path(scratch))
            record = Path(scratch, "artifacts", "sync.json")
            done = Sync.read(record).repositories if record.exists() else ()
            # of several in one the last counts; what was left to another sync says nothing
            said = {f"{one.release}/{one.codename}": one.fault for one in done if one.mirrors or one.fault}
        found = {**said, **found}
    return found


def _there(one: Standing, stays: Sequence[Stay], fault: str) -> str:
    why = f"aside: {one.aside}" if one.aside else one.fault or fault or "the next sync brings it"
    if one.generation is None:
        return f"unknown: {why}"
    generation = one.generation
    at = f"at generation {generation}"
    lasting = [stay for stay in stays if not stay.until]
    if not lasting:
        still = any(stay.since <= generation < stay.until for stay in stays)
        return f"there still, {at}: {why}" if still else f"not there any more, {at}"
    return f"there, {at}" if all(stay.since <= generation for stay in lasting) else f"not there, {at}: {why}"
