"""The engine `jenkins`, on a fake server: what it does when answers are lost, and what it never does."""

import logging
import time
from types import SimpleNamespace

import jenkins_fake
import pytest
import trees
from jenkins_fake import JOB, TOKEN, configured
from local_jobs import until

from pkgci import engines, jobsupdate
from pkgci.config import Config
from pkgci.doctor import examine
from pkgci.engines import jenkins as module
from pkgci.engines.base import BuildRef, Urls
from pkgci.errors import InfrastructureError, RequestError


@pytest.fixture
def server():
    with jenkins_fake.Jenkins() as made:
        yield made
        made.shutdown()


@pytest.fixture
def engine(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RETRY", 0.02)
    monkeypatch.setattr(module, "LEAVING", 0.05)
    monkeypatch.setattr(module, "POLLS", (0.01, 0.05))
    return configured(tmp_path, server.url)


def begun(engine, server, **parameters: str):
    """Start a build and let it begin; return its reference and the fake's side of it."""
    ref = engine.start(JOB, parameters)
    return ref, server.begin()


# nodes


def test_the_nodes_of_a_label_are_named_as_their_own_labels_and_those_that_are_away_are_known(engine, server):
    assert engine.nodes("systest") == {}
    server.nodes = {"one": True, "two": False, "": True}
    assert engine.nodes("systest") == {"one": True, "two": False, "built-in": True}


def test_a_build_is_known_with_its_node(engine, server):
    ref, _ = begun(engine, server)
    assert engine.record(ref).node == "one"


# requests


def test_a_request_has_all_parameters_and_a_correlation_of_its_own(engine, server):
    one, other = (engine.start(JOB, {"COMMAND": "x y&z=é"}) for _ in range(2))
    first, second = (build.values for build in server.queue)
    assert {name: first[name] for name in ("PARENT", "COMMAND", "FAST")} == {
        "PARENT": "",
        "COMMAND": "x y&z=é",
        "FAST": "true",
    }
    assert (first["CORRELATION"], second["CORRELATION"]) == (one.request, other.request)
    assert one.request != other.request


def test_a_server_resolves_nothing_in_a_parameter(engine, server):
    ref, build = begun(engine, server, COMMAND="echo $$ ${SECRET}")
    assert build.values["COMMAND"] == "echo $$$$ $${SECRET}"
    assert engine.record(ref).parameters["COMMAND"] == "echo $$ ${SECRET}"


def test_a_build_gets_its_number_when_it_leaves_the_queue(engine, server):
    ref = engine.start(JOB, {})
    assert (engine.state(ref), engine.numbered(ref), engine.wait(ref, 0)) == ("queued", ref, None)
    build = server.begin()
    assert engine.numbered(ref) == BuildRef(JOB, 1)
    assert engine.state(ref) == "running"
    build.result = "SUCCESS"
    assert engine.wait(ref) == "SUCCESS"


@pytest.mark.parametrize("result", ["FAILURE", "UNSTABLE", "NOT_BUILT", None])
def test_a_build_that_did_not_pass_has_failed(engine, server, result):
    ref, build = begun(engine, server)
    build.result = "FAILURE" if result is None else result
    assert engine.wait(ref) == "FAILURE"


@pytest.mark.parametrize(
    ("job", "given", "said"),
    [
        ("no-such", {}, "there is nothing at"),
        ("../x", {}, "there is no job"),
        (JOB, {"SPEED": "1"}, "has no parameter 'SPEED'"),
        (JOB, {"FAST": "yes"}, "it is true or false"),
    ],
)
def test_what_a_server_would_ignore_is_refused(engine, server, job, given, said):
    with pytest.raises(RequestError, match=said):
        engine.start(job, given)
    assert server.queue == []


@pytest.mark.parametrize("fault", ["lost", "away"])
def test_a_request_whose_answer_is_lost_becomes_one_build(engine, server, fault):
    server.faults = [("buildWithParameters", fault)]
    ref = engine.start(JOB, {})
    assert [build.values["CORRELATION"] for build in server.queue] == [ref.request]
    server.begin().result = "SUCCESS"
    assert engine.wait(ref, 5) == "SUCCESS"
    assert len(server.builds) == 1


def test_a_request_whose_answer_is_lost_and_that_runs_by_now_is_not_made_again(engine, server, monkeypatch):
    found = engine._found
    monkeypatch.setattr(engine, "_found", lambda ref: server.queue and server.begin() and found(ref))
    server.faults = [("buildWithParameters", "lost")]
    ref = engine.start(JOB, {})
    assert engine.numbered(ref).number == 1
    assert len(server.items) == 1


@pytest.mark.parametrize("keeps", [True, False])
def test_a_server_that_is_restarted_runs_what_was_queued_once(engine, server, keeps):
    ref = engine.start(JOB, {"COMMAND": "queued"})
    server.restart(keeps)
    until(lambda: engine.state(ref) == "queued" and server.queue)
    assert server.begin().values["CORRELATION"] == ref.request
    assert engine.numbered(ref) == BuildRef(JOB, 1)
    assert not server.queue


def test_a_number_of_the_queue_that_is_anothers_after_a_crash_leads_to_no_build_of_another(engine, server, tmp_path):
    ref = engine.start(JOB, {"COMMAND": "mine"})
    server.restart()
    (tmp_path / "other").mkdir()
    other = configured(tmp_path / "other", server.url).start(JOB, {"COMMAND": "another's"})
    server.begin().result = "SUCCESS"
    until(lambda: engine.state(ref) == "queued" and server.queue)
    server.begin().result = "FAILURE"
    assert (engine.numbered(ref).number, engine.wait(ref), engine.wait(other)) == (2, "FAILURE", "SUCCESS")


def test_another_process_finds_a_request_by_its_correlation(engine, server, tmp_path):
    ref = engine.start(JOB, {})
    another = configured(tmp_path, server.url)
    assert another.state(ref) == "queued"
    server.begin()
    assert another.numbered(BuildRef(JOB, 0, ref.request)) == BuildRef(JOB, 1)
    unknown = BuildRef(JOB, 0, "nobody's")
    another.state(unknown)
    with pytest.raises(RequestError, match="knows nothing of"):
        until(lambda: another.state(unknown) is None)


def test_who_knows_the_correlation_finds_the_build_queued_or_running(engine, server, tmp_path):
    ref = engine.start(JOB, {"CORRELATION": "c" * 32 + "-1"})
    (tmp_path / "other").mkdir()
    other = configured(tmp_path / "other", server.url)
    assert other.find(JOB, "c" * 32 + "-2") is None
    assert other.find(JOB, ref.request) == ref
    assert other.urls(ref).build == f"{server.url}job/{JOB}/"
    server.begin()
    again = other.find(JOB, ref.request)
    assert other.numbered(again).number == 1
    place = f"{server.url}job/{JOB}/1"
    assert other.urls(again) == Urls(f"{place}/", f"{place}/consoleText", f"{place}/artifact/")


def test_a_build_that_runs_is_found_however_many_began_after_it(engine, server):
    ref, _ = begun(engine, server)
    for _ in range(jenkins_fake.NEWEST):
        begun(engine, server)[1].result = "SUCCESS"
    other = configured(engine.config.directory.parent, server.url)
    assert other.numbered(other.find(JOB, ref.request)) == BuildRef(JOB, 1)


def test_a_request_taken_out_of_the_queue_is_aborted_and_has_left_nothing(engine, server, tmp_path):
    ref = engine.start(JOB, {})
    engine.abort(ref)
    assert engine.wait(ref) == "ABORTED"
    assert (server.queue, list(engine.log(ref, follow=True))) == ([], [])
    engine.artifacts(ref, tmp_path)
    engine.abort(ref)


def test_what_was_taken_out_of_the_queue_is_not_asked_for_again_by_a_server_that_forgets_it(engine, server):
    ref = engine.start(JOB, {})
    engine.abort(ref)
    server.restart()
    assert engine.wait(ref, 10) == "ABORTED"
    assert server.queue == []


def test_what_a_server_has_forgotten_when_it_is_aborted_is_not_asked_for_again(engine, server, monkeypatch):
    monkeypatch.setattr(module, "LEAVING", 0.5)
    ref = engine.start(JOB, {})
    server.restart()
    engine.abort(ref)
    assert engine.wait(ref, 10) == "ABORTED"
    assert server.queue == []


def test_what_has_begun_is_remembered_by_its_number_only(engine, server):
    for _ in range(3):
        begun(engine, server)
    for build in server.builds:
        build.result = "SUCCESS"
    for ref in [BuildRef(JOB, 0, build.values["CORRELATION"]) for build in server.builds]:
        assert engine.wait(ref) == "SUCCESS"
    assert engine.find(JOB, "nobody's") is None
    assert engine._requests == {}


# a server that is away


def test_waiting_goes_on_while_the_server_is_away(engine, server):
    ref, build = begun(engine, server)
    server.ready = False
    assert engine.wait(ref, 0.2) is None
    server.ready, build.result = True, "SUCCESS"
    assert engine.wait(ref, 5) == "SUCCESS"


def test_a_server_that_stays_away_is_the_machines_fault(engine, server, monkeypatch):
    ref, _ = begun(engine, server)
    server.ready = False
    monkeypatch.setattr(engine, "patience", 0.1)
    for act in (lambda: engine.wait(ref), lambda: engine.start(JOB, {}), lambda: list(engine.log(ref))):
        with pytest.raises(InfrastructureError, match="HTTP status 503"):
            act()


def test_a_build_is_not_gone_because_a_server_that_starts_says_so(engine, server):
    ref = engine.numbered(begun(engine, server)[0])
    server.faults = [(f"/{JOB}/1/api", "missing")]
    assert engine.state(ref) == "running"
    server.faults = [(f"/{JOB}/1/api", "missing"), ("/api/json?tree=nodeDescription", "away")]
    with pytest.raises(InfrastructureError):
        engine.state(ref)
    with pytest.raises(RequestError):
        engine.state(BuildRef(JOB, 99))


def test_a_job_is_not_gone_because_a_server_that_starts_says_so(engine, server):
    server.faults = [("buildWithParameters", "missing")]
    ref = engine.start(JOB, {})
    assert [build.values["CORRELATION"] for build in server.queue] == [ref.request]


def test_a_crumb_of_before_a_restart_fails_nothing(engine, server):
    server.crumb = "one"
    engine.start(JOB, {})
    server.crumb = "other"
    engine.start(JOB, {})
    assert len(server.queue) == 2


def test_a_build_that_a_restart_has_lost_is_the_machines_fault(engine, server):
    ref, _ = begun(engine, server)
    assert engine.state(ref) == "running"
    server.builds.clear()
    with pytest.raises(InfrastructureError, match="was it restarted"):
        engine.wait(ref)


def test_an_account_that_is_refused_is_said_at_once_and_its_token_never(engine, server, caplog):
    caplog.set_level(logging.DEBUG)
    server.faults = [("buildWithParameters", "forbidden")]
    with pytest.raises(InfrastructureError, match="HTTP status 403: is the account pkgci right") as refused:
        engine.start(JOB, {})
    assert TOKEN not in str(refused.value) + caplog.text


def test_short_waits_in_a_row_ask_the_server_seldom(engine, server, monkeypatch):
    monkeypatch.setattr(module, "POLLS", (1.0, 5.0))
    ref, _ = begun(engine, server)
    engine.wait(ref, 0)
    before, since = len(server.asked), time.monotonic()
    while time.monotonic() - since < 0.5:
        assert engine.wait(ref, 0.02) is None
    assert len(server.asked) == before


def test_what_is_followed_and_says_nothing_is_looked_at_less_and_less(engine, server, monkeypatch):
    monkeypatch.setattr(module, "POLLS", (0.5, 5.0))
    ref, slept = engine.start(JOB, {}), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 40:
            server.begin()
        elif len(slept) == 80:
            server.builds[0].result = "SUCCESS"

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: sum(slept), sleep=sleep))
    assert list(engine.log(ref, follow=True)) == []
    for part in (slept[:40], slept[40:]):
        assert part == sorted(part)
        assert sum(part) > 25


