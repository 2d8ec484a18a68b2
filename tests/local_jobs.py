"""Small jobs for tests of the local engine and of steps: what they run is a parameter."""

import functools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pkgci.config import Config
from pkgci.engines.base import BuildRef
from pkgci.engines.local import LocalEngine

JOBS = """
- defaults:
    name: global
    concurrent: true
    quiet-period: 0
    properties:
      - build-discarder:
          days-to-keep: 30
    wrappers:
      - timeout: {timeout: 1, fail: true}
      - timestamps
    publishers:
      - archive: {artifacts: artifacts/**, allow-empty: true, default-excludes: false}
      - junit: {results: artifacts/junit/*.xml, allow-empty-results: true}

- job-template:
    name: run-{label}
    node: '{label}'
    parameters:
      - string: {name: PARENT}
      - string: {name: CORRELATION}
      - string: {name: COMMAND, default: 'true'}
      - string: {name: WHO, default: nobody}
      - bool: {name: FAST, default: true}
    builders:
      - shell: eval "$COMMAND"

- job:
    name: python
    node: build
    builders:
      - shell: |
          #!/usr/bin/env python3
          print("no shell")

- project:
    name: labels
    label: [control, build]
    jobs:
      - run-{label}
"""

# a job that takes a node, and says how it ends, as a step does; on another node than it was asked for it fails
VISIT = """
- job:
    name: visit
    node: systest
    properties:
      - build-discarder: {days-to-keep: 30}
    concurrent: true
    quiet-period: 0
    wrappers:
      - timeout: {timeout: 1, fail: true}
    parameters:
      - string: {name: PARENT}
      - string: {name: CORRELATION}
      - string: {name: STATUS, default: '0'}
      - label: {name: NODE, default: systest}
    builders:
      - shell: |
          #!/usr/bin/env python3
          import os, sys
          from datetime import datetime, UTC
          from pathlib import Path
          from pkgci.artifacts import Result
          same = os.environ["NODE"] == os.environ["NODE_NAME"]
          print("on", os.environ["NODE_NAME"], "for", os.environ["NODE"])
          code = int(os.environ["STATUS"]) if same else 2
          fault, result = ("none", "SUCCESS") if code == 0 else ("package", "FAILURE")
          now = datetime.now(UTC)
          made = Result(step="visit", result=result, fault=fault, exit=code, reason="visited", started=now, seconds=0)
          made.write(Path("artifacts/result.json"))
          sys.exit(code)
    publishers:
      - archive: {artifacts: artifacts/**, allow-empty: true, default-excludes: false}
"""


@functools.cache
def shared_cache() -> tempfile.TemporaryDirectory:
    """Return a directory where all tests of this process keep the rendered jobs; it goes with the process."""
    return tempfile.TemporaryDirectory()


def make_engine(directory: Path, definitions: str = JOBS, executors: int = 4) -> LocalEngine:
    """Return an engine with its state and configuration in `directory`, and as many executors for each label."""
    configuration = directory / "configuration"
    configuration.mkdir()
    counts = ", ".join(f"{label}: {executors}" for label in ("control", "build"))
    (configuration / "config.yaml").write_text(
        f"paths: {{cache: {shared_cache().name}, state: {directory}/state, data: {directory}/data}}\n"
        f"executors: {{{counts}}}\n"
    )
    jobs = directory / "jobs"
    jobs.mkdir()
    (jobs / "jobs.yaml").write_text(definitions)
    return LocalEngine(Config(configuration), jobs)


def end_all(engine: LocalEngine) -> None:
    """Abort whatever a test left running."""
    refs = [ref for job in engine.jobs() for ref in engine.builds(job)]
    for ref in refs:
        engine.abort(ref)
    for ref in refs:
        engine.wait(ref, 30)


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait until a condition holds."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "the condition did not come to hold"
        time.sleep(0.02)


def log_of(engine: LocalEngine, ref: BuildRef) -> str:
    """Return a build's log."""
    return b"".join(engine.log(ref)).decode()


def pid_in(path: Path) -> int:
    """Wait for a file with a process id and return it."""
    until(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def supervisor_of(engine: LocalEngine, ref: BuildRef) -> int:
    """Return the process id of a build's supervisor."""
    ends = [os.fsencode(engine.config.directory), str(ref).encode()]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[-4:-2] == ends:
            return int(path.parent.name)
    raise AssertionError(f"{ref} has no supervisor")
