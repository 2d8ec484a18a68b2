"""What a system test is asked for, before any machine is needed: environments, and scenarios in them."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest

from pkgci import flavours, runs
from pkgci import systest as job
from pkgci.artifacts import RepositoryPackage, ScenarioOutcome
from pkgci.change import Parameters
from pkgci.config import EMBEDDED, Config
from pkgci.engines.base import BuildRef
from pkgci.errors import InfrastructureError, PackageError, RequestError
from pkgci.kept import Kept
from pkgci.suite import wait
from pkgci.systest import _decisive, _Run, systest
from pkgci.vm import guest
from pkgci.vm.machine import Hardware, Machine, blaming_the_host
from pkgci.vm.remote import (
    Access,
    Completed,
    DeafError,
    EndlessError,
    FaultError,
    GuestError,
    LostError,
    Remote,
)
from pkgci.vm.snapshot import Manifest, Step, UnfitError, discard

DEB, RPM = "bookworm-amd64", "debianrpm-amd64"
# of what is under test
NOTHING = {"records": (), "tested": (), "flavours": {}}
NETWORK = "networks: {lan: {subnet: 10.1.0.0/24}}\n"
BOOTED = f"{NETWORK}nodes: {{b: {{networks: [lan]}}, a: {{boot: b, networks: [lan]}}}}\n"
ENVIRONMENT = "nodes: {one: {}}\nscenarios: {basic: scenarios/basic.py, more: scenarios/more}\n"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A configuration with an environment `lab`, whose scenarios are not there."""
    place = tmp_path / "etc"
    for kind in ("targets", "releases", "environments"):
        (place / kind).mkdir(parents=True)
    for path in (EMBEDDED / "targets").glob("*.yaml"):
        (place / "targets" / path.name).write_bytes(path.read_bytes())
    (place / "config.yaml").write_text(f"paths: {{cache: {tmp_path}/cache, data: {tmp_path}/data}}\n")
    (place / "environments" / "lab.yaml").write_text(ENVIRONMENT)
    return place


