"""Source trees, from real git repositories: fetching, merging queues, pairs, histories, and trees that are refused."""

import bz2
import gzip
import io
import lzma
import multiprocessing
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import trees
from trees import commit, git

from pkgci import source
from pkgci.change import Change, Parameters, local_changes
from pkgci.config import Config, PackageEntry
from pkgci.errors import InfrastructureError, PackageError, PkgciError, RequestError

HELLO = {"hello": {"source": "hello"}}
PAIR = {"hello": {"source": "up/hello", "packaging": "packaging/hello"}}
REF = "refs/zuul/main/Z1"


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """A place of projects, as Gerrit is one: `hello` has one commit on `main`."""
    place = tmp_path / "gerrit"
    commit(place / "hello", {"README": "hello\n", "hello.c": "1\n2\n3\n4\n5\n6\n7\n"}, "Begin")
    return place


def configured(place: Path, packages=HELLO, **settings) -> Config:
    """Return a configuration with a cache of its own that takes sources from `place / "gerrit"`."""
    paths = {name: str(place / name) for name in ("cache", "state", "data")}
    return trees.config(place, packages, **{"paths": paths, "sources": [f"file://{place}/gerrit/"], **settings})


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return configured(tmp_path)


def a_change(config: Config, remote: Path, **values: str) -> Change:
    known = {"ZUUL_PROJECT": "hello", "ZUUL_BRANCH": "main", "ZUUL_URL": f"file://{remote}/"}
    return Parameters.read({**known, **values}).change(config)


def fetched(config: Config, remote: Path, **values: str) -> source.Sources:
    sources = source.fetch(config, a_change(config, remote, **values))
    assert sources is not None
    return sources


def refused(kind: type[PkgciError], do) -> str:
    with pytest.raises(PkgciError) as caught:
        do()
    assert type(caught.value) is kind, caught.value
    assert "\n" not in str(caught.value)
    return str(caught.value).encode().decode()


def propose(project: Path, number: int, files, onto: str = "main") -> str:
    """Push a change as Gerrit keeps it; return its ref."""
    ref = f"refs/changes/{number:02}/{number}/1"
    git(project, "checkout", "-q", "--detach", onto)
    commit(project, files, f"Change {number}")
    git(project, "update-ref", ref, "HEAD")
    git(project, "checkout", "-q", "main")
    return ref


def queue(*items: tuple[str, str], branch: str = "main") -> str:
    return "^".join(f"{project}:{branch}:{ref}" for project, ref in items)


def content(tree: source.Tree) -> dict[str, bytes]:
    return {blob.path: blob.content for blob in source.blobs(tree)}


# what is fetched


def test_the_ref_that_zuul_prepared_is_the_state_under_test(config, remote):
    propose(remote / "hello", 1, {"new": "new\n"})
    git(remote / "hello", "update-ref", REF, "refs/changes/01/1/1")
    sources = fetched(config, remote, ZUUL_REF=REF, ZUUL_CHANGE="1", ZUUL_PATCHSET="1")
    assert content(sources.source)["new"] == b"new\n"
    assert (sources.package, sources.pair, sources.local) == ("hello", False, False)
    assert sources.packaging == sources.source
    assert sources.source.subject == "Change 1"
    assert sources.source.project == "hello"


def test_a_prepared_ref_that_is_another_commit_than_zuul_says_is_refused(config, remote):
    git(remote / "hello", "update-ref", REF, "main")
    message = refused(RequestError, lambda: fetched(config, remote, ZUUL_REF=REF, ZUUL_COMMIT="1" * 40))
    assert message.endswith(f"not ZUUL_COMMIT {'1' * 40}")


def test_a_prepared_ref_that_does_not_exist_is_refused(config, remote):
    message = refused(RequestError, lambda: fetched(config, remote, ZUUL_REF=REF))
    assert message == f"file://{remote}/hello has no {REF}"


def test_a_ref_that_is_no_commit_is_refused(config, remote):
    git(remote / "hello", "update-ref", REF, git(remote / "hello", "rev-parse", "HEAD:README"))
    assert "is no commit" in refused(RequestError, lambda: fetched(config, remote, ZUUL_REF=REF))


