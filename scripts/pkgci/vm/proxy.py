"""The only way out of a machine: an HTTP proxy that fetches what lies below a few prefixes, and nothing else.

It listens on a Unix socket, which the machine's network leads to. GET and HEAD of absolute URIs only (RFC 9112, 3.2.2): no
CONNECT, no other method, no way around a prefix by dots, encodings, user names or redirects. What is immutable at the
upstream is kept in a cache on disk; what comes from a test repository never is, since other runs trust the cache.
"""

import hashlib
import logging
import os
import re
import socketserver
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import quote, unquote, urljoin, urlsplit

from pkgci import web
from pkgci.disk import replacing
from pkgci.lazy import Lazy

requests = Lazy("requests")
log = logging.getLogger(__name__)

URL = "http://10.0.2.100:3128"
IMMUTABLE = re.compile(r"\.deb$|/by-hash/[A-Za-z0-9]+/[0-9a-f]+$|/repodata/[0-9a-f]{64,}-[^/]+$")
SECONDS = 60
REDIRECTS = 5
CONNECTIONS = 64
LARGEST = 4 << 30
BLOCK = 1 << 16
ASKED = ("If-Modified-Since", "If-None-Match", "Range", "If-Range")
ANSWERED = ("Content-Type", "Content-Length", "Content-Range", "Accept-Ranges", "Last-Modified", "ETag")


class RefusedError(Exception):
    """A request that the proxy does not serve; its text says why."""


@dataclass(frozen=True)
class Location:
    """A URL of one spelling: path decoded, port explicit."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str) -> "Location":
        """Read an absolute http or https URL.

        Raises:
            RefusedError: it is something else, or its spelling could be read in two ways.
        """
        if not url.isascii() or re.search(r"[\x00-\x20\x7f\\]", url):
            raise RefusedError("forbidden characters")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise RefusedError("not a URL") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RefusedError("not an absolute http URL")
        if "@" in parts.netloc or "%" in parts.netloc:
            raise RefusedError("a user or an encoding in the host's name")
        if "?" in url or "#" in url:
            raise RefusedError("a query or a fragment")
        path = unquote(parts.path, errors="strict") if _is_utf8(parts.path) else ""
        if not path.startswith("/") or re.search(r"[\x00-\x1f\x7f\\]", path):
            raise RefusedError("forbidden characters in the path")
        if re.search("%2f", parts.path, re.IGNORECASE) or unquote(path) != path:
            raise RefusedError("an encoded slash or percent sign")
        if any(segment in (".", "..") for segment in path.split("/")):
            raise RefusedError("dot segments in the path")
        return cls(parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80), path)

    @property
    def url(self) -> str:
        """The URL, as it is sent on."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{quote(self.path)}"


@dataclass(frozen=True)
class Rule:
    """What may be fetched: all below `prefix`, an http or https URL that ends with a slash.

    A guest asks for an https prefix by http, so that nothing passes here unseen; the proxy goes on by https.
    `immutable` says that what lies below it comes from a repository that all runs trust, and that packages (of Debian, where
    none is ever signed anew) and indexes that are named by their checksums never change: these are cached.
    """

    prefix: str
    immutable: bool = False

    def match(self, wanted: Location) -> Location | None:
        """Return where `wanted` is to be fetched, or None if it is not below the prefix."""
        ours = Location.parse(self.prefix)
        if wanted.scheme == "http" and ours.scheme == "https" and wanted.port == 80:
            wanted = Location("https", wanted.host, ours.port, wanted.path)
        same = (wanted.scheme, wanted.host, wanted.port) == (ours.scheme, ours.host, ours.port)
        return wanted if same and wanted.path.startswith(ours.path) else None


def allowed(rules: Iterable[Rule], url: str) -> tuple[Location, Rule]:
    """Return where `url` is to be fetched, and under which of the rules: the first that matches.

    Raises:
        RefusedError: under none.
    """
    wanted = Location.parse(url)
    for rule in rules:
        location = rule.match(wanted)
        if location:
            return location, rule
    raise RefusedError("not below an allowed prefix")


