"""An example of a scenario: ordinary tests of pytest, run on the host, with the packages under test in the machines.

What the fixtures are says `scripts/pkgci/scenario.py`. A machine is used as it is left by the test before.
"""

from urllib.request import urlopen

import pytest

CONFIGURATION = "/etc/rocket/rocket.conf"


def test_the_program_says_its_version(node, package):
    """`node` is each machine in turn, `package` each package under test."""
    done = node.run('"$1" --version', package.name, timeout=30)
    assert done.status == 0, done.text()


@pytest.mark.group("bvt", "storage")
@pytest.mark.timeout(120)
def test_what_was_stored_survives_a_restart(nodes):
    """`nodes` has the machines by name; files go to and fro by their absolute paths.

    The marks say in which groups the test is, `bvt` if there is none, and how many seconds it may take.
    """
    controller = nodes["controller"]
    controller.put({CONFIGURATION: b"[store]\npath = /var/lib/rocket\n"})
    assert controller.run("systemctl restart rocket && rocket put greeting hello").status == 0
    assert controller.run("systemctl restart rocket && rocket get greeting").text() == "hello\n"
    assert controller.get(CONFIGURATION).startswith(b"[store]")


@pytest.mark.group("storage")
def test_the_store_is_reached_from_outside(master):
    """`master` is the machine of that role; a TCP port in a machine is reached through a port of this host."""
    with master.forward(8080) as port, urlopen(f"http://127.0.0.1:{port}/greeting") as answer:
        assert answer.read() == b"hello"


def test_only_what_is_under_test_is_installed(node, packages, target):
    """`packages` are all of them, `target` has name and format, `repositories` are where they come from."""
    query = {"deb": "dpkg-query -W -f '${Version}' \"$1\"", "rpm": "rpm -q --qf '%{VERSION}-%{RELEASE}' \"$1\""}
    for package in packages:
        assert node.run(query[target.format], package.name).text() == package.version