# the log


def text(engine, ref, **options) -> bytes:
    return b"".join(engine.log(ref, **options))


def test_a_log_that_breaks_off_anywhere_has_each_byte_once(engine, server):
    ref, build = begun(engine, server)
    build.log, build.result = b"".join(b"line %d\n" % number for number in range(40)), "SUCCESS"
    for cut in range(0, len(build.log), 7):
        server.faults = [("progressiveText", cut), ("progressiveText", cut // 2), ("progressiveText", "lost")]
        assert text(engine, ref) == build.log


def test_a_followed_log_comes_as_it_grows_and_ends_with_the_build(engine, server):
    ref = engine.start(JOB, {})
    pieces = engine.log(ref, follow=True)
    build = server.begin()
    build.log = b"one\n"
    assert next(pieces) == b"one\n"
    build.log += b"two\n"
    server.faults = [("progressiveText", 1)]
    assert next(pieces) == b"two\n"
    build.log, build.result = build.log + b"Finished\n", "SUCCESS"
    assert list(pieces) == [b"Finished\n"]


def test_a_log_that_a_crash_has_cut_short_is_not_shown_twice(engine, server):
    ref, build = begun(engine, server)
    build.log = b"one\ntwo\nthree\n"
    pieces = engine.log(ref, follow=True)
    assert next(pieces) == build.log
    build.log, build.result = b"one\n", "FAILURE"
    assert list(pieces) == []


def test_a_followed_build_that_a_restart_has_lost_is_the_machines_fault(engine, server):
    ref, build = begun(engine, server)
    build.log = b"one\n"
    pieces = engine.log(ref, follow=True)
    assert next(pieces) == b"one\n"
    server.faults = [("progressiveText", "missing")]
    build.log += b"two\n"
    assert next(pieces) == b"two\n"
    server.builds.clear()
    with pytest.raises(InfrastructureError, match="was it restarted"):
        next(pieces)
    with pytest.raises(RequestError):
        list(engine.log(BuildRef(JOB, 99)))


def test_the_log_of_a_running_build_is_shown_as_far_as_it_is(engine, server):
    ref, build = begun(engine, server)
    build.log = b"one\n"
    assert text(engine, ref) == b"one\n"


# artifacts


def test_artifacts_are_copied_with_their_paths_and_again_when_they_break_off(engine, server, tmp_path):
    ref, build = begun(engine, server)
    build.artifacts, build.result = {"artifacts/a.json": b"{}", "artifacts/logs/x y%2f#.log": b"12345"}, "SUCCESS"
    server.faults = [("x y", 2)]
    engine.artifacts(ref, tmp_path)
    assert (tmp_path / "artifacts/a.json").read_bytes() == b"{}"
    assert (tmp_path / "artifacts/logs/x y%2f#.log").read_bytes() == b"12345"


def test_an_artifact_that_is_gone_is_the_machines_fault(engine, server, tmp_path):
    ref, build = begun(engine, server)
    build.artifacts, build.result = {"artifacts/a.json": b"{}"}, "SUCCESS"
    server.faults = [("a.json", "missing")]
    with pytest.raises(InfrastructureError, match=r"the artifact artifacts/a.json of run-build/1 is not there"):
        engine.artifacts(ref, tmp_path)


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a//x", "", "a\nb", "./x", "a\0"])
def test_an_artifact_with_a_path_that_leads_elsewhere_is_refused(engine, server, tmp_path, path):
    ref, build = begun(engine, server)
    build.artifacts, build.result = {path: b"evil"}, "SUCCESS"
    here = tmp_path / "here"
    here.mkdir()
    with pytest.raises(InfrastructureError, match="no path of an artifact"):
        engine.artifacts(ref, here)
    assert list(here.iterdir()) == []


# what persons and steps do


def test_an_abort_takes_along_what_the_build_has_started_queued_or_running(engine, server):
    ref, top = begun(engine, server)
    child, below = begun(engine, server, PARENT=f"{JOB}/1")
    grandchild = engine.start(JOB, {"PARENT": f"{JOB}/2"})
    stranger = engine.start(JOB, {"PARENT": "other/1"})
    engine.abort(ref)
    assert (top.result, below.result) == ("ABORTED", "ABORTED")
    assert [engine.wait(one, 5) for one in (ref, child, grandchild)] == ["ABORTED"] * 3
    assert engine.state(stranger) == "queued"


def test_the_jobs_are_those_of_this_repository(engine, server):
    assert engine.jobs() == [JOB]
    server.description = "<!-- Managed by Jenkins Job Builder -->"
    assert engine.jobs() == []


def test_a_record_says_what_the_server_knows(engine, server):
    ref, build = begun(engine, server, COMMAND="x")
    assert engine.builds(JOB) == [BuildRef(JOB, 1)]
    assert engine.record(ref).alive
    build.result = "SUCCESS"
    record = engine.record(ref)
    assert (record.state, record.parameters["COMMAND"], record.number) == ("SUCCESS", "x", 1)
    assert (record.ended - record.started).total_seconds() == 2


def test_a_build_is_described_once_it_has_a_number(engine, server):
    ref = engine.start(JOB, {})
    engine.describe(ref, "nobody sees it")
    server.begin()
    engine.describe(ref, "packages/app 4711,2")
    assert engine.record(ref).description == "packages/app 4711,2"


def test_the_environment_chooses_the_engine_and_the_configuration_names_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("PKGCI_ENGINE", "jenkins")
    configured(tmp_path, "http://127.0.0.1:1/")
    place = tmp_path / "jenkins-configuration"
    assert isinstance(engines.current(Config(place)), module.JenkinsEngine)
    (place / "token").unlink()
    with pytest.raises(RequestError, match="cannot read the token of pkgci"):
        engines.current(Config(place))
    (place / "config.yaml").write_text("{}\n")
    with pytest.raises(RequestError, match="no `jenkins`"):
        engines.current(Config(place))


@pytest.mark.parametrize(
    ("fault", "said"),
    [(None, "lets pkgci in: 1 of our jobs"), ("forbidden", "HTTP status 403"), ("away", "HTTP status 503")],
)
def test_doctor_says_whether_the_server_lets_this_machine_in(server, tmp_path, fault, said):
    server.faults = [("/api/json", fault)] if fault else []
    (found,) = (one for one in examine(configured(tmp_path, server.url).config) if server.url in one.what)
    assert (found.good, said in found.what) == (fault is None, True)


# the definitions


def test_the_job_loads_what_is_merged_where_the_configuration_says_it(server, tmp_path):
    tree = tmp_path / "gerrit" / "ci" / "pkgci"
    trees.commit(tree, {"jobs/a.yaml": "merged"})
    trees.git(tree, "checkout", "-q", "-b", "review")
    trees.commit(tree, {"jobs/a.yaml": "only proposed"})
    config = configured(tmp_path, server.url).config
    path = config.directory / "config.yaml"
    path.write_text(path.read_text().replace(": 20}\n", ": 20, definitions: {project: ci/pkgci}}\n"))
    with pytest.raises(RequestError, match="no `gerrit`"), jobsupdate.definitions(Config(config.directory)):
        pass
    path.write_text(f"{path.read_text()}gerrit: file://{tmp_path}/gerrit/\n")
    with jobsupdate.definitions(Config(config.directory)) as jobs:
        assert (jobs / "a.yaml").read_text() == "merged"
    trees.git(tree, "checkout", "-q", "main")
    trees.git(tree, "rm", "-q", "-r", "jobs")
    trees.commit(tree, {"x": ""})
    with pytest.raises(RequestError, match="has no jobs/"), jobsupdate.definitions(Config(config.directory)):
        pass


def test_a_job_of_another_owner_is_never_touched(server, tmp_path):
    jobs = tmp_path / "definitions"
    jobs.mkdir()
    config = configured(tmp_path, server.url).config
    for text, said in (
        ("[]", "defines no job"),
        ("- job: {name: other, description: 'x'}", "none of ours"),
        ("- job: {name: x, builders: [no-such]}", "Jenkins Job Builder refuses"),
    ):
        (jobs / "jobs.yaml").write_text(f"{text}\n")
        with pytest.raises(RequestError, match=said):
            jobsupdate.Update(config, jobs)
    assert [line for line in server.asked if line.startswith("POST")] == []
