"""The system test: the packages of a build together in an environment, and scenarios against them.

The operator's scenarios are pytest files of the configuration directory; they run in a process of this job, and reach the
machine by ssh. A source package's own tests (DEB: `debian/tests`) are one scenario more, `autopkgtest`, in a restored
machine of their own: that tool, see autopkgtest(1), reads what a package says of its tests, and so runs in the sandbox.
Each test is an outcome; what fails is not tried again.
"""

import hashlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pkgci import passed, repository, runs, web
from pkgci.artifacts import Package, Repository, RepositoryPackage, ScenarioOutcome, Systest
from pkgci.change import Parameters
from pkgci.command import supervised
from pkgci.config import Config, Environment, Target
from pkgci.engines.base import BuildRef
from pkgci.errors import Aborted, InfrastructureError, PackageError, RequestError
from pkgci.handover import Handover, NodeAccess, TargetUnderTest
from pkgci.lazy import Lazy
from pkgci.locks import locked
from pkgci.roots import tools_root
from pkgci.sandbox import Files, contained, execute
from pkgci.server import serve
from pkgci.text import lines, printable
from pkgci.vm import guest
from pkgci.vm.machine import Machine
from pkgci.vm.remote import GuestError
from pkgci.vm.snapshot import Snapshot, keep

deb822, pytest = Lazy("debian.deb822"), Lazy("pytest")
log = logging.getLogger(__name__)

INSTALL = "install"
# the test that fails when a machine cannot be used any more
MACHINE = "the machine"
OWN_TESTS = "autopkgtest"
# of the configuration directory, all that is no scenario's
CONFIGURATION = ("config.yaml", "environments/*.yaml", "packages/*.yaml", "releases/*.yaml", "targets/*.yaml")
OWN_TESTS_SCRIPT = Path(__file__).with_name("autopkgtest.sh")
# the status of the guest's script
UNREADABLE = 75
INSTALL_SECONDS = 900
LOG_SECONDS = 60
LOGIN_SECONDS = 30
RESTARTED_SECONDS = 5
FINDINGS_BYTES = 1 << 18
LOG_BYTES = 16 << 20
INDEX_BYTES = 64 << 20
SOURCE_BYTES = 2 << 30
# what the guest's package manager said, of these and of all sessions
LOGS = {
    "deb": ("/var/log/apt/history.log", "/var/log/apt/term.log", "/var/log/dpkg.log"),
    "rpm": ("/var/log/dnf.log", "/var/log/dnf.rpm.log"),
}
# autopkgtest(1), EXIT STATUS: passed, also with tests skipped or without any; failed, or broken by the package
PASSED, FAILED = (0, 2, 8), (4, 6, 12, 14)
SUMMARY = re.compile(r"(\S+)\s+(PASS|FAIL|SKIP|FLAKY)\b\s*(.*)")
# What the machine sees of the upstream in each attempt, and what autopkgtest says when another one is needed. apt needs
# many seconds to read large lists where it is emulated, and most tests need nothing of them.
UPSTREAM = {
    "none": (
        "Test dependencies are unsatisfiable",
        "the tests need more than the test repositories have: the upstream is asked",
    ),
    "all": (" 404 ", "the upstream has moved since the snapshot was made: its lists are loaded again"),
    "moved": None,
}
RESULTS = {"PASS": "passed", "FAIL": "failed", "SKIP": "skipped", "FLAKY": "skipped"}


