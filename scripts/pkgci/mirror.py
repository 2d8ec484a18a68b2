"""The jobs `mirror-sync-deb` and `mirror-sync-rpm`: what is released goes to the mirrors; and `pkgci mirror status`.

Each repository's mirrors are a set of their own: what fails in one holds no other back.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from pkgci.artifacts import Sync, SyncedRepository
from pkgci.config import Config
from pkgci.errors import Exit, InfrastructureError, PkgciError
from pkgci.mirrors.standing import mirrored, standings
from pkgci.mirrors.transaction import sync
from pkgci.released.repository import Repository


def mirror_sync(config: Config, form: str, release: str, artifacts: Path, *, everything: bool = False) -> Sync:
    """Bring the mirrors of released repositories of one format to their current generations.

    Args:
        config: the configuration.
        form: `deb` or `rpm`.
        release: the release; if empty all, as the timer starts it: what was not gone through for a day is so then.
        artifacts: the directory that takes `sync.json`.
        everything: go through all that the mirrors have, not only through what has changed.

    Returns:
        What was done.

    Raises:
        RequestError: there is no such release.
        InfrastructureError: the mirrors of a repository are not at its current generation; the others may be.
    """
    whole_after = timedelta(0) if everything else None if release else timedelta(days=1)
    if release:
        config.release(release)
    chosen = [one for one, _ in mirrored(config) if one.format == form and release in ("", one.release)]

    def one(repository: Repository) -> SyncedRepository:
        try:
            return sync(repository, whole_after)
        except (PkgciError, OSError) as error:
            about = {"release": repository.release, "codename": repository.codename, "generation": 0, "seconds": 0}
            return SyncedRepository(**about, started=datetime.now(UTC), notice="", fault=str(error), mirrors=())

    with ThreadPoolExecutor(max_workers=max(1, len(chosen))) as pool:
        done = Sync(repositories=tuple(pool.map(one, chosen)))
    done.write(artifacts / "sync.json")
    faults = [f"{one.release}/{one.codename}: {one.fault}" for one in done.repositories if one.fault]
    if faults:
        raise InfrastructureError("; ".join(faults))
    return done


def summary(done: Sync) -> str:
    """Return what was done in one line."""
    said = [
        f"{one.release}/{one.codename}: {one.notice or f'generation {one.generation} on {len(one.mirrors)} mirrors'}"
        for one in done.repositories
    ]
    return "; ".join(said) or "no release has mirrors for this format"


@click.group("mirror")
def mirror() -> None:
    """Look after the mirrors of released repositories."""


@mirror.command("status")
def _status() -> None:
    """Show where each mirror is, as its readers see it. Exit code 3 when one is behind or unknown and not put aside."""
    late = False
    for one in standings(Config()):
        late |= not one.fault.startswith("aside") and (one.generation is None or one.behind > 0)
        click.echo(one.line(datetime.now(UTC)))
    sys.exit(int(Exit.INFRASTRUCTURE if late else Exit.PASSED))
