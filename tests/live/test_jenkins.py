"""The engine `jenkins` on a real server, beside the local engine: the same jobs, the same verbs, the same artifacts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import local_jobs
import pytest
import trees
from click.testing import CliRunner, Result
from hudson_server import Hudson, load
from local_jobs import alive, pid_in, until
from servers import Sshd

from pkgci import demo, nodes
from pkgci.cli import main
from pkgci.config import EMBEDDED, ROOT, Config, Login
from pkgci.engines.base import BuildRef, Engine
from pkgci.engines.jenkins import JenkinsEngine
from pkgci.engines.local import LocalEngine
from pkgci.errors import InfrastructureError, RequestError
from pkgci.step import StepContext

# without JUnit results, which Hudson does not let a build be without
JOBS = re.sub(r"      - junit: .*\n", "", local_jobs.JOBS)
HELD = 'touch "$WHO"; exec sleep 1000'
# a step whose child is held; both say where they are
PARENT = """
import os, sys
from pathlib import Path
from pkgci import engines, step
from pkgci.config import Config
from pkgci.engines.local import LocalEngine

def main(context):
    context.child("run-build", {"COMMAND": 'echo $$ > "$WHO"; ' + os.environ["CHILD"], "WHO": os.environ["WHO"]})
    Path(os.environ["WHO"] + ".parent").write_text(f"{os.getpid()}\\n")
    for ref in list(context._running):
        context.finish(ref)
    return "done"

jobs = Path(sys.argv[1])
local = os.environ["PKGCI_ENGINE"] == "local"
sys.exit(step.run("parent", main, LocalEngine(Config(), jobs) if local else engines.current(Config())))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory, gnupg) -> Iterator[tuple[Config, Hudson | None]]:
    """A server with the small jobs: Jenkins where the environment names one, else Hudson with this repository's, too."""
    place = tmp_path_factory.mktemp("site")
    if url := os.environ.get("JENKINS_URL"):
        login = {"user": os.environ["JENKINS_USER"], "token_file": os.environ["JENKINS_TOKEN_FILE"]}
        config = trees.config(place, jenkins={"url": f"{url.rstrip('/')}/", **login})
        load(config.settings.jenkins, small(place), place)
        yield config, None
        return
    hudson = Hudson(place / "hudson", {"PKGCI_ENGINE": "jenkins", "PKGCI_CONFIG": str(place / "etc")})
    config = configured(place, gnupg, place / "gerrit", jenkins=hudson.settings())
    with hudson:
        for jobs in (ROOT / "jobs", small(place)):
            load(config.settings.jenkins, jobs, place)
        yield config, hudson


@pytest.fixture
def site(server) -> tuple[Config, Hudson]:
    """The server that these tests may crash, and the configuration of its builds."""
    config, hudson = server
    if hudson is None:
        pytest.skip("it does things to the server that nobody does to one of others")
    return config, hudson


def small(place: Path) -> Path:
    """Return a directory with the small jobs' definitions."""
    jobs = place / "small"
    jobs.mkdir()
    (jobs / "jobs.yaml").write_text(JOBS)
    return jobs


def configured(place: Path, gnupg: tuple[str, str], gerrit: Path, **settings: object) -> Config:
    """Return the configuration of an installation with one package, whose remote is a work tree below `gerrit`."""
    released = {"gnupg_home": gnupg[0], "key": gnupg[1], "sibling_seconds": 0}
    packages = {"hello": {"source": "hello"}}
    return trees.config(place, packages, gerrit=f"file://{gerrit}/", released=released, **settings)


@pytest.fixture(params=["local", "jenkins"])
def engine(request, tmp_path) -> Iterator[Engine]:
    """Either engine, with the same small jobs."""
    if request.param == "local":
        made = local_jobs.make_engine(tmp_path, JOBS)
        yield made
        local_jobs.end_all(made)
    else:
        made = request.getfixturevalue("jenkins")
        yield made


@pytest.fixture
def jenkins(server) -> Iterator[JenkinsEngine]:
    """The engine on the server."""
    made = JenkinsEngine(server[0])
    yield made
    for job in ("run-build", "run-control"):
        refs = [ref for ref in made.builds(job) if made.state(ref) == "running"]
        for ref in refs:
            made.abort(ref)
        for ref in refs:
            made.wait(ref, 30)


def archived(engine: Engine, ref: BuildRef, destination: Path) -> dict[str, str]:
    """Return what a build archived, by path."""
    destination.mkdir()
    engine.artifacts(ref, destination)
    return {str(path.relative_to(destination)): path.read_text() for path in destination.rglob("*") if path.is_file()}


