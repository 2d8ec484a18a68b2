"""Repositories added to products through their interfaces: real requests, to servers that do as those products do."""

import json
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

import depot
import nailgun
import pytest
import rest
from pydantic import ValidationError

from pkgci.artifacts import Repository, RepositoryPackage
from pkgci.config import Cluster, Node
from pkgci.errors import InfrastructureError, PkgciError, RequestError
from pkgci.formats import apt
from pkgci.products import add_repositories, base

HELLO = RepositoryPackage(
    name="hello",
    version="1",
    architecture="all",
    kind="binary",
    file="pool/h.deb",
    sha256="0" * 64,
    source="hello",
    key="k",
)
OTHER = HELLO.model_copy(update={"name": "other"})


class Repositories:
    """Repositories on loopback, of which only the `Release` is asked for; `releases` has it by path."""

    def __init__(self) -> None:
        self.releases: dict[str, bytes] = {}
        self.port = 0

    def answer(self, request: rest.Request) -> tuple[int, bytes]:
        """Answer a request."""
        said = self.releases.get(request.path)
        return (404, b"") if said is None else (200, said)

    def made(self, label: str, packages: tuple[RepositoryPackage, ...] = (), **other: object) -> Repository:
        """Return one whose `Release` is written as those of test repositories are."""
        self.releases[f"/{label}/dists/bookworm/Release"] = apt.release(
            "bookworm", ["amd64"], label, datetime.now(UTC), []
        )
        about = {"url": f"http://127.0.0.1:{self.port}/{label}/", "format": "deb", "codename": "bookworm", **other}
        return Repository(**about, target="bookworm-amd64", packages=packages, signing_key="A KEY\n")

    def three(self, **other: object) -> dict[str, Repository]:
        """Return a released one, another one, and one with the package under test, by their names."""
        released = self.made("pkgci-rocket-2", released=True, **other)
        return {
            "pkgci-0": released,
            "pkgci-1": self.made("pkgci-test-1", (OTHER,), **other),
            "pkgci-2": self.made("pkgci-test-2", (HELLO,), **other),
        }


@pytest.fixture
def repositories() -> Iterator[Repositories]:
    made = Repositories()
    with rest.serving(made.answer) as made.port:
        yield made


@pytest.fixture
def product() -> Iterator[depot.Depot]:
    with depot.serving() as made:
        yield made


@pytest.fixture
def fuel() -> Iterator[nailgun.Nailgun]:
    with nailgun.serving() as made:
        yield made


@pytest.fixture
def login(tmp_path: Path) -> Callable[..., Cluster]:
    def make(**other: object) -> Cluster:
        (tmp_path / "password").write_text(f"{nailgun.PASSWORD}\n")
        account = {"user": nailgun.USER, "password_file": str(tmp_path / "password")}
        return Cluster(**{"driver": "nailgun", **account, **other})

    return make


def add(cluster: Cluster, port: int, repositories: dict[str, Repository]) -> None:
    asked = []

    def reach(wanted: int):
        asked.append(wanted)
        return nullcontext(port)

    add_repositories(cluster, reach, repositories, [HELLO])
    assert asked == [cluster.port]


def refused(error: type[PkgciError], cluster: Cluster, port: int, repositories: dict[str, Repository]) -> str:
    with pytest.raises(error) as caught:
        add(cluster, port, repositories)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def priorities(listed: list[dict]) -> dict[str, int]:
    return {one["name"]: one["priority"] for one in listed if one["name"].startswith("pkgci-")}


DEPOT = Cluster(driver="depot", port=8080)


def test_depot_has_what_is_under_test_before_what_is_released_before_all_else(product, repositories):
    product.repositories["plugin"] = {**product.repositories["os"], "name": "plugin", "priority": 1200}
    add(DEPOT, product.port, repositories.three())
    assert priorities([*product.repositories.values()]) == {"pkgci-0": 1201, "pkgci-1": 1202, "pkgci-2": 1203}


def test_depot_is_told_where_a_repository_is_and_its_key(product, repositories):
    add(DEPOT, product.port, {"pkgci-0": (record := repositories.made("pkgci-test-1", (HELLO,)))})
    assert product.repositories["pkgci-0"] == {
        "name": "pkgci-0",
        "type": "deb",
        "uri": record.url,
        "suite": "bookworm",
        "component": "main",
        "priority": 1001,
        "key": "A KEY\n",
    }


