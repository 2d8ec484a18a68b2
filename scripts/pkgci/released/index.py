"""The index of a released repository: an SQLite database beside it, so that a publication's cost follows what changes.

It knows which builds were published when, and keeps the text of the repository's metadata as chunks, each compressed on
its own: a publication makes the chunks of the packages that change anew, and joins all. Where chunks begin is decided by
the source packages' names alone, so that the same packages always give the same bytes.

It holds nothing that the pool and the log of generations do not: when it is lost, it is made again.

Source: RFC 1952, 2.2 (a gzip file is a series of members); RFC 8878, 3 (a zstd file is a series of frames). apt and dnf
read both so; of xz only apt's and dnf's first stream.
"""

import gzip
import hashlib
import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pkgci.errors import InfrastructureError
from pkgci.lazy import Lazy

zstandard = Lazy("zstandard")

SCHEMA = 2
TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
INSERT INTO meta VALUES ('schema', 2), ('generation', 0);
CREATE TABLE builds (key TEXT PRIMARY KEY, source TEXT, target TEXT, version TEXT) WITHOUT ROWID;
CREATE TABLE lives (key TEXT, since INTEGER, until INTEGER, PRIMARY KEY (key, since)) WITHOUT ROWID;
CREATE INDEX lives_until ON lives (until);
CREATE TABLE packages (key TEXT, name TEXT, architecture TEXT, version TEXT, sha256 TEXT, file TEXT,
    PRIMARY KEY (key, file)) WITHOUT ROWID;
CREATE INDEX packages_name ON packages (name, architecture);
CREATE INDEX builds_source ON builds (source, target);
CREATE TABLE stanzas (list TEXT, source TEXT, key TEXT, file TEXT, text BLOB,
    PRIMARY KEY (list, source, key, file)) WITHOUT ROWID;
CREATE INDEX stanzas_key ON stanzas (key);
CREATE TABLE chunks (list TEXT, compression TEXT, first TEXT, packages INTEGER, data BLOB,
    PRIMARY KEY (list, compression, first));
