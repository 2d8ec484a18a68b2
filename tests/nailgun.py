"""What stands in for Nailgun, the REST interface of Fuel 6.1 to 8.0, at the process boundary; the real server is in no test.

It does what is known of the real one, seen at 7.0 and 8.0: it also takes what it cannot use.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rest
from debian import deb822

from pkgci import web
from pkgci.errors import InfrastructureError

USER, PASSWORD, TOKEN = "admin", "secret", "f00d"
FIELDS = {"deb": {"type", "name", "uri", "suite", "section", "priority"}, "rpm": {"type", "name", "uri", "priority"}}


def deb(name: str, priority: int | None, suite: str = "trusty") -> dict[str, Any]:
    """Return an entry of Fuel's own."""
    entry = {"type": "deb", "name": name, "uri": f"http://127.0.0.1:9/{name}/", "suite": suite}
    return {**entry, "section": "main restricted", "priority": priority}


def rpm(name: str, priority: int | None) -> dict[str, Any]:
    """Return an entry of Fuel's own."""
    return {"type": "rpm", "name": name, "uri": f"http://127.0.0.1:9/{name}/", "priority": priority}


class Nailgun:
    """Repositories by the cluster's number: 1 is Ubuntu's, 2 is CentOS's. `written` are the bodies of what changed a cluster.

    `loses` are names of entries that it takes and forgets; `deployed` are clusters that are operational.
    """

    def __init__(self) -> None:
        self.repositories = {
            1: [deb("ubuntu", None), deb("mos", 1050), deb("mos-holdback", 1100), deb("Auxiliary", 1150)],
            2: [rpm("centos", None), rpm("mos", None), rpm("Auxiliary", 15)],
        }
        self.other = {"common": {"debug": {"value": False}}, "storage": {"volumes_ceph": {"value": False}}}
        self.deployed: set[int] = {1}
        self.auth_required = True
        self.loses: set[str] = set()
        self.written: list[Any] = []
        self.port = 0

    def answer(self, request: rest.Request) -> tuple[int, bytes]:
        """Answer a request."""
        path = request.path.replace("/api/v1/", "/api/", 1)
        if (request.verb, path) == ("GET", "/api/version"):
            return _said(200, {"release": "8.0", "auth_required": self.auth_required})
        if (request.verb, path) == ("POST", "/keystone/v2.0/tokens"):
            return self._log_in(json.loads(request.body))
        if self.auth_required and request.headers["X-Auth-Token"] != TOKEN:
            return 401, b""
        found = re.fullmatch(r"/api/clusters/([0-9]+)/(attributes|orchestrator/provisioning/defaults)/", path)
        if not found:
            return 404, b"404 Not Found"
        number = int(found[1])
        if number not in self.repositories:
            return _refused(404, "Cluster not found")
        if found[2] != "attributes":
            setup = {"repo_setup": {"repos": self.repositories[number]}}
            return _said(200, {"nodes": [{"uid": "1", "ks_meta": setup}]})
        if request.verb == "PUT":
            refused = self._write(number, request.body)
            if refused:
                return refused
        return _said(200, {"generated": {}, "editable": {**self.other, **self._setup(number)}})

    def _log_in(self, words: dict) -> tuple[int, bytes]:
        account = {"username": USER, "password": PASSWORD}
        if words != {"auth": {"tenantName": "admin", "passwordCredentials": account}}:
            error = {"code": 401, "title": "Unauthorized", "message": f"not the password: {words}"}
            return _said(401, {"error": error})
        return _said(200, {"access": {"token": {"id": TOKEN, "expires": "2030-01-01T00:00:00Z"}, "user": {}}})

    def _setup(self, number: int) -> dict:
        return {"repo_setup": {"repos": {"type": "custom_repo_configuration", "value": self.repositories[number]}}}

    def _write(self, number: int, body: bytes) -> tuple[int, bytes] | None:
        """Replace the list of a cluster's repositories, or say why not."""
        try:
            editable = json.loads(body)["editable"]
        except (ValueError, KeyError, TypeError):
            return _refused(400, "Invalid json message")
        if number in self.deployed and set(editable) != {"repo_setup"}:
            return _refused(403, "Environment attributes can't be changed after or during deployment.")
        value = editable["repo_setup"]["repos"]["value"]
        if not isinstance(value, list) or not value:
            return _refused(400, "Repositories must be a list that is not empty")
        # the first one, and no other
        if not isinstance(value[0], dict) or set(value[0]) != FIELDS.get(value[0].get("type")):
            return _refused(400, "Invalid repository")
        self.written.append(json.loads(body))
        self.repositories[number] = [one for one in value if one["name"] not in self.loses]
        return None

    def mirror(self, number: int) -> str:
        """Return the name of what a node of Ubuntu is installed from."""
        return next(one["name"] for one in self.repositories[number] if one["type"] == "deb")

    def pins(self, number: int) -> dict[str, tuple[str, int]]:
        """Return, as at deployment, what apt is told of DEB entries: `release o=...,l=...` and a priority, by name."""
        made = {}
        for one in self.repositories[number]:
            try:
                text = web.read(f"{one['uri']}dists/{one['suite']}/Release", upstream=False, largest=1 << 20)
            except InfrastructureError:
                # of which only its log speaks
                continue
            said = deb822.Release(text)
            made[one["name"]] = (f"release o={said['Origin']},l={said['Label']}", one["priority"])
        return made


def _said(status: int, words: object) -> tuple[int, bytes]:
    return status, json.dumps(words).encode()


def _refused(status: int, message: str) -> tuple[int, bytes]:
    return _said(status, {"message": message, "errors": []})


@contextmanager
def serving() -> Iterator[Nailgun]:
    """Serve on loopback."""
    nailgun = Nailgun()
    with rest.serving(nailgun.answer) as nailgun.port:
        yield nailgun
