"""A released repository: a pool of package files, immutable generations of metadata, and one pointer.

`repositories/RELEASE/CODENAME/` is what readers see: `pool/SOURCE/BUILD/` (all files of a build and `provenance.json`),
`generations/N/`, `log/N.json`, and the symbolic link `current`. Beside it, in `released/RELEASE/CODENAME/`, lie the index,
holds and the lock, which nobody else needs to see.

A publication writes the next generation beside the current one; it counts once the index is committed, and is seen once
the pointer has moved. Whoever is killed between the two is finished by the next run; before, nothing has happened: what
is left over is removed. The file `unfinished` says that there may be something.
"""

import hashlib
import logging
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pkgci import artifacts
from pkgci.artifacts import Maintained
from pkgci.config import Config
from pkgci.disk import fsync, fsync_all
from pkgci.errors import InfrastructureError, PackageError, PkgciError, RequestError
from pkgci.locks import describe_owner, waiting
from pkgci.released import checks, closure
from pkgci.released.base import Form, Place, Written
from pkgci.released.deb import Deb
from pkgci.released.index import COMPRESSIONS, Index, errors
from pkgci.released.key import ReleaseKey
from pkgci.released.records import (
    WORDS,
    Generation,
    Hold,
    Origin,
    Provenance,
    Publication,
    ReleasedBuild,
    ReleasedPackage,
    provenance,
    read_log,
)
from pkgci.released.rpm import Rpm
from pkgci.store import RECORD, Entry, Record, Store, describe

log = logging.getLogger(__name__)

FORMS: dict[str, Form] = {"deb": Deb(), "rpm": Rpm()}
CURRENT = "current"
UNFINISHED = "unfinished"
PROVENANCE = "provenance.json"
# of a build's key, in the path of its directory in the pool
KEY_DIGITS = 16


@dataclass(frozen=True)
class Question:
    """What a publication asks of the package manager, by target; `good` notes that nothing stood against it."""

    cases: dict[str, closure.Case]
    good: Path


@dataclass(frozen=True)
class Published:
    """The generation that readers see after a publication, and under which keys it has the builds, in their order.

    `changed` says whether the publication made it. `left` are the siblings that were not published, each with the reason.
    """

    repository: "Repository"
    generation: Generation
    keys: tuple[str, ...]
    changed: bool
    left: tuple[str, ...] = ()


