"""Whether what an environment names by `poll` has changed: an image, an ISO, whatever its machines are made from elsewhere.

What a server says of a file (ETag, Last-Modified), or the file system does, tells that it has not; else its checksum decides.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pkgci import web
from pkgci.artifacts import Part, Record
from pkgci.config import Config
from pkgci.errors import InfrastructureError
from pkgci.lazy import Lazy
from pkgci.locks import locked

requests = Lazy("requests")


class Seen(Part):
    """What was at a place: its sha256, and what tells without reading it whether it is the same; empty: nothing does."""

    stamp: str
    sha256: str


class Polled(Record):
    """`polled.json`: what was at each place when the environment was last prepared."""

    places: dict[str, Seen]


@contextmanager
def polled(config: Config, name: str, home: Path, places: Sequence[str]) -> Iterator[bool | None]:
    """Look at what an environment is made from, and remember it when what is done meanwhile succeeds.

    Args:
        config: the configuration.
        name: the environment's name.
        home: where paths begin.
        places: URLs (http, https) and paths.

    Returns:
        Whether something has changed since it was last remembered; None when another process is at it, which is left to
        that one.

    Raises:
        InfrastructureError: a place cannot be read.
    """
    directory = config.data / "polled" / name
    directory.mkdir(parents=True, exist_ok=True)
    record = directory / "polled.json"
    with locked(directory, wait=False) as held:
        if not held:
            yield None
            return
        former = Polled.read(record).places if record.exists() else {}
        now = {place: _look(home, place, former.get(place)) for place in places}
        yield {place: one.sha256 for place, one in now.items()} != {place: one.sha256 for place, one in former.items()}
        if now != former:
            Polled(places=now).write(record)


def _look(home: Path, place: str, former: Seen | None) -> Seen:
    """Return what is at a place; it is read only if it may have changed."""
    by_http = place.startswith(("http://", "https://"))
    try:
        stamp = _stamp_of_url(place) if by_http else _stamp_of_file(home / place)
        if former is not None and stamp and stamp == former.stamp:
            return former
        return Seen(stamp=stamp, sha256=_sha256_of_url(place) if by_http else _sha256_of_file(home / place))
    except OSError as error:
        # requests' errors are such, too
        raise InfrastructureError(f"cannot read {place}, which the environment polls: {web.reason(error)}") from error


def _stamp_of_file(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"


def _stamp_of_url(url: str) -> str:
    with (
        web.session(url, upstream=True) as session,
        session.head(url, timeout=web.SECONDS, allow_redirects=True) as said,
    ):
        headers = said.headers if said.ok else {}
    known = [headers.get(name, "") for name in ("ETag", "Last-Modified", "Content-Length")]
    return " ".join(known) if any(known[:2]) else ""


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256_of_url(url: str) -> str:
    digest = hashlib.sha256()
    with web.session(url, upstream=True) as session, session.get(url, timeout=web.SECONDS, stream=True) as answer:
        if answer.status_code != requests.codes.ok:
            raise InfrastructureError(
                f"cannot read {url}, which the environment polls: HTTP status {answer.status_code}"
            )
        for block in answer.iter_content(1 << 20):
            digest.update(block)
    return digest.hexdigest()