# the same of both engines


def test_a_build_has_its_parameters_and_leaves_its_artifacts_however_it_ends(engine, tmp_path):
    command = 'mkdir -p artifacts/.d; printf %s "$WHO$FAST" > artifacts/.d/é; echo said; exit 3'
    ref = engine.start("run-build", {"COMMAND": command, "WHO": "a 'b' & c=d é"})
    assert engine.wait(ref, 60) == "FAILURE"
    assert archived(engine, ref, tmp_path / "left") == {"artifacts/.d/é": "a 'b' & c=d étrue"}
    assert re.search(rb"^(\S+Z )?said$", b"".join(engine.log(ref)), re.MULTILINE)
    build = engine.numbered(ref)
    assert engine.builds("run-build")[-1] == build
    record = engine.record(build)
    assert (record.state, record.parameters["WHO"], record.alive) == ("FAILURE", "a 'b' & c=d é", False)
    with pytest.raises(RequestError, match="has no parameter 'OTHER'"):
        engine.start("run-build", {"OTHER": "1"})
    with pytest.raises(RequestError):
        engine.state(BuildRef("run-build", 9999))


def test_a_followed_log_comes_while_the_build_runs_and_ends_with_it(engine, tmp_path):
    go = tmp_path / "go"
    command = 'seq 30000; while [ ! -e "$WHO" ]; do sleep 0.1; done; echo the end'
    ref = engine.start("run-build", {"COMMAND": command, "WHO": str(go)})
    said = b""
    for piece in engine.log(ref, follow=True):
        said += piece
        if b"30000\n" in said:
            go.touch()
    numbers = [int(number) for number in re.findall(rb"^(?:\S+Z )?([0-9]+)$", said, re.MULTILINE)]
    assert numbers == list(range(1, 30001))
    assert engine.wait(ref, 10) == "SUCCESS"
    assert said == b"".join(engine.log(ref))


def test_an_abort_ends_the_step_and_the_build_it_started(engine, tmp_path):
    program, who = tmp_path / "parent.py", tmp_path / "who"
    program.write_text(PARENT)
    command = f"exec env CHILD='exec sleep 1000' {sys.executable} {program} {tmp_path}/jobs"
    ref = engine.start("run-control", {"COMMAND": command, "WHO": str(who)})
    child, parent = pid_in(who), pid_in(Path(f"{who}.parent"))
    engine.abort(ref)
    assert engine.wait(ref, 60) == "ABORTED"
    until(lambda: not alive(child) and not alive(parent), 15)
    last = engine.builds("run-build")[-1]
    assert engine.wait(last, 15) == "ABORTED"


def test_a_build_ends_when_the_one_that_started_it_was_killed(engine, tmp_path):
    program, child_program, who = tmp_path / "parent.py", tmp_path / "child.py", tmp_path / "who"
    program.write_text(PARENT)
    child_program.write_text(
        "import sys, time\nfrom pkgci import step\nsys.exit(step.run('child', lambda _: time.sleep(1000) or ''))\n"
    )
    command = f"exec env CHILD='exec {sys.executable} {child_program}' {sys.executable} {program} {tmp_path}/jobs"
    ref = engine.start("run-control", {"COMMAND": command, "WHO": str(who)})
    child, parent = pid_in(who), pid_in(Path(f"{who}.parent"))
    os.kill(parent, signal.SIGKILL)
    assert engine.wait(ref, 60) in ("FAILURE", "ABORTED")
    # design: no orphan runs for longer than half a minute
    until(lambda: not alive(child), 30)


# what only a server does


def test_a_crash_of_the_server_loses_no_request_and_ends_what_it_forgot(jenkins, site, tmp_path):
    _, hudson = site
    step = tmp_path / "step.py"
    step.write_text(
        "import os, sys, time\nfrom pathlib import Path\nfrom pkgci import step\n"
        "Path(os.environ['WHO']).write_text(f'{os.getpid()}\\n')\n"
        "sys.exit(step.run('held', lambda _: time.sleep(1000) or ''))\n"
    )
    running = jenkins.start("run-build", {"COMMAND": f"exec {sys.executable} {step}", "WHO": str(tmp_path / "pid")})
    pid = pid_in(tmp_path / "pid")
    assert jenkins.numbered(running).number
    hudson.groovy("hudson.model.Hudson.instance.doQuietDown()")
    queued = jenkins.start("run-build", {"COMMAND": "true"})
    assert jenkins.state(queued) == "queued"
    hudson.kill()
    assert jenkins.wait(queued, 1) is None
    hudson.start()
    assert jenkins.wait(queued, 120) == "SUCCESS"
    same = [
        ref
        for ref in jenkins.builds("run-build")
        if jenkins.record(ref).parameters.get("CORRELATION") == queued.request
    ]
    assert len(same) == 1
    # its build is unknown now, or has failed; either way its step does not run on
    with suppress(InfrastructureError):
        assert jenkins.wait(running, 60) == "FAILURE"
    until(lambda: not alive(pid), 30)


