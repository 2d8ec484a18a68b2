"""Queues of changes: built in their order against each other, published dry, recorded; by real jobs on tiny real packages.

The system test of a queue is a real one in one test; elsewhere a job of its name only says what it would have tested.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import packages
import pytest
import trees
from released import ORIGIN

from pkgci import gaterecord, step
from pkgci.artifacts import ARTIFACTS, Build, Gate, Package, Result, Systest
from pkgci.build import build
from pkgci.change import Parameters
from pkgci.config import ROOT, Config
from pkgci.engines.base import BuildRef
from pkgci.engines.local import LocalEngine
from pkgci.errors import InfrastructureError, PackageError, RequestError
from pkgci.gate import gate
from pkgci.order import order
from pkgci.released.records import Commit, Origin, Publication
from pkgci.released.repository import Repository, publish
from pkgci.store import Store
from pkgci.verify import verify

DEB, RPM = "bookworm-amd64", "debianrpm-amd64"
# what a system test leaves that had all packages of its repositories under test
SYSTEST = """
import json, os, sys
sys.path[:0] = {path!r}
from pkgci import repository
from pkgci.artifacts import Package, Systest
from pkgci.config import Config
from pkgci.server import serve
config, urls = Config(), os.environ["REPOSITORIES"].split()
with serve(config):
    records = repository.read(config, sys.argv[1], urls)
packages = [Package(**one.model_dump(include=set(Package.model_fields))) for one in repository.under_test(records, "")]
Systest(target=sys.argv[1], environment="default", snapshot="none", repositories=tuple(urls), parameters={{}},
        packages=tuple(packages), outcomes=()).write(__import__("pathlib").Path("artifacts/systest.json"))
"""


class Gerrit:
    """Projects with a branch `main` each, and changes that are not merged."""

    def __init__(self, place: Path) -> None:
        self.place = place / "gerrit"
        self.url = f"file://{self.place}/"
        self.queue: list[str] = []

    def project(self, name: str, files: Mapping[str, str]) -> None:
        trees.commit(self.place / name, files, f"Begin {name}")

    def change(self, name: str, files: Mapping[str, str]) -> None:
        """Push a change, and put it at the end of the queue."""
        tree = self.place / name
        number = len(self.queue) + 1
        commit = trees.commit(tree, files, f"Change {number}")
        ref = f"refs/changes/{number:02}/{number}/1"
        trees.git(tree, "update-ref", ref, commit)
        trees.git(tree, "reset", "-q", "--hard", "HEAD~")
        self.queue.append(f"{name}:main:{ref}")

    def merge(self) -> dict[str, str]:
        """Merge all changes; return Zuul's parameters after the merge of the last one."""
        for item in self.queue:
            project, _, ref = item.split(":")
            old = trees.git(self.place / project, "rev-parse", "main")
            trees.git(self.place / project, "merge", "-q", "--ff-only", ref)
        new = trees.git(self.place / project, "rev-parse", "main")
        moved = {"ZUUL_REFNAME": "main", "ZUUL_OLDREV": old, "ZUUL_NEWREV": new}
        return {"ZUUL_PROJECT": project, "ZUUL_PIPELINE": "post", "ZUUL_UUID": "89ab", **moved}

    def parameters(self, pipeline: str = "gate", **more: str) -> dict[str, str]:
        """Return Zuul's parameters for the last change."""
        project, _, ref = self.queue[-1].split(":")
        number, patchset = ref.split("/")[-2:]
        about = {"ZUUL_PROJECT": project, "ZUUL_BRANCH": "main", "ZUUL_CHANGE": number, "ZUUL_PATCHSET": patchset}
        about |= {"ZUUL_CHANGES": "^".join(self.queue), "ZUUL_PIPELINE": pipeline, "ZUUL_UUID": "0123abcd"}
        return {**about, **more}


@pytest.fixture
def gerrit(tmp_path: Path) -> Gerrit:
    return Gerrit(tmp_path)


@pytest.fixture
def config(tmp_path: Path, gerrit: Gerrit, gnupg: tuple[str, str]) -> Config:
    names = ("libsmall", "app", "slow")
    released = {"gnupg_home": gnupg[0], "key": gnupg[1]}
    return trees.config(tmp_path, {name: {"source": name} for name in names}, gerrit=gerrit.url, released=released)


