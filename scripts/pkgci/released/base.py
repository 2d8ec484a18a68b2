"""What both formats' released repositories do, by the same verbs, and what they are given."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from pkgci.released.index import Stanza
from pkgci.released.key import ReleaseKey
from pkgci.store import Entry


@dataclass(frozen=True)
class Place:
    """A repository, and the generation that is being made.

    `root` is what readers see, at `url`. `time` is the generation's own; `stamp` that of its pointer files, in seconds;
    `until` is when clients begin to refuse it, None for never.
    """

    root: Path
    url: str
    codename: str
    architectures: tuple[str, ...]
    label: str
    key: ReleaseKey
    signed: Path
    number: int
    time: datetime
    until: datetime | None
    stamp: int


@dataclass(frozen=True)
class Written:
    """A metadata file by its name (as of `Stanza.list`), compression, sha256 and size."""

    list: str
    compression: str
    digest: str
    size: int


@dataclass(frozen=True)
class Offered:
    """A file that a generation's index offers: its path below the root, size in bytes and sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Relation:
    """What a package says of another one: its name, and a comparison with its version where there is one."""

    name: str
    operator: str = ""
    version: str = ""


@dataclass(frozen=True)
class Packaged:
    """What is in a binary package, as far as it decides whether it can be installed beside another one.

    `files` has for each path what two packages must have in common to share it; empty when they cannot. `apart` are
    packages that it is never installed with, or whose files it may replace.
    """

    name: str
    version: str
    files: Mapping[str, str]
    provides: frozenset[str]
    apart: tuple[Relation, ...]


class Form(Protocol):
    """The verbs of a format. `links` are symbolic links below the repository's root, which lead through `current`; `shared`
    are the directories with metadata files of all generations; `sources` is the one that says what source packages need.
    What `expires` has clients that refuse an old index."""

    sources: str
    compressions: Sequence[str]
    shared: Sequence[str]
    links: Mapping[str, str]
    expires: bool

    def lists(self, place: Place) -> list[str]:
        """Return the names of the metadata files."""

    def binary_lists(self, architecture: str) -> list[str]:
        """Return the names of those that describe an architecture's binary packages, first what they need and offer."""

    def prepare(self, entry: Entry, place: Place) -> dict[str, Path]:
        """Return the files of a build that are linked into the pool, by name."""

    def stanzas(self, entry: Entry, directory: str, place: Place) -> list[Stanza]:
        """Return what the index says of a build in the pool's `directory`."""

    def packaged(self, entry: Entry) -> list[Packaged]:
        """Return what is in a build's binary packages. Raises PackageError: not all of it is known."""

    def frame(self, name: str, count: int) -> tuple[bytes, bytes]:
        """Return what stands before and after the stanzas of a metadata file of `count` packages."""

    def path(self, written: Written) -> str:
        """Return where a metadata file is below the repository's root, for all generations."""

    def examine(self, name: str, chunks: Sequence[bytes]) -> None:
        """Let the format's own tool parse the chunks of a metadata file that are new. Raises InfrastructureError."""

    def finish(self, new: Path, place: Place, files: Sequence[Written]) -> list[Path]:
        """Write what a generation has of its own below `new`, signed; verify it; return its pointer files."""

    def shared_files(self, generation: Path) -> list[str]:
        """Return the paths below the root of the metadata files of a generation, in its directory, that all share."""

    def clients(self, place: Place) -> dict[str, str]:
        """Return what users need, by the names of files at the repository's root."""

    def keyring(self, place: Place) -> str:
        """Return the file name of the package that brings users the key and the lines, at the repository's root."""

    def make_keyring(self, place: Place, path: Path) -> None:
        """Make that package as the file `path`, with an empty directory around it. Raises InfrastructureError."""

    def read(self, generation: Path, key: ReleaseKey) -> Iterator[Offered]:
        """Yield what a generation in its directory offers, from what its signature vouches for, down to the packages.

        Raises:
            InfrastructureError: a signature, a checksum or a metadata file is not what it must be.
        """

    def texts(self, generation: Path) -> dict[str, list[bytes]]:
        """Return what a generation in its directory says of binary packages, by metadata file, a text for each."""

    def examine_package(self, path: Path, key: ReleaseKey) -> None:
        """Check a package file in the pool by the format's own tool. Raises InfrastructureError."""
