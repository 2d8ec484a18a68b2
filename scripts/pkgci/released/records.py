"""What a released repository says of itself: `generation.json`, a hold, and `provenance.json`.

Source: https://in-toto.io/Statement/v1 and https://slsa.dev/provenance/v1.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field, StringConstraints

from pkgci.artifacts import Part, Record
from pkgci.store import Entry, File, Key

WORDS = r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]{0,1000}"
Words = Annotated[str, StringConstraints(pattern=f"^{WORDS}$")]


class Commit(Part):
    """A merged commit of a project, and its tree."""

    project: str
    commit: str
    tree: str


class Origin(Part):
    """Where the sources of a build are merged: what the repository host itself found in Git, now."""

    branch: str
    commits: tuple[Commit, ...]


@dataclass(frozen=True)
class Publication:
    """A build in the store, by its key, and where its sources are merged."""

    key: str
    origin: Origin


class ReleasedPackage(Part):
    """A binary package in a generation. `sha256` is of the build's file; of an RPM without signatures."""

    name: str
    version: str
    architecture: str
    file: str
    sha256: str


class ReleasedBuild(Part):
    """A build in a generation."""

    key: Key
    source: str
    target: str
    version: str
    packages: tuple[ReleasedPackage, ...]


class Generation(Record):
    """`generation.json`: what a generation changed against the one before it, by whom and why.

    `stamp` is the time of its pointer files in seconds since the epoch: it grows with each generation, also when several
    are made within a second. A renewal changes no package: it is signed again, and apt accepts it until `valid_until`.
    """

    number: int = Field(ge=1)
    time: AwareDatetime
    stamp: int
    valid_until: AwareDatetime | None = None
    kind: Literal["publish", "rollback", "renewal"]
    by: str
    reason: Words = ""
    added: tuple[ReleasedBuild, ...]
    removed: tuple[ReleasedBuild, ...]


class Hold(Record):
    """Why a source package is not published until a person says so; `generation` is the rollback that put it here."""

    source: str
    reason: Words
    generation: int
    time: datetime
    by: str


class Provenance(Record):
    """`provenance.json`: an in-toto statement with a SLSA provenance predicate."""

    schema_version: Literal[1] = Field(1, alias="schema", exclude=True)
    type: Literal["https://in-toto.io/Statement/v1"] = Field("https://in-toto.io/Statement/v1", alias="_type")
    subject: tuple[dict[str, Any], ...]
    predicate_type: Literal["https://slsa.dev/provenance/v1"] = Field(
        "https://slsa.dev/provenance/v1", alias="predicateType"
    )
    predicate: dict[str, Any]

    def origin(self) -> Origin | None:
        """Return where the sources are merged; None of a statement that names no Git commit."""
        found = []
        for one in self.predicate.get("buildDefinition", {}).get("resolvedDependencies", ()):
            said = re.fullmatch(r"git\+(.+)@([^@]+)", one.get("uri", ""))
            if said:
                digest = one["digest"]
                commit = Commit(project=said[1], commit=digest["gitCommit"], tree=digest["gitTree"])
                found.append((said[2], commit))
        return Origin(branch=found[0][0], commits=tuple(commit for _, commit in found)) if found else None


def provenance(entry: Entry, files: Sequence[File], origin: Origin, builder: str, release: str, by: str) -> Provenance:
    """Return the provenance of a build.

    Args:
        entry: the build, as the store verified it.
        files: the files as they are published (RPM: signed).
        origin: where its sources are merged.
        builder: a URI that names the installation of pkgci.
        release: the release that it is published to.
        by: the job that publishes it.
    """
    record = entry.record
    sources = [
        {"uri": f"git+{commit.project}@{origin.branch}", "digest": {"gitCommit": commit.commit, "gitTree": commit.tree}}
        for commit in origin.commits
    ]
    root = [{"name": "build root", "digest": {"sha256": record.root}}] if record.root else []
    dependencies = [{"name": one.name, "digest": {"sha256": one.sha256}} for one in record.dependencies]
    return Provenance(
        subject=tuple({"name": file.name, "digest": {"sha256": file.sha256}} for file in files),
        predicate={
            "buildDefinition": {
                "buildType": "urn:pkgci:compile:1",
                "externalParameters": {"release": release, "target": record.target, "branch": origin.branch},
                "internalParameters": {"key": record.key, "algorithm": record.algorithm},
                "resolvedDependencies": [*sources, *root, *dependencies],
            },
            "runDetails": {"builder": {"id": builder}, "metadata": {"invocationId": by}},
        },
    )


def read_log(directory: Path, number: int) -> Generation:
    """Return the record of a generation from a repository's log."""
    return Generation.read(directory / f"{number}.json")


def difference(generations: Iterable[Generation]) -> tuple[dict[str, ReleasedBuild], dict[str, ReleasedBuild]]:
    """Return the builds that generations one after the other have added and removed in all, by their keys."""
    added: dict[str, ReleasedBuild] = {}
    removed: dict[str, ReleasedBuild] = {}
    for one in generations:
        for builds, gone, come in ((one.removed, added, removed), (one.added, removed, added)):
            come.update((build.key, build) for build in builds if gone.pop(build.key, None) is None)
    return added, removed
