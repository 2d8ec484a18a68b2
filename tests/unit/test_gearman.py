"""The Gearman worker, with a real Gearman server, a client that does as Zuul 2 does, and small jobs of the local engine."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import gear
import pytest
from local_jobs import JOBS, end_all, make_engine, supervisor_of, until

from pkgci.change import EVERY
from pkgci.config import ROOT, Config
from pkgci.engines import gearman
from pkgci.engines.base import BuildInfo, BuildRef, Urls
from pkgci.engines.definitions import read_all, render
from pkgci.engines.gearman import Worker
from pkgci.engines.local import LocalEngine
from pkgci.errors import InfrastructureError, RequestError

DEFINITIONS = (
    JOBS
    + """
- job:
    name: report
    node: build
    parameters:
      - string: {name: ZUUL_PROJECT}
      - string: {name: ZUUL_PIPELINE}
      - bool: {name: RUN_TESTS, default: true}
      - string: {name: PARENT}
      - string: {name: CORRELATION}
    builders:
      - shell: |
          mkdir artifacts
          env >artifacts/index.html
          twice=true; [ "$ZUUL_PIPELINE" != "${{ZUUL_PIPELINE%-twice}}" ] || twice=false
          sed "s/FAULT/${{ZUUL_PIPELINE%-twice}}/; s/TWICE/$twice/" >artifacts/result.json <<END
          {{"schema": 1, "step": "some", "result": "FAILURE", "fault": "FAULT", "exit": 1, "reason": "said so",
          "started": "2024-01-01T00:00:00Z", "seconds": 1, "tried_twice": TWICE}}
          END
          [ "$ZUUL_PIPELINE" = none ]

- job:
    name: hold
    node: build
    parameters:
      - string: {name: ZUUL_PROJECT}
      - string: {name: ZUUL_UUID}
      - string: {name: CORRELATION}
    builders:
      - shell: |
          until [ -e "$PKGCI_CONFIG/../go" ]; do sleep 0.1; done

- job:
    name: silent
    node: build
    parameters:
      - string: {name: CORRELATION}
    builders:
      - shell: exit 7
"""
)


class Zuul(gear.Client):
    """Submits jobs and sees what Zuul sees: the last data, and, for each end, the result in it or that there is none."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.ended = threading.Event()
        self.addServer("127.0.0.1", port)
        self.waitForServer()

    def handleDisconnect(self, job):  # noqa: N802
        """Note that the server has lost a job, or this client the server."""
        job.failure = True
        return super().handleDisconnect(job)

    def submit(self, name: str, parameters: object = None) -> gear.TextJob:
        """Submit a job, once a worker has registered for it."""
        until(lambda: name in self.workers())
        job = gear.TextJob(name, parameters if isinstance(parameters, str) else json.dumps(parameters or {}))
        self.submitJob(job)
        return job

    def workers(self) -> set[str]:
        """Return the names that workers are registered for now; a job that waits is not one."""
        request = gear.StatusAdminRequest()
        self.getConnection().sendAdminRequest(request)
        rows = [line.split() for line in request.response.decode().splitlines() if line != "."]
        return {row[0] for row in rows if int(row[3])}

    def build(self, job: str, **parameters: str) -> Mapping:
        """Run a job to its end; return what is known of it then."""
        submitted = self.submit(f"build:{job}", parameters)
        until(lambda: submitted.complete)
        return said(submitted)


def said(job: gear.TextJob) -> Mapping:
    """Return the last data of a job; without `result` Zuul starts it again."""
    return json.loads(job.data[-1]) if job.data and not job.failure else {}


@pytest.fixture
def server():
    made = gear.Server(0, host="127.0.0.1")
    yield made
    made.shutdown()


@pytest.fixture
def zuul(server):
    made = Zuul(server.port)
    yield made
    made.shutdown()


@pytest.fixture
def engine(tmp_path):
    made = make_engine(tmp_path, DEFINITIONS)
    yield made
    end_all(made)


@pytest.fixture
def work(engine, server):
    """Start workers; they finish at the end."""
    started = []

    def start(at_once: int = 4, on=None) -> Worker:
        offered = {name: engine.definition(name) for name in engine.jobs()}
        worker = Worker(engine.config, on or engine, offered, "127.0.0.1", server.port, at_once)
        thread = threading.Thread(target=worker.run)
        thread.start()
        started.append((worker, thread))
        return worker

    yield start
    for worker, _ in started:
        worker.stopping = True
    end_all(engine)
    for _, thread in started:
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def worker(work):
    return work()


