"""The local engine, with real builds of small jobs."""

import inspect
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
from click.testing import CliRunner
from local_jobs import JOBS, alive, end_all, log_of, make_engine, pid_in, supervisor_of, until

from pkgci import engines
from pkgci import jobs as user
from pkgci.artifacts import Result
from pkgci.engines import local
from pkgci.engines.base import BuildRef, Engine
from pkgci.engines.local import BuildRecord, LocalEngine
from pkgci.engines.supervisor import count_tests
from pkgci.errors import Exit, RequestError

HELD = 'touch "$WHO"; exec sleep 1000'
# a grandchild in a session of its own, whose parents are gone and that ignores polite requests
DAEMON = """python3 -c '
import os, signal
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(os.environ["WHO"], "w").write(f"{os.getpid()}\\n")
        while True: signal.pause()
    os._exit(0)
os.wait()'
"""


@pytest.fixture
def engine(tmp_path):
    made = make_engine(tmp_path)
    yield made
    end_all(made)


def run(engine: LocalEngine, command: str, **parameters: str) -> BuildRef:
    """Run a command in a build to its end."""
    ref = engine.start("run-build", {"COMMAND": command, **parameters})
    assert engine.wait(ref, 60)
    return ref


def archived(engine: LocalEngine, ref: BuildRef, destination: Path) -> dict[str, str]:
    """Return what a build archived, by path."""
    destination.mkdir()
    engine.artifacts(ref, destination)
    return {str(path.relative_to(destination)): path.read_text() for path in destination.rglob("*") if path.is_file()}


def spawned_with(monkeypatch, settings: str) -> None:
    """Let supervisors run with other settings of their module."""
    code = f"from pkgci.engines import supervisor; {settings}; supervisor.main()"
    monkeypatch.setattr(local, "COMMAND", [sys.executable, "-c", code])


