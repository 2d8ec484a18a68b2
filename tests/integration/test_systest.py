"""The system test on tiny real packages, in real machines, by scenarios good and bad."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import trees

from pkgci import runs as kept_runs
from pkgci import systest as job
from pkgci.artifacts import Result, ScenarioOutcome, Systest
from pkgci.change import Parameters
from pkgci.compile import compile
from pkgci.config import EMBEDDED, Config
from pkgci.engines.base import BuildRef
from pkgci.engines.local import LocalEngine
from pkgci.errors import InfrastructureError, PackageError, RequestError, TriedTwiceError
from pkgci.publish import publish
from pkgci.systest import systest
from pkgci.vm.remote import Fault

DEB, RPM = "bookworm-amd64", "debianrpm-amd64"
OWN = BuildRef("compile-by-hand", 1)
WAIT = "waits-until-it-is-aborted"

ENVIRONMENT = """
nodes: {lab: {role: master}}
logs: [/srv/product/*.log]
scenarios:
  package: scenarios/test_package.py
  all: scenarios/all
  halting: scenarios/halting.py
  deaf: scenarios/deaf.py
  failing: scenarios/failing.py
  endless: scenarios/endless.py
  marking: scenarios/marking.py
  crooked: scenarios/crooked.py
  empty: scenarios/empty.py
  planned: {path: scenarios/planned.py, test_seconds: 60}
  faulty: scenarios/faulty.py
  suite:
    command: [suites/run.sh, "{{ group }}", "{{ junit }}"]
    groups: [bvt, ha]
    environment:
      MASTER: "{{ master.host }} {{ master.port }} {{ master.identity }} {{ known_hosts }}"
      PACKAGES: "{% for one in packages %}{{ one.name }}={{ one.version }}{{ ' ' if not loop.last }}{% endfor %}"
scenario_seconds: 600
"""
VERSIONS = """
    query = {"deb": "dpkg-query -W -f '${Version}' \\"$1\\"", "rpm": "rpm -q --qf '%{VERSION}-%{RELEASE}' \\"$1\\""}
    assert node.run(query[target.format], package.name).text() == package.version
"""
SCENARIOS = {
    "all/test_versions.py": f"def test_exact(node, package, target):{VERSIONS}",
    "all/test_nodes.py": """
import stat

def test_files(nodes, packages, repositories):
    assert list(nodes) == ["lab"] and len(packages) == len(repositories) == 1
    nodes["lab"].put({"/srv/new/file": b"\\0content"})
    assert nodes["lab"].get("/srv/new/file") == b"\\0content"

def test_status_and_output(node):
    done = node.run("printf '\\\\033[31mred\\\\n'; echo \\"$1\\"; exit 7", "it's")
    assert (done.status, done.text()) == (7, "\\033[31mred\\nit's\\n")

def test_nobody_else_may_log_in(pytestconfig):
    handover = pytestconfig.getoption("--pkgci")
    assert stat.S_IMODE(handover.stat().st_mode) == 0o600
    assert stat.S_IMODE(handover.parent.stat().st_mode) == 0o700
""",
    "failing.py": """
import pytest

def test_good(node):
    pass

def test_bad(node):
    assert node.run("cat /etc/hostname").text() == "elsewhere"

@pytest.mark.skip(reason="not here")
def test_skipped():
    pass
""",
    "halting.py": "def test_use(node):\n    assert node.run('small halt').status == 0\n",
    "deaf.py": "def test_use(node):\n    assert node.run('small deaf').status == 0\n",
    "endless.py": "def test_use(node):\n    node.run('echo begun; sleep 1000', timeout=2000)\n",
    "marking.py": """
def test_mark(node):
    node.run("echo mark >/root/mark; systemd-run -q --unit=mark sleep 1000")
    assert not "as it has to fail"
""",
    "planned.py": """
import socket
import time

import pytest

def test_of_another_group():
    assert not "as it is not run"

@pytest.mark.group("ha")
@pytest.mark.timeout(2)
def test_too_long(master):
    master.run("mkdir /srv/product; echo an error of it >/srv/product/a.log; sleep 100")

@pytest.mark.group("ha", "slow")
def test_environment(env, master, node):
    assert (env.name, env.role("master"), node.role, node.addresses) == ("lab", [master], "master", {})
    with master.forward(22) as port, socket.create_connection(("127.0.0.1", port)) as there:
        assert there.recv(7) == b"SSH-2.0"
""",
    "faulty.py": """
import os
import socket
import threading
from pathlib import Path

def test_use(node):
    node.run("true")
    attempts = Path(os.environ["ATTEMPTS"])
    with attempts.open("a") as stream:
        print("begun", file=stream)
    number = len(attempts.read_text().splitlines())
    if os.environ["CUT"] == str(number):
        threading.Timer(0.5, node._client.get_transport().sock.shutdown, [socket.SHUT_RDWR]).start()
    node.run("sleep 3")
""",
    "crooked.py": "import no_such_module\n\ndef test_use(node):\n    pass\n",
    "empty.py": "def use(node):\n    pass\n",
}
# an existing suite: it knows nothing but its variables, and leaves JUnit
SUITE = """#!/bin/sh
set -eu
set -- "$1" "$2" $MASTER
version=$(ssh -i "$5" -p "$4" -o UserKnownHostsFile="$6" -o StrictHostKeyChecking=yes -o BatchMode=yes "root@$3" \\
    "dpkg-query -W -f '\\${Package}=\\${Version}' ${PACKAGES%%=*}")
echo "found $version"
[ "$version" = "$PACKAGES" ] && failure= || failure="<failure message='it is $version'/>"
echo "<testsuite><testcase classname='suite.nodes' name='test_$1' time='1.5'>$failure</testcase></testsuite>" >"$2"
"""
# a package that does to its machine what it is told
PROGRAM = """#!/bin/sh
case ${1:-} in
    halt) systemctl poweroff -ff ;;
    deaf) systemctl stop ssh; pkill sshd ;;
    *) echo small ;;
esac
"""
TESTS = """
Tests: good
Depends: @

Tests: upstream
Depends: @, hello
"""
BAD_TESTS = """
Tests: good, bad
Depends: @

Tests: online
Depends: @
Restrictions: needs-internet
"""
SECOND = """
Package: lz4-other
Architecture: all
Conflicts: lz4
Depends: ${misc:Depends}
Description: small package for tests that excludes the other one
 It holds nothing.
"""


def shell(text: str) -> str:
    return f"#!/bin/sh\nset -e\n{text}\n"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A configuration with scenarios."""
    made = trees.config(tmp_path_factory.mktemp("systest"))
    trees.write(made.directory, {f"scenarios/{name}": text for name, text in SCENARIOS.items()})
    embedded = (EMBEDDED / "scenarios" / "test_package.py").read_text()
    trees.write(made.directory, {"scenarios/test_package.py": embedded, "environments/lab.yaml": ENVIRONMENT})
    trees.write(made.directory, {"suites/run.sh": SUITE})
    return made


@pytest.fixture(scope="module")
def published(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Build a package and publish it to a test repository; return the URL of its record."""

    def build(target: str, run: str, name: str, files: dict[str, str]) -> str:
        place = tmp_path_factory.mktemp(run)
        trees.commit(place / name, files)
        (config.state / "changes" / name).unlink(missing_ok=True)
        given = trees.local(config, place / name)
        made = compile(config, target, given, place / "artifacts", OWN)
        record = publish(config, target, given.change(config), made.key, run, place / "artifacts")
        return f"{record.url}repository.json"

    return build


@pytest.fixture(scope="module")
def small(published) -> str:
    """A DEB that does to its machine what it is told, also in a test of its own."""
    control = "Tests: halt\nDepends: @\nRestrictions: needs-root\n"
    return published(
        DEB,
        "small",
        "small",
        trees.deb()
        | {"small": PROGRAM, "debian/tests/control": control, "debian/tests/halt": shell("small halt; sleep 60")},
    )


def run_job(
    config: Config, target: str, artifacts: Path, own: BuildRef | None = None, **parameters: str
) -> tuple[Systest, Exception | None]:
    """Run the job in the environment `lab`; return its record and how it failed."""
    artifacts.mkdir(exist_ok=True)
    failure = None
    try:
        systest(config, target, Parameters.read({"ENVIRONMENT": "lab", **parameters}), artifacts, own)
    except (PackageError, InfrastructureError, RequestError) as error:
        failure = error
    assert (artifacts / "systest.json").exists(), failure
    return Systest.read(artifacts / "systest.json"), failure


def results(record: Systest) -> dict[str, str]:
    return {f"{outcome.scenario}: {outcome.test}": outcome.result for outcome in record.outcomes}


def find(record: Systest, test: str) -> ScenarioOutcome:
    return next(outcome for outcome in record.outcomes if outcome.test == test)


@pytest.fixture(scope="module")
def good(config: Config, published, tmp_path_factory) -> tuple[Systest, Exception | None, Path]:
    """A DEB of a lower version than machines have, with a package that excludes it, and with tests of its own."""
    files = trees.deb("lz4", version="0.1-1")
    files["debian/control"] += SECOND
    # the upstream has it as `any`; its conffile is changed by the embedded scenario
    files["debian/lz4.install"] = "lz4 usr/bin\nlz4.conf etc\n"
    files["lz4.conf"] = "a = 1\n"
    files["debian/lz4.lz4.service"] = (
        "[Service]\nExecStart=/bin/sleep infinity\n[Install]\nWantedBy=multi-user.target\n"
    )
    files["debian/rules"] += "\noverride_dh_installsystemd:\n\tdh_installsystemd --name=lz4\n"
    files["debian/tests/control"] = TESTS.replace("@", "lz4")
    files["debian/tests/good"] = shell('[ "$(lz4)" = small ]; [ "$(id -u)" != 0 ]')
    files["debian/tests/upstream"] = shell("hello")
    url = published(DEB, "lz4", "lz4", files)
    artifacts = tmp_path_factory.mktemp("good")
    given = {"REPOSITORIES": url, "SCENARIOS": "package all autopkgtest"}
    return *run_job(config, DEB, artifacts, **given), artifacts


def test_a_deb_below_the_machines_own_passes_by_scenarios_and_by_its_own_tests(good):
    record, failure, _ = good
    assert failure is None
    assert results(record) == {
        "install: together": "passed",
        "install: lz4-other": "skipped",
        "package: test_its_files_are_as_it_ships_them[lz4]": "passed",
        "package: test_its_services_come_back_from_a_restart[lz4]": "passed",
        "package: test_installed_again_it_keeps_changed_configuration_and_its_services[lz4]": "passed",
        "package: test_the_system_is_whole": "passed",
        "all: test_nodes: test_files": "passed",
        "all: test_nodes: test_status_and_output": "passed",
        "all: test_nodes: test_nobody_else_may_log_in": "passed",
        "all: test_versions: test_exact[lz4]": "passed",
        "autopkgtest: lz4: good": "passed",
        "autopkgtest: lz4: upstream": "passed",
    }


def test_a_package_that_excludes_others_is_left_out_and_said(good):
    assert find(good[0], "lz4-other").message == "left out, since it excludes others of the packages under test"


def test_the_record_has_what_a_repetition_needs(good):
    record = good[0]
    assert record.environment == "lab"
    assert record.snapshot.startswith(f"{DEB}/")
    assert record.parameters["SCENARIOS"] == "package all autopkgtest"
    assert {package.name for package in record.packages} == {"lz4", "lz4-other"}


def test_all_logs_are_kept_without_what_a_terminal_obeys(good):
    logs = good[2] / "logs"
    for name in ("", "autopkgtest-lz4/"):
        assert (logs / f"{name}console.log").exists()
        assert "systemd" in (logs / f"{name}journal.log").read_text()
        assert "DOWNGRADED" in (logs / f"{name}apt.log").read_text()
    assert "lz4.service" in (logs / "package.log").read_text()
    assert re.search(r"^\S+Z red$", (logs / "all.log").read_text(), re.MULTILINE)
    assert "good                 PASS" in (logs / "autopkgtest-lz4" / "autopkgtest.log").read_text()
    for path in logs.rglob("*.log"):
        assert re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", path.read_bytes()) is None, path
    assert {outcome.log for outcome in good[0].outcomes} <= {
        str(path.relative_to(good[2])) for path in logs.rglob("*.log")
    }


def test_junit_has_a_suite_a_scenario(good):
    suites = {suite.get("name"): suite for suite in ET.parse(good[2] / "junit" / "systest.xml").getroot()}
    assert {
        name: (suite.get("tests"), suite.get("failures"), suite.get("skipped")) for name, suite in suites.items()
    } == {
        f"systest-{DEB}-install": ("2", "0", "1"),
        f"systest-{DEB}-package": ("4", "0", "0"),
        f"systest-{DEB}-all": ("4", "0", "0"),
        f"systest-{DEB}-autopkgtest": ("2", "0", "0"),
    }


def test_what_passed_is_not_run_once_more_unless_something_of_it_changes(config, small, tmp_path, monkeypatch):
    ran = []

    def run(what, now: dict) -> Systest:
        ran.append(what.name)
        record = Systest(target=DEB, environment=what.name, snapshot="one", packages=(), outcomes=(), **now)
        record.write(what.artifacts / "systest.json")
        return record

    monkeypatch.setattr("pkgci.systest._run_scenarios", run)

    def runs(**changed: str) -> bool:
        before = len(ran)
        given = {
            "REPOSITORIES": small,
            "SCENARIOS": "all",
            "PARENT": "build-x/1",
            "CORRELATION": str(before),
            **changed,
        }
        record, failure = run_job(config, DEB, tmp_path / str(before), **given)
        assert failure is None
        # what a repetition needs is of this run
        assert record.parameters["CORRELATION"] == given["CORRELATION"]
        assert (len(ran) == before) == (record.passed_before is not None)
        return len(ran) > before

    assert [runs(), runs(), runs(AGAIN="true"), runs()] == [True, False, True, False]
    assert [runs(SCENARIOS="all package"), runs()] == [True, False]
    assert runs(SCENARIOS="all autopkgtest")
    scenario = next(config.directory.glob("scenarios/all/*.py"))
    scenario.write_text(f"{scenario.read_text()}# changed\n")
    assert [runs(), runs()] == [True, False]
    (config.directory / "conftest.py").write_text("# above the scenarios\n")
    assert runs()


def test_a_failing_scenario_and_failing_tests_of_a_package_are_its_fault(config, published, tmp_path):
    files = trees.deb("bad") | {"debian/tests/control": BAD_TESTS}
    files |= {"debian/tests/good": shell("bad"), "debian/tests/bad": shell("echo out; echo why >&2; exit 3")}
    files["debian/tests/online"] = shell("exit 1")
    url = published(DEB, "bad", "bad", files)
    given = {"REPOSITORIES": url, "SCENARIOS": "failing autopkgtest"}
    record, failure = run_job(config, DEB, tmp_path / "artifacts", **given)
    assert isinstance(failure, PackageError)
    assert str(failure).startswith("system test: failing: test_bad: failed, ")
    assert str(failure).endswith("(and 1 more)")
    assert results(record) == {
        "install: together": "passed",
        "failing: test_good": "passed",
        "failing: test_bad": "failed",
        "failing: test_skipped": "skipped",
        "autopkgtest: bad: good": "passed",
        "autopkgtest: bad: bad": "failed",
        "autopkgtest: bad: online": "skipped",
    }
    assert "elsewhere" in find(record, "test_bad").message
    assert "3" in find(record, "bad: bad").message
    assert "elsewhere" in (tmp_path / "artifacts" / "logs" / "failing.log").read_text()


def test_the_machines_of_a_failed_test_are_kept_and_restored_as_it_left_them(config, small, tmp_path):
    own = BuildRef(f"systest-{DEB}", 7)
    given = Parameters.read(
        {"ENVIRONMENT": "lab", "REPOSITORIES": small, "SCENARIOS": "marking", "PARENT": f"build-{DEB}/3"}
    )
    place = tmp_path / "artifacts"
    place.mkdir()
    with pytest.raises(PackageError, match="test_mark"):
        systest(config, DEB, given, place, own)
    directory, run = kept_runs.runs(config).find(str(own))
    assert (str(run), run.parent, run.passed, list(run.sets)) == (
        str(own),
        f"build-{DEB}/3",
        False,
        [kept_runs.MACHINES],
    )
    ask = "cat /root/mark; systemctl is-active mark; dpkg-query -W -f '${Version}' lz4"
    for _ in range(2):
        # what is done there changes nothing of what is kept
        with kept_runs.restored(config, directory, run, kept_runs.MACHINES, at_start=False) as machines:
            said = machines["node"].run(f"{ask}; rm /root/mark; systemctl stop mark", timeout=60).text()
            assert said.splitlines()[:2] == ["mark", "active"]
    installed = said.splitlines()[2]
    with kept_runs.restored(config, directory, run, kept_runs.MACHINES, at_start=True) as machines:
        now = machines["node"].run(f"{ask} || true", timeout=60).text()
        assert "No such file" in now
        assert installed not in now
    command = [Path(sys.executable).with_name("pkgci"), "debug", f"build-{DEB}/3"]
    environment = {**os.environ, "PKGCI_CONFIG": str(config.directory)}
    session = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert session.stdout is not None
        assert session.stdout.readline().startswith(f"The machines of {own} in environment ")
        login = session.stdout.readline().strip()
        done = subprocess.run([*shlex.split(login), "cat", "/root/mark"], capture_output=True, text=True, check=False)
        assert done.stdout == "mark\n", done.stderr
        session.send_signal(signal.SIGINT)
        _, wrong = session.communicate(timeout=30)
    finally:
        session.kill()
        session.wait()
    assert (session.returncode, "Traceback" in wrong) == (0, False), wrong
    words = shlex.split(login)
    with socket.socket() as client:
        assert client.connect_ex(("127.0.0.1", int(words[words.index("-p") + 1]))), "its machine still runs"


def test_an_rpm_below_another_repositorys_passes_at_its_exact_version(config, published, tmp_path):
    higher = published(RPM, "higher", "small", trees.rpm(version="2.0"))
    lower = published(RPM, "lower", "small", trees.rpm(version="1.0"))
    key = re.search(r'"key": "([0-9a-f]{64})"', (_directory(config, lower) / "repository.json").read_text())[1]
    given = {"REPOSITORIES": f"{higher} {lower}", "BUILD_KEY": key, "SCENARIOS": "package all"}
    record, failure = run_job(config, RPM, tmp_path / "artifacts", **given)
    assert results(record)["all: test_versions: test_exact[small]"] == "passed"
    assert [package.version[:4] for package in record.packages] == ["1.0-"]
    # only this one counts repositories
    assert [name for name, result in results(record).items() if result == "failed"] == ["all: test_nodes: test_files"]
    assert isinstance(failure, PackageError)
    assert "small" in (tmp_path / "artifacts" / "logs" / "dnf.log").read_text()


def _directory(config: Config, url: str) -> Path:
    return config.data / "repositories" / url.removeprefix(config.settings.url).rpartition("/")[0]


@pytest.mark.parametrize(
    ("scenario", "said"), [("halting", "the machine was halted from within"), ("deaf", "no ssh to the machine")]
)
def test_a_machine_that_the_package_makes_unusable_is_its_fault_and_kept_as_it_is(
    config, small, tmp_path, monkeypatch, caplog, scenario, said
):
    own = BuildRef(f"systest-{DEB}", {"halting": 8, "deaf": 9}[scenario])
    given = {"REPOSITORIES": small, "SCENARIOS": f"{scenario} failing"}
    record, failure = run_job(config, DEB, tmp_path / "artifacts", own, **given)
    assert isinstance(failure, PackageError)
    assert str(failure).startswith(f"system test: {scenario}: the machine: failed")
    assert said in str(failure)
    # the machine is gone: no further scenario has a chance
    assert "failing" not in {outcome.scenario for outcome in record.outcomes}
    directory, run = kept_runs.runs(config).find(str(own))
    kept = kept_runs.restored(config, directory, run, kept_runs.MACHINES, at_start=False)
    if scenario == "halting":
        with (
            pytest.raises(InfrastructureError, match="all machines had ended when they were kept; their disks are in"),
            kept,
        ):
            pass
        return
    monkeypatch.setattr("pkgci.vm.snapshot.RESTORE_SECONDS", 1)
    with kept as machines:
        assert list(machines) == ["node"]
    assert "no ssh to the machine within 1 s" in caplog.text


def test_a_machine_that_the_packages_own_tests_halt_is_its_fault(config, small, tmp_path):
    record, failure = run_job(config, DEB, tmp_path / "artifacts", REPOSITORIES=small, SCENARIOS="autopkgtest")
    assert isinstance(failure, PackageError)
    assert "the machine was halted from within" in str(failure)
    assert results(record)["autopkgtest: the machine"] == "failed"


@pytest.mark.parametrize(
    ("scenario", "said"),
    [("crooked", "cannot be run: ModuleNotFoundError: No module named 'no_such_module'"), ("empty", "has no test")],
)
def test_a_scenario_that_cannot_be_run_is_not_the_packages_fault(config, small, tmp_path, scenario, said):
    record, failure = run_job(config, DEB, tmp_path / "artifacts", REPOSITORIES=small, SCENARIOS=scenario)
    assert isinstance(failure, RequestError)
    assert str(failure) == f"scenario {scenario}: {config.directory}/scenarios/{scenario}.py {said}"
    assert results(record) == {"install: together": "passed"}
    assert (tmp_path / "artifacts" / "logs" / f"{scenario}.log").exists()


def test_a_package_that_does_not_install_fails(config, published, tmp_path):
    files = trees.deb("needy")
    files["debian/control"] = files["debian/control"].replace("${misc:Depends}", "${misc:Depends}, no-such-package")
    url = published(DEB, "needy", "needy", files)
    record, failure = run_job(config, DEB, tmp_path / "artifacts", REPOSITORIES=url)
    assert isinstance(failure, PackageError)
    assert "needy : Depends: no-such-package but it is not installable" in str(failure)
    assert results(record) == {"install: together": "failed"}


def test_groups_of_scenarios_and_suites_are_run_and_a_test_ends_at_its_limit(config, small, tmp_path):
    given = {"REPOSITORIES": small, "SCENARIOS": "suite:ha planned:ha"}
    record, failure = run_job(config, DEB, tmp_path / "artifacts", **given)
    assert isinstance(failure, PackageError)
    assert results(record) == {
        "install: together": "passed",
        "planned: test_too_long": "failed",
        "planned: test_environment": "passed",
        "suite:ha: nodes: test_ha": "passed",
    }
    assert "Timeout (>2.0s)" in find(record, "test_too_long").message
    logs = tmp_path / "artifacts" / "logs"
    assert re.search(r"^\S+Z found small=", (logs / "suite:ha.log").read_text(), re.MULTILINE)
    assert "an error of it" in (logs / "product.log").read_text()
    versions = (logs / "versions.txt").read_text()
    assert re.match(r"QEMU emulator .*\nLinux lab .*\n", versions) or re.match(r"QEMU emulator .*\nLinux ", versions)
    assert re.search(r"^small 1\.0", versions, re.MULTILINE)


def own_machines() -> list[int]:
    """Return the machines that this process runs."""
    children = [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    return [pid for pid in children if "qemu-system" in os.readlink(f"/proc/{pid}/exe")]


def test_a_connection_that_is_cut_while_packages_are_installed_is_not_their_fault(config, small, tmp_path, monkeypatch):
    install, attempts = job._install, []

    def cut(run, machine, action, *seconds):
        attempts.append(action)
        if len(attempts) == 1:
            line = machine._client.get_transport().sock
            threading.Timer(0.3, line.shutdown, [socket.SHUT_RDWR]).start()
        return install(run, machine, action, *seconds)

    monkeypatch.setattr(job, "_install", cut)
    record, failure = run_job(config, DEB, tmp_path / "artifacts", REPOSITORIES=small, SCENARIOS="planned:slow")
    assert failure is None
    assert record.retried.startswith(f"{Fault.CUT.value}: while the packages were installed: ")
    assert results(record) == {"install: together": "passed", "planned: test_environment": "passed"}


@pytest.mark.parametrize(
    ("kills", "cut", "said"), [(1, 0, "QEMU was killed"), (2, 0, "QEMU was killed"), (0, 1, "was cut")]
)
def test_a_listed_fault_is_tried_again_once_and_reported(config, small, tmp_path, monkeypatch, kills, cut, said):
    attempts = tmp_path / "attempts"
    attempts.touch()
    monkeypatch.setenv("ATTEMPTS", str(attempts))
    monkeypatch.setenv("CUT", str(cut))
    ended = threading.Event()

    def kill() -> None:
        for number in range(kills):
            while len(attempts.read_text().splitlines()) <= number and not ended.wait(0.05):
                pass
            for pid in own_machines():
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        own = BuildRef(f"systest-{DEB}", 20 + kills)
        record, failure = run_job(config, DEB, tmp_path / "artifacts", own, REPOSITORIES=small, SCENARIOS="faulty")
    finally:
        ended.set()
        killer.join()
    # of a test that passed at last, no machines are kept
    assert any(str(run) == str(own) for _, run in kept_runs.runs(config).all()) == (kills == 2)
    assert said in record.retried
    assert attempts.read_text() == "begun\n" * 2
    first = tmp_path / "artifacts" / "logs-of-the-first-attempt"
    assert {"console.log", "faulty.log"} <= {path.name for path in first.iterdir()}
    assert (tmp_path / "artifacts" / "logs" / "console.log").exists()
    if kills == 2:
        assert isinstance(failure, TriedTwiceError)
        assert failure.exit == 3
        return
    assert failure is None
    assert results(record) == {"install: together": "passed", "faulty: test_use": "passed"}


@pytest.fixture(scope="module")
def waiting(published) -> str:
    """A DEB with a test of its own that has no end."""
    files = trees.deb("waiting") | {"debian/tests/control": f"Tests: {WAIT}\nDepends: @\n"}
    return published(DEB, "waiting", "waiting", files | {f"debian/tests/{WAIT}": shell("sleep 1000")})


@pytest.mark.parametrize(
    ("scenario", "log", "said"),
    [
        ("endless", "logs/endless.log", r"(?m)^\S+Z lab: echo begun"),
        ("autopkgtest", "logs/autopkgtest-waiting/autopkgtest.log", WAIT),
    ],
)
def test_an_abort_leaves_logs_and_no_process_within_five_seconds(config, waiting, scenario, log, said):
    engine = LocalEngine(config)
    given = {"REPOSITORIES": waiting, "ENVIRONMENT": "lab", "SCENARIOS": scenario}
    ref = engine.start(f"systest-{DEB}", given)
    # pytest names its file, ssh in the sandbox the test that it runs
    marker = {"endless": f"{config.directory}/scenarios/endless.py", "autopkgtest": f"debian/tests/{WAIT}"}[scenario]
    until = time.monotonic() + 300
    written = engine.directory(ref) / "workspace" / "artifacts" / log
    while not (processes.with_marker(marker) and written.exists() and re.search(said, written.read_text())):
        assert time.monotonic() < until
        assert engine.state(ref) in ("queued", "running")
        time.sleep(0.2)
    cookie = engine.record(ref).cookie
    assert any(b"qemu-system" in command for command in commands_of(cookie))
    began = time.monotonic()
    engine.abort(ref)
    assert engine.wait(ref, 60) == "ABORTED"
    assert time.monotonic() - began < 5
    assert commands_of(cookie) == []
    assert processes.with_marker(marker) == []
    artifacts = engine.directory(ref) / "archive" / "artifacts"
    assert Result.read(artifacts / "result.json").fault == "aborted"
    [console] = artifacts.glob("logs/**/console.log")
    check_followed(console.parent)
    assert re.search(said, (artifacts / log).read_text())
    # with their index
    assert f">{log}</a>" in (artifacts / "index.html").read_text()


def check_followed(logs: Path) -> None:
    """Check that a machine's logs are there though nobody fetched them at the end."""
    assert "systemd" in (logs / "journal.log").read_text()
    assert "Setting up waiting" in (logs / "apt.log").read_text()
    versions = (logs / "versions.txt").read_text()
    assert versions.startswith("QEMU ")
    assert "\ndpkg " in versions


def test_a_crash_of_the_job_leaves_all_logs_as_they_were_then(config, waiting):
    engine = LocalEngine(config)
    ref = engine.start(f"systest-{DEB}", {"REPOSITORIES": waiting, "ENVIRONMENT": "lab", "SCENARIOS": "endless"})
    marker = f"{config.directory}/scenarios/endless.py"
    # what the scenario said is on its way to the file at once
    until = time.monotonic() + 300
    log = engine.directory(ref) / "workspace" / "artifacts" / "logs" / "endless.log"
    while not (log.exists() and "echo begun" in log.read_text()):
        assert time.monotonic() < until
        assert engine.state(ref) in ("queued", "running")
        time.sleep(0.2)
    (own,) = [int(path.name) for path in Path("/proc").glob("[0-9]*") if is_job(path, engine.record(ref).cookie)]
    os.kill(own, signal.SIGKILL)
    assert engine.wait(ref, 60) == "FAILURE"
    assert processes.with_marker(marker) == []
    assert [command for command in commands_of(engine.record(ref).cookie) if b"qemu-system" in command] == []
    artifacts = engine.directory(ref) / "archive" / "artifacts"
    assert (artifacts / "logs" / "console.log").exists()
    check_followed(artifacts / "logs")
    assert "echo begun" in (artifacts / "logs" / "endless.log").read_text()


def is_job(path: Path, cookie: str) -> bool:
    """Return whether a process is `pkgci systest` of a build."""
    try:
        command = (path / "cmdline").read_bytes().split(b"\0")
        return cookie.encode() in (path / "environ").read_bytes() and b"systest" in command and b"pkgci" in command[1]
    except (OSError, IndexError):
        return False


def commands_of(cookie: str) -> list[bytes]:
    """Return the command lines of the processes of a build, without those in a sandbox."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if cookie.encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_bytes())
        except OSError:
            continue
    return found