def test_depot_is_told_of_rpm_repositories_alike(product, repositories):
    add(DEPOT, product.port, repositories.three(format="rpm"))
    assert product.repositories["pkgci-2"]["type"] == "rpm"
    assert priorities([*product.repositories.values()]) == {"pkgci-0": 1001, "pkgci-1": 1002, "pkgci-2": 1003}


def test_depot_keeps_what_others_added_and_is_not_asked_twice(product, repositories):
    before = dict(product.repositories)
    add(DEPOT, product.port, repositories.three())
    once = dict(product.repositories)
    assert {name: one for name, one in once.items() if name in before} == before
    product.asked.clear()
    add(DEPOT, product.port, repositories.three())
    assert product.repositories == once
    assert {verb for verb, _ in product.asked} == {"GET"}


def test_a_repository_that_depot_has_otherwise_is_written_anew(product, repositories):
    product.repositories["pkgci-0"] = {**product.repositories["os"], "name": "pkgci-0", "priority": 7}
    add(DEPOT, product.port, repositories.three())
    assert product.repositories["pkgci-0"]["priority"] == 1001


def test_a_repository_that_depot_takes_and_forgets_is_noticed(product, repositories):
    product.loses = {"pkgci-1"}
    message = refused(InfrastructureError, DEPOT, product.port, repositories.three())
    assert message == "depot, port 8080: pkgci-1 is not as it should be, though nothing was refused"


def test_what_depot_refuses_is_said_with_its_reason_on_one_line(repositories):
    def answer(request: rest.Request) -> tuple[int, bytes]:
        return (200, b"[]") if request.verb == "GET" else (409, b'{"message": "a node is\\n deployed\\u001b[2J"}')

    with rest.serving(answer) as port:
        message = refused(InfrastructureError, DEPOT, port, repositories.three())
    expected = "PUT /repositories/pkgci-2: HTTP status 409: a node is? deployed?[2J"
    assert message == f"depot, port 8080: {expected}"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"{", "GET /repositories: the answer is no JSON"),
        (b"[" * 100_000, "GET /repositories: the answer is no JSON"),
        (b"\xff", "GET /repositories: the answer is no JSON"),
        (b"{}", "GET /repositories: no list of repositories: the answer: Input should be a valid list"),
        (
            b"[1]",
            "GET /repositories: no list of repositories: 0: Input should be a valid dictionary or instance of Entry",
        ),
        (
            b'[{"name": "a", "type": "deb", "uri": "u", "priority": "high"}]',
            "GET /repositories: no list of repositories: 0.priority: Input should be a valid integer",
        ),
        (b'"' + b" " * (9 << 20) + b'"', "GET /repositories: the answer has more than 8 MiB"),
    ],
)
def test_an_answer_of_another_form_is_the_products_fault(repositories, said, message):
    with rest.serving(lambda _: (200, said)) as port:
        assert refused(InfrastructureError, DEPOT, port, repositories.three()) == f"depot, port 8080: {message}"


def test_a_redirect_is_not_followed(repositories):
    with rest.serving(lambda request: (200 if request.path == "/elsewhere" else 302, b"[]")) as port:
        message = refused(InfrastructureError, DEPOT, port, repositories.three())
    assert message == "depot, port 8080: GET /repositories: HTTP status 302: []"


