"""The reference product: packages of each flavour get into it, in one run, and its tests notice when one does not."""

import logging
import shutil
from pathlib import Path

import pytest
import trees
import yaml

from pkgci import systest as job
from pkgci.artifacts import Systest
from pkgci.change import Parameters
from pkgci.compile import compile
from pkgci.config import EMBEDDED, ROOT, Config
from pkgci.engines.base import BuildRef
from pkgci.errors import PackageError
from pkgci.publish import publish
from pkgci.systest import systest

TARGET = "bookworm-amd64"
REFERENCE = ROOT / "etc" / "reference"
PACKAGES = ("depot-master", "depot-agent", "depot-web", "depot-node")
PROMISES = {
    "master": "test_the_master_was_deployed_from_an_image_with_them",
    "bootstrap": "test_the_nodes_have_booted_an_image_with_them",
    "container": "test_the_service_runs_in_a_container_with_them",
    "cluster": "test_what_is_under_test_was_installed_there_from_the_test_repository",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The product's configuration, with a state of its own; the snapshots, which take minutes to make, are the user's."""
    place = tmp_path_factory.mktemp("reference")
    shutil.copytree(REFERENCE, place / "etc")
    snapshots = Config(EMBEDDED).data / "snapshots"
    snapshots.mkdir(parents=True, exist_ok=True)
    (place / "data").mkdir()
    (place / "data" / "snapshots").symlink_to(snapshots)
    settings = {
        "url": f"http://127.0.0.1:{trees.free_port()}/",
        "paths": {"state": str(place / "state"), "data": str(place / "data")},
        "keep_runs": "none",
    }
    (place / "etc" / "config.yaml").write_text(yaml.safe_dump(settings))
    return Config(place / "etc")


@pytest.fixture(scope="module")
def repositories(config: Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A change of each of the product's packages, built and published to a test repository: the URLs of their records."""
    urls = []
    for name in PACKAGES:
        place = tmp_path_factory.mktemp(name)
        shutil.copytree(REFERENCE / "product" / name, place / name)
        changelog = place / name / "debian" / "changelog"
        changelog.write_text(changelog.read_text().replace("(1.0)", "(1.1)"))
        trees.commit(place / name, {})
        given = trees.local(config, place / name)
        made = compile(config, TARGET, given, place / "artifacts", BuildRef("compile-by-hand", 1))
        urls.append(publish(config, TARGET, given.change(config), made.key, name, place / "artifacts").url)
    return " ".join(f"{url}repository.json" for url in urls)


def run(config: Config, artifacts: Path, repositories: str, **parameters: str) -> tuple[Systest, Exception | None]:
    """Run the job, as a gate of all four packages does; return its record and how it failed."""
    artifacts.mkdir()
    given = {"REPOSITORIES": repositories, "ZUUL_BRANCH": "main", "SCENARIOS": "depot:bvt", **parameters}
    failure = None
    try:
        systest(config, TARGET, Parameters.read(given), artifacts)
    except PackageError as error:
        failure = error
    return Systest.read(artifacts / "systest.json"), failure


def results(record: Systest) -> dict[str, str]:
    return {f"{one.scenario}: {one.test.rpartition(': ')[2]}": one.result for one in record.outcomes}


def said(artifacts: Path, record: Systest) -> str:
    logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(artifacts.glob("logs/*.log")))
    return "\n".join([*map(str, record.outcomes), logs])


def test_a_queue_of_all_flavours_is_one_run_in_which_each_package_gets_into_the_product(
    config, repositories, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    record, failure = run(config, tmp_path / "artifacts", repositories)
    assert failure is None, said(tmp_path / "artifacts", record)
    assert record.flavours == {
        "depot-master": ("master",),
        "depot-agent": ("bootstrap",),
        "depot-web": ("container",),
        "depot-node": ("cluster",),
    }
    assert [name for name in results(record) if not name.startswith("depot: ")] == [
        "master: image of master is rebuilt",
        "master: product is deployed from it",
        "bootstrap: depot-bootstrap is rebuilt and installed on master",
        "bootstrap: node-1 boots it from master",
        "bootstrap: node-2 boots it from master",
        "container: depot-web-image is rebuilt and installed on master",
        "container: product is healthy",
        "cluster: repositories are added to the product on master",
    ]
    assert set(results(record).values()) == {"passed"}
    assert {f"depot: {test}" for test in PROMISES.values()} <= set(results(record))
    for log in (
        "master.log",
        "bootstrap.log",
        "container.log",
        "depot.log",
        "master/product.log",
        "node-1/console.log",
    ):
        assert (tmp_path / "artifacts" / "logs" / log).stat().st_size > 0, log


def test_what_was_left_out_is_noticed_for_each_flavour(config, repositories, tmp_path, monkeypatch):
    careless = tmp_path / "etc"
    shutil.copytree(config.directory, careless)
    # they say that they have done it
    (careless / "rebuild" / "master.sh").write_text("exit 0\n")
    for script, carrier in (("bootstrap.sh", "depot-bootstrap"), ("container.sh", "depot-web-image")):
        (careless / "rebuild" / script).write_text(
            f"sed -i '/^Package: {carrier}$/,/^$/s/^Version: .*/&.1/' /var/lib/dpkg/status\n"
        )
    monkeypatch.setattr(job.products, "add_repositories", lambda *_: None)
    record, failure = run(Config(careless), tmp_path / "artifacts", repositories, SCENARIOS="depot:flavours")
    assert isinstance(failure, PackageError)
    found = results(record)
    for flavour, test in PROMISES.items():
        assert found[f"depot: {test}"] == "failed", (flavour, said(tmp_path / "artifacts", record))
    # all else went as it does
    assert {name for name, result in found.items() if result == "failed"} - {
        f"depot: {one}" for one in PROMISES.values()
    } == {"depot: test_the_product_has_their_repositories_with_the_highest_priority"}


def test_a_package_that_cannot_be_in_an_image_is_at_fault(config, tmp_path):
    place = tmp_path / "depot-web"
    shutil.copytree(REFERENCE / "product" / "depot-web", place)
    control = place / "debian" / "control"
    control.write_text(control.read_text().replace("${misc:Depends}", "${misc:Depends}, no-such-package"))
    trees.commit(place, {})
    (config.state / "changes" / "depot-web").unlink(missing_ok=True)
    given = trees.local(config, place)
    made = compile(config, TARGET, given, tmp_path / "built", BuildRef("compile-by-hand", 2))
    url = publish(config, TARGET, given.change(config), made.key, "needy", tmp_path / "built").url
    record, failure = run(config, tmp_path / "artifacts", f"{url}repository.json")
    assert isinstance(failure, PackageError)
    assert "depot-web : Depends: no-such-package but it is not installable" in str(failure)
    assert results(record) == {"container: depot-web-image is rebuilt and installed on master": "failed"}
