"""What the product is there for: nodes are deployed, work together, come back from a restart, go and come again.

The tests follow each other, as the plan does: nodes are as the one before has left them.
"""

from itertools import permutations

import pytest
from conftest import BOOT_SECONDS, ask_node, until, version

from pkgci.vm.remote import GuestError

flavours = pytest.mark.group("bvt", "flavours")


@flavours
def test_two_nodes_are_deployed(depot, workers):
    assert len(workers) == 2
    depot.deploy(*workers)


@flavours
def test_what_is_under_test_was_installed_there_from_the_test_repository(env, workers):
    packages = [package for package in env.part_of("cluster") if package.name.startswith("depot-")]
    if not packages:
        pytest.skip("no package of a node is under test")
    for node in workers.values():
        for package in packages:
            assert version(node, package.name) == package.version
            policy = node.run('apt-cache policy "$1"', package.name).text()
            _, _, installed = policy.partition(f"*** {package.version}")
            assert "/repository/pkgci-" in installed.partition("***")[0].splitlines()[1], policy


def test_services_answer_across_nodes(workers):
    for asked, by in permutations(workers.values()):
        assert ask_node(by, asked.addresses["admin"]) == f"{asked.name} {version(asked, 'depot-node')}"


def test_a_node_restarts_and_comes_back(workers):
    node, other = workers.values()
    before = node.run("cat /proc/sys/kernel/random/boot_id").text()
    node.run("systemd-run -q --on-active=1 systemctl reboot")
    until(lambda: restarted(node, before), BOOT_SECONDS, f"{node.name} is back")
    until(lambda: is_active(node), 60, "its service runs")
    assert ask_node(other, node.addresses["admin"]).startswith(f"{node.name} ")


def test_a_node_is_removed_and_added(depot, workers):
    first, node = next(iter(workers.items()))
    before = node.run("cat /proc/sys/kernel/random/boot_id").text()
    depot.ask("DELETE", f"/nodes/{first}")
    # until it is down it says that it is there
    until(lambda: restarted(node, before), BOOT_SECONDS, f"{first} has booted anew")
    until(lambda: depot.state(first).get("state") == "bootstrap", 60, "the master knows it again")
    # nobody has used it
    assert node.run("dpkg-query -W depot-node").status != 0
    depot.deploy(first)
    assert is_active(node)


def is_active(node) -> bool:
    """Return whether the service of a node runs."""
    return node.run("systemctl is-active depot-node").text() == "active\n"


def restarted(node, before: str) -> bool:
    """Return whether a machine lets us in, in another boot than `before`."""
    try:
        node.connect()
        return node.run("cat /proc/sys/kernel/random/boot_id").text() != before
    except GuestError:
        return False
