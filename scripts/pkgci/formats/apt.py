"""The index of an APT repository: `Packages`, `Sources`, `Release`, `InRelease`, `Release.gpg`, `by-hash`.

One component, `main`; the distribution is the operating system's codename. No package is opened here: what its control
file says was read in the sandbox of its build, which left it as stanzas in `index.packages`, and even those are taken
with care. Names, sizes and checksums are those of the store's verified files.

Source: https://wiki.debian.org/DebianRepository/Format; Debian Policy, chapter 5.
"""

import gzip
import hashlib
import lzma
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

from pkgci.artifacts import File
from pkgci.config import Target
from pkgci.errors import InfrastructureError, PackageError
from pkgci.formats import contents
from pkgci.keys import SigningKey, verified
from pkgci.lazy import Lazy
from pkgci.store import Entry

deb822 = Lazy("debian.deb822")

CLIENT = "pkgci.sources"
# the file that vouches for all of an index
POINTER = "dists/{codename}/InRelease"
# all files with signatures, and signatures
SIGNED = (POINTER, "dists/{codename}/Release", "dists/{codename}/Release.gpg")
STANZAS = "index.packages"
COMPONENT = "main"
BYTES = 4 << 20
COMPRESSIONS: Mapping[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".xz": lzma.compress,
}
# what the index says about a file by itself, or what only a repository may say about a package
OURS = {"filename", "size", "md5sum", "sha1", "sha256", "sha512", "description-md5", "phased-update-percentage"}
OURS_OF_SOURCE = {"source", "directory", "files", "checksums-sha1", "checksums-sha256", "checksums-sha512"}
# fields of several lines; all others are folded ones at most
MULTILINE = {"description", "package-list"}


def pool(entry: Entry) -> list[str]:
    """Return the files of a build that a repository offers: binary packages and the source package."""
    beside = (STANZAS, contents.NAME, ".changes", ".buildinfo")
    return [file.name for file in entry.record.files if not file.name.endswith(beside)]


def write_index(
    root: Path, entries: Iterable[Entry], paths: Mapping[str, str], target: Target, label: str, key: SigningKey
) -> None:
    """Write `dists/CODENAME/` below `root`, and verify its signature.

    Args:
        root: the repository's root, with the pool already in it.
        entries: the builds whose packages are offered.
        paths: for the name of each file of `pool`, its path below the root.
        target: says codename and architecture.
        label: `Label` and `Origin` of the repository, by which apt's pins can tell it from others.
        key: signs it.

    Raises:
        PackageError: a package's control data are not what they may be.
    """
    offered, offered_sources = [], []
    for entry in entries:
        offered += binaries(entry, paths)
        offered_sources += sources(entry, paths)
    distribution = root / "dists" / target.codename
    indexes = {
        f"{COMPONENT}/binary-{target.architecture}/Packages": offered,
        f"{COMPONENT}/source/Sources": offered_sources,
    }
    listed = []
    for name, stanzas in indexes.items():
        data = "\n".join(stanza.dump() for stanza in stanzas).encode()
        for suffix, compress in COMPRESSIONS.items():
            compressed = compress(data)
            digest = hashlib.sha256(compressed).hexdigest()
            path = distribution / f"{name}{suffix}"
            by_hash = path.parent / "by-hash" / "SHA256" / digest
            by_hash.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(compressed)
            os.link(path, by_hash)
            listed.append(f" {digest} {len(compressed)} {name}{suffix}")
    text = release(target.codename, [target.architecture], label, datetime.now(UTC), listed)
    (distribution / "Release").write_bytes(text)
    (distribution / "Release.gpg").write_bytes(key.detach_sign(text))
    (distribution / "InRelease").write_bytes(key.clearsign(text))
    if key.verify(distribution / "InRelease") != text:
        raise InfrastructureError(f"{distribution}/InRelease: what is signed is not the Release file")
    key.verify(distribution / "Release.gpg", distribution / "Release")


def indexes(root: Path, codename: str, public_key: str) -> Iterator[File]:
    """Yield the index files of a repository of ours whose `SIGNED` files are below `root`, by their paths below it.

    Raises:
        InfrastructureError: a signature is not good.
        KeyError, ValueError, TypeError: what is signed is no Release file.
    """
    place = root / "dists" / codename
    text = verified(public_key, place / "InRelease")
    verified(public_key, place / "Release.gpg", place / "Release")
    if text != (place / "Release").read_bytes():
        raise InfrastructureError(f"{place}: InRelease and Release differ")
    for one in deb822.Release(text)["SHA256"]:
        folder, _, _ = one["name"].rpartition("/")
        for name in (one["name"], f"{folder}/by-hash/SHA256/{one['sha256']}"):
            yield File(name=f"dists/{codename}/{name}", size=int(one["size"]), sha256=one["sha256"])


def pooled(root: Path, codename: str) -> Iterator[File]:
    """Yield the files of the pool that the index files below `root` name, of source packages too.

    Raises:
        KeyError, ValueError, TypeError: they are no such files.
    """
    place = root / "dists" / codename / COMPONENT
    for path in place.glob("binary-*/Packages"):
        for stanza in deb822.Packages.iter_paragraphs(path.read_bytes(), use_apt_pkg=False):
            yield File(name=stanza["Filename"], size=int(stanza["Size"]), sha256=stanza["SHA256"])
    for stanza in deb822.Sources.iter_paragraphs((place / "source" / "Sources").read_bytes(), use_apt_pkg=False):
        for one in stanza["Checksums-Sha256"]:
            yield File(name=f"{stanza['Directory']}/{one['name']}", size=int(one["size"]), sha256=one["sha256"])


