"""What an external suite of tests is told: texts of an environment's file, in which words of the run are filled in.

The texts are Jinja templates (https://jinja.palletsprojects.com/templates/), rendered in its sandbox. The words:

    environment     the environment's name
    target          name, format
    group           the group that is run; empty for a suite without groups
    junit           the path of the JUnit XML file to leave
    seed            the number that random numbers begin at, to repeat a test
    scratch         the path of an empty directory, which is removed afterwards
    known_hosts     the path of a file with the machines' keys, for OpenSSH
    nodes           by their names: name, role, host and port of its ssh server, identity (the path of root's private key),
                    addresses by network
    master          the one of them whose role is `master`
    packages        those under test: name, version, architecture, source
    repositories    those that they come from: name, url, format, codename, component, released
"""

from collections.abc import Mapping

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pkgci.artifacts import RepositoryPackage
from pkgci.config import Node
from pkgci.handover import Handover, NodeAccess, RepositoryUnderTest, TargetUnderTest

# where QEMU forwards the machines' ports
HOST = "127.0.0.1"


def words(handover: Handover, group: str, junit: str, scratch: str, known_hosts: str) -> dict[str, object]:
    """Return the words of a run.

    Args:
        handover: what the job knows of it.
        group: as above, like all others.
    """
    known = handover.model_dump(mode="json")
    nodes = {
        name: {
            "name": name,
            "role": node.role,
            "host": HOST,
            "port": node.port,
            "identity": node.identity,
            "addresses": node.addresses,
        }
        for name, node in handover.nodes.items()
    }
    paths = {"junit": junit, "scratch": scratch, "known_hosts": known_hosts}
    told = {name: known[name] for name in ("environment", "seed", "target", "packages", "repositories")}
    master = handover.master()
    return {**told, **paths, "group": group, "nodes": nodes, **({"master": nodes[master]} if master else {})}


def sample(nodes: Mapping[str, Node]) -> dict[str, object]:
    """Return words like those of a run, to try a text with before there is one.

    Args:
        nodes: the environment's machines.
    """
    repository = RepositoryUnderTest(name="", url="", format="deb", codename="", component="")
    package = {"name": "", "version": "", "architecture": "", "file": "", "sha256": "", "source": "", "key": ""}
    handover = Handover(
        environment="",
        snapshot="",
        seed=0,
        target=TargetUnderTest(name="", format=""),
        repositories=(repository, repository.model_copy(update={"format": "rpm"})),
        packages=(RepositoryPackage(**package),),
        nodes={
            name: NodeAccess(
                port=1, identity="", host_key="", role=node.role, addresses=dict.fromkeys(node.networks, "")
            )
            for name, node in nodes.items()
        },
    )
    return words(handover, "", "", "", "")


def fill(text: str, known: Mapping[str, object]) -> str:
    """Fill words in.

    Raises:
        ValueError: the text is no template, or asks for something that there is not.
    """
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
    environment.globals.clear()
    try:
        return environment.from_string(text).render(known)
    except (TemplateError, TypeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{' '.join(text.split())[:200]!r} cannot be filled in: {error}") from error
