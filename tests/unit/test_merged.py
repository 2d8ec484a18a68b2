"""What is merged: asked of a real remote, however it came to be there."""

import subprocess
from pathlib import Path

import pytest
import trees

from pkgci import merged
from pkgci.config import Config
from pkgci.errors import InfrastructureError, RequestError


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """A work tree of the project that the remote is, too: who pushes there is not what this is about."""
    tree = tmp_path / "gerrit" / "hello"
    trees.commit(tree, {"text": "1"})
    return tree


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return trees.config(
        tmp_path,
        gerrit=f"file://{tmp_path}/gerrit/",
        paths={"data": str(tmp_path / "data"), "cache": f"{tmp_path}/cache"},
    )


def branch(config: Config, name: str = "main") -> merged.Branch:
    return merged.Branch(config, "hello", name)


def tree_of(work: Path, commit: str = "HEAD") -> str:
    return trees.git(work, "rev-parse", f"{commit}^{{tree}}")


def test_a_commit_is_merged_once_the_remote_branch_has_it_as_a_fast_forward(config, remote):
    trees.git(remote, "checkout", "-q", "-b", "topic")
    commit = trees.commit(remote, {"text": "2"})
    assert not branch(config).has(commit)
    trees.git(remote, "checkout", "-q", "main")
    trees.git(remote, "merge", "-q", "--ff-only", "topic")
    assert branch(config).has(commit)


def test_a_commit_is_merged_once_the_remote_branch_has_it_in_a_merge_commit(config, remote):
    trees.git(remote, "checkout", "-q", "-b", "topic")
    commit = trees.commit(remote, {"text": "2"})
    trees.git(remote, "checkout", "-q", "main")
    trees.commit(remote, {"other": "x"}, "meanwhile")
    trees.git(remote, "merge", "-q", "--no-ff", "-m", "merge", "topic")
    assert branch(config).has(commit)


def test_a_branch_of_the_cache_or_another_branch_of_the_remote_does_not_count(config, remote):
    trees.git(remote, "checkout", "-q", "-b", "other")
    commit = trees.commit(remote, {"text": "2"})
    assert branch(config, "other").has(commit)
    subprocess.run(
        ["git", "-C", config.cache / "git" / "hello.git", "update-ref", "refs/heads/main", commit], check=True
    )
    assert not branch(config).has(commit)


def test_a_branch_that_the_remote_does_not_have_has_nothing(config, remote):
    none = branch(config, "none")
    assert (none.tip, none.has(trees.git(remote, "rev-parse", "HEAD")), none.commit_of(tree_of(remote))) == (
        None,
        False,
        None,
    )


def test_a_tree_that_comes_back_is_told_from_its_former_self_by_the_count_of_commits(config, remote):
    first, again = trees.git(remote, "rev-parse", "HEAD"), tree_of(remote)
    trees.commit(remote, {"text": "2"})
    assert branch(config).commit_of(again, 3) is None
    third = trees.commit(remote, {"text": "1"}, "take it back")
    asked = branch(config)
    assert (asked.commit_of(again), asked.commit_of(again, 3), asked.commit_of(again, 1)) == (third, third, first)


def test_a_remote_that_does_not_answer_is_the_infrastructures_fault(config, remote):
    remote.rename(remote.with_name("gone"))
    with pytest.raises(InfrastructureError, match="cannot fetch refs/heads/main from"):
        branch(config)


@pytest.mark.parametrize("name", ["--upload-pack=x", "a b", ""])
def test_what_is_no_name_of_a_branch_is_refused(config, name):
    with pytest.raises(RequestError, match="is no name of a branch"):
        branch(config, name)


@pytest.mark.parametrize("commit", ["HEAD", "-x", "a" * 39])
@pytest.mark.usefixtures("remote")
def test_what_is_no_full_commit_id_is_refused(config, commit):
    with pytest.raises(RequestError, match="is not a full commit id"):
        branch(config).has(commit)


def test_a_remote_of_a_protocol_that_runs_commands_is_refused(tmp_path):
    config = trees.config(tmp_path)
    settings = config.settings.model_copy(update={"gerrit": f"ext::touch {tmp_path}/executed #"})
    config.__dict__["settings"] = settings
    with pytest.raises(InfrastructureError, match="cannot fetch"):
        branch(config)
    assert not (tmp_path / "executed").exists()
