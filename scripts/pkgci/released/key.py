"""The key of released repositories: named by its fingerprint, held by a gpg-agent, never read by this program."""

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

from pkgci.command import run
from pkgci.config import Config
from pkgci.errors import InfrastructureError, RequestError
from pkgci.text import printable

SECONDS = 120
WARNING = timedelta(days=60)


class ReleaseKey:
    """The configured key.

    Args:
        config: the configuration.
        place: a directory of our own for what is derived from the public key.

    Raises:
        RequestError: the configuration names no key.
        InfrastructureError: (from any member) GnuPG or rpm fails, or a signature is not good.
    """

    def __init__(self, config: Config, place: Path) -> None:
        released = config.settings.released
        if released is None:
            raise RequestError(f"{config.directory / 'config.yaml'}: released repositories are not configured")
        self.fingerprint, self._home, self._place = released.key, Path(released.gnupg_home), place
        self._gpg = ["gpg", "--homedir", str(self._home), "--batch", "--quiet", "--no-auto-check-trustdb"]
        self._gpg += ["--trust-model", "always"]

    def clearsign(self, text: bytes) -> bytes:
        """Return `text` with a signature around it."""
        return self._sign("--clearsign", text)

    def detach_sign(self, data: bytes) -> bytes:
        """Return an ASCII-armoured signature of `data`."""
        return self._sign("--detach-sign", data)

    def sign_both(self, text: bytes) -> tuple[bytes, bytes]:
        """Return `text` clear-signed, and a signature of it; both are made at once."""
        with ThreadPoolExecutor(max_workers=2) as pool:
            signed, detached = pool.submit(self.clearsign, text), pool.submit(self.detach_sign, text)
            return signed.result(), detached.result()

    def verify_both(self, signed: Path, signature: Path, data: Path) -> bytes:
        """Verify a clear-signed file, and a signature and its data, at once; return what is signed in the former."""
        with ThreadPoolExecutor(max_workers=2) as pool:
            content, other = pool.submit(self.verify, signed), pool.submit(self.verify, signature, data)
            other.result()
            return content.result()

    def verify(self, *files: Path) -> bytes:
        """Return what is signed by this key in a clear-signed file, or in a signature and its data; see gpgv(1)."""
        return run(["gpgv", "--keyring", self.keyring, "--output", "-", *files], timeout=SECONDS, quiet=True).stdout

    @cached_property
    def public(self) -> str:
        """The public key, ASCII-armoured."""
        return (self._derived / "key.asc").read_text()

    @cached_property
    def keyring(self) -> Path:
        """The public key as a keyring file."""
        return self._derived / "keyring.gpg"

    @property
    def owner(self) -> str:
        """Whose it is: the user id that it names first, `NAME <ADDRESS>`."""
        found = next((fields[9] for fields in self._listed() if fields[0] == "uid"), "")
        return printable(found) or "unknown"

    @property
    def expires(self) -> datetime | None:
        """When it expires, or the key that it is a subkey of; None for never."""
        times, last = set(), ""
        for fields in self._listed():
            if fields[0] in ("pub", "sub"):
                last = fields[6]
            if fields[0] == "pub" or (fields[0] == "fpr" and fields[9] == self.fingerprint):
                times.add(last)
        return min((datetime.fromtimestamp(int(time), UTC) for time in times if time), default=None)

    def warning(self, now: datetime) -> str:
        """Return what a person has to do, from 60 days before it expires; until then nothing."""
        expires = self.expires
        if expires is None or now < expires - WARNING:
            return ""
        when = f"expires on {expires:%Y-%m-%d}, in {(expires - now).days} days" if now < expires else "has expired"
        return (
            f"the release key {self.fingerprint} {when}; extend it (gpg --homedir {self._home} --quick-set-expire), then "
            "start the job repository-maintain"
        )

    def sign_rpm(self, path: Path) -> None:
        """Sign an RPM package in place; see rpmsign(8). Hard links to it would change too: give a copy."""
        definitions = [f"_gpg_name {self.fingerprint}", f"_gpg_path {self._home}", "__gpg /usr/bin/gpg"]
        words = [word for definition in definitions for word in ("--define", definition)]
        run(["rpmsign", *words, "--addsign", path], timeout=SECONDS, env={"GNUPGHOME": str(self._home)}, quiet=True)
        self.verify_rpm(path)

    def verify_rpm(self, path: Path) -> None:
        """Check an RPM package's digests and signature by rpm itself."""
        # without the level an unsigned package passes
        words = ["--define", "_pkgverify_level all", "--define", f"_dbpath {self._derived / 'rpmdb'}"]
        done = run(["rpmkeys", *words, "--checksig", path], timeout=SECONDS, check=False, quiet=True)
        if done.returncode:
            said = (done.stdout + done.stderr).decode(errors="replace").split("\n")[0]
            raise InfrastructureError(f"{path.name}: rpm does not accept its signature: {ascii(said)[1:-1][:200]}")

    def _listed(self) -> list[list[str]]:
        """Return what gpg says of it, a list of fields a line; see gpg's doc/DETAILS."""
        words = [*self._gpg, "--with-colons", "--list-keys", self.fingerprint]
        said = run(words, timeout=SECONDS, quiet=True).stdout.decode(errors="replace")
        return [line.split(":") for line in said.splitlines()]

    @cached_property
    def _derived(self) -> Path:
        """A directory with the public key as gpgv, rpm and users want it; made anew when the key's keyring changed."""
        rings = [path.stat() for path in (self._home / "pubring.kbx", self._home / "pubring.gpg") if path.exists()]
        if not rings:
            raise InfrastructureError(
                f"{self._home} has no keyring; `released.gnupg_home` in the configuration names it"
            )
        final = self._place / f"key-{self.fingerprint}-{max(stat.st_mtime_ns for stat in rings)}"
        if not final.exists():
            new = final.with_name(f".{final.name}.{os.getpid()}")
            (new / "rpmdb").mkdir(parents=True)
            exported = run([*self._gpg, "--export", self.fingerprint], timeout=SECONDS, quiet=True).stdout
            if not exported:
                raise InfrastructureError(f"{self._home} has no key {self.fingerprint}; import it, or name another one")
            (new / "keyring.gpg").write_bytes(exported)
            armoured = run([*self._gpg, "--armor", "--export", self.fingerprint], timeout=SECONDS, quiet=True).stdout
            (new / "key.asc").write_bytes(armoured)
            run(["rpmkeys", "--define", f"_dbpath {new / 'rpmdb'}", "--import", new / "key.asc"], timeout=SECONDS)
            new.rename(final)
        return final

    def _sign(self, how: str, data: bytes) -> bytes:
        argv = [*self._gpg, "--local-user", f"{self.fingerprint}!", "--digest-algo", "SHA512", "--armor", how]
        signature = run(argv, input=data, timeout=SECONDS, quiet=True).stdout
        if not signature:
            raise InfrastructureError(f"gpg {how} with {self.fingerprint}: no signature came out")
        return signature
