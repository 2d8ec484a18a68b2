"""Makes ahead, once per machine, what the jobs of some targets need: roots and machine snapshots.

A test that finds the machines of an environment frozen by another QEMU ends, and their preparation begins by itself.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from pkgci import nodes, systest
from pkgci.change import STEPS
from pkgci.config import Config
from pkgci.errors import PkgciError
from pkgci.roots import build_root, tools_root
from pkgci.step import StepContext
from pkgci.vm import guest

log = logging.getLogger(__name__)


def prepare(config: Config, targets: Sequence[str], steps: Collection[str] = STEPS) -> None:
    """Make what is missing for some steps, two at a time; nothing is done for what is there and young enough.

    Raises:
        PkgciError: one of them cannot be made; the others are finished.
    """
    work: list[Callable[[], object]] = [lambda name=name: build_root(config, name) for name in targets]
    if not {"install", "systest"}.isdisjoint(steps):
        work += [lambda name=name: _machines(config, name) for name in targets]
    if not {"lint", "systest"}.isdisjoint(steps):
        work += [lambda name=name: tools_root(config, name) for name in targets]
    with ThreadPoolExecutor(max_workers=2) as pool:
        for done in [pool.submit(one) for one in work]:
            done.result()


def _machines(config: Config, target: str) -> None:
    guest.plain(config, target)
    systest.prepare(config, target)


@contextmanager
def begun_where_outdated(context: StepContext) -> Iterator[None]:
    """Start the preparation of an environment on this node when what is done meanwhile finds that QEMU was updated.

    Nobody waits for it. Where the job's account may not start one, the preparation's own timer does.
    """
    try:
        yield
    except guest.OutdatedError as error:
        job = f"snapshot-prepare-{error.environment}"
        try:
            if not any(context.engine.record(ref).alive for ref in context.engine.builds(job)[-5:]):
                context.launch(job, {"NODE": nodes.here()})
        except PkgciError as failure:
            log.warning("%s cannot be started: %s", job, failure)
        raise
