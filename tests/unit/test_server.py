"""The embedded HTTP server: what clients of repositories need, nothing outside of the root, one port for all processes."""

import http.client
import multiprocessing
import os
import signal
import socket
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import trees

from pkgci import server
from pkgci.config import Config
from pkgci.errors import InfrastructureError, RequestError

FORK = multiprocessing.get_context("fork")
CONTENT = bytes(range(256)) * 8


@pytest.fixture
def port() -> int:
    return trees.free_port()


def configured(directory: Path, port: int, host: str = "127.0.0.1", serve: str = "true") -> Config:
    directory.mkdir(exist_ok=True)
    (directory / "config.yaml").write_text(
        f"url: http://{host}:{port}/\nserve: {serve}\npaths: {{data: {directory / 'data'}}}\n"
    )
    return Config(directory)


@pytest.fixture
def config(tmp_path: Path, port: int) -> Config:
    config = configured(tmp_path / "etc", port)
    repository = config.data / "repositories" / "test" / "run" / "target"
    repository.mkdir(parents=True)
    (repository / "file.bin").write_bytes(CONTENT)
    os.utime(repository / "file.bin", (1000000000.75, 1000000000.75))
    (repository / "hello+1~2 3").write_bytes(b"odd")
    (repository / ".target.new").mkdir()
    (repository / ".target.new" / "secret").write_bytes(b"secret")
    (config.data / "secret").write_bytes(b"secret")
    (repository / "outside").symlink_to(config.data / "secret")
    (repository / "inside").symlink_to("file.bin")
    return config


FILE = "/test/run/target/file.bin"


def request(port: int, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def test_a_file_is_served_with_its_length_and_time_in_whole_seconds(config, port):
    with server.serve(config):
        response, body = request(port, FILE)
    assert (response.status, body) == (200, CONTENT)
    assert response.headers["Last-Modified"] == "Sun, 09 Sep 2001 01:46:40 GMT"
    assert response.headers["Content-Length"] == str(len(CONTENT))


def test_head_has_the_headers_and_no_body(config, port):
    with server.serve(config):
        response, body = request(port, FILE, "HEAD")
    assert (response.status, body, response.headers["Content-Length"]) == (200, b"", str(len(CONTENT)))


@pytest.mark.parametrize(
    ("since", "status"),
    [
        ("Sun, 09 Sep 2001 01:46:40 GMT", 304),
        ("Sun, 09 Sep 2001 01:46:39 GMT", 200),
        ("never", 200),
    ],
)
def test_what_did_not_change_since_is_not_sent(config, port, since, status):
    with server.serve(config):
        assert request(port, FILE, If_Modified_Since=since)[0].status == status


@pytest.mark.parametrize(
    ("asked", "status", "part"),
    [
        ("bytes=0-9", 206, CONTENT[:10]),
        ("bytes=2000-", 206, CONTENT[2000:]),
        ("bytes=-5", 206, CONTENT[-5:]),
        ("bytes=2040-9999", 206, CONTENT[2040:]),
        ("bytes=2048-", 416, b""),
        ("bytes=9-3", 416, b""),
        ("bytes=-", 200, CONTENT),
        ("lines=1-2", 200, CONTENT),
    ],
)
def test_a_range_of_bytes_can_be_asked_for(config, port, asked, status, part):
    with server.serve(config):
        response, body = request(port, FILE, Range=asked)
    assert (response.status, body) == (status, part)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (f"GET {FILE} HTTP/1.1\r\nRange: bytes={'9' * 5000}-", 416),
        (f"GET {FILE} HTTP/1.1\r\nRange: bytes=-{'9' * 5000}", 416),
        ("GET http://[bad/ HTTP/1.1", 400),
        ("GET /circle HTTP/1.1", 404),
    ],
)
def test_an_odd_request_is_answered_without_a_traceback(config, port, capfd, line, status):
    (config.data / "repositories" / "circle").symlink_to("circle")
    with server.serve(config), socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(f"{line}\r\nConnection: close\r\n\r\n".encode())
        assert client.makefile("rb").readline().split()[1] == str(status).encode()
    assert "Traceback" not in capfd.readouterr().err


def test_a_client_that_goes_away_leaves_no_traceback(config, port, capfd):
    with (config.data / "repositories" / "large").open("wb") as stream:
        stream.truncate(64 << 20)
    with server.serve(config), socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"GET /large HTTP/1.1\r\n\r\n")
        client.recv(1)
        client.close()
    assert "Traceback" not in capfd.readouterr().err


def test_a_range_of_what_has_changed_since_is_sent_whole(config, port):
    with server.serve(config):
        same = request(port, FILE, Range="bytes=0-9", If_Range="Sun, 09 Sep 2001 01:46:40 GMT")
        changed = request(port, FILE, Range="bytes=0-9", If_Range="Sun, 09 Sep 2001 01:46:41 GMT")
    assert (same[0].status, changed[0].status, changed[1]) == (206, 200, CONTENT)


