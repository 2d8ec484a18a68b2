"""After a merge: what a gate has tested is what users get, however Gerrit submits; real git, packages and signatures."""

import re
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import packages
import pytest
import trees
from clients import run as command
from gated import DEB, gate, is_what_was_tested, merged, post, rebuilt, stored, version
from released import configure, faults, root

from pkgci import source
from pkgci.artifacts import ReleaseOutcome, Unpublished
from pkgci.config import Config
from pkgci.errors import RequestError
from pkgci.released import merges
from pkgci.released.merges import publish_build, publish_tested
from pkgci.released.repository import Repository, released_from
from pkgci.source import Sources
from pkgci.store import Entry, Store
from pkgci.unpublished import unpublished

RPM = "debianrpm-amd64"


@dataclass
class Gerrit:
    """The remote: work trees below one directory, in which changes are made and submitted as Gerrit does."""

    place: Path

    def propose(self, project: str, number: int, files: dict[str, str], base: str = "main") -> str:
        """Make a change on top of `base`; return its ref."""
        tree = self.place / project
        trees.git(tree, "checkout", "-q", "--detach", base)
        commit = trees.commit(tree, files, f"Change {number}")
        ref = f"refs/changes/{number:02}/{number}/1"
        trees.git(tree, "update-ref", ref, commit)
        trees.git(tree, "checkout", "-q", "main")
        return ref

    def push(self, project: str, files: dict[str, str], message: str = "Meanwhile") -> str:
        """Move the branch past all review."""
        return trees.commit(self.place / project, files, message)

    def submit(self, project: str, ref: str, how: str) -> str:
        """Submit a change in one of Gerrit's ways; return what the branch leads to then."""
        tree = self.place / project
        if how == "fast forward":
            trees.git(tree, "merge", "-q", "--ff-only", ref)
        elif how == "merge":
            trees.git(tree, "merge", "-q", "--no-ff", "-m", f"Merge {ref}", ref)
        elif how == "cherry-pick":
            trees.git(tree, "cherry-pick", ref)
        else:
            trees.git(tree, "checkout", "-q", "--detach", ref)
            trees.git(tree, "rebase", "-q", "main")
            trees.git(tree, "checkout", "-q", "-B", "main", "HEAD")
        return self.tip(project)

    def tip(self, project: str) -> str:
        return trees.git(self.place / project, "rev-parse", "main")


@pytest.fixture
def gerrit(tmp_path: Path) -> Gerrit:
    made = Gerrit(tmp_path / "gerrit")
    for project in ("lib", "app"):
        trees.commit(made.place / project, {"text": "1", **trees.deb(project)})
    return made


@pytest.fixture
def config(tmp_path: Path, gnupg, gerrit: Gerrit) -> Config:
    made = configure(tmp_path, gnupg, {"gerrit": f"file://{gerrit.place}/", "metrics": f"{tmp_path}/pkgci.prom"})
    (made.directory / "packages").mkdir()
    for project in ("lib", "app"):
        (made.directory / "packages" / f"{project}.yaml").write_text(f"source: {project}\n")
    return made


def waiting(config: Config, seconds: int) -> Config:
    """The configuration with another time to wait for siblings."""
    path = config.directory / "config.yaml"
    path.write_text(path.read_text().replace("released:\n", f"released:\n  sibling_seconds: {seconds}\n"))
    return Config(config.directory)


def paired(config: Config, gerrit: Gerrit) -> Config:
    """The configuration with `lib` as a package of two projects."""
    trees.commit(gerrit.place / "lib-packaging", trees.deb("lib"))
    (config.directory / "packages" / "lib.yaml").write_text("source: lib\npackaging: lib-packaging\n")
    return Config(config.directory)


def made_at(config: Config) -> float:
    return Repository(config, "rocket", "bookworm").current().time.timestamp()


def generation(config: Config) -> int:
    current = Repository(config, "rocket", "bookworm").current()
    return current.number if current else 0


@pytest.mark.parametrize("how", ["fast forward", "merge", "cherry-pick", "rebase"])
def test_however_gerrit_submits_the_tested_files_are_published(config, gerrit, tmp_path, how):
    first = gerrit.propose("lib", 1, {"text": "2"})
    if how != "fast forward":
        gerrit.push("lib", {"other": "x"})
    (entry,) = gate(config, tmp_path, ("lib", first))
    commit = gerrit.submit("lib", first, how)
    sources = source.fetch(config, merged("lib", commit))
    assert (sources.source.id, version(sources)) == (entry.record.trees[0], entry.record.version)
    assert is_what_was_tested(config, post(config, tmp_path, "lib", commit), entry)


