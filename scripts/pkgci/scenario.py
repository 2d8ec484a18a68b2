"""What a scenario of a system test gets: a plugin of pytest, loaded by the job `systest` for the operator's own tests.

A scenario is a file or directory of ordinary pytest tests in the configuration directory. They run on the host, and the
packages under test are installed in the machines when they begin. The fixtures:

    env             the environment: name, snapshot, nodes, those of a role: `env.role("compute")`, and the packages under test
                    of a flavour: `env.part_of("bootstrap")`
    nodes           its machines by name
    node            each machine in turn: a test that uses it runs once for each
    master          the machine whose role is `master`
    packages        the packages under test: name, version, architecture, source, and where they come from
    package         each package in turn
    repositories    the URLs of the repositories
    target          the target's name and format
    seed            the number that random numbers of the run begin at; Python's own begin there in each test

A machine has name, role and addresses by network, and `run`, `put`, `get` and `forward`. A test is in the group `bvt`, or in
those that `@pytest.mark.group("ha", "slow")` names, and has `test_seconds` of the scenario, or `@pytest.mark.timeout(60)`.
A machine has been through the tests before; nothing is restored between them.
"""

import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import paramiko
import pytest

from pkgci.artifacts import RepositoryPackage
from pkgci.handover import CUT, DEFAULT_GROUP, Handover, NodeAccess, TargetUnderTest
from pkgci.mapping import HOST
from pkgci.ssh import connect, public_key
from pkgci.text import lines
from pkgci.vm.remote import Completed, GuestError, LostError, Remote

log = logging.getLogger(__name__)

COMMAND_SECONDS = 300
LOGIN_SECONDS = 60
SHOWN = 4000


class Node(Remote):
    """A machine of the environment.

    Args:
        name: its name in the environment.
        access: how to log in.

    Raises:
        GuestError: (from any member) the machine does not do what was asked: it hangs, is gone, or floods us.
    """

    def __init__(self, name: str, access: NodeAccess) -> None:
        super().__init__(None)
        self.name = name
        self.role = access.role
        self.addresses = access.addresses
        self._access = access
        self._begun = time.monotonic()

    def connect(self) -> None:
        """Log in anew, as is needed after a reboot; the first use of the machine does it by itself."""
        identity = paramiko.Ed25519Key.from_private_key_file(self._access.identity)
        host_key = public_key(self._access.host_key)
        try:
            self._client = connect(HOST, self._access.port, "root", identity, host_key)
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise GuestError(f"cannot log in to {self.name}: {error}") from error

    def run(
        self, script: str, *arguments: str, timeout: float = COMMAND_SECONDS, input: bytes = b"", limit: int = 1 << 20
    ) -> Completed:
        """Run a shell script on the machine, as root, and log what it said; see `Remote.run`.

        Args:
            script: POSIX shell, run with `sh -eu`.
            arguments: its arguments: nothing has to be quoted.
            timeout: seconds until its connection is cut; what it started may go on.
            input: its standard input.
            limit: bytes of output that are accepted.

        Returns:
            Its status and its output; no status is an error here.
        """
        log.info("%s: %s", self.name, " ".join([script.strip(), *arguments]))
        done = super().run(script, *arguments, timeout=timeout, input=input, limit=limit)
        said = lines(done.output)
        log.info("%s%s: status %d", said[-SHOWN:] and f"{said[-SHOWN:].rstrip()}\n", self.name, done.status)
        return done

    def was_cut(self) -> bool:
        """Whether the connection was lost though the machine is well: it lets us in, and was not restarted."""
        if self._client is None or ((transport := self._client.get_transport()) and transport.is_active()):
            return False
        try:
            self.connect()
            return self.up_since(self._begun)
        except GuestError:
            return False

    def _transport(self) -> paramiko.Transport:
        if self._client is None:
            self.connect()
        return super()._transport()


