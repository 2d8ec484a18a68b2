"""What several kinds of tests share."""

import signal

import pytest
from clients import gnupg_home


def pytest_configure() -> None:
    """Let SIGINT have its effect on what tests start: it has none where the tests themselves run in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def gnupg():
    """A home of GnuPG with a key, by its fingerprint; its agent ends with the tests."""
    with gnupg_home() as made:
        yield made
