"""How this program itself reads over HTTP: bounded, with errors of one line, past proxies for this very host."""

import hashlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from pkgci.command import run
from pkgci.errors import InfrastructureError
from pkgci.lazy import Lazy

requests, request = Lazy("requests"), Lazy("urllib.request")

LOOPBACK = ("localhost", "127.0.0.1", "::1")
SECONDS = 60
REDIRECTS = 5


class NotFoundError(InfrastructureError):
    """The server answers, and has no such thing."""


def session(url: str, *, upstream: bool) -> "requests.Session":
    """Return a session for requests to `url`.

    Args:
        url: where the requests go.
        upstream: it is a mirror of the operating system, which this machine's apt may reach through a proxy of its own.
    """
    made = requests.Session()
    made.max_redirects = REDIRECTS
    made.trust_env = urlsplit(url).hostname not in LOOPBACK
    if upstream and made.trust_env:
        made.proxies.update(_proxies_of_apt())
    return made


def read(url: str, *, upstream: bool, largest: int) -> bytes:
    """Return what is at `url`. Redirects are followed for an upstream only, by http(s), and not more than `REDIRECTS`.

    Args:
        url: what to read.
        upstream: as of `session`.
        largest: bytes; more is an error.

    Raises:
        NotFoundError: it does not exist.
        InfrastructureError: it cannot be read.
    """
    return b"".join(_blocks(url, upstream=upstream, largest=largest))


def fetch(url: str, path: Path, *, size: int, sha256: str) -> None:
    """Write what is at `url`, which is no upstream's, to the new file `path`.

    Args:
        url: what to read.
        path: the file.
        size: bytes that it must have.
        sha256: its checksum, in hexadecimal digits.

    Raises:
        NotFoundError: it does not exist.
        InfrastructureError: it cannot be read, or is something else.
    """
    digest, length = hashlib.sha256(), 0
    with path.open("xb") as stream:
        for block in _blocks(url, upstream=False, largest=size):
            stream.write(block)
            digest.update(block)
            length += len(block)
    if (length, digest.hexdigest()) != (size, sha256):
        raise InfrastructureError(f"{url} is not what its index says: another size or checksum")


def _blocks(url: str, *, upstream: bool, largest: int) -> Iterator[bytes]:
    """Yield what is at `url`; the arguments and errors are those of `read`."""
    length = 0
    try:
        with (
            session(url, upstream=upstream) as made,
            made.get(url, timeout=SECONDS, stream=True, allow_redirects=upstream) as answer,
        ):
            if answer.status_code == requests.codes.not_found:
                raise NotFoundError(f"there is nothing at {url}: HTTP status 404")
            if answer.status_code != requests.codes.ok:
                raise InfrastructureError(f"cannot read {url}: HTTP status {answer.status_code}")
            for block in answer.iter_content(1 << 16):
                length += len(block)
                if length > largest:
                    raise InfrastructureError(f"cannot read {url}: it has more than {largest} bytes")
                yield block
    except requests.RequestException as error:
        raise InfrastructureError(f"cannot read {url}: {reason(error)}") from error


def password(file: str) -> str:
    """Return the password in a file of one line.

    Raises:
        InfrastructureError: it cannot be read.
    """
    try:
        return Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InfrastructureError(f"cannot read the password in {file}: {error}") from error


def reason(error: BaseException) -> str:
    """Return in a few words what went wrong with a request: what the system said, under the layers around it."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        inner = inner.__cause__ or inner.__context__
    return type(error).__name__


@cache
def _proxies_of_apt() -> dict[str, str]:
    """Return the proxies through which this machine's own apt reaches the upstream, in the form that requests takes."""
    proxies = request.getproxies()
    for scheme in ("http", "https"):
        said = run(["apt-config", "shell", "found", f"Acquire::{scheme}::Proxy"], quiet=True).stdout.decode()
        found = re.fullmatch(r"found='(https?://[^']*)'\s*", said)
        if found:
            proxies[scheme] = found[1]
    return proxies
