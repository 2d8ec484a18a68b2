"""The job `compile`: builds the packages of a source tree in the sandbox, or takes them from the store.

It fetches the trees again, read-only, and refuses others than those that it was started for. What decides a build's
result makes its key; a build whose key is in the store is not repeated, one that is under way is waited for.
"""

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

from pkgci import failed, former, repository, reproducible, source
from pkgci.artifacts import Build, ChangeSummary, File
from pkgci.change import Change, Parameters, release_of
from pkgci.config import ROOT, Config, Limits
from pkgci.engines.base import BuildRef
from pkgci.errors import InfrastructureError, PackageError, RequestError
from pkgci.formats import FORMATS
from pkgci.formats.base import Built, Dependencies, Metadata, Request
from pkgci.roots import build_root
from pkgci.server import serve
from pkgci.source import Sources
from pkgci.store import Entry, Material, Namespace, Record, Store, describe

log = logging.getLogger(__name__)

ALGORITHM = 1
WAIT = 600


def compile(
    config: Config, target_name: str, parameters: Parameters, artifacts: Path, own: BuildRef | None = None
) -> Build:
    """Build the package of a change for one target, and write `build.json`.

    Args:
        config: the configuration.
        target_name: the target.
        parameters: the job's parameters: the change, SOURCE_TREE, PACKAGING_TREE, REPOSITORIES, RUN_TESTS, BUILD_PROFILES,
            BUILD_MINUTES, REPRODUCIBLE, KEEP_ROOT.
        artifacts: an existing directory that takes `build.json`, `contents.json`, `former.json` and `logs/`.
        own: the build that this is, by which a person finds its root again; without it none is kept.

    Returns:
        What was built, or found in the store.

    Raises:
        RequestError: a parameter is wrong, or the trees are not those that were asked for.
        PackageError: the tree is refused, does not build, or comes out different when built again.
        InfrastructureError: fetching, resolving or the store failed.
    """
    target = config.target(target_name)
    format = FORMATS[target.format]
    seconds: dict[str, float] = {}
    change = parameters.change(config)
    sources = _timed(seconds, "fetch", lambda: _fetch(config, change, parameters))
    for tree in {sources.source, sources.packaging}:
        source.refuse_unfit(config, tree, sources.entry, sources.package)
    if not format.packaged(sources.packaging, sources.package):
        raise RequestError(f"{sources.package} has no packaging for {target_name}; `build` would have said so")
    profiles = {*sources.entry.profiles, *parameters.profiles}
    partial = profiles > set(sources.entry.profiles)
    with serve(config):
        request = Request(
            config=config,
            target_name=target_name,
            target=target,
            release=release_of(config, change),
            sources=sources,
            root=_timed(seconds, "root", lambda: build_root(config, target_name)),
            repositories=repository.read(config, target_name, parameters.repositories(config)),
            limits=_limits(config, sources, parameters),
            final=not parameters.run_tests and not partial,
            profiles=tuple(sorted(profiles)),
            partial=partial,
            log_path=artifacts / "logs" / "build.log",
        )
        metadata = _timed(seconds, "metadata", lambda: _metadata(format, request))
        version = format.version(request, metadata)
        dependencies = _timed(seconds, "dependencies", lambda: format.resolve(request, metadata))
        namespace: Namespace = "release" if parameters.approved(config) else "check"
        key = _key(request, metadata, version, dependencies, namespace)
        log.info("%s %s for %s: key %s", metadata.name, version, target_name, key)

        def make(output: str, vary: bool = False) -> Built:
            keep = own if parameters.get("KEEP_ROOT") == "true" else None
            with _keeping(replace(request, vary=vary), metadata.name, version, keep, parameters.get("PARENT")) as asked:
                return format.build(asked, metadata, version, dependencies, Path(output))

        with Store(config).claim(key, wait=request.limits.seconds + WAIT) as claimed:
            origin = "store" if isinstance(claimed, Entry) else "built"
            if isinstance(claimed, Entry):
                log.info("taken from the store: the same input was built before")
                entry = claimed
            else:
                with tempfile.TemporaryDirectory(dir=claimed.directory) as output:
                    built = _timed(seconds, "build", lambda: make(output))
                    record = Record(
                        key=key,
                        algorithm=ALGORITHM,
                        package=metadata.name,
                        version=version,
                        target=target_name,
                        format=target.format,
                        trees=(sources.source.id, sources.packaging.id),
                        root=request.root.id,
                        dependencies=tuple(Material(name=one.file, sha256=one.sha256) for one in dependencies.install),
                        partial=partial,
                        namespace=namespace,
                        packages=built.packages,
                        files=tuple(describe(path) for path in built.files),
                    )
                    if not record.packages:
                        raise PackageError(f"{metadata.name}: the build made no binary package for {target_name}")
                    entry = Store(config).deliver(claimed, record, built.files)
        record = entry.record
        _timed(seconds, "contents", lambda: former.write(request, entry, artifacts))
        differing: list[str] | None = None
        if parameters.get("REPRODUCIBLE") == "true":
            log.info("building it once more, a little differently, to compare")
            with tempfile.TemporaryDirectory() as again:
                try:
                    _timed(seconds, "again", lambda: make(again, vary=True))
                except PackageError as error:
                    raise PackageError(
                        f"{error}; that was the second time, on another day and with another umask"
                    ) from error
                differing = reproducible.compare(request, entry, Path(again))
    build = Build(
        change=ChangeSummary(
            id=change.id(sources.digest),
            project=change.project,
            branch=change.branch,
            pipeline=change.pipeline,
            subject=sources.source.subject,
        ),
        package=record.package,
        version=record.version,
        target=target_name,
        source_tree=sources.source.id,
        packaging_tree=sources.packaging.id,
        key=key,
        profiles=request.profiles,
        reproducible=None if differing is None else not differing,
        origin=origin,
        packages=record.packages,
        files=tuple(File(name=file.name, size=file.size, sha256=file.sha256) for file in record.files),
        seconds=seconds,
    )
    build.write(artifacts / "build.json")
    if differing:
        raise PackageError(
            f"{record.package}: not reproducible: built twice, {', '.join(differing)} came out different; "
            "logs/diffoscope.txt says where"
        )
    return build


