"""What `pkgci check` makes of a maintainer's tree: a commit of the change, and the targets; the tree is only read."""

import io
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import trees
from rich.console import Console
from trees import commit, git

from pkgci import check, source
from pkgci.change import Parameters
from pkgci.check import LocalChange, gate_targets, options, prepare_change, queue, targets_of
from pkgci.compile import _limits
from pkgci.config import Config, Limits, PackageEntry
from pkgci.errors import PackageError, PkgciError, RequestError


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The embedded default, with all its places in `tmp_path`."""
    return trees.config(
        tmp_path, paths={name: str(tmp_path / "my places" / name) for name in ("cache", "state", "data")}
    )


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A tree without an upstream branch."""
    commit(tmp_path / "small", {**trees.deb(), ".gitignore": "*.o\n"}, "Begin")
    return tmp_path / "small"


@pytest.fixture
def tree(alone: Path, tmp_path: Path) -> Path:
    """A clone that tracks the branch `main`, with one commit more."""
    clone = tmp_path / "work" / "small"
    git(tmp_path, "clone", "-q", alone, clone)
    commit(clone, {"new": "new\n"}, "My change")
    return clone


def refused(kind: type[PkgciError], do) -> str:
    with pytest.raises(PkgciError) as caught:
        do()
    assert type(caught.value) is kind, caught.value
    return str(caught.value)


def content(change: LocalChange) -> dict[str, bytes]:
    return {blob.path: blob.content for blob in source.blobs(change.tree)}


def fetched(config: Config, change: LocalChange) -> source.Sources:
    """Return what a job fetches for the change."""
    sources = source.fetch(config, Parameters.read(change.parameters).change(config))
    assert sources is not None
    return sources


# what the change is


def test_the_change_is_head_against_its_upstream_branch(config, tree):
    change = prepare_change(config, tree, worktree=False)
    assert change.tree.commit == git(tree, "rev-parse", "HEAD")
    assert (change.tree.subject, change.package) == ("My change", "small")
    assert (change.parameters["ZUUL_PROJECT"], change.parameters["ZUUL_BRANCH"]) == ("small", "main")
    previous = fetched(config, change).previous
    assert previous is not None
    assert previous.commit == git(tree, "rev-parse", "origin/main")


def test_a_job_fetches_exactly_what_was_prepared(config, tree):
    change = prepare_change(config, tree, worktree=False)
    sources = fetched(config, change)
    assert sources.local
    assert sources.source.commit == change.tree.commit
    assert sources.count == 2


def test_a_job_fetches_it_from_a_state_directory_with_any_name(tmp_path, tree):
    config = trees.config(
        tmp_path, paths={name: str(tmp_path / "Zustände, %2e #1" / name) for name in ("cache", "state")}
    )
    change = prepare_change(config, tree, worktree=False)
    assert fetched(config, change).source.commit == change.tree.commit


def test_a_tree_as_its_upstream_has_it_is_nothing_to_check(config, tree):
    git(tree, "reset", "-q", "--hard", "origin/main")
    message = refused(RequestError, lambda: prepare_change(config, tree, worktree=False))
    assert message.startswith(f"{tree}: nothing to check: ")
    assert "--worktree" in message


def test_a_tree_behind_its_upstream_is_nothing_to_check(config, alone, tree):
    git(tree, "reset", "-q", "--hard", "origin/main")
    commit(alone, {"later": "later\n"})
    git(tree, "fetch", "-q")
    assert "nothing to check" in refused(RequestError, lambda: prepare_change(config, tree, worktree=False))


def test_a_change_beside_its_upstream_is_merged_with_it(config, alone, tree):
    commit(alone, {"later": "later\n"})
    git(tree, "fetch", "-q")
    change = prepare_change(config, tree, worktree=False)
    assert {"new", "later"} <= set(content(change))
    assert git(tree, "status", "--porcelain") == ""


def test_a_conflict_with_the_upstream_is_the_packages_fault(config, alone, tree):
    commit(alone, {"new": "theirs\n"})
    git(tree, "fetch", "-q")
    message = refused(PackageError, lambda: prepare_change(config, tree, worktree=False))
    assert message == "cannot merge HEAD into main of small: conflict in new"


