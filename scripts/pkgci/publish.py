"""The job `publish`: from a build in the store to a repository that users and tests can use.

A change that is not merged gets a test repository, one that is goes to the released repository of its branch. Whether it
is merged is asked of Git, at the configured remote, now: neither a parameter's word nor a branch of this machine counts.

After a merge it is started without a build first: what a gate has tested is published then. Only when there is nothing of
that kind the change is built again, and published by its build.
"""

import logging
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pkgci import repository, source
from pkgci.artifacts import ReleaseOutcome, Repository
from pkgci.change import MOVED, Change, Parameters
from pkgci.config import Config
from pkgci.errors import PkgciError
from pkgci.merged import Branch
from pkgci.released import merges
from pkgci.step import StepContext
from pkgci.store import Store

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
        artifacts: the directory that takes `repository.json`, and `released.json` of a merged change.
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
        published = merges.publish_build(config, target_name, change, entry, artifacts)
    else:
        expires = datetime.now(UTC) + timedelta(days=config.settings.test_repository_days)
        published = repository.write(config, target_name, run, [entry], expires)
        log.info("until %s", f"{expires:%Y-%m-%d}")
    published.write(artifacts / repository.RECORD)
    log.info("%s packages at %s", len(published.packages), published.url)
    return published


def go_on(context: StepContext, target_name: str, parameters: Parameters, artifacts: Path) -> None:
    """Start what follows the publication of a merged change: the sync of its mirrors, and tests of reviews it concerns.

    How they end is their own result.

    Args:
        context: starts the jobs.
        target_name: the target.
        parameters: the job's parameters.
        artifacts: the directory with `released.json`; without it nothing follows.
    """
    config, record = context.config, artifacts / merges.OUTCOME
    outcome = ReleaseOutcome.read(record) if record.exists() else None
    if outcome is None or outcome.result == "absent":
        return
    release = outcome.repository.partition("/")[0]
    if config.release(release).mirrors:
        _launch(context, f"mirror-sync-{config.target(target_name).format}", {"RELEASE": release})
    if parameters.merged and config.settings.review and config.settings.review.retrigger:
        moved = {name: parameters.get(name) for name in MOVED}
        _launch(context, "retrigger-outstanding", {name: value for name, value in moved.items() if value})


def _launch(context: StepContext, job: str, parameters: Mapping[str, str]) -> None:
    try:
        context.launch(job, parameters)
    except PkgciError as error:
        log.warning("%s is left to its timer: %s", job, error)


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
