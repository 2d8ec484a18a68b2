"""The reference product as its tests speak of it."""

import time
from collections.abc import Callable

import pytest
import requests

SECONDS = 60
DEPLOY_SECONDS = 300
BOOT_SECONDS = 300
# on a node there is no client but this; it knows the other one by its address only
ASK = r"""
perl -MIO::Socket::INET -e '
    $to = IO::Socket::INET->new(PeerAddr => $ARGV[0], PeerPort => 8081, Timeout => 20) or die "$@\n";
    print $to "GET / HTTP/1.0\r\n\r\n";
    print <$to>' "$1"
"""
VERSION = "dpkg-query -W -f '${Version}' \"$1\""


class Depot:
    """The product, by its REST interface; see `product/depot-master/bin/depot`."""

    def __init__(self, master, port: int) -> None:
        self.master = master
        self._url = f"http://127.0.0.1:{port}"

    def ask(self, method: str, path: str) -> object:
        answer = requests.request(method, self._url + path, timeout=SECONDS)
        assert answer.ok, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json()

    def state(self, name: str) -> dict[str, str]:
        """Return what the product says of a node; empty if it does not know it."""
        return next((node for node in self.ask("GET", "/nodes") if node["name"] == name), {})

    def deploy(self, *names: str) -> None:
        """Deploy nodes, both at once."""
        for name in names:
            self.ask("POST", f"/nodes/{name}/deploy")
        for name in names:
            until(lambda name=name: self.state(name)["state"] != "deploying", DEPLOY_SECONDS, f"{name} is deployed")
            assert self.state(name)["state"] == "deployed", self.state(name)["reason"]


def ask_node(node, asked: str) -> str:
    """Return what the service of a node says to another node, over the network that they share."""
    done = node.run(ASK, asked, timeout=SECONDS)
    assert done.status == 0, done.text()
    return done.text().splitlines()[-1]


def until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.5)


def version(node, package: str) -> str:
    """Return the version in which a package is installed on a machine."""
    done = node.run(VERSION, package)
    return done.text() if done.status == 0 else f"none ({done.text().strip()})"


@pytest.fixture(scope="session")
def depot(master):
    """The product."""
    with master.forward(8000) as port:
        yield Depot(master, port)


@pytest.fixture(scope="session")
def workers(env):
    """Its nodes, by name."""
    return {node.name: node for node in env.role("node")}