class Repository:
    """The repository of a release and a codename; use it in a `with` of `opened`.

    Args:
        config: the configuration.
        release: the release's name.
        codename: that of the targets which it is for.

    Raises:
        RequestError: there is no such repository.
        InfrastructureError: (from any member) the key or the file system fails.
    """

    def __init__(self, config: Config, release: str, codename: str) -> None:
        self.config, self.release, self.codename = config, release, codename
        if release == "test":
            raise RequestError("release 'test': its repositories would be among the test repositories; rename it")
        targets = {name: config.target(name) for name in config.release(release).targets}
        self.targets = {name: target for name, target in targets.items() if target.codename == codename}
        formats = {target.format for target in self.targets.values()}
        if len(formats) != 1:
            known = ", ".join(sorted({target.codename for target in targets.values()}))
            raise RequestError(
                f"release {release} has no targets of one format with codename {codename[:80]!r}: {known}"
            )
        self.format = formats.pop()
        self.form = FORMS[self.format]
        self.root = config.data / "repositories" / release / codename
        self.url = f"{config.settings.url}{release}/{codename}/"
        self.place = config.data / "released" / release / codename
        self.name = f"{release}/{codename}"
        self.key = ReleaseKey(config, self.place)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the repository's lock, waiting as long as configured, and finish or undo what a killed run left.

        Raises:
            RequestError: the configuration names another key than the one that the repository is signed by.
        """
        released = self.config.settings.released
        assert released is not None
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            what = f"repository {self.name}"
            with waiting(self.place, what, seconds=released.wait_seconds, on_wait=log.info), self._errors():
                self._refuse_other_key()
                self._recover()
                try:
                    yield
                finally:
                    self.index.close()
        except OSError as error:
            where = f" at {error.filename}" if error.filename else ""
            raise InfrastructureError(
                f"repository {self.name} cannot be changed{where}: {error.strerror or error}; mend it, then try again"
            ) from error

    def current(self) -> Generation | None:
        """Return the generation that readers see; None before the first."""
        number = self._pointer()
        return self.generation(number) if number else None

    def generation(self, number: int) -> Generation:
        """Return a generation's record, also when what it consists of is gone.

        Raises:
            RequestError: there never was one of this number.
        """
        if not (self.root / "log" / f"{number}.json").is_file():
            raise RequestError(f"repository {self.name} has no generation {number}; see `pkgci repo log {self.name}`")
        return read_log(self.root / "log", number)

    def entry(self, key: str, source: str) -> Entry:
        """Return a build from the pool.

        Raises:
            InfrastructureError: it is not there, or what is there is no directory of ours.
        """
        directory = self.root / self.directory(source, key)
        if directory.is_symlink() or directory.parent.is_symlink():
            raise InfrastructureError(f"{directory} is reached by a symbolic link; nothing of ours makes one there")
        return Entry(directory, Record.read(directory / RECORD))

    def origin(self, key: str, source: str) -> Origin | None:
        """Return where a build's sources were merged, by its provenance in the pool; None if that does not say so.

        Raises:
            InfrastructureError: the provenance cannot be read.
        """
        return Provenance.read(self.root / self.directory(source, key) / PROVENANCE).origin()

    def directory(self, source: str, key: str) -> str:
        """Return where a build lies, below the root."""
        return f"pool/{source}/{key[:KEY_DIGITS]}"

    def holds(self) -> dict[str, Hold]:
        """Return the holds, by source package."""
        found = map(Hold.read, sorted((self.place / "holds").glob("*.json")))
        return {hold.source: hold for hold in found}

    def hold(self, source: str, reason: str, generation: int) -> None:
        """Put a hold on a source package."""
        hold = Hold(source=source, reason=reason, generation=generation, time=datetime.now(UTC), by=describe_owner())
        hold.write(self.place / "holds" / f"{source}.json")

    def unhold(self, source: str) -> Hold:
        """Take the hold off a source package.

        Raises:
            RequestError: there is none.
        """
        hold = self.holds().get(source)
        if hold is None:
            raise RequestError(f"{source[:100]!r} is not on hold in {self.name}; see `pkgci repo log {self.name}`")
        (self.place / "holds" / f"{source}.json").unlink()
        return hold

    def commit(
        self,
        added: Sequence[tuple[Entry, Origin | None]],
        removed: Sequence[str],
        kind: str,
        reason: str = "",
    ) -> Generation:
        """Make the next generation, and move the pointer.

        Args:
            added: builds with where they are merged; None for those that are in the pool.
            removed: keys of builds that go.
            kind: as of `Generation`.
            reason: as of `Generation`.

        Raises:
            PackageError: a package cannot be indexed.
        """
        former = self.current()
        try:
            return self._commit(former, added, removed, kind, reason)
        except BaseException:
            # what is committed is finished by the next run; of anything else nothing stays
            with suppress(OSError, sqlite3.Error):
                if self.index.generation == (former.number if former else 0):
                    self._sweep()
            raise

    def _commit(
        self,
        former: Generation | None,
        added: Sequence[tuple[Entry, Origin | None]],
        removed: Sequence[str],
        kind: str,
        reason: str,
    ) -> Generation:
        number = self.index.generation + 1
        now = datetime.now(UTC)
        if former:
            now = max(now, former.time)
        stamp = max(int(now.timestamp()), former.stamp + 1 if former else 0)
        place = self._at(number, now, stamp)
        gone = tuple(self.released(key) for key in removed)
        (self.place / UNFINISHED).touch()
        directory = self.root / "generations" / str(number)
        with self.index.transaction():
            self.index.begin(number, now.timestamp())
            for key in removed:
                self.index.remove(key)
            for entry, origin in added:
                self._add(self._link(entry, origin, place) if origin else entry, place)
            sources = {build.source for build in gone} | {entry.record.package for entry, _ in added}
            making = directory.with_name(f".{number}.new")
            making.mkdir(parents=True)
            with self._lists(place, sources) as written:
                pointers = self.form.finish(making, place, written)
            record = Generation(
                number=number,
                time=now,
                stamp=stamp,
                valid_until=place.until,
                kind=kind,
                by=describe_owner(),
                reason=reason,
                added=tuple(self.released(entry.record.key) for entry, _ in added),
                removed=gone,
            )
            record.write(making / "generation.json")
            for pointer in pointers:
                os.utime(pointer, (stamp, stamp))
            entries = self.root / "log" / f"{number}.json"
            entries.parent.mkdir(exist_ok=True)
            entries.unlink(missing_ok=True)
            os.link(making / "generation.json", entries)
            shared = [self.root / self.form.path(one) for one in written if one.compression != "plain"]
            own = [
                *shared,
                *{path.parent for path in shared},
                *pointers,
                making / "generation.json",
                *(path for path in making.rglob("*") if path.is_dir()),
            ]
            fsync_all([*own, making, entries.parent])
            making.rename(directory)
            fsync(directory.parent)
            if not former:
                # what the first publication has made above all that
                fsync_all([*self.root.parents[:2], *self.place.parents[:2], self.place])
        self._point(number, place)
        self._prune()
        # they were about the former generation
        shutil.rmtree(self.place / "closure", ignore_errors=True)
        (self.place / UNFINISHED).unlink()
        return record

    def maintain(self, now: datetime) -> Maintained | None:
        """Renew what is signed where that is due, and remove former generations that no reader can still be at.

        Returns:
            What was done; None when nothing was published yet.
        """
        with self.opened():
            current = self.current()
            if current is None:
                return None
            (self.place / UNFINISHED).touch()
            gone = self._prune()
            # whatever killed it, also the machine's end
            self._sweep()
            due = self._due(current, now)
            if due:
                current = self.commit([], [], "renewal", due)
            return Maintained(
                repository=self.name,
                generation=current.number,
                valid_until=current.valid_until,
                renewed=due,
                cleaned=tuple(gone),
            )

    def _due(self, current: Generation, now: datetime) -> str:
        """Return why a generation has to be signed again, or nothing."""
        if (self.root / "key.asc").read_text(errors="replace") != self.key.public:
            return "the public key has changed"
        until = current.valid_until
        if bool(until) != bool(self._valid_days):
            return f"valid_days is {self._valid_days} now"
        if until and now >= current.time + (until - current.time) / 2:
            return f"it is valid until {until:%Y-%m-%d}"
        return ""

    def question(self, added: Sequence[Entry], removed: Sequence[str]) -> "Question | None":
        """Return what has to be asked of apt or dnf before a publication; None if it was found good for this generation."""
        keys = [str(self.index.generation), *sorted(entry.record.key for entry in added), *sorted(removed)]
        good = self.place / "closure" / hashlib.sha256("\n".join(keys).encode()).hexdigest()
        if good.exists():
            return None
        new = self._texts(added)
        cases = {}
        for name, target in self.targets.items():
            lists = self.form.binary_lists(target.architecture)
            before = {one: self.index.texts(one) for one in lists}
            after = {one: self.index.texts(one, removed) + new.get(one, []) for one in lists}
            case = closure.case(self.format, before, after)
            if case:
                cases[name] = case
        question = Question(cases, good)
        if not cases:
            self.refuse_unmet(question)
        return question if cases else None

    def refuse_unmet(self, question: "Question") -> None:
        """Refuse dependencies that a publication newly breaks. It takes its time, and needs no lock.

        Raises:
            PackageError: a package could not be installed any more.
            InfrastructureError: upstream cannot be read.
        """
        for name, case in question.cases.items():
            closure.check(case, self.targets[name], self.format, self.config.cache / "closure" / name)
        # another publication may remove what is known of former generations
        with suppress(FileNotFoundError):
            question.good.parent.mkdir(exist_ok=True)
            question.good.touch()

    def dependants(self, added: Sequence[Entry], removed: Sequence[str]) -> list[str]:
        """Return the source packages, sorted, that build-depend on what a publication changes, but those that it has itself."""
        own = {entry.record.package for entry in added}
        former = {key for key, source in self.index.live() if source in own} | set(removed)
        return sorted(self._depending(self._texts(added), former) - own)

    def users_of(self, source: str) -> set[str]:
        """Return the projects of the packages that build-depend on what readers see of a source package."""
        users = self._depending({}, {key for key, _, _ in self.index.live_of(source)}) - {source}
        return {project for user in users for project in self.index.projects_of(user)}

    def _depending(self, new: Mapping[str, list[bytes]], former: Collection[str]) -> set[str]:
        """Return the source packages that build-depend on what new texts, or builds that are there, offer."""
        found: set[str] = set()
        for target in self.targets.values():
            offered: set[str] = set()
            for name in self.form.binary_lists(target.architecture)[:1]:
                kept = set(self.index.texts(name, former))
                gone = [text for text in self.index.texts(name) if text not in kept]
                offered |= closure.offered(self.format, [*new.get(name, []), *gone])
            found |= closure.build_depending(self.format, self.index.texts(self.form.sources), offered)
        return found

    def _texts(self, entries: Sequence[Entry]) -> dict[str, list[bytes]]:
        """Return what the metadata files would say of builds, by the files' names."""
        place = self._at(self.index.generation, datetime.now(UTC), 0)
        texts: dict[str, list[bytes]] = {}
        for entry in entries:
            for stanza in self.form.stanzas(entry, self.directory(entry.record.package, entry.record.key), place):
                texts.setdefault(stanza.list, []).append(stanza.text)
        return texts

    def released(self, key: str) -> ReleasedBuild:
        """Return a build that is or was in the repository."""
        known = self.index.build(key)
        if known is None:
            raise RequestError(f"build {key[:12]} was never in {self.name}")
        packages = tuple(
            ReleasedPackage(
                name=one.name, version=one.version, architecture=one.architecture, file=one.file, sha256=one.sha256
            )
            for one in self.index.packages_of(key)
        )
        return ReleasedBuild(key=key, source=known[0], target=known[1], version=known[2], packages=packages)

    def rebuild(self) -> None:
        """Make the index anew from the log of generations and the pool."""
        path = self.place / "index.sqlite"
        for old in self.place.glob("index.sqlite*"):
            old.unlink()
        index = Index(path, self.form.compressions)
        number = self._pointer()
        log.info("repository %s: the index is made again from %s generations and the pool", self.name, number)
        self.index = index
        with index.transaction():
            last = None
            for last in map(self.generation, range(1, number + 1)):
                index.begin(last.number, last.time.timestamp())
                for build in last.removed:
                    index.remove(build.key)
                for build in last.added:
                    packages = [
                        (one.name, one.architecture, one.version, one.sha256, one.file) for one in build.packages
                    ]
                    index.add(build.key, (build.source, build.target, build.version), packages)
            if last:
                place = self._at(last.number, last.time, last.stamp)
                for key, source in index.live():
                    entry = self.entry(key, source)
                    self._fill(entry, place)
                kept = [int(path.name) for path in (self.root / "generations").glob("[0-9]*")]
                shared = {path.relative_to(self.root).as_posix() for path in self._shared_files()}
                index.wrote(shared)
                with self._lists(place, None):
                    pass
                index.forget(min(kept))
        self._sweep()

    def _refuse_other_key(self) -> None:
        """Refuse a key that users do not have: what is in the pool, and their machines, know the former one."""
        known = self.root / "key.asc"
        text = known.read_text(errors="replace") if known.exists() else self.key.public
        if text == self.key.public:
            return
        former = self.key.primary(text)
        if former not in ("", self.key.primary()):
            raise RequestError(
                f"repository {self.name} and its packages are signed by the key {former}, which users have, and not by "
                f"{self.key.fingerprint}, which `released.key` in {self.config.directory / 'config.yaml'} names: a "
                "repository keeps its key, name that one again"
            )

    def _recover(self) -> None:
        try:
            self.index = Index(self.place / "index.sqlite", self.form.compressions)
            generation = self.index.generation
            same = self.index.get("architectures") in (None, list(self._architectures))
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            log.warning("repository %s: the index is damaged: %s", self.name, error)
            generation, same = -1, False
        pointer = self._pointer()
        if same and generation == pointer + 1 and (self.root / "generations" / str(generation)).is_dir():
            record = self.generation(generation)
            log.info(
                "repository %s: generation %s was made by a run that was killed; it is finished", self.name, generation
            )
            self._point(generation, self._at(generation, record.time, record.stamp))
        elif not same or generation != pointer:
            self.rebuild()
        if (self.place / UNFINISHED).exists():
            self._sweep()

    def _sweep(self) -> None:
        """Remove what a killed run left: all that the index does not know."""
        pointer = self._pointer()
        known = {str(number) for number in self.index.generations()}
        for directory in (self.root / "generations").glob("*"):
            if directory.name not in known:
                self._remove(directory)
        for record in (self.root / "log").glob("[0-9]*.json"):
            if int(record.stem) > pointer:
                record.unlink()
        pooled = {self.directory(source, key) for key, source in self.index.pooled()}
        for source in (path for path in (self.root / "pool").glob("*") if not path.is_symlink()):
            for path in source.glob("*"):
                if path.relative_to(self.root).as_posix() not in pooled:
                    shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                source.rmdir()
        kept = set(self.index.files())
        for path in self._shared_files():
            if path.relative_to(self.root).as_posix() not in kept:
                path.unlink()
        (self.place / UNFINISHED).unlink(missing_ok=True)

    @staticmethod
    def _remove(generation: Path) -> None:
        """Remove a generation's directory: readers see all of it, or nothing. What cannot be removed now stays."""
        gone = generation.with_name(f".{generation.name.strip('.')}.gone")
        with suppress(OSError):
            generation.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _shared_files(self) -> Iterator[Path]:
        """Yield the metadata files that all generations share, and what a killed run left beside them."""
        for folder in self.form.shared:
            yield from (path for path in (self.root / folder).glob("*") if not path.is_symlink())

    @property
    def _architectures(self) -> tuple[str, ...]:
        return tuple(sorted({target.architecture for target in self.targets.values()}))

    @property
    def _valid_days(self) -> int:
        assert self.config.settings.released is not None
        return self.config.settings.released.valid_days if self.form.expires else 0

    def _at(self, number: int, now: datetime, stamp: int) -> Place:
        return Place(
            root=self.root,
            url=self.url,
            codename=self.codename,
            architectures=self._architectures,
            label=f"pkgci-{self.release}",
            key=self.key,
            signed=self.config.data / "signed" / self.key.fingerprint,
            number=number,
            time=now,
            until=now + timedelta(days=self._valid_days) if self._valid_days else None,
            stamp=stamp,
        )

    def _link(self, entry: Entry, origin: Origin, place: Place) -> Entry:
        """Put a build's files into the pool as hard links, with its provenance; return it there."""
        final = self.root / self.directory(entry.record.package, entry.record.key)
        if final.parent.is_symlink():
            raise InfrastructureError(f"{final.parent} is a symbolic link; nothing of ours makes one there")
        if final.exists():
            if self.index.has(entry.record.key):
                return Entry(final, entry.record)
            shutil.rmtree(final)
        new = final.with_name(f".{final.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        files = self.form.prepare(entry, place)
        for name, path in files.items():
            os.link(path, new / name)
        os.link(entry.directory / RECORD, new / RECORD)
        described = [describe(new / name) for name in files]
        statement = provenance(entry, described, origin, self.config.settings.url, self.release, describe_owner())
        statement.write(new / PROVENANCE)
        fsync_all([new / PROVENANCE, new])
        new.rename(final)
        fsync_all([final.parent, final.parent.parent])
        return Entry(final, entry.record)

    def _add(self, entry: Entry, place: Place) -> None:
        record = entry.record
        directory = self.directory(record.package, record.key)
        packages = [
            (one.name, one.architecture, one.version, one.sha256, f"{directory}/{one.file}") for one in record.packages
        ]
        self.index.add(record.key, (record.package, record.target, record.version), packages)
        self._fill(entry, place)

    def _fill(self, entry: Entry, place: Place) -> None:
        record = entry.record
        stanzas = self.form.stanzas(entry, self.directory(record.package, record.key), place)
        paths = {path for package in self.form.packaged(entry) for path in package.files}
        projects: list[str] = []
        # one that was lost is found by an audit
        with suppress(InfrastructureError):
            origin = self.origin(record.key, record.package)
            projects = [one.project for one in origin.commits] if origin else []
        self.index.fill(record.key, record.package, stanzas, paths, projects)

    @contextmanager
    def _lists(self, place: Place, sources: Iterable[str] | None) -> Iterator[list[Written]]:
        """Write the metadata files, joined from chunks, into what all generations share.

        They are yielded when they are written; the `with` ends when the format's tool has read what is new in them.
        """
        names = self.form.lists(place)
        kept = frozenset(self.index.files())
        written: dict[str, list[Written]] = {}
        # the main thread reads the index, the others compress, write and let the format's tool read
        with ThreadPoolExecutor(max_workers=4) as pool:
            examined, joined = [], {}
            for name in names:
                known = self.index.get(f"list {name}")
                fresh = self.index.refresh(name, sources if known else None)
                if known and not fresh:
                    written[name] = [Written(*row) for row in known]
                    continue
                examined.append(pool.submit(self.form.examine, name, fresh))
                frame = self.form.frame(name, self.index.count(name))
                joined[name] = [
                    pool.submit(self._join, name, which, frame, list(self.index.join(name, which)), place, kept)
                    for which in self.form.compressions
                ]
            written |= {name: [job.result() for job in jobs] for name, jobs in joined.items()}
            everything = [one for name in names for one in written[name]]
            for name in joined:
                self.index.set(f"list {name}", [[*vars(one).values()] for one in written[name]])
            self.index.set("architectures", list(place.architectures))
            self.index.wrote(self.form.path(one) for one in everything if one.compression != "plain")
            yield everything
            for job in examined:
                job.result()

    def _join(
        self,
        name: str,
        compression: str,
        frame: tuple[bytes, bytes],
        parts: list[bytes],
        place: Place,
        kept: Container[str],
    ) -> Written:
        """Write a metadata file from its chunks and what stands around them."""
        head, tail = (COMPRESSIONS[compression](part) if part else b"" for part in frame)
        parts = [head, *parts, tail]
        digest, size = hashlib.sha256(), 0
        for part in parts:
            digest.update(part)
            size += len(part)
        written = Written(name, compression, digest.hexdigest(), size)
        if compression == "plain":
            return written
        final = place.root / self.form.path(written)
        if self.form.path(written) not in kept:
            final.parent.mkdir(parents=True, exist_ok=True)
            new = final.with_name(f".{final.name}.new")
            with new.open("wb") as stream:
                stream.writelines(parts)
            new.rename(final)
        # the same content may have been there before: its time grows all the same
        os.utime(final, (place.stamp, place.stamp))
        return written

    def _point(self, number: int, place: Place) -> None:
        """Let readers see a generation, from one moment to the next."""
        # what a step is given as REPOSITORIES; its packages are in the index
        record = artifacts.Repository(
            url=self.url,
            format=self.format,
            codename=self.codename,
            target=min(self.targets),
            packages=(),
            signing_key=self.key.public,
            released=True,
        )
        public = {"key.asc": self.key.public, "repository.json": record.model_dump_json(indent=2, by_alias=True)}
        for name, content in {**self.form.clients(place), **public}.items():
            path = self.root / name
            if not path.exists() or path.read_text(errors="replace") != content:
                new = path.with_name(f".{name}.new")
                new.write_text(content)
                fsync(new)
                new.rename(path)
        self._write_keyring(place)
        for name, leads in self.form.links.items():
            with suppress(FileExistsError):
                (self.root / name).parent.mkdir(exist_ok=True)
                (self.root / name).symlink_to(leads)
        new = self.root / f".{CURRENT}.new"
        new.unlink(missing_ok=True)
        new.symlink_to(f"generations/{number}")
        new.rename(self.root / CURRENT)
        fsync(self.root)

    def _write_keyring(self, place: Place) -> None:
        """Make the keyring package anew when what is in it has changed, or it is damaged."""
        final, known = self.root / self.form.keyring(place), self.place / "keyring"

        def state() -> str:
            made = final.read_bytes() if final.exists() else b""
            return hashlib.sha256(f"{self.url}\n{self.key.public}\n".encode() + made).hexdigest()

        if known.exists() and known.read_text() == state():
            return
        new = self.place / ".keyring" / final.name
        shutil.rmtree(new.parent, ignore_errors=True)
        new.parent.mkdir()
        self.form.make_keyring(place, new)
        new.chmod(0o644)
        fsync(new)
        new.replace(final)
        shutil.rmtree(new.parent)
        # last: whoever is killed before makes it again
        known.write_text(state())

    def _pointer(self) -> int:
        try:
            return int(os.readlink(self.root / CURRENT).rpartition("/")[2])
        except FileNotFoundError:
            return 0

    def _prune(self) -> list[int]:
        """Remove what only generations had that no reader can still be at; return their numbers."""
        released = self.config.settings.released
        assert released is not None
        oldest = self.index.oldest(time.time() - released.keep_hours * 3600, released.keep_generations)
        with self.index.transaction():
            numbers, files, builds = self.index.forget(oldest)
        # whoever is killed here leaves what the index does not know
        for number in numbers:
            self._remove(self.root / "generations" / str(number))
        for name in files:
            (self.root / name).unlink(missing_ok=True)
        for key, source in builds:
            shutil.rmtree(self.root / self.directory(source, key), ignore_errors=True)
            with suppress(OSError):
                (self.root / "pool" / source).rmdir()
        return numbers

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with errors(self.place / "index.sqlite"):
            yield


def repositories(config: Config) -> Iterator[Repository]:
    """Yield the repositories of all releases, also those that nothing was published to yet."""
    for release in config.names("releases"):
        for codename in sorted({config.target(name).codename for name in config.release(release).targets}):
            yield Repository(config, release, codename)


def unlinked(config: Config, before: float) -> list[Path]:
    """Return the signed packages that no repository has any more, made before the time stamp `before`.

    Those that a killed run was about to sign are among them.
    """
    stats = ((path, path.stat()) for path in sorted((config.data / "signed").glob("*/*/*")))
    return [path for path, stat in stats if stat.st_nlink == 1 and stat.st_mtime < before]


def referenced(config: Config) -> set[str]:
    """Return the keys of all store entries whose files lie in the pool of a released repository."""
    records = (config.data / "repositories").glob(f"*/*/pool/*/*/{RECORD}")
    return {Record.read(path).key for path in records if not path.is_symlink()}


def rollback(
    config: Config, release: str, codename: str, number: int, reason: str, sources: Sequence[str] = ()
) -> Generation:
    """Put packages back to what a former generation had, as a new generation, and put them on hold.

    Args:
        config: the configuration.
        release: the release's name.
        codename: the targets' codename.
        number: the former generation.
        reason: why, in one line, for who publishes the package next.
        sources: these source packages only; all by default.

    Returns:
        The new generation.

    Raises:
        RequestError: there is no such generation any more, nothing differs from it, or the reason is not one line.
        InfrastructureError: the lock is held for too long, key or file system fail.
    """
    if not reason.strip() or not re.fullmatch(WORDS, reason):
        raise RequestError(
            "the reason of a rollback must be one line of 1 to 1000 characters, without control characters"
        )
    repository = Repository(config, release, codename)
    with repository.opened():
        repository.generation(number)
        if not (repository.root / "generations" / str(number)).is_dir():
            raise RequestError(f"generation {number} of {repository.name} is not kept any more: its packages are gone")
        then, now = repository.index.live_at(number), repository.index.live_at(repository.index.generation)
        differ = [repository.released(key) for key in sorted(then ^ now)]
        chosen = [build for build in differ if not sources or build.source in sources]
        if not chosen:
            raise RequestError(f"{repository.name} has the same builds as generation {number}; nothing to put back")
        unknown = sorted(set(sources) - {build.source for build in chosen})
        if unknown:
            raise RequestError(f"{ascii(unknown[0])[1:101]} is in {repository.name} as in generation {number} already")
        # first: whoever publishes while this run is killed must not bring back what it takes away
        for source in {build.source for build in chosen}:
            repository.hold(source, reason, repository.index.generation + 1)
        added = [(repository.entry(build.key, build.source), None) for build in chosen if build.key in then]
        removed = [build.key for build in chosen if build.key in now]
        question = repository.question([entry for entry, _ in added], removed)
        generation = repository.commit(added, removed, "rollback", reason)
    if question:
        # who takes a version back wants it now; what it breaks is said
        try:
            repository.refuse_unmet(question)
        except PkgciError as error:
            log.warning("generation %s of %s: %s", generation.number, repository.name, error)
    return generation


def released_from(
    config: Config, release: str, codename: str, projects: Collection[str]
) -> dict[str, tuple[str, str, Origin]]:
    """Return, by target, name and version of the source package that readers see, and where its sources were merged.

    Args:
        config: the configuration.
        release: the release's name.
        codename: the targets' codename.
        projects: all that it is made from; its name is what its packaging says.

    Raises:
        InfrastructureError: the lock is held for too long, or the file system fails.
    """
    repository = Repository(config, release, codename)
    if repository.current() is None:
        return {}
    with repository.opened():
        found = {}
        for key, source, target, version in repository.index.made_from(next(iter(projects))):
            origin = repository.origin(key, source)
            if origin and {one.project for one in origin.commits} == set(projects):
                found[target] = source, version, origin
        return found


def publish(
    config: Config,
    release: str,
    codename: str,
    publications: Sequence[Publication],
    siblings: Sequence[Publication] = (),
) -> Published:
    """Publish builds from the store as one generation; what is released already changes nothing.

    The builds that each source package had for the same target go, with the binary packages that it no longer makes.

    Args:
        config: the configuration.
        release: the release's name.
        codename: the targets' codename.
        publications: the builds.
        siblings: builds that were tested with them, and come with them, but for those that something stands against by
            themselves: a hold, or what is released already.

    Returns:
        The generation that readers see then, and where the builds are in it.

    Raises:
        RequestError: a build is not in the store, of another branch than the release claims, held, or of another target.
        PackageError: a package's version is lower than the released one, its content another, or its files conflict.
        InfrastructureError: a file is not as in its record, the lock is held for too long, key or file system fail.
    """
    repository = Repository(config, release, codename)
    store = Store(config)
    # before the lock: files are read, and it takes its time
    entries = [(checks.built(repository, store, one), one.origin) for one in publications]
    others, left = [], []
    for one in siblings:
        try:
            others.append((checks.built(repository, store, one), one.origin))
        except PkgciError as error:
            left.append(str(error))
    try:
        done = _publish(repository, entries, others)
    except PackageError as error:
        if not others:
            raise
        done = _publish(repository, entries, [])
        names = ", ".join(f"{entry.record.package} {entry.record.version}" for entry, _ in others)
        left.append(f"{names}: {error}")
    return replace(done, left=(*left, *done.left))


def _publish(
    repository: Repository,
    entries: Sequence[tuple[Entry, Origin]],
    others: Sequence[tuple[Entry, Origin]],
    *,
    asked: bool = False,
) -> Published:
    """Publish builds, and those of the others that nothing stands against by themselves.

    Dependencies are asked about without the lock, and with it only if another publication came between.
    """
    with repository.opened():
        chosen, left = list(entries), []
        for entry, origin in others:
            try:
                checks.admit(repository, entry)
                chosen.append((entry, origin))
            except checks.AGAINST as error:
                left.append(str(error))
        changed = checks.changes(repository, chosen)
        generation = repository.current()
        if generation and not changed.added:
            log.info("all of it is in generation %s of %s already", generation.number, repository.name)
            return Published(repository, generation, changed.keys, False, tuple(left))
        question = repository.question([entry for entry, _ in changed.added], changed.removed)
        if question and asked:
            repository.refuse_unmet(question)
        if asked or not question:
            generation = repository.commit(changed.added, changed.removed, "publish")
            return Published(repository, generation, changed.keys, bool(changed.added), tuple(left))
    repository.refuse_unmet(question)
    return _publish(repository, entries, others, asked=True)


def try_to_publish(
    config: Config, release: str, codename: str, publications: Sequence[Publication], *, approved: bool = False
) -> list[str]:
    """Refuse what `publish` would refuse, and change nothing: so that it is found out before the merge.

    A hold is only told, unless the changes are approved: what mends a package may be reviewed while it is on hold.

    What the package managers answer here is not asked again by a publication of the same, as long as no other came
    between.

    Args:
        config: the configuration.
        release: the release's name.
        codename: the targets' codename.
        publications: the builds; their origins are where they will be merged.
        approved: somebody has approved their changes.

    Returns:
        The source packages that build-depend on what these builds change, and that nobody builds anew.

    Raises:
        PkgciError: as `publish`.
    """
    repository = Repository(config, release, codename)
    entries = [(checks.built(repository, Store(config), one, dry=True), one.origin) for one in publications]
    with repository.opened():
        changed = checks.changes(repository, entries, held=not approved)
        added = [entry for entry, _ in changed.added]
        question = repository.question(added, changed.removed)
        dependants = repository.dependants(added, changed.removed)
    if question:
        repository.refuse_unmet(question)
    return dependants
