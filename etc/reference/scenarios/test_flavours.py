"""The packages under test are really those that the product was made with: what each flavour promises."""

import pytest
from conftest import version

pytestmark = pytest.mark.group("bvt", "flavours")


def of(env, flavour):
    """Return the packages of a flavour; without any there is nothing to see."""
    packages = env.part_of(flavour)
    if not packages:
        pytest.skip(f"no package of the flavour {flavour} is under test")
    return packages


def test_the_master_was_deployed_from_an_image_with_them(env, master, depot):
    for package in of(env, "master"):
        assert version(master, package.name) == package.version
        if package.name == "depot-master":
            assert depot.ask("GET", "/version") == package.version


def test_the_nodes_have_booted_an_image_with_them(env, workers, depot):
    for package in of(env, "bootstrap"):
        for name, node in workers.items():
            assert node.run("findmnt --noheadings --output OPTIONS / | grep -q lowerdir=/lower").status == 0
            assert version(node, package.name) == package.version
            if package.name == "depot-agent":
                assert depot.state(name)["agent"] == package.version


def test_the_service_runs_in_a_container_with_them(env, master):
    for package in of(env, "container"):
        found = master.run("podman exec depot-web dpkg-query -W -f '${Version}' \"$1\"", package.name).text()
        assert found == package.version
        if package.name == "depot-web":
            assert master.run("depot-ask GET / 8080").text().strip() == package.version


def test_the_product_has_their_repositories_with_the_highest_priority(env, depot, repositories):
    of(env, "cluster")
    known = depot.ask("GET", "/repositories")
    assert {one["uri"] for one in known if one["priority"] > 1000} == set(repositories)
