"""The system test: the packages of a build together in an environment, and scenarios against them.

The operator's scenarios (see `suite.py`) run in processes of this job, and reach the machines by ssh. A source package's own
tests (DEB: `debian/tests`) are one scenario more, `autopkgtest`, in a restored machine of their own: that tool, see
autopkgtest(1), reads what a package says of its tests, and so runs in the sandbox.
Each test is an outcome; what fails is not tried again. All is run once again after one of the faults that `Fault` lists.
"""

import hashlib
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pkgci import flavours, guestlogs, passed, products, repetition, repository, runs, web
from pkgci.artifacts import Package, Repository, RepositoryPackage, ScenarioOutcome, Systest
from pkgci.change import Parameters
from pkgci.command import supervised
from pkgci.config import Carried, Config, Environment, Flavour, Rebuilt, Target
from pkgci.engines.base import BuildRef
from pkgci.errors import Aborted, InfrastructureError, PackageError, RequestError, TriedTwiceError
from pkgci.handover import DEFAULT_GROUP, Handover, NodeAccess, RepositoryUnderTest, TargetUnderTest
from pkgci.lazy import Lazy
from pkgci.locks import locked
from pkgci.logs import LogFile
from pkgci.poll import polled
from pkgci.roots import tools_root
from pkgci.sandbox import Files, contained, execute
from pkgci.server import serve
from pkgci.suite import Suite
from pkgci.text import lines, printable
from pkgci.vm import guest
from pkgci.vm.machine import FAIR_SECONDS, LOGIN_SECONDS, Machine, blaming_the_host
from pkgci.vm.remote import FaultError, GuestError
from pkgci.vm.snapshot import Making, Snapshot, UnfitError, keep, redeployed, restart, run_script, run_steps

deb822 = Lazy("debian.deb822")
log = logging.getLogger(__name__)

INSTALL = "install"
# the test that fails when a machine cannot be used any more
MACHINE = "the machine"
OWN_TESTS = "autopkgtest"
# below the artifacts: the logs of what was run once again
FIRST = "logs-of-the-first-attempt"
# of the configuration directory, all that is no scenario's
CONFIGURATION = ("config.yaml", "environments/*.yaml", "packages/*.yaml", "releases/*.yaml", "targets/*.yaml")
OWN_TESTS_SCRIPT = Path(__file__).with_name("autopkgtest.sh")
VERSION = {
    "deb": "dpkg-query -W -f '${Version}' \"$1\" 2>/dev/null || true",
    # of a package that is not there, rpm says so on stdout
    "rpm": '! rpm -q "$1" >/dev/null 2>&1 || rpm -q --qf \'%{EVR}\' "$1"',
}
# of a machine that has a processor of the host to itself
INSTALL_SECONDS = FAIR_SECONDS
INSTALLING = "while the packages were installed"
# as many as the rule of SEED allows
SEEDS = 10**9
FINDINGS_BYTES = 1 << 18
INDEX_BYTES = 64 << 20
SOURCE_BYTES = 2 << 30
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
    # the environment's
    name: str
    home: Path
    environment: Environment
    # those to run, in their order, with their groups: all of them, where none is named
    scenarios: Mapping[str, tuple[str, ...]]
    snapshot: Snapshot
    records: tuple[Repository, ...]
    tested: tuple[RepositoryPackage, ...]
    # of each source package under test
    flavours: Mapping[str, tuple[Flavour, ...]]
    artifacts: Path
    seed: int = 0
    # another plain machine than the latest one
    plain: Snapshot | None = None
    # where restored machines are left, if they are to be kept
    room: Path | None = None
    kept: dict[str, str] = field(default_factory=dict)
    outcomes: list[ScenarioOutcome] = field(default_factory=list)
    # the fault after which all was run once again
    retried: list[str] = field(default_factory=list)

    @cached_property
    def own_tests_in(self) -> Snapshot:
        """What a source package's own tests are run in: the environment's machine, of several a plain one."""
        alone = len(self.environment.nodes) == 1
        return self.snapshot if alone else self.plain or guest.plain(self.config, self.target_name)

    @property
    def spelled(self) -> list[str]:
        """What the parameter SCENARIOS has to be for the same tests, word by word."""
        pairs = [(name, group) for name, groups in self.scenarios.items() for group in groups or ("",)]
        return [f"{name}:{group}" if group else name for name, group in pairs]

    def of(self, flavour: Flavour) -> tuple[RepositoryPackage, ...]:
        """Return the packages under test of a flavour."""
        return tuple(package for package in self.tested if flavour in self.flavours[package.source])

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
        """Restore machines.

        Afterwards all logs of each are in its directory of `logs`, and the machines are kept as the set `name`.
        """
        places = [self.artifacts / one for one in logs]
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
        proxy = guest.proxy(self.config, self.target, self.records)
        consoles = [place / "console.log" for place in places]
        with snapshot.restored(self.config, proxy, consoles) as machines:
            logged = dict(zip(places, machines, strict=True))
            try:
                guestlogs.follow(self.target, logged, self.environment.logs)
                yield machines
            finally:
                # whoever aborts waits
                if not isinstance(sys.exception(), Aborted):
                    guestlogs.fetch(self.target, logged, self.environment.logs)
                    self._keep(snapshot, name, machines)

    def begin_again(self, reason: str) -> None:
        """Forget what came of the first attempt, its machines too; its logs stay, in a directory of their own."""
        self.retried.append(reason)
        self.outcomes.clear()
        while self.kept and self.room:
            shutil.rmtree(self.room / self.kept.popitem()[0])
        # none, when it came before anything had a log
        with suppress(FileNotFoundError):
            (self.artifacts / "logs").rename(self.artifacts / FIRST)

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


