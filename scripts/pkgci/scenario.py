"""What a scenario of a system test gets: a plugin of pytest, loaded by the job `systest` for the operator's own tests.

A scenario is a file or directory of ordinary pytest tests in the configuration directory. They run on the host, and the
packages under test are installed in the machines when they begin. The fixtures:

    nodes           the environment's machines by name
    node            each machine in turn: a test that uses it runs once for each
    packages        the packages under test: name, version, architecture, source, and where they come from
    package         each package in turn
    repositories    the URLs of the repositories
    target          the target's name and format

A machine has been through the tests before; nothing is restored between them.
"""

import logging
from pathlib import Path

import paramiko
import pytest

from pkgci.artifacts import RepositoryPackage
from pkgci.handover import Handover, NodeAccess, TargetUnderTest
from pkgci.ssh import connect, public_key
from pkgci.text import lines
from pkgci.vm.remote import Completed, GuestError, Remote

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
        self._access = access

    def connect(self) -> None:
        """Log in anew, as is needed after a reboot; the first use of the machine does it by itself."""
        identity = paramiko.Ed25519Key.from_private_key_file(self._access.identity)
        host_key = public_key(self._access.host_key)
        try:
            self._client = connect("127.0.0.1", self._access.port, "root", identity, host_key)
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
        if self._client is None:
            self.connect()
        log.info("%s: %s", self.name, " ".join([script.strip(), *arguments]))
        done = super().run(script, *arguments, timeout=timeout, input=input, limit=limit)
        said = lines(done.output)
        log.info("%s%s: status %d", said[-SHOWN:] and f"{said[-SHOWN:].rstrip()}\n", self.name, done.status)
        return done


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option by which the job names the file that it hands over."""
    parser.addoption("--pkgci", type=Path, required=True, help="the file that the job hands over")


def pytest_configure(config: pytest.Config) -> None:
    """Read what the job hands over."""
    config.stash[HANDOVER] = Handover.read(config.getoption("--pkgci"))
    config.stash[NODES] = {name: Node(name, access) for name, access in config.stash[HANDOVER].nodes.items()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that uses `package` once for each package, one that uses `node` once for each machine."""
    packages, nodes = metafunc.config.stash[HANDOVER].packages, metafunc.config.stash[NODES]
    if "package" in metafunc.fixturenames:
        metafunc.parametrize("package", packages, ids=[package.name for package in packages], scope="session")
    if "node" in metafunc.fixturenames:
        # one machine needs no name in a test's
        ids = list(nodes) if len(nodes) > 1 else [pytest.HIDDEN_PARAM]
        metafunc.parametrize("node", nodes.values(), ids=ids, scope="session")


HANDOVER = pytest.StashKey[Handover]()
NODES = pytest.StashKey[dict[str, Node]]()


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
    return pytestconfig.stash[HANDOVER].repositories


@pytest.fixture(scope="session")
def target(pytestconfig: pytest.Config) -> TargetUnderTest:
    """The target."""
    return pytestconfig.stash[HANDOVER].target
