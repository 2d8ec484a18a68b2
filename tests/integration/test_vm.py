"""Real machines: their snapshots, their way out, and that none of them outlives its starter."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pkgci.config import EMBEDDED, Config
from pkgci.errors import InfrastructureError
from pkgci.vm import guest
from pkgci.vm import snapshot as snapshots
from pkgci.vm.image import image_key
from pkgci.vm.machine import Machine
from pkgci.vm.proxy import Proxy, Rule
from pkgci.vm.remote import FaultError, GuestError
from pkgci.vm.snapshot import Snapshot

TARGET = "bookworm-amd64"


@pytest.fixture(scope="session")
def config() -> Config:
    return Config(EMBEDDED)


@pytest.fixture(scope="session")
def snapshot(config: Config) -> Snapshot:
    """This machine's snapshot: the one that the jobs use."""
    return guest.plain(config, TARGET)


@pytest.fixture
def copy(snapshot: Snapshot, tmp_path: Path) -> Path:
    """A snapshot's directory to do harm to; the large files are sparse copies."""
    directory = tmp_path / snapshot.directory.name
    subprocess.run(["cp", "-r", "--sparse=always", "--reflink=auto", snapshot.directory, directory], check=True)
    return directory


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/allowed/redirect":
            self.send_response(302)
            self.send_header("Location", "/forbidden")
        else:
            self.send_response(200)
        self.send_header("Content-Length", "6")
        self.end_headers()
        self.wfile.write(b"secret")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """The port of a web server on the host's loopback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.05,))
        thread.start()
        yield made.server_port
        made.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def machine(config: Config, snapshot: Snapshot, server: int) -> Iterator[Machine]:
    proxy = Proxy([Rule(f"http://127.0.0.1:{server}/allowed/")], config.cache / "proxy")
    with snapshot.restored(config, proxy) as (made,):
        yield made


# opens a TCP connection, says something, prints what comes back
TALK = 'exec 3<>"/dev/tcp/$1/$2" && printf "$3" >&3 && timeout 20 head -c 400 <&3'


def talk(machine: Machine, host: str, port: int, request: str) -> str:
    done = machine.run('timeout 30 bash -c "$@" 2>&1 || true', TALK, "bash", host, str(port), request, timeout=60)
    return done.text()


def through_proxy(machine: Machine, request: str) -> str:
    return talk(machine, "10.0.2.100", 3128, f"{request} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")


def test_the_allowed_repository_is_reached_through_the_proxy(machine, server):
    assert through_proxy(machine, f"GET http://127.0.0.1:{server}/allowed/file").endswith("secret")


@pytest.mark.parametrize(
    "request_line",
    [
        "GET http://127.0.0.1:{port}/forbidden",
        "GET http://127.0.0.1:{port}/allowed/redirect",
        "CONNECT 127.0.0.1:{port}",
    ],
)
def test_what_is_not_allowed_a_redirect_there_and_connect_are_refused(machine, server, request_line):
    said = through_proxy(machine, request_line.format(port=server))
    assert " 403 " in said
    assert "secret" not in said


@pytest.mark.parametrize("host", ["10.0.2.2", "127.0.0.1", "10.0.2.100"])
def test_other_ports_of_the_host_are_not_reached(machine, server, host):
    assert "secret" not in talk(machine, host, server, "GET /allowed/file HTTP/1.0\\r\\n\\r\\n")


def test_names_are_not_resolved_and_ipv6_leads_nowhere(machine):
    done = machine.run(
        "echo nameserver 10.0.2.3 >/etc/resolv.conf; timeout 8 getent hosts example.org || echo no name; "
        "ip -6 route show default; ip -6 -o address show scope global",
        timeout=60,
    )
    assert done.text() == "no name\n"


def test_a_machine_has_the_time_and_random_numbers_of_its_own(config, snapshot, machine):
    ask = "date +%s; cat /proc/sys/kernel/random/uuid; od -An -N16 -tx1 /dev/urandom"
    with snapshot.restored(config, Proxy((), config.cache / "proxy")) as (other,):
        first, second = (one.run(ask, timeout=30).text().splitlines() for one in (machine, other))
    assert abs(int(second[0]) - time.time()) < 10
    assert first[1] != second[1]
    assert first[2] != second[2]


def test_a_command_that_hangs_or_floods_is_cut_off(machine):
    with pytest.raises(GuestError, match="did not end within 1 s"):
        machine.run("exec sleep 1000", timeout=1)
    with pytest.raises(GuestError, match="wrote more than 1000 bytes"):
        machine.run("exec yes", timeout=30, limit=1000)
    assert machine.run("echo here", timeout=30).text() == "here\n"


# an echo of each connection's own, which begins when all has come and stays open for a while
ECHO = """
use IO::Socket::INET;
my $server = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => 7007, Listen => 5, ReuseAddr => 1) or die $!;
while (my $client = $server->accept) { next if fork; local $/; my $all = <$client>; print $client $all; exit }
"""


def talk_to(port: int, said: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as there, there.makefile("rb") as back:
        there.sendall(said)
        there.shutdown(socket.SHUT_WR)
        return back.read()


def test_a_port_of_a_machine_is_reached_by_several_at_once(machine):
    machine.put({"/srv/echo.pl": ECHO.encode()})
    machine.run(
        "systemd-run -q --unit=echo perl /srv/echo.pl; until grep -q ':1B5F ' /proc/net/tcp; do sleep 0.1; done",
        timeout=60,
    )
    sent = [os.urandom(300_000), b"", b"short"]
    with machine.forward(7007) as port, ThreadPoolExecutor() as threads:
        assert list(threads.map(talk_to, [port] * len(sent), sent)) == sent
    machine.run("systemctl stop echo", timeout=60)


def test_where_nobody_listens_in_a_machine_a_connection_is_closed(machine):
    with machine.forward(7008) as port:
        assert talk_to(port, b"") == b""


def test_a_forwarded_port_ends_with_its_connections(machine):
    with machine.forward(22) as port:
        there = socket.create_connection(("127.0.0.1", port), timeout=60)
        assert there.recv(7) == b"SSH-2.0"
    with there, suppress(ConnectionError):
        # the rest of the greeting, and then the end, though this side has not ended
        while there.recv(4096):
            pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_a_flooded_console_fills_no_disk_and_stops_nobody(config, snapshot, monkeypatch):
    monkeypatch.setattr("pkgci.vm.machine.CONSOLE_BYTES", 100_000)
    with snapshot.restored(config, Proxy((), config.cache / "proxy")) as (flooding,):
        log = Path(os.readlink(f"/proc/{flooding.pid}/cwd"), "serial.log")
        flood = "echo begins >/dev/ttyS0; yes | head -c 1000000 >/dev/ttyS0; yes >/dev/ttyS0 2>&1 & echo here"
        assert flooding.run(flood, timeout=120).text() == "here\n"
        assert flooding.run("echo still here", timeout=30).text() == "still here\n"
        # the end comes with the machine's
        assert log.stat().st_size == 50_000
        flooding.kill()
        assert log.read_bytes().startswith(b"begins\n")
        assert log.stat().st_size < 200_000


def test_a_run_leaves_the_snapshot_as_it_was_and_nothing_of_its_own(config, snapshot):
    before = [snapshots._sha256(snapshot.directory / f"{guest.PLAIN}.{part}") for part in ("ram", "state")]
    with snapshot.restored(config, Proxy((), config.cache / "proxy")) as (one,):
        one.run("dd if=/dev/urandom of=/junk bs=1M count=8 2>/dev/null; sync", timeout=60)
        pid = one.pid
        (place,) = [
            path for path in (config.cache / "runs").iterdir() if Path(os.readlink(f"/proc/{pid}/cwd")).parent == path
        ]
    assert not Path(f"/proc/{pid}").exists()
    assert not place.exists()
    assert [snapshots._sha256(snapshot.directory / f"{guest.PLAIN}.{part}") for part in ("ram", "state")] == before


STARTER = """
import sys, time
from pathlib import Path
from pkgci.config import EMBEDDED, Config
from pkgci.vm.proxy import Proxy
from pkgci.vm.snapshot import Snapshot
config = Config(EMBEDDED)
with Snapshot(Path(sys.argv[1])).restored(config, Proxy((), config.cache / "proxy")) as (machine,):
    print(machine.pid, flush=True)
    time.sleep(1000)
