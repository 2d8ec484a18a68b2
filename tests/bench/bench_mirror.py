"""What a sync of two mirrors costs beside rsync by itself: the whole tree in place, and to a new snapshot of hard links.

The mirrors are rsync daemons on loopback; peers go to both at once too. One package in many is new, or nothing is. Ours is
measured as the call that the job makes, with what it does more: every file verified, looked for over HTTP, the pointers
switched together.
"""

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from math import inf
from pathlib import Path

import yaml
from bench_released import Bench, key
from servers import Rsyncd, nginx
from table import Row, timed
from trees import free_port

from pkgci.config import Config
from pkgci.mirrors.transaction import sync
from pkgci.released.repository import Repository

# each package has some ten files in the pool
SIZES = tuple(int(size) for size in os.environ.get("PKGCI_BENCH_MIRRORED", "100 10000").split())
IN_PLACE, SNAPSHOT = "rsync -a --delete in place", "rsync -a --link-dest to a snapshot"


def rows(runs: int) -> Iterator[Row]:
    """Measure at each size, and how ours grows."""
    new: dict[int, list[float]] = {}
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="pkgci-b-") as scratch, ExitStack() as stack:
            home, fingerprint = stack.enter_context(key(Path(scratch)))
            bench = Mirrored(Path(scratch), size, home, fingerprint, stack)
            took: dict[str, list[float]] = {}
            for number in range(max(3, runs)):
                bench.next(number)
                for what in ("new", "nothing"):
                    for name, do in bench.ways.items():
                        took.setdefault(f"{what} {name}", []).append(timed(do))
            new[size] = took["new ours"]
            for peer in (SNAPSHOT, IN_PLACE):
                large = size >= 10_000
                what = f"sync one of {size} ({bench.files} files)"
                yield Row(what, peer, took["new ours"], took[f"new {peer}"], 1 / 5 if large else inf)
                what = f"sync none of {size}"
                yield Row(what, peer, took["nothing ours"], took[f"nothing {peer}"], 1 / 10 if large else inf)
    if len(SIZES) > 1:
        yield Row(f"sync one of {SIZES[-1]}", f"ours of {SIZES[0]}", new[SIZES[-1]], new[SIZES[0]], ratio=2)


class Mirrored(Bench):
    """A released repository of `size` packages on two mirrors, three times: ours, and both peers'."""

    def __init__(self, scratch: Path, size: int, home: Path, fingerprint: str, stack: ExitStack) -> None:
        super().__init__(scratch, "deb", size, home, fingerprint)
        port = free_port()
        served = f"server {{ listen 127.0.0.1:{port}; root {scratch}/mirrors; }}"
        stack.enter_context(nginx(scratch / "nginx", port, served))
        self.daemons = [Rsyncd(scratch / name, scratch / "mirrors" / name) for name in ("europe", "america")]
        for daemon in self.daemons:
            stack.callback(daemon.end)
            for place in ("ours", "place", "snapshots"):
                (daemon.tree / place).mkdir()
        mirrors = {
            one.tree.name: {"url": f"http://127.0.0.1:{port}/{one.tree.name}/ours/", "rsync": f"{one.url}ours/"}
            for one in self.daemons
        }
        path = self.config.directory / "releases/many.yaml"
        path.write_text(path.read_text() + yaml.safe_dump({"mirrors": mirrors}))
        self.config = Config(self.config.directory)
        self.repository = Repository(self.config, "many", self.codename)
        self.files = sum(len(files) for _, _, files in os.walk(self.repository.root))
        self.made = 0
        for do in self.ways.values():
            do()

    def next(self, number: int) -> None:
        """Publish one more version of a package."""
        with tempfile.TemporaryDirectory() as scratch:
            self.publish([self.build(Path(scratch), number * 31, "2")])

    @property
    def ways(self) -> dict[str, Callable[[], object]]:
        """Ours and the peers' ways to bring the mirrors up to date, by name."""
        return {"ours": self.sync, IN_PLACE: self.in_place, SNAPSHOT: self.snapshot}

    def sync(self) -> None:
        """Sync as the job does."""
        done = sync(self.repository)
        assert not done.fault, done.fault

    def in_place(self) -> None:
        """Bring both mirrors up to date in place."""
        self._both("--delete", to="place/")

    def snapshot(self) -> None:
        """Make a snapshot on both mirrors with links to the one before."""
        self.made += 1
        self._both(f"--link-dest=../{self.made - 1}", to=f"snapshots/{self.made}/")

    def _both(self, *words: str, to: str) -> None:
        with ThreadPoolExecutor(max_workers=2) as pool:
            argvs = [["rsync", "-a", *words, f"{self.repository.root}/", f"{one.url}{to}"] for one in self.daemons]
            list(pool.map(lambda argv: subprocess.run(argv, check=True), argvs))
