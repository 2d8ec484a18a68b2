"""Lets clients of Jenkins speak with Hudson 3.3.2: `hudson_shim.py PORT HUDSON_PORT`, on loopback.

Everything is passed on, but for what Jenkins has learnt since: a request for a build is answered by its place in the queue,
which says later which build it became; an element of a job's XML that Hudson cannot read at all is left out. A build is found
again by its parameter CORRELATION. Whoever asks while Hudson is away hears so, as from a proxy.
"""

import http.client
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from urllib.parse import parse_qsl, quote, unquote, urlsplit

# of one connection only, or written anew
HOP = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}
PARAMETERS = "actions[parameters[name,value]]"


class Shim(ThreadingHTTPServer):
    """The server, with the requests for builds that it has passed on: for each its job, correlation, and what is known."""

    daemon_threads = True

    def __init__(self, port: int, hudson_port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.hudson_port = hudson_port
        self.lock = threading.Lock()
        self.numbers = count(100_001)
        self.items: dict[int, dict] = {}


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    server: Shim

    def log_message(self, *words: object) -> None:
        """Say nothing of each request."""

    def do_GET(self) -> None:
        """Answer a question."""
        try:
            item = re.fullmatch(r"/queue/item/([0-9]+)/api/json", urlsplit(self.path).path)
            if item:
                return self._answer_item(int(item[1]))
            status, data, headers = self._pass_on("GET", self.path)
            if status == http.client.OK and urlsplit(self.path).path == "/queue/api/json":
                data = self._renumbered(data)
            self._say(status, data, headers)
        except OSError:
            self._away()

    def do_POST(self) -> None:
        """Do what is asked for."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        try:
            build = re.fullmatch(r"/job/([^/]+)/buildWithParameters", parts.path)
            if build:
                return self._build(unquote(build[1]), body)
            if parts.path == "/queue/cancelItem":
                return self._cancel(int(dict(parse_qsl(parts.query))["id"]))
            if parts.path.endswith(("/createItem", "/config.xml")):
                # by either all of the XML would be refused: a static field there, and a time that the server chooses
                body = re.sub(rb"\s*<allowEmptyArchive>[^<]*</allowEmptyArchive>", b"", body)
                body = re.sub(
                    rb"<hudson.triggers.TimerTrigger>.*?</hudson.triggers.TimerTrigger>", b"", body, flags=re.DOTALL
                )
                # of a plugin: the name alone is kept; see `Hudson.obey_nodes`
                body = re.sub(
                    rb"org\.jvnet\.jenkins\.plugins\.nodelabelparameter\.LabelParameterDefinition",
                    b"hudson.model.StringParameterDefinition",
                    body,
                )
                body = re.sub(
                    rb"\s*<(allNodesMatchingLabel|triggerIfResult)>[^<]*</\1>|\s*<nodeEligibility [^>]*/>", b"", body
                )
            self._say(*self._pass_on("POST", self.path, body))
        except OSError:
            self._away()

    def _build(self, job: str, body: bytes) -> None:
        status, data, headers = self._pass_on("POST", self.path, body)
        if status >= http.client.BAD_REQUEST:
            return self._say(status, data, headers)
        with self.server.lock:
            number = next(self.server.numbers)
            self.server.items[number] = {"job": job, "correlation": dict(parse_qsl(body.decode()))["CORRELATION"]}
        self._say(201, b"", [("Location", f"http://{self.headers['Host']}/queue/item/{number}/")])

    def _answer_item(self, number: int) -> None:
        item = self.server.items.get(number)
        if item is None:
            return self._say(404, b"", [])
        said: dict = {"id": number, "cancelled": item.get("cancelled", False)}
        said["actions"] = [{"parameters": [{"name": "CORRELATION", "value": item["correlation"]}]}]
        if self._queued(item) is None and (build := self._number(item)):
            said["executable"] = {"number": build}
        self._say(200, json.dumps(said).encode(), [("Content-Type", "application/json")])

    def _renumbered(self, data: bytes) -> bytes:
        """Return what Hudson says of its queue with the numbers that were given out here."""
        said = json.loads(data)
        given = {item["correlation"]: number for number, item in self.server.items.items()}
        for one in said["items"]:
            one["id"] = given.get(_correlation(one), one.get("id"))
        return json.dumps(said).encode()

    def _cancel(self, number: int) -> None:
        item = self.server.items.get(number)
        queued = (self._queued(item) if item else None) or number
        status, data, headers = self._pass_on("POST", f"/queue/item/{queued}/cancelQueue", b"")
        if item:
            item["cancelled"] = status < http.client.BAD_REQUEST
        self._say(status, data, headers)

    def _queued(self, item: dict) -> int | None:
        """Return Hudson's own number of an item of the queue, None when it has left it."""
        said = self._json(f"/queue/api/json?tree=items[id,task[name],{PARAMETERS}]")
        return next((one["id"] for one in said["items"] if _correlation(one) == item["correlation"]), None)

    def _number(self, item: dict) -> int | None:
        """Return the number of the build that an item has become."""
        if "number" not in item:
            said = self._json(f"/job/{quote(item['job'])}/api/json?tree=builds[number,{PARAMETERS}]")
            found = [one["number"] for one in said["builds"] if _correlation(one) == item["correlation"]]
            if not found:
                return None
            item["number"] = found[0]
        return item["number"]

    def _json(self, path: str) -> dict:
        status, data, _ = self._pass_on("GET", path)
        if status != http.client.OK:
            raise ConnectionError(f"{path}: HTTP status {status}")
        return json.loads(data)

    def _pass_on(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes, list[tuple[str, str]]]:
        """Return Hudson's answer: status, content, headers."""
        headers = {name: value for name, value in self.headers.items() if name.lower() not in {*HOP, "accept-encoding"}}
        if method == "POST" and not body:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        connection = http.client.HTTPConnection("127.0.0.1", self.server.hudson_port, timeout=120)
        try:
            connection.request(method, path, body, {**headers, "Host": self.headers["Host"]})
            answer = connection.getresponse()
            data = answer.read()
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()
        said = [(name, value) for name, value in answer.getheaders() if name.lower() not in HOP]
        said += [("X-Jenkins", value) for name, value in said if name.lower() == "x-hudson"]
        return answer.status, data, said

    def _away(self) -> None:
        # a server that was restarted numbers its queue anew
        self.server.items.clear()
        self._say(503, b"Hudson is away", [])

    def _say(self, status: int, data: bytes, headers: list[tuple[str, str]]) -> None:
        self.send_response(status)
        for name, value in [*headers, ("Content-Length", str(len(data)))]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _correlation(said: dict) -> str | None:
    """Return the correlation in what Hudson says of a build or an item of the queue."""
    parameters = [one for action in said.get("actions") or () if action for one in action.get("parameters") or ()]
    return next((one["value"] for one in parameters if one["name"] == "CORRELATION"), None)


if __name__ == "__main__":
    Shim(int(sys.argv[1]), int(sys.argv[2])).serve_forever()
