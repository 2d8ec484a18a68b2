"""`pkgci check` on tiny real packages: all jobs as rendered, by the local engine, as a person runs it."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import trees
from local_jobs import log_of, until

from pkgci import source
from pkgci.artifacts import Build, Install, Lint, Repository, Result
from pkgci.change import STEPS, TESTS, Parameters
from pkgci.check import prepare_change
from pkgci.config import Config
from pkgci.engines.base import BuildRef
from pkgci.engines.local import LocalEngine

PKGCI = Path(sys.executable).with_name("pkgci")
DEB, RPM = "bookworm-amd64", "debianrpm-amd64"


def pkgci(configuration: Config, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command as a person does, without a terminal."""
    environment = {**os.environ, "PKGCI_CONFIG": str(configuration.directory)}
    return subprocess.run([PKGCI, *arguments], env=environment, capture_output=True, text=True, check=False)


def archive(configuration: Config, job: str, number: int = 1) -> Path:
    return LocalEngine(configuration).directory(BuildRef(job, number)) / "archive" / "artifacts"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    trees.commit(tmp_path / "small", trees.deb() | trees.rpm())
    return tmp_path / "small"


def test_a_good_package_passes_for_all_targets_that_its_packaging_serves(tmp_path: Path, tree: Path):
    configuration = trees.config(tmp_path)
    done = pkgci(configuration, "check", tree)
    assert done.returncode == 0, done.stdout + done.stderr
    for target, file in ((DEB, "small_1.0+pkg1.1~t"), (RPM, "small-1.0-1.pkg1.1~t")):
        assert f"package: {file}" in done.stdout
        top = archive(configuration, f"build-{target}")
        # the parent has what its children left
        assert Build.read(top / f"compile-{target}" / "build.json").origin == "built"
        assert Repository.read(top / f"publish-{target}" / "repository.json").packages
        assert Install.read(top / f"install-{target}" / "install.json").packages[0].passed
        assert (top / f"install-{target}" / "console.log").exists()
        result = Result.read(top / "result.json")
        # the tests end in the order of their length
        assert sorted(child.job for child in result.children) == sorted(f"{step}-{target}" for step in STEPS)
    assert "not for use on an RPM distribution" in done.stdout
    listed = pkgci(configuration, "jobs", "list", f"compile-{DEB}").stdout
    assert re.search(r"1  \S+ \S+  SUCCESS  small [0-9a-f]{8} check", listed)
    assert re.search(r"^\d\d:\d\d:\d\d install-debianrpm-amd64 #1 SUCCESS", done.stdout, re.MULTILINE)
    # a second time the tests are not repeated, but for what a person asks for
    again = pkgci(configuration, "check", tree)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(re.findall(r"(lint|test): .*; passed on .* not repeated$", again.stdout, re.MULTILINE)) == 6
    for step in TESTS:
        assert Result.read(archive(configuration, f"{step}-{DEB}", 2) / "result.json").reason.endswith("not repeated")
    for command in (
        ["check", "--again", "--only=lint", "--target", RPM, tree],
        ["jobs", "run", f"lint-{RPM}", "--rerun=2"],
    ):
        assert pkgci(configuration, *command).returncode == 0
    assert [
        Lint.read(archive(configuration, f"lint-{RPM}", number) / "lint.json").note != "" for number in (1, 2, 3, 4)
    ] == [False, True, False, False]
    # nothing stays: no process of these builds, no port
    engine = LocalEngine(configuration)
    cookies = [engine.record(ref).cookie for job in engine.jobs() for ref in engine.builds(job)]
    assert cookies
    assert [cookie for cookie in cookies if _in_environment(cookie)] == []


