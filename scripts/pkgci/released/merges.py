"""After a merge: what a gate has tested goes to the released repository, bit for bit, or a build of the merged trees does.

What is published is decided by Git (what is merged, now), by gate records, and by what is released already.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pkgci import gaterecord, metrics, source
from pkgci.artifacts import ReleaseOutcome, Repository, RepositoryPackage
from pkgci.change import Change
from pkgci.config import Config
from pkgci.errors import RequestError
from pkgci.gaterecord import Gated
from pkgci.merged import Branch
from pkgci.released import checks
from pkgci.released import repository as released
from pkgci.released.checks import OlderError
from pkgci.released.records import Commit, Origin, Publication
from pkgci.source import Sources
from pkgci.store import Entry, Store

log = logging.getLogger(__name__)

OUTCOME = "released.json"
POLL = 2.0  # seconds between looks at what is merged


@dataclass(frozen=True)
class Place:
    """The released repository that a merged change belongs to: release and codename."""

    release: str
    codename: str

    @property
    def name(self) -> str:
        """Its name."""
        return f"{self.release}/{self.codename}"


def publish_tested(config: Config, target_name: str, change: Change, artifacts: Path) -> ReleaseOutcome:
    """Publish what a gate has tested of a merged change, with what it has tested together with it, as one generation.

    Args:
        config: the configuration.
        target_name: the target.
        change: the change, by its merged commit.
        artifacts: the directory that takes `released.json`.

    Returns:
        What became of it; it is not published (`absent`) when no gate has tested it as it is merged, or when that build is
        not above what is released.

    Raises:
        RequestError: the commit is not merged, or a build is on hold.
        PackageError: the released repository refuses the packages.
        InfrastructureError: the remote, the key or the file system fails.
    """
    sources, place = _sources(config, change), _place(config, target_name, change)
    with metrics.publication(config, place.release, place.codename):
        outcome = _published_before(config, place, target_name, change, sources, sources.package)
        if outcome is None:
            # before it is built in vain
            checks.refuse_held(released.Repository(config, place.release, place.codename), sources.package)
            outcome = _publish_gated(config, place, target_name, change)
    outcome.write(artifacts / OUTCOME)
    for line in outcome.left:
        log.warning("not published with it: %s", line)
    return outcome


def publish_build(config: Config, target_name: str, change: Change, entry: Entry, artifacts: Path) -> Repository:
    """Publish a build of a merged change.

    Args:
        config: the configuration.
        target_name: the target that it was built for.
        change: the change, which is merged.
        entry: the build.
        artifacts: the directory that takes `released.json`.

    Returns:
        The repository, with the build's packages; without any, if a later merge is released already.

    Raises:
        PkgciError: as of `publish_tested`.
    """
    place = _place(config, target_name, change)
    record = entry.record
    repository = released.Repository(config, place.release, place.codename)
    with metrics.publication(config, place.release, place.codename):
        package = config.package_of(change.project)
        projects = config.package(package).projects if package else (change.project,)
        origin = _origin(config, projects, change.branch, entry, [change.commit])
        packages: tuple[RepositoryPackage, ...] = ()
        try:
            done = released.publish(config, place.release, place.codename, [Publication(record.key, origin)])
            outcome = ReleaseOutcome(
                repository=place.name,
                result="published" if done.changed else "unchanged",
                generation=done.generation.number,
                reason=f"{record.package} {record.version} at {repository.url}, generation {done.generation.number}",
            )
            directory = repository.directory(record.package, done.keys[0])
            packages = tuple(
                RepositoryPackage(
                    **{**package.model_dump(), "file": f"{directory}/{package.file}"},
                    source=record.package,
                    key=done.keys[0],
                )
                for package in record.packages
            )
        except OlderError:
            later = _published_before(config, place, target_name, change, _sources(config, change), record.package)
            if later is None:
                raise
            outcome = later
    outcome.write(artifacts / OUTCOME)
    log.info("%s", outcome.reason)
    return Repository(
        url=repository.url,
        format=record.format,
        codename=place.codename,
        target=target_name,
        packages=packages,
        signing_key=repository.key.public,
        released=True,
    )


def _publish_gated(config: Config, place: Place, target_name: str, change: Change) -> ReleaseOutcome:
    sources, gated, unmerged = _wait(config, place, target_name, change)
    if gated is None:
        return _absent(place, f"no gate has tested {_trees(sources)} of {sources.package}")
    run = f"gate run {gated.record.run}"
    lacking = ", ".join(one.name for one in gated.lacks(unmerged))
    if lacking:
        return _absent(place, f"{run} has tested it with {lacking} ahead, which is not merged")
    entry = Store(config).lookup(gated.build.key)
    if entry is None:
        return _absent(place, f"the build of {run} is not in the store any more")
    siblings, left = [], []
    for build in gated.record.builds:
        if build == gated.build or _place_of(config, build.branch, build.target) != place:
            continue
        about = f"{build.package} for {build.target}"
        other = Store(config).lookup(build.key)
        lacking = ", ".join(one.name for one in Gated(gated.record, build).lacks(unmerged))
        if lacking:
            left.append(f"{about}: {lacking} is not merged")
        elif other is None:
            left.append(f"{about}: its build is not in the store any more")
        else:
            siblings.append(
                Publication(build.key, _origin(config, config.package(build.package).projects, build.branch, other))
            )
    merged = [sources.source.commit, sources.packaging.commit]
    own = Publication(gated.build.key, _origin(config, sources.entry.projects, change.branch, entry, merged))
    about = f"{entry.record.package} {entry.record.version}"
    try:
        done = released.publish(config, place.release, place.codename, [own], siblings)
    except OlderError as error:
        later = _published_before(config, place, target_name, change, sources, entry.record.package)
        return later or _absent(place, f"what {run} has tested is not above what is released: {error}")
    together = f", with {len(siblings) - len(done.left)} more of that run" if len(siblings) > len(done.left) else ""
    return ReleaseOutcome(
        repository=place.name,
        result="published" if done.changed else "unchanged",
        generation=done.generation.number,
        tested=True,
        reason=f"{about} at {done.repository.url}, generation {done.generation.number}: as {run} has tested it{together}",
        left=(*left, *done.left),
    )


def _wait(
    config: Config, place: Place, target_name: str, change: Change
) -> tuple[Sources, Gated | None, frozenset[int]]:
    """Return the merged trees, what a gate has tested of them, and the positions of its run's changes that are not merged.

    That is the newest build of a run that is merged whole. If there is none, others of a run with this change may be about
    to be merged; after the configured time the newest one counts that has all merged which it was tested on.
    """
    settings = config.settings.released
    assert settings is not None
    seconds = settings.sibling_seconds
    deadline = time.monotonic() + seconds
    said = False
    while True:
        sources = _sources(config, change)
        own = sources.source if sources.source.project == change.project else sources.packaging
        found = gaterecord.find(config, sources.package, change.branch, target_name, own.id)
        looked = list(zip(found, gaterecord.unmerged(config, [one.record for one in found]), strict=True))
        trees = sources.source.id, sources.packaging.id
        exact = [one for one in looked if (one[0].build.source_tree, one[0].build.packaging_tree) == trees]
        whole = next((one for one in exact if not one[1]), None)
        pending = next((one for one in looked if one[1]), None)
        if whole or not pending or time.monotonic() >= deadline:
            valid = (one for one in exact if not one[0].lacks(one[1]))
            return sources, *(whole or next(valid, None) or (exact[0] if exact else (None, frozenset())))
        if not said:
            record = pending[0].record
            names = ", ".join(record.changes[one].name for one in sorted(pending[1]))
            log.info(
                "%s: waiting up to %s s for %s of gate run %s to be merged", place.name, seconds, names, record.run
            )
            said = True
        time.sleep(POLL)


def _sources(config: Config, change: Change) -> Sources:
    """Return the merged trees.

    Raises:
        RequestError: the commit is not merged, or no release claims the branch.
    """
    sources = source.fetch(config, change)
    if sources is None or not Branch(config, change.project, change.branch).has(change.commit):
        raise RequestError(f"{change.commit[:12]} is not merged into {change.branch} of {change.project}")
    return sources


def _published_before(
    config: Config, place: Place, target_name: str, change: Change, sources: Sources, package: str
) -> ReleaseOutcome | None:
    """Return that the released build of a source package is of these commits or of later ones, if so."""
    found = released.released_from(config, place.release, place.codename, package).get(target_name)
    if found is None or found[1] is None or found[1].branch != change.branch:
        return None
    version, origin = found
    there = {one.project: one.commit for one in origin.commits}
    ours = {tree.project: tree.commit for tree in (sources.source, sources.packaging)}
    if there.keys() != ours.keys():
        return None
    if not all(Branch(config, project, change.branch).later(there[project], ours[project]) for project in ours):
        return None
    what = "of this merge" if there == ours else "of a later merge"
    reason = f"{package} {version} {what} is released already; nothing changes"
    return ReleaseOutcome(repository=place.name, result="unchanged", reason=reason)


def _absent(place: Place, reason: str) -> ReleaseOutcome:
    return ReleaseOutcome(repository=place.name, result="absent", reason=reason)


def _trees(sources: Sources) -> str:
    return "tree " + " and ".join(tree.id[:8] for tree in dict.fromkeys((sources.source, sources.packaging)))


def _place(config: Config, target_name: str, change: Change) -> Place:
    """Return the released repository of a merged change.

    Raises:
        RequestError: there is none.
    """
    what = f"{change.number or change.commit[:12]} is merged into {change.branch} of {change.project}, and"
    if config.settings.released is None:
        raise RequestError(f"{what} released repositories are not configured")
    place = _place_of(config, change.branch, target_name)
    if place is None:
        raise RequestError(f"{what} no release claims that branch")
    return place


def _place_of(config: Config, branch: str, target_name: str) -> Place | None:
    claimed = config.release_of(branch)
    return Place(claimed[0], config.target(target_name).codename) if claimed else None


def _origin(
    config: Config, projects: Sequence[str], branch_name: str, entry: Entry, merged: Sequence[str] = ()
) -> Origin:
    """Return the merged commits that have the trees which a build was made from, as the remote has them now.

    Of several with the same tree it is the one of `merged`, or the newest.
    """
    commits = []
    for project in projects:
        branch = Branch(config, project, branch_name)
        trees = {commit: tree for tree in entry.record.trees for commit in branch.commits_of(tree)}
        if not trees:
            raise RequestError(
                f"{entry.record.package} {entry.record.version} is not built from what {branch_name} of {project} "
                "has or had; build it again"
            )
        commit = next((one for one in merged if one in trees), next(iter(trees)))
        commits.append(Commit(project=project, commit=commit, tree=trees[commit]))
    return Origin(branch=branch_name, commits=tuple(commits))