@dataclass(frozen=True)
class Env:
    """The environment: its name, the snapshot that it was restored from, its machines by name, the packages by flavour."""

    name: str
    snapshot: str
    nodes: dict[str, Node]
    _handover: Handover

    def role(self, role: str) -> list[Node]:
        """Return the machines of a role, in the environment's order."""
        return [node for node in self.nodes.values() if node.role == role]

    def part_of(self, flavour: str) -> list[RepositoryPackage]:
        """Return the packages under test that got into the product in a way: master, bootstrap, container or cluster."""
        told = self._handover
        return [package for package in told.packages if flavour in told.flavours.get(package.source, ())]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options by which the job names the file that it hands over, and the groups to run."""
    parser.addoption("--pkgci", type=Path, required=True, help="the file that the job hands over")
    parser.addoption("--pkgci-group", action="append", default=[], help="run only tests of this group")


def pytest_configure(config: pytest.Config) -> None:
    """Read what the job hands over."""
    config.addinivalue_line("markers", f"group(name, ...): the groups that a test is in; {DEFAULT_GROUP!r} without it")
    config.stash[HANDOVER] = Handover.read(config.getoption("--pkgci"))
    config.stash[NODES] = {name: Node(name, access) for name, access in config.stash[HANDOVER].nodes.items()}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let a test's random numbers be the same whichever tests ran before it."""
    random.seed(item.config.stash[HANDOVER].seed)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that uses `package` once for each package, one that uses `node` once for each machine."""
    packages, nodes = metafunc.config.stash[HANDOVER].packages, metafunc.config.stash[NODES]
    if "package" in metafunc.fixturenames:
        metafunc.parametrize("package", packages, ids=[package.name for package in packages], scope="session")
    if "node" in metafunc.fixturenames:
        # one machine needs no name in a test's
        ids = list(nodes) if len(nodes) > 1 else [pytest.HIDDEN_PARAM]
        metafunc.parametrize("node", nodes.values(), ids=ids, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is in none of the groups that are asked for."""
    wanted = set(config.getoption("--pkgci-group"))
    if not wanted:
        return
    left_out = [item for item in items if not _groups(item) & wanted]
    config.stash[LEFT_OUT] = len(left_out)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _groups(item: pytest.Item) -> set[str]:
    return {name for marker in item.iter_markers("group") for name in marker.args} or {DEFAULT_GROUP}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Tell a scenario whose tests are all in other groups from one that has none."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.stash.get(LEFT_OUT, 0):
        session.exitstatus = pytest.ExitCode.OK


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """End it all when a test failed since the connection to a machine was cut: that is neither its nor a package's fault."""
    report = yield
    if call.excinfo and isinstance(call.excinfo.value, LostError):
        for node in item.config.stash[NODES].values():
            if node.was_cut():
                pytest.exit(f"the connection to {node.name} was cut, though it is well", returncode=CUT)
    return report


HANDOVER = pytest.StashKey[Handover]()
NODES = pytest.StashKey[dict[str, Node]]()
LEFT_OUT = pytest.StashKey[int]()


@pytest.fixture(scope="session")
def env(pytestconfig: pytest.Config) -> Env:
    """The environment."""
    handover = pytestconfig.stash[HANDOVER]
    return Env(handover.environment, handover.snapshot, pytestconfig.stash[NODES], handover)


@pytest.fixture(scope="session")
def master(pytestconfig: pytest.Config) -> Node:
    """The machine whose role is `master`."""
    name = pytestconfig.stash[HANDOVER].master()
    if name is None:
        pytest.fail(
            "the environment must have one node with `role: master`, for a test that uses `master`", pytrace=False
        )
    return pytestconfig.stash[NODES][name]


@pytest.fixture(scope="session")
def nodes(pytestconfig: pytest.Config) -> dict[str, Node]:
    """The environment's machines by name."""
    return pytestconfig.stash[NODES]


@pytest.fixture(scope="session")
def packages(pytestconfig: pytest.Config) -> tuple[RepositoryPackage, ...]:
    """The packages under test, all installed."""
    return pytestconfig.stash[HANDOVER].packages


@pytest.fixture(scope="session")
def repositories(pytestconfig: pytest.Config) -> tuple[str, ...]:
    """The URLs of the repositories that the packages come from."""
    return tuple(repository.url for repository in pytestconfig.stash[HANDOVER].repositories)


@pytest.fixture(scope="session")
def target(pytestconfig: pytest.Config) -> TargetUnderTest:
    """The target."""
    return pytestconfig.stash[HANDOVER].target


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    """The number that random numbers of the run begin at; the record has it, and the parameter SEED sets it."""
    return pytestconfig.stash[HANDOVER].seed
