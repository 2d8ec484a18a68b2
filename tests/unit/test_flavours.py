"""In which ways packages get into a product: who says it, and what a rebuilt root runs."""

import os
import subprocess
from pathlib import Path

import pytest
import trees

from pkgci import flavours
from pkgci.artifacts import RepositoryPackage
from pkgci.change import Parameters
from pkgci.config import Config
from pkgci.errors import RequestError

TARGET = "bookworm-amd64"
RELEASE = """
branches: [main]
targets: [bookworm-amd64]
flavours:
  agent: [cluster, bootstrap]
  web: [container]
  Py_Web: [container]
"""
LAB = """
nodes: {master: {role: master}}
flavours:
  container: {rebuild: lab/container.sh, carrier: web-image}
scenarios: {all: all.py}
"""
BOOT = """
networks: {lan: {subnet: 192.168.77.0/24}}
nodes: {master: {role: master, networks: [lan]}, one: {boot: master, networks: [lan]}}
flavours:
  bootstrap: {rebuild: lab/bootstrap.sh, carrier: boot-image}
scenarios: {all: all.py}
"""


SCRIPTS = {f"lab/{name}.sh": "" for name in ("bootstrap", "container")}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    made = trees.config(tmp_path)
    for path in made.directory.glob("releases/*"):
        path.unlink()
    trees.write(
        made.directory,
        {"releases/one.yaml": RELEASE, "environments/lab.yaml": LAB, "environments/boot.yaml": BOOT, **SCRIPTS},
    )
    return made


def assigned(config: Config, environment: str, branch: str, wanted: str, *sources: str) -> dict:
    return flavours.assigned(config, environment, config.environment(environment)[1], branch, wanted.split(), sources)


def test_the_release_says_the_flavours_and_the_environments_order_is_kept(config):
    assert assigned(config, "boot", "main", "", "agent", "other") == {
        "agent": ("bootstrap", "cluster"),
        "other": ("cluster",),
    }


def test_the_parameter_comes_before_the_release_and_can_be_spelled_again(config):
    found = assigned(config, "lab", "main", "agent:cluster other:cluster,container", "agent", "web", "other")
    assert found == {"agent": ("cluster",), "web": ("container",), "other": ("container", "cluster")}
    assert assigned(config, "lab", "", flavours.spelled(found), *found) == found


def test_a_source_package_may_be_called_as_an_rpm_is(config):
    found = assigned(config, "lab", "main", "", "Py_Web")
    assert found == {"Py_Web": ("container",)}
    assert Parameters.read({"FLAVOURS": flavours.spelled(found)}).get("FLAVOURS") == "Py_Web:container"


def test_a_release_that_claims_what_has_no_branch_says_its_flavours_too(config):
    trees.write(config.directory, {"releases/one.yaml": RELEASE.replace("[main]", "['.*']")})
    assert assigned(Config(config.directory), "lab", "", "", "web") == {"web": ("container",)}


def test_a_flavour_of_what_is_not_under_test_is_refused(config):
    with pytest.raises(RequestError, match=r"^parameter FLAVOURS: wed is not under test, but: web, other$"):
        assigned(config, "lab", "main", "wed:cluster", "web", "other")


@pytest.mark.parametrize(
    ("branch", "wanted", "source", "said"),
    [
        (
            "main",
            "",
            "agent",
            "agent is of the flavour bootstrap (parameter FLAVOURS or release one), which environment lab does not know; "
            "it knows: container, cluster",
        ),
        ("", "x:master", "x", "x is of the flavour master (parameter FLAVOURS), which environment lab does not know"),
    ],
)
def test_a_flavour_that_the_environment_does_not_know_is_refused(config, branch, wanted, source, said):
    with pytest.raises(RequestError) as caught:
        assigned(config, "lab", branch, wanted, source)
    assert str(caught.value).startswith(said)


def test_a_script_that_is_not_there_is_said_before_anything_is_deployed(config):
    (config.directory / "lab" / "container.sh").unlink()
    with pytest.raises(RequestError, match=r"/lab\.yaml: flavour container: .*/lab/container\.sh does not exist$"):
        assigned(config, "lab", "main", "", "web")


def installed(place: Path, guest: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run the installer in a root that is a directory, with another guest's script; return how it ended and what is left."""
    config = Config(place)
    package = RepositoryPackage(
        name="small", version="1.0", architecture="all", file="small.deb", sha256="0" * 64, source="small", key=""
    )
    root = place / "root"
    (root / "run" / "pkgci").mkdir(parents=True)
    (root / "run" / "pkgci" / "log").write_text("what the tool said\n")
    for path, content in flavours.overlay(config.target(TARGET), (), (package,)).items():
        (root / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        # the root is not changed into: paths are made relative to it
        text = content.decode().replace(" /", f" {root}/").replace(">/", f">{root}/")
        (root / path[1:]).write_text(guest if path == "/pkgci-guest" else text)
    done = subprocess.run(
        ["sh", "-eu", root / "pkgci-install"], env=os.environ, capture_output=True, text=True, check=False
    )
    return done, {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("guest", "status", "last"),
    [
        ('[ "$*" = "together small 1.0 all" ]', 0, "what the tool said"),
        ("exit 75", flavours.UNREADABLE, "what the tool said"),
        ("printf 'install\\t\\tsmall : Depends: nothing\\n'", 1, "small : Depends: nothing"),
    ],
)
def test_an_image_is_rebuilt_with_the_packages_or_says_why_not_and_nothing_else_is_left_in_it(
    config, guest, status, last
):
    done, left = installed(config.directory, guest)
    assert (done.returncode, done.stdout.splitlines()[-1], left) == (status, last, set())
