"""What becomes of a snapshot that cannot be used. Real machines are in `tests/integration/test_vm.py`."""

import hashlib
import json
import logging
import os
import shutil
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import trees

from pkgci.artifacts import File
from pkgci.config import Config
from pkgci.errors import InfrastructureError, RequestError
from pkgci.vm import lan, snapshot
from pkgci.vm.image import Image
from pkgci.vm.machine import Clock
from pkgci.vm.proxy import Proxy
from pkgci.vm.remote import Completed, DeafError, GuestError, Remote
from pkgci.vm.snapshot import FrozenNode, Manifest, Plan, Planned, Step, UnfitError, ensure

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
    known = {"name": TARGET, "key": "", "qemu": "QEMU emulator version 7", "accelerator": "tcg"}
    return Manifest(nodes=(), files=(), **{**known, "created": datetime.now(UTC), **values})


def plan(config: Config) -> Plan:
    """Return the plan of a target's plain machine."""
    return Plan(TARGET, {"node": Planned(config.target(TARGET))}, "true")


def test_a_missing_tool_is_no_reason_to_make_a_snapshot_anew(config, latest, caplog):
    caplog.set_level(logging.INFO, logger="pkgci.vm.snapshot")
    manifest().write(latest / "manifest.json")
    with pytest.raises(InfrastructureError, match="cannot run qemu-system-x86_64: not installed"):
        ensure(config, plan(config))
    assert caplog.messages == []


def test_why_a_snapshot_is_made_anew_is_said_once(config, latest, caplog):
    caplog.set_level(logging.INFO, logger="pkgci.vm.snapshot")
    with pytest.raises(InfrastructureError, match="not installed"):
        ensure(config, plan(config))
    missing = latest / "manifest.json"
    assert caplog.messages == [f"{TARGET}: a snapshot is made: cannot read {missing}: No such file or directory"]


@pytest.mark.parametrize(("days", "fits"), [(-8, False), (-6, True), (6, True), (8, False)])
def test_a_snapshot_from_long_ago_or_of_a_clock_that_was_far_ahead_is_made_anew(
    config, latest, monkeypatch, days, fits
):
    monkeypatch.setattr(snapshot, "qemu_version", lambda: "QEMU emulator version 7")
    monkeypatch.setattr(snapshot, "image_key", lambda *_: "image")
    created = datetime.now(UTC) + timedelta(days=days)
    manifest(key=plan(config).key(), created=created).write(latest / "manifest.json")
    expected = nullcontext() if fits else pytest.raises(UnfitError, match="not made within the last 7 days")
    with expected:
        snapshot._latest(config, plan(config), 7)


def test_all_that_a_set_is_made_from_is_in_its_key(config, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "image_key", lambda *_: "image")
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "run.sh").write_text("true\n")
    target = config.target(TARGET)

    def key(*, setup: str = "", deploy: bool = True, clock: Clock = "host", **addresses: str) -> str:
        steps = (Step("a", tmp_path / "deploy" / "run.sh", 60),)
        nodes = {"a": Planned(target, addresses), "b": Planned(target)}
        return Plan("lab", nodes, setup, *((steps, ()) if deploy else ((), steps)), clock).key()

    keys = [key(), key(setup="true"), key(deploy=False), key(clock="frozen"), key(lan="192.168.7.1/24")]
    (tmp_path / "deploy" / "beside").write_text("")
    keys.append(key())
    (tmp_path / "deploy" / "run.sh").chmod(0o755)
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[-1]


def test_a_script_that_is_not_there_is_an_error_of_the_environment(config, monkeypatch):
    monkeypatch.setattr(snapshot, "image_key", lambda *_: "image")
    nodes = {"a": Planned(config.target(TARGET))}
    with pytest.raises(RequestError, match=r"/nowhere/run\.sh: there is no such script"):
        Plan("lab", nodes, "", (Step("a", Path("/nowhere/run.sh"), 60),)).key()


