"""What several files of live tests share."""

import pytest
from gerrit_server import Gerrit


@pytest.fixture(scope="session")
def gerrit(tmp_path_factory):
    """A Gerrit in which each test has projects of its own; a topic is submitted as a whole."""
    with Gerrit(tmp_path_factory.mktemp("gerrit"), whole_topic=True) as server:
        yield server