@pytest.mark.parametrize("how", ["fast forward", "merge", "cherry-pick", "rebase"])
def test_of_a_chain_that_is_submitted_at_once_the_last_state_is_published(config, gerrit, tmp_path, how):
    first = gerrit.propose("lib", 1, {"text": "2"})
    second = gerrit.propose("lib", 2, {"more": "3"}, base=first)
    if how != "fast forward":
        gerrit.push("lib", {"other": "x"})
    (entry,) = gate(config, tmp_path, ("lib", first), ("lib", second))
    if how == "cherry-pick":
        gerrit.submit("lib", first, how)
    commit = gerrit.submit("lib", second, how)
    assert is_what_was_tested(config, post(config, tmp_path, "lib", commit), entry)


def test_merged_changes_of_one_gate_run_are_published_as_one_generation_and_only_once(config, gerrit, tmp_path):
    lib, app = gerrit.propose("lib", 1, {"text": "2"}), gerrit.propose("app", 2, {"text": "2"})
    entries = gate(config, tmp_path, ("lib", lib), ("app", app))
    commits = {"lib": gerrit.submit("lib", lib, "merge"), "app": gerrit.submit("app", app, "cherry-pick")}
    made = post(config, tmp_path, "app", commits["app"])
    assert is_what_was_tested(config, made, *entries)
    assert made.reason.endswith("generation 1: as gate run run-1 has tested it, with 1 more of that run")
    for project in ("lib", "app", "lib"):
        again = post(config, tmp_path, project, commits[project])
        assert (again.result, generation(config)) == ("unchanged", 1)
        assert "of this merge is released already" in again.reason