def test_a_build_in_the_queue_is_taken_out_by_an_abort(jenkins, site):
    _, hudson = site
    hudson.groovy("hudson.model.Hudson.instance.doQuietDown()")
    try:
        one, other = (jenkins.start("run-build", {"COMMAND": "true"}) for _ in range(2))
        jenkins.abort(one)
        assert (jenkins.wait(one, 10), jenkins.state(other)) == ("ABORTED", "queued")
    finally:
        hudson.groovy("hudson.model.Hudson.instance.doCancelQuietDown()")
    # equal but for their correlation, they are not one
    assert jenkins.wait(other, 30) == "SUCCESS"


def test_an_agent_reached_by_ssh_takes_the_work_of_its_label(tmp_path):
    hudson = Hudson(tmp_path / "hudson", executors=2, labels=("control",))
    sshd = Sshd(tmp_path, "false")
    try:
        with hudson:
            sshd.answers(hudson.agent())
            config = trees.config(tmp_path, jenkins=hudson.settings())
            load(config.settings.jenkins, small(tmp_path), tmp_path)
            engine = JenkinsEngine(config)
            build = engine.start("run-build", {"COMMAND": "echo node $NODE_NAME"})
            control = engine.start("run-control", {"COMMAND": "echo node $NODE_NAME"})
            assert engine.wait(control, 60) == "SUCCESS", b"".join(engine.log(control))
            # nobody has its label yet
            assert engine.state(build) == "queued"
            account = sshd.account()
            (tmp_path / "known_hosts").write_text(f"[127.0.0.1]:{sshd.port} {account['host_key']}\n")
            words = f"ssh -T -p {sshd.port} -i {account['identity']} -o UserKnownHostsFile={tmp_path}/known_hosts"
            hudson.add_agent("builder", "build", f"{words} -o BatchMode=yes {account['user']}@127.0.0.1")
            assert engine.wait(build, 120) == "SUCCESS"
            assert b"\nnode builder\n" in b"".join(engine.log(build))
            assert b"\nnode builder\n" not in b"".join(engine.log(control))
    finally:
        sshd.end()


def test_a_job_that_takes_a_node_runs_there_and_once_on_each(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    hudson = Hudson(tmp_path / "hudson", executors=1, labels=("gate",))
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "jobs.yaml").write_text(local_jobs.VISIT)
    (tmp_path / "here" / "artifacts").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with hudson:
        config = trees.config(tmp_path, jenkins=hudson.settings())
        load(config.settings.jenkins, tmp_path / "jobs", tmp_path)
        hudson.obey_nodes()
        engine = JenkinsEngine(config)
        for name in ("one", "two"):
            hudson.add_agent(name, "systest", hudson.agent())
        until(lambda: engine.nodes("systest") == {"one": True, "two": True}, seconds=60)
        for name in ("two", "one", "two"):
            ref = engine.start("visit", {"NODE": name})
            assert engine.wait(ref, 60) == "SUCCESS", b"".join(engine.log(ref))
            assert engine.record(ref).node == name
        assert nodes.on_each(StepContext(engine), "visit", {}) == "visit passed on one, two"
        assert {"one: visited", "two: visited"} <= set(caplog.messages)


