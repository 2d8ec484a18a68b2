"""Makes ahead, once per machine, what the jobs of some targets need: roots and machine snapshots."""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from pkgci import systest
from pkgci.change import STEPS
from pkgci.config import Config
from pkgci.roots import build_root, tools_root
from pkgci.vm import guest


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
