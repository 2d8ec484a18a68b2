"""However changes come to their branches, what users get is what the gate has tested: by the real Gerrit and Zuul."""

import pytest
import trees
from stack import DEB, Stack

from pkgci.artifacts import Gate

TYPES = {
    "quick-fast": "FAST_FORWARD_ONLY",
    "quick-merge": "MERGE_ALWAYS",
    "quick-needed": "MERGE_IF_NECESSARY",
    "quick-pick": "CHERRY_PICK",
    "quick-rebase": "REBASE_ALWAYS",
    "quick-rebased": "REBASE_IF_NECESSARY",
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    projects = {name: trees.deb(name) for name in (*TYPES, "quick-chain")}
    files = trees.deb("quick-pair")
    packaging = {name: content for name, content in files.items() if name.startswith("debian/")}
    projects["quick-pair"] = {name: content for name, content in files.items() if name not in packaging}
    projects["quick-pair-packaging"] = packaging
    pairs = {"quick-pair": ("quick-pair", "quick-pair-packaging")}
    gerrit = {"change.submitWholeTopic": "true"}
    with Stack(tmp_path_factory.mktemp("live"), projects, pairs, TYPES, gerrit) as made:
        yield made


def published(stack: Stack, name: str, number: int) -> str:
    """Wait until a merged change is published; return its version, which is that of its gate, and was not built again."""
    result = stack.published(name)
    assert [child.job for child in result.children] == [f"publish-{DEB}"], result.reason
    *_, run = stack.of_change(f"gate-{DEB}", number)
    gated = {one.project: one.version for one in Gate.read(stack.archived(run, "gate.json")).builds}
    version = gated[f"packages/{name}"]
    assert f"{name} {version} at" in result.reason
    return version


def test_each_way_of_submitting_gives_the_tree_and_the_version_that_were_gated(stack):
    numbers = {name: stack.push(name, {"README": "one\n"}) for name in TYPES}
    # the branch moves on: Gerrit has to merge, rebase or pick
    for name in TYPES:
        if name != "quick-fast":
            tree = stack.tree(name)
            trees.git(tree, "checkout", "-q", "--detach", "HEAD~")
            trees.commit(tree, {"NEWS": "other\n"})
            stack.gerrit.push_directly(tree, f"packages/{name}")
    for number in numbers.values():
        assert stack.voted(number) == 1, stack.said(number)
    for number in numbers.values():
        stack.gerrit.approve(number)
    stack.merged(*numbers.values())
    versions = {name: published(stack, name, number) for name, number in numbers.items()}
    expected = {name: "1.0+pkg1.2-1+deb12" if name == "quick-fast" else "1.0+pkg1.3-1+deb12" for name in TYPES}
    assert versions == expected


def test_a_chain_is_merged_in_its_order(stack):
    first = stack.push("quick-chain", {"one": "1\n"}, "One")
    second = stack.push("quick-chain", {"two": "2\n"}, "Two", base="HEAD")
    assert (stack.voted(first), stack.voted(second)) == (1, 1)
    stack.gerrit.approve(second)
    stack.gerrit.approve(first)
    stack.merged(first, second)
    assert published(stack, "quick-chain", second) == "1.0+pkg1.3-1+deb12"


def test_a_source_and_its_packaging_that_need_each_other_are_merged_together(stack):
    source = stack.push("quick-pair", {"data": "1\n"}, "Data")
    packaging = stack.push(
        "quick-pair-packaging",
        {"debian/quick-pair.install": "quick-pair usr/bin\ndata usr/share/quick-pair\n"},
        f"Install the data\n\nDepends-On: {stack.gerrit.url}c/packages/quick-pair/+/{source}",
    )
    assert stack.voted(packaging) == 1, stack.said(packaging)
    assert stack.voted(source) == 1
    stack.gerrit.approve(packaging)
    stack.gerrit.approve(source)
    stack.merged(source, packaging)
    reasons = [stack.published(name).reason for name in ("quick-pair", "quick-pair-packaging")]
    assert "quick-pair 1.0+pkg1.4-1+deb12" in " ".join(reasons)


def test_a_topic_is_tested_and_merged_at_once(stack):
    names = ("quick-merge", "quick-pick")
    numbers = [stack.push(name, {"TOPIC": "1\n"}, "Together", topic="together") for name in names]
    for number in numbers:
        assert stack.voted(number) == 1, stack.said(number)
    for number in numbers:
        stack.gerrit.approve(number)
    stack.merged(*numbers)
    for name, number in zip(names, numbers, strict=True):
        *_, run = stack.of_change(f"gate-{DEB}", number)
        assert sorted(one.package for one in Gate.read(stack.archived(run, "gate.json")).builds) == sorted(names)
        published(stack, name, number)
