"""What a host needs for system tests: each thing said in a line, made where it can be, and nothing done twice."""

import errno
import logging
import os
from pathlib import Path

import pytest

from pkgci import doctor, host
from pkgci.config import Config
from pkgci.doctor import Finding
from pkgci.errors import InfrastructureError
from pkgci.vm import guest, snapshot


@pytest.fixture
def config(tmp_path: Path, monkeypatch) -> Config:
    """A host of a target, whose machine is made at once."""
    (tmp_path / "etc" / "targets").mkdir(parents=True)
    (tmp_path / "etc" / "targets" / "a.yaml").write_text("")
    paths = ", ".join(f"{kind}: {tmp_path / kind}" for kind in ("cache", "state", "data"))
    (tmp_path / "etc" / "config.yaml").write_text(f"paths: {{{paths}}}\n")
    made = Config(tmp_path / "etc")
    machine = tmp_path / "machine"
    monkeypatch.setattr(guest, "plain_plan", lambda *_: None)
    monkeypatch.setattr(snapshot, "unfit", lambda *_: "" if machine.exists() else "there is none yet")
    monkeypatch.setattr(guest, "plain", lambda *_: machine.touch())
    tools = tmp_path / "tools"
    monkeypatch.setattr(host, "has_tools_root", lambda *_: tools.exists())
    monkeypatch.setattr(host, "tools_root", lambda *_: tools.touch())
    monkeypatch.setattr(doctor, "FREE_GIB", 0)
    return made


def said(caplog, word: str) -> list[str]:
    return [line.partition(" ")[2].strip() for line in caplog.messages if line.startswith(word)]


def test_what_is_missing_is_made_once_and_then_found(config, caplog):
    caplog.set_level(logging.INFO)
    assert host.prepare(config) == "6 things were made"
    snapshots, runs, *_, machine, tools = said(caplog, "done")
    assert (snapshots, runs) == (f"directory {config.data}/snapshots", f"directory {config.data}/runs")
    assert (machine, tools) == ("plain machine of a", "root with autopkgtest for a")
    caplog.clear()
    assert host.prepare(config) == "everything was there"
    assert said(caplog, "done") == []
    assert f"locks work in {config.data}/snapshots" in " ".join(said(caplog, "ok"))


def test_looking_makes_nothing(config):
    lines = [finding.line() for finding in host.examine(config)]
    assert f"MISSING directory {config.data}/snapshots; mend it: pkgci host-prepare" in lines
    assert "MISSING plain machine of a: there is none yet; mend it: pkgci host-prepare" in lines
    assert not config.data.exists()


def test_what_only_an_administrator_may_do_is_said_and_the_rest_is_done(config, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    setup = tmp_path / "setup.sh"
    setup.write_text("#!/bin/sh\nprintf 'Once:\\n\\n    sudo sh -c %s\\n\\n' \"'apt-get install x'\" >&2\nexit 3\n")
    setup.chmod(0o755)
    monkeypatch.setattr(host, "SETUP", setup)
    monkeypatch.setattr(host, "system", lambda: [Finding("tools: x", False, "sudo apt-get install x")])
    with pytest.raises(InfrastructureError, match="1 things are missing; first: tools: x: an administrator runs: sudo"):
        host.prepare(config)
    assert said(caplog, "missing:") == ["tools: x: an administrator runs: sudo sh -c 'apt-get install x'"]
    assert len(said(caplog, "done")) == 6


def test_a_device_that_may_not_be_opened_names_the_group(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "KVM", tmp_path / "none")
    assert host._kvm().line() == f"ok      no {tmp_path}/none: machines are emulated"
    monkeypatch.setattr(host, "KVM", tmp_path)
    monkeypatch.setattr(host.os, "access", lambda *_: False)
    assert "mend it: sudo usermod --append --groups " in host._kvm().line()

    def nameless(number: int) -> None:
        raise KeyError(f"gid not found: {number}")

    monkeypatch.setattr(host.grp, "getgrgid", nameless)
    assert f"mend it: let user {os.getuid()} into group " in host._kvm().line()


def test_a_directory_that_cannot_be_written_is_a_finding_and_the_rest_is_looked_at(config, monkeypatch):
    (config.data / "snapshots").mkdir(parents=True)

    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(host.tempfile, "TemporaryDirectory", refuse)
    line = host._locks(config.data / "snapshots").line()
    assert line.startswith(f"MISSING locks work in {config.data}/snapshots (")
    assert line.endswith("with locks (Permission denied)")


def test_a_qemu_without_the_parts_of_networks_is_found(monkeypatch):
    assert host._networks().good
    monkeypatch.setattr(host.lan, "backends", lambda _: {"one": ["-netdev", "no-such-thing,id=x"]})
    assert not host._networks().good


def test_a_snapshot_that_does_not_fit_names_the_job_that_makes_it(config):
    place = config.data / "snapshots" / "lab@a"
    (place / "1").mkdir(parents=True)
    (place / "latest").symlink_to("1")
    lines = [finding.line() for finding in host.examine(config)]
    assert lines[-1].startswith("MISSING snapshot of lab@a: cannot read ")
    assert lines[-1].endswith("; mend it: pkgci jobs run snapshot-prepare-lab")


def test_the_table_counts_a_file_with_two_names_once(config):
    one, two = config.data / "snapshots" / "a", config.data / "runs" / "a"
    for place in (one, two):
        place.parent.mkdir(parents=True)
    one.write_bytes(b"x" * (3 << 20))
    two.hardlink_to(one)
    rows = {line[:17].strip(): line[17:].split() for line in host.usage(config).splitlines()}
    assert [rows[what][0] for what in ("snapshots", "kept runs", "other data")] == ["3", "0", "0"]
    assert rows["snapshots"][2] == str(config.data / "snapshots")
