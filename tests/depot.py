"""What stands in for the reference product's REST interface at the process boundary."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import rest


class Depot:
    """Repositories by name; `asked` are the requests, `loses` the names that it takes and forgets."""

    def __init__(self) -> None:
        mirror = {"name": "os", "type": "deb", "uri": "http://m/", "suite": "bookworm", "component": "main"}
        self.repositories = {"os": {**mirror, "priority": 500, "key": "K"}}
        self.asked: list[tuple[str, str]] = []
        self.loses: set[str] = set()
        self.port = 0

    def answer(self, request: rest.Request) -> tuple[int, bytes]:
        """Answer a request."""
        self.asked.append((request.verb, request.path))
        if (request.verb, request.path) == ("GET", "/repositories"):
            return _said(200, list(self.repositories.values()))
        name = request.path.removeprefix("/repositories/")
        if request.verb != "PUT" or name == request.path:
            return _said(404, {"message": "there is no such thing"})
        entry = {"name": name, **json.loads(request.body)}
        if set(entry) != set(self.repositories["os"]):
            return _said(400, {"message": f"{sorted(entry)} are not the fields of a repository"})
        status = 200 if name in self.repositories else 201
        if name not in self.loses:
            self.repositories[name] = entry
        return _said(status, entry)


def _said(status: int, words: object) -> tuple[int, bytes]:
    return status, json.dumps(words).encode()


@contextmanager
def serving() -> Iterator[Depot]:
    """Serve on loopback."""
    depot = Depot()
    with rest.serving(depot.answer) as depot.port:
        yield depot
