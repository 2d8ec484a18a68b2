"""A system test of one installation, run once more by another one that shares nothing with it but HTTP."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import servers
import trees

from pkgci.artifacts import Replication, Systest
from pkgci.compile import compile
from pkgci.config import EMBEDDED, Config
from pkgci.engines.base import BuildRef
from pkgci.engines.local import LocalEngine
from pkgci.publish import publish
from pkgci.server import serve
from pkgci.vm import guest

TARGET = "bookworm-amd64"
JOB = f"systest-{TARGET}"
ENVIRONMENT = """
nodes: {{lab: {node}}}
scenarios:
  mixed: scenarios/mixed.py
"""
MIXED = """
import random

def test_good(node, package):
    assert node.run("small").text() == "small\\n"

def test_bad(seed):
    assert random.randrange(10**9) == hash(str(seed)) == "as it has to fail"
"""


def installation(place: Path, *, node: str = "{}", scenario: str = MIXED, **settings: object) -> Config:
    """Return a configuration with state, data and cache of its own, and no snapshots.

    What takes minutes to make and is the same for everybody, images and roots, is linked into the cache.
    """
    cache = place / "cache"
    cache.mkdir(parents=True)
    paths = {"cache": str(cache), "state": str(place / "state"), "data": str(place / "data")}
    made = trees.config(place, paths=paths, keep_runs="none", **settings)
    for kind in ("images", "roots"):
        (cache / kind).symlink_to(Config(EMBEDDED).cache / kind)
    (made.data / "snapshots").unlink()
    files = {"environments/lab.yaml": ENVIRONMENT.format(node=node), "scenarios/mixed.py": scenario}
    trees.write(made.directory, files)
    return made


def latest() -> Path:
    """Return the snapshot of the plain machine that this user has."""
    return guest.plain(Config(EMBEDDED), TARGET).directory


@dataclass(frozen=True)
class There:
    """The installation that ran the system test, the URL of that build, and its artifacts."""

    config: Config
    url: str
    artifacts: Path


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[There]:
    """A system test with a test that passes and one that fails; builds and repositories are served over HTTP."""
    place, port = tmp_path_factory.mktemp("there"), trees.free_port()
    config = installation(place, builds=f"http://127.0.0.1:{port}/jobs/")
    (config.data / "snapshots").symlink_to(latest().parents[1])
    trees.commit(place / "small", trees.deb())
    given = trees.local(config, place / "small")
    made = compile(config, TARGET, given, place / "artifacts", BuildRef("compile-by-hand", 1))
    record = publish(config, TARGET, given.change(config), made.key, "small-1", place / "artifacts")
    with ExitStack() as stack:
        stack.enter_context(serve(config))
        block = f"server {{ listen 127.0.0.1:{port}; location / {{ root {config.state}; }} }}"
        stack.enter_context(servers.nginx(place / "nginx", port, block))
        engine = LocalEngine(config)
        asked = {"REPOSITORIES": f"{record.url}repository.json", "ENVIRONMENT": "lab", "SCENARIOS": "mixed"}
        ref = engine.start(JOB, asked)
        assert engine.wait(ref) == "FAILURE"
        yield There(config, engine.urls(ref).build, engine.directory(ref) / "archive" / "artifacts")


def replicate(config: Config, *arguments: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Run the command as a person does; return how it ended, and the artifacts of the newest build of its job."""
    command = [Path(sys.executable).with_name("pkgci"), "replicate", *arguments]
    environment = {**os.environ, "PKGCI_CONFIG": str(config.directory)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    engine = LocalEngine(config)
    return done, engine.directory(engine.builds("replicate")[-1]) / "archive" / "artifacts"


def results(record: Systest) -> Mapping[str, str]:
    return {f"{one.scenario}: {one.test}": one.result for one in record.outcomes}


def test_the_record_holds_what_a_repetition_needs(there: There):
    record = Systest.read(there.artifacts / "systest.json")
    assert results(record) == {
        "install: together": "passed",
        "mixed: test_good[small]": "passed",
        "mixed: test_bad": "failed",
    }
    [snapshot] = record.snapshots
    assert snapshot.id == record.snapshot
    assert (there.artifacts / snapshot.manifest).read_bytes() == (latest() / "manifest.json").read_bytes()
    assert record.scenarios.keys() == {"mixed"}
    assert {"pkgci", "qemu", "pytest", "paramiko"} <= record.tools.keys()


def test_on_the_same_snapshot_a_failed_test_is_reproduced_with_nothing_different(there: There, tmp_path: Path):
    here = installation(tmp_path)
    # under another name, and not the latest one
    place = here.data / "snapshots" / TARGET / "copied"
    place.parent.mkdir(parents=True)
    subprocess.run(["cp", "-a", "--sparse=always", latest(), place], check=True)
    done, artifacts = replicate(here, there.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reproduced: 3 tests ended as they did there, 1 of them failed" in done.stdout
    assert "same: mixed: test_bad: failed" in done.stdout
    made = Replication.read(artifacts / "replicate.json")
    assert (made.differences, made.different) == ((), ())
    before, after = (Systest.read(place / "systest.json") for place in (there.artifacts, artifacts / JOB))
    assert (before.seed, before.packages, after.snapshot) == (after.seed, after.packages, f"{TARGET}/copied")
    assert [one.message for one in before.outcomes] == [one.message for one in after.outcomes]
    assert all(url.startswith(here.settings.url) for url in after.repositories)


def test_without_its_snapshot_it_is_refused_or_told_by_what_another_one_differs(there: There, tmp_path: Path):
    passes = MIXED.replace('== "as it has to fail"', "or True")
    here = installation(tmp_path, node="{memory_mib: 448}", scenario=passes)
    done, artifacts = replicate(here, there.url)
    assert done.returncode == 2, done.stdout + done.stderr
    checksum = Systest.read(there.artifacts / "systest.json").snapshots[0].sha256
    said = json.loads((artifacts / "result.json").read_text())["reason"]
    assert f"parameter SNAPSHOTS: this host has no snapshot whose manifest has the sha256 {checksum}; copy it" in said
    # it may expire there: the copy was made
    shutil.rmtree(there.config.data / "repositories" / "test")
    done, artifacts = replicate(here, there.url, "--rebuild")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "it may have expired; the copy that was made before is used" in done.stdout
    assert "differs: lab: memory: 512 MiB there, 448 MiB here" in done.stdout
    assert "not reproduced: mixed: test_bad: failed there, passed here; " in done.stdout
    made = Replication.read(artifacts / "replicate.json")
    assert [one.test for one in made.different] == ["test_bad"]
    assert any(line.startswith("files of the scenario mixed: ") for line in made.differences)
