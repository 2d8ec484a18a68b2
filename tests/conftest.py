"""What several kinds of tests share."""

import pytest
from clients import gnupg_home


@pytest.fixture(scope="session")
def gnupg():
    """A home of GnuPG with a key, by its fingerprint; its agent ends with the tests."""
    with gnupg_home() as made:
        yield made
