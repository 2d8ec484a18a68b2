"""What is believed of a system test that somebody else's server describes, and how two runs of one are compared."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trees

from pkgci import repetition
from pkgci import replicate as job
from pkgci.artifacts import Child, File, Package, Record, Result, ScenarioOutcome, Systest, UsedSnapshot
from pkgci.change import EVERY, Parameters
from pkgci.config import Config
from pkgci.errors import InfrastructureError, PackageError, PkgciError, RequestError
from pkgci.vm.snapshot import FrozenNode, Manifest

TARGET = "bookworm-amd64"
NOW = datetime.now(UTC)
SMALL = Package(name="small", version="1", architecture="all", file="pool/small.deb", sha256="a" * 64)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "www").mkdir()
    return tmp_path / "www"


@pytest.fixture
def url(root: Path) -> Iterator[str]:
    """The URL of a server for the files in `root`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def manifest(**changed: object) -> Manifest:
    node = FrozenNode(
        name="node",
        image="i1",
        memory_mib=512,
        addresses=(),
        networks=(),
        command=(),
        host_key="",
        packages=("lz4 1.9", "linux-image 6.1"),
    )
    made = Manifest(
        name=TARGET,
        key="k",
        qemu="QEMU 7",
        accelerator="tcg",
        created=NOW,
        nodes=(node,),
        files=(File(name="node.kernel", size=1, sha256="b" * 64),),
    )
    return made.model_copy(update=changed)


def systest(**changed: object) -> Systest:
    made = Systest(
        target=TARGET,
        environment="default",
        snapshot=f"{TARGET}/1",
        repositories=("http://127.0.0.1:9/test/run/bookworm-amd64/repository.json",),
        parameters={"PARENT": "build-x/1"},
        packages=(SMALL,),
        outcomes=(
            ScenarioOutcome(scenario="package", test="one", result="passed", seconds=1),
            ScenarioOutcome(scenario="package", test="two", result="failed", seconds=1),
        ),
        seed=7,
        scenarios={"package": "c" * 64},
        tools={"pytest": "8"},
    )
    return made.model_copy(update=changed)


def result(step: str = "systest", fault: str = "package", **more: object) -> Result:
    return Result(step=step, result="FAILURE", fault=fault, exit=1, reason="", started=NOW, seconds=1, **more)


def left(place: Path, record: Record | None = None, ended: Result | None = None) -> None:
    """Write what a system test left."""
    (ended or result()).write(place / "result.json")
    manifest().write(place / "snapshots" / f"{TARGET}.json")
    sha256 = hashlib.sha256((place / "snapshots" / f"{TARGET}.json").read_bytes()).hexdigest()
    used = UsedSnapshot(name=TARGET, id=f"{TARGET}/1", key="k", sha256=sha256)
    (record or systest(snapshots=(used,))).write(place / "systest.json")


@pytest.mark.parametrize("place", ["", "artifacts", "artifact/artifacts", "archive/artifacts"])
def test_a_build_is_found_by_its_page_its_archive_or_its_artifacts_of_either_engine(root, url, place):
    left(root / "job" / "7" / place)
    for page in ("job/7", "job/7/", f"job/7/{place}/systest.json"):
        assert job._original(url + page).record.environment == "default"


def test_of_a_build_that_ran_several_system_tests_the_last_one_counts(root, url):
    for number, name in enumerate(("systest-a", "systest-a-2"), 1):
        left(root / name)
        Systest.read(root / name / "systest.json").model_copy(update={"seed": number}).write(
            root / name / "systest.json"
        )
    children = [
        Child(job=job, number=1, directory=name, parameters={}, result="FAILURE", started=NOW, seconds=1)
        for job, name in (("lint-a", "lint-a"), ("systest-a", "systest-a"), ("systest-a", "systest-a-2"))
    ]
    result("build", children=tuple(children)).write(root / "result.json")
    assert job._original(url).record.seed == 2


def _child(root: Path, directory: str) -> None:
    child = Child(
        job="systest-a", number=1, directory=directory, parameters={}, result="FAILURE", started=NOW, seconds=1
    )
    left(root, ended=result("build", children=(child,)))


