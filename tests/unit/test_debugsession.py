"""Sessions of debug-session, without machines: who is let in where, how many there are, and what is refused."""

import base64
import shlex
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from pkgci import runs
from pkgci.change import EVERY, Parameters
from pkgci.config import Config
from pkgci.debugsession import Session, _login, _sessions, debug_session
from pkgci.errors import InfrastructureError, RequestError
from pkgci.kept import RECORD
from pkgci.locks import locked
from pkgci.vm.remote import Access

NOW = datetime.now(UTC)
HERE = "test-host"
HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAION2wtRGsZ9+TcGbPqv7UVM1XDM8bPPECbseW4dZYpou comment"


def configured(place: Path, settings: str = "") -> Config:
    (place / "etc").mkdir()
    (place / "etc" / "config.yaml").write_text(
        f"{settings}\npaths: {{data: {place / 'data'}, state: {place / 'state'}}}\n"
    )
    return Config(place / "etc")


@pytest.fixture
def context(tmp_path, monkeypatch) -> SimpleNamespace:
    """A step on a host that has kept the machines of two system tests."""
    monkeypatch.setenv("NODE_NAME", HERE)
    config = configured(tmp_path)
    kept = runs.runs(config)
    for number in (1, 2):
        with kept.room(NOW) as room:
            about = {"job": "systest-a", "number": number, "parent": "", "target": "a", "environment": "lab"}
            kept.keep(
                room,
                runs.KeptRun(**about, ended=NOW + timedelta(seconds=number), passed=False, sets={"machines": "lab/1"}),
                NOW,
            )
    engine = SimpleNamespace(record=lambda _: SimpleNamespace(node="elsewhere"))
    return SimpleNamespace(config=config, engine=engine)


def ask(context: SimpleNamespace, **values: str) -> str:
    return debug_session(context, Parameters.read(values, EVERY))


def session(config: Config, number: int, **more: object) -> Path:
    """Make the record of a session, which nobody holds; return its directory."""
    about = {"job": "systest-a", "number": number, "parent": "", "target": "a", "opened": NOW, "keys": ()}
    place = _sessions(config).place / f"systest-a-{number}"
    Session(**{**about, "ended": NOW + timedelta(hours=1), **more}).write(place / RECORD)
    return place


def test_by_default_the_login_goes_through_the_host_and_gives_nothing_of_the_persons(tmp_path):
    machine = SimpleNamespace(port=lambda: 2200, access=Access(tmp_path, HOST_KEY))
    name, _, command = _login(configured(tmp_path), "one", machine).partition(": ")
    words = shlex.split(command)
    assert (name, words[1], words[-1]) == ("one", "-J", "root@127.0.0.1")
    said = subprocess.run(
        [*words[:-1], "-G", words[-1]], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {
        "port 2200",
        "forwardagent no",
        "forwardx11 no",
        "clearallforwardings yes",
        "stricthostkeychecking true",
    } <= {*said}
    key = " ".join(HOST_KEY.split()[:2])
    assert f"knownhostscommand /bin/echo [127.0.0.1]:2200 {key}" in said


@pytest.mark.parametrize(("address", "shown"), [("192.0.2.7", "192.0.2.7"), ("0.0.0.0", None)])
def test_at_an_address_of_the_host_the_login_goes_there(tmp_path, monkeypatch, address, shown):
    monkeypatch.setattr("socket.gethostname", lambda: HERE)
    machine = SimpleNamespace(listen=lambda asked: {address: 2300}[asked], access=Access(tmp_path, HOST_KEY))
    words = shlex.split(_login(configured(tmp_path, f"debug_address: {address}"), "one", machine))
    assert (words[2:4], words[-1]) == (["-p", "2300"], f"root@{shown or HERE}")


def test_an_address_that_is_none_is_refused_with_its_line(tmp_path):
    with pytest.raises(RequestError, match=r"config.yaml:1: debug_address: "):
        _ = configured(tmp_path, "debug_address: here").settings


def test_a_test_that_ran_elsewhere_is_found_there(context):
    said = (
        "no machines are kept of systest-a/7 on test-host; they are kept of: .*; systest-a/7 ran on elsewhere: start "
    )
    with pytest.raises(RequestError, match=said):
        ask(context, ACTION="open", BUILD="systest-a/7")


def test_a_host_has_so_many_sessions_and_one_of_a_test(context):
    with locked(session(context.config, 1)):
        with pytest.raises(RequestError, match="a session of systest-a/1 runs already"):
            ask(context, ACTION="open", BUILD="systest-a/1")
        with pytest.raises(InfrastructureError, match=r"1 sessions run on test-host \(systest-a/1 until .*\), and"):
            ask(context, ACTION="open", BUILD="systest-a/2")


def test_what_a_killed_session_left_is_none_and_goes(context, monkeypatch):
    left = session(context.config, 1)
    said = "sessions on test-host: none; machines are kept of: systest-a/2, systest-a/1"
    assert ask(context, ACTION="list") == said
    assert not left.exists()

    # nor does it keep another one from its place
    def restored(*_: object):
        raise InfrastructureError("restored")

    left = session(context.config, 1)
    monkeypatch.setattr(runs, "restored", restored)
    with pytest.raises(InfrastructureError, match="restored"):
        ask(context, ACTION="open", BUILD="systest-a/1")
    assert not left.exists()


def test_no_session_lasts_longer_than_a_day_and_none_gets_shorter(context):
    opened = NOW - timedelta(hours=20)
    place = session(context.config, 1, opened=opened, ended=NOW + timedelta(hours=3))
    with locked(place):
        ask(context, ACTION="extend", DEBUG_HOLD="90m")
        assert Session.read(place / RECORD).ended == NOW + timedelta(hours=3)
        ask(context, ACTION="extend", DEBUG_HOLD="24h")
        assert Session.read(place / RECORD).ended == opened + timedelta(hours=24)


def field(*values: bytes) -> bytes:
    """Return values as ssh writes them, RFC 4251, section 5: with their lengths."""
    return b"".join(len(value).to_bytes(4) + value for value in values)


ED25519 = f"ssh-ed25519 {base64.b64encode(field(b'ssh-ed25519', bytes(32))).decode()}"
MODULUS = ((1 << 1023) + 1).to_bytes(129)
RSA_1024 = f"ssh-rsa {base64.b64encode(field(b'ssh-rsa', bytes([1, 0, 1]), MODULUS)).decode()}"
CURVE = b"nistp256"
COMPRESSED = base64.b64encode(field(b"ecdsa-sha2-" + CURVE, CURVE, bytes([2]) * 33)).decode()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (f"ssh-ed25519 AAAA{'x' * 64}", r"'ssh-ed25519 AAAAx+'\.\.\. is no ssh public key"),
        (f"ecdsa-sha2-nistp256 {COMPRESSED}", "is no ssh public key: "),
        (RSA_1024, "an RSA key of 1024 bits; sshd takes it from 2048 bits on"),
        (f'command="id" {ED25519}', "is not allowed; it must match"),
        (f"{ED25519} me\n{ED25519} you", "is not allowed; it must match"),
        (f"{ED25519}\nno-pty", "is not allowed; it must match"),
    ],
)
def test_a_key_that_is_none_or_comes_with_more_is_refused(context, key, said):
    with pytest.raises(RequestError, match=rf"^parameter PUBLIC_KEY: .*{said}"):
        ask(context, ACTION="extend", PUBLIC_KEY=key)