def test_a_change_waits_for_the_others_of_its_gate_run_to_be_merged(config, gerrit, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(merges, "POLL", 0.1)
    lib, app = gerrit.propose("lib", 1, {"text": "2"}), gerrit.propose("app", 2, {"text": "2"})
    entries = gate(config, tmp_path, ("lib", lib), ("app", app))
    commit = gerrit.submit("lib", lib, "merge")
    made: list[ReleaseOutcome] = []
    thread = threading.Thread(target=lambda: made.append(post(config, tmp_path, "lib", commit)))
    thread.start()
    while "waiting up to 60 s for 2,1 of gate run run-1 to be merged" not in caplog.text and thread.is_alive():
        thread.join(0.05)
    assert generation(config) == 0
    gerrit.submit("app", app, "merge")
    thread.join(60)
    assert is_what_was_tested(config, made[0], *entries)


def test_a_package_of_two_projects_waits_for_the_other_one_too(config, gerrit, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(merges, "POLL", 0.1)
    config = paired(config, gerrit)
    code, packaging = gerrit.propose("lib", 1, {"text": "2"}), gerrit.propose("lib-packaging", 2, {"debian/x": "2"})
    (entry,) = gate(config, tmp_path, ("lib", code), ("lib-packaging", packaging))
    first = gerrit.submit("lib", code, "merge")
    made: list[ReleaseOutcome] = []
    thread = threading.Thread(target=lambda: made.append(post(config, tmp_path, "lib", first)))
    thread.start()
    while "waiting up to 60 s for 2,1 of gate run run-1 to be merged" not in caplog.text and thread.is_alive():
        thread.join(0.05)
    second = gerrit.submit("lib-packaging", packaging, "cherry-pick")
    thread.join(60)
    assert is_what_was_tested(config, made[0], entry)
    assert post(config, tmp_path, "lib-packaging", second).result == "unchanged"


def test_after_the_time_what_is_merged_is_published_and_the_rest_is_named(config, gerrit, tmp_path):
    config = waiting(config, 0)
    lib, app = gerrit.propose("lib", 1, {"text": "2"}), gerrit.propose("app", 2, {"text": "2"})
    entries = gate(config, tmp_path, ("lib", lib), ("app", app))
    made = post(config, tmp_path, "lib", gerrit.submit("lib", lib, "merge"))
    assert (made.result, made.tested) == ("published", True)
    assert made.left == ("app for bookworm-amd64: 2,1 is not merged",)
    made = post(config, tmp_path, "app", gerrit.submit("app", app, "merge"))
    assert is_what_was_tested(config, made, entries[1])
    assert generation(config) == 2


def test_what_was_tested_on_a_change_that_is_not_merged_does_not_count(config, gerrit, tmp_path):
    config = waiting(config, 0)
    lib, app = gerrit.propose("lib", 1, {"text": "2"}), gerrit.propose("app", 2, {"text": "2"})
    gate(config, tmp_path, ("lib", lib), ("app", app))
    commit = gerrit.submit("app", app, "merge")
    made = post(config, tmp_path, "app", commit)
    assert (made.result, made.generation) == ("absent", None)
    assert made.reason == "gate run run-1 has tested it with 1,1, which is not merged"
    (alone,) = gate(config, tmp_path, ("app", app), run="run-2", content="alone")
    assert is_what_was_tested(config, post(config, tmp_path, "app", commit), alone)


def test_what_no_gate_has_tested_is_built_again(config, gerrit, tmp_path):
    commit = gerrit.push("lib", {"text": "2"})
    made = post(config, tmp_path, "lib", commit)
    tree = source.fetch(config, merged("lib", commit)).source.id[:8]
    assert (made.result, made.reason) == ("absent", f"no gate has tested tree {tree} of lib")
    assert rebuilt(config, tmp_path, "lib", commit).result == "published"
    assert post(config, tmp_path, "lib", commit).result == "unchanged"
    assert generation(config) == 1


def test_a_tested_build_that_is_not_above_the_released_one_is_built_again(config, gerrit, tmp_path):
    first = gerrit.propose("lib", 1, {"text": "2"})
    gate(config, tmp_path, ("lib", first))
    post(config, tmp_path, "lib", gerrit.submit("lib", first, "merge"))
    gerrit.push("lib", {"text": "3"})
    rebuilt(config, tmp_path, "lib", gerrit.tip("lib"))
    # the tree of the first change again: its record has a version of then
    back = gerrit.push("lib", {"text": "2"}, "Take it back")
    made = post(config, tmp_path, "lib", back)
    assert made.result == "absent"
    assert made.reason.startswith("what gate run run-1 has tested is not above what is released: lib 1.0+pkg1.2-1+t")
    assert rebuilt(config, tmp_path, "lib", back).result == "published"
    assert generation(config) == 3


def test_a_build_that_the_store_has_lost_is_built_again(config, gerrit, tmp_path):
    first = gerrit.propose("lib", 1, {"text": "2"})
    (entry,) = gate(config, tmp_path, ("lib", first))
    Store(config).remove(entry.record.key, datetime.now(UTC).timestamp() + 60)
    made = post(config, tmp_path, "lib", gerrit.submit("lib", first, "merge"))
    assert (made.result, made.reason) == ("absent", "the build of gate run run-1 is not in the store any more")


def test_a_merge_that_arrives_after_a_later_one_does_not_bring_the_older_package_back(config, gerrit, tmp_path):
    first, second = gerrit.propose("lib", 1, {"text": "2"}), gerrit.propose("lib", 2, {"more": "3"})
    gate(config, tmp_path, ("lib", first))
    (later,) = gate(config, tmp_path, ("lib", first), ("lib", second), run="run-2")
    older = gerrit.submit("lib", first, "merge")
    newer = gerrit.submit("lib", second, "merge")
    assert is_what_was_tested(config, post(config, tmp_path, "lib", newer), later)
    made = post(config, tmp_path, "lib", older)
    assert made.reason == f"lib {later.record.version} of a later merge is released already; nothing changes"
    # nor does one that was built again when the later one came between
    assert rebuilt(config, tmp_path, "lib", older).reason == made.reason
    assert generation(config) == 1


def test_a_package_of_two_projects_is_published_once_both_are_merged_whichever_event_comes(config, gerrit, tmp_path):
    config = waiting(paired(config, gerrit), 0)
    code, packaging = gerrit.propose("lib", 1, {"text": "2"}), gerrit.propose("lib-packaging", 2, {"debian/x": "2"})
    (entry,) = gate(config, tmp_path, ("lib", code), ("lib-packaging", packaging))
    first = gerrit.submit("lib", code, "merge")
    assert post(config, tmp_path, "lib", first).reason.startswith("no gate has tested tree ")
    second = gerrit.submit("lib-packaging", packaging, "cherry-pick")
    assert is_what_was_tested(config, post(config, tmp_path, "lib-packaging", second), entry)
    assert post(config, tmp_path, "lib", first).result == "unchanged"


def test_an_rpm_package_is_published_with_the_bits_that_were_tested_under_a_signature(config, gerrit, tmp_path):
    def rpms(config: Config, sources: Sources, place: Path, _: str) -> Entry:
        release = f"1.pkg1.{sources.count}"
        files = packages.rpmbuilt(place, sources.package, "1.0", release)
        return packages.deliver_rpms(config, sources.package, f"1.0-{release}", files, tree=sources.source.id)

    ref = gerrit.propose("lib", 1, {"text": "2"})
    (entry,) = gate(config, tmp_path, ("lib", ref), target=RPM, build=rpms)
    change = merged("lib", gerrit.submit("lib", ref, "merge"))
    made = [publish_tested(config, RPM, change, tmp_path) for _ in range(2)]
    assert [(one.result, one.tested) for one in made] == [("published", True), ("unchanged", False)]
    assert faults(config, "debianrpm") == []
    (tested,) = entry.directory.glob("*.noarch.rpm")
    (released,) = (root(config, "debianrpm") / "pool" / "lib").glob("*/*.noarch.rpm")
    queries = [
        command("rpm", "-qp", "--qf", "%{SHA256HEADER} %{PAYLOADDIGEST}", "--nosignature", one).stdout
        for one in (tested, released)
    ]
    assert queries[0] == queries[1] != ""


def test_what_is_not_released_is_found_by_the_heads_of_branches(config, gerrit, tmp_path):
    for name in ("held", "gone"):
        trees.commit(gerrit.place / name, trees.deb(name))
        (config.directory / "packages" / f"{name}.yaml").write_text(f"source: {name}\n")
    for project in ("lib", "app", "held"):
        rebuilt(config, tmp_path, project, gerrit.tip(project))
    Repository(config, "rocket", "bookworm").hold("held", "eats disks", 1)
    heads = {project: gerrit.push(project, {"text": "2"}) for project in ("lib", "held")}
    trees.git(gerrit.place / "app", "branch", "-q", "elsewhere")
    (gerrit.place / "gone").rename(gerrit.place / "lost")
    said = unpublished(config, "", tmp_path)
    assert said == "4 packages: 1 builds are missing, 1 on hold, 1 problems"
    found = Unpublished.read(tmp_path / "unpublished.json")
    assert {(one.package, one.commit, one.target, one.hold) for one in found.missing} == {
        ("lib", heads["lib"], DEB, ""),
        ("held", heads["held"], DEB, "eats disks"),
    }
    assert re.fullmatch(r"gone: cannot list the branches of file://.*/gerrit/gone: .*", found.problems[0])
    assert (
        'pkgci_unpublished_packages{release="rocket",codename="bookworm"} 1\n' in (tmp_path / "pkgci.prom").read_text()
    )
    assert unpublished(config, "app", tmp_path) == "1 packages: 0 builds are missing, 0 on hold, 0 problems"


def test_a_package_is_known_by_what_it_is_made_from_whatever_its_name(config, gerrit, tmp_path):
    def named(config: Config, sources: Sources, place: Path, _: str) -> Entry:
        """The packaging gives the source package another name than its file in `packages/`."""
        (place / sources.digest).mkdir(exist_ok=True)
        files = packages.rpmbuilt(place / sources.digest, "LibMixed", "1.0", f"1.pkg1.{sources.count}")
        return packages.deliver_rpms(config, "LibMixed", f"1.0-1.pkg1.{sources.count}", files, tree=sources.source.id)

    ref = gerrit.propose("lib", 1, {"rpm/lib.spec": "2"})
    gate(config, tmp_path, ("lib", ref), target=RPM, build=named)
    change = merged("lib", gerrit.submit("lib", ref, "merge"))
    assert publish_tested(config, RPM, change, tmp_path).result == "published"
    assert "of this merge is released already" in publish_tested(config, RPM, change, tmp_path).reason
    unpublished(config, "lib", tmp_path)
    assert {one.target for one in Unpublished.read(tmp_path / "unpublished.json").missing} == {DEB}
    repository = Repository(config, "rocket", "debianrpm")
    with repository.opened():
        assert repository.index.projects_of("LibMixed") == ["lib"]
    repository.hold("LibMixed", "eats disks", 1)
    change = merged("lib", gerrit.push("lib", {"text": "3"}))
    unpublished(config, "lib", tmp_path)
    (found,) = (one for one in Unpublished.read(tmp_path / "unpublished.json").missing if one.target == RPM)
    assert (found.released, found.hold) == ("1.0-1.pkg1.2", "eats disks")
    with pytest.raises(RequestError, match="LibMixed is on hold since generation 1"):
        publish_tested(config, RPM, change, tmp_path)


def test_a_sibling_is_released_by_its_own_commit_though_a_later_one_has_the_same_tree(config, gerrit, tmp_path):
    config = waiting(config, 0)
    lib, app = gerrit.propose("lib", 1, {"text": "2"}), gerrit.propose("app", 2, {"text": "2"})
    gate(config, tmp_path, ("lib", lib), ("app", app))
    # its event is missed
    commit = gerrit.submit("lib", lib, "fast forward")
    gerrit.push("lib", {"text": "3"})
    head = gerrit.push("lib", {"text": "2"}, "Take it back")
    post(config, tmp_path, "app", gerrit.submit("app", app, "merge"))
    (released,) = released_from(config, "rocket", "bookworm", ["lib"]).values()
    assert [one.commit for one in released[2].commits] == [commit]
    # and the later one, of the same content, is not missing
    assert post(config, tmp_path, "lib", head).result == "unchanged"
    assert unpublished(config, "lib", tmp_path).startswith("1 packages: 0 builds are missing")


def test_a_sibling_that_left_the_configuration_keeps_nobody_back(config, gerrit, tmp_path):
    lib, app = gerrit.propose("lib", 1, {"text": "2"}), gerrit.propose("app", 2, {"text": "2"})
    gate(config, tmp_path, ("lib", lib), ("app", app))
    gerrit.submit("lib", lib, "merge")
    commit = gerrit.submit("app", app, "merge")
    (config.directory / "packages" / "lib.yaml").unlink()
    made = post(Config(config.directory), tmp_path, "app", commit)
    assert (made.result, made.tested) == ("published", True)
    assert made.left[0].startswith("lib for bookworm-amd64: unknown package 'lib'")


def test_a_hold_is_respected_and_a_sibling_that_is_on_hold_stays_behind(config, gerrit, tmp_path):
    config = waiting(config, 0)
    base = {"lib": gerrit.tip("lib"), "app": gerrit.tip("app")}
    for project, commit in base.items():
        rebuilt(config, tmp_path, project, commit)
    changes = {one: gerrit.propose(one, number, {"text": "2"}) for number, one in enumerate(base, start=1)}
    gate(config, tmp_path, *changes.items())
    Repository(config, "rocket", "bookworm").hold("lib", "eats disks", 1)
    commits = {one: gerrit.submit(one, ref, "merge") for one, ref in changes.items()}
    with pytest.raises(RequestError, match="lib is on hold since generation 1 of rocket/bookworm: eats disks"):
        post(config, tmp_path, "lib", commits["lib"])
    made = post(config, tmp_path, "app", commits["app"])
    assert (made.result, made.tested, made.generation) == ("published", True, 3)
    assert "lib is on hold since generation 1" in made.left[0]
    text = (tmp_path / "pkgci.prom").read_text()
    labels = 'release="rocket",codename="bookworm"'
    assert f"pkgci_generation{{{labels}}} 3\n" in text
    assert f"pkgci_held_packages{{{labels}}} 1\n" in text
    # it is as a person wants it
    assert f"pkgci_publication_failures_total{{{labels}}} 0\n" in text
    assert f'pkgci_release_key_expiry_days{{key="{config.settings.released.key}"}} +Inf\n' in text
    assert f"pkgci_last_publication_timestamp_seconds{{{labels}}} {made_at(config):.0f}\n" in text
    sample = r'(# (HELP|TYPE) [a-z_]+ .*|[a-z_]+\{[a-z]+="[A-Za-z0-9.-]+"(,[a-z]+="[a-z0-9.-]+")*\} [0-9.+Inf]+)'
    assert all(re.fullmatch(sample, line) for line in text.splitlines())


def test_what_a_check_built_is_never_released(config, gerrit, tmp_path):
    commit = gerrit.push("lib", {"text": "2"})
    sources = source.fetch(config, merged("lib", commit))
    entry = stored(config, sources, tmp_path)
    unapproved = packages.deliver(
        config,
        "lib",
        entry.record.version,
        DEB,
        entry.record.packages,
        [path for path in entry.directory.iterdir() if path.name != "entry.json"],
        tree=sources.source.id,
        namespace="check",
    )
    with pytest.raises(RequestError, match="was built by a check, of a change that was not approved"):
        publish_build(config, DEB, merged("lib", commit), unapproved, tmp_path)
    assert generation(config) == 0


def test_a_commit_that_is_not_in_the_branch_is_not_published(config, gerrit, tmp_path):
    ref = gerrit.propose("lib", 1, {"text": "2"})
    gate(config, tmp_path, ("lib", ref))
    commit = trees.git(gerrit.place / "lib", "rev-parse", ref)
    with pytest.raises(RequestError, match=f"commit {commit} is not in branch main of lib"):
        post(config, tmp_path, "lib", commit)
    assert generation(config) == 0
