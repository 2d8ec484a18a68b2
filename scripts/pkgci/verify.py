"""The job `verify`: a dry publication of builds, and the record of a gate whose system tests passed.

Nothing that a publication would refuse is to be found out only after the merge: all builds of a release are tried as one
generation of its released repository, and nothing is changed there. Which builds these are is held against Git and the
store; which tests passed, against the engine: no parameter's word counts.
"""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pkgci import gaterecord, source
from pkgci.artifacts import ARTIFACTS, Dependant, Systest, Verified
from pkgci.change import Change, Parameters, release_name
from pkgci.config import Config
from pkgci.engines.base import BuildRef, Engine
from pkgci.errors import InfrastructureError, RequestError
from pkgci.formats import nothing_to_build
from pkgci.gaterecord import GatedBuild, GatedChange, GateRecord
from pkgci.released import repository as released
from pkgci.released.records import Commit, Origin, Publication
from pkgci.source import Sources
from pkgci.store import Entry, Store
from pkgci.text import listed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Built:
    """A build of a package and branch of the queue."""

    change: Change
    release: str
    sources: Sources
    entry: Entry


def verify(config: Config, target_name: str, parameters: Parameters, engine: Engine, artifacts: Path) -> Verified:
    """Try to publish builds; where SYSTEM_TESTS names tests that they passed, write their gate record. Writes `verified.json`.

    Args:
        config: the configuration.
        target_name: the target that they are for.
        parameters: the queue, BUILD_KEYS, SYSTEM_TESTS.
        engine: what ran the system tests.
        artifacts: an existing directory.

    Returns:
        What is in `verified.json`.

    Raises:
        RequestError: the builds are not those of the queue, no test of all passed, or the released repository refuses one.
        PackageError: the released repository refuses what is in the packages.
        InfrastructureError: a branch has moved; or the remote, the store, the engine or a repository fails.
    """
    builds = _builds(config, target_name, parameters)
    codename = config.target(target_name).codename
    named: list[Dependant] = []
    releases = sorted({build.release for build in builds})
    for release in releases:
        own = [build for build in builds if build.release == release]
        publications = [_publication(build) for build in own]
        approved = parameters.approved(config)
        outside = released.try_to_publish(config, release, codename, publications, approved=approved)
        log.info("%s/%s: %s builds can be published together", release, codename, len(own))
        named += [Dependant(repository=f"{release}/{codename}", package=name) for name in outside]
    tests = [BuildRef.parse(one) for one in parameters.get("SYSTEM_TESTS").split()]
    if tests:
        if not parameters.approved(config):
            raise RequestError("parameter SYSTEM_TESTS: nobody has approved what ZUUL_PIPELINE tests")
        _refuse_untested(engine, target_name, tests, builds)
        path = gaterecord.write(config, _record(config, parameters, builds))
        log.info("gate record %s", path.name)
    made = Verified(
        target=target_name,
        keys=tuple(build.entry.record.key for build in builds),
        repositories=tuple(f"{release}/{codename}" for release in releases),
        dependants=tuple(named),
        recorded=bool(tests),
    )
    made.write(artifacts / "verified.json")
    return made


def summary(made: Verified) -> str:
    """Return in a few words what came of it."""
    recorded = "; the gate record is written" if made.recorded else ""
    return f"{len(made.keys)} builds can be published to {', '.join(made.repositories)}{recorded}"


def _builds(config: Config, target_name: str, parameters: Parameters) -> list[_Built]:
    """Return the builds, which are in the order of the queue: one for each part of it that has something to build."""
    entries = [Store(config).required(key, target_name) for key in parameters.required("BUILD_KEYS").split()]
    wanted = []
    for one in parameters.queued(config):
        change = one.change(config)
        release = release_name(config, change)
        sources = source.fetch(config, change) if release else None
        if sources and not nothing_to_build(config, change, sources, target_name):
            wanted.append((change, release, sources))
    if len(wanted) != len(entries):
        raise RequestError(f"parameter BUILD_KEYS: {len(entries)} builds, but the queue asks for {len(wanted)}")
    builds = [_Built(*one, entry) for one, entry in zip(wanted, entries, strict=True)]
    for build in builds:
        trees, record = (build.sources.source.id, build.sources.packaging.id), build.entry.record
        if record.trees != trees:
            # as `compile` has it
            raise InfrastructureError(
                f"parameter BUILD_KEYS: {record.package} {record.version} is built from {' and '.join(record.trees)}, "
                f"but {build.sources.package}, branch {build.change.branch}, is {' and '.join(trees)}: it moved since; "
                "try again"
            )
    return builds