def test_what_the_branch_has_now_is_the_previous_state(config, remote):
    propose(remote / "hello", 1, {"new": "new\n"})
    git(remote / "hello", "update-ref", REF, "refs/changes/01/1/1")
    tip = commit(remote / "hello", {"later": "later\n"})
    previous = fetched(config, remote, ZUUL_REF=REF).previous
    assert previous is not None
    assert previous.commit == tip


def test_a_branch_that_does_not_exist_yet_has_no_previous_state(config, remote):
    git(remote / "hello", "update-ref", REF, "main")
    assert fetched(config, remote, ZUUL_REF=REF, ZUUL_BRANCH="next").previous is None


def test_a_missing_branch_is_noticed_in_any_language(config, remote, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("LANGUAGE", "de")
    message = refused(RequestError, lambda: fetched(config, remote, ZUUL_BRANCH="none"))
    assert message == f"file://{remote}/hello has no refs/heads/none"


def test_a_remote_that_does_not_answer_is_the_infrastructures_fault(config, remote):
    (remote / "hello").rename(remote / "gone")
    message = refused(InfrastructureError, lambda: fetched(config, remote))
    assert message.startswith(f"cannot fetch refs/heads/main from file://{remote}/hello: ")


def test_an_unknown_project_is_refused_with_where_it_would_be_named(config, remote):
    message = refused(RequestError, lambda: fetched(config, remote, ZUUL_PROJECT="other"))
    assert message == f"unknown project other; no file in {config.directory}/packages names it"


def test_a_branch_that_no_release_claims_has_nothing_to_build(config, remote):
    (config.directory / "releases" / "default.yaml").write_text("branches: [main]\ntargets: []\n")
    assert source.fetch(config, a_change(config, remote, ZUUL_BRANCH="sandbox/x")) is None


def test_without_a_remote_the_missing_setting_is_named(config, remote):
    message = refused(RequestError, lambda: fetched(config, remote, ZUUL_URL=""))
    assert "config.yaml names no `gerrit`" in message


def test_a_change_by_its_number_alone_does_not_pass_as_the_bare_branch(config, remote):
    message = refused(RequestError, lambda: fetched(config, remote, ZUUL_CHANGE="1", ZUUL_PATCHSET="1"))
    assert message == "parameter ZUUL_CHANGES: missing; it says what change 1 is (or ZUUL_REF does)"


def test_a_shallow_remote_is_refused(config, remote):
    commit(remote / "hello", {"second": "2\n"})
    git(remote / "hello", "clone", "-q", "--depth", "1", f"file://{remote}/hello", f"{remote}/shallow")
    (remote / "hello").rename(remote / "whole")
    (remote / "shallow").rename(remote / "hello")
    assert "a shallow clone has no version" in refused(RequestError, lambda: fetched(config, remote))


def test_prepared_refs_come_from_zuul_and_branches_and_changes_from_gerrit(tmp_path, remote):
    zuul = tmp_path / "zuul"
    config = configured(tmp_path, gerrit=f"file://{remote}/", sources=[f"file://{zuul}/"])
    git(tmp_path, "clone", "-q", "--bare", remote / "hello", zuul / "hello")
    git(zuul / "hello", "update-ref", REF, "main")
    tip = commit(remote / "hello", {"later": "later\n"})
    ref = propose(remote / "hello", 1, {"new": "new\n"})
    prepared = fetched(config, zuul, ZUUL_REF=REF)
    rebuilt = fetched(config, zuul, ZUUL_CHANGES=queue(("hello", ref)))
    assert prepared.source.commit == git(zuul / "hello", "rev-parse", REF)
    assert prepared.previous is not None
    assert prepared.previous.commit == tip
    assert {"new", "later"} <= set(content(rebuilt.source))


# queues


def test_the_changes_of_a_queue_are_merged_in_order(config, remote):
    hello = remote / "hello"
    refs = [propose(hello, number, {f"file{number}": "x\n"}) for number in (1, 2, 3)]
    commit(hello, {"later": "later\n"})
    merged = fetched(config, remote, ZUUL_CHANGES=queue(*(("hello", ref) for ref in refs))).source
    assert set(content(merged)) == {"README", "hello.c", "file1", "file2", "file3", "later"}
    subjects = git(merged.repository, "log", "--first-parent", "--format=%s", merged.commit).splitlines()
    assert subjects[:4] == [f"Merge {ref} into main of hello" for ref in reversed(refs)] + ["Change"]


def test_the_same_queue_gives_the_same_commit_on_every_host(tmp_path, remote, monkeypatch):
    refs = [propose(remote / "hello", number, {f"file{number}": "x\n"}) for number in (1, 2)]
    commit(remote / "hello", {"later": "later\n"})
    changes = queue(*(("hello", ref) for ref in refs))
    commits = []
    for host in ("one", "two"):
        home = tmp_path / host
        home.mkdir()
        if host == "two":
            (home / ".gitconfig").write_text(
                "[i18n]\ncommitEncoding = latin1\n[merge]\nrenames = false\n[log]\nshowSignature = true\n"
                "[core]\nattributesFile = ~/attributes\n[user]\nname = Somebody\n"
            )
            (home / "attributes").write_text("* merge=ours\n")
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setenv("TZ", "UTC" if host == "one" else "Asia/Tokyo")
        config = configured(home, sources=[f"file://{remote}/"])
        commits.append(fetched(config, remote, ZUUL_CHANGES=changes).source.commit)
    assert commits[0] == commits[1]


def test_the_order_of_a_queue_matters(config, remote):
    one, two = (propose(remote / "hello", number, {f"file{number}": "x\n"}) for number in (1, 2))
    commit(remote / "hello", {"later": "later\n"})
    forth, back = (
        fetched(config, remote, ZUUL_CHANGES=queue(*(("hello", ref) for ref in refs))).source
        for refs in ((one, two), (two, one))
    )
    assert forth.commit != back.commit
    assert forth.id == back.id


def test_a_change_that_depends_on_the_one_before_it_is_merged_once(config, remote):
    one = propose(remote / "hello", 1, {"one": "x\n"})
    two = propose(remote / "hello", 2, {"two": "x\n"}, onto=one)
    merged = fetched(config, remote, ZUUL_CHANGES=queue(("hello", one), ("hello", two))).source
    assert merged.commit == git(remote / "hello", "rev-parse", two)


def test_a_change_that_is_merged_already_adds_nothing(config, remote):
    one = propose(remote / "hello", 1, {"one": "x\n"})
    git(remote / "hello", "merge", "-q", "--ff-only", one)
    tip = commit(remote / "hello", {"later": "later\n"})
    assert fetched(config, remote, ZUUL_CHANGES=queue(("hello", one))).source.commit == tip


def test_a_conflict_is_the_changes_fault_and_names_change_and_files(config, remote):
    ref = propose(remote / "hello", 1, {"README": "theirs\n", "a\nb": "theirs\n", "other": "x\n"})
    commit(remote / "hello", {"README": "ours\n", "a\nb": "ours\n"})
    message = refused(PackageError, lambda: fetched(config, remote, ZUUL_CHANGES=queue(("hello", ref))))
    assert message == f"cannot merge {ref} into main of hello: conflict in README, 'a\\nb'"


def test_a_conflict_within_the_queue_names_the_later_change(config, remote):
    one, two = (propose(remote / "hello", number, {"README": f"{number}\n"}) for number in (1, 2))
    changes = queue(("hello", one), ("hello", two))
    message = refused(PackageError, lambda: fetched(config, remote, ZUUL_CHANGES=changes))
    assert message.startswith(f"cannot merge {two} into main of hello: conflict in README")


def test_a_change_of_another_history_does_not_merge(config, remote):
    hello = remote / "hello"
    git(hello, "checkout", "-q", "--orphan", "other")
    commit(hello, {"other": "x\n"})
    git(hello, "update-ref", "refs/changes/01/1/1", "HEAD")
    changes = queue(("hello", "refs/changes/01/1/1"))
    message = refused(PackageError, lambda: fetched(config, remote, ZUUL_CHANGES=changes))
    assert "unrelated histories" in message


def test_changes_of_other_projects_and_branches_are_left_out(config, remote):
    hello = remote / "hello"
    git(hello, "branch", "stable")
    other = propose(hello, 1, {"stable": "x\n"}, onto="stable")
    mine = propose(hello, 2, {"mine": "x\n"})
    changes = f"{queue(('unrelated', 'refs/changes/09/9/9'))}^{queue(('hello', other), branch='stable')}"
    merged = fetched(config, remote, ZUUL_CHANGES=f"{changes}^{queue(('hello', mine))}").source
    assert set(content(merged)) == {"README", "hello.c", "mine"}


# pairs


@pytest.fixture
def pair(tmp_path: Path, remote: Path) -> Config:
    """Return a configuration with a pair, whose projects exist."""
    commit(remote / "up" / "hello", {"hello.c": "1\n"}, "Source")
    commit(remote / "packaging" / "hello", {"debian/control": "Source: hello\n"}, "Packaging")
    return configured(tmp_path, PAIR)


@pytest.mark.parametrize("changed", ["up/hello", "packaging/hello"])
def test_a_change_to_either_half_of_a_pair_builds_both(pair, remote, changed):
    ref = propose(remote / changed, 1, {"new": "x\n"})
    sources = fetched(pair, remote, ZUUL_PROJECT=changed, ZUUL_CHANGES=queue((changed, ref)))
    assert (sources.package, sources.pair) == ("hello", True)
    assert ("new" in content(sources.source)) == (changed == "up/hello")
    assert ("new" in content(sources.packaging)) == (changed == "packaging/hello")
    assert sources.count == 3


def test_changes_to_both_halves_of_a_pair_are_built_together(pair, remote):
    up, packaging = (propose(remote / name, 1, {"new": "x\n"}) for name in ("up/hello", "packaging/hello"))
    changes = queue(("up/hello", up), ("packaging/hello", packaging))
    sources = fetched(pair, remote, ZUUL_PROJECT="packaging/hello", ZUUL_CHANGES=changes)
    assert "new" in content(sources.source)
    assert "new" in content(sources.packaging)


def test_the_half_without_a_prepared_ref_is_taken_from_the_branch(pair, remote):
    git(remote / "up" / "hello", "update-ref", REF, "main")
    sources = fetched(pair, remote, ZUUL_PROJECT="up/hello", ZUUL_REF=REF)
    assert sources.packaging.subject == "Packaging"
    assert sources.previous == sources.packaging


def test_a_pair_is_identified_by_both_its_trees(pair, remote):
    before = fetched(pair, remote, ZUUL_PROJECT="up/hello")
    commit(remote / "packaging" / "hello", {"debian/control": "Source: other\n"})
    after = fetched(pair, remote, ZUUL_PROJECT="up/hello")
    assert before.source.id == after.source.id
    assert before.digest != after.digest


def test_the_other_half_of_a_local_change_comes_from_gerrit(pair, remote):
    local = source.init(pair.state / "changes" / "up" / "hello.git")
    git(local, "fetch", "-q", remote / "up" / "hello", f"+main:{REF}")
    values = {"ZUUL_PROJECT": "up/hello", "ZUUL_REF": REF, "ZUUL_URL": local_changes(pair)}
    message = refused(RequestError, lambda: fetched(pair, remote, **values))
    assert message.startswith("cannot fetch packaging/hello: config.yaml names no `gerrit`")
    settings = pair.directory / "config.yaml"
    settings.write_text(f"{settings.read_text()}gerrit: file://{remote}/\n")
    sources = fetched(Config(pair.directory), remote, **values)
    assert sources.local
    assert sources.packaging.subject == "Packaging"


# after the merge


def test_after_a_merge_the_merged_commit_is_built_not_what_came_later(config, remote):
    merged = commit(remote / "hello", {"merged": "x\n"})
    tip = commit(remote / "hello", {"later": "x\n"})
    sources = fetched(config, remote, ZUUL_BRANCH="", ZUUL_REFNAME="refs/heads/main", ZUUL_NEWREV=merged)
    assert sources.source.commit == merged
    assert sources.previous is not None
    assert sources.previous.commit == tip


@pytest.mark.parametrize("known", [True, False])
def test_a_commit_that_is_not_in_the_branch_is_not_merged(config, remote, known):
    elsewhere = "1" * 40
    if known:
        elsewhere = git(remote / "hello", "rev-parse", propose(remote / "hello", 1, {"x": "x\n"}))
        fetched(config, remote, ZUUL_REF="refs/changes/01/1/1")
    message = refused(RequestError, lambda: fetched(config, remote, ZUUL_NEWREV=elsewhere))
    assert message == f"commit {elsewhere} is not in branch main of hello"


# local changes


def test_a_local_change_needs_no_entry_in_the_configuration(tmp_path, remote):
    config = configured(tmp_path, {})
    local = source.init(config.state / "changes" / "Hello.git")
    git(local, "fetch", "-q", remote / "hello", f"+main:{REF}")
    sources = fetched(config, remote, ZUUL_PROJECT="Hello", ZUUL_REF=REF, ZUUL_URL=local_changes(config))
    assert (sources.package, sources.entry, sources.local) == ("hello", PackageEntry(source="Hello"), True)
    assert sources.previous is None


# what does not run, what is shared


def test_nothing_of_a_tree_is_checked_out_and_no_filter_or_hook_runs(tmp_path, config, remote, monkeypatch):
    ran = tmp_path / "ran"
    evil = tmp_path / "evil"
    trees.write(evil, {"run": f"#!/bin/sh\ntouch {ran}\ncat\n"})
    for hook in ("post-checkout", "post-merge", "reference-transaction", "post-index-change"):
        (evil / hook).symlink_to("run")
    (tmp_path / ".gitconfig").write_text(
        f'[filter "evil"]\nclean = {evil}/run\nsmudge = {evil}/run\n[merge "evil"]\ndriver = {evil}/run\n'
        f'[diff "evil"]\ntextconv = {evil}/run\n[core]\nhooksPath = {evil}\n'
    )
    attributes = {".gitattributes": "* filter=evil merge=evil diff=evil\n"}
    commit(remote / "hello", attributes)
    ref = propose(remote / "hello", 1, {"hello.c": "one\n2\n3\n4\n5\n6\n7\n"})
    commit(remote / "hello", {"hello.c": "1\n2\n3\n4\n5\n6\nseven\n"})
    monkeypatch.setenv("HOME", str(tmp_path))
    merged = fetched(config, remote, ZUUL_CHANGES=queue(("hello", ref))).source
    assert content(merged)["hello.c"] == b"one\n2\n3\n4\n5\n6\nseven\n"
    assert git(merged.repository, "rev-parse", "--is-bare-repository") == "true"
    assert not (merged.repository / "index").exists()
    assert not any((merged.repository / "hooks").glob("*"))
    assert not ran.exists()


def test_a_step_that_runs_in_a_hook_of_git_is_not_led_to_its_repository(tmp_path, config, remote, monkeypatch):
    tip = git(remote / "hello", "rev-parse", "main")
    git(tmp_path, "init", "-q", "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "other" / ".git" / "index"))
    assert fetched(config, remote).source.commit == tip
    assert git(tmp_path / "other", "count-objects") == "0 objects, 0 kilobytes"


def test_several_processes_fetch_into_one_fresh_cache(config, remote):
    refs = [propose(remote / "hello", number, {f"file{number}": "x\n"}) for number in (1, 2)]
    commit(remote / "hello", {"later": "later\n"})
    change = a_change(config, remote, ZUUL_CHANGES=queue(*(("hello", ref) for ref in refs)))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.starmap(source.fetch, [(config, change)] * 8)
    assert {sources.source.commit for sources in found} == {found[0].source.commit}
    assert [path.name for path in (config.cache / "git").iterdir()] == ["hello.git"]


def test_a_fetch_gets_only_what_is_new(config, remote):
    def objects(repository: Path) -> int:
        counted = dict(line.split(": ") for line in git(repository, "count-objects", "-v").splitlines())
        return int(counted["count"]) + int(counted["in-pack"])

    commit(remote / "hello", {f"file{number}": f"{number}\n" for number in range(150)})
    before = objects(fetched(config, remote).source.repository)
    commit(remote / "hello", {"new": "x\n"})
    assert objects(fetched(config, remote).source.repository) == before + 3


def test_a_fetch_leaves_no_refs_that_grow_in_number(config, remote):
    for number in range(3):
        ref = propose(remote / "hello", number, {"new": f"{number}\n"})
        repository = fetched(config, remote, ZUUL_REF=ref).source.repository
    assert len(git(repository, "for-each-ref").splitlines()) == 2


# versions


def test_count_and_date_are_the_same_however_the_same_changes_were_merged(config, remote):
    hello = remote / "hello"
    for number in (1, 2):
        onto = "main" if number == 1 else "refs/changes/01/1/1"
        propose(hello, number, {f"file{number}": "x\n"}, onto)
    git(hello, "checkout", "-q", "--detach", "refs/changes/02/2/1")
    git(hello, "commit", "-q", "--amend", "--no-edit", "--date", "1800000000 +0900")
    git(hello, "branch", "series")
    git(hello, "checkout", "-q", "-b", "base", "main")
    commit(hello, {"later": "later\n"})
    for name in ("merge", "rebase", "pick"):
        git(hello, "branch", name, "base")
    git(hello, "checkout", "-q", "merge")
    git(hello, "merge", "-q", "--no-ff", "series")
    git(hello, "checkout", "-q", "-B", "rebase", "series")
    git(hello, "rebase", "-q", "base")
    git(hello, "checkout", "-q", "pick")
    git(hello, "cherry-pick", "main..series")
    git(hello, "checkout", "-q", "-b", "forward", "rebase")
    states = [fetched(config, remote, ZUUL_BRANCH=name).source for name in ("merge", "rebase", "pick", "forward")]
    assert len({state.commit for state in states}) > 1
    assert {(state.id, state.count, state.date) for state in states} == {(states[0].id, 4, 1_800_000_000)}


def test_a_commits_strange_subject_is_one_line(config, remote):
    for message, subject in (("a\x85b\x0bc\u2028d", "a\x85b\x0bc\u2028d"), ("one\ntwo\n\nthree", "one two")):
        commit(remote / "hello", {}, message)
        assert fetched(config, remote).source.subject == subject


# what is in a tree


def tree_of(remote: Path, files) -> source.Tree:
    return source.tree(remote / "hello", "hello", commit(remote / "hello", files))


def test_symbolic_links_and_executables_come_back_as_such(remote):
    hello = remote / "hello"
    (hello / "link").symlink_to("../../etc/passwd")
    tree = tree_of(remote, {"run": "#!/bin/sh\n"})
    found = {blob.path: (blob.mode, blob.content) for blob in source.blobs(tree, ["link", "run", "README", "none"])}
    assert found == {
        "link": ("120000", b"../../etc/passwd"),
        "run": ("100755", b"#!/bin/sh\n"),
        "README": ("100644", b"hello\n"),
    }


STRANGE = [
    "a b",
    "ü/日本",
    "q\"uo'te",
    "back\\slash",
    "line\nbreak",
    ".hidden",
    "-dash",
    "--",
    "tab\t",
    "*",
    ":(top)x",
    "\udcff",
]


def test_files_with_strange_names_come_back_whole(remote):
    files = {name: f"{number}\n\0".encode() for number, name in enumerate(STRANGE)}
    tree = tree_of(remote, files)
    assert content(tree).items() >= files.items()
    assert {blob.path for blob in source.blobs(tree, STRANGE)} == set(STRANGE)


def test_empty_and_large_files_come_back_whole(remote):
    files = {"empty": b"", "large": os.urandom(3 << 20), "no-newline": b"x"}
    assert content(tree_of(remote, files)).items() >= files.items()


def test_what_was_not_read_of_a_file_is_not_in_the_next_one(remote):
    large = source.CONTENT_BYTES + 1
    files = {"one": b"1" * large, "two": b"2" * large}
    tree = tree_of(remote, files)
    assert [(blob.path, blob.stream.read(2)) for blob in source.blobs(tree, list(files))] == [
        ("one", b"11"),
        ("two", b"22"),
    ]


def test_the_content_of_a_file_outlives_the_reading_of_the_tree(remote):
    tree = tree_of(remote, {"one": b"1" * source.CONTENT_BYTES})
    assert next(source.blobs(tree, ["one"])).content == b"1" * source.CONTENT_BYTES


def test_an_object_that_the_repository_lacks_is_the_machines_fault(remote):
    tree = tree_of(remote, {"lost": b"lost\n"})
    lost = git(remote / "hello", "rev-parse", "HEAD:lost")
    (remote / "hello" / ".git" / "objects" / lost[:2] / lost[2:]).unlink()
    message = refused(InfrastructureError, lambda: content(tree))
    assert message.endswith(f"object {lost} is missing or damaged; remove that directory")


# what is refused in a tree


def checked(config: Config, remote: Path, files, allow: tuple[str, ...] = ()) -> None:
    entry = PackageEntry(source="hello", allow=allow)
    source.refuse_unfit(config, tree_of(remote, files), entry, "hello")


def tarball(top: str, format: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar archive of a release, as an upstream makes one."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        directory = tarfile.TarInfo(top)
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        file = tarfile.TarInfo(f"{top}/README")
        file.size = 6
        archive.addfile(file, io.BytesIO(b"hello\n"))
    return stream.getvalue()


RELEASE = tarball("hello-2.10")
DEB = b"!<arch>\ndebian-binary   1700000000  0     0     100644  4         `\n2.0\n"
RPM = b"\xed\xab\xee\xdb\x03\x00\x00\x00" + bytes(88)
DSC = f"""-----BEGIN PGP SIGNED MESSAGE-----
Hash: SHA512

Format: 3.0 (quilt)
Source: hello
Package-List:
{" hello deb misc optional arch=any" * 300}
Checksums-Sha256:
 {"a" * 64} 1000 hello_2.10.orig.tar.gz
"""


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"hello_2.10.orig.tar.gz": b"anything"}, "hello_2.10.orig.tar.gz is an orig tarball"),
        ({"deep/hello_2.10.orig-docs.tar.xz": b"x"}, "deep/hello_2.10.orig-docs.tar.xz is an orig tarball"),
        ({"data/blob.dat": gzip.compress(RELEASE)}, "data/blob.dat is a release tarball of hello itself"),
        ({"rpm/source": gzip.compress(RELEASE)}, "rpm/source is a release tarball of hello itself"),
        ({"x.xz": lzma.compress(RELEASE)}, "x.xz is a release tarball"),
        ({"x.bz2": bz2.compress(RELEASE)}, "x.bz2 is a release tarball"),
        ({"x.tar": RELEASE}, "x.tar is a release tarball"),
        ({"x": tarball("./hello-2.10", tarfile.GNU_FORMAT)}, "x is a release tarball"),
        ({"x": tarball("hello_v2.10", tarfile.USTAR_FORMAT)}, "x is a release tarball"),
        ({"x": tarball(f"Hello-2.10/{'long/' * 40}")}, "x is a release tarball"),
        ({"x": tarball(f"hello-2.10/{'l' * 120}/y", tarfile.USTAR_FORMAT)}, "x is a release tarball"),
        ({"x": tarball(f"hello-2.10/{'long/' * 40}", tarfile.GNU_FORMAT)}, "x is a release tarball"),
        ({"tests/a.deb": DEB}, "tests/a.deb is a Debian binary package"),
        ({"tests/a.dat": DEB}, "tests/a.dat is a Debian binary package"),
        ({"tests/a.dat": RPM}, "tests/a.dat is an RPM package"),
        ({"hello_2.10-1.dsc": DSC}, "hello_2.10-1.dsc is a Debian source control file"),
        ({"renamed": DSC}, "renamed is a Debian source control file"),
        (
            {"logo.png": "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n"},
            "logo.png is a git LFS pointer",
        ),
        ({".gitattributes": "*.txt text\nversion.h export-subst\n"}, ".gitattributes sets export-subst or a filter"),
        ({"sub/.gitattributes": "[attr]big filter=lfs -text\n"}, "sub/.gitattributes sets export-subst or a filter"),
        ({"\udcff\n": DEB}, "'\\udcff\\n' is a Debian binary package"),
    ],
)
def test_what_does_not_belong_in_a_source_tree_is_refused_with_its_path(config, remote, files, message):
    assert refused(PackageError, lambda: checked(config, remote, files)).startswith(f"hello: {message}")


