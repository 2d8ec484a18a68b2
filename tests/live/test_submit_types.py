"""However a real Gerrit submits what a gate has tested, users get those very files: tree and version are as gated."""

from pathlib import Path

import pytest
import trees
from gated import gate, is_what_was_tested, merged, post, version
from gerrit_server import Gerrit
from released import configure

from pkgci import source
from pkgci.config import Config
from pkgci.store import Entry

# how many parents has what a branch leads to then, and is it the very commit that was reviewed
TYPES = {
    "FAST_FORWARD_ONLY": (1, True),
    "MERGE_IF_NECESSARY": (2, False),
    "MERGE_ALWAYS": (2, False),
    "CHERRY_PICK": (1, False),
    "REBASE_IF_NECESSARY": (1, False),
    "REBASE_ALWAYS": (1, False),
}


class Site:
    """Packages of one project each, or of two; the projects' names begin with what makes them unique in Gerrit."""

    def __init__(self, place: Path, gerrit: Gerrit, gnupg: tuple[str, str], prefix: str) -> None:
        self.place, self.gerrit, self.prefix = place, gerrit, prefix
        self.config = configure(place, gnupg, {"gerrit": gerrit.url})
        (self.config.directory / "packages").mkdir()

    def create(self, package: str, kind: str) -> None:
        """Create a project with a submit type."""
        trees.commit(self.place / package, trees.deb(package))
        self.gerrit.create_project(self.project(package), self.place / package, kind)
        self.package(package, f"source: {self.project(package)}\n")

    def package(self, name: str, entry: str) -> None:
        """Write the entry of a package."""
        (self.config.directory / "packages" / f"{name}.yaml").write_text(entry)
        self.config = Config(self.config.directory)

    def project(self, package: str) -> str:
        return f"{self.prefix}/{package}"

    def update(self, package: str) -> None:
        """Bring the tree to what the branch leads to."""
        trees.git(self.place / package, "reset", "-q", "--hard", self.tip(package)[1])

    def tip(self, package: str) -> tuple[int, str]:
        """Return what the branch leads to, after the number of its parents."""
        trees.git(self.place / package, "fetch", "-q", self.gerrit.url + self.project(package), "main")
        tip, *parents = trees.git(self.place / package, "rev-list", "--parents", "-1", "FETCH_HEAD").split()
        return len(parents), tip

    def propose(self, package: str, *words: str, topic: str = "") -> list[int]:
        """Push a change for each word, one on top of the other, all of them approved."""
        numbers = []
        for word in words:
            trees.commit(self.place / package, {word: f"{word}\n"}, f"Add {word}")
            numbers.append(self.gerrit.push(self.place / package, self.project(package), topic=topic))
            self.gerrit.approve(numbers[-1])
        return numbers

    def meanwhile(self, package: str, word: str) -> None:
        """Move the branch past all review, while the tree has changes on what it was before."""
        tree = self.place / package
        url = self.gerrit.url + self.project(package)
        trees.git(tree, "fetch", "-q", url, "main")
        trees.git(tree, "checkout", "-q", "--detach", "FETCH_HEAD")
        trees.commit(tree, {word: "meanwhile\n"}, f"Meanwhile {word}")
        self.gerrit.push_directly(tree, self.project(package))
        trees.git(tree, "checkout", "-q", "main")

    def gate(self, *changes: tuple[str, int], run: str) -> list[Entry]:
        """Leave what a gate does that has passed."""
        refs = [(self.project(package), self.gerrit.ref(number)) for package, number in changes]
        entries = gate(self.config, self.place, *refs, run=run)
        for _, number in changes:
            self.gerrit.review(number, labels={"Verified": 2}, user="zuul")
        return entries

    def is_published(self, package: str, *entries: Entry) -> bool:
        """Whether post publishes the files that were gated, and their trees are what was merged."""
        commit = self.gerrit.tip(self.project(package))
        sources = source.fetch(self.config, merged(self.project(package), commit))
        trees_of = (sources.source.id, sources.packaging.id)
        assert (trees_of, version(sources)) in {(one.record.trees, one.record.version) for one in entries}
        return is_what_was_tested(self.config, post(self.config, self.place, self.project(package), commit), *entries)


@pytest.fixture
def site(tmp_path, gerrit, gnupg, request):
    return Site(tmp_path, gerrit, gnupg, request.node.name.replace("[", "-").strip("]").lower())


@pytest.mark.parametrize("kind", TYPES)
def test_a_change_and_a_chain_that_is_submitted_at_once_are_published_as_gated(site, kind):
    site.create("lib", kind)
    (one,) = site.propose("lib", "one")
    if kind != "FAST_FORWARD_ONLY":
        site.meanwhile("lib", "before")
    entries = site.gate(("lib", one), run="run-1")
    reviewed = trees.git(site.place / "lib", "rev-parse", "main")
    site.gerrit.submit(one, "zuul")
    parents, tip = site.tip("lib")
    assert (parents, tip == reviewed) == TYPES[kind]
    assert site.is_published("lib", *entries)

    site.update("lib")
    two, three = site.propose("lib", "two", "three")
    if kind != "FAST_FORWARD_ONLY":
        site.meanwhile("lib", "between")
    entries = site.gate(("lib", two), ("lib", three), run="run-2")
    # a cherry-pick takes nothing with it
    for number in (two, three) if kind == "CHERRY_PICK" else (three,):
        site.gerrit.submit(number, "zuul")
    assert site.gerrit.merged(two)
    assert site.is_published("lib", *entries)


def test_a_topic_that_is_submitted_at_once_is_published_as_one_generation(site):
    site.create("lib", "MERGE_IF_NECESSARY")
    site.create("app", "REBASE_ALWAYS")
    (lib,), (app,) = site.propose("lib", "one", topic="both"), site.propose("app", "one", topic="both")
    for package in ("lib", "app"):
        site.meanwhile(package, "before")
    entries = site.gate(("lib", lib), ("app", app), run="run-1")
    site.gerrit.submit(app, "zuul")
    assert site.gerrit.merged(lib)
    assert site.is_published("lib", *entries)
    commit = site.gerrit.tip(site.project("app"))
    assert post(site.config, site.place, site.project("app"), commit).result == "unchanged"


def test_both_projects_of_a_package_submitted_at_once_are_published_as_gated(site):
    site.create("lib", "CHERRY_PICK")
    site.create("lib-packaging", "MERGE_ALWAYS")
    trees.git(site.place / "lib", "rm", "-q", "-r", "debian")
    (site.config.directory / "packages" / "lib-packaging.yaml").unlink()
    site.package("lib", f"source: {site.project('lib')}\npackaging: {site.project('lib-packaging')}\n")
    (code,), (packaging,) = (site.propose(one, "one", topic="both") for one in ("lib", "lib-packaging"))
    site.meanwhile("lib-packaging", "before")
    entries = site.gate(("lib", code), ("lib-packaging", packaging), run="run-1")
    site.gerrit.submit(code, "zuul")
    assert site.gerrit.merged(packaging)
    assert site.is_published("lib-packaging", *entries)
    commit = site.gerrit.tip(site.project("lib"))
    assert post(site.config, site.place, site.project("lib"), commit).result == "unchanged"
