"""The job `unpublished`: finds the heads of branches that are not in the released repositories of their releases.

A merge whose event was missed, or whose publication failed, is found so. It changes nothing.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pkgci import metrics, source
from pkgci.artifacts import Unpublished, UnpublishedBuild
from pkgci.change import Change
from pkgci.config import Config
from pkgci.errors import PkgciError, RequestError
from pkgci.formats import FORMATS
from pkgci.released.records import Hold, Origin
from pkgci.released.repository import Repository, repositories

log = logging.getLogger(__name__)

RECORD = "unpublished.json"
AT_ONCE = 8  # packages whose branches are asked for


@dataclass(frozen=True)
class Standing:
    """What a repository has: versions and origins by source package and target, and the holds by source package."""

    builds: dict[tuple[str, str], tuple[str, Origin | None]]
    holds: dict[str, Hold]


def unpublished(config: Config, package: str, artifacts: Path) -> str:
    """Compare branches with released repositories, and write `unpublished.json` and the metrics.

    Args:
        config: the configuration.
        package: the only package to look at; all, if it is empty.
        artifacts: an existing directory.

    Returns:
        In one line what was found.

    Raises:
        RequestError: released repositories or the remote are not configured, or the package is unknown.
        InfrastructureError: a repository cannot be read.
    """
    if config.settings.released is None or not config.settings.gerrit:
        raise RequestError(
            f"{config.directory / 'config.yaml'}: `released` and `gerrit` are needed; they say what is released and merged"
        )
    names = [package] if package else config.names("packages")
    if package:
        config.package(package)
    places = {repository.name: (repository, _standing(repository)) for repository in repositories(config)}
    standing = {name: known for name, (_, known) in places.items()}
    missing: list[UnpublishedBuild] = []
    problems: list[str] = []

    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        looking = {name: pool.submit(_compare, config, name, standing) for name in names}
    for name, looked in looking.items():
        try:
            missing += looked.result()
        except PkgciError as error:
            problems.append(f"{name}: {error}")
    for one in missing:
        why = f"on hold: {one.hold}" if one.hold else f"released is {one.released or 'nothing'}"
        log.info("%s for %s: %s of %s, %s", one.package, one.target, one.commit[:12], one.branch, why)
    for line in problems:
        log.warning("%s", line)
    if not package:
        for name, (repository, _) in places.items():
            metrics.compared(repository, sum(one.repository == name and not one.hold for one in missing))
        metrics.write(config)
    Unpublished(missing=tuple(missing), problems=tuple(problems)).write(artifacts / RECORD)
    held = sum(bool(one.hold) for one in missing)
    return f"{len(names)} packages: {len(missing) - held} builds are missing, {held} on hold, {len(problems)} problems"


def _standing(repository: Repository) -> Standing:
    builds: dict[tuple[str, str], tuple[str, Origin | None]] = {}
    if repository.current() is not None:
        with repository.opened():
            for key, name in repository.index.live():
                known = repository.released(key)
                builds[name, known.target] = known.version, repository.origin(key, name)
    return Standing(builds, repository.holds())


def _compare(config: Config, name: str, standing: dict[str, Standing]) -> list[UnpublishedBuild]:
    """Return what is missing of a package."""
    entry = config.package(name)
    heads = [source.heads(config, project) for project in entry.projects]
    # a pair is built from branches of one name
    branches = sorted(set.intersection(*(set(one) for one in heads)))
    missing = []
    claimed: dict[str, list[str]] = {}
    for branch in branches:
        found = config.release_of(branch)
        if found:
            claimed.setdefault(found[0], []).append(branch)
    for release, of_release in claimed.items():
        for target_name in config.release(release).targets:
            repository = f"{release}/{config.target(target_name).codename}"
            known = standing[repository].builds.get((name, target_name))
            for branch in of_release:
                commits = {project: head[branch] for project, head in zip(entry.projects, heads, strict=True)}
                version, origin = known or ("", None)
                if origin and origin.branch != branch and origin.branch in of_release:
                    # which of several branches of one release is the one, nobody but a person can say
                    log.info("%s for %s: released from %s, not from %s", name, target_name, origin.branch, branch)
                    continue
                if origin and {one.project: one.commit for one in origin.commits} == commits:
                    continue
                if not _packaged(config, name, entry.source, branch, commits[entry.source], target_name):
                    continue
                hold = standing[repository].holds.get(name)
                missing.append(
                    UnpublishedBuild(
                        package=name,
                        project=entry.source,
                        branch=branch,
                        commit=commits[entry.source],
                        target=target_name,
                        repository=repository,
                        released=version,
                        hold=hold.reason if hold else "",
                    )
                )
    return missing


def _packaged(config: Config, name: str, project: str, branch: str, commit: str, target_name: str) -> bool:
    sources = source.fetch(config, Change(project=project, branch=branch, commit=commit))
    format: ModuleType = FORMATS[config.target(target_name).format]
    return sources is not None and format.packaged(sources.packaging, name)
