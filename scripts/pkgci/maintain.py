"""The job `repository-maintain`: what released repositories need from day to day, also when nothing is published.

Each is signed anew before clients refuse it as too old, former generations go, what a killed run left is finished. Whoever
reads the result is told 60 days before the key expires.
"""

import logging
from datetime import datetime
from pathlib import Path

from pkgci.artifacts import Maintenance
from pkgci.config import Config
from pkgci.errors import InfrastructureError, PkgciError
from pkgci.mirrors.jobs import start_syncs
from pkgci.released.key import ReleaseKey
from pkgci.released.repository import repositories
from pkgci.step import StepContext

log = logging.getLogger(__name__)

RECORD = "maintenance.json"


def maintain(config: Config, now: datetime, artifacts: Path) -> str:
    """Maintain all released repositories; write `maintenance.json`.

    Args:
        config: the configuration.
        now: the time, with a time zone.
        artifacts: an existing directory.

    Returns:
        In one line what was done.

    Raises:
        InfrastructureError: a repository or the key needs a person; the others are maintained, and the record is written.
    """
    if config.settings.released is None:
        return "released repositories are not configured"
    done, problems = [], []
    key = ReleaseKey(config, config.data / "released")
    expires = key.expires
    warning = key.warning(now)
    if warning:
        problems.append(warning)
    for repository in repositories(config):
        try:
            found = repository.maintain(now)
        except PkgciError as error:
            problems.append(str(error))
            continue
        if found:
            done.append(found)
            why = f", signed anew: {found.renewed}" if found.renewed else ""
            log.info("%s: generation %s%s; %s removed", found.repository, found.generation, why, len(found.cleaned))
    for problem in problems:
        log.info("%s", problem)
    Maintenance(repositories=tuple(done), key_expires=expires, problems=tuple(problems)).write(artifacts / RECORD)
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise InfrastructureError(f"{problems[0]}{more}")
    renewed, cleaned = sum(bool(one.renewed) for one in done), sum(len(one.cleaned) for one in done)
    return f"{len(done)} repositories, {renewed} signed anew, {cleaned} former generations removed"


def sync_mirrors(context: StepContext, artifacts: Path) -> None:
    """Start the syncs of the mirrors of repositories that were signed anew: what those show gets too old, too.

    Args:
        context: starts the jobs.
        artifacts: the directory with `maintenance.json`; without it nothing was done.
    """
    record = artifacts / RECORD
    done = Maintenance.read(record).repositories if record.exists() else ()
    start_syncs(context, [one.repository for one in done if one.renewed])
