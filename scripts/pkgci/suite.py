"""A scenario of a system test, run to its end: tests of pytest, or a suite of another kind, which leaves JUnit XML.

Both run in a process of their own on this host, and reach the machines by ssh. What they say goes to a log at once. Both are
the operator's; what they say of their tests is read with a limit all the same.
"""

import logging
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pkgci.artifacts import ScenarioOutcome
from pkgci.command import supervised
from pkgci.config import Scenario
from pkgci.engines.processes import kill_all
from pkgci.errors import InfrastructureError, RequestError
from pkgci.handover import CUT, DEFAULT_GROUP, Handover
from pkgci.lazy import Lazy
from pkgci.logs import LogFile, record
from pkgci.text import printable
from pkgci.vm.remote import Fault, FaultError

mapping, pytest = Lazy("pkgci.mapping"), Lazy("pytest")
log = logging.getLogger(__name__)

# in the environment of all that a scenario starts
MARK = "PKGCI_SCENARIO"
JUNIT_BYTES, JUNIT_TESTS = 16 << 20, 10_000
# what writes to the log of a scenario that was ended may go on for so long
LAST_SECONDS = 5
# what of a log says why tests cannot be read: pytest's lines that it marks so
REASON = re.compile(r"^\S+Z E  (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Suite:
    """What scenarios of a system test run in.

    Args:
        home: the configuration directory.
        directory: one that is nobody else's, with `handover.json`.
        artifacts: where logs are left.
        handover: what is told to them.
        seconds: what one may take that has no limit of its own.
    """

    home: Path
    directory: Path
    artifacts: Path
    handover: Handover
    seconds: int

    def run(self, name: str, scenario: Scenario, groups: Sequence[str]) -> list[ScenarioOutcome]:
        """Run the groups of a scenario, or all of it if none is named, to the end or the time limit.

        Returns:
            The outcomes of its tests, none if no test is in these groups.

        Raises:
            RequestError: it cannot be run, or has no test.
            FaultError: pytest found out that a machine's connection was cut.
            InfrastructureError: pytest was killed, or an external suite did not say what became of its tests.
        """
        if scenario.path is not None:
            return self._pytest(name, scenario, groups)
        wanted = groups or scenario.groups or ("",)
        return [outcome for group in wanted for outcome in self._external(name, scenario, group)]

    def _pytest(self, name: str, scenario: Scenario, groups: Sequence[str]) -> list[ScenarioOutcome]:
        path = self.home / str(scenario.path)
        junit, log_name = self.directory / f"{name}.xml", f"logs/{name}.log"
        command = [sys.executable, "-m", "pytest", "-p", "pkgci.scenario"]
        command += [f"--pkgci={self.directory / 'handover.json'}", *(f"--pkgci-group={group}" for group in groups)]
        command += ["-c", os.devnull, f"--rootdir={self.home}", "-p", "no:cacheprovider", "--color=no", "-v"]
        command += [f"--timeout={scenario.test_seconds}", "--timeout-method=signal"]
        command += [f"--junitxml={junit}", f"--basetemp={self.directory / name}", "-o", "log_cli=true"]
        command += ["-o", "log_cli_level=INFO", "-o", "log_cli_format=%(message)s", str(path)]
        log.info("scenario %s: %s", ":".join([name, *groups]), path)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": str(self.handover.seed)}
        status = self._timed(command, environment, name, scenario, path.name)
        if isinstance(status, ScenarioOutcome):
            return [status]
        if status == -signal.SIGKILL:
            raise InfrastructureError(f"scenario {name}: pytest was killed; see {log_name}")
        if status == CUT:
            raise FaultError(Fault.CUT, f"scenario {name}; see {log_name}")
        if status == pytest.ExitCode.NO_TESTS_COLLECTED:
            raise RequestError(f"scenario {name}: {path} has no test")
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            # of a long one the middle is left out, maybe within a character
            marked = REASON.findall((self.artifacts / log_name).read_text(errors="replace"))
            reason = printable(marked[-1]) if marked else f"pytest ended with status {status}; see {log_name}"
            raise RequestError(f"scenario {name}: {path} cannot be run: {reason}")
        try:
            cases = _cases(junit)
        except (OSError, ValueError) as error:
            if status == pytest.ExitCode.TESTS_FAILED:
                # whatever a machine says may be in it: a package that floods it is at fault all the same
                return [self._failed(name, path.name, f"tests failed, and which ones cannot be read: {error}")]
            raise InfrastructureError(
                f"scenario {name}: {path} left no JUnit XML that can be read: {error}; see {log_name}"
            ) from error
        if not cases and [*groups] != [DEFAULT_GROUP]:
            raise RequestError(f"scenario {name}: {path} has no test of the group {' or '.join(groups)}")
        return [_outcome(name, case, log_name, several=path.is_dir()) for case in cases]

    def _external(self, name: str, scenario: Scenario, group: str) -> list[ScenarioOutcome]:
        """Run one group of a suite, or a suite without groups."""
        shown = f"{name}:{group}" if group else name
        scratch, junit = self.directory / f"{shown}.scratch", self.directory / f"{shown}.xml"
        known_hosts, log_name = self.directory / "known_hosts", f"logs/{shown}.log"
        scratch.mkdir()
        known_hosts.write_text(
            "".join(f"[{mapping.HOST}]:{node.port} {node.host_key}\n" for node in self.handover.nodes.values())
        )
        words = mapping.words(self.handover, group, str(junit), str(scratch), str(known_hosts))
        try:
            command = [mapping.fill(text, words) for text in scenario.command]
            told = {variable: mapping.fill(text, words) for variable, text in scenario.environment.items()}
        except ValueError as error:
            raise RequestError(f"scenario {shown}: {error}") from error
        if "/" in command[0]:
            command[0] = str(self.home / command[0])
        if shutil.which(command[0]) is None:
            raise RequestError(f"scenario {shown}: cannot run {printable(command[0])}: there is no such program")
        log.info("scenario %s: %s", shown, " ".join(shlex.quote(spelled) for spelled in command))
        for variable, value in told.items():
            log.info("scenario %s: %s=%s", shown, variable, printable(value))
        status = self._timed(command, {**os.environ, **told}, shown, scenario, shown)
        if isinstance(status, ScenarioOutcome):
            return [status]
        ended = f"scenario {shown} ended with status {status}"
        try:
            cases = _cases(junit)
        except (OSError, ValueError) as error:
            raise InfrastructureError(
                f"{ended}, and left no JUnit XML that can be read: {error}; see {log_name}"
            ) from error
        outcomes = [_outcome(shown, case, log_name, several=True) for case in cases]
        if not outcomes:
            raise InfrastructureError(f"{ended}, and has run no test; see {log_name}")
        if status and not any(outcome.result == "failed" for outcome in outcomes):
            raise InfrastructureError(f"{ended}, though no test failed; see {log_name}")
        return outcomes

    def _timed(
        self, command: Sequence[str], environment: Mapping[str, str], name: str, scenario: Scenario, what: str
    ) -> int | ScenarioOutcome:
        """Run a command; return its status, or the outcome of one that did not end in time."""
        seconds = scenario.seconds or self.seconds
        started = time.monotonic()
        status = wait(command, self.home, environment, self.artifacts / f"logs/{name}.log", seconds)
        if status is not None:
            return status
        took = round(time.monotonic() - started, 1)
        return self._failed(name, what, f"no end after {seconds} s, its time limit; killed", took)

    def _failed(self, name: str, test: str, message: str, seconds: float = 0.0) -> ScenarioOutcome:
        """Return the outcome of what failed as a whole."""
        return ScenarioOutcome(
            scenario=name, test=test, result="failed", seconds=seconds, message=message, log=f"logs/{name}.log"
        )


def wait(command: Sequence[str], cwd: Path, environment: Mapping[str, str], said: Path, seconds: float) -> int | None:
    """Run a command in `cwd`, its output to the log `said`; return its status, or None when it has not ended in time.

    However it ends, nothing that it started stays; what left its environment and its parents ends with this build.
    """
    mark = secrets.token_hex(16)
    process = subprocess.Popen(
        supervised(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        bufsize=0,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env={**environment, MARK: mark},
        start_new_session=True,
    )
    assert process.stdout
    copying = record(process.stdout, LogFile(said, stamped=True))
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        kill_all(mark, variable=MARK)
        process.wait()
        # whoever else has it open, a daemon for example, is not waited for
        copying.join(LAST_SECONDS)
        if copying.is_alive():
            log.warning("%s: something that %s started goes on; what it says is not waited for", said.name, command[0])


class _Tests(ET.TreeBuilder):
    """Builds a tree of a file that defines no entities."""

    def doctype(self, *_: object) -> None:
        raise ValueError("it has a document type")


def _cases(path: Path) -> list[ET.Element]:
    """Return the test cases of a JUnit XML file.

    Raises:
        ValueError: it is no such file, or too large.
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        data = stream.read(JUNIT_BYTES + 1)
    if len(data) > JUNIT_BYTES:
        raise ValueError(f"it has more than {JUNIT_BYTES >> 20} MiB")
    try:
        root = ET.fromstring(data, ET.XMLParser(target=_Tests()))  # noqa: S314 - without a document type no entities
    except ET.ParseError as error:
        raise ValueError(str(error)) from error
    if root.tag not in ("testsuite", "testsuites"):
        raise ValueError(f"its root is <{printable(root.tag, 100)}>")
    cases = list(islice(root.iter("testcase"), JUNIT_TESTS + 1))
    if len(cases) > JUNIT_TESTS:
        raise ValueError(f"it has more than {JUNIT_TESTS} tests")
    return cases


def _outcome(scenario: str, case: ET.Element, log_name: str, several: bool) -> ScenarioOutcome:
    """Return the outcome of a test case; with `several` files its name begins with the file's, or the class's."""
    name, place = case.get("name", ""), case.get("classname", "").rpartition(".")[2]
    result, message = "passed", ""
    for tag, meaning in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
        for found in case.findall(tag):
            result, message = meaning, (found.get("message") or found.text or "").strip().partition("\n")[0]
    try:
        seconds = max(0.0, round(float(case.get("time", 0)), 1))
    except ValueError:
        seconds = 0.0
    if not math.isfinite(seconds):
        # no JSON has it
        seconds = 0.0
    return ScenarioOutcome(
        scenario=scenario,
        test=printable(f"{place}: {name}" if several and place else name),
        result=result,
        seconds=seconds,
        message=printable(message),
        log=log_name,
    )
