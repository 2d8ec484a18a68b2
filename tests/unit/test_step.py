"""What a step runs in: its result, its signals, its children, and the watch on who started it."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import Mock

import pytest
from local_jobs import alive, end_all, log_of, make_engine, pid_in, supervisor_of, until

from pkgci import step
from pkgci.artifacts import Result
from pkgci.engines.base import BuildRef
from pkgci.errors import InfrastructureError, PackageError, RequestError, TriedTwiceError
from pkgci.step import StepContext

# a step in a process of its own: BODY is a function's body over `context`
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
from pkgci import step
from pkgci.config import Config
from pkgci.engines.local import LocalEngine
from pkgci.errors import *

def main(context):
{body}

LocalEngine.watch = 0.2
engine = LocalEngine(Config(Path({configuration!r})), Path({jobs!r}))
sys.exit(step.run("some", main, engine))
"""


@pytest.fixture
def engine(tmp_path):
    made = make_engine(tmp_path, executors=1)
    yield made
    end_all(made)


@pytest.fixture
def program(engine, tmp_path):
    """Return the argv of a step with the given body."""

    def write(body: str) -> list[str]:
        indented = "".join(f"    {line}\n" for line in body.splitlines())
        path = tmp_path / f"program-{len(list(tmp_path.iterdir()))}.py"
        path.write_text(
            PROGRAM.format(body=indented, configuration=str(engine.config.directory), jobs=str(tmp_path / "jobs"))
        )
        return [sys.executable, str(path)]

    return write


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Run the test in an empty directory and without a build's environment."""
    directory = tmp_path / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    for name in ("PARENT", "JOB_NAME", "BUILD_NUMBER", "PKGCI_ENGINE"):
        monkeypatch.delenv(name, raising=False)
    return directory


@pytest.fixture
def run(here, engine):
    """Run a step in this process; return its exit code and `result.json`."""

    def call(main) -> tuple[int, Result]:
        code = step.run("some", main, engine)
        return code, Result.read(here / "artifacts" / "result.json")

    return call


def raising(error: Exception):
    def main(_: StepContext) -> str:
        raise error

    return main


# results


def test_a_step_that_passes_says_why(run):
    code, result = run(lambda _: "3 packages")
    assert (code, result.exit, result.result, result.fault) == (0, 0, "SUCCESS", "none")
    assert (result.step, result.reason, result.children) == ("some", "3 packages", ())


@pytest.mark.parametrize(
    ("error", "code", "fault"),
    [
        (PackageError("it does not\n  build"), 1, "package"),
        (RequestError("it does not build"), 2, "request"),
        (InfrastructureError("it does not build"), 3, "infrastructure"),
    ],
)
def test_an_expected_error_becomes_its_exit_code_and_one_line(run, capsys, error, code, fault):
    got, result = run(raising(error))
    assert (got, result.exit, result.result, result.fault) == (code, code, "FAILURE", fault)
    assert result.reason == "it does not build"
    assert "Traceback" not in capsys.readouterr().out


def test_a_full_disk_is_the_machines_fault_wherever_it_comes_up(run, capsys):
    code, result = run(raising(OSError(errno.ENOSPC, "No space left on device", "/data/new")))
    assert (code, result.exit, result.fault) == (3, 3, "infrastructure")
    assert result.reason == "cannot write /data/new: No space left on device; make room, or mend the disk"
    assert "Traceback" not in capsys.readouterr().out


def test_a_clock_that_is_set_back_does_not_show_in_the_seconds(run, monkeypatch):
    def main(_: StepContext) -> str:
        monkeypatch.setattr("pkgci.step.datetime", Mock(now=lambda _: datetime(2001, 1, 1, tzinfo=UTC)))
        return "done"

    _, result = run(main)
    assert 0 <= result.seconds < 60


def test_a_bug_shows_its_traceback_and_is_nobody_elses_fault(run, capsys):
    code, result = run(raising(KeyError("x")))
    assert (code, result.exit, result.result, result.fault) == (3, 3, "FAILURE", "bug")
    assert result.reason == "KeyError: 'x'"
    assert "Traceback" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["package", "request", "infrastructure", "bug"])