@pytest.fixture
def run(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a step of a target in a directory of its own, by the product's jobs but for `systest`; return its result."""
    (tmp_path / "systest.py").write_text(SYSTEST.format(path=sys.path))
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    template = tmp_path / "jobs" / "templates" / "systest.yaml"
    command = f"exec {sys.executable} {tmp_path}/systest.py"
    template.write_text(template.read_text().replace("exec pkgci systest", command))
    engine = LocalEngine(config, tmp_path / "jobs")
    monkeypatch.setenv("PKGCI_CONFIG", str(config.directory))

    def start(body, target: str, parameters: Mapping[str, str]) -> Result:
        work = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        work.mkdir()
        monkeypatch.chdir(work)
        step.run("some", lambda context: body(context, target, Parameters.read(parameters)), engine)
        return Result.read(ARTIFACTS / "result.json")

    return start


def library(form: str, version: str) -> dict[str, str]:
    return trees.deb("libsmall", f"{version}-1") if form == "deb" else trees.rpm("libsmall", version)


def application(form: str, version: str) -> dict[str, str]:
    if form == "deb":
        return trees.deb("app", f"{version}-1", depends=", libsmall (>= 2)")
    # no spec says that it has this file: the released package of the library does; the other one is released only
    return trees.rpm("app", version, more="BuildRequires: /usr/bin/libsmall\nBuildRequires: other\n")


def release_rpms(config: Config, place: Path) -> None:
    """Release an RPM package of the library, and one that build-depends on it."""
    for name, more in (("libsmall", ""), ("other", "BuildRequires: libsmall\n")):
        (place / name).mkdir()
        spec = packages.SPEC.replace("/usr/share/{name}/text", "/usr/bin/{name}").replace(
            "/usr/share/{name}", "/usr/bin"
        )
        rpms = packages.rpmbuilt(place / name, name, "0.9", more=more, spec=spec)
        entry = packages.deliver_rpms(config, name, "0.9-1", rpms)
        publish(config, "default", "debianrpm", [Publication(entry.record.key, ORIGIN)])


@pytest.mark.parametrize(("form", "target"), [("deb", DEB), ("rpm", RPM)])
def test_a_queue_is_built_in_its_order_recorded_taken_from_the_store_and_released(
    config, gerrit, run, tmp_path, form, target
):
    if form == "rpm":
        release_rpms(config, tmp_path)
    gerrit.project("libsmall", library(form, "1.0"))
    gerrit.project("app", application(form, "1.0"))
    # what needs the library comes before it in the queue
    gerrit.change("app", application(form, "2.0"))
    gerrit.change("libsmall", library(form, "2.0"))
    result = run(gate, target, gerrit.parameters())
    assert result.result == "SUCCESS", result.reason
    made = Gate.read(ARTIFACTS / "gate.json")
    assert [(one.package, one.change, one.after, one.result, one.origin) for one in made.builds] == [
        ("app", "1,1", ("libsmall",), "SUCCESS", "built"),
        ("libsmall", "2,1", (), "SUCCESS", "built"),
    ]
    assert made.recorded
    # the version that it will be released with
    assert [one.version.count("~") for one in made.builds] == [0, 0]
    app, lib = made.builds
    [found] = gaterecord.find(config, "app", "main", target, *_trees(result, "app"))
    assert found.build.key == app.key
    assert found.build.against == (lib.key,)
    assert [one.name for one in found.record.changes] == ["1,1", "2,1"]
    assert [one.result for one in result.children] == ["SUCCESS"] * len(result.children)
    # nothing is in a released repository by it
    assert {path.name for path in (config.data / "repositories").glob("default/*/log/*")} <= {"1.json", "2.json"}
    named = {(one.repository, one.package) for one in made.dependants}
    assert named == ({("default/debianrpm", "other")} if form == "rpm" else set())
    again = run(gate, target, gerrit.parameters(ZUUL_UUID="4567"))
    assert again.result == "SUCCESS", again.reason
    assert [one.origin for one in Gate.read(ARTIFACTS / "gate.json").builds] == ["store", "store"]
    # what was tested together is released together, bit for bit
    merged = run(build, target, gerrit.merge())
    assert (merged.result, [one.job for one in merged.children]) == ("SUCCESS", [f"publish-{target}"]), merged.reason
    released = Repository(config, "default", config.target(target).codename)
    with released.opened():
        assert {app.key, lib.key} <= {key for key, _ in released.index.live()}


def _trees(result: Result, project: str) -> tuple[str, str]:
    [child] = [
        one for one in result.children if one.job.startswith("build-") and one.parameters["ZUUL_PROJECT"] == project
    ]
    [compiled] = (ARTIFACTS / child.directory).glob("compile-*")
    made = Build.read(compiled / "build.json")
    return made.source_tree, made.packaging_tree


@pytest.mark.parametrize(("form", "target"), [("deb", DEB), ("rpm", RPM)])
def test_a_cycle_is_an_error_that_names_it(config, gerrit, tmp_path, form, target):
    def needing(name: str, other: str) -> dict[str, str]:
        if form == "deb":
            return trees.deb(name, depends=f", {other}")
        return trees.rpm(name, more=f"BuildRequires: ({other} or none)\n")

    for name, other in (("app", "libsmall"), ("libsmall", "app")):
        gerrit.project(name, needing(name, other))
        gerrit.change(name, {"new": name})
    with pytest.raises(PackageError, match=r"in a cycle: (app -> libsmall -> app|libsmall -> app -> libsmall); "):
        order(config, target, Parameters.read(gerrit.parameters()), tmp_path)


def test_a_change_with_nothing_to_build_passes_whatever_is_ahead_of_it(gerrit, run):
    gerrit.project("app", trees.deb("app"))
    gerrit.project("slow", {"README": "no packaging\n"})
    gerrit.change("app", {"new": "1"})
    gerrit.change("slow", {"new": "1"})
    result = run(gate, DEB, gerrit.parameters())
    reason = f"nothing to build: slow has no packaging for {DEB} (debian/control)"
    assert (result.result, result.reason) == ("SUCCESS", reason)
    assert [one.job for one in result.children] == [f"order-{DEB}"]


def test_a_build_that_fails_aborts_the_others(gerrit, run):
    gerrit.project("app", trees.deb("app"))
    gerrit.project("slow", trees.deb("slow"))
    gerrit.change("slow", {"debian/rules": trees.RULES + "\noverride_dh_auto_build:\n\tsleep 600\n"})
    gerrit.change("app", {"debian/rules": trees.RULES + "\noverride_dh_auto_build:\n\texit 7\n"})
    result = run(gate, DEB, gerrit.parameters())
    assert (result.result, result.fault) == ("FAILURE", "package")
    assert "app: the build failed" in result.reason
    made = Gate.read(ARTIFACTS / "gate.json")
    assert {one.package: one.result for one in made.builds} == {"slow": "ABORTED", "app": "FAILURE"}
    assert (made.systest, made.recorded) == ("", False)


def test_a_check_builds_what_is_ahead_first_and_this_against_it(gerrit, run):
    gerrit.project("libsmall", library("deb", "1.0"))
    gerrit.project("app", application("deb", "1.0"))
    gerrit.change("libsmall", library("deb", "2.0"))
    gerrit.change("app", application("deb", "2.0"))
    result = run(build, DEB, gerrit.parameters("check", ONLY="publish"))
    assert result.result == "SUCCESS", result.reason
    jobs = [(one.job.partition("-")[0], one.parameters["ZUUL_PROJECT"]) for one in result.children]
    assert jobs == [("order", "app"), *((what, who) for who in ("libsmall", "app") for what in ("compile", "publish"))]
    lib, app = (Build.read(ARTIFACTS / one.directory / "build.json") for one in result.children if "compile" in one.job)
    # below the version that the same change is released with
    assert ["~" in one.version for one in (lib, app)] == [True, True]


def delivered(config: Config, gerrit: Gerrit, name: str, version: str, place: Path) -> str:
    """Put a build of a project's last change into the store; return its key."""
    (place / version).mkdir()
    deb = packages.deb(place / version, name, version)
    tree = trees.git(gerrit.place / name, "rev-parse", f"{gerrit.queue[-1].rpartition(':')[2]}^{{tree}}")
    return packages.deliver_debs(config, place / version, name, version, [deb], tree=tree).record.key


class FakeEngine:
    """An engine with system tests that passed, each of one package, and with parameters."""

    def __init__(self, *packages: Mapping[str, str], **parameters: str) -> None:
        self.packages, self.parameters = packages, parameters

    def state(self, ref: BuildRef) -> str:
        known = ref.job == f"systest-{DEB}" and ref.number <= len(self.packages)
        return "SUCCESS" if known else "FAILURE"

    def artifacts(self, ref: BuildRef, place: Path) -> None:
        package = Package(architecture="all", file="x", **self.packages[ref.number - 1])
        record = {"target": DEB, "environment": "x", "snapshot": "x", "repositories": ()}
        record |= {"parameters": self.parameters, "packages": (package,), "outcomes": ()}
        Systest(**record).write(place / "artifacts" / "systest.json")


def test_what_is_recorded_is_of_the_queue_and_was_tested(config, gerrit, tmp_path):
    gerrit.project("app", trees.deb("app"))
    gerrit.change("app", {"new": "1"})
    key = delivered(config, gerrit, "app", "2.0", tmp_path)
    entry = Store(config).required(key, DEB)
    tested = {"name": "app", "version": "2.0", "sha256": entry.record.packages[0].sha256}
    good = FakeEngine(tested)

    def ask(engine: FakeEngine = good, **more: str):
        return verify(config, DEB, Parameters.read(gerrit.parameters(BUILD_KEYS=key, **more)), engine, tmp_path)

    assert not ask().recorded
    for engine, test, message in (
        (good, f"systest-{DEB}/2", "is no system test for bookworm-amd64 that passed"),
        (good, f"install-{DEB}/1", "is no system test for bookworm-amd64 that passed"),
        (FakeEngine({**tested, "sha256": "0" * 64}), f"systest-{DEB}/1", "none of these tests had all of app under"),
        (
            FakeEngine(tested, SCENARIOS="package"),
            f"systest-{DEB}/1",
            "is of scenarios, an environment or flavours that a person",
        ),
        (
            FakeEngine(tested, FLAVOURS="app:cluster"),
            f"systest-{DEB}/1",
            "is of scenarios, an environment or flavours that a person",
        ),
    ):
        with pytest.raises(RequestError, match=message):
            ask(engine, SYSTEM_TESTS=test)
    with pytest.raises(RequestError, match="nobody has approved what ZUUL_PIPELINE tests"):
        ask(SYSTEM_TESTS=f"systest-{DEB}/1", ZUUL_PIPELINE="check")
    assert not list(gaterecord.records(config))
    assert ask(SYSTEM_TESTS=f"systest-{DEB}/1").recorded
    assert len(list(gaterecord.records(config))) == 1
    gerrit.change("app", {"newer": "2"})
    with pytest.raises(InfrastructureError, match=r"app 2.0 is built from .*, but app, branch main, is .*: it moved"):
        ask()


def test_packages_that_were_tested_apart_are_not_recorded(config, gerrit, tmp_path):
    keys, tested = [], []
    for name in ("libsmall", "app"):
        gerrit.project(name, trees.deb(name))
        gerrit.change(name, {"new": "1"})
        (tmp_path / name).mkdir()
        keys.append(delivered(config, gerrit, name, "2.0", tmp_path / name))
        package = Store(config).required(keys[-1], DEB).record.packages[0]
        tested.append({"name": name, "version": "2.0", "sha256": package.sha256})
    tests = f"systest-{DEB}/1 systest-{DEB}/2"
    parameters = Parameters.read(gerrit.parameters(BUILD_KEYS=" ".join(keys), SYSTEM_TESTS=tests))
    with pytest.raises(RequestError, match="none of these tests had all of app, libsmall under test together"):
        verify(config, DEB, parameters, FakeEngine(*tested), tmp_path)


def test_what_a_publication_would_refuse_is_refused_before_the_merge(config, gerrit, tmp_path):
    gerrit.project("app", trees.deb("app"))
    gerrit.change("app", {"new": "1"})
    released, lower = (delivered(config, gerrit, "app", version, tmp_path) for version in ("2.0", "1.9"))
    tree = Store(config).required(released, DEB).record.trees[0]
    origin = Origin(branch="main", commits=(Commit(project="app", commit="c" * 40, tree=tree),))
    publish(config, "default", "bookworm", [Publication(released, origin)])
    with pytest.raises(PackageError, match=r"app 1.9 is lower than 2.0, which default/bookworm has"):
        verify(config, DEB, Parameters.read(gerrit.parameters(BUILD_KEYS=lower)), FakeEngine(), tmp_path)
    assert len(list((config.data / "repositories/default/bookworm/log").iterdir())) == 1


def test_pkgci_gate_tests_the_changes_of_two_trees_together(config, tmp_path):
    trees.commit(tmp_path / "libsmall", library("deb", "2.0"))
    trees.commit(tmp_path / "app", application("deb", "2.0"))
    environment = {**os.environ, "PKGCI_CONFIG": str(config.directory)}
    command = [Path(sys.executable).with_name("pkgci"), "gate", tmp_path / "app", tmp_path / "libsmall"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    left = LocalEngine(config).directory(BuildRef(f"gate-{DEB}", 1)) / "archive" / "artifacts"
    tested = Systest.read(left / f"systest-{DEB}" / "systest.json")
    assert {package.name for package in tested.packages} == {"libsmall", "app"}
    assert {one.result for one in tested.outcomes} == {"passed"}
    made = Gate.read(left / "gate.json")
    assert (made.systest, made.recorded) == ("SUCCESS", False)
    assert "not recorded, since nobody merges a local change" in Result.read(left / "result.json").reason
    for line in (r"libsmall: 2\.0\+\S+ built", r"app: 2\.0\+\S+ built, against libsmall", "system test: "):
        assert re.search(line, done.stdout), done.stdout