class OnlyVerbs:
    """An engine that has the verbs of `base.Engine`, and nothing else that the local one has."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str):
        if name not in vars(Engine):
            raise AttributeError(f"{name} is no verb of an engine")
        return getattr(self._engine, name)


def test_the_local_engine_has_all_verbs_with_their_parameters():
    verbs = [name for name in vars(Engine) if not name.startswith("_")]
    ours = {name: inspect.signature(getattr(LocalEngine, name)).parameters for name in verbs}
    assert ours == {name: inspect.signature(getattr(Engine, name)).parameters for name in verbs}


def test_what_persons_do_with_jobs_needs_the_verbs_only(engine):
    verbs = OnlyVerbs(engine)
    run(engine, "exit 1", WHO="me")
    again = user.run(verbs, "run-build", {}, rerun=1)
    assert (user.follow(verbs, again), user.exit_of(verbs, again)) == (Exit.INFRASTRUCTURE, Exit.INFRASTRUCTURE)
    assert re.search("run-build +2 +FAILURE", user.list_jobs(verbs))
    assert len(user.list_builds(verbs, "run-build").splitlines()) == 2


# definitions


def test_the_jobs_are_those_that_job_builder_renders(engine):
    assert engine.jobs() == ["python", "run-build", "run-control"]


def test_an_unknown_element_is_refused_by_job_and_path(tmp_path):
    engine = make_engine(tmp_path, JOBS.replace("- timestamps", "- timestamps\n      - ansicolor"))
    with pytest.raises(RequestError, match=r"job run-build: .* buildWrappers/hudson\.plugins\.ansicolor\.AnsiColor"):
        engine.start("run-build", {})


def test_an_unknown_element_within_a_known_one_is_refused(tmp_path):
    engine = make_engine(tmp_path, JOBS.replace("fail: true}", "fail: true, timeout-var: X}"))
    with pytest.raises(RequestError, match=r"BuildTimeoutWrapper/timeoutEnvVar"):
        engine.start("run-build", {})


def test_an_unknown_value_is_refused(tmp_path):
    engine = make_engine(tmp_path, JOBS.replace("concurrent: true", "concurrent: false"))
    with pytest.raises(RequestError, match=r"value 'false' of element concurrentBuild"):
        engine.start("run-build", {})


def test_an_unknown_attribute_value_is_refused(tmp_path):
    engine = make_engine(tmp_path, JOBS.replace("fail: true}", "fail: true, type: no-activity}"))
    with pytest.raises(RequestError, match=r"NoActivityTimeOutStrategy.* of element buildWrappers/"):
        engine.start("run-build", {})


def test_definitions_that_job_builder_refuses_are_a_request_error_with_its_reason(tmp_path):
    engine = make_engine(tmp_path, JOBS.replace("- timestamps", "- nosuchwrapper"))
    with pytest.raises(RequestError, match="nosuchwrapper"):
        engine.jobs()


def test_rendered_jobs_are_kept_until_a_definition_changes(tmp_path):
    engine = make_engine(tmp_path)
    first = engine._rendered
    assert LocalEngine(engine.config, tmp_path / "jobs")._rendered == first
    (tmp_path / "jobs" / "jobs.yaml").write_text(JOBS.replace("nobody", "somebody"))
    assert LocalEngine(engine.config, tmp_path / "jobs")._rendered != first


def test_an_engine_that_is_not_there_is_a_request_error(engine, monkeypatch):
    monkeypatch.setenv("PKGCI_ENGINE", "other")
    with pytest.raises(RequestError, match="there is no engine 'other'"):
        engines.current(engine.config)


# parameters and environment


def test_parameters_reach_the_step_with_defaults_filled_in(engine):
    ref = run(engine, 'echo "$WHO $FAST $PARENT."', WHO="me")
    assert "me true ." in log_of(engine, ref)
    parameters = {"PARENT": "", "CORRELATION": "", "COMMAND": 'echo "$WHO $FAST $PARENT."', "WHO": "me", "FAST": "true"}
    assert engine.record(ref).parameters == parameters


def test_a_parameter_that_is_hostile_is_not_obeyed_by_who_reads_the_log(engine):
    ref = run(engine, "true", WHO="\x1b[2J\x9b\r\nforged")
    assert r"WHO='\x1b[2J\x9b\r\nforged'" in log_of(engine, ref)


def test_an_unknown_parameter_is_refused(engine):
    with pytest.raises(RequestError, match="run-build has no parameter 'WHOM'"):
        engine.start("run-build", {"WHOM": "x"})


def test_a_boolean_parameter_takes_true_and_false_only(engine):
    with pytest.raises(RequestError, match="FAST is 'yes'; it is true or false"):
        engine.start("run-build", {"FAST": "yes"})


@pytest.mark.parametrize("value", ["a\0b", "a\udcffb"])
def test_a_value_that_is_no_text_is_refused(engine, value):
    with pytest.raises(RequestError, match="WHO is not text"):
        engine.start("run-build", {"WHO": value})


def test_an_unknown_job_or_build_is_refused_by_every_verb(engine, tmp_path):
    nobody = BuildRef("run-build", 7)
    refused = [
        lambda: engine.start("../x", {}),
        lambda: engine.builds("nojob"),
        lambda: engine.wait(nobody),
        lambda: engine.state(BuildRef("../jobs/run-build", 1)),
        lambda: list(engine.log(nobody)),
        lambda: engine.artifacts(nobody, tmp_path),
        lambda: engine.abort(nobody),
    ]
    for verb in refused:
        with pytest.raises(RequestError):
            verb()


def test_the_environment_is_the_engines_and_not_what_the_starter_happened_to_have(engine, monkeypatch):
    monkeypatch.setenv("BUILD_KEY", "of another job")
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    ref = run(engine, "env >artifacts-not; cat artifacts-not; command -v python")
    text = re.sub(r"(?m)^\S+ ", "", log_of(engine, ref))
    assert "BUILD_KEY" not in text
    assert "PKGCI_SUPERVISOR" not in text
    expected = {
        "JOB_NAME": "run-build",
        "BUILD_NUMBER": "1",
        "BUILD_TAG": "run-build-1",
        "NODE_NAME": socket.gethostname(),
        "PKGCI_ENGINE": "local",
        "PKGCI_CONFIG": str(engine.config.directory),
        "XDG_DATA_HOME": "/somewhere",
        "WORKSPACE": str(engine.directory(ref) / "workspace"),
    }
    for name, value in expected.items():
        assert f"\n{name}={value}\n" in text
    assert f"\n{Path(sys.executable).parent}/python\n" in text


def test_a_shell_step_stops_at_its_first_failing_command(engine):
    ref = run(engine, "echo one; false; echo two")
    assert engine.state(ref) == "FAILURE"
    assert "one" in log_of(engine, ref)
    assert "Z two" not in log_of(engine, ref)


def test_a_step_with_an_interpreter_line_runs_in_it(engine):
    ref = engine.start("python", {})
    assert engine.wait(ref, 60) == "SUCCESS"
    assert "no shell" in log_of(engine, ref)


# log, archive, JUnit


def test_every_line_of_the_log_has_the_time_it_began(engine):
    ref = run(engine, "set +x; printf 'one\\ntw'; printf 'o\\n\\nthree'")
    lines = log_of(engine, ref).splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ", line) for line in lines)
    assert {"one", "two", "", "three"} <= {line.partition(" ")[2] for line in lines}


def test_a_followed_log_comes_while_the_build_runs_and_ends_with_it(engine, tmp_path):
    go_on = tmp_path / "go-on"
    ref = engine.start("run-build", {"COMMAND": f'echo first; until [ -e "{go_on}" ]; do sleep 0.05; done; echo last'})
    seen = b""
    for piece in engine.log(ref, follow=True):
        seen += piece
        if b"Z first\n" in seen and not go_on.exists():
            assert engine.state(ref) == "running"
            go_on.touch()
    assert b"Z last\n" in seen
    assert seen.endswith(b"Finished: SUCCESS\n")


def test_artifacts_are_archived_also_of_a_failed_build_and_the_workspace_is_gone(engine, tmp_path):
    ref = run(engine, "mkdir -p artifacts/a/b; echo x >artifacts/a/b/.c; echo y >other; chmod 500 artifacts/a; false")
    assert engine.state(ref) == "FAILURE"
    assert archived(engine, ref, tmp_path / "out") == {"artifacts/a/b/.c": "x\n"}
    assert not (engine.directory(ref) / "workspace").exists()


def test_nothing_outside_the_workspace_is_archived_through_links_and_no_pipe_is_opened(engine, tmp_path):
    secret = tmp_path / "secret"
    (secret / "junit").mkdir(parents=True)
    (secret / "key").write_text("secret")
    command = (
        'mkdir artifacts; cd artifacts; ln -s "$WHO/key" file; ln -s "$WHO" folder; ln -s "$WHO/junit" junit; mkfifo p'
    )
    ref = run(engine, command, WHO=str(secret))
    assert engine.state(ref) == "SUCCESS"
    assert archived(engine, ref, tmp_path / "out") == {}
    for name in ("file", "folder", "p"):
        assert f"no regular file: artifacts/{name}\n" in log_of(engine, ref)


def test_an_artifacts_directory_that_is_a_link_is_not_followed(engine, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    ref = run(engine, 'ln -s "$WHO" artifacts', WHO=str(tmp_path / "secret"))
    assert archived(engine, ref, tmp_path / "out") == {}


def junit(content: str) -> str:
    return f"mkdir -p artifacts/junit; printf %s {shlex.quote(content)} >artifacts/junit/t.xml"


def test_a_failure_in_junit_results_fails_a_build_whose_steps_passed(engine):
    cases = (
        "<testcase/><testcase><failure/></testcase><testcase><error/><error/></testcase><testcase><skipped/></testcase>"
    )
    ref = run(engine, junit(f"<testsuites><testsuite>{cases}</testsuite></testsuites>"))
    record = engine.record(ref)
    assert (record.state, record.tests.total, record.tests.failed, record.tests.skipped) == ("FAILURE", 4, 2, 1)


def test_passed_junit_results_leave_a_build_passed(engine):
    ref = run(engine, junit("<testsuite><testcase/></testsuite>"))
    assert engine.record(ref).tests.failed == 0
    assert engine.state(ref) == "SUCCESS"


def test_unreadable_junit_results_fail_the_build_and_are_said(engine):
    ref = run(engine, junit("<testsuite>"))
    assert engine.state(ref) == "FAILURE"
    assert "Cannot read the JUnit results t.xml" in log_of(engine, ref)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "<html/>",
        '<!DOCTYPE t [<!ENTITY a SYSTEM "file:///etc/passwd">]><testsuite>&a;</testsuite>',
        "<testsuite>\0",
    ],
)
def test_what_is_no_plain_junit_file_is_refused(content, tmp_path):
    (tmp_path / "t.xml").write_text(content)
    with pytest.raises(ValueError, match=r"element|root|document type|token"):
        count_tests(tmp_path / "t.xml")


# end of processes


def test_a_step_that_ended_leaves_no_process_behind(engine, tmp_path):
    ref = run(engine, f"{DAEMON}", WHO=str(tmp_path / "pid"))
    assert engine.state(ref) == "SUCCESS"
    assert not alive(pid_in(tmp_path / "pid"))


def test_an_abort_kills_daemons_that_left_the_session_too(engine, tmp_path):
    ref = engine.start("run-build", {"COMMAND": f"{DAEMON}\nexec sleep 1000", "WHO": str(tmp_path / "pid")})
    pid = pid_in(tmp_path / "pid")
    engine.abort(ref)
    assert engine.wait(ref, 30) == "ABORTED"
    assert engine.record(ref).reason == "asked to stop"
    assert not alive(pid)


def test_an_aborted_step_may_clean_up_and_what_it_archived_is_kept(engine, tmp_path):
    command = "trap 'echo cleaned >artifacts/x; exit 143' TERM; mkdir artifacts; touch \"$WHO\"; sleep 1000 & wait"
    ref = engine.start("run-build", {"COMMAND": command, "WHO": str(tmp_path / "there")})
    until((tmp_path / "there").exists)
    engine.abort(ref)
    assert engine.wait(ref, 30) == "ABORTED"
    assert archived(engine, ref, tmp_path / "out") == {"artifacts/x": "cleaned\n"}


def test_a_step_that_ignores_the_request_is_killed_after_the_grace_period(engine, tmp_path, monkeypatch):
    spawned_with(monkeypatch, "supervisor.GRACE = 0.3")
    command = "trap '' TERM; touch \"$WHO\"; while :; do sleep 1; done"
    ref = engine.start("run-build", {"COMMAND": command, "WHO": str(tmp_path / "there")})
    until((tmp_path / "there").exists)
    engine.abort(ref)
    assert engine.wait(ref, 5) == "ABORTED"


def test_status_143_of_a_step_means_aborted(engine):
    assert engine.state(run(engine, "exit 143")) == "ABORTED"


def test_the_time_limit_fails_the_build_and_kills_all_of_it(engine, tmp_path, monkeypatch):
    spawned_with(monkeypatch, "supervisor.MINUTE = 1.0")
    ref = run(engine, f"{DAEMON}\nexec sleep 1000", WHO=str(tmp_path / "pid"))
    assert engine.state(ref) == "FAILURE"
    assert "no end after 1 minutes, the job's time limit" in log_of(engine, ref)
    assert not alive(pid_in(tmp_path / "pid"))


def test_a_killed_supervisor_takes_its_step_along_and_is_reported_as_aborted(engine, tmp_path):
    other = engine.start("run-build", {"COMMAND": HELD, "WHO": str(tmp_path / "other")})
    command = f'{DAEMON}\necho $$ >"$WHO.step"; exec sleep 1000'
    ref = engine.start("run-build", {"COMMAND": command, "WHO": str(tmp_path / "pid")})
    daemon, step = pid_in(tmp_path / "pid"), pid_in(tmp_path / "pid.step")
    until((tmp_path / "other").exists)
    os.kill(supervisor_of(engine, ref), signal.SIGKILL)
    until(lambda: not alive(step))
    until(lambda: engine.state(ref) == "ABORTED")
    assert not alive(daemon)
    assert not (engine.directory(ref) / "workspace").exists()
    record = BuildRecord.read(engine.directory(ref) / "build.json")
    assert (record.state, record.reason) == ("ABORTED", "its supervising process was killed")
    assert engine.state(other) == "running"
    assert run(engine, "true").number == ref.number + 1


def test_a_start_that_was_killed_half_way_harms_nothing(engine):
    first = run(engine, "true")
    half_made = engine.directory(first).with_name(".new")
    half_made.mkdir()
    (half_made / "build.json").write_text("{")
    assert engine.builds("run-build") == [first]
    assert engine.state(run(engine, "true")) == "SUCCESS"


def test_a_starter_killed_at_any_moment_leaves_builds_that_end_and_numbers_that_are_not_reused(engine, tmp_path):
    starter = (
        "import sys, local_jobs; from pathlib import Path; from pkgci.config import Config; "
        "e = local_jobs.LocalEngine(Config(Path(sys.argv[1])), Path(sys.argv[2])); print(flush=True)\n"
        "while True: print(e.start('run-build', {}).number, flush=True)"
    )
    command = [sys.executable, "-c", starter, str(engine.config.directory), str(tmp_path / "jobs")]
    told = []
    for moment in range(10):
        process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(moment * 0.004)
        process.kill()
        told += [int(number) for number in process.communicate()[0].split()]
    assert len(told) == len(set(told))
    refs = engine.builds("run-build")
    assert {engine.wait(ref, 60) for ref in refs} <= {"SUCCESS", "ABORTED"}
    assert {engine.state(BuildRef("run-build", number)) for number in told} <= {"SUCCESS"}
    last = run(engine, "true")
    assert engine.state(last) == "SUCCESS"
    assert last.number > max((ref.number for ref in refs), default=0)


def test_a_build_survives_the_death_of_who_started_it(engine, tmp_path):
    code = "import sys, local_jobs; from pathlib import Path; from pkgci.config import Config; " + (
        "e = local_jobs.LocalEngine(Config(Path(sys.argv[1])), Path(sys.argv[2])); "
        "e.start('run-build', {'COMMAND': sys.argv[3]}); import os; os.kill(0, 9)"
    )
    command = f'until [ -e "{tmp_path}/go-on" ]; do sleep 0.05; done'
    arguments = [str(engine.config.directory), str(tmp_path / "jobs"), command]
    subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=Path(__file__).parents[1],
        start_new_session=True,
        check=False,
    )
    (ref,) = engine.builds("run-build")
    (tmp_path / "go-on").touch()
    assert engine.wait(ref, 30) == "SUCCESS"


# queue


def test_builds_of_a_label_run_one_after_the_other_in_order_with_one_executor(tmp_path):
    engine = make_engine(tmp_path, executors=1)
    overlap = f'mkdir "{tmp_path}/busy"; echo $BUILD_NUMBER >>"{tmp_path}/order"; sleep 0.1; rmdir "{tmp_path}/busy"'
    refs = [engine.start("run-build", {"COMMAND": overlap}) for _ in range(4)]
    assert [engine.wait(ref, 60) for ref in refs] == ["SUCCESS"] * 4
    assert (tmp_path / "order").read_text().split() == ["1", "2", "3", "4"]


def test_builds_that_were_queued_before_a_clock_was_set_back_have_their_turn(tmp_path, monkeypatch):
    engine = make_engine(tmp_path, executors=1)
    holder = engine.start("run-build", {"COMMAND": HELD, "WHO": str(tmp_path / "held")})
    until((tmp_path / "held").exists)
    with monkeypatch.context() as ahead:
        ahead.setattr(local, "datetime", Mock(now=lambda zone: datetime.now(zone) + timedelta(days=9)))
        queued = [engine.start("run-build", {"COMMAND": "true"})]
    queued.append(engine.start("run-build", {"COMMAND": "true"}))
    engine.abort(holder)
    assert [engine.wait(ref, 60) for ref in queued] == ["SUCCESS", "SUCCESS"]


def test_a_queued_build_says_so_and_can_be_aborted(tmp_path):
    engine = make_engine(tmp_path, executors=1)
    first = engine.start("run-build", {"COMMAND": HELD, "WHO": str(tmp_path / "there")})
    until((tmp_path / "there").exists)
    second = engine.start("run-build", {"COMMAND": f'touch "{tmp_path}/ran"'})
    until(lambda: "Waiting for an executor of the label build" in log_of(engine, second))
    assert engine.state(second) == "queued"
    assert engine.wait(second, 0) is None
    engine.abort(second)
    assert engine.wait(second, 30) == "ABORTED"
    assert engine.record(second).reason == "asked to stop while it was queued"
    assert engine.state(first) == "running"
    assert not (tmp_path / "ran").exists()
    end_all(engine)


def test_a_killed_build_in_the_queue_keeps_nobody_waiting(tmp_path):
    engine = make_engine(tmp_path, executors=1)
    first = engine.start("run-build", {"COMMAND": HELD, "WHO": str(tmp_path / "there")})
    until((tmp_path / "there").exists)
    second, third = (engine.start("run-build", {}) for _ in range(2))
    until(lambda: all("Waiting" in log_of(engine, ref) for ref in (second, third)))
    os.kill(supervisor_of(engine, second), signal.SIGKILL)
    engine.abort(first)
    assert engine.wait(third, 30) == "SUCCESS"
    assert engine.wait(second, 30) == "ABORTED"


def test_the_time_in_the_queue_counts_against_no_time_limit(tmp_path, monkeypatch):
    engine = make_engine(tmp_path, executors=1)
    first = engine.start("run-build", {"COMMAND": HELD, "WHO": str(tmp_path / "there")})
    until((tmp_path / "there").exists)
    spawned_with(monkeypatch, "supervisor.MINUTE = 0.5")
    second = engine.start("run-build", {})
    until(lambda: datetime.now(UTC) - engine.record(second).queued > timedelta(seconds=1))
    engine.abort(first)
    assert engine.wait(second, 30) == "SUCCESS"


def test_several_processes_starting_builds_at_once_get_numbers_of_their_own(engine, tmp_path):
    code = "import sys, local_jobs; from pathlib import Path; from pkgci.config import Config; " + (
        "e = local_jobs.LocalEngine(Config(Path(sys.argv[1])), Path(sys.argv[2])); "
        "[print(e.start('run-build', {}).number) for _ in range(3)]"
    )
    command = [sys.executable, "-c", code, str(engine.config.directory), str(tmp_path / "jobs")]
    starters = [
        subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    numbers = [int(number) for starter in starters for number in starter.communicate()[0].split()]
    assert sorted(numbers) == list(range(1, 10))
    assert {engine.wait(BuildRef("run-build", number), 60) for number in numbers} == {"SUCCESS"}


# discarder


def test_builds_older_than_the_days_are_deleted_and_their_numbers_stay_taken(engine):
    refs = [run(engine, "true") for _ in range(2)]
    for ref in refs:
        long_ago = datetime.now(UTC) - timedelta(days=31)
        engine.record(ref).model_copy(update={"ended": long_ago}).write(engine.directory(ref) / "build.json")
    third = run(engine, "true")
    until(lambda: engine.builds("run-build") == [third])
    assert third.number == 3
    engine.discard("run-build", -1)
    assert engine.builds("run-build") == []
    assert run(engine, "true").number == 4


def test_a_build_that_is_discarded_meanwhile_keeps_nobody_from_finding_another(engine, monkeypatch):
    ref = engine.start("run-build", {"CORRELATION": "mine"})
    monkeypatch.setattr(engine, "builds", lambda _job: [ref, BuildRef("run-build", 99)])
    assert engine.find("run-build", "mine") == ref
    assert engine.find("run-build", "another's") is None


def test_a_running_build_is_never_discarded(engine, tmp_path):
    ref = engine.start("run-build", {"COMMAND": HELD, "WHO": str(tmp_path / "there")})
    until((tmp_path / "there").exists)
    engine.discard("run-build", -1)
    assert engine.state(ref) == "running"


# by hand: `pkgci jobs`


@pytest.fixture
def command(engine, monkeypatch):
    """Run `pkgci jobs` with arguments; return its exit code and output."""
    monkeypatch.setattr(engines, "current", lambda _: engine)

    def invoke(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(user.jobs, arguments)
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.output

    return invoke


def test_run_follows_the_log_and_ends_with_the_result(command):
    code, output = command("run", "run-build", "COMMAND=echo hello")
    assert (code, output.splitlines()[0]) == (0, "run-build/1")
    assert "Z hello\n" in output


def test_run_ends_with_the_exit_code_that_the_step_left_in_its_result(command):
    result = Result(
        step="x", result="FAILURE", fault="request", exit=2, reason="r", started=datetime.now(UTC), seconds=1
    ).model_dump_json(by_alias=True)
    keep = f"mkdir artifacts; echo {shlex.quote(result)} >artifacts/result.json; exit 2"
    assert command("run", "run-build", f"COMMAND={keep}")[0] == 2
    assert command("run", "run-build", "COMMAND=exit 143")[0] == 143


def test_run_of_a_step_that_was_killed_is_the_machines_fault(command):
    assert command("run", "run-build", "COMMAND=kill -KILL $$")[0] == 3


def test_rerun_takes_the_former_parameters_without_its_parent(command, engine):
    first = run(engine, 'echo "I am $WHO"', WHO="me", CORRELATION="abc")
    code, output = command("run", "run-build", "--rerun", str(first.number), "FAST=false")
    assert code == 0
    assert "I am me" in output
    former = engine.record(first).parameters
    assert engine.record(BuildRef("run-build", 2)).parameters == {**former, "CORRELATION": "", "FAST": "false"}


def test_list_shows_each_job_with_its_last_build(command, engine):
    run(engine, "true")
    run(engine, "false")
    rows = [line.split(maxsplit=2) for line in command("list")[1].splitlines()]
    assert rows == [["python", "-", "never ran"], ["run-build", "2", "FAILURE"], ["run-control", "-", "never ran"]]
    builds = [line.split() for line in command("list", "run-build")[1].splitlines()]
    assert [(words[0], words[3]) for words in builds] == [("2", "FAILURE"), ("1", "SUCCESS")]


def test_a_detached_build_is_looked_at_aborted_and_its_artifacts_are_taken(command, tmp_path):
    keep = f'mkdir artifacts; echo x >artifacts/x; echo ready; touch "{tmp_path}/there"; exec sleep 1000'
    assert command("run", "-d", "run-build", f"COMMAND={keep}") == (0, "run-build/1\n")
    until((tmp_path / "there").exists)
    assert command("abort", "run-build", "1") == (0, "run-build/1: ABORTED\n")
    assert "Z ready\n" in command("log", "run-build", "1")[1]
    assert command("artifacts", "run-build", "1", str(tmp_path / "out"))[0] == 0
    assert (tmp_path / "out" / "artifacts" / "x").read_text() == "x\n"


def test_ctrl_c_aborts_the_build_that_is_followed(engine, tmp_path, monkeypatch, capfd):
    ref = engine.start("run-build", {"COMMAND": HELD, "WHO": str(tmp_path / "there")})
    until((tmp_path / "there").exists)
    original = engine.log

    def interrupted_once(ref, follow):
        monkeypatch.setattr(engine, "log", original)
        yield from original(ref, not follow)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "log", interrupted_once)
    assert user.follow(engine, ref) == 143
    assert capfd.readouterr().out == log_of(engine, ref)


def test_a_word_that_is_no_parameter_is_refused(command):
    with pytest.raises(RequestError, match="write NAME=VALUE"):
        command("run", "run-build", "COMMAND")
