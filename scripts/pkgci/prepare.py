"""Makes ahead, once per machine, what the jobs of some targets need: roots and machine snapshots."""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from pkgci.change import STEPS
from pkgci.config import Config
from pkgci.roots import build_root, lint_root
from pkgci.vm import guest


def prepare(config: Config, targets: Sequence[str], steps: Collection[str] = STEPS) -> None:
    """Make what is missing for some steps, two at a time; nothing is done for what is there and young enough.

    Raises:
        PkgciError: one of them cannot be made; the others are finished.
    """
    work: list[Callable[[], object]] = [lambda name=name: build_root(config, name) for name in targets]
    if not {"install", "systest"}.isdisjoint(steps):
        work += [lambda name=name: guest.plain(config, name) for name in targets]
    if not {"lint", "systest"}.isdisjoint(steps):
        work += [lambda name=name: lint_root(config, name) for name in targets]
    with ThreadPoolExecutor(max_workers=2) as pool:
        for done in [pool.submit(one) for one in work]:
            done.result()
