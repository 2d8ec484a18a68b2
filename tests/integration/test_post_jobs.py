"""The jobs after a merge, as rendered, by the local engine: built, published, healed, and told when it fails."""

from datetime import UTC, datetime
from pathlib import Path

import gerrit as review
import pytest
import trees

from pkgci import gaterecord
from pkgci.artifacts import Build, Result, Run
from pkgci.engines.local import LocalEngine
from pkgci.gaterecord import GatedBuild, GatedChange, GateRecord
from pkgci.released.audit import audit
from pkgci.released.repository import Repository
from pkgci.store import Store

DEB = "bookworm-amd64"


class Site:
    """A configured installation with one project, `small`, whose remote is a work tree."""

    def __init__(self, place: Path, gnupg: tuple[str, str], url: str) -> None:
        self.tree = place / "gerrit" / "small"
        trees.commit(self.tree, trees.deb())
        (place / "password").write_text(review.PASSWORD)
        self.config = trees.config(
            place,
            {"small": {"source": "small"}},
            gerrit=f"file://{place}/gerrit/",
            metrics=f"{place}/pkgci.prom",
            released={"gnupg_home": gnupg[0], "key": gnupg[1], "sibling_seconds": 0},
            review={"url": url, "user": review.USER, "password_file": f"{place}/password", "retrigger": {}},
        )
        self.engine = LocalEngine(self.config)
        self.repository = Repository(self.config, "default", "bookworm")

    def run(self, job: str, **parameters: str) -> tuple[Result, Path]:
        """Run a job to its end; return its result, and its artifacts."""
        ref = self.engine.start(job, parameters)
        self.engine.wait(ref)
        archive = self.engine.directory(ref) / "archive" / "artifacts"
        return Result.read(archive / "result.json"), archive

    def post(self, old: str, new: str, target: str = DEB) -> tuple[Result, Path]:
        """What a merge event starts; Zuul 2 says the ref by its own name, too."""
        moved = {"ZUUL_REFNAME": "main", "ZUUL_OLDREV": old, "ZUUL_NEWREV": new, "ZUUL_REF": "main", "ZUUL_COMMIT": new}
        return self.run(f"build-{target}", ZUUL_PROJECT="small", ZUUL_PIPELINE="post", **moved)

    def retriggered(self) -> list[str]:
        """How the jobs that publications have started for open reviews ended, oldest first."""
        return [self.engine.wait(ref) for ref in self.engine.builds("retrigger-outstanding")]

    def children(self, result: Result) -> list[str]:
        return [child.job.partition("-")[0] for child in result.children]

    def released(self) -> list[str]:
        with self.repository.opened():
            return [version for _, _, version in self.repository.index.live_of("small")]


@pytest.fixture
def site(tmp_path: Path, gnupg):
    with review.serving() as server:
        made = Site(tmp_path, gnupg, server.url)
        made.review = server
        yield made


