"""What becomes of a snapshot that cannot be used. Real machines are in `tests/integration/test_vm.py`."""

import logging
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trees

from pkgci.config import Config
from pkgci.errors import InfrastructureError
from pkgci.vm.snapshot import Manifest, ensure

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


def test_a_missing_tool_is_no_reason_to_make_a_snapshot_anew(config, latest, caplog):
    caplog.set_level(logging.INFO, logger="pkgci.vm.snapshot")
    Manifest(
        name=TARGET,
        key="",
        image="",
        qemu="QEMU emulator version 7",
        accelerator="tcg",
        memory_mib=512,
        command=(),
        host_key="",
        created=datetime.now(UTC),
        packages=(),
        files=(),
    ).write(latest / "manifest.json")
    with pytest.raises(InfrastructureError, match="cannot run qemu-system-x86_64: not installed"):
        ensure(config, TARGET, config.target(TARGET), "true")
    assert caplog.messages == []


def test_why_a_snapshot_is_made_anew_is_said_once(config, latest, caplog):
    caplog.set_level(logging.INFO, logger="pkgci.vm.snapshot")
    with pytest.raises(InfrastructureError, match="not installed"):
        ensure(config, TARGET, config.target(TARGET), "true")
    manifest = latest / "manifest.json"
    assert caplog.messages == [f"{TARGET}: a snapshot is made: cannot read {manifest}: No such file or directory"]
