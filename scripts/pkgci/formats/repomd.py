"""The index of an RPM repository: `repodata/` with checksum-named metadata, `repomd.xml` and its signature.

createrepo_c reads the packages' headers here, in the process that publishes: no credential but the test key is within
its reach, and what it read must agree with what the sandbox of the build said.

Source: https://createrepo-c.readthedocs.io, and `dnf.conf(5)` for what a client needs.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pkgci import web
from pkgci.config import Target
from pkgci.errors import InfrastructureError, PackageError
from pkgci.keys import SigningKey
from pkgci.lazy import Lazy
from pkgci.store import Entry

createrepo_c = Lazy("createrepo_c")

CLIENT = "pkgci.repo"
INDEX_BYTES = 1 << 30


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
        PackageError: a file is no RPM package, or another one than the build lists.
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
    """Yield what the headers of a build's packages say; `paths` and what is raised are as of `write_index`."""
    expected = {package.file: package for package in entry.record.packages}
    for name in sorted(pool(entry)):
        path = str(entry.directory / name)
        try:
            package = createrepo_c.package_from_rpm(path, location_href=paths[name], changelog_limit=10)
        except (OSError, createrepo_c.CreaterepoCError) as error:
            raise PackageError(f"{name} is no RPM package that can be read: {error}") from error
        listed = expected.get(name)
        epoch = "" if package.epoch in (None, "", "0") else f"{package.epoch}:"
        said = (package.name, f"{epoch}{package.version}-{package.release}", package.arch)
        # the index does not tell an epoch of 0 from none, rpm does
        if listed and said != (listed.name, listed.version.removeprefix("0:"), listed.architecture):
            raise PackageError(f"{name} is {' '.join(said)}, not what its build lists")
        yield package


def write_client(root: Path, url: str, target: Target, key: SigningKey) -> None:
    """Write `key.asc` and the file `CLIENT`, with which dnf uses the repository at `url`."""
    (root / "key.asc").write_text(key.export_public())
    (root / CLIENT).write_text(client(url))


def client(url: str) -> str:
    """Return the text of `CLIENT`; see dnf.conf(5)."""
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
            index.write_bytes(web.read(f"{url}repodata/repomd.xml", upstream=False, largest=INDEX_BYTES))
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