def prepare_environment(config: Config, name: str) -> str:
    """Make the snapshots of an environment, for the targets that it names, else for all that releases use it for, where needed.

    They are needed also where the content of what it polls has changed since.

    Returns:
        Which snapshots are there now, in a few words; or that another process makes them.

    Raises:
        RequestError: the environment is unknown.
        InfrastructureError: one cannot be made; the former one stays as it was.
    """
    home, described = config.environment(name)
    used = (target for target in config.names("targets") if name in _environments(config, target))
    targets = described.targets or tuple(used)
    if not targets:
        raise RequestError(
            f"no release uses environment {name}; `environment` in a release names it; or give it `targets`"
        )
    with polled(config, name, home, described.poll) as changed:
        if changed is None:
            return "another build is at it, and this one left it to that one"
        made = [guest.environment(config, name, target, renew=True, anew=changed) for target in targets]
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
        made_for = config.environment(name)[1].targets
        # a test there is refused
        if not made_for or target_name in made_for:
            guest.environment(config, name, target_name)


def systest(
    config: Config, target_name: str, parameters: Parameters, artifacts: Path, own: BuildRef | None = None
) -> Systest:
    """Run the system test, unless the same passed before; it leaves `systest.json`, `junit/systest.xml` and `logs/`.

    Args:
        config: the configuration.
        target_name: the target.
        parameters: REPOSITORIES, and where given BUILD_KEY, ENVIRONMENT, SCENARIOS, FLAVOURS, SEED, SNAPSHOTS with
            REBUILD_SNAPSHOT, ZUUL_BRANCH; AGAIN and PARENT say whether it is run in any case.
        artifacts: an existing directory.
        own: the build that this is, by which a person finds its machines again; without it none are kept.

    Returns:
        What is in `systest.json`.

    Raises:
        PackageError: a test fails; the records are written, as they are after every error that ends the tests.
        RequestError: a parameter is wrong, or a scenario cannot be run.
        InfrastructureError: the machines are at fault; `guest.OutdatedError` if they have to be prepared anew.
    """
    target = config.target(target_name)
    name, home, environment = _environment(config, target_name, parameters)
    scenarios = _scenarios(name, environment, target, parameters.get("SCENARIOS").split())
    _check_scenarios(name, home, environment, scenarios)
    guest.check_qemu(config, name, target_name)
    with serve(config):
        records = repository.read(config, target_name, parameters.repositories(config))
        tested = tuple(repository.under_test(records, parameters.get("BUILD_KEY")))
        snapshot, plain = _snapshots(config, name, target_name, environment, parameters)
        log.info("environment %s: snapshot %s of %s", name, snapshot.id, f"{snapshot.manifest.created:%Y-%m-%d %H:%M}")
        sources = dict.fromkeys(package.source for package in tested)
        branch, wanted = parameters.get("ZUUL_BRANCH"), parameters.get("FLAVOURS").split()
        run = _Run(
            config,
            target_name,
            target,
            name,
            home,
            environment,
            scenarios,
            snapshot,
            records,
            tested,
            flavours.assigned(config, name, environment, branch, wanted, sources),
            artifacts,
        )
        run = replace(run, seed=int(parameters.get("SEED") or secrets.randbelow(SEEDS)), plain=plain)
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
                # a seed that nobody chose decides nothing
                lambda: [*_decisive(run), parameters.get("SEED"), parameters.get("SNAPSHOTS")],
                lambda: _keeping(run, now, own),
                repeat=parameters.repeat,
                **now,
            )


