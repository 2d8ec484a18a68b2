"""The jobs `mirror-sync-deb` and `mirror-sync-rpm`: what is released goes to the mirrors; and `pkgci mirror status`.

Each repository's mirrors are a set of their own: what fails in one holds no other back.
"""

import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from pkgci.artifacts import Sync, SyncedRepository
from pkgci.config import Config
from pkgci.errors import Exit, InfrastructureError, PkgciError
from pkgci.mirrors.standing import mirrored, standings
from pkgci.mirrors.stop import Stop
from pkgci.mirrors.transaction import sync
from pkgci.released.repository import Repository
from pkgci.text import spelled_out

log = logging.getLogger(__name__)


def mirror_sync(config: Config, form: str, release: str, artifacts: Path, *, everything: bool = False) -> Sync:
    """Bring the mirrors of released repositories of one format to their current generations.

    Args:
        config: the configuration.
        form: `deb` or `rpm`.
        release: the release; if empty all, as the timer starts it: what was not gone through for a day is so then.
        artifacts: the directory that takes `sync.json`.
        everything: go through all that each mirror is to have, not only through what has changed.

    Returns:
        What was done.

    Raises:
        RequestError: there is no such release, or it is not described as it must be.
        InfrastructureError: the mirrors of a repository are not at its current generation; the others may be.
        Aborted: it was stopped; what is switched by then is so on all mirrors of a repository, or on none.
    """
    whole_after = timedelta(0) if everything else None if release else timedelta(days=1)
    chosen: list[tuple[Repository, Stop]] = []
    done: list[SyncedRepository] = []
    faults: list[str] = []

    def failed(release: str, codename: str, fault: str) -> None:
        about = {"release": release, "codename": codename, "generation": 0, "seconds": 0, "started": datetime.now(UTC)}
        done.append(SyncedRepository(**about, notice="", fault=fault, mirrors=()))
        faults.append(f"{release}/{codename}: {fault}" if codename else fault)

    for name in [release] if release else config.names("releases"):
        try:
            chosen += [(one, Stop()) for one in mirrored(config, name) if one.format == form]
        except PkgciError as error:
            if release:
                raise
            failed(name, "", f"release {name}: {error}")

    def one(repository: Repository, stop: Stop) -> None:
        try:
            rounds = sync(repository, whole_after, stop)
        except (PkgciError, OSError) as error:
            failed(repository.release, repository.codename, str(error))
        except Exception as error:
            log.exception("a bug in pkgci, at %s", repository.name)
            failed(repository.release, repository.codename, f"{type(error).__name__}: {error}")
        else:
            done.extend(rounds)
            # what a former one lacked the last one has brought
            faults.extend(f"{repository.name}: {last.fault}" for last in rounds[-1:] if last.fault)

    try:
        with ThreadPoolExecutor(max_workers=max(1, len(chosen))) as pool:
            try:
                for ended in [pool.submit(one, *each) for each in chosen]:
                    ended.result()
            except BaseException:
                # a signal reaches this thread only
                for _, stop in chosen:
                    stop.now()
                raise
    finally:
        made = Sync(repositories=tuple(sorted(done, key=lambda one: (one.release, one.codename, one.started))))
        made.write(artifacts / "sync.json")
    if faults:
        raise InfrastructureError("; ".join(sorted(faults)))
    return made


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
    """Show where each mirror is, as its readers see it. Exit code 3 when one is behind or has a fault, and is not aside."""
    late = False
    for one in standings(Config()):
        late |= one.late
        click.echo(spelled_out(one.line(datetime.now(UTC))))
    sys.exit(int(Exit.INFRASTRUCTURE if late else Exit.PASSED))
