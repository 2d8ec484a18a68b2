"""The embedded HTTP server of the repositories, on loopback: what apt and dnf need, and a listing for persons.

Each process that needs the repositories serves them by itself while it needs them. All of them listen on the one
configured port at once (`SO_REUSEPORT`, which the kernel grants to processes of one user): there is no daemon, and when
one ends the others go on. In production any web server does this instead (`serve: false`).
"""

import contextlib
import email.utils
import http.client
import ipaddress
import logging
import os
import re
import secrets
import select
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from pkgci.config import Config
from pkgci.errors import InfrastructureError, RequestError

log = logging.getLogger(__name__)

ID = ".id"
# new connections are spread over all listeners: so many make it unlikely that another one is not noticed
PROBES = 8
SECONDS = 10
# of a number in a request: more bytes than any file has
DIGITS = 18


@contextlib.contextmanager
def serve(config: Config) -> Iterator[None]:
    """Serve the repositories below the data directory at the configured URL, until the `with` ends.

    Requests that are under way then are answered in full. Nothing is done with `serve: false`.

    Raises:
        RequestError: the URL's host is not this machine's loopback.
        InfrastructureError: the port belongs to somebody else.
    """
    if not config.settings.serve:
        yield
        return
    host, port = _address(config)
    where = f"{config.directory / 'config.yaml'}: port {port} of {host}"
    root = config.data / "repositories"
    identity = _identity(root)
    server = _Server((host, port), root)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="repositories")
    with contextlib.ExitStack() as stack:
        stack.callback(server.server_close)
        try:
            server.server_bind()
            # bound and not yet listening: this reaches those that already serve the port
            if _probe(host, port) not in (None, identity):
                raise InfrastructureError(f"{where}: another program serves it; change `url` there")
            server.server_activate()
        except OSError as error:
            raise InfrastructureError(f"{where}: {error.strerror}; change `url` there, or stop what uses it") from error
        thread.start()
        stack.callback(server.drain)
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        # once more: another one may have started at the same time
        if any(_probe(host, port) != identity for _ in range(PROBES)):
            raise InfrastructureError(f"{where}: another program serves it too; change `url` there")
        yield


def _address(config: Config) -> tuple[str, int]:
    parts = urlsplit(config.settings.url)
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname or ""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return host, parts.port or 80
    raise RequestError(
        f"{config.directory / 'config.yaml'}: url: {config.settings.url} is not on loopback; "
        "only there it is served by pkgci itself: set `serve: false` and let a web server do it"
    )


def _identity(root: Path) -> bytes:
    """Return what tells this data directory from any other: the random content of its file `.id`."""
    path = root / ID
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        new = root / f"{ID}.{secrets.token_hex(8)}"
        new.write_text(secrets.token_hex(16))
        # of several processes at once the first one's stays
        with contextlib.suppress(FileExistsError):
            os.link(new, path)
        new.unlink()
    return path.read_bytes()


def _probe(host: str, port: int) -> bytes | None:
    """Return what is served as `.id`, empty when no such thing is, or None when nobody listens."""
    connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    try:
        connection.request("GET", f"/{ID}", headers={"Connection": "close"})
        return connection.getresponse().read(100)
    except ConnectionRefusedError:
        return None
    except (OSError, http.client.HTTPException):
        return b""
    finally:
        connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    allow_reuse_port = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], root: Path) -> None:
        self.root = root.resolve()
        self.closing = False
        self.answered: set[socket.socket] = set()
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler, bind_and_activate=False)

    def server_bind(self) -> None:
        # HTTPServer's own asks the resolver for a name that nobody needs
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def drain(self) -> None:
        """Prepare the end of a listener that no longer accepts connections."""
        # those that the kernel gave to it are lost when it is closed: they are taken first
        while select.select([self.socket], [], [], 0)[0]:
            request, address = self.get_request()
            self.process_request(request, address)
        self.closing = True
        for connection in list(self.answered):
            # who waits for a further request reads the end; who answers one goes on; a first one is waited for
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), OSError):
            return super().handle_error(request, client_address)
        # a client that went away
        return log.debug("a connection broke", exc_info=True)


