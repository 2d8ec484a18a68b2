"""The metadata of a generation of an RPM repository: `repodata/` with checksum-named files, and signed packages.

A package is signed on a copy, once: the signed file is kept as an object of its own, under the checksum of what the
store has, and used again. Only for that rpm opens a package here, when what the sandbox of its build read has been
accepted: a signature must be of what rpm itself finds whole.

Source: https://createrepo-c.readthedocs.io; rpmsign(8); dnf.conf(5), `mirrorlist`.
"""

import gzip
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pkgci.command import run
from pkgci.disk import fsync_all
from pkgci.errors import InfrastructureError, PackageError
from pkgci.formats import fragments, repomd
from pkgci.lazy import Lazy
from pkgci.released.base import Offered, Packaged, Place, Relation, Written
from pkgci.released.index import Stanza
from pkgci.released.key import ReleaseKey
from pkgci.store import Entry

createrepo_c = Lazy("createrepo_c")

NAMESPACE = "http://linux.duke.edu/metadata"
LISTS: Mapping[str, str] = {
    "primary": f'metadata xmlns="{NAMESPACE}/common" xmlns:rpm="{NAMESPACE}/rpm"',
    "filelists": f'filelists xmlns="{NAMESPACE}/filelists"',
    "other": f'otherdata xmlns="{NAMESPACE}/other"',
}
OPERATORS = {"LT": "<<", "LE": "<=", "EQ": "=", "GE": ">=", "GT": ">>"}
REPOMD = "repodata/repomd.xml"
PACKAGE = re.compile(rb"<package .*?</package>\n?", re.DOTALL)
KEYRING = """Name: {label}-keyring
Version: {version}
Release: 1
Summary: Key and dnf repository of {label} for {codename}
License: Public-Domain
BuildArch: noarch
%description
The key that packages of {label} are signed by, and the lines with which dnf uses them.
%install
install -D -m 644 {scratch}/key %{{buildroot}}{key}
install -D -m 644 {scratch}/lines %{{buildroot}}{lines}
%files
{key}
%config(noreplace) {lines}
"""


