"""The Gearman worker, with a real Gearman server, a client that does as Zuul 2 does, and small jobs of the local engine."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

import gear
import pytest
from local_jobs import JOBS, end_all, make_engine, pid_in, supervisor_of, until

from pkgci.change import RULES
from pkgci.config import ROOT, Config
from pkgci.engines import gearman
from pkgci.engines.base import BuildRef
from pkgci.engines.definitions import read_all, render
from pkgci.engines.gearman import Worker
from pkgci.engines.local import LocalEngine
from pkgci.errors import InfrastructureError

# what they run is in a parameter that has a rule, as all that come from Gearman must
DEFINITIONS = JOBS.replace("COMMAND", "SCENARIOS").replace("WHO", "PACKAGE").replace("FAST", "RUN_TESTS") + """
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
          printf '{"schema": 1, "step": "some", "result": "FAILURE", "fault": "%s", "exit": 1, "reason": "said so", \\
            "started": "2024-01-01T00:00:00Z", "seconds": 1}' "$ZUUL_PIPELINE" >artifacts/result.json
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
          until [ -e "$BUILD_DIRECTORY/../go" ]; do sleep 0.1; done

- job:
    name: silent
    node: build
    builders:
      - shell: exit 7
"""


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
        until(lambda: name in self.registered())
        job = gear.TextJob(name, parameters if isinstance(parameters, str) else json.dumps(parameters or {}))
        self.submitJob(job)
        return job

    def registered(self) -> set[str]:
        """Return the names that workers have registered for."""
        request = gear.StatusAdminRequest()
        self.getConnection().sendAdminRequest(request)
        return {line.split()[0] for line in request.response.decode().splitlines() if line != "."}

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