def refused(directory: Path, target: str = DEB, **parameters: str) -> str:
    """Return what is said of a system test that is a wrong request."""
    with pytest.raises(RequestError) as caught:
        systest(Config(directory), target, Parameters.read(parameters), directory / "artifacts")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("scenarios: {a: a.py}\n", "lab.yaml:1: nodes: Field required"),
        ("nodes: {}\nscenarios: {a: a.py}\n", "lab.yaml:1: nodes: Dictionary should have at least 1 item"),
        (
            "nodes: {a: {}, a1: {}, a2: {}, a3: {}, a4: {}, a5: {}, a6: {}, a7: {}, a8: {}, a9: {}}\n",
            "lab.yaml:1: nodes: Dictionary should have at most 9 items",
        ),
        ("nodes: {a_b: {}}\n", "lab.yaml:1: nodes.a_b.[key]: String should match pattern"),
        ("nodes:\n  a: {networks: [lan]}\n", "lab.yaml:1: nodes: Value error, a: there is no network 'lan'"),
        (
            "networks: {lan: {subnet: 192.168.1.0/24}}\nnodes:\n  a: {networks: [lan, lan]}\n",
            "lab.yaml:2: nodes: Value error, a: network 'lan' is given twice",
        ),
        (
            f"nodes:\n  a: {{networks: {[f'n{number}' for number in range(17)]}}}\n",
            "lab.yaml:2: nodes.a.networks: Tuple should have at most 16 items",
        ),
        ("nodes: {a: {boot: b}}\n", "a: `boot` must name another node, with a disk of its own: 'b' is none"),
        ("nodes: {a: {boot: b, packages: [x]}, b: {}}\n", "has neither `packages` nor `build`: its disk is empty"),
        ("nodes: {b: {}, a: {boot: b}}\n", "a: its first network must be one of b's, which it boots from"),
        (f"{NETWORK}nodes: {{a: {{boot: b, networks: [lan]}}, b: {{networks: [lan]}}}}\n", "must stand above it"),
        (
            f"{BOOTED}deploy: [{{node: a, script: x/y.sh}}]\n",
            "lab.yaml:3: deploy: Value error, a boots from the network",
        ),
        ("nodes:\n  a: {disks: [0]}\n", "lab.yaml:2: nodes.a.disks.0: Input should be greater than or equal to 1"),
        ("nodes:\n  a: {disks: [1, 1, 1, 1, 1]}\n", "lab.yaml:2: nodes.a.disks: Tuple should have at most 4 items"),
        ("nodes: {a: {build: x.sh}}\n", "must be in a directory of its own"),
        (
            f"{BOOTED}flavours: {{master: {{rebuild: x/y.sh}}}}\n",
            "master: it needs `node`: no nodes have the role `master`",
        ),
        (
            f"{BOOTED}flavours: {{container: {{rebuild: x/y.sh, node: b}}}}\n",
            "flavours.container.carrier: Field required",
        ),
        (
            "nodes: {b: {}}\nflavours: {bootstrap: {rebuild: x/y.sh, node: b, carrier: c}}\n",
            "lab.yaml:2: flavours: Value error, bootstrap: no node has `boot: b`",
        ),
        (f"{BOOTED}flavours: {{master: {{rebuild: x/y.sh, node: a}}}}\n", "master: a boots from the network"),
        ("nodes: {b: {}}\nscenarios: {cluster: a.py}\n", "'cluster' has a meaning of its own"),
        ("networks: {lan: {subnet: 10.0.2.7/24}}\n", "10.0.2.7/24 has host bits set"),
        ("networks: {lan: {subnet: 10.0.0.0/16}}\n", "lan: 10.0.0.0/16 overlaps 10.0.2.0/24, the machines' way to"),
        ("networks: {lan: {subnet: 10.1.0.0/30}}\n", "10.1.0.0/30 has too few addresses; /24 is usual"),
        (
            "networks:\n  lan: {subnet: 10.1.0.0/24}\n  wan: {subnet: 10.1.0.128/25}\n",
            "wan: 10.1.0.128/25 overlaps 10.1.0.0/24, network lan",
        ),
        (
            "nodes: {a: {}}\ndeploy:\n- {node: b, script: b/b.sh}\n",
            "lab.yaml:2: deploy: Value error, there is no node 'b'",
        ),
        (
            "nodes: {a: {}}\ndeploy:\n- {node: a, script: a.sh}\n",
            "lab.yaml:3: deploy.0.script: Value error, must be in a directory of its own",
        ),
        ("nodes:\n  a:\n    memory_mib: 1\nscenarios: {a: a.py}\n", "lab.yaml:3: nodes.a.memory_mib: Input should be"),
        (
            "nodes: {a: {}}\nscenarios:\n  a: ../a.py\n",
            "lab.yaml:3: scenarios.a.path: Value error, must be a relative path",
        ),
        (
            "nodes: {a: {}}\nscenarios:\n  a: /a.py\n",
            "lab.yaml:3: scenarios.a.path: Value error, must be a relative path",
        ),
        (
            "nodes: {a: {}}\nscenarios:\n  console: a.py\n",
            "lab.yaml:3: scenarios.console.[key]: Value error, 'console'",
        ),
        ("nodes: {a: {}}\nscenarios:\n  autopkgtest: a.py\n", "'autopkgtest' has a meaning of its own"),
        ("nodes: {a: {}}\nscenarios: {A: a.py}\n", "lab.yaml:2: scenarios.A.[key]: String should match pattern"),
        ("nodes: {a: {}}\nscenarios: {a: a.py}\nsnapshots: 1\n", "lab.yaml:3: snapshots: unknown key"),
        (
            "nodes: {a: {}}\nscenarios:\n  a: {}\n",
            "lab.yaml:3: scenarios.a: Value error, it needs either `path` or `com",
        ),
        (
            "nodes: {a: {}}\nscenarios:\n  a: {path: a.py, command: [a]}\n",
            "lab.yaml:3: scenarios.a: Value error, it needs either `path` or `command`",
        ),
        (
            "nodes: {a: {}}\nscenarios:\n  a:\n    path: a.py\n    groups: [bvt]\n",
            "lab.yaml:3: scenarios.a: Value error, `groups` and `environment` are for `command`",
        ),
        (
            "nodes: {a: {}}\nscenarios:\n  a:\n    command: [a]\n    groups:\n    - a b\n",
            "lab.yaml:6: scenarios.a.groups.0: String should match pattern",
        ),
        ("nodes: {a: {}}\nscenarios: {a: a.py}\nlogs: [var/log]\n", "lab.yaml:3: logs.0: String should match pattern"),
        ("nodes: {a: {}}\nscenarios: {a: a.py}\nlogs: ['/a b']\n", "lab.yaml:3: logs.0: String should match pattern"),
    ],
)
def test_what_is_wrong_in_an_environment_is_said_with_file_and_line(directory: Path, text: str, said: str):
    (directory / "environments" / "lab.yaml").write_text(text)
    assert said in refused(directory, ENVIRONMENT="lab")


