"""Scenarios without a machine: pytest with the plugin, and suites of another kind, real processes both."""

import os
import re
import signal
import textwrap
import time
from pathlib import Path

import processes
import pytest

from pkgci.artifacts import RepositoryPackage, ScenarioOutcome
from pkgci.config import Config, Scenario
from pkgci.errors import InfrastructureError, RequestError
from pkgci.handover import Handover, NodeAccess, RepositoryUnderTest, TargetUnderTest
from pkgci.mapping import fill, words
from pkgci.suite import Suite

ROOT = Path(__file__).parents[2]
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFH"
PASSED = '<testsuite><testcase classname="a.b.Nodes" name="up" time="2.04"/></testsuite>'
FAILED = PASSED.replace("/>", "><failure>it is down\nsince noon</failure></testcase>").replace("</testsuite>", "", 1)


def handover(**nodes: str) -> Handover:
    """Return what a run hands over, with machines by their roles."""
    place = "http://127.0.0.1:8470"
    repository = RepositoryUnderTest(
        name="pkgci-0", url=f"{place}/test/a/", format="deb", codename="bookworm", component="main"
    )
    released = repository.model_copy(update={"name": "pkgci-1", "url": f"{place}/rocket-2/bookworm/", "released": True})
    rpm = repository.model_copy(update={"name": "pkgci-2", "url": f"{place}/test/b/", "format": "rpm"})
    package = {"version": "1.0-1", "architecture": "all", "file": "", "sha256": "", "source": "small", "key": ""}
    return Handover(
        environment="lab",
        snapshot="lab/1",
        seed=7,
        target=TargetUnderTest(name="bookworm-amd64", format="deb"),
        repositories=(repository, released, rpm),
        packages=(RepositoryPackage(name="small", **package),),
        nodes={
            name: NodeAccess(
                port=number, identity=f"/keys/{name}", host_key=KEY, role=role, addresses={"lan": "10.1.0.1"}
            )
            for number, (name, role) in enumerate(nodes.items(), 4001)
        },
    )


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """What scenarios run in; the machines cannot be reached."""
    for name in ("home", "scratch", "artifacts"):
        (tmp_path / name).mkdir()
    told = handover(controller="master", worker="compute")
    (tmp_path / "scratch" / "handover.json").write_text(told.model_dump_json(by_alias=True))
    return Suite(tmp_path / "home", tmp_path / "scratch", tmp_path / "artifacts", told, 60)


def run_pytest(suite: Suite, text: str, *groups: str, **more: object) -> dict[str, str]:
    (suite.home / "some.py").write_text(textwrap.dedent(text))
    outcomes = suite.run("some", Scenario(path="some.py", **more), groups)
    return {one.test: f"{one.result} {one.message}".strip() for one in outcomes}


GROUPED = """
    import pytest

    def test_plain(): pass

    @pytest.mark.group("ha", "slow")
    def test_ha(): pass

    @pytest.mark.group("bvt", "slow")
    def test_both(): pass
"""


@pytest.mark.parametrize(
    ("groups", "run"),
    [
        ((), {"test_plain", "test_ha", "test_both"}),
        (("bvt",), {"test_plain", "test_both"}),
        (("ha",), {"test_ha"}),
        (("ha", "bvt"), {"test_plain", "test_ha", "test_both"}),
    ],
)
def test_tests_of_the_groups_that_are_asked_for_run(suite, groups, run):
    assert run_pytest(suite, GROUPED, *groups) == dict.fromkeys(run, "passed")


def test_a_group_that_no_test_is_in_is_a_wrong_request_and_the_default_one_is_none(suite):
    text = "import pytest\n@pytest.mark.group('ha')\ndef test_ha(): pass\n"
    with pytest.raises(RequestError, match=r"scenario some: .*/some\.py has no test of the group slow$"):
        run_pytest(suite, text, "slow")
    assert run_pytest(suite, text, "bvt") == {}
    with pytest.raises(RequestError, match=r"some\.py has no test$"):
        run_pytest(suite, "", "bvt")


def test_a_test_over_its_limit_fails_and_the_next_one_runs(suite):
    text = """
        import time, pytest
        def test_default(): time.sleep(60)
        @pytest.mark.timeout(30)
        def test_own(): time.sleep(1.5)
        def test_next(): pass
    """
    said = run_pytest(suite, text, test_seconds=1)
    assert said.pop("test_default").startswith("failed Failed: Timeout (>1.0s)")
    assert said == {"test_own": "passed", "test_next": "passed"}


def test_that_pytest_is_killed_is_neither_the_scenarios_fault_nor_a_packages(suite):
    with pytest.raises(InfrastructureError, match=r"^scenario some: pytest was killed; see logs/some\.log$"):
        run_pytest(suite, "import os\ndef test_some(): os.kill(os.getpid(), 9)\n")