def test_whose_fault_it_is_that_a_child_failed_is_kept(run, fault):
    left = Result(step="x", result="FAILURE", fault=fault, exit=7, reason="so", started=datetime.now(UTC), seconds=1)
    command = f"mkdir -p artifacts; echo '{left.model_dump_json(by_alias=True)}' >artifacts/result.json; exit 7"
    code, result = run(lambda context: str(context.run_together([("run-build", {"COMMAND": command})])))
    assert (result.fault, result.reason) == (fault, "run-build/1: so")
    assert code == {"package": 1, "request": 2}.get(fault, 3)


def test_a_child_that_was_tried_twice_is_nothing_to_try_again(run):
    code, result = run(raising(TriedTwiceError("QEMU was killed")))
    assert (code, result.fault, result.tried_twice) == (3, "infrastructure", True)
    command = f"mkdir -p artifacts; echo '{result.model_dump_json(by_alias=True)}' >artifacts/result.json; exit 3"
    code, result = run(lambda context: str(context.run_together([("run-build", {"COMMAND": command})])))
    assert (code, result.fault, result.tried_twice) == (3, "infrastructure", True)


def test_the_temporary_files_of_a_step_go_with_it_and_those_of_a_killed_one_with_the_next(
    run, program, here, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    killed = program("import tempfile; Path(tempfile.mkdtemp(), 'file').touch(); os.kill(os.getpid(), signal.SIGKILL)")
    subprocess.run(killed, cwd=here, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")}, check=False)
    (left,) = (tmp_path / "tmp").glob("*/*/file")
    _, result = run(lambda _: f"{left.exists()} {tempfile.mkdtemp()}")
    assert result.reason.startswith("False ")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_step_makes_no_temporary_file_outside_of_its_place(run, tmp_path, monkeypatch):
    # tempfile makes one to find out where it can, and the unlinking may take as long as the disk's journal
    monkeypatch.setattr(tempfile, "_get_default_tempdir", lambda: "a file was made")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    _, result = run(lambda _: tempfile.mkdtemp())
    assert result.reason.startswith(f"{tmp_path}/pkgci-step-")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    _, result = run(lambda _: tempfile.mkdtemp())
    assert result.reason.startswith("/tmp/pkgci-step-")


def test_what_an_earlier_run_left_in_artifacts_is_gone(run, here):
    run(lambda _: "done")
    (here / "artifacts" / "old").mkdir()
    run(lambda _: "done")
    assert [path.name for path in (here / "artifacts").iterdir()] == ["result.json"]


def test_a_result_that_cannot_be_written_is_an_infrastructure_failure(here, engine):
    def main(_: StepContext) -> str:
        (here / "artifacts").rmdir()
        (here / "artifacts").touch()
        return "done"

    assert step.run("some", main, engine) == 3


def test_a_parent_that_is_no_build_is_a_wrong_request(run, monkeypatch):
    monkeypatch.setenv("PARENT", "nobody")
    code, result = run(lambda _: "done")
    assert (code, result.reason) == (2, "'nobody' names no build; write JOB/NUMBER")


@pytest.mark.usefixtures("here")
def test_a_report_is_written_after_the_result_however_the_step_ends(engine):
    found = []
    for main in (lambda _: "done", raising(PackageError("no"))):
        step.run("some", main, engine, lambda artifacts: found.append(Result.read(artifacts / "result.json").result))
    assert found == ["SUCCESS", "FAILURE"]


@pytest.mark.parametrize(
    "error", [KeyError("x"), OSError(28, "No space left on device"), InfrastructureError("it cannot")]
)
def test_a_report_that_fails_changes_nothing_but_is_said(here, engine, capsys, error):
    def report(_: Path) -> None:
        raise error

    assert step.run("some", lambda _: "done", engine, report) == 0
    assert Result.read(here / "artifacts" / "result.json").result == "SUCCESS"
    said = capsys.readouterr().out
    assert "cannot write the report" in said
    assert ("Traceback" in said) == isinstance(error, KeyError)


# signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_aborts_the_step_and_lets_it_clean_up_undisturbed(program, here, number):
    body = """
try:
    Path("ready").touch()
    subprocess.run(["sleep", "1000"])
finally:
    os.kill(os.getpid(), signal.SIGTERM)
    Path("cleaned").touch()
"""
    process = subprocess.Popen(program(body))
    until((here / "ready").exists)
    process.send_signal(number)
    assert process.wait(30) == 143
    assert (here / "cleaned").exists()
    result = Result.read(here / "artifacts" / "result.json")
    assert (result.result, result.fault, result.exit) == ("ABORTED", "aborted", 143)
    assert result.reason == f"stopped by {number.name}"


# children


def test_a_childs_log_and_artifacts_are_kept_and_its_result_is_noted(run, here, engine):
    def main(context: StepContext) -> str:
        command = "mkdir artifacts; echo $PARENT. $CORRELATION >artifacts/x"
        refs = [context.child("run-build", {"COMMAND": command}) for _ in range(2)]
        assert [context.finish(ref) for ref in refs] == ["SUCCESS", "SUCCESS"]
        assert [str(context.directory(ref)) for ref in refs] == ["artifacts/run-build", "artifacts/run-build-2"]
        assert context.finish(context.child("run-control", {"COMMAND": "exit 1"})) == "FAILURE"
        return "done"

    code, result = run(main)
    assert code == 0
    assert [(child.job, child.number, child.result) for child in result.children] == [
        ("run-build", 1, "SUCCESS"),
        ("run-build", 2, "SUCCESS"),
        ("run-control", 1, "FAILURE"),
    ]
    words = [(here / "artifacts" / job / "x").read_text().split() for job in ("run-build", "run-build-2")]
    assert [word[0] for word in words] == [".", "."]
    assert words[0][1] != words[1][1]
    console = (here / "artifacts" / "run-control" / "console.log").read_text()
    assert console == log_of(engine, BuildRef("run-control", 1))


def test_a_child_knows_the_build_that_started_it(run, engine, monkeypatch):
    monkeypatch.setenv("JOB_NAME", "run-control")
    monkeypatch.setenv("BUILD_NUMBER", "7")
    run(lambda context: str(context.child("run-build", {})))
    assert engine.record(BuildRef("run-build", 1)).parameters["PARENT"] == "run-control/7"


def test_a_wait_for_a_child_can_be_limited(run):
    def main(context: StepContext) -> str:
        ref = context.child("run-build", {"COMMAND": "exec sleep 1000"})
        assert context.finish(ref, 0.1) is None
        return "done"

    code, result = run(main)
    assert code == 0
    assert [child.result for child in result.children] == ["ABORTED"]


def test_what_was_taken_out_of_a_servers_queue_has_a_directory_of_its_own_each(here):
    engine = Mock(wait=Mock(return_value="ABORTED"), log=Mock(return_value=[]), numbered=lambda ref: ref)
    engine.start.side_effect = [BuildRef("some", 0, f"request-{number}") for number in range(3)]
    (here / "artifacts").mkdir()
    context = StepContext(engine)
    for ref in [context.child("some", {}) for _ in range(3)]:
        assert context.finish(ref) == "ABORTED"
    assert len({child.directory for child in context.children}) == 3


def test_children_are_aborted_when_the_step_fails(run, engine):
    def main(context: StepContext) -> str:
        for job in ("run-build", "run-control"):
            context.child(job, {"COMMAND": "exec sleep 1000"})
        raise PackageError("no")

    code, result = run(main)
    assert code == 1
    assert [child.result for child in result.children] == ["ABORTED", "ABORTED"]
    assert engine.state(BuildRef("run-build", 1)) == "ABORTED"


def test_of_jobs_that_run_together_the_first_failure_ends_the_others_within_seconds(run, engine):
    def main(context: StepContext) -> str:
        context.run_together(
            [("run-build", {"COMMAND": "exec sleep 1000"}), ("run-control", {"COMMAND": "sleep 1; false"})]
        )
        return "done"

    started = time.monotonic()
    code, result = run(main)
    assert time.monotonic() - started < 6
    assert (code, result.reason) == (3, "run-control/1 ended without a result; see its log")
    assert {child.job: child.result for child in result.children} == {"run-control": "FAILURE", "run-build": "ABORTED"}
    assert engine.state(BuildRef("run-build", 1)) == "ABORTED"


def test_jobs_that_run_together_do_so_and_leave_their_directories_in_order(run, tmp_path):
    command = "mkdir artifacts; touch '{0}/{1}'; while [ ! -e '{0}/{2}' ]; do sleep 0.05; done"

    def main(context: StepContext) -> str:
        jobs = [
            ("run-build", {"COMMAND": command.format(tmp_path, "a", "b"), "WHO": ""}),
            ("run-control", {"COMMAND": command.format(tmp_path, "b", "a")}),
        ]
        return " ".join(map(str, context.run_together(jobs)))

    code, result = run(main)
    assert (code, result.reason) == (0, "artifacts/run-build artifacts/run-control")


def test_a_job_starts_once_those_that_it_comes_after_have_passed_and_knows_what_they_left(run):
    after = {"last": ["first", "second"], "second": ["first"], "first": []}

    def main(context: StepContext) -> str:
        def job(key, done):
            return "run-build", {"COMMAND": f"mkdir artifacts; echo '{key}: {' '.join(sorted(done))}' >artifacts/text"}

        left = context.run_ordered(after, job)
        return "; ".join((left[key] / "text").read_text() for key in after)

    code, result = run(main)
    assert (code, result.reason) == (0, "last: first second ; second: first ; first:")


def test_what_comes_after_a_job_that_failed_is_not_started(run, engine):
    def main(context: StepContext) -> str:
        context.run_ordered(
            {1: [], 2: [1]}, lambda key, _: (f"run-{'build' if key == 1 else 'control'}", {"COMMAND": "false"})
        )
        return "done"

    assert run(main)[0] == 3
    assert engine.builds("run-control") == []


def test_an_aborted_build_takes_its_children_along(engine, program, tmp_path):
    argv = program(f"""
context.child("run-build", {{"COMMAND": "touch '{tmp_path}/child'; exec sleep 1000"}})
time.sleep(1000)
""")
    parent = engine.start("run-control", {"COMMAND": f"exec {' '.join(argv)}"})
    until((tmp_path / "child").exists)
    engine.abort(parent)
    assert engine.wait(parent, 30) == "ABORTED"
    assert engine.state(BuildRef("run-build", 1)) == "ABORTED"
    (tmp_path / "out").mkdir()
    engine.artifacts(parent, tmp_path / "out")
    result = json.loads((tmp_path / "out" / "artifacts" / "result.json").read_text())
    assert (result["exit"], [child["result"] for child in result["children"]]) == (143, ["ABORTED"])
    assert (tmp_path / "out" / "artifacts" / "run-build" / "console.log").exists()


def test_waiting_for_children_never_deadlocks_with_one_executor_a_label(engine, program):
    argv = program("return str(context.finish(context.child('run-build', {})))")
    parents = [engine.start("run-control", {"COMMAND": f"exec {' '.join(argv)}"}) for _ in range(3)]
    assert [engine.wait(parent, 60) for parent in parents] == ["SUCCESS"] * 3


# the watch


def test_a_child_ends_when_its_parent_is_killed(engine, program, tmp_path):
    child_step = program(f"Path('{tmp_path}/pid').write_text(f'{{os.getpid()}}\\n')\ntime.sleep(1000)")
    argv = program(f"""
context.child("run-build", {{"COMMAND": "exec {" ".join(child_step)}"}})
time.sleep(1000)
""")
    parent = engine.start("run-control", {"COMMAND": f"exec {' '.join(argv)}"})
    pid = pid_in(tmp_path / "pid")
    child = BuildRef("run-build", 1)
    os.kill(supervisor_of(engine, parent), signal.SIGKILL)
    assert engine.wait(child, 30) == "ABORTED"
    assert not alive(pid)
    assert engine.state(parent) == "ABORTED"
    assert f"stopped, since the build {parent} no longer runs" in log_of(engine, child)


def test_a_step_with_a_parent_that_has_ended_ends_too(engine, program):
    parent = engine.start("run-control", {})
    engine.wait(parent)
    ref = engine.start("run-build", {"PARENT": str(parent), "COMMAND": f"exec {' '.join(program('time.sleep(1000)'))}"})
    assert engine.wait(ref, 30) == "ABORTED"


def test_a_step_that_is_not_the_shell_itself_ends_with_its_supervisor(engine, program, tmp_path):
    body = f"""
try:
    Path('{tmp_path}/pid').write_text(f'{{os.getpid()}}\\n')
    time.sleep(1000)
finally:
    Path('{tmp_path}/cleaned').touch()
"""
    ref = engine.start("run-build", {"COMMAND": f"{' '.join(program(body))}; true"})
    pid = pid_in(tmp_path / "pid")
    os.kill(supervisor_of(engine, ref), signal.SIGKILL)
    until(lambda: not alive(pid))
    assert Path(tmp_path, "cleaned").exists()
    assert engine.state(ref) == "ABORTED"
