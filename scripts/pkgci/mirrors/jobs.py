"""Which job brings what is released to the mirrors, and starting it: after a publication, or when a release was signed anew."""

import logging
from collections.abc import Iterable

from pkgci.config import Config
from pkgci.errors import PkgciError
from pkgci.step import StepContext

log = logging.getLogger(__name__)


def sync_job(config: Config, repository: str) -> tuple[str, str] | None:
    """Return the job for the mirrors of a released repository, and its RELEASE; None when there are no mirrors.

    Args:
        config: the configuration.
        repository: `RELEASE/CODENAME`.

    Raises:
        RequestError: there is no such release.
    """
    name, _, codename = repository.partition("/")
    release = config.release(name)
    targets = map(config.target, release.targets if release.mirrors else ())
    return next(((f"mirror-sync-{one.format}", name) for one in targets if one.codename == codename), None)


def start_syncs(context: StepContext, repositories: Iterable[str]) -> None:
    """Start the syncs of the mirrors of released repositories; how they end is their own result.

    Args:
        context: starts the jobs.
        repositories: each as `RELEASE/CODENAME`.
    """
    try:
        for job, release in sorted({one for name in repositories if (one := sync_job(context.config, name))}):
            context.launch(job, {"RELEASE": release})
    except PkgciError as error:
        log.warning("the mirrors are left to the next sync: %s", error)