def test_what_a_test_finds_in_the_environment(suite):
    text = """
        def test_env(env, master, nodes, node, packages, package, repositories, target):
            assert (env.name, env.snapshot, target.name) == ("lab", "lab/1", "bookworm-amd64")
            assert list(nodes) == ["controller", "worker"] and nodes["controller"] is master
            assert env.role("compute") == [nodes["worker"]] and env.role("none") == []
            assert node.addresses == {"lan": "10.1.0.1"} and node.role in ("master", "compute")
            assert repositories[0].endswith("/test/a/") and packages == (package,)
    """
    assert run_pytest(suite, text) == {
        "test_env[small-controller]": "passed",
        "test_env[small-worker]": "passed",
    }


def test_a_master_that_is_not_there_is_said(suite):
    told = handover(one="compute")
    (suite.directory / "handover.json").write_text(told.model_dump_json(by_alias=True))
    said = run_pytest(suite, "def test_use(master): pass\n")
    assert "the environment must have one node with `role: master`, for a test that uses `master`" in said["test_use"]
    assert said["test_use"].startswith("failed")


def test_what_a_scenario_says_has_the_time_and_nothing_that_a_terminal_obeys(suite):
    text = "def test_use():\n    print('\\x1b[31mred\\x1b[0m')\n    assert not 'so'\n"
    run_pytest(suite, text)
    lines = (suite.artifacts / "logs" / "some.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z( |$)", line) for line in lines)
    assert any(line.endswith("Z red") for line in lines)


# suites of another kind


def run_suite(suite: Suite, script: str, *groups: str, **more: object) -> list[tuple[str, str, str, str]]:
    (suite.home / "suites").mkdir(exist_ok=True)
    path = suite.home / "suites" / "run.sh"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    more.setdefault("command", ("suites/run.sh", "{{ junit }}", "{{ group }}"))
    outcomes = suite.run("bvt", Scenario(**more), groups)
    return [(one.scenario, one.test, one.result, one.message) for one in outcomes]


def test_the_outcomes_of_a_suite_are_those_of_its_junit(suite):
    (suite.home / "junit.xml").write_text(FAILED + "</testsuite>")
    assert run_suite(suite, 'cp junit.xml "$1"; exit 1') == [("bvt", "Nodes: up", "failed", "it is down")]


def test_each_group_of_a_suite_is_a_run(suite):
    script = f"""echo "{PASSED.replace('"', "'")}" | sed "s/up/$2/" >"$1" """
    assert [one[:2] for one in run_suite(suite, script, groups=("bvt", "ha"))] == [
        ("bvt:bvt", "Nodes: bvt"),
        ("bvt:ha", "Nodes: ha"),
    ]
    (suite.directory / "bvt:ha.scratch").rmdir()
    assert [one[:2] for one in run_suite(suite, script, "ha", groups=("bvt", "ha"))] == [("bvt:ha", "Nodes: ha")]


def test_what_is_told_to_a_suite_is_in_its_variables_and_arguments(suite):
    script = f"""printf '%s\\n' "$@" "$WHERE" >told; cat "$KNOWN" >>told; echo "{PASSED.replace('"', "'")}" >"$1" """
    told = {
        "WHERE": "{{ master.host }}:{{ master.port }} {{ nodes.worker.addresses.lan }}",
        "KNOWN": "{{ known_hosts }}",
    }
    run_suite(suite, script, command=("suites/run.sh", "{{ junit }}", "it's $HOME `x`"), environment=told)
    junit, word, where, *known = (suite.home / "told").read_text().splitlines()
    assert (word, where) == ("it's $HOME `x`", "127.0.0.1:4001 10.1.0.1")
    assert Path(junit).parent == suite.directory
    assert known == [f"[127.0.0.1]:{port} {KEY}" for port in (4001, 4002)]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 7", "ended with status 7, and left no JUnit XML that can be read: .*No such file"),
        ('echo oops >"$1"', "ended with status 0, and left no JUnit XML that can be read: syntax error"),
        ('echo "<a/>" >"$1"', "left no JUnit XML that can be read: its root is <a>"),
        ('echo "<!DOCTYPE a [<!ENTITY b \'c\'>]><testsuite>&b;</testsuite>" >"$1"', "it has a document type"),
        ('truncate -s 17M "$1"', "it has more than 16 MiB"),
        (
            """python3 -c "print('<testsuite>' + '<testcase/>' * 10001 + '</testsuite>')" >"$1" """,
            "it has more than 10000 tests",
        ),
        ('echo "<testsuite/>" >"$1"', "ended with status 0, and has run no test"),
        (
            'echo "<testsuite><testcase name=\'a\'/></testsuite>" >"$1"; exit 1',
            "ended with status 1, though no test failed",
        ),
    ],
)
def test_a_suite_that_does_not_say_what_became_of_its_tests_is_not_the_packages_fault(suite, script, said):
    with pytest.raises(InfrastructureError, match=rf"scenario bvt .*{said}.*see logs/bvt\.log$"):
        run_suite(suite, script)


