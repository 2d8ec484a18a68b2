"""Where a change is on its way: what the builds, gate records, repositories and mirrors say of it, also after the merge."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import gerrit
import pytest
import trees
import yaml

from pkgci import where
from pkgci.artifacts import Record, Repository, RepositoryPackage, Sync, SyncedRepository
from pkgci.config import Config
from pkgci.engines.base import BuildInfo, BuildRef
from pkgci.errors import RequestError
from pkgci.gaterecord import GatedBuild, GatedChange, GateRecord
from pkgci.mirrors.standing import Standing
from pkgci.released.records import Commit, Generation, Origin, ReleasedBuild

NOW = datetime(2026, 1, 1, tzinfo=UTC)
TARGET = "bookworm-amd64"
BUILD, SYNC = f"build-{TARGET}", "mirror-sync-deb"


class Engine:
    """Builds of a test, by what they are given and leave."""

    def __init__(self) -> None:
        self.known: dict[BuildRef, BuildInfo] = {}
        self.left: dict[BuildRef, Record] = {}

    def add(self, job: str, state: str, left: Record | None = None, **parameters: str) -> None:
        ref = BuildRef(job, len(self.known) + 1)
        about = {"job": job, "number": ref.number, "state": state, "queued": NOW}
        self.known[ref] = BuildInfo(**about, parameters=parameters)
        if left:
            self.left[ref] = left

    def jobs(self) -> list[str]:
        return sorted({ref.job for ref in self.known})

    def builds(self, job: str) -> list[BuildRef]:
        return [ref for ref in self.known if ref.job == job]

    def record(self, ref: BuildRef) -> BuildInfo:
        return self.known[ref]

    def state(self, ref: BuildRef) -> str:
        return self.known[ref].state

    def artifacts(self, ref: BuildRef, destination: Path) -> None:
        if ref in self.left:
            name = "sync.json" if isinstance(self.left[ref], Sync) else "repository.json"
            self.left[ref].write(destination / "artifacts" / name)


class World:
    """A project whose branch has two changes, 4711 and then 4712, and a released repository."""

    def __init__(self, place: Path) -> None:
        work = place / "gerrit/tools/hello"
        self.old, self.commit, self.tip = (trees.commit(work, {"text": str(number)}) for number in range(3))
        self.tree = trees.git(work, "rev-parse", f"{self.commit}^{{tree}}")
        paths = {name: str(place / name) for name in ("data", "cache", "state")}
        released = {"gnupg_home": str(place), "key": "A" * 40}
        (place / "password").write_text(gerrit.PASSWORD)
        self.settings = {"paths": paths, "released": released, "gerrit": f"file://{place}/gerrit/"}
        self.place, self.engine = place, Engine()
        self.config = self.configured()
        self.root = self.config.data / "repositories/rocket/bookworm"

    def configured(self, **more: object) -> Config:
        etc = self.place / "etc"
        for name in ("targets", "releases"):
            (etc / name).mkdir(parents=True, exist_ok=True)
        (etc / "config.yaml").write_text(yaml.safe_dump({**self.settings, **more}))
        (etc / f"targets/{TARGET}.yaml").write_text(
            "format: deb\ncodename: bookworm\narchitecture: amd64\ntag: t\nupstream: {machine: true}\n"
        )
        (etc / "releases/rocket.yaml").write_text(f"branches: [main]\ntargets: [{TARGET}]\n")
        return Config(etc)

    def gated(self, key: str = "a") -> None:
        """Let a gate have tested 4711."""
        about = {"project": "tools/hello", "branch": "main"}
        change = GatedChange(**about, number="4711", patchset="2", tree=self.tree, count=2)
        build = GatedBuild(
            package="hello",
            branch="main",
            target=TARGET,
            key=key * 64,
            source_tree=self.tree,
            packaging_tree=self.tree,
            changes=(0,),
        )
        record = GateRecord(run="run", pipeline="gate", time=NOW, changes=(change,), builds=(build,))
        record.write(self.config.data / "gate/0.json")

    def generation(self, number: int, added: str = "", removed: str = "", kind: str = "publish") -> None:
        one, other = (
            tuple(ReleasedBuild(key=key * 64, source="hello", target=TARGET, version=key, packages=()) for key in keys)
            for keys in (added, removed)
        )
        about = {"number": number, "time": NOW, "stamp": number, "kind": kind, "by": "me"}
        Generation(**about, added=one, removed=other).write(self.root / f"log/{number}.json")
        (self.root / "current").unlink(missing_ok=True)
        (self.root / "current").symlink_to(f"generations/{number}")

    def post(self, state: str = "SUCCESS", **more) -> None:
        """Let a build after the merge of 4711 be there: it is given no change's number."""
        given = {"ZUUL_PROJECT": "tools/hello", "ZUUL_REFNAME": "refs/heads/main"}
        self.engine.add(BUILD, state, **{**given, "ZUUL_OLDREV": self.old, "ZUUL_NEWREV": self.commit, **more})

    def told(self, change: str = "4711,2") -> list[str]:
        return list(where.where(self.config, self.engine, change))

    def repository(self) -> str:
        (line,) = (line for line in self.told() if line.startswith("repository"))
        return line.partition(": ")[2]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def published(key: str, version: str) -> Repository:
    package = RepositoryPackage(
        name="hello", version=version, architecture="amd64", file="f", sha256="0", key=key * 64, source="hello"
    )
    about = {"url": "http://x/", "format": "deb", "codename": "bookworm", "target": TARGET, "signing_key": ""}
    return Repository(**about, packages=(package,))


