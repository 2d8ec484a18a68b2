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
from pkgci.released.key import ReleaseKey
from pkgci.released.repository import repositories

log = logging.getLogger(__name__)


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
    Maintenance(repositories=tuple(done), key_expires=expires, problems=tuple(problems)).write(
        artifacts / "maintenance.json"
    )
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise InfrastructureError(f"{problems[0]}{more}")
    renewed, cleaned = sum(bool(one.renewed) for one in done), sum(len(one.cleaned) for one in done)
    return f"{len(done)} repositories, {renewed} signed anew, {cleaned} former generations removed"