def _large(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(job.RECORD_BYTES + 1)


@pytest.mark.parametrize(
    ("harm", "error", "said"),
    [
        (lambda root: (root / "result.json").unlink(), RequestError, "there is no result.json at "),
        (lambda root: (root / "systest.json").unlink(), InfrastructureError, "there is nothing at .*systest.json"),
        (lambda root: (root / "systest.json").write_text("{}"), RequestError, "is no Systest that is known here"),
        (lambda root: _large(root / "systest.json"), InfrastructureError, "it has more than 16777216 bytes"),
        (lambda root: left(root, systest()), RequestError, "does not say what it ran on; its pkgci is older"),
        (lambda root: left(root, ended=result("lint")), RequestError, "is of the step lint, which ran no system test"),
        (lambda root: left(root, ended=result(fault="infrastructure")), RequestError, "without a result to compare"),
        (lambda root: _child(root, "../systest-a"), RequestError, "is of the step build, which ran no system test"),
        (
            lambda root: manifest(key="other").write(root / "snapshots" / f"{TARGET}.json"),
            RequestError,
            "is not what systest.json says: another checksum",
        ),
    ],
)
def test_what_is_no_record_of_a_system_test_is_said_in_one_line(
    root: Path, url: str, harm: Callable[[Path], object], error: type[PkgciError], said: str
):
    left(root)
    harm(root)
    with pytest.raises(error, match=said) as caught:
        job._original(url)
    assert "\n" not in str(caught.value)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return trees.config(tmp_path, repositories=["https://packages.example.org/test/"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"parameters": {"ZUUL_PROJECT": "$(id)"}}, "parameter ZUUL_PROJECT: "),
        ({"environment": "../../etc"}, "parameter ENVIRONMENT: "),
        ({"scenarios": {"-p x": ""}}, "parameter SCENARIOS: "),
        ({"seed": -1}, "parameter SEED: "),
        ({"snapshots": (UsedSnapshot(name="x", id="x", key="x", sha256="/"),)}, "parameter SNAPSHOTS: "),
        ({"target": "../x"}, "is not allowed; it must match"),
        ({"target": "unknown"}, "unknown target 'unknown'"),
        ({"repositories": ("file:///etc/repository.json",)}, "parameter REPOSITORIES: "),
        (
            {"repositories": ("http://169.254.169.254/a/repository.json",)},
            "REPOSITORIES: http://169.254.169.254/.* must be",
        ),
        ({"repositories": ("http://127.0.0.1:9/latest/meta-data",)}, "it must be a repository.json below"),
        ({"repositories": ("http://127.0.0.1:9/%2e%2e/repository.json",)}, "it must be a repository.json below"),
        ({"repositories": ()}, "do not have pool/small.deb any more as it was tested"),
    ],
)
def test_nothing_of_a_record_is_used_that_a_parameter_may_not_be(config: Config, changed: dict, said: str):
    original = job._Original("http://127.0.0.1:8/job/", systest(**changed), {})
    with pytest.raises(RequestError, match=said):
        job._given(config, original, "")


def test_packages_get_into_the_product_as_they_did_whatever_a_release_here_says(config: Config, monkeypatch):
    record = systest(flavours={"small": ("bootstrap", "cluster"), "Py_Small": ("master",)}, repositories=())
    monkeypatch.setattr(job, "_repository", lambda *_: None)
    original = job._Original("http://127.0.0.1:8/job/", record.model_copy(update={"packages": ()}), {})
    assert job._given(config, original, "")["FLAVOURS"] == "small:bootstrap,cluster Py_Small:master"


def test_a_repository_elsewhere_is_fetched_below_a_configured_prefix_only(config: Config, monkeypatch):
    asked = []

    def copy(_config: Config, _target: str, url: str, _expires: datetime):
        asked.append(url)
        raise RequestError("nothing is there")

    monkeypatch.setattr(job.copied, "copy", copy)
    allowed = ["https://packages.example.org/test/a/repository.json", "http://127.0.0.1:9/b/repository.json"]
    for url in [*allowed, "https://packages.example.org/other/repository.json", "http://localhost:9/repository.json"]:
        original = job._Original("http://127.0.0.1:8/job/", systest(repositories=(url,)), {})
        with pytest.raises(RequestError):
            job._given(config, original, "")
    assert asked == allowed


def compared(tmp_path: Path, **changed: object):
    """Compare a system test with one that is a little different."""
    before, after = manifest(), changed.pop("manifest", manifest())
    after.write(tmp_path / "snapshots" / f"{TARGET}.json")
    used = [UsedSnapshot(name=TARGET, id="1", key="k", sha256=sha) for sha in ("1" * 64, "2" * 64)]
    there = systest(snapshots=(used[0],))
    here = systest(snapshots=(used[1],)).model_copy(update=changed)
    return job.compare("http://there/", there, {used[0].sha256: before}, here, tmp_path)


