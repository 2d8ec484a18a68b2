"""What is wrong with a released repository: from the signature of each generation down to each file and its origin, and
whether its packages can be installed, each by itself and beside the others.
"""

import hashlib
import stat
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from pkgci.errors import PackageError, PkgciError
from pkgci.released import checks, closure
from pkgci.released.base import Offered, Packaged
from pkgci.released.records import Provenance
from pkgci.released.repository import CURRENT, PROVENANCE, Repository
from pkgci.store import RECORD, Entry, Record


def audit(repository: Repository, *, everything: bool = False, solve: bool = False) -> Iterator[str]:
    """Yield what is wrong, a line each, as a reader finds it: nothing is written, no lock is taken.

    Args:
        repository: the repository.
        everything: all generations that are kept, not only the one that readers see now.
        solve: ask apt or dnf about each package, which takes a part of a second each.
    """
    current = repository.current()
    if current and current.valid_until and current.valid_until < datetime.now(UTC):
        yield f"generation {current.number} has expired: the job repository-maintain did not renew it"
    examined: dict[Offered, list[str]] = {}
    live: set[str] = set()
    for generation in sorted(repository.root.glob("generations/[0-9]*" if everything else CURRENT)):
        try:
            offered = dict.fromkeys(repository.form.read(generation, repository.key))
        except (PkgciError, OSError, ValueError, KeyError) as error:
            yield f"{generation}: {error}"
            continue
        for one in offered:
            if one not in examined:
                examined[one] = list(_file(repository, one))
                yield from examined[one]
        if generation.resolve() == (repository.root / CURRENT).resolve():
            live = {one.path.rpartition("/")[0] for one in offered}
    yield from _together(repository, live)
    if solve and live:
        yield from _unmet(repository)


def _together(repository: Repository, live: Iterable[str]) -> Iterator[str]:
    """Yield which packages of the builds in these directories have files that conflict."""
    owners: dict[str, list[Packaged]] = {}
    for directory in sorted(live):
        try:
            packages = repository.form.packaged(
                Entry(repository.root / directory, Record.read(repository.root / directory / RECORD))
            )
        except PkgciError as error:
            yield f"{directory}: {error}"
            continue
        for package in packages:
            others = {other.name: other for path in package.files for other in owners.get(path, ())}
            for other in others.values():
                try:
                    checks.conflict(repository, package, other)
                except PackageError as error:
                    yield str(error)
            for path in package.files:
                owners.setdefault(path, []).append(package)


def _unmet(repository: Repository) -> Iterator[str]:
    """Yield which packages cannot be installed, by the format's package manager over release and upstream."""
    offered = repository.form.texts(repository.root / CURRENT)
    for name, target in repository.targets.items():
        state = {one: offered[one] for one in repository.form.binary_lists(target.architecture)}
        try:
            yield from closure.unmet(repository.format, state, target, repository.config.cache / "closure" / name)
        except PkgciError as error:
            yield f"dependencies for {name}: {error}"


def _file(repository: Repository, offered: Offered) -> Iterator[str]:
    path = repository.root / offered.path
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or path.parent.resolve() != path.parent:
            yield f"{offered.path}: it is, or is reached by, a symbolic link"
            return
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if (path.stat().st_size, digest) != (offered.size, offered.sha256):
            yield f"{offered.path}: it is not the file that the index names"
        repository.form.examine_package(path, repository.key)
        yield from _origin(repository, path, digest)
    except (PkgciError, OSError) as error:
        yield f"{offered.path}: {error}"


def _origin(repository: Repository, path: Path, digest: str) -> Iterator[str]:
    try:
        said = Provenance.read(path.parent / PROVENANCE)
    except PkgciError:
        yield f"{path.name}: without an origin: no {PROVENANCE} beside it that can be read"
        return
    if not any(one.get("name") == path.name and one.get("digest") == {"sha256": digest} for one in said.subject):
        yield f"{path.name}: without an origin: {PROVENANCE} beside it is about other files"
    try:
        origin, built = said.origin(), Record.read(path.parent / RECORD)
    except (PkgciError, KeyError, TypeError):
        origin = None
    if origin is None:
        yield f"{path.name}: without an origin: {PROVENANCE} beside it names no commit, or there is no record of its build"
        return
    claimed = repository.config.release_of(origin.branch)
    if claimed is None or claimed[0] != repository.release:
        yield f"{path.name}: from branch {origin.branch!a}, which release {repository.release} does not claim"
    if {commit.tree for commit in origin.commits} != set(built.trees):
        yield f"{path.name}: without an origin: it was not built from the commits that {PROVENANCE} names"
