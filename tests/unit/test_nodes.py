"""Jobs that concern a node, and what is started on one: on each of them, for a test that failed, for an update of QEMU."""

import socket
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from local_jobs import VISIT, end_all, make_engine

from pkgci import nodes
from pkgci.artifacts import Child
from pkgci.change import EVERY, Parameters
from pkgci.engines.base import BuildRef
from pkgci.errors import InfrastructureError, PackageError, RequestError
from pkgci.hold import held, held_children
from pkgci.prepare import begun_where_outdated
from pkgci.step import StepContext
from pkgci.vm.guest import OutdatedError

HERE = "test-host"


@pytest.fixture
def context(tmp_path, monkeypatch) -> StepContext:
    """A step in an empty directory, with an engine that has one job."""
    (tmp_path / "here" / "artifacts").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for name in ("JOB_NAME", "BUILD_NUMBER", "NODE_NAME", "PKGCI_ENGINE"):
        monkeypatch.delenv(name, raising=False)
    engine = make_engine(tmp_path, VISIT)
    yield StepContext(engine)
    end_all(engine)


@pytest.fixture
def started(monkeypatch) -> SimpleNamespace:
    """A context that only notes what is launched, on a node of that name."""
    monkeypatch.setenv("NODE_NAME", HERE)
    made = SimpleNamespace(launched=[], children=[], own=None)

    def launch(job: str, given: dict) -> BuildRef:
        made.launched.append((job, given))
        return BuildRef(job, 4)

    made.launch = launch
    made.engine = SimpleNamespace(record=lambda _: SimpleNamespace(node="elsewhere", alive=True), builds=lambda _: [])
    return made


def of(**values: str) -> Parameters:
    return Parameters.read(values, EVERY)


@pytest.mark.parametrize("name", ["", "systest", HERE])
def test_a_build_goes_on_where_it_was_asked_for(name, monkeypatch):
    monkeypatch.setenv("NODE_NAME", HERE)
    nodes.check(of(NODE=name))


def test_a_build_on_another_node_than_it_was_asked_for_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("NODE_NAME", HERE)
    with pytest.raises(RequestError, match=r"^parameter NODE: this is test-host, not other; nothing is done here$"):
        nodes.check(of(NODE="other"))


def test_a_job_runs_on_each_node_and_each_is_said(context, caplog):
    caplog.set_level("INFO")
    host = socket.gethostname()
    assert nodes.on_each(context, "visit", {}) == f"visit passed on {host}"
    assert f"{host}: visited" in caplog.messages


def test_one_that_fails_fails_the_whole_by_its_own_fault(context):
    with pytest.raises(PackageError, match="visit failed on 1 of 1 nodes; first: visit/1: visited"):
        nodes.on_each(context, "visit", {"STATUS": "1"})


def test_a_node_that_is_away_fails_the_whole_and_the_others_do_their_work(context, monkeypatch, caplog):
    caplog.set_level("INFO")
    host = socket.gethostname()
    monkeypatch.setattr(context.engine, "nodes", lambda _: {"~away": False, host: True})
    with pytest.raises(InfrastructureError, match="visit failed on 1 of 2 nodes; first: ~away is away"):
        nodes.on_each(context, "visit", {})
    assert f"{host}: visited" in caplog.messages


@pytest.mark.parametrize("verb", ["start", "artifacts"])
def test_a_node_whose_build_cannot_be_started_or_read_leaves_the_others_alone(context, monkeypatch, caplog, verb):
    caplog.set_level("INFO")
    host, do = socket.gethostname(), getattr(context.engine, verb)
    monkeypatch.setattr(context.engine, "nodes", lambda _: {"~lost": True, host: True})
    lost = []

    def refuse(about, given):
        # of the two builds, the one that is for the other node
        if verb == "start" and given["NODE"] == "~lost":
            raise InfrastructureError("the server does not answer")
        if verb == "artifacts" and context.engine.record(about).parameters["NODE"] == "~lost":
            lost.append(about)
            raise InfrastructureError("the server does not answer")
        return do(about, given)

    monkeypatch.setattr(context.engine, verb, refuse)
    with pytest.raises(InfrastructureError, match="visit failed on 1 of 2 nodes; first: the server does not answer"):
        nodes.on_each(context, "visit", {})
    assert f"{host}: visited" in caplog.messages
    assert "~lost: the server does not answer" in caplog.messages
    assert len(lost) == (verb == "artifacts")