def test_an_unknown_environment_lists_the_known(directory: Path):
    assert refused(directory, ENVIRONMENT="lap").endswith(
        f"unknown environment 'lap'; {directory}/environments has: lab"
    )


def test_an_unknown_scenario_lists_the_known(directory: Path):
    said = refused(directory, ENVIRONMENT="lab", SCENARIOS="basic other")
    assert said == "parameter SCENARIOS: 'other' is not in environment lab, which has: basic, more, autopkgtest"


def test_an_rpm_has_no_tests_of_its_own(directory: Path):
    said = refused(directory, RPM, ENVIRONMENT="lab", SCENARIOS="autopkgtest")
    assert said == "parameter SCENARIOS: 'autopkgtest' is not in environment lab, which has: basic, more"


def test_what_a_scenario_may_import_or_read_decides_and_other_entries_do_not(directory: Path, monkeypatch):
    monkeypatch.setattr(guest, "upstream_digest", lambda _: "")
    config = Config(directory)
    _, environment = config.environment("lab")

    def decisive(*scenarios: str) -> list:
        run = SimpleNamespace(config=config, target=config.target(DEB), home=directory, environment=environment)
        return _decisive(SimpleNamespace(**vars(run), scenarios=scenarios, snapshot=SimpleNamespace(id="s"), **NOTHING))

    (directory / "packages").mkdir()
    before = decisive("basic")
    for path in ("packages/hello.yaml", "config.yaml", "environments/other.yaml", "targets/other.yaml"):
        (directory / path).write_text("# changed\n")
        assert decisive("basic") == before
    for path in ("scenarios/basic.py", "scenarios/more/conftest.py", "lib/data.py", "expected.json"):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text("# changed\n")
        assert decisive("basic") != before
        before = decisive("basic")


def test_whether_a_suite_from_elsewhere_has_changed_is_not_known(directory: Path, monkeypatch):
    monkeypatch.setattr(guest, "upstream_digest", lambda _: "")
    for program, known in (("suites/run", True), ("/opt/run", False), ("run", False), ("suites/../../run", False)):
        (directory / "environments" / "lab.yaml").write_text(
            f"nodes: {{one: {{}}}}\nscenarios: {{a: {{command: [{program}]}}}}\n"
        )
        config = Config(directory)
        run = SimpleNamespace(
            config=config, target=config.target(DEB), home=directory, environment=config.environment("lab")[1]
        )
        run = SimpleNamespace(**vars(run), scenarios={"a": ()}, snapshot=SimpleNamespace(id="s"), **NOTHING)
        with nullcontext() if known else pytest.raises(InfrastructureError, match="not in the configuration directory"):
            _decisive(run)


GROUPS = """
nodes: {one: {}}
scenarios:
  basic: scenarios/basic.py
  suite: {command: [a], groups: [bvt, ha_2]}
  other: {command: [a], groups: [ha_2]}
  plain: {command: [a]}
"""


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("", {"basic": ("bvt",), "suite": ("bvt",), "plain": (), "autopkgtest": ()}),
        ("suite basic", {"basic": (), "suite": ()}),
        ("basic:slow basic:bvt basic:slow", {"basic": ("slow", "bvt")}),
        ("basic:slow basic suite:ha_2", {"basic": (), "suite": ("ha_2",)}),
        ("plain autopkgtest", {"plain": (), "autopkgtest": ()}),
    ],
)
def test_scenarios_and_groups_of_them_are_chosen(directory: Path, wanted, chosen):
    (directory / "environments" / "lab.yaml").write_text(GROUPS)
    config = Config(directory)
    assert job._scenarios("lab", config.environment("lab")[1], config.target(DEB), wanted.split()) == chosen


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("suite:slow", "scenario suite has no group 'slow', but: bvt, ha_2"),
        ("plain:bvt", "scenario plain has no group 'bvt', but: none"),
        ("autopkgtest:bvt", "scenario autopkgtest has no group 'bvt', but: none"),
        ("nothing:bvt", "'nothing' is not in environment lab, which has: basic, suite, other, plain, autopkgtest"),
    ],
)
def test_a_group_that_a_suite_does_not_have_is_refused(directory: Path, wanted, said):
    (directory / "environments" / "lab.yaml").write_text(GROUPS)
    assert refused(directory, ENVIRONMENT="lab", SCENARIOS=wanted) == f"parameter SCENARIOS: {said}"


