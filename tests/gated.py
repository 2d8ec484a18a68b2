"""What gates and builds of merged changes leave, made without building, and what must hold of it once it is published."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import packages
from released import faults, root

from pkgci import gaterecord, source
from pkgci.artifacts import ReleaseOutcome
from pkgci.change import Change, QueueItem
from pkgci.config import Config
from pkgci.gaterecord import GatedBuild, GatedChange, GateRecord
from pkgci.released.merges import publish_build, publish_tested
from pkgci.released.repository import Repository
from pkgci.source import Sources
from pkgci.store import Entry

DEB = "bookworm-amd64"


def version(sources: Sources) -> str:
    """The version as the formats make it: what comes from Git decides it."""
    return f"1.0+pkg1.{sources.count}-1+t"


def stored(config: Config, sources: Sources, tmp_path: Path, content: str = "", **more: str) -> Entry:
    """Put into the store what a build of these sources leaves; `more` is as of `deliver_debs`."""
    place = tmp_path / "made" / f"{sources.digest}{content}"
    place.mkdir(parents=True, exist_ok=True)
    files = {f"/usr/share/{sources.package}/text": f"{sources.digest} {content}".encode()}
    deb = packages.deb(place, sources.package, version(sources), files=files)
    trees = {"tree": sources.source.id, "packaging": sources.packaging.id}
    return packages.deliver_debs(config, place, sources.package, version(sources), [deb], **trees, **more)


def gate(
    config: Config,
    tmp_path: Path,
    *refs: tuple[str, str],
    run: str = "run-1",
    content: str = "",
    target: str = DEB,
    build: Callable[..., Entry] = stored,
) -> list[Entry]:
    """Build the changes of a queue as a gate does, and write its record; return the builds, in the order of projects."""
    changes, builds, entries = [], {}, {}
    for position, (project, ref) in enumerate(refs):
        queue = tuple(QueueItem(one, "main", what) for one, what in refs[: position + 1])
        number, patchset = ref.split("/")[3:]
        sources = source.fetch(
            config, Change(project=project, branch="main", number=number, patchset=patchset, queue=queue)
        )
        state = sources.source if project == sources.source.project else sources.packaging
        changes.append(
            GatedChange(
                project=project, branch="main", number=number, patchset=patchset, tree=state.id, count=state.count
            )
        )
        entries[sources.package] = entry = build(config, sources, tmp_path, content)
        package = sources.package
        builds[package] = GatedBuild(
            package=package,
            branch="main",
            target=target,
            source_tree=sources.source.id,
            packaging_tree=sources.packaging.id,
            key=entry.record.key,
            changes=(*(builds[package].changes if package in builds else ()), position),
        )
    record = GateRecord(
        run=run, pipeline="gate", time=datetime.now(UTC), changes=tuple(changes), builds=tuple(builds.values())
    )
    gaterecord.write(config, record)
    return list(entries.values())


def merged(project: str, commit: str) -> Change:
    """Return a change as it is known after its merge."""
    return Change(project=project, branch="main", pipeline="post", commit=commit)


def post(config: Config, tmp_path: Path, project: str, commit: str) -> ReleaseOutcome:
    """Publish a merged commit as a gate has tested it."""
    made = publish_tested(config, DEB, merged(project, commit), tmp_path)
    assert ReleaseOutcome.read(tmp_path / "released.json") == made
    return made


def rebuilt(config: Config, tmp_path: Path, project: str, commit: str, **more: str) -> ReleaseOutcome:
    """Build a merged commit again, and publish that."""
    sources = source.fetch(config, merged(project, commit))
    publish_build(config, DEB, merged(project, commit), stored(config, sources, tmp_path, "again", **more), tmp_path)
    return ReleaseOutcome.read(tmp_path / "released.json")


def inodes(config: Config, name: str) -> set[int]:
    """Return those of a source package's DEB packages in the pool."""
    return {path.stat().st_ino for path in (root(config) / "pool" / name).glob("*/*.deb")}


def is_what_was_tested(config: Config, outcome: ReleaseOutcome, *entries: Entry) -> bool:
    """Whether what readers see now are the very files that the gate tested."""
    assert (outcome.result, outcome.tested, outcome.left) == ("published", True, ())
    assert faults(config) == []
    (made,) = [Repository(config, "rocket", "bookworm").current()]
    assert {(build.source, build.version) for build in made.added} == {
        (entry.record.package, entry.record.version) for entry in entries
    }
    files = {path.stat().st_ino for entry in entries for path in entry.directory.glob("*.deb")}
    return files <= {number for entry in entries for number in inodes(config, entry.record.package)}
