"""What stands in for Gerrit's REST interface at the process boundary; tests/live/ crosses it for real."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

USER, PASSWORD = "pkgci", "secret"


class Gerrit:
    """Changes by the commits of their patch sets, the comments on them, and their files; projects with their HEADs.

    `open` are the open changes, which are told a page at a time.
    """

    PAGE = 2

    def __init__(self) -> None:
        self.changes: dict[str, int] = {}
        self.open: list[dict] = []
        self.files: dict[str, dict] = {}
        self.projects: dict[str, str] = {}
        self.comments: list[tuple[int, dict]] = []
        self.url = ""

    def answer(self, path: str, words: dict | None) -> object | None:
        """Return what is answered to an authorized request; None for what does not exist."""
        parts = urlsplit(path)
        if words is None and parts.path == "/a/accounts/self":
            return {"_account_id": 1, "name": "Package CI"}
        if words is None and parts.path == "/a/changes/":
            asked = parse_qs(parts.query)
            (query,) = asked["q"]
            if query.startswith("status:open "):
                found = [one for one in self.open if f"project:{one['project']}" in re.findall(r"[^() ]+", query)]
                start = int(asked["S"][0])
                page = [dict(one) for one in found[start : start + self.PAGE]]
                if found[start + self.PAGE :]:
                    page[-1]["_more_changes"] = True
                return page
            commit = query.split()[0].removeprefix("commit:")
            return [{"_number": self.changes[commit]}] if commit in self.changes else []
        if words is None and parts.path == "/a/projects/":
            return {name: {"state": "ACTIVE"} for name in self.projects}
        if words is None and parts.path.startswith("/a/projects/") and parts.path.endswith("/HEAD"):
            return self.projects.get(unquote(parts.path.split("/")[3]))
        if words is None and parts.path.endswith("/files"):
            return self.files
        number, _, rest = parts.path.removeprefix("/a/changes/").partition("/")
        if words is not None and rest == "revisions/current/review" and int(number) in self._numbers():
            self.comments.append((int(number), words))
            return {}
        return None

    def _numbers(self) -> set[int]:
        return {*self.changes.values(), *(one["_number"] for one in self.open)}


@contextmanager
def serving() -> Iterator[Gerrit]:
    """Serve on loopback."""
    gerrit = Gerrit()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.respond(None)

        def do_POST(self) -> None:
            self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def respond(self, words: dict | None) -> None:
            known = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            said = None
            if self.headers["Authorization"] == f"Basic {known}":
                said = gerrit.answer(self.path, words)
                status = 404 if said is None else 200
            else:
                status = 401
            body = b"Not found\x1b[2J" if said is None else b")]}'\n" + json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        gerrit.url = f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield gerrit
        finally:
            server.shutdown()
            thread.join()