def _limits(config: Config, sources: Sources, parameters: Parameters) -> Limits:
    limits, minutes = config.limits(sources.entry), parameters.get("BUILD_MINUTES")
    return limits.model_copy(update={"seconds": int(minutes) * 60}) if minutes else limits


@contextmanager
def _keeping(request: Request, package: str, version: str, own: BuildRef | None, parent: str) -> Iterator[Request]:
    """Yield the request to build by, and keep the root of a build that fails, for `pkgci shell`, if `own` is given."""
    if own is None:
        yield request
        return
    with failed.roots(request.config).room(datetime.now(UTC)) as room:
        try:
            yield replace(request, keep=room / failed.ROOT)
        except PackageError as error:
            build = failed.FailedBuild(
                job=own.job,
                number=own.number,
                parent=parent,
                target=request.target_name,
                package=package,
                version=version,
                reason=str(error),
                ended=datetime.now(UTC),
                limits=request.limits,
            )
            failed.keep(request.config, room, build)
            raise


def _fetch(config: Config, change: Change, parameters: Parameters) -> Sources:
    sources = source.fetch(config, change)
    if sources is None:
        raise RequestError(f"no release claims branch {change.branch}; `build` would have said so")
    for name, tree in (("SOURCE_TREE", sources.source), ("PACKAGING_TREE", sources.packaging)):
        if parameters.get(name) not in ("", tree.id):
            raise InfrastructureError(
                f"{tree.project} is now tree {tree.id}, not {name} {parameters.get(name)}: it moved since; try again"
            )
    return sources


def _metadata(format: ModuleType, request: Request) -> Metadata:
    """Return the package's metadata; refuse a base version below the one that the branch has already."""
    sources = request.sources
    metadata = format.inspect(request, sources.packaging)
    previous = sources.previous
    if previous and previous.id != sources.packaging.id and format.packaged(previous, sources.package):
        try:
            before = format.inspect(request, previous)
        except PackageError as error:
            log.info("the branch's own packaging cannot be read, so there is no version to grow from: %s", error)
            return metadata
        if before.name == metadata.name and format.newer(before.version, metadata.version):
            raise PackageError(
                f"{metadata.name}: version {metadata.version} is below {before.version} of the branch; versions only grow"
            )
    return metadata


def _key(request: Request, metadata: Metadata, version: str, dependencies: Dependencies, namespace: Namespace) -> str:
    """Return the sha256 of everything that decides the build's result.

    The extra repositories enter by the content of what they contributed, not by where they are.
    """
    folder = ROOT / "scripts" / "pkgci"
    names = ("sandbox.sh", *(f"formats/{form}-{what}.sh" for form in ("deb", "rpm") for what in ("build", "contents")))
    recipe = [(folder / name).read_text() for name in names]
    made_from = {
        "algorithm": ALGORITHM,
        "namespace": namespace,
        "source": request.sources.source.id,
        "packaging": request.sources.packaging.id,
        "version": version,
        "profiles": request.profiles,
        "date": metadata.date or request.sources.date,
        "target": [request.target_name, request.target.codename, request.target.independent],
        "root": request.root.id,
        "install": [(one.file, one.sha256) for one in dependencies.install],
        "remove": dependencies.remove,
        "recipe": recipe,
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _timed(seconds: dict[str, float], what: str, do: Callable):
    """Run one step and note how long it took."""
    start = time.monotonic()
    try:
        return do()
    finally:
        seconds[what] = round(time.monotonic() - start, 2)