CREATE TABLE paths (hash INTEGER, key TEXT, PRIMARY KEY (hash, key)) WITHOUT ROWID;
CREATE INDEX paths_key ON paths (key);
CREATE TABLE origins (project TEXT, key TEXT, PRIMARY KEY (project, key)) WITHOUT ROWID;
CREATE INDEX origins_key ON origins (key);
CREATE TABLE generations (number INTEGER PRIMARY KEY, replaced REAL);
CREATE TABLE written (path TEXT PRIMARY KEY, until INTEGER) WITHOUT ROWID;
CREATE INDEX written_until ON written (until);
"""
# a chunk begins at a source package whose name's hash is a multiple of this: so many a chunk on average. Fewer make a
# publication cheaper, and the whole larger: with Debian's own packages this costs +1 % (gzip) and +3 % (zstd)
SOURCES_IN_CHUNK = 320
COMPRESSIONS: Mapping[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gz": lambda data: gzip.compress(data, 6, mtime=0),
    "zst": lambda data: zstandard.ZstdCompressor(level=6).compress(data),
}
# kept for all metadata files: where chunks begin is read from it
MAIN = "gz"


@dataclass(frozen=True)
class Stanza:
    """What the metadata file `list` says about the package `file` of a build."""

    list: str
    file: str
    text: bytes


@dataclass(frozen=True)
class Released:
    """A package as it is or was in the repository."""

    key: str
    source: str
    target: str
    name: str
    architecture: str
    version: str
    sha256: str
    file: str


class Index:
    """The index in the file `path`.

    Args:
        path: the database; made if it is not there.
        compressions: which of COMPRESSIONS each chunk is kept in.

    Raises:
        sqlite3.DatabaseError: it is damaged, or of another version of this program.
        InfrastructureError: it cannot be written.
    """

    def __init__(self, path: Path, compressions: Sequence[str]) -> None:
        self._compressions = compressions
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        if not self._one("SELECT count(*) FROM sqlite_master"):
            # one transaction: whoever is killed here leaves an empty file
            self._database.executescript(f"BEGIN; {TABLES} COMMIT;")
        if self._one("SELECT value FROM meta WHERE name = 'schema'") != SCHEMA:
            raise sqlite3.DatabaseError("of another version of pkgci")

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Keep what is changed in the `with` when it ends well, and nothing of it otherwise."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            # an error of SQLite itself may have ended the transaction
            with suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            raise

    @property
    def generation(self) -> int:
        """The number of the generation that the index is of; 0 before the first."""
        return self._one("SELECT value FROM meta WHERE name = 'generation'")

    def begin(self, number: int, replaced: float) -> None:
        """Go on to generation `number`, which replaces the former one at the time stamp `replaced`."""
        self._database.execute("UPDATE meta SET value = ? WHERE name = 'generation'", [number])
        self._database.execute("INSERT INTO generations VALUES (?, ?)", [number - 1, replaced])

    def live(self) -> list[tuple[str, str]]:
        """Return key and source of all builds that the repository has now, oldest first."""
        query = "SELECT key, source FROM lives CROSS JOIN builds USING (key) WHERE until IS NULL ORDER BY since, source"
        return self._database.execute(query).fetchall()

    def live_of(self, source: str) -> list[tuple[str, str, str]]:
        """Return key, target and version of the builds of a source package that the repository has now."""
        query = "SELECT key, target, version FROM builds JOIN lives USING (key) WHERE source = ? AND until IS NULL"
        return self._database.execute(query, [source]).fetchall()

    def made_from(self, project: str) -> list[tuple[str, str, str, str]]:
        """Return key, source, target and version of the builds from a project that the repository has now, oldest first."""
        query = (
            "SELECT key, source, target, version FROM origins JOIN lives USING (key) JOIN builds USING (key) "
            "WHERE project = ? AND until IS NULL ORDER BY since"
        )
        return self._database.execute(query, [project]).fetchall()

    def projects_of(self, source: str) -> list[str]:
        """Return the projects of the builds of a source package that the repository has now."""
        query = (
            "SELECT DISTINCT project FROM builds JOIN lives USING (key) JOIN origins USING (key) "
            "WHERE source = ? AND until IS NULL"
        )
        return [project for (project,) in self._database.execute(query, [source])]

    def since(self, key: str) -> int:
        """Return the generation that a build which the repository has now came with."""
        return self._one("SELECT since FROM lives WHERE key = ? AND until IS NULL", key)

    def live_at(self, generation: int) -> set[str]:
        """Return the keys of the builds of a generation."""
        query = "SELECT key FROM lives WHERE since <= ?1 AND (until IS NULL OR until > ?1)"
        return {key for (key,) in self._database.execute(query, [generation])}

    def has(self, key: str) -> bool:
        """Return whether the pool has a build's files: this generation's, or one's that is kept."""
        return self._one("SELECT 1 FROM lives WHERE key = ? LIMIT 1", key) is not None

    def pooled(self) -> list[tuple[str, str]]:
        """Return key and source of all builds whose files the pool has."""
        return self._database.execute("SELECT DISTINCT key, source FROM lives JOIN builds USING (key)").fetchall()

    def generations(self) -> list[int]:
        """Return the numbers of all generations that are kept."""
        former = self._database.execute("SELECT number FROM generations WHERE number > 0")
        return [*(number for (number,) in former), self.generation]

    def build(self, key: str) -> tuple[str, str, str] | None:
        """Return source, target and version of a build that is or was in the repository."""
        return self._database.execute("SELECT source, target, version FROM builds WHERE key = ?", [key]).fetchone()

    def packages(self, name: str, architecture: str, *, live: bool) -> list[Released]:
        """Return the packages of a name and architecture that the repository has now, or (not `live`) ever had."""
        return [
            Released(*row)
            for row in self._database.execute(
                "SELECT DISTINCT packages.key, source, target, name, architecture, packages.version, sha256, file "
                "FROM packages JOIN builds USING (key) LEFT JOIN lives ON lives.key = packages.key AND until IS NULL "
                "WHERE name = ? AND architecture = ? AND (since IS NOT NULL OR NOT ?)",
                [name, architecture, live],
            )
        ]

    def packages_of(self, key: str) -> list[Released]:
        """Return the packages of a build."""
        return [
            Released(*row)
            for row in self._database.execute(
                "SELECT key, source, target, name, architecture, packages.version, sha256, file "
                "FROM packages JOIN builds USING (key) WHERE key = ?",
                [key],
            )
        ]

    def neighbours(self, paths: Collection[str], without: Collection[str]) -> set[str]:
        """Return the keys of the builds that may have one of these paths, by their hashes, but those of `without`."""
        query = "SELECT DISTINCT key FROM paths WHERE hash IN (SELECT value FROM json_each(?))"
        found = {key for (key,) in self._database.execute(query, [json.dumps([_hash(path) for path in paths])])}
        return found.difference(without)

    def get(self, name: str):
        """Return what `set` noted, or None."""
        value = self._one("SELECT value FROM meta WHERE name = ?", f"={name}")
        return None if value is None else json.loads(value)

    def set(self, name: str, value: object) -> None:
        """Note a value that JSON can hold."""
        self._database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", [f"={name}", json.dumps(value)])

    def add(self, key: str, build: tuple[str, str, str], packages: Iterable[tuple[str, str, str, str, str]]) -> None:
        """Note that a build comes into the repository.

        Args:
            key: its key.
            build: source, target, version.
            packages: name, architecture, version, sha256, file of each.
        """
        run = self._database
        run.execute("INSERT OR IGNORE INTO builds VALUES (?, ?, ?, ?)", [key, *build])
        run.execute("INSERT INTO lives VALUES (?, ?, NULL)", [key, self.generation])
        run.executemany("INSERT OR IGNORE INTO packages VALUES (?, ?, ?, ?, ?, ?)", ([key, *row] for row in packages))

    def fill(
        self, key: str, source: str, stanzas: Iterable[Stanza], paths: Iterable[str], projects: Iterable[str] = ()
    ) -> None:
        """Put into the index what the metadata files say about a build, the paths of the files in its packages, and the
        projects that it is made from.
        """
        rows = ([one.list, source, key, one.file, one.text] for one in stanzas)
        self._database.executemany("INSERT INTO stanzas VALUES (?, ?, ?, ?, ?)", rows)
        self._database.executemany("INSERT OR IGNORE INTO paths VALUES (?, ?)", ((_hash(path), key) for path in paths))
        self._database.executemany("INSERT OR IGNORE INTO origins VALUES (?, ?)", ([one, key] for one in projects))

    def remove(self, key: str) -> None:
        """Take a build out of the repository; it stays known."""
        run = self._database
        run.execute("UPDATE lives SET until = ? WHERE key = ? AND until IS NULL", [self.generation, key])
        run.execute("DELETE FROM stanzas WHERE key = ?", [key])
        run.execute("DELETE FROM paths WHERE key = ?", [key])
        run.execute("DELETE FROM origins WHERE key = ?", [key])

    def texts(self, name: str, without: Collection[str] = ()) -> list[bytes]:
        """Return what a metadata file says of each package, but those of the builds `without`."""
        query = "SELECT text FROM stanzas WHERE list = ? AND key NOT IN (SELECT value FROM json_each(?))"
        return [text for (text,) in self._database.execute(query, [name, json.dumps(list(without))])]

    def refresh(self, name: str, sources: Iterable[str] | None) -> list[bytes]:
        """Make the chunks of a metadata file anew in which source packages changed; return their texts.

        Args:
            name: the metadata file's name, as of `Stanza.list`.
            sources: the names of the source packages; None for all.
        """
        everything = "SELECT DISTINCT source FROM stanzas WHERE list = ?"
        if sources is None:
            self._database.execute("DELETE FROM chunks WHERE list = ?", [name])
            sources = [source for (source,) in self._database.execute(everything, [name])]
        # the first chunk is always there: a compressed file without any part would be none
        there = self._begun(name, "")
        made: dict[str, bytes] = {} if there else {"": b""}
        for source in sorted(sources):
            has = self._one("SELECT 1 FROM stanzas WHERE list = ? AND source = ? LIMIT 1", name, source)
            begins = _begins(source)
            if begins and not has:
                # what was behind it goes to the chunk before
                self._database.execute("DELETE FROM chunks WHERE list = ? AND first = ?", [name, source])
                made.pop(source, None)
            elif begins and not self._begun(name, source):
                before = self._first(name, source)
                query = "INSERT INTO chunks (list, compression, first) VALUES (?, ?, ?)"
                self._database.execute(query, [name, MAIN, source])
                made[before] = b""
            made[self._first(name, source)] = b""
        for first in made:
            made[first] = self._compress(name, first)
        return list(made.values())

    def join(self, name: str, compression: str) -> Iterator[bytes]:
        """Yield a metadata file, as `compression` has it, in parts."""
        query = "SELECT data FROM chunks WHERE list = ? AND compression = ? ORDER BY first"
        for (part,) in self._database.execute(query, [name, compression]):
            yield part

    def count(self, name: str) -> int:
        """Return how many packages a metadata file has."""
        return self._one("SELECT sum(packages) FROM chunks WHERE list = ? AND compression = ?", name, MAIN)

    def wrote(self, current: Iterable[str]) -> None:
        """Note the files that this generation's metadata consist of; what the former one had beyond them is not needed."""
        names = list(current)
        query = "UPDATE written SET until = ? WHERE until IS NULL AND path NOT IN (SELECT value FROM json_each(?))"
        self._database.execute(query, [self.generation, json.dumps(names)])
        self._database.executemany("INSERT OR REPLACE INTO written VALUES (?, NULL)", ([name] for name in names))

    def files(self) -> list[str]:
        """Return the files of all generations that are kept, as noted by `wrote`."""
        return [path for (path,) in self._database.execute("SELECT path FROM written")]

    def oldest(self, before: float, keep: int) -> int:
        """Return the number of the oldest generation that is kept.

        Args:
            before: a generation that was replaced after this time stamp is kept.
            keep: so many former generations are kept in any case.
        """
        current = self.generation
        replaced = self._one("SELECT min(number) FROM generations WHERE replaced >= ?", before)
        return max(1, min(current if replaced is None else replaced, current - keep))

    def forget(self, oldest: int) -> tuple[list[int], list[str], list[tuple[str, str]]]:
        """Forget what only generations before `oldest` have: return their numbers, files, and keys and sources of builds.

        A generation's own packages stay known, so that no other content gets their names and versions.
        """
        run = self._database
        numbers = [number for (number,) in run.execute("SELECT number FROM generations WHERE number < ?", [oldest])]
        files = [path for (path,) in run.execute("SELECT path FROM written WHERE until <= ?", [oldest])]
        builds = run.execute(
            "SELECT key, source FROM builds WHERE key IN (SELECT key FROM lives WHERE until <= ?1) AND NOT EXISTS "
            "(SELECT 1 FROM lives WHERE lives.key = builds.key AND (until IS NULL OR until > ?1))",
            [oldest],
        ).fetchall()
        run.execute("DELETE FROM generations WHERE number < ?", [oldest])
        run.execute("DELETE FROM written WHERE until <= ?", [oldest])
        run.execute("DELETE FROM lives WHERE until <= ?", [oldest])
        return numbers, files, builds

    def _compress(self, name: str, first: str) -> bytes:
        query = "SELECT min(first) FROM chunks WHERE list = ? AND compression = ? AND first > ?"
        following = self._one(query, name, MAIN, first)
        texts = [
            text
            for (text,) in self._database.execute(
                "SELECT text FROM stanzas WHERE list = ?1 AND source >= ?2 AND (?3 IS NULL OR source < ?3) "
                "ORDER BY source, key, file",
                [name, first, following],
            )
        ]
        plain = b"".join(texts)
        # the compressors let each other run, and most of a publication's own time is theirs
        with ThreadPoolExecutor() as threads:
            chunks = threads.map(lambda one: COMPRESSIONS[one](plain), self._compressions)
            rows = [[name, one, first, len(texts), data] for one, data in zip(self._compressions, chunks, strict=True)]
        self._database.executemany("INSERT OR REPLACE INTO chunks VALUES (?, ?, ?, ?, ?)", rows)
        return plain

    def _first(self, name: str, source: str) -> str:
        """Return where the chunk begins that a source package belongs to: the empty name is before all."""
        query = "SELECT max(first) FROM chunks WHERE list = ? AND compression = ? AND first <= ?"
        return self._one(query, name, MAIN, source) or ""

    def _begun(self, name: str, first: str) -> bool:
        query = "SELECT 1 FROM chunks WHERE list = ? AND compression = ? AND first = ?"
        return self._one(query, name, MAIN, first) is not None

    def _one(self, query: str, *arguments: object):
        row = self._database.execute(query, arguments).fetchone()
        return row and row[0]


@contextmanager
def errors(path: Path) -> Iterator[None]:
    """Say an error of SQLite in our own words.

    Raises:
        InfrastructureError: instead of `sqlite3.Error`.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise InfrastructureError(
            f"{path}: {error}; nothing was published. When it is damaged remove it: it is made again from the pool"
        ) from error


def _begins(source: str) -> bool:
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:4]) % SOURCES_IN_CHUNK == 0


def _hash(path: str) -> int:
    return int.from_bytes(hashlib.sha256(path.encode(errors="surrogateescape")).digest()[:8], signed=True)