def test_a_scenario_that_is_not_there_is_said_with_its_place(directory: Path):
    said = refused(directory, ENVIRONMENT="lab", SCENARIOS="more")
    assert said == f"{directory}/environments/lab.yaml: scenario more: {directory}/scenarios/more does not exist"


def test_an_environment_for_other_targets_is_refused(directory: Path):
    (directory / "environments" / "lab.yaml").write_text(f"{ENVIRONMENT}targets: [{RPM}]\n")
    assert "environment lab is made for debianrpm-amd64, not for bookworm-amd64" in refused(
        directory, ENVIRONMENT="lab"
    )


@pytest.mark.parametrize(
    ("own", "release", "made", "for_each"),
    [
        ("", f"targets: [{DEB}, {RPM}]\nenvironment: lab\n", [DEB, RPM], [DEB, RPM]),
        (f"targets: [{RPM}]\n", f"targets: [{DEB}, {RPM}]\nenvironment: lab\n", [RPM], [RPM]),
        # nothing but ENVIRONMENT names it
        (f"targets: [{RPM}]\n", f"targets: [{DEB}]\nenvironment: none\n", [RPM], [DEB, RPM]),
    ],
)
def test_an_environment_is_prepared_for_its_own_targets_or_those_of_the_releases(
    directory, monkeypatch, own, release, made, for_each
):
    asked = []

    def environment(_config: Config, name: str, target: str, **_: bool) -> SimpleNamespace:
        asked.append(target)
        return SimpleNamespace(id=f"{name}@{target}/1", manifest=SimpleNamespace(created=datetime.now(UTC)))

    monkeypatch.setattr(guest, "environment", environment)
    for path in (directory / "releases").iterdir():
        path.unlink()
    (directory / "releases" / "r.yaml").write_text(f"branches: [main]\n{release}")
    for name, text in (("lab", own), ("none", "")):
        (directory / "environments" / f"{name}.yaml").write_text(f"{ENVIRONMENT}{text}")
    job.prepare_environment(Config(directory), "lab")
    assert asked == made
    asked.clear()
    for target in (DEB, RPM):
        job.prepare(Config(directory), target)
    assert asked == for_each


@pytest.mark.parametrize(
    ("release", "branch", "target", "used"),
    [
        ("environment: lab\n", "main", DEB, "lab"),
        (f"environments: {{{DEB}: lab}}\n", "main", DEB, "lab"),
        (f"environment: none\nenvironments: {{{DEB}: lab}}\n", "main", RPM, "none"),
        ("environment: lab\n", "other", DEB, "default"),
        ("environment: lab\n", "", DEB, "default"),
    ],
)
def test_the_environment_is_that_of_the_branchs_release_and_the_target(directory, release, branch, target, used):
    (directory / "releases" / "r.yaml").write_text(f"branches: [main]\ntargets: [{DEB}, {RPM}]\n{release}")
    said = refused(directory, target, ZUUL_BRANCH=branch, SCENARIOS="nothing")
    assert f"environment {used}, which has" in said or said.startswith(f"unknown environment {used!r}")


def test_a_configuration_may_have_a_default_of_its_own(directory: Path):
    assert Config(directory).environment("default") == (EMBEDDED, Config(EMBEDDED).environment("default")[1])
    (directory / "environments" / "default.yaml").write_text(ENVIRONMENT)
    assert Config(directory).environment("default")[0] == directory