@dataclass(frozen=True)
class _Run:
    """What a system test is made of."""

    config: Config
    target_name: str
    target: Target
    home: Path
    environment: Environment
    scenarios: tuple[str, ...]
    snapshot: Snapshot
    records: tuple[Repository, ...]
    tested: tuple[RepositoryPackage, ...]
    artifacts: Path
    # where restored machines are left, if they are to be kept
    room: Path | None = None
    kept: dict[str, str] = field(default_factory=dict)
    outcomes: list[ScenarioOutcome] = field(default_factory=list)

    @cached_property
    def own_tests_in(self) -> Snapshot:
        """What a source package's own tests are run in: the environment's machine, of several a plain one."""
        alone = len(self.environment.nodes) == 1
        return self.snapshot if alone else guest.plain(self.config, self.target_name)

    def note(self, *outcomes: ScenarioOutcome) -> None:
        """Add outcomes, and say them."""
        for outcome in outcomes:
            self.outcomes.append(outcome)
            log.info("%s", _line(outcome))

    def logs(self, node: str) -> str:
        """Return where the logs of a machine of the environment are, below the artifacts: the only one's at the top."""
        return "logs" if len(self.environment.nodes) == 1 else f"logs/{node}"

    @contextmanager
    def restored(self, snapshot: Snapshot, name: str, logs: Sequence[str]) -> Iterator[tuple[Machine, ...]]:
        """Restore machines, with their package sources.

        Afterwards all logs of each are in its directory of `logs`, and the machines are kept as the set `name`.
        """
        places = [self.artifacts / one for one in logs]
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
        proxy = guest.proxy(self.config, self.target, self.records)
        consoles = [place / "console.log" for place in places]
        try:
            with snapshot.restored(self.config, proxy, consoles) as machines:
                for machine in machines:
                    machine.put(guest.settings(self.target, self.records, self.tested))
                try:
                    yield machines
                finally:
                    # whoever aborts waits
                    if not isinstance(sys.exception(), Aborted):
                        for machine, place in zip(machines, places, strict=True):
                            self._keep_logs(machine, place)
                        self._keep(snapshot, name, machines)
        finally:
            for console in consoles:
                if console.exists():
                    _keep(console, console.read_bytes())

    def _keep(self, snapshot: Snapshot, name: str, machines: Sequence[Machine]) -> None:
        failed = sys.exception() is not None or any(one.result == "failed" for one in self.outcomes)
        if self.room is None or not (failed or self.config.settings.keep_runs == "all"):
            return
        # a source package's own tests have several attempts: what counts is the last one
        self.kept.pop(name, None)
        shutil.rmtree(self.room / name, ignore_errors=True)
        try:
            keep(snapshot, machines, self.room / name)
        except (InfrastructureError, OSError) as error:
            # what was tested counts all the same
            log.warning("its machines cannot be kept: %s", error)
            shutil.rmtree(self.room / name, ignore_errors=True)
        else:
            self.kept[name] = snapshot.id

    def _keep_logs(self, machine: Machine, logs: Path) -> None:
        manager = {"deb": "apt.log", "rpm": "dnf.log"}[self.target.format]
        everything = ("/run/pkgci/log", *LOGS[self.target.format])
        with suppress(InfrastructureError):
            try:
                machine.run("true", timeout=LOG_SECONDS)
            except GuestError:
                # it may have been restarted
                machine.connect(RESTARTED_SECONDS)
        for name, script, arguments in (
            ("journal.log", 'journalctl --no-pager -o short-precise | tail -c "$1"', ()),
            (manager, 'size=$1; shift; tail -c "$size" "$@" 2>/dev/null || true', everything),
        ):
            try:
                size = str(LOG_BYTES // max(1, len(arguments)))
                said = machine.run(script, size, *arguments, timeout=LOG_SECONDS, limit=2 * LOG_BYTES).output
            except GuestError as error:
                said = f"the log is lost: {error}\n".encode()
            _keep(logs / name, said)


def prepare_environment(config: Config, name: str) -> str:
    """Make the snapshots of an environment, for all targets that releases use it for, where needed.

    Returns:
        Which snapshots are there now, in a few words.

    Raises:
        RequestError: the environment is unknown.
        InfrastructureError: one cannot be made; the former one stays as it was.
    """
    config.environment(name)
    targets = [target for target in config.names("targets") if name in _environments(config, target)]
    if not targets:
        raise RequestError(f"no release uses environment {name}; `environment` in a release names it")
    made = [guest.environment(config, name, target, renew=True) for target in targets]
    return ", ".join(f"{one.id} of {one.manifest.created:%Y-%m-%d %H:%M}" for one in made)


def _environments(config: Config, target_name: str) -> list[str]:
    """Return the environments that system tests of a target run on."""
    releases = [config.release(name) for name in config.names("releases")]
    served = [release for release in releases if target_name in release.targets]
    names = [release.environments.get(target_name, release.environment) for release in served]
    return list(dict.fromkeys(names or ["default"]))


def prepare(config: Config, target_name: str) -> None:
    """Make the snapshots of the environments that system tests of a target run on, where needed.

    Raises:
        RequestError: an environment or the target is unknown.
        InfrastructureError: one cannot be made.
    """
    for name in _environments(config, target_name):
        guest.environment(config, name, target_name)


def systest(
    config: Config, target_name: str, parameters: Parameters, artifacts: Path, own: BuildRef | None = None
) -> Systest:
    """Run the system test, unless the same passed before; it leaves `systest.json`, `junit/systest.xml` and `logs/`.

    Args:
        config: the configuration.
        target_name: the target.
        parameters: REPOSITORIES, and where given BUILD_KEY, ENVIRONMENT, SCENARIOS, ZUUL_BRANCH; AGAIN and PARENT say
            whether it is run in any case.
        artifacts: an existing directory.
        own: the build that this is, by which a person finds its machines again; without it none are kept.

    Returns:
        What is in `systest.json`.

    Raises:
        PackageError: a test fails; the records are written, as they are after every error that ends the tests.
        RequestError: a parameter is wrong, or a scenario cannot be run.
        InfrastructureError: the machines are at fault.
    """
    target = config.target(target_name)
    name, home, environment = _environment(config, target_name, parameters)
    scenarios = _scenarios(name, environment, target, parameters.get("SCENARIOS").split())
    _check_scenarios(name, home, environment, scenarios)
    with serve(config):
        records = repository.read(config, target_name, parameters.repositories(config))
        tested = tuple(repository.under_test(records, parameters.get("BUILD_KEY")))
        snapshot = guest.environment(config, name, target_name)
        log.info("environment %s: snapshot %s of %s", name, snapshot.id, f"{snapshot.manifest.created:%Y-%m-%d %H:%M}")
        run = _Run(config, target_name, target, home, environment, scenarios, snapshot, records, tested, artifacts)
        # what belongs to this run also when the tests ran in another one
        now = {
            "repositories": tuple(record.url + repository.RECORD for record in records),
            "parameters": dict(parameters.values),
        }
        # it is restored more than once, and may be superseded meanwhile
        with locked(snapshot.directory, shared=True):
            return passed.once(
                config,
                artifacts / "systest.json",
                Systest,
                lambda: _decisive(run),
                lambda: _keeping(run, name, now, own),
                repeat=parameters.repeat,
                **now,
            )


def _decisive(run: _Run) -> list:
    """Return all that decides the result, as of JSON."""
    environment = run.environment.model_dump(mode="json")
    own = []
    if OWN_TESTS in run.scenarios:
        root = tools_root(run.config, run.target_name)
        own = [root.id, run.own_tests_in.id, run.config.settings.limits.model_dump(mode="json")]
    # they can import and read all that lies there; what the configuration says of this test is told below
    scenarios = passed.files(run.home, CONFIGURATION) if set(run.scenarios) != {OWN_TESTS} else []
    machine = [run.target.model_dump(mode="json"), run.snapshot.id, guest.upstream_digest(run.target)]
    return [*machine, environment, run.scenarios, scenarios, own, repository.decisive(run.records, run.tested)]


def _keeping(run: _Run, name: str, now: Mapping[str, Any], own: BuildRef | None) -> Systest:
    """Run all scenarios, and keep the machines, for `pkgci debug`, if `own` is given.

    Raises:
        InfrastructureError: there is no space for the machines.
    """
    settings = run.config.settings
    if own is None or settings.keep_runs == "none":
        return _run_scenarios(run, name, now)
    kept = runs.runs(run.config)
    with kept.room(datetime.now(UTC)) as room:
        # what is too old has gone by now
        runs.check_space(run.config, run.snapshot.manifest)
        passed = False
        try:
            made = _run_scenarios(replace(run, room=room), name, now)
            passed = True
        finally:
            if run.kept:
                ended = datetime.now(UTC)
                record = runs.KeptRun(
                    job=own.job,
                    number=own.number,
                    parent=now["parameters"].get("PARENT", ""),
                    target=run.target_name,
                    ended=ended,
                    environment=name,
                    passed=passed,
                    sets=run.kept,
                )
                try:
                    kept.keep(room, record, ended)
                except OSError as error:
                    # what was tested counts all the same
                    log.warning("its machines cannot be kept: %s", error)
                else:
                    log.info("its machines are kept for %d days: pkgci debug %s", settings.run_days, record)
        return made


def _run_scenarios(run: _Run, name: str, now: Mapping[str, Any]) -> Systest:
    """Run all scenarios in the environment `name`, and write the records however that ends."""
    try:
        if set(run.scenarios) != {OWN_TESTS}:
            _operators_scenarios(run)
        if OWN_TESTS in run.scenarios:
            for record in run.records:
                for source in dict.fromkeys(package.source for package in run.tested if package in record.packages):
                    _own_tests(run, record, source)
    finally:
        record = Systest(
            target=run.target_name,
            environment=name,
            snapshot=run.snapshot.id,
            packages=tuple(Package(**package.model_dump(include=set(Package.model_fields))) for package in run.tested),
            outcomes=tuple(run.outcomes),
            notice=run.target.notice,
            **now,
        )
        record.write(run.artifacts / "systest.json")
        _write_junit(record, run.artifacts / "junit" / "systest.xml")
    failed = [outcome for outcome in run.outcomes if outcome.result == "failed"]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        # the last one of a machine that is gone says so
        first = next((outcome for outcome in failed if outcome.test == MACHINE), failed[0])
        raise PackageError(f"system test: {_line(first)}{more}")
    return record


def summary(record: Systest) -> str:
    """Return in a few words what was tested."""
    passed = sum(outcome.result == "passed" for outcome in record.outcomes)
    skipped = len(record.outcomes) - passed
    return f"{passed} tests passed in environment {record.environment}" + (f", {skipped} skipped" if skipped else "")


def _environment(config: Config, target_name: str, parameters: Parameters) -> tuple[str, Path, Environment]:
    """Return the environment to use, its name, and where its scenarios' paths begin."""
    name = parameters.get("ENVIRONMENT")
    if not name:
        found = config.release_of(parameters.get("ZUUL_BRANCH"))
        name = found[1].environments.get(target_name, found[1].environment) if found else "default"
    home, environment = config.environment(name)
    if environment.targets and target_name not in environment.targets:
        raise RequestError(
            f"environment {name} is made for {', '.join(environment.targets)}, not for {target_name}; "
            "name another one in ENVIRONMENT or in the release"
        )
    return name, home, environment


def _scenarios(name: str, environment: Environment, target: Target, wanted: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the scenarios to run, in the environment's order."""
    known = [*environment.scenarios, *([OWN_TESTS] if target.format == "deb" else [])]
    unknown = [scenario for scenario in wanted if scenario not in known]
    if unknown:
        raise RequestError(
            f"parameter SCENARIOS: {unknown[0]!r} is not in environment {name}, which has: {', '.join(known)}"
        )
    return tuple(scenario for scenario in known if not wanted or scenario in wanted)


def _check_scenarios(name: str, home: Path, environment: Environment, scenarios: Sequence[str]) -> None:
    for scenario in scenarios:
        if scenario != OWN_TESTS and not (home / environment.scenarios[scenario]).exists():
            raise RequestError(
                f"{home}/environments/{name}.yaml: scenario {scenario}: {home / environment.scenarios[scenario]} does not exist"
            )


def _operators_scenarios(run: _Run) -> None:
    """Install the packages together on each machine, and run the operator's scenarios, all in one restored set."""
    names = list(run.environment.nodes)
    with run.restored(run.snapshot, runs.MACHINES, [run.logs(name) for name in names]) as restored:
        machines = dict(zip(names, restored, strict=True))
        installed = _install_everywhere(run, machines)
        if installed is None:
            return
        with _handover(run, machines, installed) as directory:
            for scenario in (name for name in run.scenarios if name != OWN_TESTS):
                outcomes = _scenario(run, scenario, directory)
                run.note(*outcomes)
                if any(outcome.result == "failed" for outcome in outcomes):
                    for name, machine in machines.items():
                        reason = _why_unusable(machine)
                        if reason:
                            run.note(_gone(scenario, name if len(names) > 1 else "", reason, f"logs/{scenario}.log"))
                            return


def _install_everywhere(run: _Run, machines: Mapping[str, Machine]) -> tuple[RepositoryPackage, ...] | None:
    """Install the packages together on all machines at once, and note how that went.

    Returns:
        Those that are in; None when an installation failed.
    """
    file = {"deb": "apt.log", "rpm": "dnf.log"}[run.target.format]
    missing: dict[str, str] = {}
    whole = True
    with ThreadPoolExecutor(len(machines)) as threads:
        try:
            ends = {name: threads.submit(_timed_install, run, machine) for name, machine in machines.items()}
            wait(ends.values())
        except Aborted:
            # nobody waits for what they do
            for machine in machines.values():
                machine.kill()
            raise
    for name, end in ends.items():
        seconds, apart, wrong = end.result()
        on = f" on {name}" if len(machines) > 1 else ""
        outcome = partial(ScenarioOutcome, scenario=INSTALL, log=f"{run.logs(name)}/{file}")
        if wrong:
            whole = False
            run.note(outcome(test=f"together{on}", seconds=seconds, result="failed", message=wrong[0]))
            continue
        run.note(outcome(test=f"together{on}", seconds=seconds, result="passed"))
        for package, reason in apart.items():
            run.note(outcome(test=f"{package}{on}", result="skipped", seconds=0, message=reason))
        missing |= apart
    return tuple(package for package in run.tested if package.name not in missing) if whole else None


def _timed_install(run: _Run, machine: Machine) -> tuple[float, dict[str, str], list[str]]:
    started = time.monotonic()
    apart, wrong = _install(run, machine, "together")
    return round(time.monotonic() - started, 1), apart, wrong


def _install(run: _Run, machine: Machine, action: str) -> tuple[dict[str, str], list[str]]:
    """Install packages under test at their exact versions.

    Args:
        run: the system test.
        machine: the machine.
        action: of the guest's script: `together` for all of them, `replace` for those that are there in another version.

    Returns:
        Those left out since they exclude others, with the reason, and what went wrong.

    Raises:
        InfrastructureError: the machine cannot read the repositories.
    """
    words = [word for package in run.tested for word in (package.name, package.version, package.architecture)]
    try:
        done = machine.run(guest.script(run.target), action, *words, timeout=INSTALL_SECONDS, limit=FINDINGS_BYTES)
    except GuestError as error:
        return {}, [f"while the packages were installed: {error}"]
    if done.status == UNREADABLE:
        raise InfrastructureError("cannot read the repositories in the machine; logs/ has what it said")
    apart: dict[str, str] = {}
    wrong = [f"the installation was ended in the machine, with status {done.status}"] if done.status else []
    for line in done.text().splitlines():
        phase, package, message = [*line.split("\t", 2), "", ""][:3]
        if phase == "apart":
            apart[printable(package)] = printable(message)
        else:
            # also of a line of no form: a package that forges findings harms itself only
            wrong.append(printable(message or line) or "no reason was given")
    return apart, wrong


@contextmanager
def _handover(run: _Run, machines: Mapping[str, Machine], installed: tuple[RepositoryPackage, ...]) -> Iterator[Path]:
    """Yield a directory that is nobody else's, with what scenarios need to reach the machines."""
    handover = Handover(
        target=TargetUnderTest(name=run.target_name, format=run.target.format),
        repositories=tuple(record.url for record in run.records),
        packages=installed,
        nodes={
            name: NodeAccess(
                port=machine.port(), identity=str(machine.access.identity), host_key=machine.access.host_key
            )
            for name, machine in machines.items()
        },
    )
    with tempfile.TemporaryDirectory(prefix="pkgci-") as directory:
        (Path(directory) / "handover.json").touch(0o600)
        (Path(directory) / "handover.json").write_text(handover.model_dump_json(by_alias=True))
        yield Path(directory)


def _scenario(run: _Run, scenario: str, directory: Path) -> list[ScenarioOutcome]:
    """Run one scenario by pytest, to its end or its time limit.

    Raises:
        RequestError: it cannot be run: pytest finds no test, or cannot read one.
    """
    path = run.home / run.environment.scenarios[scenario]
    result, said = directory / f"{scenario}.xml", directory / f"{scenario}.log"
    command = [sys.executable, "-m", "pytest", "-p", "pkgci.scenario", f"--pkgci={directory / 'handover.json'}"]
    command += ["-c", os.devnull, f"--rootdir={run.home}", "-p", "no:cacheprovider", "--color=no", "-v"]
    command += [f"--junitxml={result}", f"--basetemp={directory / scenario}", "-o", "log_cli=true"]
    command += ["-o", "log_cli_level=INFO", "-o", "log_cli_format=%(message)s", str(path)]
    log.info("scenario %s: %s", scenario, path)
    started = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    status = _wait(command, run.home, environment, said, run.environment.scenario_seconds)
    seconds = round(time.monotonic() - started, 1)
    log_name = f"logs/{scenario}.log"
    _keep(run.artifacts / log_name, said.read_bytes())
    if status is None:
        message = f"no end after {run.environment.scenario_seconds} s, its time limit; killed"
        return [
            ScenarioOutcome(
                scenario=scenario, test=path.name, result="failed", seconds=seconds, message=message, log=log_name
            )
        ]
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise RequestError(f"scenario {scenario}: {path} has no test")
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        # the lines that pytest marks say what is wrong in a file
        marked = [line[1:].strip() for line in said.read_text(errors="replace").splitlines() if line.startswith("E  ")]
        reason = printable(marked[-1]) if marked else f"pytest ended with status {status}; see {log_name}"
        raise RequestError(f"scenario {scenario}: {path} cannot be run: {reason}")
    cases = ET.parse(result).iter("testcase")  # noqa: S314 - pytest wrote it
    return [_outcome(scenario, case, log_name, several=path.is_dir()) for case in cases]


def _wait(command: Sequence[str], cwd: Path, environment: Mapping[str, str], said: Path, seconds: int) -> int | None:
    """Run a command in `cwd`, its output to the file `said`; return its status, or None when it has not ended in time.

    However it ends, nothing that it started in its session stays.
    """
    with said.open("wb") as stream:
        process = subprocess.Popen(
            supervised(command),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=environment,
            start_new_session=True,
        )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _outcome(scenario: str, case: ET.Element, log_name: str, several: bool) -> ScenarioOutcome:
    """Return the outcome of a test case of pytest's JUnit XML; with `several` files its name begins with the file's."""
    name = case.get("name", "")
    test = f"{case.get('classname', '').rpartition('.')[2]}: {name}" if several else name
    result, message = "passed", ""
    for tag, meaning in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
        for found in case.findall(tag):
            result, message = meaning, found.get("message", "").partition("\n")[0]
    seconds = round(float(case.get("time", 0)), 1)
    return ScenarioOutcome(
        scenario=scenario,
        test=printable(test),
        result=result,
        seconds=seconds,
        message=printable(message),
        log=log_name,
    )


def _why_unusable(machine: Machine) -> str | None:
    """Return why a machine cannot be used any more, or None.

    Raises:
        InfrastructureError: QEMU is gone, which nothing in the machine can do but by halting it.
    """
    try:
        machine.connect(LOGIN_SECONDS)
    except GuestError as error:
        return str(error)
    return None


def _gone(scenario: str, node: str, reason: str, log_name: str) -> ScenarioOutcome:
    message = f"{node or 'it'} cannot be used after the packages were installed and tests ran: {reason}"
    return ScenarioOutcome(
        scenario=scenario, test=MACHINE, result="failed", seconds=0, message=printable(message), log=log_name
    )


def _own_tests(run: _Run, record: Repository, source: str) -> None:
    """Run the tests of a source package of a repository, if it has some, in a restored machine of their own."""
    stanza = _source(record, source)
    if stanza is None:
        log.info("%s: %s has no tests of its own", OWN_TESTS, source)
        return
    log.info("%s: %s %s", OWN_TESTS, source, stanza["Version"])
    directory = f"logs/{OWN_TESTS}-{source}"
    started = time.monotonic()
    for upstream, reason in UPSTREAM.items():
        with run.restored(run.own_tests_in, f"{OWN_TESTS}-{source}", [directory]) as (machine,):
            ended = _autopkgtest(run, record, stanza, machine, upstream, f"{directory}/{OWN_TESTS}.log")
            if reason and reason[0] in ended.said:
                log.info("%s", reason[1])
                continue
            _note_own(run, machine, source, ended, round(time.monotonic() - started, 1), f"{directory}/{OWN_TESTS}.log")
            return


@dataclass(frozen=True)
class _Ended:
    """How autopkgtest ended (None: not by itself, but by `error`), its summary, and the end of what it said."""

    status: int | None
    summary: tuple[str, ...]
    said: str
    error: str = ""


def _autopkgtest(
    run: _Run, record: Repository, stanza: "deb822.Sources", machine: Machine, upstream: str, log_name: str
) -> _Ended:
    """Run autopkgtest in the sandbox, with nothing but the machine's ssh server in reach.

    Args:
        run: the system test.
        record: the repository.
        stanza: what its index says of the source package.
        machine: the machine.
        upstream: one of `UPSTREAM`.
        log_name: what takes its output, below the artifacts.

    Raises:
        InfrastructureError: the source package or the repositories cannot be read, or the sandbox cannot be made.
    """
    if upstream == "moved" and machine.run(guest.script(run.target), "lists", timeout=INSTALL_SECONDS).status:
        raise InfrastructureError("cannot read the upstream's lists in the machine; logs/ has what it said")
    # what a test needs is installed for it, but for what is there in whatever version
    _, wrong = _install(run, machine, "replace")
    if wrong:
        return _Ended(None, (), "", wrong[0])
    files, access = Files(), machine.access
    for name, content in _source_files(record, stanza):
        files.add(f"/in/{name}", content)
    files.add("/root/identity", access.identity.read_bytes(), 0o600)
    limits = run.config.settings.limits.model_copy(update={"seconds": run.environment.scenario_seconds})
    with tempfile.TemporaryDirectory(prefix="pkgci-") as scratch:
        output, said = Path(scratch, "out"), Path(scratch, "log")
        output.mkdir()
        status, error = None, ""
        try:
            with said.open("wb") as stream, _relay(machine.port(), Path(scratch)) as socket:
                status = execute(
                    tools_root(run.config, run.target_name).path,
                    OWN_TESTS_SCRIPT.read_text(),
                    arguments=(access.host_key, upstream),
                    files=files,
                    output=output,
                    limits=limits,
                    log_to=stream,
                    where=partial(contained, socket=socket),
                ).status
        except PackageError as ended:
            error = str(ended)
        finally:
            _keep(run.artifacts / log_name, said.read_bytes())
        summary = output / "summary"
        text = lines(summary.read_bytes()[:FINDINGS_BYTES]) if summary.exists() else ""
        last = said.read_bytes()[-FINDINGS_BYTES:].decode(errors="replace")
        return _Ended(status, tuple(text.splitlines()), last, error)


def _note_own(run: _Run, machine: Machine, source: str, ended: _Ended, seconds: float, log_name: str) -> None:
    """Note the outcome of each test of a source package, and of what went wrong beside them.

    Raises:
        InfrastructureError: autopkgtest could not use the machine, which can be used.
    """
    own = partial(ScenarioOutcome, scenario=OWN_TESTS, log=log_name)
    tests = [match for match in map(SUMMARY.fullmatch, ended.summary) if match]
    outcomes = [
        own(
            test=printable(f"{source}: {match[1]}"),
            result=RESULTS[match[2]],
            seconds=round(seconds / len(tests), 1),
            message=printable(match[3]),
        )
        for match in tests
    ]
    run.note(*outcomes)
    if ended.status in PASSED:
        return
    if ended.status in FAILED and any(outcome.result == "failed" for outcome in outcomes):
        return
    rest = [line for line in ended.summary if line and not SUMMARY.fullmatch(line)]
    message = printable(ended.error or (rest or [f"status {ended.status}"])[-1])
    if ended.status is not None and ended.status not in FAILED:
        reason = _why_unusable(machine)
        if reason:
            run.note(_gone(OWN_TESTS, "", reason, log_name))
            return
        raise InfrastructureError(f"{OWN_TESTS}: {source}: {message}; see {log_name}")
    run.note(own(test=source, result="failed", seconds=seconds, message=message))


@contextmanager
def _relay(port: int, directory: Path) -> Iterator[Path]:
    """Yield a Unix socket where each connection leads to a port of this host's loopback."""
    # relative, since what socat reads has characters of its own; the directory is not open to others
    command = ["socat", "UNIX-LISTEN:ssh,fork,mode=666", f"TCP:127.0.0.1:{port}"]
    process = subprocess.Popen(supervised(command), stdin=subprocess.DEVNULL, cwd=directory, start_new_session=True)
    try:
        end = time.monotonic() + LOGIN_SECONDS
        while not (directory / "ssh").exists():
            if process.poll() is not None or time.monotonic() > end:
                raise InfrastructureError(f"socat does not listen in {directory}; see `pkgci doctor`")
            time.sleep(0.02)
        yield directory / "ssh"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _source(record: Repository, name: str) -> "deb822.Sources | None":
    """Return what the index of a repository says of a source package, if that says that it has tests of its own."""
    url = f"{record.url}dists/{record.codename}/{record.component}/source/Sources"
    try:
        index = web.read(url, upstream=False, largest=INDEX_BYTES)
    except web.NotFoundError:
        return None
    for stanza in deb822.Sources.iter_paragraphs(index, use_apt_pkg=False):
        # dpkg-source(1) writes the field when there is debian/tests/control
        if stanza.get("Package") == name and OWN_TESTS in re.split(r",\s*", stanza.get("Testsuite", "")):
            return stanza
    return None


def _source_files(record: Repository, stanza: "deb822.Sources") -> Iterator[tuple[str, bytes]]:
    """Yield the names and contents of the files of a source package.

    Raises:
        InfrastructureError: one cannot be read, or is not what the index says.
    """
    for file in stanza["Checksums-Sha256"]:
        path = f"{stanza['Directory']}/{file['name']}"
        if not re.fullmatch(r"[\w.+~-]+(/[\w.+~-]+)*", path, re.ASCII) or ".." in path.split("/"):
            raise InfrastructureError(f"{record.url}: the index names a file {printable(path, 200)!r}")
        content = web.read(f"{record.url}{path}", upstream=False, largest=SOURCE_BYTES)
        if hashlib.sha256(content).hexdigest() != file["sha256"]:
            raise InfrastructureError(f"{record.url}{path} is not what the index says; retry later")
        yield file["name"], content


def _keep(path: Path, said: bytes) -> None:
    """Keep a log, of a very long one its beginning and its end."""
    if len(said) > LOG_BYTES:
        half = LOG_BYTES // 2
        said = b"%b\n[%d bytes are left out]\n%b" % (said[:half], len(said) - 2 * half, said[-half:])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines(said))


def _line(outcome: ScenarioOutcome) -> str:
    line = f"{outcome.scenario}: {outcome.test}: {outcome.result}, {outcome.seconds} s"
    return f"{line}: {outcome.message}" if outcome.message else line


def _write_junit(record: Systest, path: Path) -> None:
    """Write the outcomes in the XML form that Jenkins' JUnit plugin reads: a suite a scenario."""
    suites = ET.Element("testsuites")
    for scenario in dict.fromkeys(outcome.scenario for outcome in record.outcomes):
        own = [outcome for outcome in record.outcomes if outcome.scenario == scenario]
        suite = ET.SubElement(suites, "testsuite", name=f"systest-{record.target}-{scenario}", tests=str(len(own)))
        for result, name in (("failed", "failures"), ("skipped", "skipped")):
            suite.set(name, str(sum(outcome.result == result for outcome in own)))
        for outcome in own:
            case = ET.SubElement(suite, "testcase", classname=f"systest.{record.target}.{scenario}", name=outcome.test)
            case.set("time", str(outcome.seconds))
            if outcome.result != "passed":
                tag = {"failed": "failure", "skipped": "skipped"}[outcome.result]
                ET.SubElement(case, tag, message=outcome.message).text = f"see {outcome.log}"
    path.parent.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(suites).write(path, encoding="utf-8", xml_declaration=True)