class _Handler(SimpleHTTPRequestHandler):
    """GET and HEAD below the root (RFC 9110): conditional by time, and for one range of bytes."""

    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "pkgci"
    timeout = SECONDS

    def __init__(self, request, address, server: _Server) -> None:
        super().__init__(request, address, server, directory=os.fspath(server.root))

    def handle(self) -> None:
        self.close_connection = True
        self.handle_one_request()
        while not self.close_connection:
            self.server.answered.add(self.connection)
            if self.server.closing:
                break
            self.handle_one_request()

    def finish(self) -> None:
        self.server.answered.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        if self.path.startswith("http://"):
            # the form that a proxy's request line has
            try:
                self.path = urlsplit(self.path).path
            except ValueError:
                self.send_error(HTTPStatus.BAD_REQUEST)
                return
        path = self._below_root()
        if path is None:
            self.send_error(HTTPStatus.NOT_FOUND)
        elif path.is_dir():
            self._send_listing(path, body)
        else:
            try:
                with path.open("rb") as stream:
                    self._send(stream, body)
            except (FileNotFoundError, PermissionError):
                self.send_error(HTTPStatus.NOT_FOUND)

    def _below_root(self) -> Path | None:
        """Return what the request's path names, links followed, or None when that is not for the public."""
        try:
            asked = Path(self.translate_path(self.path))
            path = asked.resolve(strict=True)
            hidden = any(part.startswith(".") and part != ID for part in path.relative_to(self.server.root).parts)
        except (OSError, ValueError, RuntimeError):
            # RuntimeError: links that lead in a circle
            return None
        return None if hidden or not (path.is_dir() or path.is_file()) else path

    def _send_listing(self, path: Path, body: bool) -> None:
        """Answer with what is in a directory, always: an `index.html` in a repository is a file like any other."""
        asked = self.path.partition("?")[0]
        if not asked.endswith("/"):
            # the links of the listing are relative
            self.send_response(HTTPStatus.MOVED_PERMANENTLY)
            self.send_header("Location", f"{asked}/")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        listing = self.list_directory(path)
        if listing and body:
            self.copyfile(listing, self.wfile)

    def _send(self, stream: BinaryIO, body: bool) -> None:
        stat = os.fstat(stream.fileno())
        # whole seconds: the protocol has no others
        modified = int(stat.st_mtime)
        since = _seconds(self.headers["If-Modified-Since"])
        if since is not None and modified <= since and "If-None-Match" not in self.headers:
            self.send_response(HTTPStatus.NOT_MODIFIED)
            self.end_headers()
            return
        first, last = 0, stat.st_size - 1
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"] or "")
        partial = bool(wanted and any(wanted.groups()))
        if "If-Range" in self.headers and _seconds(self.headers["If-Range"]) != modified:
            partial = False
        if partial:
            start, end = wanted.groups()
            if max(len(start), len(end)) > DIGITS:
                self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                return
            first = int(start) if start else max(0, stat.st_size - int(end))
            last = min(int(end), last) if start and end else last
            if first > last:
                self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                self.send_header("Content-Range", f"bytes */{stat.st_size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(HTTPStatus.PARTIAL_CONTENT if partial else HTTPStatus.OK)
        if partial:
            self.send_header("Content-Range", f"bytes {first}-{last}/{stat.st_size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Type", self.guess_type(stream.name))
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Last-Modified", self.date_time_string(modified))
        self.end_headers()
        if body and last >= first:
            self.connection.sendfile(stream, first, last - first + 1)

    def log_message(self, format: str, *arguments: object) -> None:
        log.debug("%s %s", self.address_string(), format % arguments)


def _seconds(date: str | None) -> int | None:
    """Return the time stamp of an HTTP date, or None when it is none."""
    try:
        return int(email.utils.parsedate_to_datetime(date or "").timestamp())
    except (ValueError, TypeError, OverflowError):
        return None