def test_nothing_is_tested_without_repositories(directory: Path):
    (directory / "config.yaml").write_text(f"serve: false\npaths: {{data: {directory.parent}/data}}\n")
    assert "nothing to install: no binary package of build (any) in 0 repositories" in refused(directory)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ENVIRONMENT", "../lab"),
        ("ENVIRONMENT", "lab lab"),
        ("SCENARIOS", "a;b"),
        ("SCENARIOS", "a\nb"),
        ("SCENARIOS", "-a"),
    ],
)
def test_hostile_names_are_refused(directory: Path, name: str, value: str):
    assert refused(directory, **{name: value}).startswith(f"parameter {name}: ")


@pytest.mark.parametrize(
    ("described", "name", "packages", "memory_mib"),
    [
        ({}, DEB, (), 512),
        ({"memory_mib": 512}, DEB, (), 512),
        ({"packages": ["rsync"]}, f"lab@{DEB}", ("rsync",), 512),
        ({"memory_mib": 1024}, f"lab@{DEB}", (), 1024),
    ],
)
def test_a_machine_that_differs_from_the_plain_one_has_a_snapshot_of_its_own(
    directory, monkeypatch, described, name, packages, memory_mib
):
    asked = []
    monkeypatch.setattr(guest, "ensure", lambda _config, plan, *_: asked.append(plan))
    lab = {"nodes": {"one": described}, "scenarios": {"basic": "scenarios/basic.py"}}
    (directory / "environments" / "lab.yaml").write_text(json.dumps(lab))
    guest.environment(Config(directory), "lab", DEB)
    [plan] = asked
    [node] = plan.nodes.values()
    assert (plan.name, node.target.machine.packages, node.target.machine.memory_mib) == (name, packages, memory_mib)


def test_a_machine_whose_clock_is_frozen_is_not_the_plain_one(directory, monkeypatch):
    asked = []
    monkeypatch.setattr(guest, "ensure", lambda _config, plan, *_: asked.append((plan.name, plan.clock)))
    lab = {"nodes": {"one": {}}, "clock": "frozen", "scenarios": {"basic": "scenarios/basic.py"}}
    (directory / "environments" / "lab.yaml").write_text(json.dumps(lab))
    guest.environment(Config(directory), "lab", DEB)
    assert asked == [(f"lab@{DEB}", "frozen")]


def test_the_machines_of_a_network_have_addresses_in_their_order(directory, monkeypatch):
    asked = []
    monkeypatch.setattr(guest, "ensure", lambda _config, plan, *_: asked.append(plan))
    (directory / "environments" / "lab.yaml").write_text(
        "networks:\n  admin: {subnet: 192.168.7.0/24}\n  data: {subnet: 172.16.0.0/28}\n"
        "nodes:\n  master: {networks: [admin]}\n  one: {networks: [data, admin]}\n"
        "deploy: [{node: master, script: lab/deploy.sh}]\nhealth: [{node: one, script: lab/health.sh, seconds: 9}]\n"
        "scenarios: {basic: scenarios/basic.py}\n"
    )
    guest.environment(Config(directory), "lab", DEB)
    [plan] = asked
    assert {name: dict(node.addresses) for name, node in plan.nodes.items()} == {
        "master": {"admin": "192.168.7.1/24"},
        "one": {"data": "172.16.0.1/28", "admin": "192.168.7.2/24"},
    }
    assert plan.name == f"lab@{DEB}"
    assert plan.deploy == (Step("master", directory / "lab" / "deploy.sh", 600),)
    assert plan.health == (Step("one", directory / "lab" / "health.sh", 9),)


def test_several_machines_that_another_qemu_has_frozen_are_not_made_anew_within_a_test(directory, monkeypatch):
    (directory / "scenarios").mkdir()
    (directory / "scenarios" / "basic.py").touch()
    nodes = {"one": {}, "two": {}}
    for count, error in ((2, guest.OutdatedError), (1, ZeroDivisionError)):
        lab = {"nodes": dict(list(nodes.items())[:count]), "scenarios": {"basic": "scenarios/basic.py"}}
        (directory / "environments" / "lab.yaml").write_text(json.dumps(lab))
        config = Config(directory)
        place = config.data / "snapshots" / f"lab@{DEB}" / "latest"
        manifest = Manifest(
            name="lab", key="", qemu="QEMU 1", accelerator="tcg", created=datetime.now(UTC), nodes=(), files=()
        )
        manifest.write(place / "manifest.json")
        monkeypatch.setattr(job, "serve", lambda _: 1 / 0)
        with pytest.raises(error) as raised:
            systest(config, DEB, Parameters.read({"ENVIRONMENT": "lab", "SCENARIOS": "basic"}), directory / "artifacts")
        if count > 1:
            assert re.match(
                "environment lab: snapshot lab/latest was made by QEMU 1, here is QEMU .*; it has to be prepared anew",
                str(raised.value),
            )