def test_a_release_made_by_git_itself_is_recognized(config, remote):
    made = ["git", "-C", remote / "hello", "archive", "--format=tar.gz", "--prefix=hello-2.10/", "main"]
    archive = subprocess.run(made, check=True, capture_output=True).stdout
    assert "is a release tarball" in refused(PackageError, lambda: checked(config, remote, {"x": archive}))


def test_a_release_in_the_oldest_tar_format_is_recognized(config, remote, tmp_path):
    trees.write(tmp_path, {"hello-2.10/README": "x\n"})
    made = ["tar", "--format=v7", "-C", tmp_path, "-c", "hello-2.10"]
    archive = subprocess.run(made, check=True, capture_output=True).stdout
    assert "is a release tarball" in refused(PackageError, lambda: checked(config, remote, {"x": archive}))


@pytest.mark.parametrize(
    "files",
    [
        {"tests/other.tar.gz": gzip.compress(tarball("other-1.0"))},
        {"tests/data.tar.gz": gzip.compress(tarball("hello-data"))},
        {"tests/cut.gz": gzip.compress(RELEASE)[:40]},
        {"tests/cut.xz": lzma.compress(RELEASE)[:30]},
        {"tests/cut.tar": RELEASE[:500]},
        {"tests/zeros": bytes(2048)},
        {
            ".gitattributes": "# a filter=x would be refused\n  # export-subst\n*.c diff=cpp -filter !export-subst text\n"
        },
        {
            "debian/copyright": "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\nFiles: *\n"
        },
        {"doc/formats": "Format: 1.0\nFiles: none\n"},
        {"doc/orig.tar.gz.txt": "hello_2.10.orig.tar.gz is made from the tree\n"},
    ],
)
def test_what_only_looks_like_it_passes(config, remote, files):
    checked(config, remote, files)


