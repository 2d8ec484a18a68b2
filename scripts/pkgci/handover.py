"""What the job `systest` hands over to its scenarios: see `scenario.py` for those of pytest, `mapping.py` for others."""

from pydantic import Field

from pkgci.artifacts import Part, Record, RepositoryPackage

# the group of a test or suite that says nothing of groups; without SCENARIOS, of each scenario this one is run
DEFAULT_GROUP = "bvt"
# the status of pytest by which the plugin says that the connection to a machine was cut, though that one is well
CUT = 40


class NodeAccess(Part):
    """A machine: how to log in as root by ssh, what it is for, and its addresses as `192.168.77.1` by network.

    `port` is one of 127.0.0.1, `identity` the private key's file, `host_key` the machine's own public key.
    """

    port: int
    identity: str
    host_key: str
    role: str | None = None
    addresses: dict[str, str] = Field(default_factory=dict)


class TargetUnderTest(Part):
    """The target: its name, and the format of its packages."""

    name: str
    format: str


class RepositoryUnderTest(Part):
    """A repository that packages under test come from: its name in the machines, where it is, and what is in it."""

    name: str
    url: str
    format: str
    codename: str
    component: str
    released: bool = False


class Handover(Record):
    """What the job hands over, in a file that is nobody else's to read."""

    environment: str
    snapshot: str
    seed: int
    target: TargetUnderTest
    repositories: tuple[RepositoryUnderTest, ...]
    packages: tuple[RepositoryPackage, ...]
    flavours: dict[str, tuple[str, ...]] = Field(default_factory=dict, description="of each source package")
    nodes: dict[str, NodeAccess]

    def master(self) -> str | None:
        """Return the name of the machine whose role is `master`, None if none has it, or several."""
        named = [name for name, node in self.nodes.items() if node.role == "master"]
        return named[0] if len(named) == 1 else None