@contextmanager
def speaking(speak: Callable[[socket.socket, threading.Event], None]) -> Iterator[int]:
    """Yield a port where each connection is spoken to by `speak`, until the event."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with server.accept()[0] as client:
                speak(client, ended)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            ended.set()
            thread.join()


def test_a_product_that_never_answers_is_waited_for_a_time_only(repositories, monkeypatch):
    monkeypatch.setattr(base, "SECONDS", 0.2)
    with speaking(lambda _, ended: ended.wait(30) and None) as port:
        message = refused(InfrastructureError, DEPOT, port, repositories.three())
    assert message == "depot, port 8080: GET /repositories: no answer within 0.2 s"


def test_an_answer_that_does_not_end_is_waited_for_a_time_only(repositories, monkeypatch):
    monkeypatch.setattr(base, "SECONDS", 0.3)

    def drip(client: socket.socket, ended: threading.Event) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        # each piece comes in time
        while not ended.wait(0.05):
            client.sendall(b" ")

    with speaking(drip) as port:
        message = refused(InfrastructureError, DEPOT, port, repositories.three())
    assert message == "depot, port 8080: GET /repositories: the answer did not end within 0.3 s"


def test_an_answer_that_is_cut_is_no_answer(repositories):
    def cut(client: socket.socket, _: threading.Event) -> None:
        client.recv(1 << 16)
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n[]")

    with speaking(cut) as port:
        message = refused(InfrastructureError, DEPOT, port, repositories.three())
    assert message.startswith("depot, port 8080: GET /repositories: no answer: ")


def test_a_product_where_nobody_listens_does_not_answer(repositories):
    message = refused(InfrastructureError, DEPOT, 9, repositories.three())
    assert message == "depot, port 8080: GET /repositories: no answer: Connection refused"


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("..", {}, "'..' is no name"),
        ("a b", {}, "'a b' is no name"),
        ("a\n", {}, "'a?' is no name"),
        ("a", {"url": "http://m/ [trusted=yes]/"}, "'http://m/ [trusted=yes]/' is no url"),
        ("a", {"url": "file:///etc/"}, "'file:///etc/' is no url"),
        ("a", {"codename": "../x"}, "'../x' is no codename"),
        ("a", {"component": "main contrib"}, "'main contrib' is no component"),
    ],
)
def test_what_no_product_could_use_is_refused_before_it_is_asked(repositories, name, other, message):
    record = repositories.made("pkgci-test-1", (HELLO,)).model_copy(update=other)
    with pytest.raises(RequestError) as caught:
        add_repositories(DEPOT, lambda _: pytest.fail("asked"), {name: record}, [HELLO])
    assert f"{message} for a product's repository; it must match" in str(caught.value)


def test_the_driver_plain_asks_nobody(repositories):
    add_repositories(Cluster(), lambda _: pytest.fail("asked"), repositories.three(), [HELLO])


def test_nailgun_has_what_is_under_test_before_what_is_released_before_all_else(fuel, login, repositories):
    fuel.repositories[1].append(nailgun.deb("plugin", 1300))
    add(login(), fuel.port, repositories.three())
    assert priorities(fuel.repositories[1]) == {"pkgci-0": 1301, "pkgci-1": 1302, "pkgci-2": 1303}
    fuel.repositories[1] = [nailgun.deb("ubuntu", None)]
    add(login(), fuel.port, repositories.three())
    assert priorities(fuel.repositories[1]) == {"pkgci-0": 1151, "pkgci-1": 1152, "pkgci-2": 1153}


def test_of_rpm_the_lower_priority_comes_first(fuel, login, repositories):
    add(login(cluster=2), fuel.port, repositories.three(format="rpm"))
    assert priorities(fuel.repositories[2]) == {"pkgci-0": 3, "pkgci-1": 2, "pkgci-2": 1}
    record = repositories.three()["pkgci-2"]
    assert fuel.repositories[2][3] == {"type": "rpm", "name": "pkgci-2", "uri": record.url, "priority": 1}


@pytest.mark.parametrize(
    ("number", "format", "taken", "message"),
    [
        (
            2,
            "rpm",
            nailgun.rpm("update", 3),
            "pkgci-0 cannot come before the others: one of type rpm has the priority 3",
        ),
        (
            1,
            "deb",
            nailgun.deb("u", 32765),
            "pkgci-2 cannot come before the others: one of type deb has the priority 32765",
        ),
    ],
)
def test_priorities_that_leave_no_room_are_said(fuel, login, repositories, number, format, taken, message):
    fuel.repositories[number].append(taken)
    said = refused(InfrastructureError, login(cluster=number), fuel.port, repositories.three(format=format))
    assert said == f"nailgun, port 8000: {message}"
    assert fuel.written == []


def test_the_operating_systems_mirror_stays_the_first_and_others_entries_as_they_are(fuel, login, repositories):
    fuel.repositories[1].append({**nailgun.deb("plugin", 1100), "comment": "of a person"})
    before = list(fuel.repositories[1])
    add(login(), fuel.port, repositories.three())
    assert fuel.repositories[1][: len(before)] == before
    assert fuel.mirror(1) == "ubuntu"


def test_a_deployed_cluster_is_told_of_repositories_alone(fuel, login, repositories):
    add(login(), fuel.port, repositories.three())
    (written,) = fuel.written
    assert written == {"editable": {"repo_setup": {"repos": {"value": fuel.repositories[1]}}}}


def test_nodes_are_provisioned_with_the_repositories_and_apt_gets_pins_that_differ(fuel, login, repositories):
    records = repositories.three()
    add(login(), fuel.port, records)
    asked = rest.Request("GET", "/api/v1/clusters/1/orchestrator/provisioning/defaults/", {"X-Auth-Token": "f00d"}, b"")
    (node,) = json.loads(fuel.answer(asked)[1])["nodes"]
    entries = {one["name"]: one for one in node["ks_meta"]["repo_setup"]["repos"]}
    assert entries["pkgci-2"] == {
        "type": "deb",
        "name": "pkgci-2",
        "uri": records["pkgci-2"].url,
        "suite": "bookworm",
        "section": "main",
        "priority": 1153,
    }
    assert fuel.pins(1) == {
        "pkgci-2": ("release o=pkgci-test-2,l=pkgci-test-2", 1153),
        "pkgci-1": ("release o=pkgci-test-1,l=pkgci-test-1", 1152),
        "pkgci-0": ("release o=pkgci-rocket-2,l=pkgci-rocket-2", 1151),
    }


def test_nailgun_is_told_once(fuel, login, repositories):
    add(login(), fuel.port, repositories.three())
    once = list(fuel.repositories[1])
    add(login(), fuel.port, repositories.three())
    assert fuel.repositories[1] == once
    assert len(fuel.written) == 1


def test_a_wrong_password_is_the_configurations_fault_and_is_not_repeated(fuel, login, repositories, tmp_path, caplog):
    cluster = login()
    (tmp_path / "password").write_text("guessed\n")
    with pytest.raises(RequestError) as caught:
        add(cluster, fuel.port, repositories.three())
    expected = f"user admin, tenant admin: is the password in {tmp_path}/password right?"
    assert str(caught.value) == f"nailgun, port 8000: POST /keystone/v2.0/tokens: HTTP status 401: {expected}"
    # the server's answer has it
    assert "guessed" not in caplog.text + "".join(traceback.format_exception(caught.value))


def test_a_password_that_cannot_be_read_is_said(fuel, login, repositories, tmp_path):
    cluster = login()
    (tmp_path / "password").unlink()
    assert "cannot read the password in" in refused(InfrastructureError, cluster, fuel.port, repositories.three())


def test_a_nailgun_without_accounts_needs_no_login(fuel, login, repositories, tmp_path):
    fuel.auth_required = False
    cluster = login()
    (tmp_path / "password").unlink()
    add(cluster, fuel.port, repositories.three())
    assert priorities(fuel.repositories[1])


def test_a_token_that_is_not_taken_is_the_products_fault(fuel, login, repositories, monkeypatch):
    monkeypatch.setattr(fuel, "_log_in", lambda _: (200, b'{"access": {"token": {"id": "other"}}}'))
    message = refused(InfrastructureError, login(), fuel.port, repositories.three())
    assert message == "nailgun, port 8000: GET /api/clusters/1/attributes/: HTTP status 401: without a word"


@pytest.mark.parametrize("said", [b"{}", b'{"access": {"token": {"id": "a\\r\\nb"}}}', b"[]"])
def test_a_login_without_a_token_is_the_products_fault(fuel, login, repositories, monkeypatch, said):
    monkeypatch.setattr(fuel, "_log_in", lambda _: (200, said))
    message = refused(InfrastructureError, login(), fuel.port, repositories.three())
    assert message == "nailgun, port 8000: POST /keystone/v2.0/tokens: the answer has no token"


def test_another_product_on_the_port_is_not_told_the_password(login, repositories):
    asked = []

    def answer(request: rest.Request) -> tuple[int, bytes]:
        asked.append(request)
        return 200, b"{}"

    with rest.serving(answer) as port:
        message = refused(InfrastructureError, login(), port, repositories.three())
    assert message == "nailgun, port 8000: what answers there is no Nailgun: it does not say `auth_required`"
    assert [request.path for request in asked] == ["/api/version"]


def test_an_unknown_cluster_is_the_configurations_fault(fuel, login, repositories):
    message = refused(RequestError, login(cluster=7), fuel.port, repositories.three())
    assert message == "nailgun, port 8000: there is no cluster 7"


def test_a_cluster_of_another_operating_system_is_the_configurations_fault(fuel, login, repositories):
    message = refused(RequestError, login(cluster=2), fuel.port, repositories.three())
    assert message.startswith("nailgun, port 8000: cluster 2 has no repository of type deb, the operating system's own")
    assert fuel.written == []


def test_an_entry_that_nailgun_takes_and_forgets_is_noticed(fuel, login, repositories):
    fuel.loses = {"pkgci-1"}
    message = refused(InfrastructureError, login(), fuel.port, repositories.three())
    expected = "cluster 1: pkgci-1 is not as it should be, though nothing was refused"
    assert message == f"nailgun, port 8000: {expected}"


def test_an_entry_of_others_that_nailgun_has_taken_and_cannot_use_is_said(fuel, login, repositories):
    fuel.repositories[1].append({**nailgun.deb("plugin", 1100), "priority": "1100"})
    message = refused(InfrastructureError, login(), fuel.port, repositories.three())
    assert message.endswith("attributes/: entry 4.priority of the repositories: Input should be a valid integer")


@pytest.mark.parametrize("value", ["null", "{}", '{"editable": {"repo_setup": {"repos": {"value": "all"}}}}'])
def test_attributes_without_a_list_are_the_products_fault(fuel, login, repositories, value):
    def answer(request: rest.Request) -> tuple[int, bytes]:
        return (200, value.encode()) if request.path.endswith("/attributes/") else fuel.answer(request)

    with rest.serving(answer) as port:
        message = refused(InfrastructureError, login(), port, repositories.three())
    assert message.endswith("attributes/: there is no list editable.repo_setup.repos.value")


def test_what_nailgun_refuses_is_said_with_its_reason(fuel, login, repositories):
    # it would not take a list that begins with such an entry, which others wrote
    fuel.repositories[1][0]["comment"] = "of a person"
    message = refused(InfrastructureError, login(), fuel.port, repositories.three())
    assert message == "nailgun, port 8000: PUT /api/clusters/1/attributes/: HTTP status 400: Invalid repository"


@pytest.mark.parametrize(
    ("error", "text", "message"),
    [
        (
            InfrastructureError,
            None,
            r"there is nothing at http://127\.0\.0\.1:[0-9]+/pkgci-test-2/dists/bookworm/Release",
        ),
        (RequestError, b"Suite: bookworm\nOrigin: o\n", "has no Origin or no Label: no pin can be made for pkgci-2"),
        (RequestError, b"\xff\x00", "has no Origin or no Label"),
        (
            RequestError,
            b"Origin: pkgci-test-1\nLabel: pkgci-test-1\n",
            "pkgci-2 and pkgci-1 have the same Origin and Label: the pin of one would hold for both",
        ),
    ],
)
def test_a_repository_of_which_nailgun_would_silently_make_no_pin_is_refused(
    fuel, login, repositories, error, text, message
):
    records = repositories.three()
    place = "/pkgci-test-2/dists/bookworm/Release"
    if text is None:
        del repositories.releases[place]
    else:
        repositories.releases[place] = text
    with pytest.raises(error, match=message):
        add(login(), fuel.port, records)
    assert fuel.written == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"port": 80}, "the driver `plain` takes no `port`"),
        ({"driver": "plain", "node": "master"}, "the driver `plain` takes no `node`"),
        ({"driver": "depot", "user": "admin"}, "the driver `depot` takes no `user`"),
        ({"driver": "depot", "cluster": 1}, "the driver `depot` takes no `cluster`"),
        ({"driver": "nailgun"}, "the driver `nailgun` needs `user` and `password_file`"),
        ({"driver": "nailgun", "user": "admin"}, "the driver `nailgun` needs `user` and `password_file`"),
        ({"driver": "nailgun", "user": "a", "password_file": "secret"}, "'secret' is no absolute path"),
        ({"driver": "depot", "port": 0}, "greater than or equal to 1"),
        ({"driver": "other"}, "Input should be 'plain', 'depot' or 'nailgun'"),
    ],
)
def test_a_driver_is_told_what_it_takes(given, message):
    with pytest.raises(ValidationError, match=message):
        Cluster.model_validate(given)


def test_the_interface_is_on_the_node_that_is_named_or_on_the_master():
    nodes = {"one": Node(role="master"), "two": Node()}
    assert Cluster().at(nodes) is None
    assert DEPOT.at(nodes) == "one"
    assert Cluster(driver="depot", node="two").at(nodes) == "two"
    with pytest.raises(ValueError, match="there is no node 'three'"):
        Cluster(driver="depot", node="three").at(nodes)
    with pytest.raises(ValueError, match="it needs `node`: no nodes have the role `master`"):
        DEPOT.at({"two": Node()})
    with pytest.raises(ValueError, match="needs `node`: 2 nodes have the role `master`"):
        DEPOT.at({"one": Node(role="master"), "two": Node(role="master")})