def test_a_symbolic_link_is_not_what_its_name_says(config, remote):
    (remote / "hello" / "hello_2.10.orig.tar.gz").symlink_to("README")
    checked(config, remote, {})


def test_test_data_passes_where_it_is_allowed_and_nowhere_else(config, remote):
    allow = ("tests/data", "one.deb")
    checked(config, remote, {"tests/data/a.deb": DEB, "tests/data/deep/b": RPM, "one.deb": DEB}, allow)
    for path in ("tests/data2/a.deb", "tests/a.deb", "deep/one.deb", "one.deb2"):
        message = refused(PackageError, lambda path=path: checked(config, remote, {path: DEB}, allow))
        assert message.startswith(f"hello: {path} is a Debian binary package")
        (remote / "hello" / path).unlink()


def test_a_tree_that_passed_is_looked_at_anew_with_other_rules(config, remote):
    checked(config, remote, {"a.deb": DEB}, allow=("a.deb",))
    assert refused(PackageError, lambda: checked(config, remote, {}))


def test_a_file_that_must_be_read_as_a_whole_is_refused_where_it_is_too_large(config, remote):
    tree = tree_of(remote, {".gitattributes": b"#" * (source.CONTENT_BYTES + 1)})
    message = refused(PackageError, lambda: source.refuse_unfit(config, tree, PackageEntry(source="hello"), "hello"))
    assert message == ".gitattributes has more than 16 MiB, too much for what it is"


def test_a_submodule_is_refused(remote):
    hello = remote / "hello"
    git(hello, "update-index", "--add", "--cacheinfo", f"160000,{git(hello, 'rev-parse', 'HEAD')},sub")
    git(hello, "commit", "-q", "-m", "Submodule")
    tree = source.tree(hello, "hello", "main")
    message = refused(PackageError, lambda: source.names(tree))
    assert message == "hello: sub is a submodule; the tree must hold the whole source"


def test_a_path_that_leads_out_of_the_tree_is_refused(remote):
    """No git command writes such a tree; a hostile one does."""
    hello = remote / "hello"
    blob = git(hello, "rev-parse", "HEAD:README")
    for name in ("..", ".", ".git"):
        raw = b"100644 %s\0%s" % (name.encode(), bytes.fromhex(blob))
        made = ["git", "-C", hello, "hash-object", "-t", "tree", "--literally", "-w", "--stdin"]
        tree = subprocess.run(made, input=raw, check=True, capture_output=True).stdout.decode().strip()
        evil = source.tree(hello, "hello", git(hello, "commit-tree", tree, "-m", "Evil"))
        assert f"the path {name} is not allowed" in refused(PackageError, lambda evil=evil: source.names(evil))