"""


def test_that_qemu_is_killed_is_not_the_guests_doing(config, snapshot):
    with snapshot.restored(config, Proxy((), config.cache / "proxy")) as (machine,):
        killer = threading.Timer(1, os.kill, (machine.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(InfrastructureError, match="QEMU was killed"):
            machine.run("sleep 1000", timeout=60)


def test_a_machine_that_does_not_come_up_in_time_is_a_listed_fault(config, snapshot, monkeypatch):
    monkeypatch.setattr(Machine, "go_on", lambda _: None)
    monkeypatch.setattr(snapshots, "RESTORE_SECONDS", 1)
    monkeypatch.setattr("pkgci.ssh.CONNECT_SECONDS", 1)
    with (
        pytest.raises(FaultError, match="a machine was not restored within its time: node: no ssh to the machine"),
        snapshot.restored(config, Proxy((), config.cache / "proxy")),
    ):
        pass


def test_killing_the_starter_ends_the_machine_and_the_next_run_removes_what_it_left(config, snapshot):
    starter = subprocess.Popen([sys.executable, "-c", STARTER, snapshot.directory], stdout=subprocess.PIPE)
    pid = int(starter.stdout.readline())
    place = Path(os.readlink(f"/proc/{pid}/cwd")).parent
    # a descriptor of the process tells its end, whoever its parent is by then
    ended = os.pidfd_open(pid)
    starter.kill()
    starter.wait()
    starter.stdout.close()
    assert select.select([ended], [], [], 10)[0]
    os.close(ended)
    assert place.exists()
    with snapshot.restored(config, Proxy((), config.cache / "proxy")):
        assert not place.exists()


def test_a_snapshot_of_another_qemu_is_refused(snapshot, monkeypatch):
    monkeypatch.setattr(snapshots, "qemu_version", lambda: "QEMU emulator version 99")
    with pytest.raises(InfrastructureError, match=r"was made by QEMU emulator version .*, here is .* 99"):
        snapshot.check()


def test_a_snapshot_of_another_command_line_is_refused(snapshot, monkeypatch):
    monkeypatch.setattr("pkgci.vm.machine.MACHINE_TYPE", "q35")
    with pytest.raises(InfrastructureError, match="another command line"):
        snapshot.check()


def test_a_file_of_another_size_is_found_at_once_and_a_flipped_byte_by_verification(copy):
    state = copy / f"{guest.PLAIN}.state"
    content = state.read_bytes()
    state.chmod(0o600)
    state.write_bytes(content[:-1])
    with pytest.raises(InfrastructureError, match=r"node\.state is missing or has another size"):
        Snapshot(copy).check()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    Snapshot(copy).check()
    with pytest.raises(InfrastructureError, match=r"the content of node\.state has changed"):
        Snapshot(copy).verify()


def test_a_machine_with_another_host_key_is_not_talked_to(config, copy):
    manifest = copy / "manifest.json"
    key = Snapshot(copy).manifest.nodes[0].host_key
    other = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdLwLWMHfdu4gLO+1gp2kDn7k9Ws6"
    manifest.write_text(manifest.read_text().replace(key, other))
    with (
        pytest.raises(GuestError, match="cannot log in"),
        Snapshot(copy).restored(config, Proxy((), config.cache / "proxy")),
    ):
        pass


def test_what_the_image_is_made_from_is_in_its_key(config):
    target = config.target(TARGET)
    other = target.model_copy(update={"machine": target.machine.model_copy(update={"packages": ("sl",)})})
    assert image_key(target) == image_key(config.target(TARGET)) != image_key(other)
