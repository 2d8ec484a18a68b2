"""What a build changes against the former versions of its packages: those of the same name in the request's repositories.

What is in released packages was written beside them when they were published; those of a test repository are read in a
sandbox, once, and what was in them is cached. Nothing decides by the result, so where a former version cannot be had, that
is said and the build goes on.
"""

import difflib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pkgci.artifacts import (
    Contents,
    Difference,
    FileDifference,
    Former,
    Package,
    PackageContents,
    RelationDifference,
    Repository,
    RepositoryPackage,
)
from pkgci.errors import InfrastructureError, PkgciError
from pkgci.formats import FORMATS, base, contents
from pkgci.formats.base import Dependencies, Dependency, Request
from pkgci.released import remote
from pkgci.sandbox import Files
from pkgci.store import Entry

log = logging.getLogger(__name__)

NAME = "former.json"
# of one package; the rest is not shown by anything
DIFFERENT_FILES, DIFF_LINES = 2000, 1000


def write(request: Request, entry: Entry, artifacts: Path) -> None:
    """Write `contents.json` of a build, and `former.json` where a repository of the request has a former version.

    Args:
        request: what was built.
        entry: the build in the store.
        artifacts: an existing directory.

    Raises:
        InfrastructureError: the entry cannot be read.
    """
    now = Contents.read(entry.directory / contents.NAME)
    now.write(artifacts / contents.NAME)
    binary = [package for package in entry.record.packages if package.kind == "binary"]
    repositories = _repositories(request, [package.name for package in binary])
    found = [(package, *former) for package in binary if (former := _former(request, repositories, package))]
    if not found:
        return
    try:
        before = {one.file: one for one in _inside(request, [(where, former) for _, where, former in found])}
        problem = "it cannot be read"
    except PkgciError as error:
        log.info("former versions cannot be read: %s", error)
        before, problem = {}, str(error)
    inside = {one.file: one for one in now.packages}
    differences = []
    for package, where, former in found:
        pair = before.get(_file(request, former)), inside.get(package.file)
        made = _compare(*pair) if pair[0] and pair[1] else {"notice": f"not compared: {problem}"}
        differences.append(
            Difference(
                name=package.name,
                architecture=package.architecture,
                version=package.version,
                former_version=former.version,
                repository=where.url,
                released=where.released,
                **made,
            )
        )
    Former(packages=tuple(differences)).write(artifacts / NAME)


def _repositories(request: Request, names: Sequence[str]) -> list[Repository]:
    """Return the request's repositories, released ones with those of their packages that have one of the names."""
    found = []
    for where in request.repositories:
        try:
            found.append(remote.listed(where, request.target.architecture, names) if where.released else where)
        except InfrastructureError as error:
            log.info("former versions cannot be looked for: %s", error)
    return found


def _former(
    request: Request, repositories: Sequence[Repository], package: Package
) -> tuple[Repository, RepositoryPackage] | None:
    """Return the highest version of a package that the repositories have, unless it is the very same."""
    newer = FORMATS[request.target.format].newer
    best: tuple[Repository, RepositoryPackage] | None = None
    for where in repositories:
        for one in where.packages:
            if (one.name, one.architecture) == (package.name, package.architecture) and (
                best is None or newer(one.version, best[1].version)
            ):
                best = where, one
    return None if best is None or best[1].sha256 == package.sha256 else best


def _file(request: Request, former: Package) -> str:
    """Return the name that a former package has here: one that no repository can choose."""
    return f"{former.sha256}.{request.target.format}"


def _inside(request: Request, former: Sequence[tuple[Repository, RepositoryPackage]]) -> Iterator[PackageContents]:
    """Yield what is in former packages, each under the name of `_file`.

    Raises:
        PkgciError: it cannot be had, or not be read.
    """
    for where, package in former:
        if where.released:
            name = package.file.rpartition("/")[2]
            for one in remote.inside(where, package).packages:
                if one.file == name:
                    yield one.model_copy(update={"file": _file(request, package)})
    tests = [(where, package) for where, package in former if not where.released]
    if tests:
        yield from _read(request, tests).packages


def _read(request: Request, former: Iterable[tuple[Repository, RepositoryPackage]]) -> Contents:
    """Return what is in former packages, from the cache if the same were read before.

    Raises:
        PkgciError: they cannot be had, or not be read.
    """
    packages = {_file(request, one): (where, one) for where, one in former}
    form = request.target.format

    def make() -> Contents:
        wanted = [
            Dependency(file=file, sha256=one.sha256, url=where.url + one.file)
            for file, (where, one) in packages.items()
        ]
        files = Files()
        paths = base.download(request.config, Dependencies(install=tuple(wanted)))
        for dependency, path in zip(wanted, paths, strict=True):
            files.add_file(f"/in/{dependency.file}", path)
        with tempfile.TemporaryDirectory() as output:
            base.sandboxed(
                request,
                f"{form}-contents.sh",
                "/in",
                files=files,
                output=Path(output),
                failure=lambda _, said: InfrastructureError(f"a former version cannot be read: {said}"),
            )
            renamed = [one.model_copy(update={"file": file}) for file, (_, one) in packages.items()]
            return contents.read(form, Path(output), renamed)

    return base.cached(request, "contents", sorted(packages), Contents, make)


def _compare(former: PackageContents, now: PackageContents) -> Mapping[str, object]:
    """Return the fields of a `Difference` that say what has changed."""
    whole = not (former.more_files or now.more_files)
    relations = []
    for field in dict.fromkeys([*former.relations, *now.relations]):
        # a package that names its own version would differ each time
        before = [word.replace(former.version, now.version) for word in former.relations.get(field, ())]
        after = now.relations.get(field, ())
        removed, added = set(before) - set(after), set(after) - set(before)
        if removed or added:
            relations.append(
                RelationDifference(
                    field=field,
                    removed=tuple(word for word in before if word in removed),
                    added=tuple(word for word in after if word in added),
                )
            )
    return {
        "installed": now.installed - former.installed,
        "files": tuple(_files(former, now)[:DIFFERENT_FILES]) if whole else (),
        "relations": tuple(relations),
        "scripts": _scripts(former, now),
        "notice": "" if whole else "files not compared: there are too many",
    }


def _files(former: PackageContents, now: PackageContents) -> list[FileDifference]:
    """Return the files that are not the same, without directories: those show by what is in them."""
    before, after = ({file.path: file for file in one.files if not file.mode.startswith("d")} for one in (former, now))
    return [
        FileDifference(former=before.get(path), now=after.get(path))
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    ]


def _scripts(former: PackageContents, now: PackageContents) -> dict[str, str]:
    """Return unified diffs of the maintainer scripts that are not the same."""
    found = {}
    for name in dict.fromkeys([*former.scripts, *now.scripts]):
        sides = [one.scripts.get(name, "").splitlines() for one in (former, now)]
        if sides[0] != sides[1]:
            lines = list(difflib.unified_diff(*sides, former.version, now.version, lineterm=""))
            more = [f"[{len(lines) - DIFF_LINES} more lines]"] if len(lines) > DIFF_LINES else []
            found[name] = "\n".join([*lines[:DIFF_LINES], *more])
    return found