def test_a_merge_is_published_as_it_was_gated_and_what_was_missed_or_failed_is_told_and_healed(site):
    # the gate builds it, from the branch with the change merged
    old = trees.git(site.tree, "rev-parse", "main")
    trees.git(site.tree, "checkout", "-q", "--detach", "main")
    proposed = trees.commit(site.tree, {"small": "#!/bin/sh\necho changed\n"})
    trees.git(site.tree, "update-ref", "refs/changes/01/1/1", proposed)
    trees.git(site.tree, "checkout", "-q", "main")
    queue = {"ZUUL_CHANGE": "1", "ZUUL_PATCHSET": "1", "ZUUL_CHANGES": "small:main:refs/changes/01/1/1"}
    about = {"ZUUL_PROJECT": "small", "ZUUL_BRANCH": "main", "ZUUL_PIPELINE": "gate", "RUN_TESTS": "false"}
    result, archive = site.run(f"build-{DEB}", **about, **queue)
    assert (result.exit, site.children(result)) == (0, ["compile", "publish"]), result.reason
    built = Build.read(archive / f"compile-{DEB}" / "build.json")
    change = GatedChange(project="small", branch="main", number="1", patchset="1", tree=built.source_tree, count=2)
    build = GatedBuild(
        package="small",
        branch="main",
        target=DEB,
        source_tree=built.source_tree,
        packaging_tree=built.packaging_tree,
        key=built.key,
        changes=(0,),
    )
    record = GateRecord(run="r1", pipeline="gate", time=datetime.now(UTC), changes=(change,), builds=(build,))
    gaterecord.write(site.config, record)
    assert site.repository.current() is None

    # merged: published with no compile, the very files; another review, tested long ago, is tested again
    vote = {"value": 1, "date": "2020-01-01 00:00:00.000000000"}
    about = {"_number": 7, "project": "small", "branch": "main", "updated": vote["date"]}
    site.review.open.append({**about, "labels": {"Verified": {"all": [vote]}}})
    trees.git(site.tree, "cherry-pick", proposed)
    new = trees.git(site.tree, "rev-parse", "main")
    result, archive = site.post(old, new)
    assert (result.exit, site.children(result)) == (0, ["publish"]), result.reason
    assert result.reason.endswith(
        f"small {built.version} at {site.repository.url}, generation 1: as gate run r1 has tested it"
    )
    entry = Store(site.config).lookup(built.key)
    (deb,) = entry.directory.glob("*.deb")
    (published,) = site.repository.root.glob("pool/small/*/*.deb")
    assert published.samefile(deb)
    assert site.retriggered() == ["SUCCESS"]
    ((number, said),) = site.review.comments
    assert (number, said["message"]) == (7, f"recheck tested before the merge of small main {new[:12]}")
    site.review.open.clear()
    site.review.comments.clear()
    again, _ = site.post(old, new)
    assert (again.exit, site.children(again), site.repository.current().number) == (0, ["publish"], 1)
    nothing, _ = site.post(old, new, "debianrpm-amd64")
    assert nothing.reason.startswith("nothing to build: small has no packaging for debianrpm-amd64")
    gone, _ = site.post(new, "0" * 40)
    assert gone.reason == "nothing to build: branch main of small is deleted"

    # pushed past the gate: built again, and said loudly
    pushed = trees.commit(site.tree, {"more": "x"})
    result, archive = site.post(new, pushed)
    assert (result.exit, site.children(result)) == (0, ["publish", "compile", "publish"]), result.reason
    loud = f"NOT TESTED AS PUBLISHED: no gate has tested tree {Run.read(archive / 'run.json').source_tree[:8]} of small"
    assert result.reason.endswith(loud)
    assert Run.read(archive / "run.json").untested == loud
    assert loud in (archive / "index.html").read_text()
    assert site.released() == [built.version.replace("pkg1.2", "pkg1.3")]

    # merged, and does not build: who merged it is told, once
    broken = trees.commit(site.tree, {"debian/rules": "#!/bin/sh\nexit 1\n"})
    site.review.changes[broken] = 42
    result, _ = site.post(pushed, broken)
    assert (result.fault, site.children(result)) == ("package", ["publish", "compile"])
    assert [number for number, _ in site.review.comments] == [42]
    assert f"Not published: build-{DEB} #" in site.review.comments[0][1]["message"]

    # mended, and the event of that merge is lost: as it was before, it is what is released; then not any more
    trees.commit(site.tree, {"debian/rules": trees.RULES})
    result, archive = site.run("republish", PACKAGE="small")
    assert (result.exit, result.reason) == (0, "0 of 0 missing builds published")
    trees.commit(site.tree, {"more": "y"})
    result, archive = site.run("republish", PACKAGE="small")
    assert (result.exit, result.reason) == (0, "1 of 1 missing builds published")
    assert site.released() == [built.version.replace("pkg1.2", "pkg1.6")]
    result, archive = site.run("republish")
    assert (result.exit, result.reason) == (0, "0 of 0 missing builds published")
    assert list(audit(site.repository)) == []
    assert set(site.retriggered()) == {"SUCCESS"}
    assert (
        'pkgci_unpublished_packages{release="default",codename="bookworm"} 0\n'
        in Path(site.config.settings.metrics).read_text()
    )
