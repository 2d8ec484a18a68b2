"""What is refused at a publication, before anything is changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING

from pkgci.errors import InfrastructureError, PackageError, RequestError
from pkgci.formats import FORMATS
from pkgci.formats.base import WORD
from pkgci.released.base import Packaged, Relation
from pkgci.released.records import Origin, Publication
from pkgci.store import Entry, Store

if TYPE_CHECKING:
    from pkgci.released.repository import Repository


class OlderError(PackageError):
    """The repository has a higher version already: of a change that merged later, and was published before."""


class OtherContentError(PackageError):
    """The repository has or had the same version with another content."""


class HeldError(RequestError):
    """A person has put the source package on hold."""


# what stands against a build itself, whatever is published with it
AGAINST = (OlderError, OtherContentError, HeldError)


@dataclass(frozen=True)
class Changes:
    """What a publication changes: builds that come, with where they are merged, and keys of those that go.

    `keys` are those of all its builds; one that is there already, bit for bit, under the key that it has there.
    """

    added: tuple[tuple[Entry, Origin], ...]
    removed: tuple[str, ...]
    keys: tuple[str, ...]


def built(repository: "Repository", store: Store, publication: Publication, *, dry: bool = False) -> Entry:
    """Return a build from the store, each file of which is as in its record.

    Args:
        repository: where it is published.
        store: the store.
        publication: names the build.
        dry: nothing is published, so a check may have built it.

    Raises:
        RequestError: the store has not built it, it is not for this repository, or must not be released.
        PackageError: a name in its record cannot be one of a package.
        InfrastructureError: its files are damaged.
    """
    key, origin = publication.key, publication.origin
    entry = store.lookup(key)
    if entry is None:
        if store.place(key).exists():
            raise InfrastructureError(f"build {key[:12]} is damaged in the store; build it again")
        raise RequestError(f"build {key[:12]} is not in the store: only what it built is released; build it again")
    record = entry.record
    about = f"{record.package} {record.version}"
    if not dry:
        record.refuse_unreleasable()
    if record.target not in repository.targets:
        raise RequestError(f"{about} is built for {record.target}, which {repository.name} does not have")
    claimed = repository.config.release_of(origin.branch)
    if claimed is None or claimed[0] != repository.release:
        raise RequestError(f"{about} is from branch {origin.branch}, which release {repository.release} does not claim")
    trees = {commit.tree for commit in origin.commits}
    if not record.trees or trees != set(record.trees):
        raise RequestError(
            f"{about} is built from the trees {' and '.join(sorted(set(record.trees))) or 'of an unknown commit'}, not "
            f"from what is merged into {origin.branch}: {' and '.join(sorted(trees))}; build it again"
        )
    words = [record.package, record.version]
    words += [word for one in record.packages for word in (one.name, one.version, one.architecture)]
    if not all(map(WORD.fullmatch, words)):
        raise PackageError(f"{ascii(record.package)[:80]}: a name or version in its record cannot be one of a package")
    return entry


def changes(repository: "Repository", entries: Sequence[tuple[Entry, Origin]]) -> Changes:
    """Return what a publication of builds changes in an opened repository; those that are there already do not.

    Raises:
        RequestError: a source package comes twice, or (HeldError) is on hold.
        PackageError: (OlderError) a version is lower than the released one; (OtherContentError) another content has the
            same version; or two packages conflict.
    """
    added, removed, keys = [], [], []
    seen: set[tuple[str, str]] = set()
    for entry, origin in entries:
        record = entry.record
        if (record.package, record.target) in seen:
            raise RequestError(f"{record.package} for {record.target} comes twice in one publication")
        seen.add((record.package, record.target))
        known = admit(repository, entry)
        keys.append(known or record.key)
        if known is None:
            added.append((entry, origin))
            removed += _former(repository, entry)
    _conflicts(repository, [entry for entry, _ in added], removed)
    return Changes(tuple(added), tuple(removed), tuple(keys))


def admit(repository: "Repository", entry: Entry) -> str | None:
    """Return the key under which an opened repository has a build already, bit for bit; None for one that may come.

    Raises:
        PkgciError: (one of AGAINST) it must not come.
    """
    record, former = entry.record, _former(repository, entry)
    there = {(one.file.rpartition("/")[2], one.sha256) for key in former for one in repository.index.packages_of(key)}
    if there == {(one.file, one.sha256) for one in record.packages}:
        return former[0]
    refuse_held(repository, record.package)
    _compare(repository, entry)
    return None


def refuse_held(repository: "Repository", source: str) -> None:
    """Refuse a source package that is on hold.

    Raises:
        HeldError: it is.
    """
    hold = repository.holds().get(source)
    if hold:
        raise HeldError(
            f"{source} is on hold since generation {hold.generation} of {repository.name}: {hold.reason}; "
            f"`pkgci repo unhold {repository.name} {source}` ends it"
        )


def _former(repository: "Repository", entry: Entry) -> list[str]:
    """Return the keys of the builds that a build takes the place of."""
    record = entry.record
    return [key for key, target, _ in repository.index.live_of(record.package) if target == record.target]


def _conflicts(repository: "Repository", entries: Sequence[Entry], removed: Sequence[str]) -> None:
    """Refuse a package with a file that a package of another build has, if both can be installed together.

    One whose files are not known is refused, too.
    """
    form, index = repository.form, repository.index
    contents = {entry.record.key: form.packaged(entry) for entry in entries}
    owners: dict[str, set[str]] = {}
    for entry in entries:
        key, packages = entry.record.key, contents[entry.record.key]
        read = {(one.name, one.version.removeprefix("0:")) for one in packages}
        for package in entry.record.packages:
            if (package.name, package.version.removeprefix("0:")) not in read:
                raise PackageError(
                    f"{package.file}: the sandbox of its build could not read what is in it; build it again"
                )
        paths = {path for package in packages for path in package.files}
        meets = index.neighbours(paths, without={key, *removed}).union(*(owners.get(path, set()) for path in paths))
        for other in sorted(meets):
            known = index.build(other)
            if known and other not in contents:
                contents[other] = form.packaged(repository.entry(other, known[0]))
            for one, two in product(packages, contents[other]):
                conflict(repository, one, two)
        for path in paths:
            owners.setdefault(path, set()).add(key)


def conflict(repository: "Repository", one: Packaged, two: Packaged) -> None:
    """Refuse two packages with a file in common that can be installed together. Raises PackageError."""
    if one.name == two.name or _apart(repository, one, two) or _apart(repository, two, one):
        return
    for path in sorted(one.files.keys() & two.files.keys()):
        if not one.files[path] or one.files[path] != two.files[path]:
            raise PackageError(
                f"{one.name} {one.version} has the file {ascii(path)[1:-1][:200]}, which {two.name} {two.version} of "
                f"{repository.name} has too; say in one of them that it conflicts with or replaces the other"
            )


def _apart(repository: "Repository", one: Packaged, two: Packaged) -> bool:
    """Return whether a package says that it is not installed together with another, or replaces its files."""
    return any(
        (relation.name == two.name and _holds(repository, relation, two.version))
        or (relation.name in two.provides and not relation.operator)
        for relation in one.apart
    )


def _holds(repository: "Repository", relation: Relation, version: str) -> bool:
    if not all(WORD.fullmatch(one) for one in (version, relation.version or "0")):
        return False
    newer = FORMATS[repository.format].newer
    above, below = newer(version, relation.version), newer(relation.version, version)
    return {
        "": True,
        "<<": below,
        "<=": not above,
        "=": not above and not below,
        ">=": not below,
        ">>": above,
    }[relation.operator]


def _compare(repository: "Repository", entry: Entry) -> None:
    """Compare versions and contents of a build with what is and was released."""
    record, index = entry.record, repository.index
    newer = cache(FORMATS[repository.format].newer)
    for _, target, version in index.live_of(record.package):
        if newer(version, record.version):
            raise OlderError(
                f"{record.package} {record.version} is lower than {version}, which {repository.name} has for {target}"
            )
    for package in record.packages:
        about = f"{package.name} {package.version} ({package.architecture})"
        for known in index.packages(package.name, package.architecture, live=True):
            if newer(known.version, package.version):
                raise OlderError(
                    f"{about} of {record.package} is lower than {known.version}, which {repository.name} has from "
                    f"{known.source}"
                )
        for known in index.packages(package.name, package.architecture, live=False):
            if known.version == package.version and known.sha256 != package.sha256:
                raise OtherContentError(
                    f"{about} of {record.package} has another content than the one of that version which "
                    f"{repository.name} has or had from {known.source}; raise the version"
                )
