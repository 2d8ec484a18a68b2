"""What becomes of a snapshot that cannot be used. Real machines are in `tests/integration/test_vm.py`."""

import logging
import shutil
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trees

from pkgci.config import Config
from pkgci.errors import InfrastructureError
from pkgci.vm import snapshot
from pkgci.vm.machine import Hardware
from pkgci.vm.snapshot import Manifest, UnfitError, ensure

TARGET = "bookworm-amd64"


@pytest.fixture
def config(tmp_path: Path, monkeypatch) -> Config:
    """A configuration on a machine that has nothing installed but what starts a command."""
    made = trees.config(tmp_path)
    (made.data / "snapshots").unlink()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "setpriv").symlink_to(str(shutil.which("setpriv")))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return made


@pytest.fixture
def latest(config: Config) -> Path:
    """The directory of the latest snapshot, empty."""
    place = config.data / "snapshots" / TARGET
    (place / "1").mkdir(parents=True)
    (place / "latest").symlink_to("1")
    return place / "1"


def manifest(**values: object) -> Manifest:
    """Return the manifest of a snapshot without files, for a QEMU that is nowhere."""
    known = {"name": TARGET, "key": "", "image": "", "qemu": "QEMU emulator version 7", "accelerator": "tcg"}
    known |= {"memory_mib": 512, "command": (), "host_key": "", "created": datetime.now(UTC), "packages": ()}
    return Manifest(files=(), **{**known, **values})


def test_a_missing_tool_is_no_reason_to_make_a_snapshot_anew(config, latest, caplog):
    caplog.set_level(logging.INFO, logger="pkgci.vm.snapshot")
    manifest().write(latest / "manifest.json")
    with pytest.raises(InfrastructureError, match="cannot run qemu-system-x86_64: not installed"):
        ensure(config, TARGET, config.target(TARGET), "true")
    assert caplog.messages == []


def test_why_a_snapshot_is_made_anew_is_said_once(config, latest, caplog):
    caplog.set_level(logging.INFO, logger="pkgci.vm.snapshot")
    with pytest.raises(InfrastructureError, match="not installed"):
        ensure(config, TARGET, config.target(TARGET), "true")
    missing = latest / "manifest.json"
    assert caplog.messages == [f"{TARGET}: a snapshot is made: cannot read {missing}: No such file or directory"]


@pytest.mark.parametrize(("days", "fits"), [(-8, False), (-6, True), (6, True), (8, False)])
def test_a_snapshot_from_long_ago_or_of_a_clock_that_was_far_ahead_is_made_anew(
    config, latest, monkeypatch, days, fits
):
    monkeypatch.setattr(snapshot, "qemu_version", lambda: "QEMU emulator version 7")
    monkeypatch.setattr(snapshot, "image_key", lambda _: "image")
    created = datetime.now(UTC) + timedelta(days=days)
    command = tuple(Hardware("tcg", 512).command())
    manifest(key=snapshot._key("image", "true", 512), command=command, created=created).write(latest / "manifest.json")
    expected = nullcontext() if fits else pytest.raises(UnfitError, match="not made within the last 7 days")
    with expected:
        snapshot._latest(config, TARGET, config.target(TARGET), "true")
