"""The machines of system tests as the tests left them, disks and memory, for `pkgci debug`: see `kept.py`.

A run has a directory for each set of machines that it restored, `machines` for its environment's and one for each source
package's own tests; see `vm.snapshot.keep`.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from pkgci.config import Config
from pkgci.disk import freed, links
from pkgci.errors import InfrastructureError, RequestError
from pkgci.kept import Kept, KeptBuild
from pkgci.locks import locked
from pkgci.vm import guest
from pkgci.vm.machine import Machine
from pkgci.vm.proxy import Proxy
from pkgci.vm.snapshot import BASE, DISK_MIB, Manifest, Snapshot, discard, unneeded

log = logging.getLogger(__name__)

MACHINES = "machines"


class KeptRun(KeptBuild):
    """A system test whose machines are kept; `sets` are their snapshots, NAME/ID, by the name of each set."""

    environment: str
    passed: bool
    sets: dict[str, str]


def runs(config: Config) -> Kept[KeptRun]:
    """Return the runs that are kept on this host."""
    return Kept(config.data / "runs", KeptRun, config.settings.run_days)


def check_space(config: Config, manifest: Manifest) -> None:
    """Check that a run's machines can be kept where runs are.

    Raises:
        InfrastructureError: they may not fit; nothing younger than its days is removed for them.
    """
    place = runs(config).place
    place.mkdir(parents=True, exist_ok=True)
    needed = sum(node.memory_mib + DISK_MIB for node in manifest.nodes)
    free = shutil.disk_usage(place).free >> 20
    if free < needed:
        raise InfrastructureError(
            f"no space for the machines of this run: {free} MiB free for {place}, {needed} MiB needed; "
            "see `pkgci snapshot-clean` for what can go, or lower run_days in config.yaml"
        )


@contextmanager
def restored(config: Config, directory: Path, run: KeptRun, name: str, at_start: bool) -> Iterator[dict[str, Machine]]:
    """Restore a set of machines of a run that is kept, on copies: what is kept does not change.

    Args:
        config: the configuration.
        directory: the run's.
        run: what is known of it.
        name: the set's name.
        at_start: as they were before the packages were installed.

    Raises:
        RequestError: the run has no such set.
        InfrastructureError: it cannot be restored.
    """
    if name not in run.sets:
        raise RequestError(f"{run} has no machines {name!r}; it has: {', '.join(run.sets)}")
    with locked(directory, shared=True) as held:
        if not held:
            raise RequestError(f"what was kept of {run} has just been removed; it was too old")
        made = Snapshot(directory / name / BASE)
        nodes = [node.name for node in made.running(as_kept=not at_start)]
        for ended in {node.name for node in made.manifest.nodes} - set(nodes):
            log.warning("%s had ended when it was kept; its disk is %s", ended, directory / name / f"{ended}.qcow2")
        with made.restored(config, Proxy((), config.cache / "proxy"), as_kept=not at_start) as machines:
            yield dict(zip(nodes, machines, strict=True))


def clean(config: Config, remove: bool, now: datetime) -> str:
    """Remove runs that are too old, prepared snapshots that nothing refers to, and what killed preparations left.

    What is in use stays.

    Args:
        config: says how many days runs are kept, and what environments and targets there are.
        remove: really remove; else only say what would be.
        now: the time that ages are counted from.

    Returns:
        What was or would be freed, in a few words.

    Raises:
        RequestError: an environment cannot be read: then what refers to snapshots is unknown, and all stays.
    """
    kept, names = runs(config), guest.names(config)
    before = (now - timedelta(days=config.settings.root_days)).timestamp()
    found = kept.surplus(now), unneeded(config, names, before)
    gone, snapshots = ([path for path in paths if _unused(path)] for paths in found)
    sizes = {path: links(path) for path in (*gone, *snapshots)}
    if remove:
        gone = [path for path in kept.prune(now) if path in sizes]
        snapshots = [path for path in snapshots if discard(path, names, before)]
    did = "removed" if remove else "would remove"
    for path in (*gone, *snapshots):
        log.info("%s %s: %.0f MiB", did, path, freed([sizes[path]]) / (1 << 20))
    # together: the files that a run has in common with its snapshot count once both go
    total = freed(sizes[path] for path in (*gone, *snapshots)) / (1 << 20)
    hint = "" if remove or not sizes else "; nothing is removed without --yes, or REMOVE=true"
    return f"{did} {len(gone)} runs and {len(snapshots)} snapshots: {total:.0f} MiB{hint}"


def _unused(directory: Path) -> bool:
    with locked(directory, wait=False) as unused:
        return unused