def write_client(root: Path, url: str, codename: str, public_key: str) -> None:
    """Write the file `CLIENT`, with which apt uses the repository at `url`."""
    (root / CLIENT).write_text(client(url, codename, public_key))


def client(url: str, codename: str, public_key: str) -> str:
    """Return the text of `CLIENT`, with an ASCII-armoured key or a file's path; see sources.list(5), DEB822-style."""
    lines = [f" {line or '.'}" for line in public_key.splitlines()]
    signed_by = "\n".join(["", *lines] if lines[1:] else lines)
    return f"Types: deb deb-src\nURIs: {url}\nSuites: {codename}\nComponents: {COMPONENT}\nSigned-By:{signed_by}\n"


def release(
    codename: str,
    architectures: Sequence[str],
    label: str,
    date: datetime,
    listed: Sequence[str],
    until: datetime | None = None,
) -> bytes:
    """Return a `Release` file; `listed` are its lines about index files. apt refuses it after `until`."""
    head = {
        "Origin": label,
        "Label": label,
        "Suite": codename,
        "Codename": codename,
        "Date": _date(date),
        **({"Valid-Until": _date(until)} if until else {}),
        # packages for all architectures are in each architecture's index, and in no index of their own
        "Architectures": " ".join(architectures),
        "Components": COMPONENT,
        "Acquire-By-Hash": "yes",
    }
    lines = [f"{name}: {value}" for name, value in head.items()]
    return "\n".join([*lines, "SHA256:", *listed, ""]).encode()


def _date(time: datetime) -> str:
    return format_datetime(time).replace("+0000", "UTC")


def binaries(entry: Entry, paths: Mapping[str, str]) -> "list[deb822.Deb822]":
    """Return the stanzas of `Packages` for the binary packages of one build.

    Args:
        entry: the build.
        paths: as of `write_index`.

    Raises:
        PackageError: its control data are not what they may be.
    """
    files = {file.name: file for file in entry.record.files}
    expected = {package.file: package for package in entry.record.packages}
    stanzas = {}
    for read in deb822.Packages.iter_paragraphs(_text(entry, STANZAS), use_apt_pkg=False):
        stanza = _checked(entry, read, OURS)
        name = read.get("Filename", "").rpartition("/")[2]
        package = expected.get(name)
        said = tuple(stanza.get(field) for field in ("Package", "Version", "Architecture"))
        if package is None or name in stanzas or said != (package.name, package.version, package.architecture):
            raise PackageError(
                f"{entry.record.package}: {STANZAS}: {name!r} is not a package that the build lists, once"
            )
        stanza["Filename"] = paths[name]
        stanza["Size"] = str(files[name].size)
        stanza["SHA256"] = files[name].sha256
        stanzas[name] = stanza
    missing = sorted(expected.keys() - stanzas.keys())
    if missing:
        raise PackageError(f"{entry.record.package}: {STANZAS} says nothing about {missing[0]}")
    return list(stanzas.values())


def sources(entry: Entry, paths: Mapping[str, str]) -> "list[deb822.Deb822]":
    """Return the stanza of `Sources` for the source package of one build, if there is one; as `binaries`."""
    files = {file.name: file for file in entry.record.files}
    stanzas = []
    for name in (name for name in files if name.endswith(".dsc")):
        read = deb822.Dsc(_text(entry, name), strict={"whitespace-separates-paragraphs": False})
        stanza = _checked(entry, read, OURS | OURS_OF_SOURCE)
        parts = [name, *(str(part.get("name")) for part in read.get("Checksums-Sha256", []))]
        unknown = [part for part in parts if part not in paths]
        if unknown:
            raise PackageError(f"{entry.record.package}: {name} names {unknown[0]!r}, which the build did not make")
        source = deb822.Deb822({"Package": _line(entry, "Source", read.get("Source", "")), **stanza})
        source["Directory"] = paths[name].rpartition("/")[0]
        source["Checksums-Sha256"] = "".join(f"\n {files[part].sha256} {files[part].size} {part}" for part in parts)
        stanzas.append(source)
    return stanzas


def _text(entry: Entry, name: str) -> str:
    """Return a text file of a build, which is hostile: of a limited size, and without control characters."""
    path = entry.directory / name
    try:
        if path.stat().st_size > BYTES:
            raise PackageError(f"{entry.record.package}: {name} has more than {BYTES >> 20} MiB")
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise PackageError(f"{entry.record.package}: {name} is not UTF-8 text: {error.reason}") from error
    except FileNotFoundError as error:
        raise InfrastructureError(f"{path} is missing: the build left no data for the index") from error
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f\x85\u2028\u2029]", text):
        raise PackageError(f"{entry.record.package}: {name} has control characters")
    return text


def _checked(entry: Entry, read: "deb822.Deb822", left_out: set[str]) -> "deb822.Deb822":
    """Return a copy of a stanza without the fields `left_out`, every field in the form that the index has."""
    stanza = deb822.Deb822()
    for field in read:
        name = str(field)
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name):
            raise PackageError(f"{entry.record.package}: {name[:80]!r} is no name of a control field")
        if name.lower() in left_out:
            continue
        value = str(read[field])
        if name.lower() not in MULTILINE:
            stanza[name] = _line(entry, name, value)
        elif all(line.startswith((" ", "\t")) and line.strip() for line in value.split("\n")[1:]):
            stanza[name] = value
        else:
            raise PackageError(f"{entry.record.package}: the control field {name} is not folded as it must be")
    return stanza


def _line(entry: Entry, name: str, value: str) -> str:
    """Return a folded field's value as one line (Debian Policy 5.1: line breaks in it mean nothing)."""
    unfolded = " ".join(value.split())
    if not unfolded:
        raise PackageError(f"{entry.record.package}: the control field {name} is empty")
    return unfolded
