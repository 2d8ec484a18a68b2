"""Roots of failed builds as the builds left them, for `pkgci shell`: see `kept.py`."""

import logging
from datetime import UTC, datetime
from pathlib import Path

from pkgci.config import Config, Limits
from pkgci.kept import Kept, KeptBuild

log = logging.getLogger(__name__)

ROOT = "root.tar.zst"


class FailedBuild(KeptBuild):
    """A build whose root is kept; `limits` are what it had."""

    package: str
    version: str
    reason: str
    limits: Limits

    def described(self) -> str:
        """Return it with its package."""
        return f"{self} ({self.package})"

    def names(self) -> set[str]:
        """Return all that a person may call it, by its package too."""
        return super().names() | {self.package}


def roots(config: Config) -> Kept[FailedBuild]:
    """Return the roots that are kept on this machine."""
    settings = config.settings
    return Kept(config.state / "failed", FailedBuild, settings.failed_root_days, settings.failed_roots_mib)


def keep(config: Config, new: Path, build: FailedBuild) -> None:
    """Keep what a failed build made in its room, if it made anything, and say so in the log."""
    days, largest = config.settings.failed_root_days, config.settings.failed_roots_mib
    if not (new / ROOT).exists():
        log.info("its root is not kept: it ended before there was one, or the disk has no place for it")
        return
    if (new / ROOT).stat().st_size > largest << 20:
        log.info("its root is not kept: packed it is larger than failed_roots_mib, %d", largest)
        return
    roots(config).keep(new, build, datetime.now(UTC))
    log.info("its root is kept for %d days: pkgci shell %s", days, build)