def test_a_failed_lint_aborts_install_and_system_test_within_seconds_and_leaves_no_machine(tmp_path: Path):
    configuration = trees.config(tmp_path)
    trees.commit(tmp_path / "small", {**trees.deb(), "debian/copyright": ""})
    (tmp_path / "small" / "debian" / "copyright").unlink()
    trees.commit(tmp_path / "small", {})
    done = pkgci(configuration, "check", "--target", DEB, tmp_path / "small")
    assert done.returncode == 1, done.stdout + done.stderr
    engine = LocalEngine(configuration)
    records = {step: engine.record(BuildRef(f"{step}-{DEB}", 1)) for step in ("build", *STEPS)}
    states = {step: record.state for step, record in records.items()}
    assert states == {
        **dict.fromkeys(("compile", "publish"), "SUCCESS"),
        **dict.fromkeys(("lint", "build"), "FAILURE"),
        **dict.fromkeys(("install", "systest"), "ABORTED"),
    }
    lint, systest = records["lint"].ended, records["systest"].ended
    assert lint is not None
    assert systest is not None
    assert (systest - lint).total_seconds() < 5
    assert [step for step, record in records.items() if _in_environment(record.cookie)] == []
    assert "no-copyright-file" in Result.read(archive(configuration, f"build-{DEB}") / "result.json").reason


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> tuple[LocalEngine, dict[str, str]]:
    """An engine whose system tests have no end, and the parameters of a package that leaves a file behind."""
    place = tmp_path_factory.mktemp("endless")
    configuration = trees.config(place)
    scenario = "def test_use(node):\n    node.run('echo begun; sleep 1000', timeout=2000)\n"
    described = "nodes: {lab: {}}\nscenarios: {endless: scenarios/endless.py}\n"
    trees.write(configuration.directory, {"scenarios/endless.py": scenario, "environments/default.yaml": described})
    trees.commit(
        place / "small", {**trees.deb(), "debian/postinst": "#!/bin/sh\nset -e\ntouch /etc/left\n#DEBHELPER#\n"}
    )
    return LocalEngine(configuration), dict(trees.local(configuration, place / "small").values)


def test_a_failed_install_test_aborts_the_system_test_within_seconds(endless):
    engine, given = endless
    build = engine.start(f"build-{DEB}", {**given, "ONLY": "install,systest"})
    assert engine.wait(build, 300) == "FAILURE"
    install, systest = (
        next(engine.record(ref) for ref in engine.builds(f"{step}-{DEB}")) for step in ("install", "systest")
    )
    assert (install.state, systest.state) == ("FAILURE", "ABORTED")
    assert install.ended is not None
    assert systest.ended is not None
    assert (systest.ended - install.ended).total_seconds() < 5
    # it was at work
    assert "environment default: snapshot " in log_of(engine, BuildRef(f"systest-{DEB}", systest.number))
    assert not _in_environment(systest.cookie)


def test_an_aborted_build_leaves_no_machine_port_mount_or_file(endless, tmp_path: Path, monkeypatch):
    engine, given = endless
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    build = engine.start(f"build-{DEB}", {**given, "ONLY": "systest"})
    started = len(engine.builds(f"systest-{DEB}")) + 1
    until(lambda: len(engine.builds(f"systest-{DEB}")) == started or not engine.record(build).alive, 300)
    test = BuildRef(f"systest-{DEB}", started)
    workspace = engine.directory(test) / "workspace"
    log = workspace / "artifacts" / "logs" / "endless.log"
    until(lambda: (log.exists() and "begun" in log.read_text()) or not engine.record(build).alive, 300)
    cookie = engine.record(test).cookie
    [machine] = [pid for pid in processes.with_marker("qemu-system") if _in_environment(cookie, pid)]
    place = Path(f"/proc/{machine}/cwd").readlink().parent
    ports = _listening(machine)
    assert ports
    assert any(tmp_path.iterdir())
    began = time.monotonic()
    engine.abort(build)
    assert engine.wait(build, 60) == "ABORTED"
    assert time.monotonic() - began < 10
    assert engine.state(test) == "ABORTED"
    assert not _in_environment(cookie)
    assert not _in_environment(engine.record(build).cookie)
    assert ports.isdisjoint(_listening())
    assert not place.exists()
    assert list(tmp_path.iterdir()) == []
    assert not re.search(f"{workspace}|{tmp_path}|{place}", Path("/proc/self/mounts").read_text())


def _listening(pid: int | None = None) -> set[str]:
    """Return the TCP ports of this machine that someone listens on, or one process."""
    said = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[3] for line in said if pid is None or f"pid={pid}," in line}


def _in_environment(cookie: str, pid: int | None = None) -> bool:
    for path in Path("/proc").glob(f"{pid or '[0-9]*'}/environ"):
        try:
            if cookie.encode() in path.read_bytes():
                return True
        except OSError:
            continue
    return False


