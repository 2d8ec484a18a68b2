"""The content-addressed store of build results, and the leases under which they are made.

An entry is a directory `store/KEY[:2]/KEY/` with `entry.json` and the files of one build. It appears whole by one
rename and never changes. What is being made lies in `store/new/KEY/`, a directory that its maker holds locked: that
lock is the lease, so it ends with its owner, however that one ends. All processes are on one host.

What a key is made of is not decided here.
"""

import hashlib
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import StringConstraints

from pkgci import artifacts
from pkgci.config import Config
from pkgci.disk import fsync, fsync_all
from pkgci.errors import InfrastructureError, PackageError, RequestError
from pkgci.locks import locked, read_owner, write_owner

log = logging.getLogger(__name__)

RECORD = "entry.json"
POLL = 0.1
FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_+.~^:-]*$"

Key = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# whose builds: of changes that nobody approved yet, or of approved and merged ones
Namespace = Literal["check", "release"]


class File(artifacts.File):
    """A file of an entry: its name is a plain one, with which nothing outside of the entry can be named."""

    name: Annotated[str, StringConstraints(pattern=FILE_NAME, max_length=255)]


class Material(artifacts.Part):
    """A package that a build was made with: its file name, which holds its exact version, and its sha256."""

    name: str
    sha256: str


class Record(artifacts.Record):
    """`entry.json`: what an entry is and holds. `algorithm` is the version of the rules by which its key is made.

    `trees` are the Git trees that it was built from (source and packaging), `root` and `dependencies` what it was built
    in and with. What is `partial` was built with other profiles than the package's own, and is never released. Nor is what
    is in the namespace `check`: it was built of a change that nobody had approved.
    """

    key: Key
    algorithm: int
    package: str
    version: str
    target: str
    format: Literal["deb", "rpm"]
    partial: bool = False
    namespace: Namespace = "check"
    trees: tuple[str, ...] = ()
    root: str = ""
    dependencies: tuple[Material, ...] = ()
    packages: tuple[artifacts.Package, ...]
    files: tuple[File, ...]

    def refuse_unreleasable(self) -> None:
        """Refuse what is never released, whatever is merged.

        Raises:
            RequestError: it was built with other profiles, or of a change that was not approved.
        """
        about = f"{self.package} {self.version}"
        if self.partial:
            raise RequestError(f"{about} was built with other profiles than the package's own; build it without")
        if self.namespace != "release":
            raise RequestError(
                f"{about} was built by a check, of a change that was not approved; "
                "only what a gate built is released, or what was built of a merged change"
            )


@dataclass(frozen=True)
class Entry:
    """A build result: its record and the directory with its files."""

    directory: Path
    record: Record


@dataclass(frozen=True)
class Lease:
    """The right to make the entry `key`; `directory` is a scratch directory in the store's file system."""

    key: str
    directory: Path


def describe(path: Path) -> File:
    """Return name, size and sha256 of the file `path`.

    Raises:
        PackageError: a file of this name cannot be in an entry.
    """
    if path.name == RECORD or len(path.name) > 255 or not re.fullmatch(FILE_NAME, path.name):
        raise PackageError(f"the build made a file of the name {path.name[:80]!r}; refused")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return File(name=path.name, size=os.fstat(stream.fileno()).st_size, sha256=digest)


