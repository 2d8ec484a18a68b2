"""A fake of Jenkins' REST interface on loopback, for what a real server does not do on demand: answers that are lost or cut
off, a queue that is forgotten. tests/live/ runs the same engine on a real one.
"""

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, parse_qsl, unquote, urlsplit

from pkgci.config import Config
from pkgci.engines.jenkins import JenkinsEngine

JOB = "run-build"
TOKEN = "a-secret-token"
MANAGED = "Template: jobs/templates/run.yaml\n<!-- Managed by Jenkins Job Builder -->"
NEWEST = 100
PARAMETERS = {"PARENT": "", "CORRELATION": "", "COMMAND": "true", "FAST": True}


class Build:
    """A build, or a place in the queue for as long as it has no number."""

    def __init__(self, item: int, values: dict[str, str]) -> None:
        self.item, self.values = item, values
        self.number: int | None = None
        self.cancelled = False
        self.result: str | None = None
        self.description: str | None = None
        self.log = b""
        self.artifacts: dict[str, bytes] = {}

    @property
    def actions(self) -> list[dict]:
        """What the server says of its parameters."""
        return [{}, {"parameters": [{"name": name, "value": value} for name, value in self.values.items()]}]


class Jenkins(ThreadingHTTPServer):
    """The server, with one job. `faults` takes a fault for each of the next requests whose path has a word in it.

    A fault is `lost` (done, and not answered), `away` (503, not done), `missing` (404), `forbidden` (403), or a number: the
    answer is cut off after so many bytes of its content.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.queue: list[Build] = []
        self.builds: list[Build] = []
        self.items: dict[int, Build] = {}
        self.faults: list[tuple[str, str | int]] = []
        self.asked: list[str] = []
        self.description = MANAGED
        self.ready = True
        # of one label: the names of its nodes, each with whether it is on line; the server itself has an empty one
        self.nodes: dict[str, bool] = {}
        self.crumb: str | None = None
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def begin(self) -> Build:
        """Let the oldest build of the queue begin."""
        build = self.queue.pop(0)
        build.number = len(self.builds) + 1
        self.builds.append(build)
        return build

    def restart(self, keeps: bool = False) -> None:
        """Forget the queue, or keep it under other numbers."""
        self.items = {item + 100: build for item, build in self.items.items() if keeps and build.number is None}
        for item, build in self.items.items():
            build.item = item
        if not keeps:
            self.queue = []


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    server: Jenkins

    def log_message(self, *words: object) -> None:
        """Say nothing of each request."""

    def do_GET(self) -> None:
        """Answer a question."""
        self._answer(self._page)

    def do_POST(self) -> None:
        """Do what is asked for."""
        self._answer(self._done)

    def _answer(self, act: Callable[[str, dict], tuple[int, bytes, dict[str, str]]]) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(f"{self.command} {unquote(self.path)}")
        fault = next((one for one in self.server.faults if one[0] in unquote(self.path)), ("", ""))
        if fault[0]:
            self.server.faults.remove(fault)
        refused = {"away": 503, "missing": 404, "forbidden": 403}.get(fault[1] if self.server.ready else "away")
        if self.command == "POST" and self.server.crumb and self.headers.get("Crumb") != self.server.crumb:
            refused = 403
        given = {name: values[0] for name, values in parse_qs(parts.query).items()} | dict(
            parse_qsl(body.decode(), keep_blank_values=True)
        )
        status, data, headers = (refused, b"no", {}) if refused else act(unquote(parts.path), given)
        if fault[1] == "lost":
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if isinstance(fault[1], int) and not isinstance(fault[1], bool):
            data, self.close_connection = data[: fault[1]], True
        self.wfile.write(data)

    def _build(self, path: str) -> Build | None:
        number = re.match(rf"/job/{JOB}/([0-9]+)/", path)
        return next((one for one in self.server.builds if number and one.number == int(number[1])), None)

    def _page(self, path: str, given: dict) -> tuple[int, bytes, dict[str, str]]:
        build = self._build(path)
        if build and path.endswith("/progressiveText"):
            # a log that was cut short begins once more
            start = int(given["start"]) if int(given["start"]) <= len(build.log) else 0
            more = {} if build.result else {"X-More-Data": "true"}
            return 200, build.log[start:], {"X-Text-Size": str(len(build.log)), **more}
        if build and "/artifact/" in path:
            return 200, build.artifacts[path.partition("/artifact/")[2]], {}
        said = self._said(path, build)
        return (404, b"", {}) if said is None else (200, json.dumps(said).encode(), {})

    def _said(self, path: str, build: Build | None) -> dict | None:
        item = re.fullmatch(r"/queue/item/([0-9]+)/api/json", path)
        if item:
            found = self.server.items.get(int(item[1]))
            if found is None:
                return None
            said = {"cancelled": found.cancelled, "actions": found.actions}
            return said | ({"executable": {"number": found.number}} if found.number else {})
        if build:
            said = {"building": build.result is None, "result": build.result, "timestamp": 1_700_000_000_000}
            said |= {"duration": 2000, "description": build.description, "actions": build.actions, "builtOn": "one"}
            return said | {"artifacts": [{"relativePath": name} for name in build.artifacts]}
        pages: dict[str, Callable[[], dict | None]] = {
            "/api/json": lambda: {
                "nodeDescription": "n",
                "jobs": [{"name": JOB, "description": self.server.description}, {"name": "other", "description": None}],
            },
            f"/job/{JOB}/api/json": lambda: {
                "property": [{}, {"parameterDefinitions": [_definition(*one) for one in PARAMETERS.items()]}],
                "builds": [{"number": one.number, "actions": one.actions} for one in self.server.builds[-NEWEST:]],
            },
            "/crumbIssuer/api/json": lambda: (
                {"crumbRequestField": "Crumb", "crumb": self.server.crumb} if self.server.crumb else None
            ),
            "/queue/api/json": lambda: {
                "items": [{"id": one.item, "task": {"name": JOB}, "actions": one.actions} for one in self.server.queue]
            },
            "/label/systest/api/json": lambda: {"nodes": [{"nodeName": name} for name in self.server.nodes]},
            "/computer/api/json": lambda: {
                "computer": [
                    {"displayName": name or "Built-In Node", "offline": not online, "executors": []}
                    for name, online in self.server.nodes.items()
                ]
                + [
                    {
                        "displayName": "other",
                        "offline": False,
                        "executors": [{"currentExecutable": None}]
                        + [
                            {
                                "currentExecutable": {
                                    "number": one.number,
                                    "url": f"{self.server.url}job/{JOB}/{one.number}/",
                                    "actions": one.actions,
                                }
                            }
                            for one in self.server.builds
                            if one.result is None
                        ],
                    }
                ]
            },
        }
        return pages[path]() if path in pages else None

    def _done(self, path: str, given: dict) -> tuple[int, bytes, dict[str, str]]:
        build = self._build(path)
        if path == f"/job/{JOB}/buildWithParameters":
            new = Build(len(self.server.items) + 1, given)
            # equal requests are merged
            same = [one for one in self.server.queue if one.values == given]
            if not same:
                self.server.queue.append(new)
                self.server.items[new.item] = new
            return 201, b"", {"Location": f"{self.server.url}queue/item/{(same or [new])[0].item}/"}
        if path == "/queue/cancelItem":
            found = self.server.items.get(int(given["id"]))
            if found in self.server.queue:
                self.server.queue.remove(found)
                found.cancelled = True
            return 204, b"", {}
        if build and path.endswith("/stop"):
            build.result = build.result or "ABORTED"
            return 302, b"", {"Location": "http://ci.invalid/"}
        if build and path.endswith("/submitDescription"):
            build.description = given["description"]
            return 302, b"", {"Location": "http://ci.invalid/"}
        return 404, b"", {}


def _definition(name: str, default: str | bool) -> dict:
    kind = "BooleanParameterDefinition" if isinstance(default, bool) else "StringParameterDefinition"
    return {"name": name, "type": kind, "defaultParameterValue": {"value": default}}


def configured(directory: Path, url: str, patience: int = 20) -> JenkinsEngine:
    """Return an engine on a server, with a configuration in `directory`."""
    configuration = directory / "jenkins-configuration"
    configuration.mkdir(exist_ok=True)
    (configuration / "token").write_text(f"{TOKEN}\n")
    (configuration / "config.yaml").write_text(
        f"paths: {{cache: {directory}/cache, state: {directory}/state, data: {directory}/data}}\n"
        f"jenkins: {{url: '{url}', user: pkgci, token_file: {configuration}/token, patience_seconds: {patience}}}\n"
    )
    return JenkinsEngine(Config(configuration))
