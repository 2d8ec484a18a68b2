"""The job `order`: which builds a queue of changes asks for, and which of them come after which.

A package that build-depends on what another one of the queue makes comes after that one. What packages need and offer they
say themselves, read in the sandbox. What an RPM package offers beyond its spec shows only once it is built (sonames,
pkgconfig files), so what the released repository has of it counts, too.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from pkgci import source
from pkgci.artifacts import Order, OrderedBuild, SkippedBuild
from pkgci.change import Change, Parameters, local_changes, release_name, release_of
from pkgci.config import Config
from pkgci.errors import PackageError
from pkgci.formats import FORMATS, nothing_to_build, repomd
from pkgci.formats.base import Metadata, Request
from pkgci.roots import build_root
from pkgci.server import serve
from pkgci.source import Sources

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Unit:
    """A package and branch that the queue touches."""

    change: Change
    release: str
    sources: Sources
    metadata: Metadata


def order(config: Config, target_name: str, parameters: Parameters, artifacts: Path) -> Order:
    """Find the order of the builds of a queue for a target; write `order.json`.

    Args:
        config: the configuration.
        target_name: the target.
        parameters: the change that the queue ends with.
        artifacts: an existing directory, which takes `logs/` too.

    Returns:
        What is in `order.json`.

    Raises:
        RequestError: the change's project is unknown, or a parameter is wrong.
        PackageError: changes do not merge, metadata cannot be read, or packages build-depend on each other in a cycle.
        InfrastructureError: fetching failed, or the sandbox did.
    """
    units, skipped = [], []
    *others, own = (one.change(config) for one in parameters.queued(config))
    for change in (*others, own):
        local = change.url == local_changes(config)
        unknown = change is not own and not local and config.package_of(change.project) is None
        sources = None if unknown else source.fetch(config, change)
        reason = "no package has this project" if unknown else nothing_to_build(config, change, sources, target_name)
        if sources is None or reason:
            skipped.append(SkippedBuild(project=change.project, branch=change.branch, reason=reason))
            log.info("%s, branch %s: nothing to build: %s", change.project, change.branch, reason)
        else:
            units.append(_read(config, target_name, change, sources, artifacts))
    after = _edges(units, _released(config, target_name, units))
    _refuse_cycle(units, after)
    made = Order(
        target=target_name,
        builds=tuple(
            OrderedBuild(
                project=unit.change.project,
                branch=unit.change.branch,
                package=unit.metadata.name,
                release=unit.release,
                source_tree=unit.sources.source.id,
                packaging_tree=unit.sources.packaging.id,
                after=tuple(after[number]),
            )
            for number, unit in enumerate(units)
        ),
        skipped=tuple(skipped),
    )
    made.write(artifacts / "order.json")
    for build in made.builds:
        names = ", ".join(made.builds[one].package for one in build.after)
        log.info(
            "%s of %s, branch %s%s", build.package, build.project, build.branch, f": after {names}" if names else ""
        )
    return made


def summary(made: Order) -> str:
    """Return in a few words what the order is."""
    ordered = sum(bool(build.after) for build in made.builds)
    return f"{len(made.builds)} to build, {ordered} of them after others, {len(made.skipped)} with nothing to build"


def _read(config: Config, target_name: str, change: Change, sources: Sources, artifacts: Path) -> _Unit:
    """Return a package with what its packaging says, as it is built by default."""
    target = config.target(target_name)
    for tree in {sources.source, sources.packaging}:
        source.refuse_unfit(config, tree, sources.entry, sources.package)
    request = Request(
        config=config,
        target_name=target_name,
        target=target,
        release=release_of(config, change),
        sources=sources,
        root=build_root(config, target_name),
        repositories=(),
        limits=config.limits(sources.entry),
        final=False,
        profiles=tuple(sorted(sources.entry.profiles)),
        partial=False,
        log_path=artifacts / "logs" / "metadata.log",
    )
    metadata = FORMATS[target.format].inspect(request, sources.packaging)
    return _Unit(change, release_name(config, change), sources, metadata)


def _released(config: Config, target_name: str, units: Sequence[_Unit]) -> dict[str, dict[str, set[str]]]:
    """Return by release and source package what the released repositories' RPM packages of it offer."""
    target = config.target(target_name)
    if target.format != "rpm" or config.settings.released is None or len(units) < 2:
        return {}
    with serve(config):
        releases = sorted({unit.release for unit in units if unit.release})
        return {one: repomd.offered(f"{config.settings.url}{one}/{target.codename}/") for one in releases}


def _edges(units: Sequence[_Unit], released: dict[str, dict[str, set[str]]]) -> list[list[int]]:
    """Return for each package the positions of those that it comes after."""
    offers: dict[tuple[str, str], set[int]] = {}
    for number, unit in enumerate(units):
        for name in {*unit.metadata.offers, *released.get(unit.release, {}).get(unit.metadata.name, ())}:
            offers.setdefault((unit.release, name), set()).add(number)
    return [
        sorted(
            other
            for other in {one for name in unit.metadata.needs for one in offers.get((unit.release, name), ())}
            # the same package of another branch is another version of itself
            if units[other].metadata.name != unit.metadata.name
        )
        for unit in units
    ]


def _refuse_cycle(units: Sequence[_Unit], after: Sequence[Sequence[int]]) -> None:
    try:
        TopologicalSorter(dict(enumerate(after))).prepare()
    except CycleError as error:
        # each is needed by the one that follows it
        names = " -> ".join(units[number].metadata.name for number in reversed(error.args[1]))
        raise PackageError(
            f"packages of this queue build-depend on each other in a cycle: {names}; "
            "let the first change of them do without, and merge it alone"
        ) from None