def _snapshots(
    config: Config, name: str, target_name: str, environment: Environment, parameters: Parameters
) -> tuple[Snapshot, Snapshot | None]:
    """Return the environment's snapshot, and the plain machine's where SNAPSHOTS names one."""
    names, wanted = (f"{name}@{target_name}", target_name), parameters.get("SNAPSHOTS").split()
    try:
        if wanted:
            own = repetition.named(config, wanted[0], names, len(environment.nodes))
            return own, repetition.named(config, wanted[1], names[1:], 1) if wanted[1:] else None
    except (RequestError, UnfitError) as error:
        if parameters.get("REBUILD_SNAPSHOT") != "true":
            raise
        log.info("another snapshot is used: %s", error)
    return guest.environment(config, name, target_name), None


def _decisive(run: _Run) -> list:
    """Return all that decides the result, as of JSON.

    Raises:
        InfrastructureError: what a suite is, that lies elsewhere, cannot be told.
    """
    for scenario in map(run.environment.scenarios.get, run.scenarios):
        program = scenario.command[0] if scenario and scenario.command else None
        if program and not ("/" in program and (run.home / program).resolve().is_relative_to(run.home.resolve())):
            raise InfrastructureError(f"{program} is not in the configuration directory")
    environment = run.environment.model_dump(mode="json")
    own = []
    if OWN_TESTS in run.scenarios:
        root = tools_root(run.config, run.target_name)
        own = [root.id, run.own_tests_in.id, run.config.settings.limits.model_dump(mode="json")]
    # they can import and read all that lies there; what the configuration says of this test is told below
    scenarios = passed.files(run.home, CONFIGURATION) if set(run.scenarios) != {OWN_TESTS} else []
    machine = [run.target.model_dump(mode="json"), run.snapshot.id, guest.upstream_digest(run.target)]
    packages = repository.decisive(run.records, run.tested)
    return [*machine, environment, run.scenarios, scenarios, own, run.flavours, packages]


def _keeping(run: _Run, now: Mapping[str, Any], own: BuildRef | None) -> Systest:
    """Run all scenarios, and keep the machines, for `pkgci debug`, if `own` is given.

    Raises:
        InfrastructureError: there is no space for the machines.
    """
    settings = run.config.settings
    if own is None or settings.keep_runs == "none":
        return _run_scenarios(run, now)
    kept = runs.runs(run.config)
    with kept.room(datetime.now(UTC)) as room:
        # what is too old has gone by now
        runs.check_space(run.config, run.snapshot.manifest)
        passed = False
        try:
            made = _run_scenarios(replace(run, room=room), now)
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
                    environment=run.name,
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


