"""What a released repository has of a package, read by its URL: for the jobs of a change, wherever they run.

From the index, as clients do, comes where the build of a package lies; what that consists of, and what is in its
packages, was written beside them when it was published.
"""

import gzip
import re
import zlib
from collections.abc import Collection, Mapping
from html import unescape
from typing import TypeVar

from pydantic import ValidationError

from pkgci import artifacts, web
from pkgci.artifacts import Contents, Repository, RepositoryPackage
from pkgci.errors import InfrastructureError
from pkgci.formats import contents
from pkgci.formats.base import WORD
from pkgci.store import RECORD, Record

AnyRecord = TypeVar("AnyRecord", bound=artifacts.Record)

INDEX_BYTES = 256 << 20
RECORD_BYTES = 64 << 20
PACKAGE = re.compile(rb"<package type=.*?</package>", re.DOTALL)
# what the index says of where a package lies: our own paths, nothing else
PLACE = re.compile(r"pool/[A-Za-z0-9][A-Za-z0-9+._-]*/[0-9a-f]+", re.ASCII)


def listed(repository: Repository, architecture: str, names: Collection[str]) -> Repository:
    """Return a released repository with those of its binary packages that have one of the names.

    Their checksums are those of the build: a released RPM is signed, so its file has another one.

    Args:
        repository: what its `repository.json` says.
        architecture: the target's.
        names: of packages.

    Raises:
        InfrastructureError: it cannot be read.
    """
    try:
        found = _debs(repository, architecture, names) if repository.format == "deb" else _rpms(repository, names)
    except (ValueError, IndexError, EOFError, OSError, zlib.error) as error:
        raise InfrastructureError(f"the index of {repository.url} cannot be read: {error}") from error
    packages = []
    for place in sorted({path.rpartition("/")[0] for path in found.values()}):
        if not PLACE.fullmatch(place):
            raise InfrastructureError(
                f"{repository.url}: its index names {ascii(place)[:200]}, which is no place of a build"
            )
        made = _read(Record, f"{repository.url}{place}/{RECORD}")
        words = [word for one in made.packages for word in (one.version, one.architecture)]
        if not all(map(WORD.fullmatch, words)):
            raise InfrastructureError(f"{repository.url}{place}/{RECORD} has what cannot be a version of a package")
        packages += [
            RepositoryPackage(
                **{**package.model_dump(), "file": f"{place}/{package.file}"}, source=made.package, key=made.key
            )
            for package in made.packages
            if found.get(package.name, "").rpartition("/")[0] == place
        ]
    return repository.model_copy(update={"packages": tuple(packages)})


def record(repository: Repository, package: RepositoryPackage) -> Record:
    """Return the record of the build that a package of `listed` is from. Raises InfrastructureError."""
    return _read(Record, f"{place(repository, package)}{RECORD}")


def inside(repository: Repository, package: RepositoryPackage) -> Contents:
    """Return what is in the packages of the build that a package of `listed` is from. Raises InfrastructureError."""
    return _read(Contents, f"{place(repository, package)}{contents.NAME}")


def place(repository: Repository, package: RepositoryPackage) -> str:
    """Return the URL, with a slash at its end, below which the files of a package's build lie."""
    return f"{repository.url}{package.file.rpartition('/')[0]}/"


def _debs(repository: Repository, architecture: str, names: Collection[str]) -> Mapping[str, str]:
    """Return the paths of packages by their names, from `Packages`."""
    url = f"{repository.url}dists/{repository.codename}/{repository.component}/binary-{architecture}/Packages.gz"
    found = {}
    for stanza in gzip.decompress(web.read(url, upstream=False, largest=INDEX_BYTES)).split(b"\n\n"):
        name = stanza[: stanza.find(b"\n")].removeprefix(b"Package: ").decode()
        if name in names:
            found[name] = re.findall(rb"^Filename: (.*)$", stanza, re.MULTILINE)[0].decode()
    return found


def _rpms(repository: Repository, names: Collection[str]) -> Mapping[str, str]:
    """Return the paths of packages by their names, from `primary.xml` of one generation."""
    generation = web.read(f"{repository.url}mirrorlist", upstream=False, largest=INDEX_BYTES).decode().strip()
    if not generation.startswith(repository.url):
        raise InfrastructureError(f"{repository.url}mirrorlist does not lead to the repository that it lies in")
    index = web.read(f"{generation}repodata/repomd.xml", upstream=False, largest=INDEX_BYTES).decode()
    (path,) = re.findall(r'href="(repodata/\w+-primary\.xml\.gz)"', index)[:1]
    primary = gzip.decompress(web.read(generation + path, upstream=False, largest=INDEX_BYTES))
    found = {}
    for package in PACKAGE.findall(primary):
        name = unescape(re.findall(rb"<name>([^<]*)</name>", package)[0].decode())
        if name in names and b"<arch>src</arch>" not in package:
            found[name] = unescape(re.findall(rb'<location href="([^"]*)"', package)[0].decode())
    return found


def _read(model: type[AnyRecord], url: str) -> AnyRecord:
    try:
        return model.model_validate_json(web.read(url, upstream=False, largest=RECORD_BYTES))
    except ValidationError as error:
        raise InfrastructureError(f"{url} cannot be read: {error.errors()[0]['msg']}") from error