def test_without_an_upstream_branch_the_whole_tree_is_the_change(config, alone):
    change = prepare_change(config, alone, worktree=False)
    assert change.tree.commit == git(alone, "rev-parse", "HEAD")
    assert fetched(config, change).previous is None


def test_a_branch_that_lost_its_upstream_is_checked_whole(config, tree):
    assert fetched(config, prepare_change(config, tree, worktree=False)).previous
    git(tree, "branch", "--unset-upstream")
    assert fetched(config, prepare_change(config, tree, worktree=False)).previous is None


def test_a_detached_head_is_checked_whole_as_main(config, tree):
    git(tree, "checkout", "-q", "--detach")
    change = prepare_change(config, tree, worktree=False)
    assert change.parameters["ZUUL_BRANCH"] == "main"
    assert fetched(config, change).previous is None


def test_the_branch_is_the_upstreams_not_the_local_one(config, alone, tree):
    git(alone, "branch", "stable/1")
    git(tree, "fetch", "-q")
    git(tree, "checkout", "-q", "-b", "wip", "--track", "origin/stable/1")
    commit(tree, {"new": "new\n"})
    assert prepare_change(config, tree, worktree=False).parameters["ZUUL_BRANCH"] == "stable/1"


def test_a_branch_may_be_followed_by_one_below_its_name(config, alone, tree):
    for branch in ("topic", "topic/one", "topic"):
        git(alone, "branch", "-m", branch)
        git(tree, "fetch", "-q", "--prune")
        git(tree, "branch", "-q", "-u", f"origin/{branch}")
        assert fetched(config, prepare_change(config, tree, worktree=False)).previous


def test_a_directory_in_the_tree_stands_for_the_tree(config, tree):
    assert prepare_change(config, tree / "debian", worktree=False).tree.commit == git(tree, "rev-parse", "HEAD")


def test_a_linked_working_tree_is_checked_with_its_own_head(config, tree, tmp_path):
    git(tree, "worktree", "add", "-q", "-b", "topic", tmp_path / "linked")
    head = commit(tmp_path / "linked", {"linked": "x\n"})
    (tmp_path / "linked" / "more").write_text("more\n")
    assert prepare_change(config, tmp_path / "linked", worktree=False).tree.commit == head
    assert content(prepare_change(config, tmp_path / "linked", worktree=True))["more"] == b"more\n"