def test_odd_names_links_inside_and_a_proxys_form_of_a_request_work(config, port):
    with server.serve(config):
        assert request(port, "/test/run/target/hello+1~2%203")[1] == b"odd"
        assert request(port, "/test/run/target/inside")[1] == CONTENT
        assert request(port, f"http://127.0.0.1:{port}{FILE}")[1] == CONTENT


@pytest.mark.parametrize(
    "path",
    [
        "/../secret",
        "/%2e%2e/secret",
        "/test/run/target/../../../../secret",
        "//etc/passwd",
        "/test/run/target/outside",
        "/test/run/target/.target.new/secret",
        "/test/run/target/file.bin%00",
        "/none",
    ],
)
def test_nothing_outside_of_the_root_and_nothing_unfinished_is_served(config, port, path):
    with server.serve(config):
        response, body = request(port, path)
    assert response.status == 404
    assert b"secret\n" not in body


def test_other_methods_are_refused(config, port):
    with server.serve(config):
        assert request(port, FILE, "PUT")[0].status == 501


def test_a_directory_is_listed_for_persons(config, port):
    with server.serve(config):
        assert b"file.bin" in request(port, "/test/run/target/")[1]


def test_an_index_page_is_a_file_like_any_other(config, port):
    repository = config.data / "repositories" / "test" / "run" / "target"
    (repository / "index.html").symlink_to(config.data / "secret")
    with server.serve(config):
        response, body = request(port, "/test/run/target/")
        assert (response.status, b"secret" in body, b"file.bin" in body) == (200, False, True)
        assert request(port, "/test/run/target/index.html")[0].status == 404
        assert request(port, "/test/run/target")[0].headers["Location"] == "/test/run/target/"


def test_one_connection_serves_several_requests(config, port):
    with server.serve(config):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        for _ in range(3):
            connection.request("GET", FILE)
            assert connection.getresponse().read() == CONTENT
        connection.close()


def test_the_server_ends_at_once_with_a_connection_open_that_asks_for_nothing(config, port, monkeypatch):
    monkeypatch.setattr(server._Handler, "timeout", 3600)
    with server.serve(config):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", FILE)
        connection.getresponse().read()
    assert connection.sock.recv(1) == b""


def test_a_request_under_way_is_answered_in_full_when_the_server_ends(config, port):
    large = config.data / "repositories" / "large"
    with large.open("wb") as stream:
        stream.truncate(64 << 20)
    with ExitStack() as stack:
        stack.enter_context(server.serve(config))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/large")
        response = connection.getresponse()
        ending = threading.Thread(target=stack.pop_all().close)
        ending.start()
        assert len(response.read()) == 64 << 20
        ending.join(30)
        assert not ending.is_alive()


def _serve(config: Config, started) -> None:
    with server.serve(config):
        started.set()
        signal.pause()


def test_several_processes_serve_the_port_and_when_one_ends_the_others_go_on(config, port):
    started = [FORK.Event(), FORK.Event()]
    processes = [FORK.Process(target=_serve, args=(config, event)) for event in started]
    for process, event in zip(processes, started, strict=True):
        process.start()
        assert event.wait(10)
    try:
        with server.serve(config):
            assert [request(port, FILE)[0].status for _ in range(20)] == [200] * 20
        processes[0].kill()
        processes[0].join()
        assert [request(port, FILE)[0].status for _ in range(20)] == [200] * 20
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_connections_made_while_one_of_two_servers_ends_are_all_answered(config, port):
    with server.serve(config):
        for _ in range(5):
            with ExitStack() as stack:
                stack.enter_context(server.serve(config))
                connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=10) for _ in range(20)]
                for connection in connections:
                    connection.connect()
                ending = threading.Thread(target=stack.pop_all().close)
                ending.start()
                for connection in connections:
                    connection.request("GET", FILE, headers={"Connection": "close"})
                assert [connection.getresponse().read() for connection in connections] == [CONTENT] * 20
                ending.join(30)


def test_a_port_of_another_program_is_named_with_the_key_to_change(config, port):
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(InfrastructureError, match=rf"config.yaml: port {port} of .*change `url`"):
            server.serve(config).__enter__()


def test_a_server_of_another_data_directory_on_the_same_port_is_noticed(config, port, tmp_path):
    other = configured(tmp_path / "other", port)
    with server.serve(other), pytest.raises(InfrastructureError, match="another program serves it; change `url`"):
        server.serve(config).__enter__()


def test_an_address_that_is_not_loopback_is_refused(tmp_path, port):
    with pytest.raises(RequestError, match="not on loopback"):
        server.serve(configured(tmp_path / "etc", port, host="192.0.2.1")).__enter__()


def test_nothing_listens_where_a_web_server_does_it(tmp_path, port):
    with server.serve(configured(tmp_path / "etc", port, serve="false")), socket.socket() as client:
        assert client.connect_ex(("127.0.0.1", port)) != 0
