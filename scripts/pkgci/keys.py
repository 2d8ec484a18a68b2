"""The key that signs test repositories: made at its first use, without a passphrase, worth nothing elsewhere.

The keys of released repositories are none of this module's business.
"""

import base64
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from pkgci.command import run
from pkgci.config import Config
from pkgci.errors import InfrastructureError
from pkgci.locks import locked, scratch

# RSA: what apt, rpm and dnf of all distributions in use verify. Long ago: when a clock that was ahead is set back, GnuPG
# refuses a key from the future
PARAMETERS = b"""%no-protection
Key-Type: RSA
Key-Length: 3072
Key-Usage: sign
Creation-Date: 20200101T000000
Name-Real: pkgci test repositories
Name-Comment: throw-away key of one machine
Expire-Date: 0
%commit
"""
SECONDS = 120
# short, whatever TMPDIR says: see _home
HOMES = Path("/tmp")  # noqa: S108 - each home below it is made by mkdtemp(3)
HOME = "pkgci-gpg-"


def dearmoured(key: str) -> bytes:
    """Return the binary form of an ASCII-armoured key (RFC 9580, 6.2)."""
    lines = key.split("\n\n", 1)[1].splitlines()
    return base64.b64decode("".join(line for line in lines if not line.startswith(("=", "-"))))


def verified(public_key: str, *files: Path) -> bytes:
    """Return what an ASCII-armoured key has signed in a clear-signed file; nothing of a signature and its data (gpgv(1)).

    Raises:
        InfrastructureError: the signature is not good.
    """
    with tempfile.NamedTemporaryFile(prefix="pkgci-") as keyring:
        keyring.write(dearmoured(public_key))
        keyring.flush()
        return run(["gpgv", "--keyring", keyring.name, "--output", "-", *files], timeout=SECONDS, quiet=True).stdout


class SigningKey:
    """The test key below the configured data directory.

    Raises:
        InfrastructureError: (from any member) GnuPG fails, or a signature is not good.
    """

    def __init__(self, config: Config) -> None:
        self._place = config.data / "keys" / "test"

    def export_public(self) -> str:
        """Return the public key, ASCII-armoured."""
        return (self.directory / "public.asc").read_text()

    def clearsign(self, text: bytes) -> bytes:
        """Return `text` with a signature around it: an `InRelease` file of a `Release` file."""
        return self._sign("--clearsign", text)

    def detach_sign(self, data: bytes) -> bytes:
        """Return an ASCII-armoured signature of `data`: a `Release.gpg` or `repomd.xml.asc`."""
        return self._sign("--detach-sign", data)

    def verify(self, *files: Path) -> bytes:
        """Return what is signed by this key in a clear-signed file, or in a signature and its data; see gpgv(1)."""
        keyring = self.directory / "public.gpg"
        return run(["gpgv", "--keyring", keyring, "--output", "-", *files], timeout=SECONDS, quiet=True).stdout

    @cached_property
    def directory(self) -> Path:
        """Where the key lies: `private-keys-v1.d/`, `public.gpg`, `public.asc`."""
        if not self._place.exists():
            parent = self._place.parent
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked(parent):
                if not self._place.exists():
                    self._generate()
        return self._place

    def _generate(self) -> None:
        new = self._place.with_name("test.new")
        shutil.rmtree(new, ignore_errors=True)
        private = new / "private-keys-v1.d"
        private.mkdir(mode=0o700, parents=True)
        with _home(private) as (agent, gpg):
            run([*agent, *gpg, "--generate-key"], input=PARAMETERS, timeout=SECONDS)
            (new / "public.gpg").write_bytes(run([*gpg, "--export"], timeout=SECONDS, quiet=True).stdout)
            (new / "public.asc").write_bytes(run([*gpg, "--armor", "--export"], timeout=SECONDS, quiet=True).stdout)
        new.rename(self._place)

    def _sign(self, how: str, data: bytes) -> bytes:
        keyring = self.directory / "public.gpg"
        with _home(self.directory / "private-keys-v1.d") as (agent, gpg):
            argv = [*agent, *gpg, "--no-default-keyring", "--keyring", keyring, "--armor", how]
            signature = run(argv, input=data, timeout=SECONDS, quiet=True).stdout
        if not signature:
            raise InfrastructureError(f"gpg {how} with {self._place}: no signature came out")
        return signature


@contextmanager
def _home(private: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the beginning of a command line that needs the private keys (once), and that of gpg, with a home of its own.

    The home is short-lived and its path short: an agent's socket lies in it, whose path may not have more than 107
    bytes, and an agent that two users share would be ended by the first one.
    """
    with scratch(HOMES, HOME) as home:
        (home / private.name).symlink_to(private.absolute())
        try:
            # an agent started like this ends, if soon after, with the command for which it was started
            agent = ["gpg-agent", "--homedir", home, "--quiet", "--daemon"]
            yield agent, ["gpg", "--homedir", home, "--batch", "--quiet", "--trust-model", "always"]
        finally:
            run(["gpgconf", "--homedir", home, "--kill", "gpg-agent"], check=False, timeout=SECONDS, quiet=True)