@pytest.fixture
def run(directory: Path, monkeypatch) -> _Run:
    """A system test whose machines are kept, though there are none."""
    config = Config(directory)
    home, environment = config.environment("lab")
    snapshot = SimpleNamespace(id="lab/1", manifest=SimpleNamespace(nodes=(SimpleNamespace(memory_mib=512),)))
    monkeypatch.setattr(job, "keep", lambda _snapshot, _machines, place: (place / "base").mkdir(parents=True))
    return _Run(
        config, DEB, config.target(DEB), "lab", home, environment, {"basic": ()}, snapshot, (), (), {}, directory
    )


@pytest.fixture
def pinned(directory, monkeypatch) -> Callable[..., tuple]:
    """Return which snapshots a system test uses, where this host has those of the checksums a... and b... ."""

    def named(_config: Config, sha256: str, names: tuple[str, ...], machines: int) -> tuple:
        if sha256[0] == "c":
            raise RequestError("it is not here")
        if sha256[0] == "d":
            raise UnfitError("it is damaged")
        return sha256[0], names, machines

    monkeypatch.setattr(job.repetition, "named", named)
    monkeypatch.setattr(guest, "environment", lambda *_: "its own")
    config = Config(directory)

    def use(*sha256: str, **parameters: str) -> tuple:
        given = {"SNAPSHOTS": " ".join(one * 64 for one in sha256), **parameters}
        return job._snapshots(config, "lab", DEB, config.environment("lab")[1], Parameters.read(given))

    return use


def test_a_test_is_repeated_on_the_snapshots_that_it_ran_on(pinned):
    own = (f"lab@{DEB}", DEB)
    assert pinned() == ("its own", None)
    assert pinned("a") == (("a", own, 1), None)
    assert pinned("a", "b") == (("a", own, 1), ("b", (DEB,), 1))


@pytest.mark.parametrize("sha256", ["c", "d", "ac"])
def test_another_snapshot_is_used_only_for_who_asks_for_it(pinned, sha256: str):
    with pytest.raises((RequestError, UnfitError), match="it is"):
        pinned(*sha256)
    assert pinned(*sha256, REBUILD_SNAPSHOT="true") == ("its own", None)


def test_the_snapshot_stays_as_long_as_it_is_tested_on(directory, monkeypatch):
    made = directory / "snapshots" / "1"
    made.mkdir(parents=True)
    (directory / "scenarios").mkdir()
    (directory / "scenarios" / "basic.py").touch()
    snapshot = SimpleNamespace(directory=made, id="lab/1", manifest=SimpleNamespace(created=datetime.now(UTC)))
    monkeypatch.setattr(guest, "environment", lambda *_: snapshot)
    monkeypatch.setattr(job, "serve", lambda _: nullcontext())
    monkeypatch.setattr(job.repository, "read", lambda *_: [])
    monkeypatch.setattr(job.repository, "under_test", lambda *_: [])
    monkeypatch.setattr(job.passed, "once", lambda *_, **__: discard(made, (), 0))
    given = {"REPOSITORIES": "", "ENVIRONMENT": "lab", "SCENARIOS": "basic"}
    assert systest(Config(directory), DEB, Parameters.read(given), directory / "artifacts") is False
    assert made.exists()


def keeping(run: _Run) -> None:
    job._keeping(run, {"parameters": {}}, BuildRef("systest-a", 1))


def test_of_several_attempts_the_machines_of_the_last_one_are_kept(run, monkeypatch):
    def attempts(run: _Run, *_: object) -> None:
        for _ in range(2):
            run._keep(run.snapshot, "autopkgtest-small", [])
        raise PackageError("it has to fail")

    monkeypatch.setattr(job, "_run_scenarios", attempts)
    with pytest.raises(PackageError):
        keeping(run)
    [(place, kept)] = runs.runs(run.config).all()
    assert [(name, (place / name / "base").exists()) for name in kept.sets] == [("autopkgtest-small", True)]


