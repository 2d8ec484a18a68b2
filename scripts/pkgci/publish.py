"""The job `publish`: from a build in the store to a repository that users and tests can use.

A change that is not merged gets a test repository, one that is goes to the released repository of its branch. Whether it
is merged is asked of Git, at the configured remote, now: neither a parameter's word nor a branch of this machine counts.
"""

import logging
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pkgci import repository, source
from pkgci.artifacts import Repository, RepositoryPackage
from pkgci.change import BRANCH, OBJECT, Change
from pkgci.config import Config
from pkgci.errors import PkgciError, RequestError
from pkgci.released import repository as released
from pkgci.released.records import Commit, Origin, Publication
from pkgci.source import git
from pkgci.step import StepContext
from pkgci.store import Entry, Store

log = logging.getLogger(__name__)


def publish(config: Config, target_name: str, change: Change, build_key: str, run: str, artifacts: Path) -> Repository:
    """Publish a build.

    Args:
        config: the configuration.
        target_name: the target that it was built for.
        change: the change that it was built from.
        build_key: its key in the store.
        run: the name of the run, which becomes a part of the test repository's URL.
        artifacts: the directory that takes `repository.json`.

    Returns:
        The repository.

    Raises:
        RequestError: there is no such build, or the change is merged and the released repository refuses the build.
        PackageError: the packages cannot be indexed, or the released repository refuses them.
        InfrastructureError: the remote, the key or the file system fails.
    """
    entry = Store(config).required(build_key, target_name)
    if _merged(config, change):
        published = _release(config, target_name, change, entry)
    else:
        expires = datetime.now(UTC) + timedelta(days=config.settings.test_repository_days)
        published = repository.write(config, target_name, run, [entry], expires)
        log.info("until %s", f"{expires:%Y-%m-%d}")
    published.write(artifacts / repository.RECORD)
    log.info("%s packages at %s", len(published.packages), published.url)
    return published


def sync_mirrors(context: StepContext, target_name: str, change: Change) -> None:
    """Start the sync of the mirrors of what a merged change was published to; that it fails is its own result.

    Args:
        context: starts the job.
        target_name: the target.
        change: the change.
    """
    claimed = context.config.release_of(change.branch)
    if claimed is None or not claimed[1].mirrors:
        return
    try:
        context.launch(f"mirror-sync-{context.config.target(target_name).format}", {"RELEASE": claimed[0]})
    except PkgciError as error:
        log.warning("the mirrors are left to the next sync: %s", error)


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
        cache = source.init(config.cache / "git" / f"{project}.git")
        tip = source.fetch_ref(cache, f"{config.settings.gerrit}{project}", f"refs/heads/{change.branch}")
        listed = git(cache, "log", "--format=%H %T", str(tip), quiet=True).stdout.decode().splitlines()
        found = next((line.split() for line in listed if line.split()[1] in entry.record.trees), None)
        if found is None:
            raise RequestError(
                f"{entry.record.package} {entry.record.version} is not built from what {change.branch} of {project} "
                "has or had; build it again"
            )
        commits.append(Commit(project=project, commit=found[0], tree=found[1]))
    return Origin(branch=change.branch, commits=tuple(commits))


def _merged(config: Config, change: Change) -> bool:
    """Return whether a change is merged: after a merge by its commit, before it by the one that its ref leads to."""
    if not config.settings.gerrit:
        return False
    remote, cache = config.settings.gerrit + change.project, config.cache / "git" / f"{change.project}.git"
    commit: str | None = change.commit
    if change.queue:
        # Zuul's commit is that of the speculative merge
        commit = source.fetch_ref(source.init(cache), remote, change.queue[-1].ref, missing_ok=True)
    return bool(commit) and is_merged(remote, change.branch, str(commit), cache)


def is_merged(remote_url: str, branch: str, commit: str, cache: Path) -> bool:
    """Return whether a commit is reachable from a branch, as the remote has it now.

    Args:
        remote_url: a URL that git can fetch from.
        branch: the branch's name.
        commit: the commit's full id.
        cache: a bare repository of our own, made when it is missing, that keeps what was fetched.

    Raises:
        RequestError: `branch` or `commit` is no such name.
        InfrastructureError: the remote does not answer.
    """
    if not re.fullmatch(BRANCH, branch) or not re.fullmatch(OBJECT, commit):
        raise RequestError(f"{branch[:80]!r}, {commit[:80]!r}: not a branch and a full commit id")
    tip = source.fetch_ref(source.init(cache), remote_url, f"refs/heads/{branch}", missing_ok=True)
    # a commit that the cache has not is an error to git, and not merged
    return tip is not None and git(cache, "merge-base", "--is-ancestor", commit, tip, check=False).returncode == 0