def test_a_build_after_the_merge_is_found_by_the_commit_that_the_gate_record_leads_to(world: World):
    world.gated()
    world.post("queued")
    # of the change after it
    world.post(ZUUL_OLDREV=world.commit, ZUUL_NEWREV=world.tip)
    world.post(ZUUL_PROJECT="tools/other")
    builds = [line for line in world.told() if BUILD in line]
    assert builds == [f"2026-01-01 00:00:00  {BUILD}/1: queued: for an executor of the label of {BUILD}"]
    assert f"merged into main of tools/hello as {world.commit[:12]}" in world.told()
    # both in one push, and one that a person started
    world.post(ZUUL_NEWREV=world.tip)
    world.post(ZUUL_OLDREV="", ZUUL_NEWREV=world.commit)
    assert len([line for line in world.told("4711") if BUILD in line]) == 3


def test_a_build_after_the_merge_is_found_by_the_commit_that_gerrit_says(world: World):
    world.post()
    with gerrit.serving() as server:
        account = {"url": server.url, "user": gerrit.USER, "password_file": str(world.place / "password")}
        world.config = world.configured(review=account)
        known = {"project": "tools/hello", "branch": "main", "status": "MERGED", "current_revision": world.commit}
        server.merged = {"4711": known}
        assert len([line for line in world.told() if BUILD in line]) == 1
        with pytest.raises(RequestError, match="no build or gate record that is kept is about 4712"):
            world.told("4712")


def test_gate_records_are_enough_once_builds_are_discarded(world: World):
    world.gated()
    world.generation(1, "a")
    assert world.repository() == "hello since generation 1"


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([("a", ""), ("b", "a")], "hello since generation 1"),
        (
            [("c", ""), ("a", "c"), ("c", "a", "rollback")],
            "hello was there since generation 2; generation 3 took it back",
        ),
        ([("a", ""), ("b", "a"), ("a", "b", "rollback")], "hello since generation 1"),
        (
            [("c", ""), ("a", "c"), ("b", "a"), ("c", "b", "rollback")],
            "hello was there since generation 2; generation 4 took it back",
        ),
        ([("c", ""), ("a", "c"), ("c", "a", "rollback"), ("b", "c")], "hello since generation 4"),
        ([("c", ""), ("d", "c")], "hello is not released"),
    ],
)
def test_what_was_taken_back_is_not_there_and_what_came_after_it_is(world: World, history, expected, monkeypatch):
    monkeypatch.setattr(where.Repository, "origin", lambda *_: None)
    world.gated()
    for number, words in enumerate(history, start=1):
        world.generation(number, *words)
    assert world.repository() == expected


def test_what_was_built_again_after_the_merge_is_released(world: World, monkeypatch):
    world.gated("a")
    world.post(left=published("b", "1.0-2"))
    world.generation(1, "b")
    assert world.repository() == "hello 1.0-2 since generation 1"
    # the builds are discarded: its provenance says of what it was made
    world.engine.known.clear()
    for commit, expected in (
        (world.commit, "since generation 1"),
        (world.tip, "since generation 1"),
        (world.old, "is not released"),
    ):
        origin = Origin(branch="main", commits=(Commit(project="tools/hello", commit=commit, tree=world.tree),))
        monkeypatch.setattr(where.Repository, "origin", lambda *_, origin=origin: origin)
        assert world.repository() == f"hello {expected}"


def test_the_last_sync_of_each_repository_says_why_it_is_not_there(world: World, monkeypatch):
    def synced(release: str, fault: str) -> Sync:
        about = {"release": release, "codename": "bookworm", "generation": 1, "started": NOW, "seconds": 0}
        return Sync(repositories=(SyncedRepository(**about, notice="", fault=fault or "well", mirrors=()),))

    world.gated()
    world.generation(1, "c")
    world.generation(2, "a", "c")
    for release, fault in (("rocket", "an old reason"), ("rocket", "no room"), ("sled", "another")):
        world.engine.add(SYNC, "FAILURE", synced(release, fault))
    world.engine.add(SYNC, "running")

    def mirrors(generations: Mapping[str, int | None]) -> list[str]:
        known = [Standing("rocket/bookworm", name, generation=number) for name, number in generations.items()]
        monkeypatch.setattr(where, "standings", lambda _: known)
        return [line.rpartition("rocket/bookworm: ")[2] for line in world.told() if line.startswith("mirror")]

    all_of_them = {"europe": 2, "america": 1, "asia": None}
    assert mirrors(all_of_them) == ["there, at generation 2", "not there, at generation 1: no room", "unknown: no room"]
    world.generation(3, "c", "a", "rollback")
    monkeypatch.setattr(where.Repository, "origin", lambda *_: None)
    assert mirrors({"europe": 3, "america": 2}) == [
        "not there any more, at generation 3",
        "there still, at generation 2: no room",
    ]