def test_a_suite_that_is_not_there_is_a_wrong_request(suite):
    with pytest.raises(RequestError, match=r"scenario bvt: cannot run .*/suites/other: there is no such program"):
        run_suite(suite, "", command=("suites/other",))


def test_a_suite_over_its_limit_fails_and_nothing_that_it_started_stays(suite):
    marker = f"marker={suite.home}"
    (suite.home / "wait.py").write_text("import time\ntime.sleep(100)\n")
    # out of its session and process group, and nobody's child
    started = f"(setsid python3 wait.py '{marker}' &) ; sleep 100"
    [(scenario, test, result, message)] = run_suite(suite, started, seconds=1)
    assert (scenario, test, result) == ("bvt", "bvt", "failed")
    assert message == "no end after 1 s, its time limit; killed"
    processes.wait_until_gone(marker, 5)


def test_a_daemon_that_a_suite_leaves_keeps_nobody_waiting(suite, monkeypatch, caplog):
    monkeypatch.setattr("pkgci.suite.LAST_SECONDS", 0.5)
    # out of reach: without the variables of the suite, and nobody's child
    daemon = "env -i setsid sh -c 'echo $$ >pid; exec sleep 100' & while [ ! -s pid ]; do :; done"
    script = f"""{daemon}; echo "{PASSED.replace('"', "'")}" >"$1" """
    try:
        began = time.monotonic()
        assert [one[2] for one in run_suite(suite, script)] == ["passed"]
        assert time.monotonic() - began < 10
        assert "bvt.log: something that " in caplog.text
    finally:
        os.kill(int((suite.home / "pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("text", ["inf", "nan", "1e400", "-1", "soon"])
def test_a_time_that_is_none_makes_no_record_that_nobody_can_read(suite, text):
    (suite.home / "junit.xml").write_text(PASSED.replace("2.04", text))
    command = ("cp", "junit.xml", "{{ junit }}")
    [outcome] = suite.run("bvt", Scenario(command=command), ())
    assert ScenarioOutcome.model_validate_json(outcome.model_dump_json()).seconds == 0


def test_tests_that_fail_with_more_than_is_read_have_failed_and_a_missing_file_is_no_packages_fault(suite, monkeypatch):
    monkeypatch.setattr("pkgci.suite.JUNIT_BYTES", 1 << 16)
    said = run_pytest(suite, "def test_use(): raise AssertionError('x' * (1 << 17))\n")
    assert said == {"some.py": "failed tests failed, and which ones cannot be read: it has more than 0 MiB"}
    with pytest.raises(
        InfrastructureError, match=r"some\.py left no JUnit XML that can be read: .*see logs/some\.log$"
    ):
        run_pytest(suite, "import os\ndef test_use(): os._exit(0)\n")


# the mapping


def test_the_example_of_fuels_suite_yields_what_that_one_reads():
    _, environment = Config(ROOT / "etc" / "example").environment("fuel")
    told = words(handover(master="master"), "bvt_2", "/j.xml", "/scratch", "/known")
    scenario = environment.scenarios["system-tests"]
    assert [fill(text, told) for text in scenario.command] == [
        "/opt/fuel-qa/run_system_test.py",
        "run",
        "--with-xunit",
        "--xunit-file=/j.xml",
        "--group=bvt_2",
    ]
    place = "http://127.0.0.1:8470"
    assert {name: fill(text, told) for name, text in scenario.environment.items()} == {
        "EXTRA_DEB_REPOS": f"pkgci-0,deb {place}/test/a/ bookworm main,1200|"
        f"pkgci-1,deb {place}/rocket-2/bookworm/ bookworm main,1160",
        "EXTRA_RPM_REPOS": f"pkgci-2,{place}/test/b/,1",
        "UPDATE_FUEL": "true",
        "UPDATE_MASTER": "true",
        "UPDATE_FUEL_MIRROR": f"{place}/test/b/",
        "KEYSTONE_HOST": "127.0.0.1:4001",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ nothing }}", "'nothing' is undefined"),
        ("{{ nodes.other.port }}", "has no attribute 'other'"),
        ("{{ repositories[0].uri }}", "has no attribute 'uri'"),
        ("{% for one in %}", "Expected an expression"),
        ("{{ group", "unexpected end of template"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("{{ range(3) }}", "'range' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_text_that_asks_for_what_there_is_not_is_refused_where_it_stands(tmp_path, text, said):
    (tmp_path / "environments").mkdir()
    path = tmp_path / "environments" / "lab.yaml"
    path.write_text(f'nodes: {{a: {{}}}}\nscenarios:\n  b:\n    command: [b]\n    environment:\n      C: "{text}"\n')
    with pytest.raises(RequestError) as caught:
        Config(tmp_path).environment("lab")
    assert str(caught.value).startswith(f"{path}:2: scenarios: Value error, b: ")
    assert said in str(caught.value)
    assert os.linesep not in str(caught.value)
