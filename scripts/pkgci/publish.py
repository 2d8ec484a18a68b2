"""The job `publish`: from a build in the store to a repository that users and tests can use.

A change that is not merged gets a test repository. Whether it is merged is asked of Git, at the configured remote, now:
neither a parameter's word nor a branch of this machine counts.
"""

import logging
import re
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pkgci import repository, source
from pkgci.artifacts import Repository
from pkgci.change import BRANCH, OBJECT, Change
from pkgci.config import Config
from pkgci.errors import InfrastructureError, RequestError
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
        RequestError: there is no such build, or the change is merged (there are no released repositories yet).
        PackageError: the packages cannot be indexed.
        InfrastructureError: the remote, the key or the file system fails.
    """
    if _merged(config, change):
        raise RequestError(
            f"{change.commit[:12]} is merged into {change.branch} of {change.project}, "
            "and released repositories are not configured"
        )
    entry = Store(config).lookup(build_key)
    if entry is None:
        raise RequestError(f"build {build_key[:12]} is not in the store; run compile-{target_name} again")
    if entry.record.target != target_name:
        raise RequestError(f"build {build_key[:12]} is for {entry.record.target}, not for {target_name}")
    expires = datetime.now(UTC) + timedelta(days=config.settings.test_repository_days)
    published = repository.write(config, target_name, run, [entry], expires)
    published.write(artifacts / repository.RECORD)
    log.info("%s packages at %s, until %s", len(published.packages), published.url, f"{expires:%Y-%m-%d}")
    return published


def _merged(config: Config, change: Change) -> bool:
    if not config.settings.gerrit or not change.commit:
        return False
    remote = config.settings.gerrit + change.project
    return is_merged(remote, change.branch, change.commit, config.cache / "merged" / f"{change.project}.git")


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
    source.init(cache)
    ref, fetched = f"refs/heads/{branch}", f"refs/pkgci/{uuid.uuid4().hex}"
    listed = git(cache, "ls-remote", "--exit-code", "--", remote_url, ref, check=False)
    if listed.returncode == 2:
        return False
    fetch = ["fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--", remote_url, f"+{ref}:{fetched}"]
    done = git(cache, *fetch, check=False, quiet=False)
    if done.returncode:
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["git said nothing"])[-1]
        raise InfrastructureError(f"cannot fetch {ref} from {remote_url}: {reason}")
    try:
        if git(cache, "cat-file", "-e", f"{commit}^{{commit}}", check=False).returncode:
            return False
        return git(cache, "merge-base", "--is-ancestor", commit, fetched, check=False).returncode == 0
    finally:
        git(cache, "update-ref", "-d", fetched)