def test_a_job_that_passes_says_first_which_build_it_is_and_where(engine, worker, zuul):
    job = zuul.submit("build:report", {"ZUUL_PROJECT": "org/small", "ZUUL_PIPELINE": "none"})
    until(lambda: job.complete)
    first = json.loads(job.data[0])
    assert {"name": "report", "number": 1, "manager": worker.name, "worker_program": "pkgci"}.items() <= first.items()
    directory = engine.directory(BuildRef("report", 1))
    assert first["url"] == f"{directory.as_uri()}/"
    assert first["worker_ips"] == ["127.0.0.1"]
    assert json.loads(job.data[-2])["url"] == f"{directory.as_uri()}/archive/artifacts/index.html"
    assert said(job)["result"] == "SUCCESS"


@pytest.mark.usefixtures("worker")
def test_a_served_build_is_at_its_url(engine, zuul):
    configuration = engine.config.directory / "config.yaml"
    configuration.write_text(configuration.read_text() + "builds: https://builds.example.org/jobs/\n")
    engine.config = Config(engine.config.directory)
    page = "https://builds.example.org/jobs/report/builds/1/"
    job = zuul.submit("build:report", {"ZUUL_PIPELINE": "none"})
    until(lambda: job.complete)
    assert json.loads(job.data[-2])["url"] == f"{page}archive/artifacts/index.html"
    environment = (engine.directory(BuildRef("report", 1)) / "archive/artifacts/index.html").read_text()
    assert f"BUILD_URL={page}\n" in environment


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    ("fault", "result"),
    [
        ("package", "FAILURE"),
        ("request", "FAILURE"),
        ("bug", "FAILURE"),
        ("infrastructure", None),
        ("infrastructure-twice", "FAILURE"),
    ],
)
def test_only_the_infrastructures_failure_is_without_result(zuul, fault, result):
    assert zuul.build("report", ZUUL_PIPELINE=fault).get("result") == result


@pytest.mark.usefixtures("worker")
def test_a_build_that_could_not_say_how_it_ended_is_without_result(zuul):
    assert not zuul.build("silent")


@pytest.mark.usefixtures("worker")
def test_a_killed_build_is_without_result(engine, zuul):
    job = zuul.submit("build:hold")
    until(lambda: job.data)
    until(lambda: engine.state(BuildRef("hold", 1)) == "running")
    os.kill(supervisor_of(engine, BuildRef("hold", 1)), signal.SIGKILL)
    until(lambda: job.complete)
    assert not said(job)


@pytest.mark.usefixtures("worker")
def test_parameters_that_the_job_does_not_have_are_dropped(engine, zuul):
    zuul.build("report", ZUUL_PIPELINE="none", LOG_PATH="a", LD_PRELOAD="b", PARENT="report/7", CORRELATION="mine")
    parameters = engine.record(BuildRef("report", 1)).parameters
    assert not set(parameters) & {"LOG_PATH", "LD_PRELOAD"}
    assert parameters["PARENT"] == ""
    assert len(parameters["CORRELATION"]) == 32


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    "arguments",
    [
        '{"ZUUL_PROJECT": "../../etc"}',
        '{"ZUUL_PROJECT": "a;b"}',
        '{"RUN_TESTS": "maybe"}',
        '{"ZUUL_PROJECT": ["a"]}',
        "[]",
        "{" * 100_000,
        "no JSON",
        json.dumps({"ZUUL_PROJECT": "a" * (1 << 20)}),
    ],
)
def test_parameters_that_break_a_rule_start_nothing(engine, zuul, arguments):
    job = zuul.submit("build:report", arguments)
    until(lambda: job.complete)
    assert said(job) == {"result": "FAILURE"}
    assert not engine.builds("report")


def test_each_parameter_of_our_jobs_has_a_rule(tmp_path):
    jobs = read_all(render(ROOT / "jobs", tmp_path))
    assert not {parameter.name for job in jobs.values() for parameter in job.parameters} - set(EVERY)


def test_stop_aborts_a_build_of_this_worker_only(engine, worker, zuul):
    other = engine.start("hold", {})
    job = zuul.submit("build:hold")
    until(lambda: job.data)
    for number in (other.number, 99, "2"):
        asked = zuul.submit(f"stop:{worker.name}", {"name": "hold", "number": number})
        until(lambda asked=asked: asked.complete)
    assert engine.record(other).alive
    assert not job.complete
    zuul.submit(f"stop:{worker.name}", {"name": "hold", "number": json.loads(job.data[0])["number"]})
    until(lambda: job.complete)
    assert engine.state(BuildRef("hold", 2)) == "ABORTED"
    assert engine.record(other).alive


