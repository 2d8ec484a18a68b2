"""The job `publish`: from a build in the store to a repository that users and tests can use.

A change that is not merged gets a test repository, one that is goes to the released repository of its branch. Whether it
is merged is asked of Git, at the configured remote, now: neither a parameter's word nor a branch of this machine counts.
"""

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pkgci import repository, source
from pkgci.artifacts import Repository, RepositoryPackage
from pkgci.change import Change
from pkgci.config import Config
from pkgci.errors import RequestError
from pkgci.merged import Branch
from pkgci.released import repository as released
from pkgci.released.records import Commit, Origin, Publication
from pkgci.store import Entry, Store

log = logging.getLogger(__name__)


def publish(
    config: Config, target_name: str, change: Change, build_key: str, run: str, artifacts: Path, test: bool = False
) -> Repository:
    """Publish a build.

    Args:
        config: the configuration.
        target_name: the target that it was built for.
        change: the change that it was built from.
        build_key: its key in the store.
        run: the name of the run, which becomes a part of the test repository's URL.
        artifacts: the directory that takes `repository.json`.
        test: to a test repository, whether the change is merged by now or not.

    Returns:
        The repository.

    Raises:
        RequestError: there is no such build, or the change is merged and the released repository refuses the build.
        PackageError: the packages cannot be indexed, or the released repository refuses them.
        InfrastructureError: the remote, the key or the file system fails.
    """
    entry = Store(config).required(build_key, target_name)
    if not test and _merged(config, change):
        published = _release(config, target_name, change, entry)
    else:
        expires = datetime.now(UTC) + timedelta(days=config.settings.test_repository_days)
        published = repository.write(config, target_name, run, [entry], expires)
        log.info("until %s", f"{expires:%Y-%m-%d}")
    published.write(artifacts / repository.RECORD)
    log.info("%s packages at %s", len(published.packages), published.url)
    return published


def _release(config: Config, target_name: str, change: Change, entry: Entry) -> Repository:
    """Publish a build of a merged change to the released repository; return that, with the build's packages."""
    what = f"{change.number or change.commit[:12]} is merged into {change.branch} of {change.project}, and"
    if config.settings.released is None:
        raise RequestError(f"{what} released repositories are not configured")
    claimed = config.release_of(change.branch)
    if claimed is None:
        raise RequestError(f"{what} no release claims that branch")
    release, codename = claimed[0], config.target(target_name).codename
    origin = _origin(config, change, entry)
    done = released.publish(config, release, codename, [Publication(entry.record.key, origin)])
    log.info("generation %s of %s", done.generation.number, done.repository.name)
    (build,) = done.keys
    directory = done.repository.directory(entry.record.package, build)
    return Repository(
        url=done.repository.url,
        format=entry.record.format,
        codename=codename,
        target=target_name,
        packages=tuple(
            RepositoryPackage(
                **{**package.model_dump(), "file": f"{directory}/{package.file}"},
                source=entry.record.package,
                key=build,
            )
            for package in entry.record.packages
        ),
        signing_key=done.repository.key.public,
    )


def _origin(config: Config, change: Change, entry: Entry) -> Origin:
    """Return the merged commits that have the trees which a build was made from, as the remote has them now."""
    package = config.package_of(change.project)
    projects = config.package(package).projects if package else (change.project,)
    commits = []
    for project in projects:
        branch = Branch(config, project, change.branch)
        tree, found = next(
            ((tree, commit) for tree in entry.record.trees if (commit := branch.commit_of(tree))), ("", None)
        )
        if found is None:
            raise RequestError(
                f"{entry.record.package} {entry.record.version} is not built from what {change.branch} of {project} "
                "has or had; build it again"
            )
        commits.append(Commit(project=project, commit=found, tree=tree))
    return Origin(branch=change.branch, commits=tuple(commits))


def _merged(config: Config, change: Change) -> bool:
    """Return whether a change is merged: after a merge by its commit, before it by the one that its ref leads to."""
    if not config.settings.gerrit:
        return False
    commit: str | None = change.commit
    if change.queue:
        # Zuul's commit is that of the speculative merge
        cache = source.init(config.cache / "git" / f"{change.project}.git")
        commit = source.fetch_ref(cache, config.settings.gerrit + change.project, change.queue[-1].ref, missing_ok=True)
    return bool(commit) and Branch(config, change.project, change.branch).has(str(commit))
