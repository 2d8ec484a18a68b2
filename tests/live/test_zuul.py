"""From a push to its vote, its gate and its publication, with all servers real."""

import pytest
import trees
from stack import Stack


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    packages = {"full": trees.deb("full"), "quick-lib": trees.deb("quick-lib"), "quick-app": trees.deb("quick-app")}
    with Stack(tmp_path_factory.mktemp("live"), packages) as made:
        yield made


def test_a_review_is_voted_on_with_a_comment_that_says_how_to_try_it(stack):
    number = stack.push("quick-lib", {"README": "one\n"})
    assert stack.voted(number) == 1, stack.said(number)
    said = stack.said(number)
    print(said)
    assert "to try it: " in said