def test_networks_are_hubs_in_their_first_machine():
    made = lan.backends({"master": ["admin", "data"], "one": ["admin"], "two": ["data", "admin"], "alone": []})
    words = {name: [word for word in made[name] if word != "-netdev"] for name in made}
    assert words == {
        "master": [
            "hubport,id=lan0,hubid=0",
            "hubport,id=lan1,hubid=1",
            "stream,id=link0-1,server=on,addr.type=unix,addr.path=../.link0-1",
            "hubport,id=hub-link0-1,hubid=0,netdev=link0-1",
            "stream,id=link1-2,server=on,addr.type=unix,addr.path=../.link1-2",
            "hubport,id=hub-link1-2,hubid=1,netdev=link1-2",
            "stream,id=link0-2,server=on,addr.type=unix,addr.path=../.link0-2",
            "hubport,id=hub-link0-2,hubid=0,netdev=link0-2",
        ],
        "one": ["stream,id=lan0,server=off,addr.type=unix,addr.path=../.link0-1"],
        "two": [
            "stream,id=lan0,server=off,addr.type=unix,addr.path=../.link1-2",
            "stream,id=lan1,server=off,addr.type=unix,addr.path=../.link0-2",
        ],
        "alone": [],
    }


def test_a_kept_run_is_no_reason_to_read_all_of_its_snapshot_again(config, latest, monkeypatch):
    monkeypatch.setattr(snapshot, "qemu_version", lambda: "QEMU emulator version 7")
    (latest / "node.ram").write_bytes(b"memory")
    (latest / ".verified.json.new").touch()
    file = File(name="node.ram", size=6, sha256=hashlib.sha256(b"memory").hexdigest())
    manifest().model_copy(update={"files": (file,)}).write(latest / "manifest.json")
    one = snapshot.Snapshot(latest)
    one.verify()
    snapshot.keep(one, [], config.data / "runs" / "1")
    kept = config.data / "runs" / "1" / snapshot.BASE
    assert sorted(path.name for path in kept.iterdir()) == ["manifest.json", "node.ram"]
    assert (kept / "node.ram").samefile(latest / "node.ram")
    monkeypatch.setattr(snapshot, "_sha256", lambda _: pytest.fail("it is read again"))
    one.verify()


def test_a_machine_knows_the_others_by_addresses_that_it_reaches(config):
    target = config.target(TARGET)
    nodes = {
        "master": Planned(target, {"admin": "192.168.7.1/24"}),
        "one": Planned(target, {"admin": "192.168.7.2/24", "data": "172.16.0.1/28"}),
        "two": Planned(target, {"data": "172.16.0.2/28"}),
        "alone": Planned(target),
    }
    said = {name: snapshot.hosts(nodes, name).splitlines() for name in nodes}
    assert said == {
        "master": ["192.168.7.1 master", "192.168.7.2 one", "172.16.0.2 two"],
        "one": ["192.168.7.1 master", "192.168.7.2 one", "172.16.0.2 two"],
        "two": ["192.168.7.1 master", "172.16.0.1 one", "172.16.0.2 two"],
        "alone": ["192.168.7.1 master", "192.168.7.2 one", "172.16.0.2 two"],
    }


def test_a_machine_may_have_any_name(config, latest, monkeypatch):
    """Also one that files of a run have, beside the machines' directories."""
    monkeypatch.setenv("PATH", os.defpath)
    node = {
        "image": "",
        "memory_mib": 512,
        "addresses": (),
        "networks": (),
        "command": (),
        "host_key": "",
        "packages": (),
    }
    one = FrozenNode(name="proxy", **node)
    manifest().model_copy(update={"nodes": (one,)}).write(latest / "manifest.json")
    monkeypatch.setattr(snapshot.Snapshot, "check", lambda _: None)
    monkeypatch.setattr(snapshot, "run", lambda *_, **__: None)
    monkeypatch.setattr(
        snapshot.Machine, "load", lambda machine: pytest.fail(str((machine.directory / "proxy").is_socket()))
    )
    restored = snapshot.Snapshot(latest).restored(config, Proxy((), config.cache / "proxy"))
    with pytest.raises(pytest.fail.Exception, match="True"), restored:
        pass


def test_a_deployment_may_say_a_lot_and_its_last_line_says_what_is_wrong(config, tmp_path):
    (tmp_path / "run.sh").write_text("")
    steps = (Step("a", tmp_path / "run.sh", 60),)

    class Talkative(Remote):
        status = 0

        def waited(self) -> float:
            return 0.0

        def run(self, *_: str, timeout: float, input: bytes = b"", limit: int = 1 << 20) -> Completed:
            assert (timeout, len(input) > 0, limit > 16 << 20) == (60, True, True)
            return Completed(self.status, b"said\n" * 1000 + b"it is \x1b[1mbroken\n")

    machine = Talkative(None)
    lab = Plan("lab", {"a": Planned(config.target(TARGET))}, "", steps)
    snapshot.run_steps(lab, steps, {"a": machine})
    machine.status = 1
    with pytest.raises(InfrastructureError, match=r"^cannot run .*/run\.sh on a: it is \?\[1mbroken$"):
        snapshot.run_steps(lab, steps, {"a": machine})