def _run_scenarios(run: _Run, now: Mapping[str, Any]) -> Systest:
    """Run all scenarios, once again after a listed fault, and write the records however that ends."""
    try:
        fault = None
        try:
            _run_all(run)
        except FaultError as error:
            fault = error
        # not while the first error is handled: what is kept of machines depends on whether there is one
        if fault:
            log.warning("all is run once again, in machines restored anew: %s", fault)
            run.begin_again(str(fault))
            try:
                _run_all(run)
            except FaultError as second:
                raise TriedTwiceError(f"{second}; the first attempt had ended with: {fault}") from second
    finally:
        # a plain machine that was not needed is not made for the record
        snapshots = [run.snapshot, *filter(None, [vars(run).get("own_tests_in")])]
        record = Systest(
            target=run.target_name,
            environment=run.name,
            snapshot=run.snapshot.id,
            packages=tuple(Package(**package.model_dump(include=set(Package.model_fields))) for package in run.tested),
            outcomes=tuple(run.outcomes),
            flavours=dict(run.flavours),
            notice=run.target.notice,
            retried=run.retried[0] if run.retried else "",
            seed=run.seed,
            snapshots=tuple(dict.fromkeys(repetition.use(one, run.artifacts) for one in snapshots)),
            scenarios=repetition.digests(run.home, run.environment, run.spelled),
            commit=repetition.commit(run.home),
            described=repetition.described(run.environment),
            tools=repetition.tools(),
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


def _run_all(run: _Run) -> None:
    if set(run.scenarios) != {OWN_TESTS}:
        _operators_scenarios(run)
    if OWN_TESTS in run.scenarios:
        for record in run.records:
            for source in dict.fromkeys(package.source for package in run.tested if package in record.packages):
                _own_tests(run, record, source)


def summary(record: Systest) -> str:
    """Return in a few words what was tested."""
    passed = sum(outcome.result == "passed" for outcome in record.outcomes)
    skipped = len(record.outcomes) - passed
    said = f"{passed} tests passed in environment {record.environment}" + (f", {skipped} skipped" if skipped else "")
    return f"{said}; the second time, after: {record.retried}" if record.retried else said


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


def _scenarios(
    name: str, environment: Environment, target: Target, wanted: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Return the scenarios to run, in the environment's order, each with the groups of it; all if there is none.

    Args:
        name: the environment's.
        environment: the environment.
        target: the target.
        wanted: `NAME` for all of a scenario, `NAME:GROUP` for a group of it; empty for the default group of each.
    """
    known = [*environment.scenarios, *([OWN_TESTS] if target.format == "deb" else [])]
    chosen: dict[str, tuple[str, ...]] = {}
    for word in wanted:
        scenario, _, group = word.partition(":")
        if scenario not in known:
            raise RequestError(
                f"parameter SCENARIOS: {scenario!r} is not in environment {name}, which has: {', '.join(known)}"
            )
        described = environment.scenarios.get(scenario)
        if group and (described is None or (described.command and group not in described.groups)):
            has = ", ".join(described.groups) if described else ""
            raise RequestError(f"parameter SCENARIOS: scenario {scenario} has no group {group!r}, but: {has or 'none'}")
        whole = not group or chosen.get(scenario) == ()
        chosen[scenario] = () if whole else tuple(dict.fromkeys((*chosen.get(scenario, ()), group)))
    if wanted:
        return {scenario: chosen[scenario] for scenario in known if scenario in chosen}
    # a suite without groups, or a package's own tests, have no other than this one
    described = {scenario: environment.scenarios.get(scenario) for scenario in known}
    return {
        scenario: (DEFAULT_GROUP,) if one and (one.path or one.groups) else ()
        for scenario, one in described.items()
        if not (one and one.groups and DEFAULT_GROUP not in one.groups)
    }


def _check_scenarios(name: str, home: Path, environment: Environment, scenarios: Iterable[str]) -> None:
    for scenario in scenarios:
        described = environment.scenarios.get(scenario)
        if described and described.path and not (home / described.path).exists():
            raise RequestError(
                f"{home}/environments/{name}.yaml: scenario {scenario}: {home / described.path} does not exist"
            )


def _operators_scenarios(run: _Run) -> None:
    """Make the packages part of the product, and run the operator's scenarios, all in one restored set."""
    names = list(run.environment.nodes)
    with (
        _deployed(run) as snapshot,
        # none, when that has failed
        run.restored(snapshot, runs.MACHINES, [run.logs(name) for name in names])
        if snapshot
        else nullcontext() as restored,
    ):
        machines = dict(zip(names, restored or (), strict=bool(restored)))
        installed = _made_part(run, machines) if machines else None
        if installed is None:
            return
        with _handed_over(run, machines, installed) as suite:
            for scenario, groups in run.scenarios.items():
                if scenario == OWN_TESTS:
                    continue
                outcomes, broken = [], None
                try:
                    outcomes = suite.run(scenario, run.environment.scenarios[scenario], groups)
                except InfrastructureError as error:
                    broken = error
                run.note(*outcomes)
                if broken or any(outcome.result == "failed" for outcome in outcomes):
                    for name, machine in machines.items():
                        reason = _why_unusable(machine)
                        if reason:
                            said = outcomes[-1].log if outcomes else None
                            run.note(_gone(scenario, name if len(names) > 1 else "", reason, said))
                            return
                if broken:
                    raise broken


@contextmanager
def _deployed(run: _Run) -> Iterator[Snapshot | None]:
    """Yield the product as packages of the flavour `master` make it: deployed anew, from an image rebuilt with them in it.

    Without such packages it is the environment's snapshot. It is None when the packages made it fail, which is noted.
    """
    packages, how = run.of("master"), run.environment.flavours.master
    if not (packages and how):
        yield run.snapshot
        return
    node = how.at(run.environment.nodes)
    plan = guest.environment_plan(run.config, run.name, run.target_name)
    consoles = {name: run.artifacts / run.logs(name) / "deployment.log" for name in run.environment.nodes}
    for path in consoles.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    rules = guest.proxy(run.config, run.target, run.records).rules
    making = Making(rules, run.snapshot.manifest.accelerator, consoles)

    def rebuild(machine: Machine) -> None:
        outcome = _rebuilt(run, machine, "master", how, packages, f"image of {node} is rebuilt")
        run.note(outcome)
        if outcome.result == "failed":
            raise _NotDeployedError

    begun = time.monotonic()
    deployment = partial(ScenarioOutcome, scenario="master", test="product is deployed from it", log="logs/master.log")
    with ExitStack() as stack:
        snapshot = None
        try:
            snapshot = stack.enter_context(redeployed(run.config, plan, node, rebuild, making))
        except _NotDeployedError:
            pass
        except GuestError as error:
            if not run.outcomes:
                # of what is under test nothing was in it yet
                raise
            # without the packages it was deployed like this when its snapshot was made
            run.note(deployment(result="failed", seconds=_since(begun), message=printable(str(error))))
        else:
            run.note(deployment(result="passed", seconds=_since(begun)))
        yield snapshot


class _NotDeployedError(Exception):
    """An image could not be rebuilt, and why is noted."""


def _made_part(run: _Run, machines: Mapping[str, Machine]) -> tuple[RepositoryPackage, ...] | None:
    """Make packages of the flavours `bootstrap`, `container` and `cluster` part of the product that the machines are.

    Returns:
        The packages that are in it; None when they made that fail, which is noted.
    """
    known = run.environment.flavours
    carried = [flavour for flavour in ("bootstrap", "container") if run.of(flavour)]
    for flavour in carried:
        if not _carried(run, machines, flavour, getattr(known, flavour), run.of(flavour)):
            return None
    if carried and not _healthy(run, machines, carried[-1]):
        return None
    packages = run.of("cluster")
    if not packages:
        return run.tested
    node = known.cluster.at(run.environment.nodes)
    if node is None:
        return _install_everywhere(run, machines, packages)
    begun = time.monotonic()
    named = {f"pkgci-{number}": record for number, record in enumerate(run.records)}
    products.add_repositories(known.cluster, machines[node].forward, named, packages)
    done = f"repositories are added to the product on {node}"
    run.note(ScenarioOutcome(scenario="cluster", test=done, result="passed", seconds=_since(begun)))
    return run.tested


def _healthy(run: _Run, machines: Mapping[str, Machine], flavour: Flavour) -> bool:
    """Check the health of a product in which images were rebuilt, the last one for a flavour; note how that went."""
    begun, reason = time.monotonic(), ""
    plan = guest.environment_plan(run.config, run.name, run.target_name)
    try:
        run_steps(plan, plan.health, machines)
    except GuestError as error:
        reason = printable(str(error))
    result = "failed" if reason else "passed"
    test = "product is healthy"
    run.note(ScenarioOutcome(scenario=flavour, test=test, result=result, seconds=_since(begun), message=reason))
    return not reason


def _carried(
    run: _Run, machines: Mapping[str, Machine], flavour: Flavour, how: Carried, packages: Sequence[RepositoryPackage]
) -> bool:
    """Rebuild an image and the package that carries it, and restart what boots from it; note how that went.

    Raises:
        RequestError: the environment's script leaves that package as it was.
    """
    nodes = run.environment.nodes
    node = how.at(nodes)
    former = _version(run, machines[node], how.carrier)
    outcome = _rebuilt(run, machines[node], flavour, how, packages, f"{how.carrier} is rebuilt and installed on {node}")
    run.note(outcome)
    if outcome.result == "failed":
        return False
    if _version(run, machines[node], how.carrier) == former:
        raise RequestError(
            f"environment {run.name}: flavour {flavour}: {how.rebuild} leaves {how.carrier} on {node} as it was: "
            f"{former or 'not installed'}"
        )
    if flavour != "bootstrap":
        return True
    good = True
    for name, seconds, reason in restart({name: machines[name] for name, one in nodes.items() if one.boot == node}):
        result = "failed" if reason else "passed"
        test = f"{name} boots it from {node}"
        log_name = f"{run.logs(name)}/console.log"
        run.note(
            ScenarioOutcome(
                scenario=flavour, test=test, result=result, seconds=seconds, message=printable(reason), log=log_name
            )
        )
        good = good and not reason
    return good


def _rebuilt(
    run: _Run, machine: Machine, flavour: Flavour, how: Rebuilt, packages: Sequence[RepositoryPackage], test: str
) -> ScenarioOutcome:
    """Run the script that rebuilds an image, with packages under test in it; return how that went, as `test`.

    Raises:
        FaultError: the connection to the machine was cut.
        InfrastructureError: the repositories cannot be read there.
    """
    begun = time.monotonic()
    directory, log_name = f"/opt/pkgci/{flavour}", f"logs/{flavour}.log"
    reason = ""
    log.info("%s: rebuilding: %s", flavour, how.rebuild)
    with (
        LogFile(run.artifacts / log_name, stamped=True) as said,
        _blaming_packages(machine, how.seconds) as blamed,
    ):
        files = flavours.overlay(run.target, run.records, packages)
        machine.put({f"{directory}{path}": content for path, content in files.items()}, how.seconds)
        done = run_script(machine, run.home / how.rebuild, directory, seconds=how.seconds, to=said)
        if done.status == flavours.UNREADABLE:
            raise InfrastructureError(f"{how.rebuild}: cannot read the repositories there; {log_name} has what it said")
        if done.status:
            reason = (done.text().strip().splitlines() or [f"{how.rebuild} ended with status {done.status}"])[-1]
    reason = "; ".join(filter(None, [*blamed, reason]))
    result = "failed" if reason else "passed"
    return ScenarioOutcome(
        scenario=flavour, test=test, result=result, seconds=_since(begun), message=printable(reason), log=log_name
    )


@contextmanager
def _blaming_packages(machine: Machine, seconds: float) -> Iterator[list[str]]:
    """Do something with packages in a machine; yield a list that gets the reason when the machine does not do it.

    Args:
        machine: the machine.
        seconds: what it may take; a machine that has a processor of the host to itself needs half of it at most.

    Raises:
        FaultError: the connection to it was cut.
        InfrastructureError: this host was too busy with others to run it.
    """
    blamed: list[str] = []
    try:
        with blaming_the_host(machine, seconds, INSTALLING):
            yield blamed
    except GuestError as error:
        blamed.append(f"{INSTALLING}: {error}")


def _version(run: _Run, machine: Machine, package: str) -> str:
    """Return the version in which a package is installed in a machine, as that says; empty if it is not."""
    return printable(machine.run(VERSION[run.target.format], package, timeout=LOGIN_SECONDS).text())


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 1)


def _install_everywhere(
    run: _Run, machines: Mapping[str, Machine], packages: Sequence[RepositoryPackage]
) -> tuple[RepositoryPackage, ...] | None:
    """Install packages together on all machines at once, and note how that went.

    Returns:
        Those that are in; None when an installation failed.
    """
    file = {"deb": "apt.log", "rpm": "dnf.log"}[run.target.format]
    missing: dict[str, str] = {}
    whole = True
    threads = ThreadPoolExecutor(len(machines))
    # they share the host's processors
    seconds = INSTALL_SECONDS * max(1, len(machines) / len(os.sched_getaffinity(0)))
    try:
        for machine in machines.values():
            machine.put(guest.settings(run.target, run.records, packages))
        ends = {name: threads.submit(_timed_install, run, one, packages, seconds) for name, one in machines.items()}
        wait(ends.values())
    finally:
        # who aborts does not wait for what they do: it ends with the machines
        threads.shutdown(wait=False)
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


def _timed_install(
    run: _Run, machine: Machine, packages: Sequence[RepositoryPackage], seconds: float
) -> tuple[float, dict[str, str], list[str]]:
    started = time.monotonic()
    apart, wrong = _install(run, machine, packages, "together", seconds)
    return _since(started), apart, wrong


def _install(
    run: _Run,
    machine: Machine,
    packages: Sequence[RepositoryPackage],
    action: str,
    seconds: float = INSTALL_SECONDS,
) -> tuple[dict[str, str], list[str]]:
    """Install packages under test at their exact versions.

    Args:
        run: the system test.
        machine: the machine, which has its package sources.
        packages: the packages.
        action: of the guest's script: `together` for all of them, `replace` for those that are there in another version.
        seconds: what it may take.

    Returns:
        Those left out since they exclude others, with the reason, and what went wrong.

    Raises:
        FaultError: the connection to it was cut.
        InfrastructureError: the machine cannot read the repositories, or this host was too busy with others to run it.
    """
    words = [word for package in packages for word in (package.name, package.version, package.architecture)]
    with _blaming_packages(machine, seconds) as blamed:
        done = machine.run(guest.script(run.target), action, *words, timeout=seconds, limit=FINDINGS_BYTES)
    if blamed:
        return {}, blamed
    if done.status == flavours.UNREADABLE:
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
def _handed_over(
    run: _Run, machines: Mapping[str, Machine], installed: tuple[RepositoryPackage, ...]
) -> Iterator[Suite]:
    """Yield what runs scenarios, with a directory that is nobody else's, where they find out how to reach the machines."""
    addresses = run.environment.addresses()
    handover = Handover(
        environment=run.name,
        snapshot=run.snapshot.id,
        target=TargetUnderTest(name=run.target_name, format=run.target.format),
        repositories=tuple(
            RepositoryUnderTest(
                name=f"pkgci-{number}", **record.model_dump(include=set(RepositoryUnderTest.model_fields) - {"name"})
            )
            for number, record in enumerate(run.records)
        ),
        packages=installed,
        flavours=dict(run.flavours),
        seed=run.seed,
        nodes={
            name: NodeAccess(
                port=machine.port(),
                identity=str(machine.access.identity),
                host_key=machine.access.host_key,
                role=run.environment.nodes[name].role,
                addresses={network: own.partition("/")[0] for network, own in addresses[name].items()},
            )
            for name, machine in machines.items()
        },
    )
    with tempfile.TemporaryDirectory(prefix="pkgci-") as directory:
        (Path(directory) / "handover.json").touch(0o600)
        (Path(directory) / "handover.json").write_text(handover.model_dump_json(by_alias=True))
        yield Suite(run.home, Path(directory), run.artifacts, handover, run.environment.scenario_seconds)


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


def _gone(scenario: str, node: str, reason: str, log_name: str | None) -> ScenarioOutcome:
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
    machine.put(guest.settings(run.target, run.records, run.tested))
    _, wrong = _install(run, machine, run.tested, "replace")
    if wrong:
        return _Ended(None, (), "", wrong[0])
    files, access = Files(), machine.access
    for name, content in _source_files(record, stanza):
        files.add(f"/in/{name}", content)
    files.add("/root/identity", access.identity.read_bytes(), 0o600)
    limits = run.config.settings.limits.model_copy(update={"seconds": run.environment.scenario_seconds})
    with tempfile.TemporaryDirectory(prefix="pkgci-") as scratch:
        output, said = Path(scratch, "out"), run.artifacts / log_name
        output.mkdir()
        status, error = None, ""
        try:
            with LogFile(said, stamped=True) as stream, _relay(machine.port(), Path(scratch)) as socket:
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