def test_a_description_is_kept_as_one_line_of_text(engine, worker, zuul):
    zuul.build("report", ZUUL_PROJECT="org/small", ZUUL_PIPELINE="none")
    text = "<p>\n  Triggered by:\n <a href='x'>1,1</a><br/>\x1b[2J Pipeline: <b>a &amp; b</b></p>"
    words = {"name": "report", "number": 1, "html_description": text}
    job = zuul.submit(f"set_description:{worker.name}", words)
    until(lambda: job.complete)
    assert engine.record(BuildRef("report", 1)).description == "org/small: Triggered by: 1,1 ?[2J Pipeline: a & b"


def test_progress_is_told_by_the_last_build_that_passed(monkeypatch, work, zuul, tmp_path):
    monkeypatch.setattr(gearman, "PROGRESS", 0.1)
    work()
    first = zuul.submit("build:hold")
    until(lambda: first.numerator)
    assert int(first.denominator) == 60, "its time limit"
    (tmp_path / "go").touch()
    until(lambda: first.complete)
    assert said(first)["result"] == "SUCCESS"
    (tmp_path / "go").unlink()
    second = zuul.submit("build:hold")
    until(lambda: second.numerator)
    assert int(second.denominator) < 60


def test_as_many_are_started_at_once_as_allowed(engine, work, zuul):
    work(at_once=1)
    first, second = zuul.submit("build:hold"), zuul.submit("build:hold")
    until(lambda: first.data)
    until(lambda: engine.state(BuildRef("hold", 1)) == "running")
    assert not second.data
    engine.abort(BuildRef("hold", 1))
    until(lambda: second.data)


def test_a_worker_that_is_told_to_end_finishes_what_runs_and_takes_no_more(engine, work, zuul, tmp_path, caplog):
    caplog.set_level("INFO")
    worker = work()
    first = zuul.submit("build:hold")
    until(lambda: first.data)
    worker.stopping = True
    until(lambda: "no more jobs are taken; finishing 1" in caplog.text)
    second = gear.TextJob("build:hold", "{}")
    zuul.submitJob(second)
    (tmp_path / "go").touch()
    until(lambda: first.complete)
    assert said(first)["result"] == "SUCCESS"
    until(lambda: "build:hold" not in zuul.workers())
    assert engine.builds("hold") == [BuildRef("hold", 1)]
    work()
    until(lambda: second.complete)
    assert said(second)["result"] == "SUCCESS"


@pytest.mark.usefixtures("worker")
def test_a_lost_server_is_connected_to_again_and_what_it_asked_for_is_aborted(engine, server, zuul):
    job = zuul.submit("build:hold")
    until(lambda: job.data)
    port = server.port
    server.shutdown()
    until(lambda: engine.state(BuildRef("hold", 1)) == "ABORTED")
    assert not said(job)
    again = gear.Server(port, host="127.0.0.1")
    try:
        other = Zuul(port)
        assert other.build("report", ZUUL_PIPELINE="none")["result"] == "SUCCESS"
        other.shutdown()
    finally:
        again.shutdown()


class Away:
    """An engine whose verbs fail that are in `lost`."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self.lost: set[str] = set()

    def __getattr__(self, name: str):
        if name in self.lost:
            raise InfrastructureError("the engine is away")
        return getattr(self._engine, name)


class Lost(Away):
    """An engine that a build's artifacts have gone from."""

    def artifacts(self, ref: BuildRef, _: Path) -> None:
        raise RequestError(f"there is no build {ref}")


class Queue(Away):
    """An engine whose builds get no number as long as `queued`."""

    queued = True

    def start(self, job: str, parameters: Mapping[str, str]) -> BuildRef:
        self.real = self._engine.start(job, parameters)
        return BuildRef(job, 0, "request")

    def numbered(self, _: BuildRef) -> BuildRef:
        if "numbered" in self.lost:
            raise InfrastructureError("the engine is away")
        return BuildRef(self.real.job, 0, "request") if self.queued else self.real

    def wait(self, _: BuildRef, timeout: float) -> str | None:
        return self._engine.wait(self.real, timeout)

    def abort(self, ref: BuildRef) -> None:
        assert ref == BuildRef(self.real.job, 0, "request")
        self._engine.abort(self.real)

    def urls(self, _: BuildRef) -> Urls:
        return self._engine.urls(self.real)

    def artifacts(self, _: BuildRef, destination: Path) -> None:
        self._engine.artifacts(self.real, destination)

    def record(self, _: BuildRef) -> BuildInfo:
        return self._engine.record(self.real)