def test_the_permissions_that_are_documented_are_enough_and_those_of_a_watcher_start_nothing(tmp_path, monkeypatch):
    hudson = Hudson(tmp_path / "hudson", executors=1)
    secret = tmp_path / "secret"
    secret.write_text("secret\n")
    read = ("Hudson.Read", "Item.Read")
    # who may build may also cancel there
    accounts = {"pkgci": (*read, "Item.Build"), "watch": read}
    accounts["loader"] = (*read, "Item.Create", "Item.Configure", "Item.Delete")
    with hudson:
        login = {name: {"user": name, "token_file": str(secret)} for name in accounts}
        settings = {**hudson.settings(), **login["pkgci"], "loader": login["loader"]}
        config = trees.config(tmp_path, jenkins=settings)
        hudson.let_in(accounts)
        monkeypatch.setenv("PKGCI_CONFIG", str(config.directory))
        loaded = CliRunner().invoke(main, ["jobs-update", "--jobs", str(small(tmp_path)), "--yes"])
        assert (loaded.exit_code, loaded.output.splitlines()[-1][:5]) == (0, "3 new"), loaded.output
        engine, watcher = JenkinsEngine(config), JenkinsEngine(config, Login(**login["watch"]))
        held = engine.start("run-build", {"COMMAND": "echo said; exec sleep 1000"})
        until(lambda: b"said" in b"".join(engine.log(held)))
        queued = engine.start("run-build", {"PARENT": str(engine.numbered(held))})
        assert (watcher.state(engine.numbered(held)), engine.state(queued)) == ("running", "queued")
        for act in (lambda: watcher.start("run-build", {}), lambda: watcher.abort(engine.numbered(held))):
            with pytest.raises(InfrastructureError, match="is the account watch right"):
                act()
        with pytest.raises(InfrastructureError, match="is the account pkgci right"):
            engine.ask("GET", "job/run-build/config.xml")
        engine.abort(held)
        assert (engine.wait(held, 60), engine.wait(queued, 60)) == ("ABORTED", "ABORTED")
        whole = engine.start("run-build", {"COMMAND": "mkdir -p artifacts; echo x > artifacts/x"})
        assert engine.wait(whole, 60) == "SUCCESS"
        assert archived(engine, whole, tmp_path / "left") == {"artifacts/x": "x\n"}


# the definitions


def test_definitions_are_loaded_as_far_as_they_differ_and_only_ours_are_deleted(site, tmp_path, monkeypatch):
    config, _ = site
    jobs = tmp_path / "jobs"
    shutil.copytree(ROOT / "jobs", jobs)

    def pkgci(*words: str, answer: str = "") -> Result:
        monkeypatch.setenv("PKGCI_CONFIG", str(config.directory))
        return CliRunner().invoke(main, ["jobs-update", "--jobs", str(jobs), *words], input=answer)

    # what another command has loaded is known from now on
    assert pkgci("--yes").exit_code == 0
    assert pkgci().output == "the server has all jobs as they are defined\n"

    # changed, new and deleted: shown, refused, and then done
    build = jobs / "templates" / "build.yaml"
    build.write_text(
        build.read_text().replace("minutes: 900", "minutes: 901").replace("Takes a change", "Takes one change")
    )
    single = jobs / "single.yaml"
    single.write_text(single.read_text().replace("- unpublished", "- unpublished-2"))
    template = (jobs / "templates" / "unpublished.yaml").read_text()
    (jobs / "templates" / "unpublished.yaml").write_text(template.replace("name: unpublished", "name: unpublished-2"))
    names = ["changed  build-bookworm-amd64", "changed  build-debianrpm-amd64", "new      unpublished-2"]
    shown = pkgci("--dry-run").output
    assert shown.splitlines()[:4] == [*names, "deleted  unpublished"]
    assert re.search(r"^- +<timeoutMinutes>900</timeoutMinutes>$", shown, re.MULTILINE)
    refused = pkgci(answer="n\n")
    assert refused.exit_code == 143
    assert pkgci("--dry-run").output == shown
    done = pkgci("--yes")
    ours = len((ROOT / "tests" / "jobs" / "expected.txt").read_text().split())
    assert done.output.splitlines()[-1].startswith(f"1 new, 2 changed, 1 deleted of {ours} jobs at"), done.output
    engine = JenkinsEngine(config)
    assert "unpublished-2" in engine.jobs()
    assert "unpublished" not in engine.jobs()
    assert "Takes one change" in engine.ask("GET", "job/build-bookworm-amd64/config.xml").text
    # the small jobs are of another repository
    assert engine.ask_json("job/run-build", "name") == {"name": "run-build"}

    # edited by hand on the server: taken back
    xml = engine.ask("GET", "job/republish/config.xml").content
    engine.ask("POST", "job/republish/config.xml", data=xml.replace(b"exec pkgci republish", b"exec pkgci other"))
    shown = pkgci("--yes").output
    assert shown.startswith("edited   republish\n")
    assert re.search(r"^\+ +<command>exec pkgci republish</command>$", shown, re.MULTILINE)
    assert pkgci().output == "the server has all jobs as they are defined\n"

    # what does not render never reaches the server
    build.write_text(build.read_text().replace("limited:", "limitless:"))
    broken = pkgci("--yes")
    assert (broken.exit_code, "Jenkins Job Builder refuses" in broken.output) == (2, True)
    single.write_text(template)
    assert "Takes one change" in engine.ask("GET", "job/build-bookworm-amd64/config.xml").text

    # the job loads what is merged here: that of the installed ones
    ref = engine.start("jobs-update", {})
    assert engine.wait(ref, 120) == "SUCCESS", b"".join(engine.log(ref))
    assert "unpublished" in engine.jobs()
    assert "unpublished-2" not in engine.jobs()