def test_a_node_that_goes_away_before_its_build_begins_is_not_waited_for(context, monkeypatch):
    monkeypatch.setattr(nodes, "LOOK_SECONDS", 0.1)
    there = iter([True])
    monkeypatch.setattr(context.engine, "nodes", lambda _: {"~lost": next(there, False)})
    # as in the queue of a server
    monkeypatch.setattr(context.engine, "wait", lambda *_: None)
    monkeypatch.setattr(context.engine, "state", lambda _: "queued")
    aborted = []
    monkeypatch.setattr(context.engine, "abort", aborted.append)
    with pytest.raises(InfrastructureError, match="first: ~lost went away before visit/1 began"):
        nodes.on_each(context, "visit", {})
    assert aborted == [BuildRef("visit", 1)]


def test_a_build_leaves_the_work_to_one_before_it_that_was_asked_for_the_same(context, monkeypatch):
    monkeypatch.setenv("JOB_NAME", "visit")
    first, second, other = (context.engine.start("visit", {"NODE": "nowhere", "STATUS": status}) for status in "001")
    alive = {first.number}
    records = {ref: context.engine.record(ref) for ref in (first, second, other)}
    monkeypatch.setattr(
        context.engine,
        "record",
        lambda ref: records[ref].model_copy(update={"state": "running" if ref.number in alive else "FAILURE"}),
    )
    monkeypatch.setenv("BUILD_NUMBER", str(second.number))
    assert nodes.on_each(context, "visit", {}) == "left to visit/1, which has not ended"
    monkeypatch.setattr(context.engine, "nodes", lambda _: {})
    for number in (first.number, other.number):
        # nobody is before the first, and the other one is asked for something else
        monkeypatch.setenv("BUILD_NUMBER", str(number))
        with pytest.raises(InfrastructureError, match="no node has the label"):
            nodes.on_each(context, "visit", {})
    alive.clear()


def test_without_any_node_the_label_is_said(context, monkeypatch):
    monkeypatch.setattr(context.engine, "nodes", lambda _: {})
    with pytest.raises(InfrastructureError, match="no node has the label systest"):
        nodes.on_each(context, "visit", {})


def child(job: str, result: str) -> Child:
    return Child(job=job, number=7, directory=job, parameters={}, result=result, started=datetime.now(UTC), seconds=1.0)


def test_who_started_a_test_that_failed_holds_its_machines_where_it_ran(started):
    started.children = [child("lint-a", "FAILURE"), child("systest-a", "FAILURE"), child("systest-b", "ABORTED")]
    with pytest.raises(PackageError), held_children(started, of(DEBUG_HOLD="2h")):
        raise PackageError("systest-a/7: it fails")
    given = {"NODE": "elsewhere", "BUILD": "systest-a/7", "DEBUG_HOLD": "2h", "ACTION": "open"}
    assert started.launched == [("debug-session", given)]


def test_nothing_is_held_unless_it_is_asked_for_or_when_it_passes(started):
    started.children = [child("systest-a", "FAILURE")]
    with pytest.raises(PackageError), held_children(started, of()):
        raise PackageError("systest-a/7: it fails")
    with held_children(started, of(DEBUG_HOLD="2h")):
        pass
    assert started.launched == []


def test_a_test_that_a_person_started_holds_its_own_machines_and_one_with_a_parent_leaves_it_to_that(started):
    started.own = BuildRef("systest-a", 3)
    for parent in ("", "build-a/1"):
        with pytest.raises(PackageError), held(started, of(DEBUG_HOLD="90m", PARENT=parent)):
            raise PackageError("it fails")
    given = {"NODE": HERE, "BUILD": "systest-a/3", "DEBUG_HOLD": "90m", "ACTION": "open"}
    assert started.launched == [("debug-session", given)]


def test_that_no_session_can_be_started_changes_nothing_of_the_result(started, caplog):
    started.own = BuildRef("systest-a", 3)

    def refuse(*_: object) -> BuildRef:
        raise InfrastructureError("HTTP status 403")

    started.launch = refuse
    with pytest.raises(PackageError, match="it fails"), held(started, of(DEBUG_HOLD="90m")):
        raise PackageError("it fails")
    assert "the machines of systest-a/3 do not run on: HTTP status 403" in caplog.messages


def test_a_test_that_finds_another_qemu_has_its_environment_prepared_unless_that_is_under_way(started):
    for builds in ([], [BuildRef("snapshot-prepare-lab", 1)]):
        started.engine.builds = lambda _, builds=builds: builds
        with pytest.raises(OutdatedError), begun_where_outdated(started):
            raise OutdatedError("lab", "made by QEMU 7, here is QEMU 8")
    assert started.launched == [("snapshot-prepare-lab", {"NODE": HERE})]
