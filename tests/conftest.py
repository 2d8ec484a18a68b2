"""What several kinds of tests share."""

import tempfile

import pytest
from clients import run


@pytest.fixture(scope="session")
def gnupg():
    """A home of GnuPG with a key, by its fingerprint; its agent ends with the tests."""
    # the path of an agent's socket must be short
    with tempfile.TemporaryDirectory(prefix="pkgci-t-", dir="/tmp") as home:
        words = ["gpg", "--homedir", home, "--batch", "--passphrase", ""]
        run(*words, "--quick-generate-key", "Released <released@example.org>", "rsa3072", "sign", "never")
        listed = run(*words, "--with-colons", "--list-keys").stdout.splitlines()
        yield home, next(line.split(":")[9] for line in listed if line.startswith("fpr:"))
        run("gpgconf", "--homedir", home, "--kill", "gpg-agent")
