"""The metadata of a generation of a DEB repository: `dists/CODENAME/`, with `by-hash` shared by all generations."""

import gzip
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pkgci.artifacts import Contents
from pkgci.command import run
from pkgci.errors import InfrastructureError, PackageError
from pkgci.formats import apt, contents
from pkgci.lazy import Lazy
from pkgci.released.base import Offered, Packaged, Place, Relation, Written
from pkgci.released.index import Stanza
from pkgci.released.key import ReleaseKey
from pkgci.store import Entry

deb822 = Lazy("debian.deb822")
zstandard = Lazy("zstandard")

COMPRESSIONS = ("plain", "gz", "zst")
BY_HASH = "by-hash/SHA256"
# Debian Policy, 7.1; without what it says of architectures
RELATION = re.compile(r"([A-Za-z0-9][A-Za-z0-9+.-]*)(?::\S+)?(?: *\((<<|<=|=|>=|>>) *([^\s)]+)\))?")
# a line of a Release file
COMPRESSED = re.compile(r"^ ([0-9a-f]{64}) +[0-9]+ \S+\.(?:gz|zst)$", re.MULTILINE)
SOURCES = f"{apt.COMPONENT}/source/Sources"


class Deb:
    """The verbs of `base.Form` for DEB."""

    sources = SOURCES
    compressions = COMPRESSIONS
    shared = (BY_HASH,)
    links: Mapping[str, str] = {"dists": "current/dists"}
    expires = True

    def lists(self, place: Place) -> list[str]:
        """Return the metadata files' names below `dists/CODENAME/`."""
        return [*(_packages(one) for one in place.architectures), SOURCES]

    def binary_lists(self, architecture: str) -> list[str]:
        """Return the name of an architecture's `Packages`."""
        return [_packages(architecture)]

    def prepare(self, entry: Entry, _place: Place) -> dict[str, Path]:
        """Return the files of a build that are linked into the pool, by name: as the store has them."""
        names = {file.name for file in entry.record.files} & {*apt.pool(entry), apt.STANZAS, contents.NAME}
        return {name: entry.directory / name for name in sorted(names)}

    def stanzas(self, entry: Entry, directory: str, place: Place) -> list[Stanza]:
        """Return what the index says of a build in the pool's `directory`."""
        paths = {name: f"{directory}/{name}" for name in apt.pool(entry)}
        found = []
        for stanza in apt.binaries(entry, paths):
            own = str(stanza["Architecture"])
            text = f"{stanza.dump()}\n".encode()
            architectures = place.architectures if own == "all" else [own]
            found += [Stanza(_packages(one), str(stanza["Filename"]), text) for one in architectures]
        sources = apt.sources(entry, paths)
        found += [Stanza(SOURCES, str(stanza["Package"]), f"{stanza.dump()}\n".encode()) for stanza in sources]
        return found

    def packaged(self, entry: Entry) -> list[Packaged]:
        """Return what is in a build's binary packages, by what its sandbox read of them.

        Source: Debian Policy, 7.4 and 7.6: who conflicts with or replaces another package may have its files.

        Raises:
            PackageError: not all files of one are known.
        """
        if not any(file.name == contents.NAME for file in entry.record.files):
            return []
        packages = Contents.read(entry.directory / contents.NAME).packages
        for one in packages:
            if one.more_files:
                raise PackageError(
                    f"{one.name} {one.version} has too many files: {one.more_files} are not known, and may be another "
                    "package's, too; split it"
                )
        return [
            Packaged(
                name=one.name,
                version=one.version,
                files={file.path: "" for file in one.files if not file.mode.startswith("d")},
                provides=frozenset(words.split()[0] for words in one.relations.get("Provides", ()) if words.split()),
                apart=tuple(
                    Relation(*found.groups(default=""))
                    for field in ("Conflicts", "Replaces")
                    for found in map(RELATION.match, one.relations.get(field, ()))
                    if found
                ),
            )
            for one in packages
        ]

    def frame(self, _name: str, _count: int) -> tuple[bytes, bytes]:
        """Return what stands before and after the stanzas of a metadata file: nothing."""
        return b"", b""

    def path(self, written: Written) -> str:
        """Return where a metadata file is below the repository's root, for all generations."""
        return f"{BY_HASH}/{written.digest}"

    def examine(self, name: str, chunks: Sequence[bytes]) -> None:
        """Let apt parse the chunks that are new."""
        if name == SOURCES:
            return
        with tempfile.TemporaryDirectory() as scratch:
            status = Path(scratch, "status")
            status.write_bytes(b"".join(chunks))
            options = {"Dir::State::status": status, "Dir::State::lists": scratch, "Dir::Etc": scratch}
            options |= {"Dir::Cache::pkgcache": "", "Dir::Cache::srcpkgcache": ""}
            words = [word for option, value in options.items() for word in ("-o", f"{option}={value}")]
            run(["apt-cache", *words, "stats"], env={"APT_CONFIG": "/dev/null"}, quiet=True)

    def finish(self, new: Path, place: Place, files: Sequence[Written]) -> list[Path]:
        """Write `dists/CODENAME/` of a generation below the directory `new`, signed; verify and return its pointer files."""
        distribution = new / "dists" / place.codename
        listed = []
        for written in files:
            suffix = "" if written.compression == "plain" else f".{written.compression}"
            path = distribution / f"{written.list}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if suffix:
                os.link(place.root / self.path(written), path)
            elif not (path.parent / "by-hash").is_symlink():
                # generations/N/dists/CODENAME/main/KIND/ up to the root
                (path.parent / "by-hash").symlink_to("../../../../../../by-hash")
            listed.append(f" {written.digest} {written.size} {written.list}{suffix}")
        text = apt.release(place.codename, place.architectures, place.label, place.time, listed, place.until)
        pointers = [distribution / name for name in ("Release", "Release.gpg", "InRelease")]
        signed, detached = place.key.sign_both(text)
        for path, content in zip(pointers, (text, detached, signed), strict=True):
            path.write_bytes(content)
        if place.key.verify_both(pointers[2], pointers[1], pointers[0]) != text:
            raise InfrastructureError(f"{pointers[2]}: what is signed is not the Release file")
        return pointers

    def shared_files(self, generation: Path) -> list[str]:
        """Return the paths below the root of the metadata files that a generation's `Release` names."""
        texts = [path.read_text() for path in generation.glob("dists/*/Release")]
        return sorted({f"{BY_HASH}/{digest}" for text in texts for digest in COMPRESSED.findall(text)})

    def clients(self, place: Place) -> dict[str, str]:
        """Return what users need, by the names of files at the repository's root."""
        return {
            apt.CLIENT: apt.client(place.url, place.codename, place.key.public),
            "README": f"""{place.label} for {place.codename}: packages in an index that is signed by the key
{place.key.fingerprint}

Install the key and the lines for apt, once (they lead to the repository itself, also from one of its mirrors):
  curl -fsSO {place.url}{self.keyring(place)}
  sudo apt-get install ./{self.keyring(place)}
or only the lines, with the key in them (they lead here):
  sudo curl -fsSo /etc/apt/sources.list.d/{place.label}.sources {place.url}{apt.CLIENT}
then:
  sudo apt-get update
""",
        }

    def keyring(self, place: Place) -> str:
        """Return the file name of the package that brings users the key and the lines, at the repository's root."""
        return f"{place.label}-keyring.deb"

    def make_keyring(self, place: Place, path: Path) -> None:
        """Make that package; see deb-control(5)."""
        tree = path.with_name("tree")
        key = f"usr/share/keyrings/{place.label}.gpg"
        lines = f"etc/apt/sources.list.d/{place.label}.sources"
        files = {
            key: place.key.keyring.read_bytes(),
            lines: apt.client(place.url, place.codename, f"/{key}").encode(),
            "DEBIAN/conffiles": f"/{lines}\n".encode(),
            "DEBIAN/control": (
                f"Package: {place.label}-keyring\nVersion: {place.time:%Y%m%d.%H%M%S}\nArchitecture: all\n"
                f"Maintainer: {place.key.owner}\nSection: misc\nPriority: optional\n"
                f"Description: key and apt source of {place.label} for {place.codename}\n"
            ).encode(),
        }
        for name, content in files.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(content)
            (tree / name).chmod(0o644)
        for directory in (tree, *(one for one in tree.rglob("*") if one.is_dir())):
            directory.chmod(0o755)
        run(["dpkg-deb", "--root-owner-group", "--build", tree, path], quiet=True)

    def read(self, generation: Path, key: ReleaseKey) -> Iterator[Offered]:
        """Yield what a generation in its directory offers; as `base.Form`."""
        for distribution in (generation / "dists").iterdir():
            text = key.verify(distribution / "InRelease")
            if text != (distribution / "Release").read_bytes():
                raise InfrastructureError(f"{distribution}: Release and InRelease differ")
            key.verify(distribution / "Release.gpg", distribution / "Release")
            listed = {str(one["name"]): one for one in deb822.Release(text)["SHA256"]}
            for name, one in listed.items():
                if not name.endswith(".gz"):
                    continue
                path = distribution / name
                for place in (path, path.parent / BY_HASH / str(one["sha256"])):
                    _check(place, int(one["size"]), str(one["sha256"]))
                plain = gzip.decompress(path.read_bytes())
                about = listed[name.removesuffix(".gz")]
                zst = listed[f"{name.removesuffix('.gz')}.zst"]
                _check(path.with_suffix(".zst"), int(zst["size"]), str(zst["sha256"]))
                with zstandard.open(path.with_suffix(".zst")) as stream:
                    if stream.read() != plain:
                        raise InfrastructureError(f"{path}: it is not the same as {path.stem}.zst")
                if (len(plain), hashlib.sha256(plain).hexdigest()) != (int(about["size"]), about["sha256"]):
                    raise InfrastructureError(f"{path}: its content is not what the Release file says")
                yield from _offered(name, plain)

    def texts(self, generation: Path) -> dict[str, list[bytes]]:
        """Return the stanzas of each `Packages`."""
        found = {}
        for path in generation.glob(f"dists/*/{apt.COMPONENT}/binary-*/Packages.gz"):
            stanzas = gzip.decompress(path.read_bytes()).split(b"\n\n")
            found[_packages(path.parent.name.removeprefix("binary-"))] = [b"%b\n\n" % one for one in stanzas if one]
        return found

    def examine_package(self, path: Path, key: ReleaseKey) -> None:
        """Check a package file; its checksum is in the signed index, so there is no more to it than that."""


def _check(path: Path, size: int, digest: str) -> None:
    with path.open("rb") as stream:
        if path.stat().st_size != size or hashlib.file_digest(stream, "sha256").hexdigest() != digest:
            raise InfrastructureError(f"{path} is not what the Release file says")


def _offered(name: str, plain: bytes) -> Iterator[Offered]:
    for stanza in deb822.Deb822.iter_paragraphs(plain, use_apt_pkg=False):
        if name.startswith(SOURCES):
            for line in str(stanza["Checksums-Sha256"]).strip().splitlines():
                digest, size, file = line.split()
                yield Offered(f"{stanza['Directory']}/{file}", int(size), digest)
        else:
            yield Offered(str(stanza["Filename"]), int(stanza["Size"]), str(stanza["SHA256"]))


def _packages(architecture: str) -> str:
    return f"{apt.COMPONENT}/binary-{architecture}/Packages"