class Store:
    """The store below the configured data directory.

    Raises:
        RequestError: (from any member that takes a key) it is none.
        InfrastructureError: (from any member) the file system fails.
    """

    def __init__(self, config: Config) -> None:
        self.directory = config.data / "store"
        self._new = self.directory / "new"

    def place(self, key: str) -> Path:
        """Return the directory that the entry of a key has, or would have."""
        if not re.fullmatch(r"[0-9a-f]{64}", key):
            raise RequestError(f"{key[:80]!r} is no key of a build; a key is 64 hexadecimal digits")
        return self.directory / key[:2] / key

    def lookup(self, key: str) -> Entry | None:
        """Return the entry, or None when there is none, or when it is damaged: that is logged, and it is never used.

        All files are read and compared with their checksums. It counts as a use of the entry: `clean` leaves it for
        the minimum age from now on.
        """
        directory = self.place(key)
        # a shared lock: from here to the new time stamp `remove` cannot take the entry away
        with locked(directory, shared=True) as there:
            if not there:
                return None
            try:
                os.utime(directory)
            except OSError as error:
                raise InfrastructureError(f"cannot use store entry {directory}: {error.strerror}") from error
            try:
                record = Record.read(directory / RECORD)
                for file in record.files:
                    if describe(directory / file.name) != file:
                        raise InfrastructureError(f"{file.name} has another checksum than when it was built")
                if record.key != key:
                    raise InfrastructureError(f"its record is of {record.key}")
            except (InfrastructureError, OSError) as error:
                log.warning("store entry %s is damaged and not used: %s", directory, error)
                return None
        return Entry(directory, record)

    def required(self, key: str, target: str) -> Entry:
        """Return the entry of a job that cannot do without it.

        Args:
            key: the entry's key.
            target: the target that it must be for.

        Raises:
            RequestError: there is none, or it is for another target.
        """
        entry = self.lookup(key)
        if entry is None:
            raise RequestError(f"build {key[:12]} is not in the store; run compile-{target} again")
        if entry.record.target != target:
            raise RequestError(f"build {key[:12]} is for {entry.record.target}, not for {target}")
        return entry

    @contextmanager
    def claim(self, key: str, *, wait: float, on_wait: Callable[[str], None] = log.info) -> Iterator[Lease | Entry]:
        """Get the entry, or the right to make it; exactly one process has that right, until its `with` ends.

        Args:
            key: the entry's key.
            wait: seconds to wait for another process that is making it.
            on_wait: called with one line that says who is waited for.

        Returns:
            The entry, when it is there or was delivered while waiting. A lease otherwise: at once when nobody makes the
            entry, or as soon as its maker gave up or died.

        Raises:
            InfrastructureError: the other process still holds the lease after `wait` seconds.
        """
        entry = self.lookup(key)
        if entry:
            yield entry
            return
        self.sweep()
        deadline = time.monotonic() + wait
        directory = self._new / key
        waited_for = None
        while True:
            with suppress(FileExistsError):
                directory.mkdir(parents=True)
            with locked(directory, wait=False) as held:
                if held:
                    entry = self.lookup(key)
                    try:
                        if entry is None:
                            yield self._begin(key, directory)
                        else:
                            yield entry
                    finally:
                        # still locked: nobody else can be in this directory
                        shutil.rmtree(directory)
                    return
            owner = read_owner(directory)
            if owner and owner != waited_for:
                on_wait(f"{key[:12]} is being built by {owner}; waiting up to {deadline - time.monotonic():.0f} s")
                waited_for = owner
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    f"{key[:12]} is still being built by {owner or 'another process'} after {wait:.0f} s; retry later"
                )
            time.sleep(POLL)

    def deliver(self, lease: Lease, record: Record, files: Iterable[Path]) -> Entry:
        """Make the entry from copies of `files`; it is there whole, on disk, or not at all.

        Args:
            lease: what `claim` gave.
            record: describes exactly `files`.
            files: the files; they are left as they are.

        Raises:
            InfrastructureError: a file is not what the record says, or cannot be written.
        """
        making, final = lease.directory / "entry", self.place(lease.key)
        if record.key != lease.key:
            raise ValueError(f"a record of {record.key} under a lease of {lease.key}")
        try:
            making.mkdir()
            for path in files:
                # a copy of our own: nobody else can have it open or linked
                copy = shutil.copyfile(path, making / path.name)
                copy.chmod(0o444)
            made = {file.name: file for file in map(describe, making.iterdir())}
            listed = {file.name: file for file in record.files}
            if made != listed:
                wrong = sorted(name for name in made.keys() | listed.keys() if made.get(name) != listed.get(name))
                raise InfrastructureError(f"build {lease.key[:12]}: not as in its record: {', '.join(wrong)}")
            record.write(making / RECORD)
            fsync_all([*making.iterdir(), making])
            final.parent.mkdir(parents=True, exist_ok=True)
            making.rename(final)
            fsync(final.parent)
        except OSError as error:
            raise InfrastructureError(f"cannot write store entry {final}: {error.strerror}") from error
        return Entry(final, record)

    def unreferenced(self, referenced: Container[str], before: float) -> Iterator[str]:
        """Yield the keys of entries that are not in `referenced` and were last used before the time stamp `before`."""
        for directory in sorted(self.directory.glob("[0-9a-f][0-9a-f]/*")):
            if directory.name not in referenced and directory.stat().st_mtime < before:
                yield directory.name

    def remove(self, key: str, before: float) -> bool:
        """Remove an entry unless it is in use or was used since the time stamp `before`; return whether it is gone."""
        directory = self.place(key)
        with locked(directory, wait=False) as held:
            if not held or directory.stat().st_mtime >= before:
                return False
            self._discard(directory)
        return True

    def sweep(self) -> None:
        """Remove what killed processes left in `new/`: all directories there that nobody holds."""
        for directory in self._new.glob("*"):
            with locked(directory, wait=False) as held:
                if held:
                    shutil.rmtree(directory, ignore_errors=True)

    def _begin(self, key: str, directory: Path) -> Lease:
        """Make a lease of a directory that is locked: what a dead owner or a damaged entry left there goes away."""
        for path in directory.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        damaged = self.place(key)
        with locked(damaged) as there:
            if there:
                self._discard(damaged)
        write_owner(directory)
        return Lease(key, directory)

    def _discard(self, directory: Path) -> None:
        """Remove an entry that is locked: out of sight by one rename, so that nobody sees half of it."""
        self._new.mkdir(parents=True, exist_ok=True)
        gone = self._new / f"{uuid.uuid4()}.gone"
        directory.rename(gone)
        shutil.rmtree(gone)
