"""What a playbook of Zuul asks: its variables as parameters, a build that is followed and ended with it, what it gets back."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gerrit
import jenkins_fake
import pytest
import trees
import yaml
from local_jobs import end_all, make_engine, supervisor_of, until

from pkgci import zuul
from pkgci.artifacts import Child, Lint, LintFinding, Result
from pkgci.change import Parameters
from pkgci.engines import jenkins
from pkgci.engines.base import BuildRef
from pkgci.engines.local import LocalEngine
from pkgci.errors import InfrastructureError, RequestError

JOBS = """
- job:
    name: check
    concurrent: true
    node: build
    parameters:
      - string: {name: PARENT}
      - string: {name: CORRELATION}
      - string: {name: COMMAND, default: 'true'}
      - string: {name: ZUUL_PROJECT}
      - string: {name: ZUUL_BRANCH}
      - string: {name: ZUUL_CHANGE}
      - string: {name: ZUUL_PATCHSET}
      - string: {name: ZUUL_CHANGES}
      - string: {name: ZUUL_PIPELINE}
      - string: {name: ZUUL_UUID}
    builders:
      - shell: eval "$COMMAND"
    publishers:
      - archive: {artifacts: artifacts/**, allow-empty: true, default-excludes: false}
"""
RESULT = {"schema": 1, "step": "check", "started": "2026-01-01T00:00:00Z", "seconds": 1, "children": []}
FAILED = json.dumps({**RESULT, "result": "FAILURE", "fault": "package", "exit": 1, "reason": "no rule to make all"})
ANSWERER = """
import sys
from pathlib import Path
from pkgci.config import Config
from pkgci.engines.local import LocalEngine
from pkgci.zuul import answer
config = Config(Path(sys.argv[1]))
answer(config, LocalEngine(config, Path(sys.argv[2])), sys.stdin.buffer, sys.stdout.buffer, sys.stderr.buffer)
"""


def item(project: str, change: str, patch_set: str = "1", branch: str = "main") -> dict:
    return {"project": {"name": project}, "branch": branch, "change": change, "patchset": patch_set}


def variables(**more: object) -> dict:
    about = {"job": "check", "build": "b" * 32, "buildset": "c" * 32, "pipeline": "check", "tenant": "packages"}
    return {
        **about,
        **item("packages/app", "1203", "2"),
        "items": [item("packages/lib", "7"), item("packages/app", "1203", "2")],
        **more,
    }


def request(verb: str = "run", runs: str = "", **more: object) -> bytes:
    given = {"COMMAND": runs} if runs else {}
    return json.dumps({"verb": verb, "parameters": given, "zuul": variables(**more)}).encode()


def parameters(**more: object) -> dict[str, str]:
    given = zuul.Request.model_validate_json(request(**more)).parameters
    assert given.pop("CORRELATION") == f"{'c' * 32}-1"
    return given


@pytest.fixture
def engine(tmp_path):
    made = make_engine(tmp_path, JOBS)
    yield made
    end_all(made)


def ask(engine: LocalEngine, **more: object) -> tuple[dict, str]:
    """Return what a playbook gets in another process, and the log."""
    done = subprocess.run(command(engine), input=request(**more), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr.decode()


def command(engine: LocalEngine) -> list[str]:
    return [sys.executable, "-c", ANSWERER, str(engine.config.directory), str(engine._definitions)]


def test_the_queue_becomes_the_parameters_of_zuul_2():
    given = parameters()
    assert given == {
        "ZUUL_PROJECT": "packages/app",
        "ZUUL_BRANCH": "main",
        "ZUUL_CHANGE": "1203",
        "ZUUL_PATCHSET": "2",
        "ZUUL_PIPELINE": "check",
        "ZUUL_UUID": "b" * 32,
        "ZUUL_CHANGES": "packages/lib:main:refs/changes/07/7/1^packages/app:main:refs/changes/03/1203/2",
    }
    assert Parameters.read(given).values == given


def test_of_changes_that_depend_on_each_other_the_jobs_own_is_the_last():
    queue = [item("packages/a", "5"), item("packages/app", "1203", "2"), item("packages/b", "6")]
    names = [part.partition(":")[0] for part in parameters(items=queue)["ZUUL_CHANGES"].split("^")]
    assert names == ["packages/a", "packages/b", "packages/app"]


def test_numbers_may_be_numbers():
    assert parameters(change=1203, patchset=2) == parameters()


def moved(**more: object) -> dict[str, str]:
    given = {"change": "", "patchset": "", "pipeline": "post", **more}
    return parameters(**given, items=[{"project": {"name": "packages/app"}, "branch": "main"}])


def test_a_branch_that_has_moved_is_named_with_both_of_its_commits():
    given = moved(oldrev="1" * 40, newrev="2" * 40)
    about = {"ZUUL_PROJECT": "packages/app", "ZUUL_PIPELINE": "post", "ZUUL_UUID": "b" * 32}
    assert given == about | {"ZUUL_REFNAME": "main", "ZUUL_OLDREV": "1" * 40, "ZUUL_NEWREV": "2" * 40}
    assert moved(newrev="2" * 40)["ZUUL_OLDREV"] == moved(oldrev="1" * 40)["ZUUL_NEWREV"] == "0" * 40


def test_a_job_that_takes_no_change_is_told_about_none():
    assert zuul.Request.model_validate(
        {"verb": "run", "change": False, "zuul": variables(), "parameters": {"DRY_RUN": "true"}}
    ).parameters == {"DRY_RUN": "true", "CORRELATION": f"{'c' * 32}-1"}


def test_a_job_of_a_timer_is_about_no_change():
    assert moved(pipeline="periodic") == {}


@pytest.mark.parametrize("wrong", [{"project": {"name": "a;b"}}, {"patchset": "$(id)"}, {"build": "../x"}])
def test_what_breaks_a_rule_starts_nothing(engine, wrong):
    with pytest.raises(RequestError, match="is not allowed"):
        zuul.answer(engine.config, engine, io.BytesIO(request(**wrong)), io.BytesIO(), io.BytesIO())
    assert engine.builds("check") == []


def test_what_is_no_request_is_refused_in_one_line(engine):
    with pytest.raises(RequestError, match=r"^the playbook's request: verb: Field required$"):
        zuul.answer(engine.config, engine, io.BytesIO(b'{"zuul": {}}'), io.BytesIO(), io.BytesIO())


def test_the_log_is_passed_on_and_the_reason_is_returned(engine):
    clear = r"printf '\033[2J\n'"
    said, log = ask(
        engine, runs=f"echo built; {clear}; mkdir artifacts; echo '{FAILED}' >artifacts/result.json; exit 1"
    )
    assert (said["exit"], said["reason"]) == (1, "check: no rule to make all")
    url = engine.urls(engine.builds("check")[0]).build
    assert log.startswith(f"check/1 on the engine: {url}\n")
    assert "built\n" in log
    assert "\x1b" not in log
    about = said["returned"]["zuul"]
    assert (about["log_url"], about["warnings"]) == (url, ["check: no rule to make all"])
    assert about["artifacts"] == [{"name": "Log", "url": f"{url}log", "metadata": {"type": "log"}}]


def test_a_build_that_waits_on_a_server_is_named_by_its_number_once_it_has_one(tmp_path, monkeypatch):
    monkeypatch.setattr(jenkins, "POLLS", (0.01, 0.05))
    log = io.BytesIO()
    asked = {"verb": "run", "change": False, "zuul": variables(job=jenkins_fake.JOB)}

    def run() -> None:
        until(lambda: b"queued" in log.getvalue())
        build = server.begin()
        build.log, build.result = b"built\n", "SUCCESS"

    with jenkins_fake.Jenkins() as server:
        engine = jenkins_fake.configured(tmp_path, server.url)
        thread = threading.Thread(target=run)
        thread.start()
        zuul._run(engine.config, engine, zuul.Request.model_validate(asked), log)
        thread.join()
        server.shutdown()
    page = f"{server.url}job/run-build/"
    queued, *said = log.getvalue().decode().splitlines()
    assert queued == f"run-build (request {'c' * 32}-1) queued: {page}"
    assert said == [f"run-build/1 on the engine: {page}1/", "built"]


def test_a_build_that_a_server_has_lost_is_the_infrastructures_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(jenkins, "POLLS", (0.01, 0.05))
    asked = {"verb": "run", "change": False, "zuul": variables(job=jenkins_fake.JOB)}
    log = io.BytesIO()

    def run() -> None:
        until(lambda: server.queue)
        server.begin().log = b"said\n"
        until(lambda: b"said" in log.getvalue())
        server.builds.clear()

    with jenkins_fake.Jenkins() as server:
        engine = jenkins_fake.configured(tmp_path, server.url)
        thread = threading.Thread(target=run)
        thread.start()
        with pytest.raises(InfrastructureError):
            zuul._run(engine.config, engine, zuul.Request.model_validate(asked), log)
        thread.join()
        server.shutdown()


def test_that_the_infrastructure_failed_twice_is_told(engine):
    twice = json.dumps({**json.loads(FAILED), "fault": "infrastructure", "exit": 3, "tried_twice": True})
    said, _ = ask(engine, runs=f"mkdir artifacts; echo '{twice}' >artifacts/result.json; exit 3")
    assert (said["exit"], said["tried_twice"]) == (3, True)


def test_a_build_without_a_result_is_the_infrastructures_fault(engine):
    said, _ = ask(engine, runs="exit 7")
    assert (said["exit"], said["reason"]) == (3, "check: ended without a result: see its log")


def test_a_build_that_was_killed_is_the_infrastructures_fault(engine):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command(engine), **pipes) as one:
        one.stdin.write(request(runs="echo held; exec sleep 1000"))
        one.stdin.close()
        until(lambda: b"held" in one.stderr.readline())
        os.kill(supervisor_of(engine, BuildRef("check", 1)), signal.SIGKILL)
        said = json.loads(one.stdout.read())
    reason = "check: ended without a result: its supervising process was killed"
    assert (said["exit"], said["reason"]) == (3, reason)


def test_a_build_that_somebody_took_out_of_the_queue_is_aborted(tmp_path):
    engine = make_engine(tmp_path, JOBS, executors=1)
    try:
        first = engine.start("check", {"COMMAND": "exec sleep 1000"})
        until(lambda: engine.state(first) == "running")
        with subprocess.Popen(command(engine), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as one:
            one.stdin.write(request())
            one.stdin.close()
            until(lambda: len(engine.builds("check")) > 1)
            engine.abort(BuildRef("check", 2))
            assert json.loads(one.stdout.read())["exit"] == 143
    finally:
        end_all(engine)


def test_an_unknown_job_is_said(engine):
    said, _ = ask(engine, job="chekc")
    reason = "chekc: there is no job 'chekc'; `pkgci jobs list` shows all"
    assert said == {"exit": 2, "tried_twice": False, "reason": reason, "returned": {"zuul": {"warnings": [reason]}}}


@pytest.mark.parametrize("how", ["the reader goes", signal.SIGTERM, "the log's reader goes"])
def test_the_build_ends_with_its_playbook(engine, how):
    with subprocess.Popen(
        command(engine), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as one:
        one.stdin.write(request(runs="echo held; exec sleep 1000"))
        one.stdin.close()
        until(lambda: b"held" in one.stderr.readline())
        if how == "the reader goes":
            one.stdout.close()
        elif how == signal.SIGTERM:
            os.kill(one.pid, how)
        else:
            one.stdout.close()
            one.stderr.close()
        one.wait(30)
    (ref,) = engine.builds("check")
    assert engine.state(ref) == "ABORTED"


def held(engine: LocalEngine, correlation: str):
    return engine.start("check", {"COMMAND": "exec sleep 1000", "CORRELATION": correlation})


def test_what_an_earlier_attempt_left_is_aborted_and_nothing_else(engine):
    left, other = held(engine, f"{'c' * 32}-1"), held(engine, f"{'e' * 32}-1")
    said, _ = ask(engine, attempts=2, runs="exit 7")
    assert (said["exit"], said["reason"]) == (3, "check: ended without a result: see its log")
    assert (engine.state(left), engine.state(other)) == ("ABORTED", "running")


def test_what_runs_for_a_playbook_that_was_killed_is_aborted(engine):
    own, later = held(engine, f"{'c' * 32}-2"), held(engine, f"{'c' * 32}-3")
    assert ask(engine, verb="abort", attempts=2)[0] == {
        "exit": 0,
        "tried_twice": False,
        "reason": f"aborted: {own}",
        "returned": {},
    }
    assert (engine.state(own), engine.state(later)) == ("ABORTED", "running")
    assert ask(engine, verb="abort", attempts=2)[0]["reason"] == "nothing runs any more"


# comments on lines


@pytest.fixture
def review(tmp_path):
    with gerrit.serving() as server:
        (tmp_path / "password").write_text(gerrit.PASSWORD)
        account = {"url": server.url, "user": gerrit.USER, "password_file": f"{tmp_path}/password"}
        package = {"source": "packages/app", "packaging": "packages/app-packaging"}
        server.config = trees.config(tmp_path, {"app": package}, review=account, zuul={"project": "ci/pkgci"})
        yield server


def finding(file: str | None, **more: object) -> LintFinding:
    about = {"package": "app", "source": True, "severity": "warning", "tag": "bad-thing", "message": "it is bad"}
    return LintFinding(**{**about, "file": file, **more})


def artifacts(
    place: Path, findings: tuple[LintFinding, ...] = (), log: str = "", project: str = "packages/app"
) -> Path:
    about = {"target": "t", "package": "app", "version": "1", "key": "0", "tool": "lint 1", "fails": "error"}
    Lint(**about, findings=findings).write(place / "lint-t" / "lint.json")
    child = Child(
        job="compile-t",
        number=1,
        directory="compile-t",
        parameters={"ZUUL_PROJECT": project},
        result="FAILURE",
        started=RESULT["started"],
        seconds=1,
    )
    Result.model_validate_json(FAILED).model_copy(update={"children": (child,)}).write(place / "result.json")
    (place / "compile-t" / "logs").mkdir(parents=True)
    (place / "compile-t" / "logs" / "build.log").write_text(log)
    return place


def comments(review, place: Path) -> dict:
    return zuul.comments(review.config, zuul.Job.model_validate(variables()), place)


def test_findings_of_lint_are_comments_on_the_lines_of_the_changes_files(review, tmp_path):
    review.files = {"/COMMIT_MSG": {}, "debian/control": {}, "rpm/app.spec": {}, "gone": {"status": "D"}}
    found = (
        finding("debian/control:7"),
        finding("app.spec:3", severity="error", message=""),
        finding("debian/control:9", known=True),
        finding("debian/changelog:1"),
        finding("debian/control"),
        finding("gone:1"),
        finding("usr/bin/debian/control:2", source=False),
        finding(None),
    )
    said = comments(review, artifacts(tmp_path / "a", found))
    assert said == {
        "debian/control": [{"line": 7, "message": "warning: bad-thing it is bad [check]", "level": "warning"}],
        "rpm/app.spec": [{"line": 3, "message": "error: bad-thing [check]", "level": "error"}],
    }


LOG = """gcc -c ../src/main.c
../src/main.c:12:5: error: expected ';' before 'return'
../src/main.c:12:5: error: expected ';' before 'return'
/build/app-1/src/util.c: In function 'f':
/build/app-1/src/util.c:40:9: warning: unused variable 'x\x1b[2J' [-Wunused-variable]
main.c:1:10: fatal error: none.h: No such file or directory
/usr/include/stdio.h:5:1: warning: old
src/ambiguous.h:0: error: no line
"""


def test_what_compilers_say_is_on_the_lines_too(review, tmp_path):
    review.files = {"src/main.c": {}, "src/util.c": {"status": "A"}, "doc/x": {}}
    said = comments(review, artifacts(tmp_path / "a", log=LOG))
    assert [(one["line"], one["message"]) for one in said["src/main.c"]] == [
        (12, "error: expected ';' before 'return' [check]"),
        (1, "error: none.h: No such file or directory [check]"),
    ]
    assert said["src/util.c"][0]["message"] == "warning: unused variable 'x?[2J' [-Wunused-variable] [check]"
    assert set(said) == {"src/main.c", "src/util.c"}


def test_a_log_that_is_made_to_take_long_does_not(review, tmp_path):
    review.files = {"main.c": {}}
    line = "a" * 60_000 + ":1x" * 2000
    place = artifacts(tmp_path / "a", log=f"{line}\n" * 120 + "main.c:1: error: x\n" + f"{line}:1: error: x\n")
    since = time.monotonic()
    assert len(comments(review, place)["main.c"]) == 1
    assert time.monotonic() - since < 5


def test_a_file_that_two_may_be_gets_no_comment_nor_does_another_packages(review, tmp_path):
    review.files = {"a/main.c": {}, "b/main.c": {}}
    assert comments(review, artifacts(tmp_path / "a", log="main.c:1: error: x\n")) == {}
    review.files = {"main.c": {}}
    assert comments(review, artifacts(tmp_path / "b", log="main.c:1: error: x\n", project="packages/lib")) == {}


def test_there_is_a_limit_of_comments_and_no_answer_is_no_failure(review, tmp_path):
    place = artifacts(tmp_path / "a", log="".join(f"main.c:{line}: warning: x\n" for line in range(1, 99)))
    review.files = {"main.c": {}}
    assert len(comments(review, place)["main.c"]) == zuul.COMMENTS
    review.files = None
    assert comments(review, place) == {}


# the tenant


def test_the_tenant_has_the_packages_that_gerrit_has(review):
    review.projects = {"ci/pkgci": "refs/heads/main", "packages/app": "refs/heads/main", "other": "refs/heads/main"}
    (said,) = yaml.safe_load(zuul.tenants(review.config))
    tenant = said["tenant"]
    assert (tenant["name"], tenant["max-job-timeout"]) == ("packages", zuul.JOB_SECONDS)
    assert tenant["source"]["gerrit"] == {
        "config-projects": [
            {
                "ci/pkgci": {
                    "load-branch": "main",
                    "include-branches": ["main"],
                    "implied-branch-matchers": False,
                    "extra-config-paths": "zuul/zuul.d/",
                }
            }
        ],
        "untrusted-projects": [{"packages/app": {"include": []}}],
    }


def test_a_tenant_needs_to_know_this_repositorys_project(tmp_path):
    with pytest.raises(RequestError, match=r"config\.yaml: no `zuul`; the tenant's configuration needs it"):
        zuul.tenants(trees.config(tmp_path))