# the whole flow

# of one run only: what is under these names, wherever in a JSON file, is not compared
RUNS = {"CORRELATION", "expires", "number", "seconds", "seed", "signing_key", "started"}


def pruned(value: object, own: dict[str, str]) -> object:
    """Return what a JSON file says, without what is of one run only; `own` are patterns of what names an installation."""
    if isinstance(value, dict):
        if isinstance(value.get("children"), list):
            # those that run together end in any order
            value = {**value, "children": sorted(value["children"], key=lambda child: child["job"])}
        # a time is in each of these two
        dated = str(value.get("name", "")).endswith((".buildinfo", ".changes"))
        return {
            key: pruned(one, own) for key, one in value.items() if key not in RUNS and not (dated and key != "name")
        }
    if isinstance(value, list):
        return [pruned(one, own) for one in value]
    if isinstance(value, str):
        for mine, common in own.items():
            value = re.sub(mine, common, value)
    return value


def propose(tree: Path) -> None:
    """Make GNU hello's tree, with a change of its own as Gerrit keeps it: without the package's own tests."""
    config = Config(EMBEDDED)
    subprocess.run(["git", "clone", "-q", "--branch=main", demo.hello(config), tree], check=True)
    trees.git(tree, "checkout", "-q", "--detach", "main")
    # minutes in an emulated machine, which other tests spend
    trees.git(tree, "rm", "-q", "-r", "debian/tests")
    source = (tree / "src" / "hello.c").read_text()
    commit = trees.commit(tree, {"src/hello.c": f"/* {uuid.uuid4()} */\n{source}"})
    trees.git(tree, "update-ref", "refs/changes/01/1/1", commit)
    trees.git(tree, "checkout", "-q", "main")


def left(engine: Engine, ref: BuildRef, config: Config, place: Path) -> dict[str, object]:
    """Return what a build has left, by path: JSON files by their content, others by whether they are empty."""
    place.mkdir()
    engine.artifacts(ref, place)
    own = {re.escape(config.settings.url): "URL/", re.escape(str(config.data)): "DATA", r"hello-1-1-[0-9a-f]{8}": "RUN"}
    return {
        str(path.relative_to(place)): pruned(json.loads(path.read_text()), own)
        if path.suffix == ".json"
        else path.stat().st_size > 0
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


def test_check_and_post_of_hello_leave_the_same_artifacts_by_either_engine(jenkins, site, gnupg, tmp_path):
    config, _ = site
    hello = config.state.parent / "gerrit" / "hello"
    hello.parent.mkdir()
    propose(hello)
    (tmp_path / "local").mkdir()
    own = configured(tmp_path / "local", gnupg, hello.parent)
    installations = {"jenkins": (jenkins, config), "local": (LocalEngine(own), own)}
    old = trees.git(hello, "rev-parse", "main")
    new = trees.git(hello, "rev-parse", "refs/changes/01/1/1")
    about = {"ZUUL_PROJECT": "hello", "ZUUL_UUID": "u1"}
    change = {"ZUUL_BRANCH": "main", "ZUUL_CHANGE": "1", "ZUUL_PATCHSET": "1", "ZUUL_PIPELINE": "check"}
    queue = {"ZUUL_CHANGES": "hello:main:refs/changes/01/1/1"}
    moved = {"ZUUL_REFNAME": "main", "ZUUL_OLDREV": old, "ZUUL_NEWREV": new, "ZUUL_PIPELINE": "post"}
    for pipeline, parameters in (("check", {**about, **change, **queue}), ("post", {**about, **moved})):
        if pipeline == "post":
            trees.git(hello, "merge", "-q", "--ff-only", new)
        refs = {name: engine.start("build-bookworm-amd64", parameters) for name, (engine, _) in installations.items()}
        results, found = {}, {}
        try:
            for name, (engine, own) in installations.items():
                results[name] = engine.wait(refs[name], 900)
                found[name] = left(engine, refs[name], own, tmp_path / f"{pipeline}-{name}")
        finally:
            for name, (engine, _) in installations.items():
                engine.abort(refs[name])
        said = {name: found[name].get("artifacts/result.json") for name in found}
        assert results == {"jenkins": "SUCCESS", "local": "SUCCESS"}, said
        assert found["jenkins"].keys() == found["local"].keys()
        different = [path for path in found["local"] if found["local"][path] != found["jenkins"][path]]
        assert different == [], [(found["local"][path], found["jenkins"][path]) for path in different]
        assert len(found["local"]) > 10