class Rpm:
    """The verbs of `base.Form` for RPM."""

    sources = "primary"
    # what every dnf and createrepo_c reads
    compressions = ("gz",)
    shared = ("repodata",)
    links: Mapping[str, str] = {
        REPOMD: f"../current/{REPOMD}",
        f"{REPOMD}.asc": f"../current/{REPOMD}.asc",
        "mirrorlist": "current/mirrorlist",
    }
    expires = False

    def lists(self, _place: Place) -> list[str]:
        """Return the metadata files' types."""
        return list(LISTS)

    def binary_lists(self, _architecture: str) -> list[str]:
        """Return the metadata files' types: one repository has all architectures."""
        return list(LISTS)

    def prepare(self, entry: Entry, place: Place) -> dict[str, Path]:
        """Return the files of a build that are linked into the pool, by name: its packages as signed copies."""
        return {
            file.name: _signed(entry.directory / file.name, file.sha256, place)
            if file.name.endswith(".rpm")
            else entry.directory / file.name
            for file in entry.record.files
        }

    def stanzas(self, entry: Entry, directory: str, _place: Place) -> list[Stanza]:
        """Return what the index says of a build in the pool's `directory`."""
        found = []
        for package in repomd.packages(entry, {name: f"{directory}/{name}" for name in repomd.pool(entry)}):
            texts = zip(LISTS, createrepo_c.xml_dump(package), strict=True)
            found += [Stanza(kind, package.location_href, text.encode()) for kind, text in texts]
        return found

    def packaged(self, entry: Entry) -> list[Packaged]:
        """Return what is in a build's binary packages, as its sandbox read them. Two packages may have the same file."""
        return [
            Packaged(
                name=package.name,
                version=f"{package.epoch or 0}:{package.version}-{package.release}",
                files={
                    f"{folder}{name}": digest or "without content"
                    for kind, folder, name, digest in package.files
                    if kind == ""
                },
                provides=frozenset(name for name, *_ in package.provides),
                apart=tuple(
                    Relation(
                        name,
                        OPERATORS.get(flags or "", ""),
                        f"{epoch or 0}:{version}-{release or ''}".removesuffix("-"),
                    )
                    for name, flags, epoch, version, release, _ in [*package.conflicts, *package.obsoletes]
                ),
            )
            for package in fragments.read(entry.directory, entry.record.package, entry.record.packages).values()
            if package.arch != "src"
        ]

    def frame(self, name: str, count: int) -> tuple[bytes, bytes]:
        """Return the root element of a metadata file, its beginning and its end."""
        tag = LISTS[name].partition(" ")[0]
        return (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<{LISTS[name]} packages="{count}">\n'.encode(),
            f"</{tag}>\n".encode(),
        )

    def path(self, written: Written) -> str:
        """Return where a metadata file is below the repository's root, for all generations."""
        return f"repodata/{written.digest}-{written.list}.xml.{written.compression}"

    def examine(self, name: str, chunks: Sequence[bytes]) -> None:
        """Let createrepo_c's parser read the chunks that are new."""
        if name != "primary":
            return
        try:
            for chunk in chunks:
                createrepo_c.xml_parse_primary_snippet(chunk.decode(), pkgcb=lambda _: True, do_files=False)
        except createrepo_c.CreaterepoCError as error:
            raise InfrastructureError(f"{name}.xml: createrepo_c does not read what was written: {error}") from error

    def finish(self, new: Path, place: Place, files: Sequence[Written]) -> list[Path]:
        """Write `repodata/` of a generation below the directory `new`, signed; verify and return its pointer files."""
        (new / "repodata").mkdir()
        index = createrepo_c.Repomd()
        index.set_revision(str(place.number))
        index.add_repo_tag(place.label)
        index.add_distro_tag(place.codename)
        for written in files:
            path = self.path(written)
            os.link(place.root / path, new / path)
            record = createrepo_c.RepomdRecord(written.list)
            record.location_href, record.size, record.timestamp = path, written.size, place.stamp
            record.checksum, record.checksum_type = written.digest, "sha256"
            index.set_record(record)
        pointers = [new / REPOMD, new / f"{REPOMD}.asc", new / "mirrorlist"]
        text = index.xml_dump().encode()
        pointers[0].write_bytes(text)
        pointers[1].write_bytes(place.key.detach_sign(text))
        place.key.verify(pointers[1], pointers[0])
        if createrepo_c.Repomd(str(pointers[0])).revision != str(place.number):
            raise InfrastructureError(f"{pointers[0]}: createrepo_c does not read what was written")
        pointers[2].write_text(f"{place.url}generations/{place.number}/\n")
        (new / "pool").symlink_to("../../pool")
        return pointers

    def shared_files(self, generation: Path) -> list[str]:
        """Return the paths below the root of a generation's metadata files: those that their checksums name."""
        return sorted(f"repodata/{path.name}" for path in (generation / "repodata").glob("*-*.xml.*"))

    def clients(self, place: Place) -> dict[str, str]:
        """Return what users need, by the names of files at the repository's root."""
        return {
            repomd.CLIENT: repomd.released_client(place.url, f"{place.url}key.asc"),
            "README": f"""{place.label} for {place.codename}: packages that are signed, in an index that is signed, by the key
{place.key.fingerprint}

Install the key and the lines for dnf, once (they lead to the repository itself, also from one of its mirrors):
  sudo dnf install {place.url}{self.keyring(place)}
or only the lines (they lead here):
  sudo curl -fsSo /etc/yum.repos.d/{place.label}.repo {place.url}{repomd.CLIENT}
""",
        }

    def keyring(self, place: Place) -> str:
        """Return the file name of the package that brings users the key and the lines, at the repository's root."""
        return f"{place.label}-keyring.rpm"

    def make_keyring(self, place: Place, path: Path) -> None:
        """Make that package, signed; see rpmbuild(8)."""
        key, lines = f"/etc/pki/rpm-gpg/RPM-GPG-KEY-{place.label}", f"/etc/yum.repos.d/{place.label}.repo"
        scratch = path.parent
        (scratch / "key").write_text(place.key.public)
        (scratch / "lines").write_text(repomd.released_client(place.url, f"file://{key}"))
        (scratch / "keyring.spec").write_text(
            KEYRING.format(
                label=place.label,
                codename=place.codename,
                version=f"{place.time:%Y%m%d.%H%M%S}",
                key=key,
                lines=lines,
                scratch=scratch,
            )
        )
        definitions = {"_topdir": scratch, "_rpmdir": scratch, "_rpmfilename": path.name, "_binary_payload": "w9.gzdio"}
        words = [word for name, value in definitions.items() for word in ("--define", f"{name} {value}")]
        run(["rpmbuild", "-bb", *words, scratch / "keyring.spec"], quiet=True)
        place.key.sign_rpm(path)

    def read(self, generation: Path, key: ReleaseKey) -> Iterator[Offered]:
        """Yield what a generation in its directory offers; as `base.Form`."""
        key.verify(generation / f"{REPOMD}.asc", generation / REPOMD)
        index = createrepo_c.Repomd(str(generation / REPOMD))
        for record in index.records:
            path = generation / record.location_href
            if (path.stat().st_size, _sha256(path)) != (record.size, record.checksum):
                raise InfrastructureError(f"{path} is not what repomd.xml says")
        try:
            reader = createrepo_c.RepositoryReader.from_path(generation)
            packages = list(reader.iter_packages())
        except createrepo_c.CreaterepoCError as error:
            raise InfrastructureError(f"{generation}: createrepo_c does not read it: {error}") from error
        counts = [_count(generation / record.location_href) for record in index.records]
        if set(counts) != {len(packages)}:
            raise InfrastructureError(f"{generation}: its metadata files say that they have {counts} packages")
        for package in packages:
            yield Offered(package.location_href, package.size_package, package.pkgId)

    def texts(self, generation: Path) -> dict[str, list[bytes]]:
        """Return the elements of each metadata file."""
        return {
            record.type: PACKAGE.findall(gzip.decompress((generation / record.location_href).read_bytes()))
            for record in createrepo_c.Repomd(str(generation / REPOMD)).records
        }

    def examine_package(self, path: Path, key: ReleaseKey) -> None:
        """Check a package's signature by rpm itself."""
        key.verify_rpm(path)


def _signed(path: Path, digest: str, place: Place) -> Path:
    """Return the signed copy of a package; make it where needed."""
    final = place.signed / digest[:2] / f"{digest}.rpm"
    if final.exists():
        place.key.verify_rpm(final)
        return final
    # what rpm does not read whole must not get a signature
    words = ["rpmkeys", "--define", "_pkgverify_level digest", "--nosignature", "--checksig", path]
    if run(words, check=False, quiet=True).returncode:
        raise PackageError(f"{path.name}: rpm finds its digests wrong or missing; build it again")
    final.parent.mkdir(parents=True, exist_ok=True)
    new = final.with_name(f".{digest}.{os.getpid()}")
    try:
        shutil.copyfile(path, new)
        place.key.sign_rpm(new)
        new.chmod(0o444)
        fsync_all([new])
        new.rename(final)
    finally:
        new.unlink(missing_ok=True)
    fsync_all([final.parent])
    return final


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _count(path: Path) -> int:
    """Return the number of packages that a metadata file says it has, in its root element."""
    with gzip.open(path, "rt") as stream:
        head = stream.read(1000)
    return int(head.partition(' packages="')[2].partition('"')[0])
