"""What the job `systest` hands over to the plugin that its scenarios run with, see `scenario.py`."""

from pkgci.artifacts import Part, Record, RepositoryPackage


class NodeAccess(Part):
    """How to log in to a machine: the port of 127.0.0.1, the private key's file, the machine's own public key."""

    port: int
    identity: str
    host_key: str


class TargetUnderTest(Part):
    """The target: its name, and the format of its packages."""

    name: str
    format: str


class Handover(Record):
    """What the job hands over to the plugin, in a file that is nobody else's to read."""

    target: TargetUnderTest
    repositories: tuple[str, ...]
    packages: tuple[RepositoryPackage, ...]
    nodes: dict[str, NodeAccess]