def test_that_machines_cannot_be_kept_changes_no_verdict(run, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fails(run: _Run, *_: object) -> None:
        run._keep(run.snapshot, runs.MACHINES, [])
        raise PackageError("it has to fail")

    monkeypatch.setattr(job, "_run_scenarios", fails)
    monkeypatch.setattr(Kept, "keep", full)
    with pytest.raises(PackageError, match="it has to fail"):
        keeping(run)


def test_machines_that_are_too_old_go_before_a_test_is_refused_for_want_of_space(run, monkeypatch):
    kept = runs.runs(run.config)
    now = datetime.now(UTC)
    record = {"job": "systest-a", "parent": "", "target": "a", "environment": "lab", "passed": True, "sets": {}}
    for number, days in ((1, 21), (2, 19)):
        # not pruned at once: it was kept then
        then = now - timedelta(days=days)
        with kept.room(then) as room:
            kept.keep(room, runs.KeptRun(number=number, ended=then, **record), then)
    free = SimpleNamespace(free=1 << 40), SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: free[(Path(place) / "systest-a-1").exists()])
    monkeypatch.setattr(job, "_run_scenarios", lambda *_: "made")
    keeping(run)
    assert [str(one) for _, one in kept.all()] == ["systest-a/2"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free[1])
    with pytest.raises(InfrastructureError, match="no space for the machines of this run"):
        keeping(run)


def test_a_scenario_ends_at_its_time_limit_with_all_that_it_started(tmp_path: Path):
    marker = f"marker={tmp_path}"
    started = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(100)', sys.argv[1]])"
    )
    command = [sys.executable, "-c", started, marker]
    assert wait(command, tmp_path, os.environ, tmp_path / "log", 2) is None
    processes.wait_until_gone(marker)


@pytest.mark.parametrize(("machines", "seconds"), [(1, 900), (2, 900), (3, 1350), (9, 4050)])
def test_machines_that_share_the_hosts_processors_have_more_time_in_proportion(monkeypatch, machines, seconds):
    given = []

    def install(*words: object) -> tuple[dict, list]:
        given.append(words[-1])
        return {}, []

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(job, "_install", install)
    run = SimpleNamespace(
        config=None, target=Config(EMBEDDED).target(DEB), tested=(), records=(), logs=str, note=lambda *_: None
    )
    nodes = {f"node-{number}": SimpleNamespace(put=lambda _: None) for number in range(machines)}
    assert job._install_everywhere(run, nodes, ()) == ()
    assert given == [seconds] * machines


@pytest.mark.parametrize(
    ("seconds", "waited", "to_blame"),
    [(900, 0, True), (900, 440, True), (900, 460, False), (4050, 3150, True), (4050, 3700, False)],
)
def test_an_installation_without_end_is_the_packages_fault_unless_the_host_let_it_wait(seconds, waited, to_blame):
    def endless(*_: object, timeout: float, limit: int) -> None:
        assert (timeout, limit > 0) == (seconds, True)
        raise EndlessError(f"a command in the machine did not end within {timeout} s")

    waits = iter((7.0, 7.0 + waited))
    machine = SimpleNamespace(waited=lambda: next(waits), run=endless)
    run = SimpleNamespace(target=Config(EMBEDDED).target(DEB), tested=())
    if to_blame:
        said = f"while the packages were installed: a command in the machine did not end within {seconds} s"
        assert job._install(run, machine, (), "together", seconds) == ({}, [said])
        return
    with pytest.raises(InfrastructureError, match=f"for {waited} s of these the host had no processor for the machine"):
        job._install(run, machine, (), "together", seconds)


@pytest.mark.parametrize(
    ("error", "waited", "up", "raised"),
    [
        (LostError(), 0, True, FaultError),
        # it has restarted: whatever did that
        (LostError(), 0, False, LostError),
        (DeafError("no ssh"), 200, True, InfrastructureError),
        (DeafError("no ssh"), 100, True, DeafError),
        (GuestError("it floods us"), 200, True, GuestError),
    ],
)
def test_what_comes_over_a_machine_is_told_from_what_it_does(error, waited, up, raised):
    waits = iter((7.0, 7.0 + waited))
    machine = SimpleNamespace(waited=lambda: next(waits), connect=lambda _: None, up_since=lambda _: up)
    with pytest.raises(InfrastructureError) as caught, blaming_the_host(machine, 300, "it is deployed"):
        raise error
    assert type(caught.value) is raised