def _publication(build: _Built) -> Publication:
    trees = {tree.project: tree for tree in (build.sources.source, build.sources.packaging)}
    commits = tuple(Commit(project=tree.project, commit=tree.commit, tree=tree.id) for tree in trees.values())
    return Publication(build.entry.record.key, Origin(branch=build.change.branch, commits=commits))


def _refuse_untested(engine: Engine, target_name: str, tests: Sequence[BuildRef], builds: Sequence[_Built]) -> None:
    """Refuse builds of a release that no system test, whole and passed, had under test together."""
    tested: list[set[tuple[str, str]]] = []
    for ref in tests:
        if ref.job != f"systest-{target_name}" or engine.state(ref) != "SUCCESS":
            raise RequestError(f"parameter SYSTEM_TESTS: {ref} is no system test for {target_name} that passed")
        with tempfile.TemporaryDirectory() as scratch:
            engine.artifacts(ref, Path(scratch))
            record = Systest.read(Path(scratch, ARTIFACTS, "systest.json"))
        if any(record.parameters.get(name) for name in ("SCENARIOS", "ENVIRONMENT", "FLAVOURS")):
            raise RequestError(
                f"parameter SYSTEM_TESTS: {ref} is of scenarios, an environment or flavours that a person chose"
            )
        tested.append({(package.name, package.sha256) for package in record.packages})
    for release in sorted({build.release for build in builds}):
        own = [one for build in builds if build.release == release for one in build.entry.record.packages]
        wanted = {(package.name, package.sha256) for package in own if package.kind == "binary"}
        if not any(wanted <= one for one in tested):
            names = listed(sorted(name for name, _ in wanted))
            raise RequestError(f"parameter SYSTEM_TESTS: none of these tests had all of {names} under test together")


def _record(config: Config, parameters: Parameters, builds: Sequence[_Built]) -> GateRecord:
    """Return the record of what was tested together."""
    change = parameters.change(config)
    made_by = {package.sha256: one.entry.record.key for one in builds for package in one.entry.record.packages}
    gated = []
    for build in builds:
        record = build.entry.record
        against = {made_by[one.sha256] for one in record.dependencies if one.sha256 in made_by}
        projects = {build.sources.source.project, build.sources.packaging.project}
        gated.append(
            GatedBuild(
                package=build.sources.package,
                branch=build.change.branch,
                target=record.target,
                source_tree=build.sources.source.id,
                packaging_tree=build.sources.packaging.id,
                key=record.key,
                against=tuple(sorted(against)),
                changes=tuple(
                    number
                    for number, item in enumerate(change.queue)
                    if item.branch == build.change.branch and item.project in projects
                ),
            )
        )
    return GateRecord(
        run=parameters.required("ZUUL_UUID"),
        pipeline=change.pipeline,
        time=datetime.now(UTC),
        changes=tuple(_gated(config, change, number) for number in range(len(change.queue))),
        builds=tuple(gated),
    )


def _gated(config: Config, change: Change, position: int) -> GatedChange:
    """Return a change of the queue, with the state of its project when it and all ahead of it are merged."""
    item = change.queue[position]
    last = position == len(change.queue) - 1
    until = replace(
        change,
        project=item.project,
        branch=item.branch,
        queue=change.queue[: position + 1],
        # what Zuul has prepared is the last state
        ref=change.ref if last else "",
        commit=change.commit if last else "",
    )
    tree = source.state(config, until, item.project)
    number, patchset = item.patch_set
    return GatedChange(
        project=item.project, branch=item.branch, number=number, patchset=patchset, tree=tree.id, count=tree.count
    )
