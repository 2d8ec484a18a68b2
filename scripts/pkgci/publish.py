"""The job `publish`: from a build in the store to a repository that users and tests can use.

A change that is not merged gets a test repository. Whether it is merged is asked of Git, at the configured remote, now:
neither a parameter's word nor a branch of this machine counts.
"""

import logging
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pkgci import repository, source
from pkgci.artifacts import Repository
from pkgci.change import BRANCH, OBJECT, Change
from pkgci.config import Config
from pkgci.errors import RequestError
from pkgci.source import git
from pkgci.store import Store

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
        RequestError: there is no such build, or the change is merged (there are no released repositories yet, and a partial
            build is never released).
        PackageError: the packages cannot be indexed.
        InfrastructureError: the remote, the key or the file system fails.
    """
    entry = Store(config).required(build_key, target_name)
    if _merged(config, change):
        why = "released repositories are not configured"
        if entry.record.partial:
            why = f"build {build_key[:12]} is partial: it was built with other profiles than the package's own"
        raise RequestError(
            f"{change.number or change.commit[:12]} is merged into {change.branch} of {change.project}, and {why}"
        )
    expires = datetime.now(UTC) + timedelta(days=config.settings.test_repository_days)
    published = repository.write(config, target_name, run, [entry], expires)
    published.write(artifacts / repository.RECORD)
    log.info("%s packages at %s, until %s", len(published.packages), published.url, f"{expires:%Y-%m-%d}")
    return published


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
