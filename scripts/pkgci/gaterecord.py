"""Gate records: what a gate has built and tested together, so that exactly that is published once it is merged.

A record is written on the repository host when the system test of a gate run passed. It is no proof of a merge: Git is
asked, at the remote, which of its changes are merged now, and a build of it counts only when every change up to the last
one that it was built from is.

`gate/TREE-NAME.json` below the data directory: the whole record for each tree of its builds.
"""

import hashlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from pkgci.artifacts import Part, Record
from pkgci.change import BRANCH, OBJECT, PROJECT
from pkgci.config import Config, Name
from pkgci.disk import fsync_all
from pkgci.errors import InfrastructureError, RequestError
from pkgci.merged import Branch
from pkgci.store import Key, Store

TreeId = Annotated[str, StringConstraints(pattern=f"^{OBJECT}$")]
Project = Annotated[str, StringConstraints(pattern=f"^{PROJECT}$")]
BranchName = Annotated[str, StringConstraints(pattern=f"^{BRANCH}$")]


class GatedChange(Part):
    """A change of a gate run, and the state of its project with it and all changes ahead of it merged.

    `tree` and `count` (of non-merge commits) are those of `source.Tree`. However Gerrit submits, the branch has a commit
    with both then. `number` and `patchset` are empty for a local change.
    """

    project: Project
    branch: BranchName
    number: str = Field("", pattern=r"^[0-9]{0,10}$")
    patchset: str = Field("", pattern=r"^[0-9]{0,6}$")
    tree: TreeId
    count: int = Field(ge=1)

    @property
    def name(self) -> str:
        """The change as a person knows it."""
        return f"{self.number},{self.patchset}" if self.number else self.tree[:8]


class GatedBuild(Part):
    """A build of a gate run: of one package and branch, at its last state in the run, for one target.

    `key` is what the store has it under, `against` the keys of the run's builds that it was built with. `changes` are the
    positions, from 0, of those changes of the run that it was built from.
    """

    package: Name
    branch: BranchName
    target: Name
    source_tree: TreeId
    packaging_tree: TreeId
    key: Key
    against: tuple[Key, ...] = ()
    changes: tuple[int, ...] = Field(min_length=1)


class GateRecord(Record):
    """What a gate run has built and tested together: `run` is its ZUUL_UUID, `changes` are oldest first, as of the queue."""

    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,63}$")
    pipeline: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    time: datetime
    changes: tuple[GatedChange, ...] = Field(min_length=1)
    builds: tuple[GatedBuild, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _positions(self) -> Self:
        if not all(0 <= one < len(self.changes) for build in self.builds for one in build.changes):
            raise ValueError("a build is of a change that the run does not have")
        return self


def write(config: Config, record: GateRecord) -> Path:
    """Write a record, whole and on the disk. It is for the repository host; the same record twice is one.

    Args:
        config: says where records are.
        record: what the gate has tested.

    Returns:
        One of its files.

    Raises:
        RequestError: a build of it is not in the store, is another one there, or must not be released.
        InfrastructureError: the file system fails.
    """
    for build in record.builds:
        _verify(config, build)
    digest = hashlib.sha256(record.model_dump_json().encode()).hexdigest()
    trees = sorted({tree for build in record.builds for tree in (build.source_tree, build.packaging_tree)})
    paths = [config.data / "gate" / f"{tree}-{record.time:%Y%m%d%H%M%S}-{digest[:16]}.json" for tree in trees]
    try:
        for path in paths:
            record.write(path)
        fsync_all([config.data / "gate", config.data])
    except OSError as error:
        raise InfrastructureError(f"cannot write gate record {paths[0]}: {error.strerror}") from error
    return paths[0]


def _verify(config: Config, build: GatedBuild) -> None:
    """Refuse a build that the store does not have as the record says."""
    entry = Store(config).required(build.key, build.target)
    record = entry.record
    about = f"gate record: build {build.key[:12]} of {build.package} for {build.target}"
    if record.trees != (build.source_tree, build.packaging_tree):
        raise RequestError(f"{about}: it is built from {' and '.join(record.trees)}, which the record does not say")
    record.refuse_unreleasable()


@dataclass(frozen=True)
class Gated:
    """A build of a gate record."""

    record: GateRecord
    build: GatedBuild

    def lacks(self, unmerged: Container[int]) -> list[GatedChange]:
        """Return the changes up to the build's last one that are not merged; without any, the build counts.

        Args:
            unmerged: positions of the record's changes that are not merged, as `unmerged` returns them.
        """
        return [self.record.changes[one] for one in range(max(self.build.changes) + 1) if one in unmerged]


def find(config: Config, package: str, branch: str, target: str, *trees: str) -> list[Gated]:
    """Return the builds of a tree, or of two, that gates have tested, newest first, merged or not.

    Args:
        config: says where records are.
        package: the package's name in the configuration.
        branch: the branch that it was built for.
        target: the target.
        trees: ids of its source tree, its packaging tree, or both; one that is not given may be any.

    Raises:
        InfrastructureError: a record cannot be read.
    """
    paths = sorted((config.data / "gate").glob(f"{trees[0]}-*.json"), reverse=True)
    every = (Gated(record, build) for record in map(GateRecord.read, paths) for build in record.builds)
    return [
        one
        for one in every
        if (one.build.package, one.build.branch, one.build.target) == (package, branch, target)
        and {*trees} <= {one.build.source_tree, one.build.packaging_tree}
    ]


def unmerged(config: Config, records: Sequence[GateRecord]) -> list[frozenset[int]]:
    """Return, of each record, the positions of those changes that are not merged, as Git says now.

    Raises:
        RequestError: the configuration names no remote.
        InfrastructureError: the remote does not answer.
    """
    branches: dict[tuple[str, str], Branch] = {}
    for place in ((one.project, one.branch) for record in records for one in record.changes):
        if place not in branches:
            branches[place] = Branch(config, *place)
    return [_unmerged(branches, record) for record in records]


def _unmerged(branches: Mapping[tuple[str, str], Branch], record: GateRecord) -> frozenset[int]:
    merged: set[tuple[str, str]] = set()
    found = set()
    # from the newest to the oldest: a branch that has a later state of the run has the changes before it, too
    for position, change in reversed(list(enumerate(record.changes))):
        place = (change.project, change.branch)
        if place not in merged and branches[place].commit_of(change.tree, change.count) is None:
            found.add(position)
        else:
            merged.add(place)
    return frozenset(found)


def records(config: Config) -> list[Path]:
    """Return the files of all records; one of several trees has several."""
    return sorted((config.data / "gate").glob("[0-9a-f]*.json"))


def referenced(config: Config, since: float) -> set[str]:
    """Return the keys of the store entries that records name which were written since the time stamp `since`."""
    kept = (path for path in records(config) if path.stat().st_mtime >= since)
    return {build.key for path in kept for build in GateRecord.read(path).builds}


def older(config: Config, before: float) -> list[Path]:
    """Return the files of records that were written before the time stamp `before`."""
    return [path for path in records(config) if path.stat().st_mtime < before]