def test_a_check_from_a_hook_of_another_repository_takes_the_given_tree(config, alone, tmp_path, monkeypatch):
    git(tmp_path, "init", "-q", "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "other" / ".git" / "index"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
    assert prepare_change(config, alone, worktree=True).tree.commit == git(alone, "rev-parse", "HEAD")


# what is no change


def test_a_directory_without_git_is_refused_with_what_to_do(config, tmp_path):
    message = refused(RequestError, lambda: prepare_change(config, tmp_path, worktree=False))
    assert message.startswith(f"{tmp_path} is not in a git working tree; `git init` it")


def test_a_repository_without_a_commit_is_refused(config, tmp_path):
    git(tmp_path, "init", "-q", "empty")
    for worktree in (False, True):
        message = refused(RequestError, lambda worktree=worktree: prepare_change(config, tmp_path / "empty", worktree))
        assert message == f"{tmp_path}/empty has no commit yet; commit something first"


def test_a_shallow_clone_is_refused_with_what_to_do(config, alone, tmp_path):
    commit(alone, {"second": "x\n"})
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{alone}", "shallow")
    message = refused(RequestError, lambda: prepare_change(config, tmp_path / "shallow", worktree=False))
    assert "`git fetch --unshallow`" in message


def test_a_tree_of_another_user_is_refused_with_what_to_do(config, alone):
    if os.getuid():
        pytest.skip("only root gives files away")
    os.chown(alone, 12345, 12345)
    message = refused(RequestError, lambda: prepare_change(config, alone, worktree=False))
    assert message.startswith(f"{alone} belongs to another user")


@pytest.mark.parametrize("name", ["my package", "päckchen", "-x", "a;id"])
def test_a_directory_whose_name_is_no_projects_is_refused(config, alone, name):
    renamed = alone.rename(alone.with_name(name))
    message = refused(RequestError, lambda: prepare_change(config, renamed, worktree=False))
    assert message == f"{renamed}: {name!r} is no name for a project; rename the directory"


def test_a_branch_whose_name_is_no_parameter_is_refused_at_once(config, alone):
    git(alone, "branch", "-m", "it's")
    message = refused(RequestError, lambda: prepare_change(config, alone, worktree=False))
    assert message.startswith(f'{alone}: branch "it\'s" has a name that the jobs do not take')


# the project


@pytest.mark.parametrize(
    ("url", "project"),
    [
        ("ssh://me@review.example.org:29418/group/hello", "group/hello"),
        ("https://review.example.org/a/group/hello.git", "group/hello"),
        ("git@review.example.org:group/hello.git", "group/hello"),
        ("git@review.example.org:group/hello/", "group/hello"),
        ("review.example.org:hello", "hello"),
        ("https://review.example.org/other/hello", "hello"),
        ("/srv/git/group/hello.git", "group/hello"),
        ("https://[review/group/unknown", "small"),
    ],
)
def test_the_project_is_what_the_remotes_url_ends_in_where_the_configuration_names_it(tmp_path, alone, url, project):
    packages = {"hello": {"source": "hello"}, "grouped": {"source": "group/hello"}}
    config = trees.config(
        tmp_path, packages, paths={"cache": str(tmp_path / "cache"), "state": str(tmp_path / "state")}
    )
    git(alone, "config", "remote.origin.url", url)
    change = prepare_change(config, alone, worktree=False)
    assert change.parameters["ZUUL_PROJECT"] == project
    assert change.package == {"hello": "hello", "group/hello": "grouped", "small": "small"}[project]


def test_projects_may_lie_below_each_other(tmp_path, alone):
    packages = {"outer": {"source": "group"}, "inner": {"source": "group/hello"}}
    config = trees.config(
        tmp_path, packages, paths={"cache": str(tmp_path / "cache"), "state": str(tmp_path / "state")}
    )
    for project in ("group/hello", "group", "group/hello"):
        git(alone, "config", "remote.origin.url", f"https://review.example.org/{project}")
        change = prepare_change(config, alone, worktree=False)
        assert fetched(config, change).source.project == project


# uncommitted work


def snapshot(tree: Path) -> dict[str, bytes]:
    """Return all files of a tree's git, with the working tree's state as git sees it."""
    files = {str(path): path.read_bytes() for path in (tree / ".git").rglob("*") if path.is_file()}
    done = subprocess.run(
        ["git", "-C", tree, "--no-optional-locks", "status", "--porcelain"], check=True, capture_output=True
    )
    return {**files, "status": done.stdout}


def test_uncommitted_work_is_taken_and_the_trees_git_stays_untouched(config, tree):
    (tree / "new").write_text("edited\n")
    (tree / "small").unlink()
    (tree / "untracked dir").mkdir()
    (tree / "untracked dir" / "ü\nx").write_text("untracked\n")
    (tree / "object.o").write_text("ignored\n")
    (tree / "staged").write_text("staged\n")
    git(tree, "add", "staged")
    (tree / "staged").write_text("edited after staging\n")
    (tree / "link").symlink_to("nowhere")
    (tree / "debian" / "rules").chmod(0o644)
    before = snapshot(tree)
    change = prepare_change(config, tree / "debian", worktree=True)
    assert snapshot(tree) == before
    found = content(change)
    assert found["new"] == b"edited\n"
    assert found["untracked dir/ü\nx"] == b"untracked\n"
    assert found["staged"] == b"edited after staging\n"
    assert found["link"] == b"nowhere"
    assert not {"small", "object.o"} & set(found)
    assert source.names(change.tree)["debian/rules"] == "100644"
    assert (change.tree.subject, change.tree.count) == ("Uncommitted work", 3)
    assert fetched(config, change).source.id == change.tree.id


def test_an_ignored_file_that_git_tracks_is_part_of_the_work(config, tree):
    (tree / "tracked.o").write_text("1\n")
    git(tree, "add", "-f", "tracked.o")
    git(tree, "commit", "-q", "-m", "Tracked all the same")
    (tree / "tracked.o").write_text("2\n")
    (tree / "staged.o").write_text("3\n")
    (tree / "removed.o").write_text("4\n")
    git(tree, "add", "-f", "staged.o", "removed.o")
    (tree / "removed.o").unlink()
    found = content(prepare_change(config, tree, worktree=True))
    assert (found["tracked.o"], found["staged.o"]) == (b"2\n", b"3\n")
    assert "removed.o" not in found


def test_names_that_git_would_read_as_patterns_are_names(config, tree):
    for name in ("*.o", ":(top)x.o", ":!y.o"):
        (tree / name).write_text("x\n")
    (tree / "z.o").write_text("ignored\n")
    git(tree, "--literal-pathspecs", "add", "-f", "*.o", ":(top)x.o", ":!y.o")
    found = set(content(prepare_change(config, tree, worktree=True)))
    assert {"*.o", ":(top)x.o", ":!y.o"} <= found
    assert "z.o" not in found


def test_without_the_option_uncommitted_work_is_left_out(config, tree):
    (tree / "new").write_text("edited\n")
    assert content(prepare_change(config, tree, worktree=False))["new"] == b"new\n"


def test_a_clean_working_tree_is_its_head(config, tree):
    assert prepare_change(config, tree, worktree=True).tree.commit == git(tree, "rev-parse", "HEAD")


def test_uncommitted_work_alone_is_a_change(config, tree):
    git(tree, "reset", "-q", "--soft", "origin/main")
    change = prepare_change(config, tree, worktree=True)
    assert content(change)["new"] == b"new\n"


def test_committing_the_work_changes_its_commit_and_not_its_tree(config, tree):
    (tree / "new").write_text("edited\n")
    work = prepare_change(config, tree, worktree=True)
    git(tree, "commit", "-q", "-a", "-m", "Edit")
    committed = prepare_change(config, tree, worktree=False)
    assert work.tree.id == committed.tree.id
    assert work.tree.count == committed.tree.count


# targets

BOTH = ["bookworm-amd64", "debianrpm-amd64"]


def prepared(config: Config, tree: Path, files) -> LocalChange:
    commit(tree, files)
    return prepare_change(config, tree, worktree=False)


@pytest.mark.parametrize(
    ("files", "targets"),
    [
        (trees.deb(), BOTH[:1]),
        (trees.rpm(), BOTH[1:]),
        ({**trees.deb(), **trees.rpm()}, BOTH),
    ],
)
def test_a_tree_is_checked_for_the_targets_that_its_packaging_serves(config, tmp_path, files, targets):
    assert targets_of(config, prepared(config, tmp_path / "small", files), ()) == targets


def test_a_tree_without_packaging_has_nothing_to_build(config, tmp_path):
    change = prepared(config, tmp_path / "small", {"README": "x\n"})
    message = refused(RequestError, lambda: targets_of(config, change, ()))
    assert message.startswith("small has nothing to build: no debian/control or rpm/")


def test_targets_may_be_chosen_and_count_once(config, tmp_path):
    change = prepared(config, tmp_path / "small", {**trees.deb(), **trees.rpm()})
    assert targets_of(config, change, ["debianrpm-amd64", "debianrpm-amd64"]) == ["debianrpm-amd64"]


def test_an_unknown_target_is_refused_with_the_known(config, alone):
    change = prepare_change(config, alone, worktree=False)
    message = refused(RequestError, lambda: targets_of(config, change, ["bookwurm-amd64"]))
    assert message.startswith("unknown target 'bookwurm-amd64'; ")
    assert message.endswith("has: bookworm-amd64, debianrpm-amd64")


def test_a_target_that_the_packaging_does_not_serve_is_refused_with_those_it_does(config, alone):
    change = prepare_change(config, alone, worktree=False)
    message = refused(RequestError, lambda: targets_of(config, change, ["debianrpm-amd64"]))
    assert message == "small has nothing to build for debianrpm-amd64; it serves: bookworm-amd64"


def test_a_release_limits_the_targets_to_its_own(config, alone):
    commit(alone, trees.rpm())
    (config.directory / "releases" / "default.yaml").write_text("branches: [main]\ntargets: [debianrpm-amd64]\n")
    assert targets_of(config, prepare_change(config, alone, worktree=False), ()) == ["debianrpm-amd64"]


def test_a_branch_that_no_release_claims_is_checked_for_the_default_targets_that_are_configured(config, alone):
    commit(alone, trees.rpm())
    (config.directory / "releases" / "default.yaml").write_text("branches: [other]\ntargets: []\n")
    (config.directory / "targets" / "debianrpm-amd64.yaml").unlink()
    assert targets_of(config, prepare_change(config, alone, worktree=False), ()) == ["bookworm-amd64"]


def test_the_source_half_of_a_pair_is_checked_for_all_targets(tmp_path, alone):
    packages = {"small": {"source": "small", "packaging": "small-packaging"}}
    config = trees.config(
        tmp_path, packages, paths={"cache": str(tmp_path / "cache"), "state": str(tmp_path / "state")}
    )
    git(alone, "config", "remote.origin.url", "https://review.example.org/small")
    assert targets_of(config, prepare_change(config, alone, worktree=False), ()) == BOTH


def test_what_a_maintainer_asks_for_becomes_parameters():
    asked = options("lint,compile", ["nocheck", "pkg.x.y", "nocheck"], 90, True)
    assert Parameters.read(asked).values == {
        "ONLY": "lint,compile",
        "BUILD_PROFILES": "nocheck,pkg.x.y",
        "BUILD_MINUTES": "90",
        "REPRODUCIBLE": "true",
        "KEEP_ROOT": "true",
    }
    assert options(again=True)["AGAIN"] == "true"
    assert options() == {"KEEP_ROOT": "true", "REPRODUCIBLE": "false"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"only": "lint,tests"}, "--only: there is no step 'tests'; the steps are: compile, publish, lint"),
        ({"profiles": ["a,b"]}, "--profile: 'a,b' is no name of a build profile"),
        ({"profiles": ["--with"]}, "--profile: '--with' is no name of a build profile"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(wrong, said):
    with pytest.raises(RequestError, match=re.escape(said)):
        options(**wrong)


def test_the_time_limit_that_is_asked_for_stands_over_the_packages_and_nothing_else(tmp_path):
    (tmp_path / "config.yaml").write_text("limits: {disk_mib: 500}\n")
    sources = SimpleNamespace(entry=PackageEntry(source="a", limits=Limits(seconds=100, processes=99)))
    limits = _limits(Config(tmp_path), sources, Parameters.read({"BUILD_MINUTES": "90"}))
    assert limits == Limits(seconds=5400, processes=99, disk_mib=500)


def test_a_subject_that_is_hostile_is_shown_as_it_is_and_not_obeyed():
    shown = io.StringIO()
    check._say(Console(file=shown, force_terminal=True), "checking small (mend [/red] and \x1b[2J)")
    assert shown.getvalue().endswith("checking small (mend [/red] and \\x1b[2J)\n")


# what a queue of several trees is


def test_both_trees_of_a_pair_are_one_build_of_a_queue(tmp_path):
    pair = {"source": "small", "packaging": "small-packaging"}
    config = trees.config(
        tmp_path, {"small": pair}, paths={name: str(tmp_path / name) for name in ("cache", "state", "data")}
    )
    commit(tmp_path / "small", {"small": "#!/bin/sh\n"})
    commit(tmp_path / "small-packaging", trees.deb())
    changes = [prepare_change(config, tmp_path / name, worktree=False) for name in ("small", "small-packaging")]
    [part] = Parameters.read(queue(changes)).queued(config)
    sources = source.fetch(config, part.change(config))
    assert sources is not None
    assert [sources.source.commit, sources.packaging.commit] == [change.tree.commit for change in changes]
    assert gate_targets(config, changes, []) == ["bookworm-amd64", "debianrpm-amd64"]


def test_a_queue_has_each_project_once(config, alone):
    change = prepare_change(config, alone, worktree=False)
    message = refused(RequestError, lambda: queue([change, change]))
    assert message == "two trees are of the project small; name one"


def test_a_queue_is_gated_for_the_targets_that_one_of_its_trees_serves(config, alone, tmp_path):
    commit(tmp_path / "other", {"README": "nothing\n"})
    changes = [prepare_change(config, path, worktree=False) for path in (tmp_path / "other", alone)]
    assert gate_targets(config, changes, []) == ["bookworm-amd64"]
    message = refused(RequestError, lambda: gate_targets(config, changes, ["debianrpm-amd64"]))
    assert message == "nothing to build in other, small"