def test_a_build_that_waits_in_a_servers_queue_can_be_stopped(engine, work, zuul, monkeypatch):
    monkeypatch.setattr(gearman, "NUMBERED", 0.1)
    worker = work(on=Queue(engine))
    job = zuul.submit("build:hold")
    until(lambda: job.data)
    number = json.loads(job.data[0])["number"]
    assert number < 0
    zuul.submit(f"stop:{worker.name}", {"name": "hold", "number": number})
    until(lambda: job.complete)
    assert engine.state(BuildRef("hold", 1)) == "ABORTED"


def test_a_build_that_gets_its_number_soon_is_told_by_it(engine, work, zuul, tmp_path):
    queue = Queue(engine)
    queue.lost.add("numbered")
    work(on=queue)
    job = zuul.submit("build:hold")
    until(lambda: engine.builds("hold"))
    assert not job.data
    queue.lost.clear()
    queue.queued = False
    until(lambda: job.data)
    assert json.loads(job.data[0])["number"] == 1
    (tmp_path / "go").touch()
    until(lambda: job.complete)


def test_a_build_whose_engine_is_lost_is_aborted_and_without_result(engine, work, zuul):
    away = Away(engine)
    work(on=away)
    job = zuul.submit("build:hold")
    until(lambda: job.data)
    away.lost.add("wait")
    until(lambda: job.complete)
    assert not said(job)
    until(lambda: engine.state(BuildRef("hold", 1)) == "ABORTED")


@pytest.mark.parametrize("lost", [False, True])
def test_a_build_that_nobody_wants_any_more_is_aborted_once_the_engine_takes_it(engine, work, server, zuul, lost):
    away = Away(engine)
    worker = work(on=away)
    job = zuul.submit("build:hold")
    until(lambda: job.data)
    away.lost.add("abort")
    if lost:
        server.shutdown()
    else:
        stop = zuul.submit(f"stop:{worker.name}", {"name": "hold", "number": 1})
        until(lambda: stop.complete)
    assert engine.wait(BuildRef("hold", 1), 1.5) is None
    away.lost.clear()
    until(lambda: engine.state(BuildRef("hold", 1)) == "ABORTED")


def test_a_build_that_the_engine_has_lost_is_without_result(engine, work, zuul, tmp_path):
    lost = Lost(engine)
    work(on=lost)
    job = zuul.submit("build:hold")
    until(lambda: job.data)
    (tmp_path / "go").touch()
    until(lambda: job.complete)
    assert not said(job)


def test_nothing_is_taken_while_the_engine_is_away(engine, work, zuul, monkeypatch, caplog):
    monkeypatch.setattr(gearman, "ENGINE_AWAY", 0.1)
    away = Away(engine)
    away.lost.add("jobs")
    work(on=away)
    job = zuul.submit("build:report", {"ZUUL_PIPELINE": "none"})
    until(lambda: caplog.text.count("the engine is away") > 1)
    assert not job.complete
    away.lost.clear()
    until(lambda: job.complete)
    assert said(job)["result"] == "SUCCESS"


PROGRAM = """
import sys
from pathlib import Path
from pkgci.config import Config
from pkgci.engines.gearman import Worker
from pkgci.engines.local import LocalEngine
engine = LocalEngine(Config(Path(sys.argv[1])), Path(sys.argv[2]))
Worker(engine.config, engine, {name: engine.definition(name) for name in engine.jobs()}, "127.0.0.1", int(sys.argv[3]), 4).run()
"""


def test_what_a_killed_worker_left_is_aborted_by_the_next(engine, work, server, zuul, tmp_path):
    words = [sys.executable, "-c", PROGRAM, engine.config.directory, tmp_path / "jobs", str(server.port)]
    with subprocess.Popen(words) as process:
        job = zuul.submit("build:hold")
        until(lambda: job.data)
        other = engine.start("hold", {})
        process.kill()
    until(lambda: job.failure)
    assert engine.record(BuildRef("hold", 1)).alive
    work()
    until(lambda: engine.state(BuildRef("hold", 1)) == "ABORTED")
    assert engine.record(other).alive


def test_the_command_offers_our_jobs_and_ends_by_sigterm(engine, server, zuul):
    words = [Path(sys.executable).with_name("pkgci"), "gearman-worker", "--port", str(server.port)]
    environment = {**os.environ, "PKGCI_CONFIG": str(engine.config.directory)}
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            until(lambda: "build:gate-bookworm-amd64" in zuul.workers())
            process.terminate()
            assert "no more jobs are taken; finishing 0" in process.stderr.read()
            assert process.wait() == 0
        finally:
            process.kill()
