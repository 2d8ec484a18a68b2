"""Jobs that concern a host, on the local engine: each on its node, and on all of them."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trees
from local_jobs import end_all, log_of

from pkgci.artifacts import Result
from pkgci.engines.local import LocalEngine

DEB = "bookworm-amd64"


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[LocalEngine]:
    """An engine of a host that has been prepared for nothing but a machine of one target."""
    config = trees.config(tmp_path_factory.mktemp("host"))
    (config.directory / "targets" / "debianrpm-amd64.yaml").unlink()
    made = LocalEngine(config)
    yield made
    end_all(made)


def run(engine: LocalEngine, place: Path, job: str, **parameters: str) -> tuple[Result, str]:
    """Run a job to its end; return its result and log."""
    ref = engine.start(job, parameters)
    engine.wait(ref, 600)
    engine.artifacts(ref, place)
    return Result.read(place / "artifacts" / "result.json"), log_of(engine, ref)


def test_a_host_is_prepared_once_and_then_nothing_is_left_to_do(engine, tmp_path):
    host = socket.gethostname()
    first, _ = run(engine, tmp_path / "1", "host-prepare-all")
    assert (first.result, first.reason) == ("SUCCESS", f"host-prepare passed on {host}")
    child = (tmp_path / "1" / "artifacts" / "host-prepare" / "console.log").read_text()
    assert f"done     directory {engine.config.data}/runs" in child
    assert f"     plain machine of {DEB}" in child
    again, said = run(engine, tmp_path / "2", "host-prepare", NODE=host)
    assert again.reason == "everything was there", said


def test_another_node_than_this_host_is_refused(engine, tmp_path):
    result, _ = run(engine, tmp_path, "snapshot-clean", NODE="elsewhere")
    assert (result.exit, result.reason.startswith("parameter NODE: this is ")) == (2, True)


def test_snapshots_are_prepared_on_all_nodes_which_is_nothing_when_they_are_there(engine, tmp_path):
    for number in (1, 2):
        result, said = run(engine, tmp_path / str(number), "snapshot-prepare-default-all")
        assert (result.result, f"{socket.gethostname()}: {DEB}/" in said) == ("SUCCESS", True), said
    (child,) = result.children
    # a timer does this every quarter of an hour
    assert child.seconds < 10, said


def test_snapshots_are_removed_on_all_nodes_if_that_is_asked_for(tmp_path):
    config = trees.config(tmp_path)
    place = config.data / "snapshots"
    # not those of the user, which others may be about to use
    place.unlink()
    for name in ("1", "2"):
        (place / "lab@a" / name).mkdir(parents=True)
    (place / "lab@a" / "latest").symlink_to("2")
    engine = LocalEngine(config)
    for remove, said in (("false", "would remove 0 runs and 1 snapshots"), ("true", "removed 0 runs and 1 snapshots")):
        result, log = run(engine, tmp_path / remove, "snapshot-clean-all", REMOVE=remove)
        assert (result.result, f"{socket.gethostname()}: {said}" in log) == ("SUCCESS", True), log
    assert not (place / "lab@a" / "1").exists()