def test_a_package_that_fails_stops_what_follows_and_says_why(tmp_path: Path, tree: Path):
    configuration = trees.config(tmp_path)
    trees.commit(tree, {"debian/rules": trees.RULES + "\noverride_dh_auto_build:\n\texit 7\n"})
    done = pkgci(configuration, "check", "--target", DEB, tree)
    assert done.returncode == 1
    assert re.search(r"reason: compile-bookworm-amd64/1: small: the build failed: ", done.stdout)
    assert "publish-" not in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert Result.read(archive(configuration, f"build-{DEB}") / "result.json").fault == "package"


def test_a_package_that_installs_badly_fails_with_package_and_file(tmp_path: Path, tree: Path):
    configuration = trees.config(tmp_path)
    trees.commit(tree, {"debian/postinst": "#!/bin/sh\nset -e\necho x >/etc/left-behind\n#DEBHELPER#\n"})
    done = pkgci(configuration, "check", "--target", DEB, tree)
    assert done.returncode == 1
    assert "reason: install-bookworm-amd64/1: install test of small" in done.stdout
    assert "/etc/left-behind" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "."], r"nothing to build: no debian/control or rpm/\*\.spec"),
        (["check", "--target", "nowhere", "."], "unknown target 'nowhere'; .*bookworm-amd64"),
        (["check", "/"], "/ is not in a git working tree"),
        (["import", "missing.dsc"], "cannot import missing.dsc"),
        (["jobs", "run", "nowhere"], "there is no job 'nowhere'"),
        (["jobs", "log", f"build-{DEB}", "7"], "build-bookworm-amd64"),
        (["jobs", "run", f"compile-{DEB}", "NOISE=1"], "NOISE"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_2(tmp_path: Path, arguments: list[str], said: str):
    trees.commit(tmp_path / "small", {"README": "nothing to build\n"})
    configuration = trees.config(tmp_path)
    environment = {**os.environ, "PKGCI_CONFIG": str(configuration.directory)}
    done = subprocess.run(
        [PKGCI, *arguments], env=environment, cwd=tmp_path / "small", capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert re.search(said, done.stderr)


def test_a_machine_that_cannot_be_written_to_is_one_line_and_exit_3(tmp_path: Path, tree: Path):
    configuration = trees.config(tmp_path)
    (tmp_path / "state").write_text("a file where a directory must be\n")
    done = pkgci(configuration, "check", tree)
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_a_step_by_hand_leaves_other_peoples_artifacts_alone(tmp_path: Path):
    configuration = trees.config(tmp_path)
    trees.write(tmp_path / "mine", {"artifacts/precious": "x"})
    environment = {**os.environ, "PKGCI_CONFIG": str(configuration.directory)}
    environment.pop("WORKSPACE", None)
    done = subprocess.run(
        [PKGCI, "compile", DEB], env=environment, cwd=tmp_path / "mine", capture_output=True, check=False
    )
    assert done.returncode == 2
    assert [path.name for path in (tmp_path / "mine/artifacts").iterdir()] == ["precious"]


def test_two_trees_of_one_name_do_not_meet(tmp_path: Path):
    configuration = trees.config(tmp_path)
    changes = []
    for name, versions in (("one", ("1.0-1", "1.1-1")), ("two", ("5.0-1", "5.1-1"))):
        tree = tmp_path / name / "small"
        trees.commit(tree, trees.deb(version=versions[0]))
        trees.git(tree, "checkout", "-q", "-b", "change", "--track", "main")
        trees.commit(tree, trees.deb(version=versions[1]))
        changes.append(prepare_change(configuration, tree, worktree=False))
    found = [
        source.fetch(configuration, Parameters.read(change.parameters).change(configuration)) for change in changes
    ]
    assert [
        re.findall(rb"\(\S+\)", blob.content)
        for sources in found
        for blob in source.blobs(sources.previous, ["debian/changelog"])
    ] == [[b"(1.0-1)"], [b"(5.0-1)"]]


def test_a_pipeline_passes_with_nothing_to_build_and_says_so(tmp_path: Path):
    configuration = trees.config(tmp_path)
    trees.commit(tmp_path / "small", trees.rpm())
    given = trees.local(configuration, tmp_path / "small").values
    done = pkgci(configuration, "jobs", "run", f"build-{DEB}", *(f"{name}={value}" for name, value in given.items()))
    assert done.returncode == 0, done.stdout
    result = Result.read(archive(configuration, f"build-{DEB}") / "result.json")
    assert result.reason.startswith("nothing to build: small has no packaging for bookworm-amd64")


def test_hostile_parameters_are_refused_by_the_job(tmp_path: Path):
    configuration = trees.config(tmp_path)
    hostile = {
        "ZUUL_PROJECT": "../../etc",
        "ZUUL_URL": "ext::sh -c touch% /tmp/x",
        "ZUUL_REF": "--upload-pack=touch /tmp/x",
    }
    for number, (name, value) in enumerate(hostile.items(), 1):
        given = {"ZUUL_PROJECT": "small", "ZUUL_BRANCH": "main"} | {name: value}
        done = pkgci(configuration, "jobs", "run", f"build-{DEB}", *(f"{key}={text}" for key, text in given.items()))
        assert done.returncode == 2
        assert f"parameter {name}" in Result.read(archive(configuration, f"build-{DEB}", number) / "result.json").reason


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_check_that_is_stopped_aborts_all_that_runs(tmp_path: Path, tree: Path, number: signal.Signals):
    configuration = trees.config(tmp_path)
    trees.commit(tree, {"debian/rules": trees.RULES + "\noverride_dh_auto_build:\n\tsleep 1000\n"})
    environment = {**os.environ, "PKGCI_CONFIG": str(configuration.directory)}
    command = [PKGCI, "check", "--target", DEB, tree]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    engine = LocalEngine(configuration)
    compiling = BuildRef(f"compile-{DEB}", 1)
    deadline = time.monotonic() + 120
    while "sleep 1000" not in _log(engine, compiling):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.2)
    running.send_signal(number)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 143, said
    assert "aborted after" in said
    assert engine.state(compiling) == "ABORTED"
    assert not _in_environment(engine.record(compiling).cookie)


def _log(engine: LocalEngine, ref: BuildRef) -> str:
    path = engine.config.state / "jobs" / ref.job / "builds" / str(ref.number) / "log"
    return path.read_text(errors="replace") if path.exists() else ""


def test_a_terminal_shows_a_live_table(tmp_path: Path):
    configuration = trees.config(tmp_path)
    trees.commit(tmp_path / "small", trees.deb() | {"debian/control": "broken\n"})
    main, other = pty.openpty()
    environment = {**os.environ, "PKGCI_CONFIG": str(configuration.directory), "TERM": "xterm"}
    running = subprocess.Popen([PKGCI, "check", tmp_path / "small"], env=environment, stdout=other, stderr=other)
    os.close(other)
    said = b""
    while True:
        try:
            piece = os.read(main, 4096)
        except OSError:
            break
        if not piece:
            break
        said += piece
    os.close(main)
    assert running.wait() == 1
    assert b"\x1b[" in said
    assert b"compile-bookworm-amd64" in said
    assert b"cannot read its packaging" in said


def test_the_repositories_that_a_build_may_use_include_those_of_other_changes(tmp_path: Path):
    configuration = trees.config(tmp_path)
    for name in ("base", "small"):
        depends = ", base (>= 1.0)" if name == "small" else ""
        more = "BuildRequires: base >= 1.0\n" if name == "small" else ""
        trees.commit(tmp_path / name, trees.deb(name, depends=depends) | trees.rpm(name, more=more))
    for target in (DEB, RPM):
        given = trees.local(configuration, tmp_path / "base").values
        done = pkgci(configuration, "jobs", "run", f"build-{target}", "RUN_TESTS=false", *_words(given))
        assert done.returncode == 0, done.stdout
        location = json.loads(
            (archive(configuration, f"build-{target}") / f"publish-{target}" / "repository.json").read_text()
        )
        given = trees.local(configuration, tmp_path / "small").values
        repositories = f"REPOSITORIES={location['url']}repository.json"
        done = pkgci(configuration, "jobs", "run", f"build-{target}", "RUN_TESTS=false", repositories, *_words(given))
        assert done.returncode == 0, done.stdout
        log = _log(LocalEngine(configuration), BuildRef(f"compile-{target}", 2))
        assert re.search(r"base.1\.0|base_1\.0", log)


def _words(given) -> list[str]:
    return [f"{name}={value}" for name, value in given.items()]
