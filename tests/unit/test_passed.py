"""What passed is remembered: when a test is not repeated, when it is, and what it then leaves."""

import os
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pkgci import passed
from pkgci.artifacts import Install, InstallOutcome
from pkgci.change import Parameters
from pkgci.config import Config
from pkgci.errors import InfrastructureError, PackageError

INPUT = ["packages", {"machine": 1}]


class Bench:
    """A test that counts its runs; `fails` makes it fail, `made_from` is its input."""

    def __init__(self, place: Path) -> None:
        (place / "etc").mkdir()
        (place / "etc" / "config.yaml").write_text(f"root_days: 2\npaths: {{state: {place / 'state'}}}\n")
        self.config = Config(place / "etc")
        self.place, self.runs, self.fails, self.made_from = place, 0, False, INPUT
        self.artifacts = place

    @property
    def kept(self) -> list[Path]:
        return sorted((self.config.state / "passed").glob("*"))

    def run(self, **options) -> Install:
        """Run it as a job does, in a directory of its own."""
        self.artifacts = self.place / f"run-{len(list(self.place.glob('run-*')))}" / "artifacts"
        self.artifacts.mkdir(parents=True)
        options = {"repeat": False, "repositories": (f"http://{self.artifacts.parent.name}/",), **options}
        return passed.once(self.config, self.artifacts / "install.json", Install, self._decisive, self._test, **options)

    def _decisive(self) -> object:
        if self.made_from is None:
            raise InfrastructureError("the upstream cannot be read")
        return self.made_from

    def _test(self) -> Install:
        self.runs += 1
        for name in ("junit", "logs"):
            (self.artifacts / name).mkdir()
        (self.artifacts / "logs" / "small.log").write_text(f"run {self.runs}\n")
        suite = ET.Element("testsuite", name="install", tests="1")
        ET.SubElement(suite, "testcase", name="small")
        ET.ElementTree(suite).write(self.artifacts / "junit" / "install.xml")
        outcome = InstallOutcome(package="small", version="1", passed=not self.fails, seconds=3, findings=())
        record = Install(target="t", snapshot="s", repositories=("http://former/",), packages=(outcome,))
        record.write(self.artifacts / "install.json")
        if self.fails:
            raise PackageError("it fails")
        return record


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_what_passed_is_not_repeated_and_leaves_the_same_records(bench):
    first, second = bench.run(), bench.run()
    assert bench.runs == 1
    assert (first.passed_before, first.note) == (None, "")
    assert second == Install.read(bench.artifacts / "install.json")
    assert second.packages == first.packages
    assert second.repositories == ("http://run-1/",)
    assert abs(second.passed_before.timestamp() - time.time()) < 60
    assert second.note.endswith(" UTC with the same packages, machine, tools and repositories; not repeated")
    assert (bench.artifacts / "logs" / "small.log").read_text() == "run 1\n"
    suite = ET.parse(bench.artifacts / "junit" / "install.xml").getroot()
    assert (suite.find("testcase").get("name"), suite.findtext("system-out")) == ("small", second.note)
    assert sorted(path.name for path in bench.artifacts.iterdir()) == ["install.json", "junit", "logs"]


@pytest.mark.parametrize("other", [["packages", {"machine": 2}], ["other packages", {"machine": 1}], []])
def test_another_input_is_tested(bench, other):
    bench.run()
    bench.made_from = other
    assert bench.run().passed_before is None
    assert bench.runs == 2


def test_another_version_of_this_program_tests(bench, monkeypatch):
    bench.run()
    monkeypatch.setattr(passed, "_code", lambda: ["another"])
    bench.run()
    assert bench.runs == 2


def test_what_fails_is_never_remembered(bench):
    bench.fails = True
    for _ in range(2):
        with pytest.raises(PackageError):
            bench.run()
    assert bench.runs == 2
    assert bench.kept == []


def test_what_passed_once_and_fails_when_asked_for_again_is_forgotten(bench):
    bench.run()
    bench.fails = True
    for options in ({"repeat": True}, {}):
        with pytest.raises(PackageError):
            bench.run(**options)
    assert bench.runs == 3


def test_what_is_asked_for_again_runs_and_is_remembered_then(bench):
    for _ in range(2):
        bench.run(repeat=True)
    assert bench.run().passed_before is not None
    assert (bench.artifacts / "logs" / "small.log").read_text() == "run 2\n"


@pytest.mark.parametrize("days", [3, -3])
def test_a_pass_counts_as_long_as_roots_and_snapshots_do(bench, days):
    bench.run()
    (path,) = bench.kept
    _age(bench, days)
    bench.run()
    assert bench.runs == 2
    assert bench.kept == [path]


def _age(bench: Bench, days: int) -> None:
    """Remember a pass once more as one of some days ago."""
    then = time.time() - days * 86400
    os.utime(bench.artifacts / "install.json", (then, then))
    made = bench.kept[0]
    passed._remember(made, bench.artifacts, passed.timedelta(days=2))


def test_passes_that_are_too_old_and_what_a_kill_left_go(bench):
    bench.run()
    then = time.time() - 3 * 86400
    leftover = bench.config.state / "passed" / "0.new"
    leftover.write_text("half")
    for path in bench.kept:
        os.utime(path, (then, then))
    bench.made_from = ["other"]
    bench.run()
    assert len(bench.kept) == 1


@pytest.mark.parametrize("size", [0, 100])
def test_a_damaged_one_is_not_used_and_replaced(bench, size):
    bench.run()
    (path,) = bench.kept
    path.write_bytes(path.read_bytes()[:size])
    assert bench.run().passed_before is None
    assert bench.run().passed_before is not None
    assert bench.runs == 2


def test_what_decides_cannot_be_read_so_it_runs(bench):
    bench.made_from = None
    for _ in range(2):
        bench.run()
    assert bench.runs == 2


def test_a_pass_that_cannot_be_remembered_is_one(bench):
    bench.config.state.mkdir()
    (bench.config.state / "passed").write_text("in the way")
    assert bench.run().packages[0].passed


@pytest.mark.parametrize(
    ("given", "repeat"),
    [
        ({}, True),
        ({"AGAIN": "false"}, True),
        ({"PARENT": "build-t/1"}, False),
        ({"PARENT": "build-t/1", "AGAIN": "false"}, False),
        ({"PARENT": "build-t/1", "AGAIN": "true"}, True),
    ],
)
def test_what_a_person_starts_or_asks_for_again_is_repeated(given, repeat):
    assert Parameters.read(given).repeat is repeat