def test_a_snapshot_whose_checksums_are_compared_is_not_removed_meanwhile(config, latest, monkeypatch):
    monkeypatch.setattr(snapshot, "image_key", lambda *_: "image")
    manifest(key=plan(config).key()).write(latest / "manifest.json")

    def verify(_: object) -> None:
        (latest.parent / "2").mkdir()
        (latest.parent / "latest").unlink()
        (latest.parent / "latest").symlink_to("2")
        assert not snapshot.discard(latest, (), 0)

    monkeypatch.setattr(snapshot.Snapshot, "verify", verify)
    assert snapshot._latest(config, plan(config), 7).directory == latest
    assert snapshot.discard(latest, (), 0)


def test_a_snapshot_that_is_only_too_old_is_used_when_no_other_can_be_made_but_by_who_makes_it_ahead(
    config, latest, monkeypatch
):
    def fail(*_: object) -> None:
        raise InfrastructureError("the mirror does not answer")

    monkeypatch.setattr(snapshot, "qemu_version", lambda: "QEMU emulator version 7")
    monkeypatch.setattr(snapshot, "image_key", lambda *_: "image")
    monkeypatch.setattr(snapshot, "_make", fail)
    made = datetime.now(UTC) - timedelta(days=6.5)
    manifest(key=plan(config).key(), created=made).write(latest / "manifest.json")
    assert ensure(config, plan(config)).directory == latest.resolve()
    with pytest.raises(InfrastructureError, match="does not answer"):
        ensure(config, plan(config), renew=True)
    manifest(key=plan(config).key(), created=made - timedelta(days=1)).write(latest / "manifest.json")
    assert ensure(config, plan(config)).directory == latest.resolve()
    manifest(key="another", created=made).write(latest / "manifest.json")
    with pytest.raises(InfrastructureError, match="does not answer"):
        ensure(config, plan(config))


@pytest.mark.parametrize(("waited", "error"), [(10, GuestError), (290, InfrastructureError)])
def test_whether_the_machine_or_the_host_is_slow_the_console_and_what_was_waited_for_are_said(
    config, caplog, waited, error
):
    def deaf(_: float) -> None:
        raise DeafError("no ssh to the machine within 300 s: refused")

    waits = iter((0.0, float(waited)))
    machine = SimpleNamespace(waited=lambda: next(waits), connect=deaf, console=lambda: "it panics\n")
    with pytest.raises(InfrastructureError, match=f"^{TARGET}: node does not come up: no ssh to the machine") as caught:
        snapshot._come_up(plan(config), "node", machine, 0)
    assert (type(caught.value), "it panics" in caplog.text) == (error, True)


def test_a_product_that_does_not_fit_is_not_deployed_anew(config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "disk").write_bytes(b"x" * (3 << 20))
    made = Image(tmp_path, "key", "ssh-ed25519 AAAA")
    monkeypatch.setattr(snapshot, "image", lambda *_: made)
    monkeypatch.setattr(snapshot, "_rebuilt", lambda *_: pytest.fail("it has begun"))
    monkeypatch.setattr(snapshot.shutil, "disk_usage", lambda _: SimpleNamespace(free=400 << 20))
    lab = Plan("lab", {"a": Planned(config.target(TARGET)), "b": Planned(config.target(TARGET), boot="a")}, "")
    with (
        pytest.raises(
            InfrastructureError, match=r"^no space to deploy lab anew: 400 MiB free for .*, 1030 MiB needed; "
        ),
        snapshot.redeployed(config, lab, "a", lambda _: None, snapshot.Making()),
    ):
        pass
    assert not list((config.cache / "runs").iterdir())


def test_a_field_that_is_newer_than_a_manifest_does_not_make_it_a_damaged_one(latest):
    manifest().write(latest / "manifest.json")
    path = latest / "manifest.json"
    assert Manifest.read(path).sha256 == Manifest.read(path).digest()
    # as it was before there was `seconds`
    older = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("seconds", "sha256")}
    path.write_text(json.dumps(older))
    path.write_text(json.dumps({**older, "sha256": Manifest.read(path).digest()}))
    assert Manifest.read(path).sha256 == Manifest.read(path).digest()
    path.write_text(path.read_text().replace('"tcg"', '"kvm"'))
    assert Manifest.read(path).sha256 != Manifest.read(path).digest()