class Proxy:
    """The proxy of one run.

    Args:
        rules: what may be fetched; the first that matches counts.
        cache: a directory for what is immutable, shared by all processes of one user.
    """

    def __init__(self, rules: Iterable[Rule], cache: Path) -> None:
        self.rules = tuple(rules)
        self.cache = cache

    @contextmanager
    def listening(self, directory: Path) -> Iterator[None]:
        """Serve on the Unix socket `proxy` in `directory` while the context lasts."""
        self.cache.mkdir(parents=True, exist_ok=True)
        # by way of a descriptor: the path of a socket may not have more than 107 bytes
        descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        try:
            with _Server(f"/proc/self/fd/{descriptor}/proxy", self) as server:
                thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
                thread.start()
                try:
                    yield
                finally:
                    server.shutdown()
                    thread.join()
        finally:
            os.close(descriptor)

    def fetch(self, url: str, method: str, headers: Mapping[str, str]) -> "tuple[requests.Response, Rule]":
        """Ask for `url` and follow its redirects, each under the same rules.

        Returns:
            The answer, its body not yet read, and the rule that it was last fetched under.

        Raises:
            RefusedError: the URL or a redirect leads elsewhere.
            requests.RequestException: the server does not answer.
        """
        for _ in range(REDIRECTS):
            location, rule = allowed(self.rules, url)
            session = web.session(location.url, upstream=rule.immutable)
            # packages are fetched as they are: no coding of the transfer may hide their size
            session.headers.clear()
            session.headers.update({"Accept-Encoding": "identity", **headers})
            answer = session.request(method, location.url, stream=True, allow_redirects=False, timeout=SECONDS)
            if not answer.is_redirect:
                return answer, rule
            url = urljoin(location.url, answer.headers["Location"])
            answer.close()
        raise RefusedError("too many redirects")


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = CONNECTIONS

    def __init__(self, path: str, proxy: Proxy) -> None:
        self.proxy = proxy
        self.free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(path, _Handler)

    def process_request(self, request: object, client_address: object) -> None:
        # a guest that opens more than a client ever does is left to wait
        self.free.acquire()
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def process_request_thread(self, request: object, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self.free.release()

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002 (the base's signature)
        log.debug("proxy: a connection broke", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 600
    server: _Server

    def address_string(self) -> str:
        return "guest"

    def log_message(self, format: str, *arguments: object) -> None:
        log.debug("proxy: " + format, *arguments)

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if self.command not in ("GET", "HEAD"):
            self._refuse(f"method {self.command}")
            return False
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            self._refuse("a request with a body")
            return False
        return True

    def do_GET(self) -> None:
        proxy = self.server.proxy
        try:
            location, rule = allowed(proxy.rules, self.path)
            kept = self._kept(location) if rule.immutable and IMMUTABLE.search(location.path) else None
            if kept and self._send_kept(kept):
                return
            asked = {name: self.headers[name] for name in ASKED if name in self.headers}
            answer, last = proxy.fetch(self.path, self.command, asked)
        except RefusedError as refusal:
            self._refuse(str(refusal))
            return
        except requests.RequestException as error:
            log.warning("proxy: %s: %s", self.path, error)
            self.send_error(502, "cannot fetch from the server")
            return
        with answer:
            whole = self.command == "GET" and answer.status_code == 200 and last.immutable
            self._send(answer, kept if whole else None)

    do_HEAD = do_GET  # noqa: N815 (the base's name)

    def _refuse(self, reason: str) -> None:
        log.warning("proxy refuses %s %.300r: %s", self.command, self.path, reason)
        self.close_connection = True
        self.send_error(403, "not allowed from this machine")

    def _kept(self, location: Location) -> Path:
        digest = hashlib.sha256(location.url.encode()).hexdigest()
        return self.server.proxy.cache / digest[:2] / digest

    def _send_kept(self, kept: Path) -> bool:
        try:
            stream = kept.open("rb")
        except FileNotFoundError:
            return False
        with stream:
            os.utime(kept)
            self.send_response(200)
            self.send_header("Content-Length", str(os.fstat(stream.fileno()).st_size))
            self.end_headers()
            if self.command == "GET":
                while block := stream.read(BLOCK):
                    self.wfile.write(block)
        return True

    def _send(self, answer: "requests.Response", kept: Path | None) -> None:
        length = answer.headers.get("Content-Length")
        size = int(length) if length and length.isdigit() else None
        if size is not None and size > LARGEST:
            self._refuse(f"{size} bytes are too much")
            return
        self.send_response(answer.status_code)
        for name in ANSWERED:
            if name in answer.headers:
                self.send_header(name, answer.headers[name])
        if size is None and self.command == "GET" and answer.status_code not in (204, 304):
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command == "HEAD" or answer.status_code in (204, 304):
            return
        sent, held = 0, b""
        try:
            with replacing(kept) if kept and size is not None else nullcontext() as copy:
                for block in answer.raw.stream(BLOCK, decode_content=False):
                    sent += len(block)
                    if sent > LARGEST:
                        raise requests.ConnectionError("larger than allowed")
                    self.wfile.write(held)
                    held = block
                    if copy:
                        copy.write(block)
                if size is not None and sent != size:
                    raise requests.ConnectionError(f"{sent} bytes instead of {size}")
            # the end comes once it is kept: whoever has it all and asks again finds it
            self.wfile.write(held)
        except (requests.RequestException, OSError) as error:
            # the header is out: only a cut connection tells the guest
            log.warning("proxy: %s: %s", self.path, error)
            self.close_connection = True


def _is_utf8(path: str) -> bool:
    try:
        unquote(path, errors="strict")
    except UnicodeDecodeError:
        return False
    return True
