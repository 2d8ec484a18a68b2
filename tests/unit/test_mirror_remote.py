"""A mirror that answers too much, too slowly, or something else, and one that is given up."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from servers import Rsyncd

from pkgci.config import Mirror
from pkgci.errors import Aborted, InfrastructureError
from pkgci.mirrors import remote
from pkgci.mirrors.stop import Stop


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Answer whoever connects; yields the port."""

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = listening.accept()
                threading.Thread(target=talk, args=(client,), daemon=True).start()

    def talk(client: socket.socket) -> None:
        with suppress(OSError), client:
            answer(client)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


def serving(body: bytes, status: str = "200 OK") -> Callable[[socket.socket], None]:
    """Answer over HTTP."""

    def answer(client: socket.socket) -> None:
        client.recv(4096)
        client.sendall(f"HTTP/1.0 {status}\r\n\r\n".encode() + body)

    return answer


def mirror(place: Path, rsync: str, stop: Stop | None = None) -> remote.Remote:
    described = Mirror(url="http://127.0.0.1:1/", rsync=rsync)
    return remote.Remote("europe", described, "bookworm", place / "scratch", stop or Stop())


@pytest.fixture
def rsyncd(tmp_path: Path) -> Iterator[Rsyncd]:
    made = Rsyncd(tmp_path / "rsyncd", tmp_path / "tree")
    yield made
    made.end()


def test_what_a_mirror_has_is_listed_and_not_taken(tmp_path, rsyncd):
    place = rsyncd.tree / "bookworm"
    for name in ("generations/1", "generations/12", "generations/x y", "pool/hello", ".new"):
        (place / name).mkdir(parents=True)
    (place / "current").symlink_to("generations/12")
    seen = mirror(tmp_path, rsyncd.url).look()
    assert seen == remote.Seen("generations/12", frozenset({1, 12}), temporary=True)
    assert seen.number == 12


def test_a_large_file_in_the_place_of_the_pointer_does_not_come_to_our_disk(tmp_path, rsyncd):
    place = rsyncd.tree / "bookworm"
    place.mkdir()
    with (place / "current").open("wb") as stream:
        stream.truncate(400 << 20)
    with pytest.raises(InfrastructureError, match="bookworm/current is no symbolic link there"):
        mirror(tmp_path, rsyncd.url).look()
    assert [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()] == []


def test_a_daemon_that_talks_without_end_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "LARGEST", 1 << 20)
    said = []

    def talk(client: socket.socket) -> None:
        client.sendall(b"@RSYNCD: 29\n")
        client.recv(200)
        client.sendall(b"@RSYNCD: OK\n")
        client.recv(65536)
        # its checksum seed, then messages for people without end; see io.c of rsync
        client.sendall(struct.pack("<i", 1))
        message = b"x" * 4000 + b"\n"
        while True:
            client.sendall(struct.pack("<I", (7 + 3) << 24 | len(message)) + message)
            said.append(len(message))

    with server(talk) as port, pytest.raises(InfrastructureError, match="cannot look at it: it says more than 1 MiB"):
        mirror(tmp_path, f"rsync://127.0.0.1:{port}/released/").look()
    assert sum(said) < 64 << 20


def test_a_web_server_that_dribbles_is_given_up_also_in_its_header(monkeypatch):
    monkeypatch.setattr(remote, "FETCH_SECONDS", 0.5)

    def dribble(client: socket.socket) -> None:
        client.recv(4096)
        for byte in b"HTTP/1.0 200 OK\r\nX: " + b"x" * 100:
            client.sendall(bytes([byte]))
            time.sleep(0.05)

    with server(dribble) as port, pytest.raises(InfrastructureError, match=r"no end after 0\.5 s"):
        remote.fetch(f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (serving(b"1"), b"1"),
        (serving(b"", "404 Not Found"), None),
        (serving(b"", "503 Away"), "HTTP Error 503: Away"),
        (serving(b"x" * 5000), "more than 0 MiB"),
        (lambda client: client.sendall(client.recv(4096) and b"\x1b[2J\n" * 9), "BadStatusLine"),
    ],
)
def test_what_a_web_server_answers(answer, expected, monkeypatch):
    monkeypatch.setattr(remote, "LARGEST", 4096)
    # of this machine, for others
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1/")
    with server(answer) as port:
        url = f"http://127.0.0.1:{port}/"
        if not isinstance(expected, str):
            assert remote.fetch(url) == expected
            return
        with pytest.raises(InfrastructureError, match=expected) as raised:
            remote.fetch(url)
        assert str(raised.value).isprintable()


def test_a_stop_ends_what_runs_and_nothing_more_is_begun(tmp_path):
    stop, connected = Stop(), threading.Event()

    def silent(client: socket.socket) -> None:
        connected.set()
        client.recv(1)
        threading.Event().wait(20)

    def end() -> None:
        connected.wait()
        stop.now()

    with server(silent) as port:
        made = mirror(tmp_path, f"rsync://127.0.0.1:{port}/released/", stop)
        threading.Thread(target=end).start()
        start = time.monotonic()
        with pytest.raises(Aborted):
            made.look()
        with pytest.raises(Aborted):
            made.served("current")
        assert time.monotonic() - start < 5


def test_a_switch_is_not_stopped_and_none_is_begun_after_a_stop():
    stop = Stop()
    with stop.shielded() as held:
        assert held
        stop.now()
        stop.check()
    with pytest.raises(Aborted):
        stop.check()
    with stop.shielded() as held:
        assert not held