def test_a_fault_that_comes_before_anything_has_a_log_is_tried_again_too(run):
    run.begin_again("QEMU was killed")
    assert run.retried == ["QEMU was killed"]


@pytest.fixture
def master(run, monkeypatch) -> _Run:
    """A system test of a package that is part of the master's image."""
    flavours = "networks: {}\nflavours: {master: {node: one, rebuild: lab/master.sh}}\n"
    (run.home / "environments" / "lab.yaml").write_text(ENVIRONMENT + flavours)
    (run.home / "lab").mkdir()
    (run.home / "lab" / "master.sh").touch()
    package = RepositoryPackage(
        name="small", version="1", architecture="all", file="small.deb", sha256="0" * 64, source="small", key=""
    )
    snapshot = SimpleNamespace(manifest=SimpleNamespace(accelerator="tcg"))
    monkeypatch.setattr(guest, "environment_plan", lambda *_: None)
    made = replace(run, environment=Config(run.home).environment("lab")[1], tested=(package,), snapshot=snapshot)
    return replace(made, flavours={"small": ("master",)})


@pytest.mark.parametrize("rebuilt", [True, False])
def test_a_machine_that_does_not_boot_before_its_image_is_rebuilt_is_no_packages_fault(master, monkeypatch, rebuilt):
    @contextmanager
    def redeployed(_config, _plan, _name, rebuild, *_: object):
        if rebuilt:
            rebuild(None)
        raise GuestError("it does not come up")
        yield

    monkeypatch.setattr(job, "redeployed", redeployed)
    passed = ScenarioOutcome(scenario="master", test="image", result="passed", seconds=0)
    monkeypatch.setattr(job, "_rebuilt", lambda *_: passed)
    with nullcontext() if rebuilt else pytest.raises(GuestError), job._deployed(master) as snapshot:
        assert snapshot is None
    assert [outcome.result for outcome in master.outcomes] == (["passed", "failed"] if rebuilt else [])


class Rebuilding:
    """A machine that says something when an image is rebuilt in it, and then ends by a status or an error."""

    def __init__(self, end: int | GuestError) -> None:
        self._end = end

    def put(self, *_: object) -> None:
        """Take files."""

    def waited(self) -> float:
        return 0.0

    def connect(self, _: float) -> None:
        raise DeafError("no ssh")

    def run(self, *_: object, to, **__: object) -> Completed:
        to.write(b"E: it is \x1b[1mso\n")
        if isinstance(self._end, GuestError):
            raise self._end
        return Completed(self._end, b"E: it is \x1b[1mso\n")


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (0, ""),
        (1, "E: it is ?[1mso"),
        (LostError("gone"), "while the packages were installed: the connection to the machine is lost: gone"),
        (flavours.UNREADABLE, None),
    ],
)
def test_what_was_said_when_an_image_was_rebuilt_is_a_log_however_that_ends(master, end, message):
    how = master.environment.flavours.master
    with (
        nullcontext() if message is not None else pytest.raises(InfrastructureError, match=r"logs/master\.log has what")
    ):
        outcome = job._rebuilt(master, Rebuilding(end), "master", how, master.tested, "image")
        assert (outcome.result, outcome.message) == ("failed" if message else "passed", message)
    assert (master.artifacts / "logs" / "master.log").read_text().endswith("Z E: it is so\n")


@pytest.mark.parametrize("target", [DEB, RPM])
def test_a_package_that_is_not_installed_has_no_version(target):
    script = job.VERSION[Config(EMBEDDED).target(target).format]
    done = subprocess.run(["sh", "-euc", script, "sh", "no-such-package"], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"")


def test_a_qemu_that_ends_otherwise_than_by_the_guests_halt_has_not_written_its_disk(tmp_path, monkeypatch):
    (tmp_path / "qemu.log").write_text("qemu: it is broken\n")
    machine = Machine(tmp_path, Hardware("tcg", 512), Access(tmp_path / "identity", ""))
    monkeypatch.setattr(Remote, "run", lambda *_, **__: Completed(0, b""))
    machine._process = subprocess.Popen(["false"])
    with pytest.raises(InfrastructureError, match="QEMU ended by itself: qemu: it is broken"):
        machine.shut_down(10)
