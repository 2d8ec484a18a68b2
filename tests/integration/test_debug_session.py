"""Sessions in the machines of a system test that failed, by the jobs that a person starts, and by DEBUG_HOLD."""

import os
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import processes
import pytest
import trees
from local_jobs import end_all, log_of, until

from pkgci.debugsession import Session
from pkgci.engines.base import BuildRef
from pkgci.engines.local import LocalEngine
from pkgci.kept import RECORD

DEB = "bookworm-amd64"
ENVIRONMENT = "nodes: {lab: {}}\nscenarios: {failing: scenarios/failing.py}\n"
SCENARIO = """
def test_mark(node):
    assert node.run("echo failed >/root/mark; exit 7").status == 0
"""
RESTORE_SECONDS = 120


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[LocalEngine]:
    """An engine whose machines listen on an address of their own, and no session of a person's."""
    place = tmp_path_factory.mktemp("sessions")
    # an address of this host that nobody reaches from elsewhere, and yet not the one that machines have anyhow
    config = trees.config(place, debug_address="127.0.0.2")
    release = f"{(config.directory / 'releases' / 'default.yaml').read_text()}\nenvironment: lab\n"
    files = {"environments/lab.yaml": ENVIRONMENT, "scenarios/failing.py": SCENARIO, "releases/default.yaml": release}
    trees.write(config.directory, files)
    made = LocalEngine(config)
    yield made
    end_all(made)


@pytest.fixture(scope="module")
def failed(engine, tmp_path_factory) -> tuple[BuildRef, BuildRef]:
    """A system test that failed, and the session that DEBUG_HOLD of its build has begun, with its machine restored."""
    place = tmp_path_factory.mktemp("package")
    trees.commit(place / "small", trees.deb())
    given = trees.local(engine.config, place / "small", ONLY="systest", DEBUG_HOLD="2h")
    build = engine.start(f"build-{DEB}", given.values)
    assert engine.wait(build, 300) == "FAILURE"
    test, session = BuildRef(f"systest-{DEB}", 1), BuildRef("debug-session", 1)
    said = log_of(engine, build)
    assert f"{test} failed, that is its result; its machines run on for 2h in {session}" in said, said
    assert engine.record(session).parameters["NODE"] == socket.gethostname()
    opened(engine, session)
    return test, session


@pytest.fixture
def key(tmp_path) -> Path:
    """A person's private key."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "me@home", "-f", tmp_path / "key"], check=True)
    return tmp_path / "key"


def run(engine: LocalEngine, **parameters: str) -> tuple[str | None, str]:
    """Run a short build of the job; return its result, and its log."""
    ref = engine.start("debug-session", parameters)
    return engine.wait(ref, 90), log_of(engine, ref)


def opened(engine: LocalEngine, session: BuildRef) -> str:
    """Wait until a session says how to log in, and return its log."""
    until(
        lambda: "they run until" in log_of(engine, session) or not engine.record(session).alive, seconds=RESTORE_SECONDS
    )
    said = log_of(engine, session)
    assert "they run until" in said, said
    return said


def logged_in(said: str, key: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the machine by what a log says."""
    words = shlex.split(re.search(r"node: (ssh .*)", said)[1])
    words[1:1] = ["-F", "none", "-i", os.fspath(key), "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"]
    return subprocess.run([*words, command], capture_output=True, text=True, check=False, timeout=60)


def test_a_session_is_begun_listed_extended_and_closed(engine, failed, key):
    test, session = failed
    result, said = run(engine)
    assert (result, f": {test} until " in said, f"machines are kept of: {test}" in said) == ("SUCCESS", True, True), (
        said
    )
    # nobody's key is let in yet
    assert "Permission denied" in logged_in(said, key, "true").stderr
    public = key.with_suffix(".pub").read_text()
    result, said = run(engine, ACTION="extend", BUILD=str(test), DEBUG_HOLD="3h", PUBLIC_KEY=public)
    assert result == "SUCCESS", said
    until(lambda: "node lets in ssh-ed25519 me@home" in log_of(engine, session))
    assert logged_in(said, key, "cat /root/mark; echo more >/root/mark").stdout == "failed\n"
    until(lambda: log_of(engine, session).count("they run until") == 2)
    result, said = run(engine, ACTION="open", BUILD=str(test))
    assert (result, f"a session of {test} runs already" in said) == ("FAILURE", True), said
    result, said = run(engine, ACTION="close", BUILD=f"build-{DEB}/1")
    assert (result, f"the session of {test} is closed" in said) == ("SUCCESS", True), said
    assert engine.wait(session, 30) == "SUCCESS"
    result, said = run(engine, ACTION="close")
    assert (result, "no session of any system test runs on" in said) == ("FAILURE", True), said


def test_a_session_ends_by_itself_and_one_that_is_killed_leaves_no_machine(engine, failed, key):
    test, first = failed
    run(engine, ACTION="close", BUILD=str(test))
    engine.wait(first, 30)
    given = {"BUILD": str(test), "PUBLIC_KEY": key.with_suffix(".pub").read_text(), "AT_START": "true"}
    session = engine.start("debug-session", {"ACTION": "open", **given})
    said = opened(engine, session)
    # as it was before the test, and without what was done in the other session
    assert "No such file" in logged_in(said, key, "cat /root/mark").stderr
    place = engine.config.state / "sessions" / str(test).replace("/", "-")
    soon = datetime.now(UTC) + timedelta(seconds=1)
    Session.read(place / RECORD).model_copy(update={"ended": soon}).write(place / RECORD)
    assert engine.wait(session, 30) == "SUCCESS"
    assert not place.exists()

    session = engine.start("debug-session", {"ACTION": "open", **given})
    said = opened(engine, session)
    cookie = engine.record(session).cookie
    machines = [pid for pid in processes.with_marker("qemu-system") if _has(pid, cookie)]
    (step,) = [pid for pid in processes.with_marker("debug-session") if _has(pid, cookie) and _is_step(pid)]
    assert machines
    os.kill(step, signal.SIGKILL)
    assert engine.wait(session, 30) == "FAILURE"
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in machines))
    assert logged_in(said, key, "true").returncode == 255
    everywhere = engine.start("debug-session-all", {})
    assert engine.wait(everywhere, 60) == "SUCCESS"
    host = socket.gethostname()
    assert f"{host}: sessions on {host}: none; machines are kept of: {test}" in log_of(engine, everywhere)


def _has(pid: int, cookie: str) -> bool:
    try:
        return cookie.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def _is_step(pid: int) -> bool:
    return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
