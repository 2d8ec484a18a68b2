"""The machine's way out: what the proxy serves, what it refuses, what it keeps. Real servers and sockets, no machine."""

import http.client
import logging
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pkgci.vm.proxy import Location, Proxy, RefusedError, Rule

DEB = b"a package" * 1000


class Upstream(ThreadingHTTPServer):
    """A web server that counts what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.elsewhere = ""
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: Upstream

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        leads = {
            "/debian/away.deb": f"{self.server.elsewhere}secret",
            "/debian/out.deb": "/private/secret",
            "/debian/near.deb": "/debian/pool/a.deb",
            "/debian/dots.deb": "/debian/../private/secret",
            "/debian/loop.deb": "/debian/loop.deb",
        }
        if self.path in leads:
            self.send_response(302)
            self.send_header("Location", leads[self.path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        gone = "gone" in self.path
        self.send_response(404 if gone else 200)
        # one that breaks off in the middle
        self.send_header("Content-Length", str(len(DEB) + ("short" in self.path)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(DEB)

    do_HEAD = do_GET  # noqa: N815 (the base's name)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Client:
    """What a guest can send: anything."""

    def __init__(self, proxy: Proxy, directory: Path) -> None:
        self.proxy = proxy
        self.directory = directory

    def send(self, request: str) -> tuple[int, bytes]:
        # by way of /proc, as the path may be longer than a socket's may be
        descriptor = os.open(self.directory, os.O_PATH)
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(10)
                connection.connect(f"/proc/self/fd/{descriptor}/proxy")
                connection.sendall(request.encode())
                answer = http.client.HTTPResponse(connection, method=request.split(maxsplit=1)[0])
                answer.begin()
                return answer.status, answer.read()
        finally:
            os.close(descriptor)

    def get(self, url: str, method: str = "GET") -> tuple[int, bytes]:
        return self.send(f"{method} {url} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")


@pytest.fixture
def client(upstream: Upstream, tmp_path: Path) -> Iterator[Client]:
    (tmp_path / "run").mkdir()
    rules = [Rule(f"{upstream.url}debian/", immutable=True), Rule(f"{upstream.url}test/run/")]
    proxy = Proxy(rules, tmp_path / "cache")
    with proxy.listening(tmp_path / "run"):
        yield Client(proxy, tmp_path / "run")


@pytest.mark.parametrize("path", ["debian/pool/a.deb", "test/run/b.deb", "debian/dists/x/InRelease", "test/run/"])
def test_what_lies_below_a_prefix_is_fetched(client, upstream, path):
    assert client.get(upstream.url + path) == (200, DEB)


@pytest.mark.parametrize(
    "path",
    [
        "private/secret",
        "debian-security/a.deb",
        "debian",
        "debian/../private/secret",
        "debian/%2e%2e/private/secret",
        "debian/%2E./private/secret",
        "debian/..%2fprivate/secret",
        "debian/%252e%252e/private/secret",
        "debian/..\\private",
        "debian/a.deb?x=1",
        "debian/a.deb#x",
        "debian/%00",
        "debian/%ff",
        "debian/./a.deb",
    ],
)
def test_no_spelling_of_a_path_leads_out_of_a_prefix(client, upstream, path):
    status, _ = client.get(upstream.url + path)
    assert (status, upstream.asked) == (403, [])


@pytest.mark.parametrize(
    "url",
    [
        "http://user@{host}/debian/a.deb",
        "http://{host}@example.org/debian/a.deb",
        "https://{host}/debian/a.deb",
        "ftp://{host}/debian/a.deb",
        "file:///etc/passwd",
        "/debian/a.deb",
        "*",
        "{host}",
        "http:///debian/a.deb",
        "http://127.0.0.1:1/debian/a.deb",
        "http://localhost:99999999/debian/a.deb",
        "http://[::1/debian/a.deb",
    ],
)
def test_no_other_host_port_scheme_or_user_is_reached(client, upstream, url):
    status, _ = client.get(url.format(host=upstream.url[7:-1]))
    assert (status, upstream.asked) == (403, [])


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"])
def test_other_methods_are_refused(client, upstream, method):
    assert client.get(f"{upstream.url}debian/pool/a.deb", method)[0] == 403
    assert upstream.asked == []


def test_connect_is_refused(client, upstream):
    host = upstream.url[7:-1]
    assert client.send(f"CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n\r\n")[0] == 403


def test_a_request_with_a_body_is_refused(client, upstream):
    url = f"{upstream.url}debian/pool/a.deb"
    assert client.send(f"GET {url} HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")[0] == 403


@pytest.mark.parametrize("name", ["away", "out", "dots", "loop"])
def test_a_redirect_to_elsewhere_or_without_end_is_refused(client, upstream, name):
    upstream.elsewhere = "http://127.0.0.2:1/"
    assert client.get(f"{upstream.url}debian/{name}.deb")[0] == 403
    assert "/private/secret" not in upstream.asked


def test_a_redirect_within_the_prefixes_is_followed(client, upstream):
    assert client.get(f"{upstream.url}debian/near.deb") == (200, DEB)


def test_each_refusal_is_logged_with_its_reason(client, upstream, caplog):
    with caplog.at_level(logging.WARNING):
        client.get(f"{upstream.url}private/x")
    assert "private/x" in caplog.text
    assert "not below an allowed prefix" in caplog.text


def test_a_package_of_the_upstream_is_fetched_once(client, upstream):
    for _ in range(2):
        assert client.get(f"{upstream.url}debian/pool/a.deb") == (200, DEB)
    assert upstream.asked == ["/debian/pool/a.deb"]


@pytest.mark.parametrize("path", ["test/run/a.deb", "debian/dists/x/InRelease"])
def test_test_repositories_and_what_may_change_are_never_kept(client, upstream, path):
    for _ in range(2):
        client.get(upstream.url + path)
    assert upstream.asked == [f"/{path}"] * 2
    assert [file for file in client.proxy.cache.rglob("*") if file.is_file()] == []


def test_what_breaks_off_or_is_gone_is_not_kept(client, upstream):
    with pytest.raises(http.client.IncompleteRead):
        client.get(f"{upstream.url}debian/pool/short.deb")
    assert client.get(f"{upstream.url}debian/pool/gone.deb")[0] == 404
    assert [file for file in client.proxy.cache.rglob("*") if file.is_file()] == []


def test_a_head_request_has_the_size_and_no_body(client, upstream):
    assert client.get(f"{upstream.url}debian/pool/a.deb", "HEAD") == (200, b"")


def test_a_server_that_does_not_answer_is_a_bad_gateway(client):
    client.proxy.rules = (Rule("http://127.0.0.1:1/"),)
    assert client.get("http://127.0.0.1:1/x")[0] == 502


def test_an_https_prefix_is_asked_for_by_http_and_fetched_by_https():
    rule = Rule("https://mirror.example.org/debian/", immutable=True)
    found = rule.match(Location.parse("http://mirror.example.org/debian/a%2bb.deb"))
    assert found is not None
    assert found.url == "https://mirror.example.org:443/debian/a%2Bb.deb"


def test_a_location_has_one_spelling():
    assert Location.parse("HTTP://Example.ORG/a%2bb") == Location.parse("http://example.org:80/a+b")
    with pytest.raises(RefusedError):
        Location.parse("http://exämple.org/")
