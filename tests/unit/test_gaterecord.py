"""Gate records: written whole, found by their trees, and valid by what Git says is merged."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import packages
import pytest
import trees
from pydantic import ValidationError

from pkgci import gaterecord
from pkgci.clean import clean
from pkgci.config import Config
from pkgci.errors import RequestError
from pkgci.gaterecord import GatedBuild, GatedChange, GateRecord
from pkgci.store import Entry

TARGET = "bookworm-amd64"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return trees.config(
        tmp_path,
        gerrit=f"file://{tmp_path}/gerrit/",
        paths={"data": str(tmp_path / "data"), "cache": str(tmp_path / "cache")},
    )


def built(config: Config, place: Path, name: str, tree: str, **more: str) -> Entry:
    place.mkdir(exist_ok=True)
    deb = packages.deb(place, name, "1")
    return packages.deliver_debs(config, place, name, "1", [deb], tree=tree, **more)


def change(project: Path, number: str) -> GatedChange:
    """The state of a project's work tree, as a change of a run."""
    return GatedChange(
        project=project.name,
        branch="main",
        number=number,
        patchset="1",
        tree=trees.git(project, "rev-parse", "HEAD^{tree}"),
        count=int(trees.git(project, "rev-list", "--count", "--no-merges", "HEAD")),
    )


def build(entry: Entry, *positions: int) -> GatedBuild:
    source, packaging = entry.record.trees
    return GatedBuild(
        package=entry.record.package,
        branch="main",
        target=TARGET,
        source_tree=source,
        packaging_tree=packaging,
        key=entry.record.key,
        changes=positions,
    )


def record(changes: list[GatedChange], *builds: GatedBuild, minute: int = 0) -> GateRecord:
    time = datetime(2026, 1, 1, 0, minute, tzinfo=UTC)
    return GateRecord(run="r-1", pipeline="gate", time=time, changes=tuple(changes), builds=builds)


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two projects, each with a change on a branch of its own that is not merged."""
    projects = [tmp_path / "gerrit" / name for name in ("lib", "app")]
    for project in projects:
        trees.commit(project, {"text": f"{project.name} 1"})
        trees.git(project, "checkout", "-q", "-b", "change")
        trees.commit(project, {"text": f"{project.name} 2"})
    return projects


def merge(project: Path) -> None:
    trees.git(project, "branch", "-f", "main", "change")


def test_a_record_is_found_by_the_trees_of_its_builds_newest_first(config, tmp_path):
    entry, other = built(config, tmp_path / "a", "lib", "1" * 40), built(config, tmp_path / "b", "app", "2" * 40)
    of = GatedChange(project="lib", branch="main", number="7", patchset="1", tree="1" * 40, count=3)
    older, newer = (record([of], build(entry, 0), build(other, 0), minute=minute) for minute in (1, 2))
    for one in (newer, older, older):
        gaterecord.write(config, one)
    found = gaterecord.find(config, "lib", "main", TARGET, "1" * 40)
    assert [gated.record for gated in found] == [newer, older]
    assert {gated.build.key for gated in found} == {entry.record.key}
    assert gaterecord.find(config, "app", "main", TARGET, "2" * 40)[0].record == newer
    for wanted in (("lib", "other", TARGET, "1" * 40), ("lib", "main", TARGET, "2" * 40)):
        assert gaterecord.find(config, *wanted) == []
    assert gaterecord.referenced(config, 0) == {entry.record.key, other.record.key}
    assert [path.name for path in config.data.rglob(".*.new")] == []


def test_a_build_counts_once_all_changes_up_to_its_last_one_are_merged(config, tmp_path, two):
    lib, app = two
    changes = [change(lib, "1"), change(app, "2")]
    first, second = (
        build(built(config, tmp_path / one.name, one.name, of.tree), position)
        for position, (one, of) in enumerate(zip(two, changes, strict=True))
    )
    made = record(changes, first, second)
    merge(app)
    (left,) = gaterecord.unmerged(config, [made])
    assert left == {0}
    assert [one.name for one in gaterecord.Gated(made, second).lacks(left)] == ["1,1"]
    merge(lib)
    assert gaterecord.unmerged(config, [made])[0] == frozenset()
    # and one that is ahead does not wait for one that is behind
    assert gaterecord.Gated(made, first).lacks({1}) == []


def test_a_chain_that_is_submitted_at_once_is_merged_though_only_its_last_state_shows(config, tmp_path, two):
    lib, _ = two
    first = change(lib, "1").model_copy(update={"tree": "a" * 40})
    made = record([first, change(lib, "2")], build(built(config, tmp_path / "x", "lib", change(lib, "2").tree), 0, 1))
    assert gaterecord.unmerged(config, [made])[0] == {0, 1}
    merge(lib)
    assert gaterecord.unmerged(config, [made])[0] == frozenset()


def test_what_the_store_does_not_have_as_the_record_says_is_refused(config, tmp_path):
    of = GatedChange(project="lib", branch="main", tree="1" * 40, count=1)
    entry = built(config, tmp_path / "a", "lib", "1" * 40)
    absent = build(entry, 0).model_copy(update={"key": "0" * 64})
    with pytest.raises(RequestError, match="000000000000 is not in the store"):
        gaterecord.write(config, record([of], absent))
    wrong = build(entry, 0).model_copy(update={"source_tree": "3" * 40})
    with pytest.raises(RequestError, match="which the record does not say"):
        gaterecord.write(config, record([of], wrong))
    check = built(config, tmp_path / "b", "lib", "1" * 40, namespace="check")
    with pytest.raises(RequestError, match="was built by a check, of a change that was not approved"):
        gaterecord.write(config, record([of], build(check, 0)))
    assert not (config.data / "gate").exists()


def test_what_a_record_names_stays_until_the_record_goes_by_its_age(config, tmp_path):
    entry = built(config, tmp_path / "a", "lib", "1" * 40)
    of = GatedChange(project="lib", branch="main", tree="1" * 40, count=1)
    path = gaterecord.write(config, record([of], build(entry, 0)))
    late = datetime.now(UTC) + timedelta(days=config.settings.store_days + 1)
    old = datetime.now(UTC).timestamp() - 10 * 86400
    os.utime(entry.directory, (old, old))
    before = late - timedelta(days=2)
    assert clean(config, remove=True, now=before).builds == ()
    assert clean(config, remove=True, now=late).builds == (entry.record.key,)
    assert not path.exists()


def test_a_build_of_a_change_that_the_run_does_not_have_is_no_record(config, tmp_path):
    of = GatedChange(project="lib", branch="main", tree="1" * 40, count=1)
    with pytest.raises(ValidationError, match="a change that the run does not have"):
        record([of], build(built(config, tmp_path / "a", "lib", "1" * 40), 1))
