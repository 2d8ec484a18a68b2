"""The index of an RPM repository: `repodata/` with checksum-named metadata, `repomd.xml` and its signature.

No package is opened here: what its header says was read in the sandbox of its build; see fragments.py. Names, sizes and
checksums are those of the store's verified files.

Source: https://createrepo-c.readthedocs.io, and `dnf.conf(5)` for what a client needs.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pkgci import web
from pkgci.artifacts import File, Repository
from pkgci.config import Target
from pkgci.errors import InfrastructureError, PackageError
from pkgci.formats import fragments
from pkgci.keys import SigningKey, verified
from pkgci.lazy import Lazy
from pkgci.store import Entry, describe

createrepo_c = Lazy("createrepo_c")

CLIENT = "pkgci.repo"
INDEX_BYTES = 1 << 30
# the file that vouches for all of an index
POINTER = "repodata/repomd.xml"
# it, and its signature
SIGNED = (POINTER, f"{POINTER}.asc")


def pool(entry: Entry) -> list[str]:
    """Return the files of a build that a repository offers: binary packages and the source package."""
    return [file.name for file in entry.record.files if file.name.endswith(".rpm")]


def write_index(
    root: Path, entries: Iterable[Entry], paths: Mapping[str, str], target: Target, label: str, key: SigningKey
) -> None:
    """Write `repodata/` below `root`, and verify that it reads back and is signed.

    Args:
        root: the repository's root, with the pool already in it.
        entries: the builds whose packages are offered.
        paths: for the name of each file of `pool`, its path below the root.
        target: its codename is said in the repository's tags.
        label: the repository's name in its tags.
        key: signs it.

    Raises:
        PackageError: what the build says of its packages is not what it may be.
    """
    # gzip: what every dnf and every createrepo_c reads
    writer = createrepo_c.RepositoryWriter(root, num_packages=len(paths), compression=createrepo_c.GZ_COMPRESSION)
    writer.repomd.add_repo_tag(label)
    writer.repomd.add_distro_tag(target.codename)
    for entry in entries:
        for package in packages(entry, paths):
            writer.add_pkg(package)
    writer.finish()
    repomd = root / "repodata" / "repomd.xml"
    signature = repomd.with_name("repomd.xml.asc")
    signature.write_bytes(key.detach_sign(repomd.read_bytes()))
    key.verify(signature, repomd)
    reader = createrepo_c.RepositoryReader.from_path(root)
    if {package.location_href for package in reader.iter_packages()} != set(paths.values()):
        raise InfrastructureError(f"{repomd}: the index does not read back as it was written")


def packages(entry: Entry, paths: Mapping[str, str]) -> "Iterator[createrepo_c.Package]":
    """Yield what the index says of a build's packages; `paths` and what is raised are as of `write_index`.

    The entry's files are the store's own, or copies of them with a signature.
    """
    recorded = {file.name: file for file in entry.record.files}
    found = fragments.read(entry.directory, entry.record.package, entry.record.packages)
    for name in sorted(pool(entry)):
        package = found.get(name)
        if package is None or package.pkgId != recorded[name].sha256:
            raise PackageError(f"{name} is not the file that createrepo_c read in the sandbox of its build")
        path = entry.directory / name
        file = describe(path)
        package.location_href, package.pkgId = paths[name], file.sha256
        package.size_package, package.time_file = file.size, int(path.stat().st_mtime)
        # a signature stands before the header, which stays as it is
        package.rpm_header_start += file.size - recorded[name].size
        package.rpm_header_end += file.size - recorded[name].size
        yield package


def indexes(root: Path, _codename: str, public_key: str) -> Iterator[File]:
    """Yield the index files of a repository of ours whose `SIGNED` files are below `root`, by their paths below it.

    Raises:
        InfrastructureError: the signature is not good.
        ValueError, TypeError: what is signed is no `repomd.xml`.
    """
    verified(public_key, *(root / name for name in reversed(SIGNED)))
    for one in _records(root).values():
        yield File(name=one.location_href, size=one.size, sha256=one.checksum)


def pooled(root: Path, _codename: str) -> Iterator[File]:
    """Yield the packages that the index files below `root` name, source packages too.

    Raises:
        KeyError, ValueError, TypeError: they are no such files.
    """
    found: list[File] = []

    def note(package: "createrepo_c.Package") -> None:
        found.append(File(name=package.location_href, size=package.size_package, sha256=package.pkgId))

    try:
        path = root / _records(root)["primary"].location_href
        createrepo_c.xml_parse_primary(str(path), pkgcb=note, do_files=False)
    except createrepo_c.CreaterepoCError as error:
        raise ValueError(str(error)) from error
    return iter(found)


def _records(root: Path) -> "dict[str, createrepo_c.RepomdRecord]":
    try:
        return {one.type: one for one in createrepo_c.Repomd(str(root / POINTER)).records}
    except createrepo_c.CreaterepoCError as error:
        raise ValueError(str(error)) from error


def write_client(root: Path, url: str, _codename: str, public_key: str) -> None:
    """Write `key.asc` and the file `CLIENT`, with which dnf uses the repository at `url`."""
    (root / "key.asc").write_text(public_key)
    (root / CLIENT).write_text(client(url))


def location(record: Repository) -> str:
    """Return the line that tells dnf where a repository is.

    By the mirror list dnf stays with one generation of a released one: repomd.xml and its signature are two requests.
    """
    return f"mirrorlist={record.url}mirrorlist" if record.released else f"baseurl={record.url}"


def released_client(url: str, key: str) -> str:
    """Return the text of `CLIENT` for a released repository, with the URL of its key."""
    name = "-".join(url.rstrip("/").split("/")[-2:])
    lines = f"[pkgci-{name}]\nname={name}\nmirrorlist={url}mirrorlist\nenabled=1\n"
    return f"{lines}repo_gpgcheck=1\ngpgcheck=1\ngpgkey={key}\n"


def client(url: str) -> str:
    """Return the text of `CLIENT` for a test repository; see dnf.conf(5)."""
    name = "-".join(url.rstrip("/").split("/")[-2:])
    return (
        f"[pkgci-{name}]\nname=pkgci test repository {name}\nbaseurl={url}\nenabled=1\nmetadata_expire=0\n"
        # the signed index vouches for each package by its checksum
        f"repo_gpgcheck=1\ngpgcheck=0\ngpgkey={url}key.asc\n"
    )


def offered(url: str) -> dict[str, set[str]]:
    """Return, by source package, what the binary packages of a repository of ours provide; nothing where there is none yet.

    Raises:
        InfrastructureError: it cannot be read.
    """
    found: dict[str, set[str]] = {}

    def note(package: "createrepo_c.Package") -> None:
        source = (package.rpm_sourcerpm or "").rsplit("-", 2)[0]
        names = [provide[0] for provide in package.provides]
        paths = [path + name for _, path, name, *_ in package.files]
        found.setdefault(source, set()).update([package.name, *names, *paths])

    with tempfile.TemporaryDirectory() as scratch:
        index = Path(scratch, "repomd.xml")
        try:
            index.write_bytes(web.read(f"{url}{POINTER}", upstream=False, largest=INDEX_BYTES))
        except web.NotFoundError:
            return {}
        try:
            primary = {one.type: one for one in createrepo_c.Repomd(str(index)).records}["primary"]
            content = web.read(url + primary.location_href, upstream=False, largest=INDEX_BYTES)
            if hashlib.sha256(content).hexdigest() != primary.checksum:
                raise InfrastructureError(f"{url}{primary.location_href} is not what its repomd.xml says; try again")
            path = Path(scratch, Path(primary.location_href).name)
            path.write_bytes(content)
            createrepo_c.xml_parse_primary(str(path), pkgcb=note, do_files=True)
        except (KeyError, createrepo_c.CreaterepoCError) as error:
            raise InfrastructureError(f"{url} is no repository that can be read: {error}") from error
    return found