def test_a_system_test_that_fails_alike_is_reproduced_though_the_snapshot_was_made_anew(tmp_path: Path):
    made = compared(tmp_path, manifest=manifest(created=datetime(2020, 1, 1, tzinfo=UTC)))
    assert made.differences == ()
    assert job._judged(made) == "reproduced: 2 tests ended as they did there, 1 of them failed"


def test_a_test_that_ends_otherwise_or_is_missing_is_not_reproduced(tmp_path: Path):
    one, two = systest().outcomes
    three = ScenarioOutcome(scenario="more", test="three", result="passed", seconds=1)
    made = compared(tmp_path, outcomes=(one, two.model_copy(update={"result": "passed"}), three))
    with pytest.raises(PackageError, match=r"^not reproduced: package: two: failed there, passed here \(and 1 more\)$"):
        job._judged(made)
    made = compared(tmp_path, outcomes=(one,))
    with pytest.raises(PackageError, match=r"^not reproduced: package: two: failed there, not run here$"):
        job._judged(made)


def test_each_difference_of_what_it_ran_on_is_a_line(tmp_path: Path):
    [node] = manifest().nodes
    packages = ("lz4 1.10", "linux-image 6.1", "hello 2")
    other = node.model_copy(update={"name": "lab", "image": "i2", "memory_mib": 448, "packages": packages})
    kernel = (File(name="lab.kernel", size=1, sha256="d" * 64),)
    made = compared(
        tmp_path,
        manifest=manifest(qemu="QEMU 8", nodes=(other,), files=kernel),
        packages=(SMALL.model_copy(update={"version": "2"}),),
        scenarios={"package": "e" * 64},
        commit="f" * 40,
        tools={"pytest": "9"},
        seed=8,
    )
    assert list(made.differences) == [
        f"snapshot of {TARGET}: QEMU: QEMU 7 there, QEMU 8 here",
        "lab: image key: i1 there, i2 here",
        f"lab: kernel: {'b' * 12} there, {'d' * 12} here",
        "lab: memory: 512 MiB there, 448 MiB here",
        "lab: package hello: none there, 2 here",
        "lab: package lz4: 1.9 there, 1.10 here",
        f"package under test small (all): 1 {'a' * 12} there, 2 {'a' * 12} here",
        f"files of the scenario package: {'c' * 12} there, {'e' * 12} here",
        f"configuration commit: none there, {'f' * 40} here",
        "version of pytest: 8 there, 9 here",
        "parameter SEED: 7 there, 8 here",
    ]
    assert job._judged(made).endswith("1 of them failed; 11 differences in what it ran on")


@pytest.mark.parametrize(("names", "machines"), [(("other",), 1), ((TARGET,), 2)])
def test_a_snapshot_of_something_else_is_not_used(config: Config, names: tuple[str, ...], machines: int):
    (config.data / "snapshots").unlink()
    path = config.data / "snapshots" / TARGET / "any" / "manifest.json"
    manifest().write(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(RequestError, match=f"parameter SNAPSHOTS: {TARGET}/any is not one of "):
        repetition.named(config, sha256, names, machines)
    with pytest.raises(
        RequestError, match=f"this host has no snapshot whose manifest has the sha256 {'0' * 64}; copy it"
    ):
        repetition.named(config, "0" * 64, (TARGET,), 1)


@pytest.mark.parametrize("place", [f"snapshots/{TARGET}/1", "runs/systest-a-1/machines/base"])
def test_a_snapshot_is_found_by_its_checksum_also_a_superseded_one_with_a_run_that_is_kept(
    config: Config, monkeypatch, place: str
):
    monkeypatch.setattr(repetition.Snapshot, "verify", lambda _: None)
    (config.data / "snapshots").unlink()
    path = config.data / place / "manifest.json"
    manifest().write(path)
    (path.parents[1] / "latest").symlink_to(path.parent.name)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert repetition.named(config, sha256, (TARGET,), 1).directory == path.parent


def test_the_commit_of_a_configuration_says_whether_its_files_are_changed(tmp_path: Path):
    assert repetition.commit(tmp_path) == ""
    commit = trees.commit(tmp_path / "etc", {"environments/lab.yaml": "x\n"})
    assert repetition.commit(tmp_path / "etc" / "environments") == commit
    (tmp_path / "etc" / "environments" / "lab.yaml").write_text("y\n")
    assert repetition.commit(tmp_path / "etc") == f"{commit}-dirty"


def test_the_url_of_a_build_is_needed():
    with pytest.raises(RequestError, match="parameter REPLICATE: missing"):
        job.replicate(None, Parameters.read({}, EVERY), Path())
