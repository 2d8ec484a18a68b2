"""What a sync of two mirrors costs beside rsync by itself: the whole tree in place, and to a new snapshot of hard links.

The mirrors are rsync daemons on loopback; peers go to both at once too. One package in many is new, or nothing is. Ours is
measured as the call that the job makes, with what it does more: every file verified, looked for over HTTP, the pointers
switched together; and as the whole job, which begins with the start of Python, as rsync begins with its own.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from math import inf
from pathlib import Path

import packages
import trees
import yaml
from bench_released import Bench, key, reprepro, reprepro_prepare
from servers import Rsyncd, nginx
from table import Row, timed
from trees import free_port

from pkgci.artifacts import Sync
from pkgci.config import Config
from pkgci.engines.local import LocalEngine
from pkgci.gaterecord import GatedBuild, GatedChange, GateRecord, write
from pkgci.mirrors.transaction import sync
from pkgci.released.records import Commit, Origin, Publication
from pkgci.released.repository import Repository, try_to_publish

# each package has some seven files: about 1,000 and 100,000
SIZES = tuple(int(size) for size in os.environ.get("PKGCI_BENCH_MIRRORED", "150 15000").split())
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
                bench.publish_next(number)
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
            if size == SIZES[-1]:
                yield from jobs(bench, max(3, runs), took[f"new {IN_PLACE}"], took[f"nothing {IN_PLACE}"])
    if len(SIZES) > 1:
        yield Row(f"sync one of {SIZES[-1]}", f"ours of {SIZES[0]}", new[SIZES[-1]], new[SIZES[0]], ratio=2)


def jobs(bench: "Mirrored", runs: int, rsync: list[float], rsync_of_nothing: list[float]) -> Iterator[Row]:
    """Measure whole jobs: of one new package, of nothing, and the way from a merge to both mirrors."""
    engine = LocalEngine(bench.config)
    environment = {**os.environ, "PKGCI_CONFIG": str(bench.config.directory), "WORKSPACE": str(bench.scratch)}
    words = [Path(sys.executable).with_name("pkgci"), "mirror-sync", "deb"]

    def job() -> None:
        given = {**environment, "RELEASE": "many"}
        subprocess.run(words, check=True, cwd=bench.scratch, env=given, stdout=subprocess.DEVNULL)

    def start() -> None:
        subprocess.run([sys.executable, "-c", "import pkgci.cli"], check=True, env=environment)

    job()
    fixed = [timed(job) for _ in range(runs)]
    yield Row("sync job, nothing to do", "python with our command line", fixed, [timed(start) for _ in fixed], inf, 0.3)
    yield Row("sync job, nothing to do", IN_PLACE, fixed, rsync_of_nothing, inf)
    new = []
    for number in range(runs):
        bench.publish_next(runs + number)
        new.append(timed(job))
    yield Row("sync job, one new package", IN_PLACE, new, rsync, inf)
    place = bench.scratch / "reprepro"
    place.mkdir()
    reprepro_prepare(bench, place)
    # the first build of a job renders all of them
    bench.merge(engine, 0)
    ours = [bench.merge(engine, number) for number in range(1, runs + 1)]
    bare = []
    for number in range(runs):
        path = Bench.next(bench, place, 1000 + number)
        bare.append(timed(lambda path=path: reprepro(bench, place, path)))
    theirs = [one + other for one, other in zip(bare, rsync, strict=False)]
    size = len(list(bench.pool.glob("*.deb")))
    yield Row(f"merge of one of {size} to both mirrors", "reprepro includedeb, rsync in place", ours, theirs, inf, 3)


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
        (self.config.directory / "packages").mkdir()
        settings = self.config.directory / "config.yaml"
        known = yaml.safe_load(settings.read_text())
        known["paths"]["state"] = str(scratch / "state")
        settings.write_text(yaml.safe_dump({**known, "gerrit": f"file://{scratch}/gerrit/", "serve": False}))
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

    def publish_next(self, number: int) -> None:
        """Publish one more version of a package."""
        with tempfile.TemporaryDirectory() as scratch:
            self.publish([self.build(Path(scratch), number * 31, "2")])

    @property
    def ways(self) -> dict[str, Callable[[], object]]:
        """Ours and the peers' ways to bring the mirrors up to date, by name."""
        return {"ours": self.sync, IN_PLACE: self.in_place, SNAPSHOT: self.snapshot}

    def sync(self) -> None:
        """Sync as the job does."""
        (done,) = sync(self.repository)
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

    def merge(self, engine: LocalEngine, number: int) -> float:
        """Merge a change that a gate has tested; return the seconds from the job's start until both mirrors have it."""
        (self.config.directory / f"packages/p{number}.yaml").write_text(f"source: tools/p{number}\n")
        work, gerrit = self.scratch / f"work-{number}", self.scratch / f"gerrit/tools/p{number}"
        commit = trees.commit(work, trees.deb(f"p{number}"))
        trees.git(work, "clone", "-q", "--bare", work, gerrit)
        tree = trees.git(work, "rev-parse", "HEAD^{tree}")
        with tempfile.TemporaryDirectory() as scratch:
            path = packages.deb(Path(scratch), f"p{number}", "1")
            entry = packages.deliver_debs(self.config, Path(scratch), f"p{number}", "1", [path], tree=tree)
        origin = Origin(branch="main", commits=(Commit(project=f"tools/p{number}", commit=commit, tree=tree),))
        try_to_publish(self.config, "many", self.codename, [Publication(entry.record.key, origin)])
        target = f"{self.codename}-amd64"
        gated = GatedChange(project=f"tools/p{number}", branch="main", number="1", patchset="1", tree=tree, count=1)
        about = {"package": f"p{number}", "branch": "main", "target": target, "key": entry.record.key}
        made = GatedBuild(**about, source_tree=tree, packaging_tree=tree, changes=(0,))
        record = GateRecord(
            run=f"run-{number}", pipeline="gate", time=datetime.now(UTC), changes=(gated,), builds=(made,)
        )
        write(self.config, record)
        given = {"ZUUL_PROJECT": f"tools/p{number}", "ZUUL_REFNAME": "main", "ZUUL_NEWREV": commit}
        current = self.repository.current()
        wanted = f"generations/{current.number + 1 if current else 1}"
        start = time.time()
        built = engine.start(f"build-{target}", {**given, "ZUUL_PIPELINE": "post"})
        links = [daemon.tree / "ours" / self.codename / "current" for daemon in self.daemons]
        while any(os.readlink(link) != wanted for link in links):
            assert engine.state(built) not in ("FAILURE", "ABORTED"), b"".join(engine.log(built)).decode()
            time.sleep(0.01)
        took = time.time() - start
        engine.wait(built)
        self._show(engine, start, took)
        return took

    def _show(self, engine: LocalEngine, start: float, took: float) -> None:
        """Print where the time went, and leave it as a timeline for chrome://tracing or Perfetto."""
        jobs = (f"build-{self.codename}-amd64", f"publish-{self.codename}-amd64", "mirror-sync-deb")
        refs = [engine.builds(job)[-1] for job in jobs]
        synced = refs[-1]
        engine.wait(synced)
        spans = []
        for ref in refs:
            info = engine.record(ref)
            assert info.started
            assert info.ended
            begun = info.started.timestamp()
            spans.append((ref.job, "waits for its executor", info.queued.timestamp(), begun - info.queued.timestamp()))
            spans.append((ref.job, "runs", begun, info.ended.timestamp() - begun))
        place = self.scratch / f"archive-{synced.number}"
        engine.artifacts(synced, place)
        (done,) = Sync.read(place / "artifacts/sync.json").repositories
        for one in done.mirrors:
            spans += [
                (one.name, phase.name, done.started.timestamp() + phase.start, phase.seconds) for phase in one.phases
            ]
        for track, name, at, seconds in spans:
            print(f"  {at - start:6.2f} {seconds:6.2f} s  {seconds / took:4.0%}  {track}: {name}")
        events = [
            {"name": name, "ph": "X", "ts": at * 1e6, "dur": seconds * 1e6, "pid": 1, "tid": track}
            for track, name, at, seconds in spans
        ]
        timeline = Path(tempfile.gettempdir(), "pkgci-merge-to-mirrors.json")
        timeline.write_text(json.dumps(events))
        print(f"  {took:6.2f} s in all; as a timeline: {timeline}", flush=True)
