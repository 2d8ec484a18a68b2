"""Reviews that were tested before a merge are tested again: real Gerrit, real released repositories."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import packages
import pytest
import trees
import yaml
from gated import merged, rebuilt
from gerrit_server import Gerrit
from released import configure

from pkgci import source
from pkgci.artifacts import Result, Retriggers
from pkgci.change import EVERY, Parameters
from pkgci.config import Config
from pkgci.engines.local import LocalEngine
from pkgci.errors import RequestError
from pkgci.released.merges import publish_build
from pkgci.retrigger import retrigger

PROJECTS = {"lib": "", "app": ", lib", "alone": ""}


class Site:
    """Projects of its own in Gerrit, released once; `app` build-depends on `lib`, whose packaging is another project."""

    def __init__(self, place: Path, gerrit: Gerrit, gnupg: tuple[str, str], name: str) -> None:
        self.place, self.gerrit, self.name = place, gerrit, name
        account = {"url": gerrit.url, "user": "pkgci", "password_file": str(gerrit.password_file("pkgci"))}
        review = {"review": {**account, "retrigger": {"per_hour": 2}}, "gerrit": gerrit.url}
        paths = {"paths": {kind: f"{place}/{kind}" for kind in ("cache", "data", "state")}}
        self.config = configure(place, gnupg, review | paths)
        (self.config.directory / "packages").mkdir()
        self.sources = {one: self.tree(one, trees.deb(one, depends=more)) for one, more in PROJECTS.items()}
        self.packaging = self.tree("lib-packaging", trees.deb("lib"))
        for one in PROJECTS:
            pair = {"packaging": f"{name}/lib-packaging"} if one == "lib" else {}
            entry = yaml.safe_dump({"source": f"{name}/{one}", **pair})
            (self.config.directory / "packages" / f"{one}.yaml").write_text(entry)
        self.config = Config(self.config.directory)
        for one in PROJECTS:
            self.publish(one)

    def tree(self, project: str, files: dict[str, str]) -> Path:
        tree = self.place / project
        trees.commit(tree, files)
        self.gerrit.create_project(f"{self.name}/{project}", tree, "FAST_FORWARD_ONLY")
        return tree

    def publish(self, project: str) -> str:
        """Publish what a project's branch leads to."""
        commit = self.gerrit.tip(f"{self.name}/{project}")
        depends = "lib" if project == "app" else ""
        rebuilt(self.config, self.place, f"{self.name}/{project}", commit, build_depends=depends)
        return commit

    def publish_rpm(self, project: str) -> None:
        """Publish an RPM package of what a project's branch leads to."""
        change = merged(f"{self.name}/{project}", self.gerrit.tip(f"{self.name}/{project}"))
        sources = source.fetch(self.config, change)
        release = f"1.pkg1.{sources.count}"
        place = self.place / "rpm" / release
        place.mkdir(parents=True)
        made = packages.rpmbuilt(place, project, "1.0", release)
        entry = packages.deliver_rpms(self.config, project, f"1.0-{release}", made, tree=sources.source.id)
        publish_build(self.config, "debianrpm-amd64", change, entry, self.place)

    def propose(self, project: str, word: str, vote: int | None = 1) -> int:
        """Push a review on top of what the branch was at first, and let Zuul vote on it."""
        tree = self.place / project
        trees.git(tree, "checkout", "-q", "-B", word, "main")
        trees.commit(tree, {word: "new\n"}, f"Add {word}")
        number = self.gerrit.push(tree, f"{self.name}/{project}")
        trees.git(tree, "checkout", "-q", "main")
        if vote is not None:
            self.gerrit.review(number, labels={"Verified": vote}, user="zuul")
        return number

    def merge(self, project: str) -> str:
        """Merge a change of a project, and publish it; a second later than what was before it."""
        number = self.propose(project, "merged", None)
        self.gerrit.submit_by_force(number)
        return self.publish(project)

    def run(self, project: str = "", commit: str = "", dry: bool = False, later: float = 0) -> Retriggers:
        """Run the job for a merge, or for what is left."""
        moved = {"ZUUL_PROJECT": f"{self.name}/{project}", "ZUUL_REFNAME": "main", "ZUUL_NEWREV": commit}
        given = {**(moved if project else {}), "DRY_RUN": "true" if dry else ""}
        now = datetime.now(UTC) + timedelta(seconds=later)
        return retrigger(self.config, Parameters.read(given, EVERY), now, self.place)

    def job(self, project: str, commit: str) -> Result:
        """Run the job dry, as rendered, for a merge."""
        engine = LocalEngine(self.config)
        moved = {"ZUUL_PROJECT": f"{self.name}/{project}", "ZUUL_REFNAME": "main", "ZUUL_NEWREV": commit}
        ref = engine.start("retrigger-outstanding", {**moved, "DRY_RUN": "true"})
        engine.wait(ref)
        return Result.read(engine.directory(ref) / "archive" / "artifacts" / "result.json")

    def comments(self, *numbers: int) -> list[list[str]]:
        return [self.gerrit.messages(number, "pkgci") for number in numbers]


@pytest.fixture
def site(tmp_path, gerrit, gnupg, request):
    return Site(tmp_path, gerrit, gnupg, request.node.name[:20])


def wait_a_second() -> None:
    """Gerrit's times are whole seconds: let the next one begin."""
    began = datetime.now(UTC).replace(microsecond=0)
    while datetime.now(UTC).replace(microsecond=0) <= began:
        pass


def test_reviews_of_both_projects_and_of_what_build_depends_are_tested_again_once_at_the_rate(site):
    own, failed = site.propose("lib", "one"), site.propose("lib", "two", -1)
    untested, packaging = site.propose("lib", "three", None), site.propose("lib-packaging", "four")
    uses, other = site.propose("app", "five"), site.propose("alone", "six")
    closed = site.propose("lib", "seven")
    site.gerrit.abandon(closed)
    wait_a_second()
    commit = site.merge("lib")
    late = site.propose("app", "eight")
    everyone = (own, failed, untested, packaging, uses, other, closed, late)

    # a dry run says what would be done, and does nothing
    said = site.job("lib", commit)
    assert (said.result, said.reason) == ("SUCCESS", "2 reviews would be tested again, 2 wait")
    made = site.run("lib", commit, dry=True)
    assert made.dry
    # those that were touched last come first
    assert [one.number for one in (*made.asked, *made.queued)] == [uses, packaging, failed, own]
    assert site.comments(*everyone) == [[]] * len(everyone)
    assert not list((site.config.data / "retrigger").glob("*.json"))

    # as many as the rate allows; the same merge again, and the timer, find no more room
    made = site.run("lib", commit)
    assert [one.number for one in made.asked] == [uses, packaging]
    (said,) = site.comments(uses)[0]
    assert said == f"Patch Set 1:\n\nrecheck tested before the merge of {site.name}/lib main {commit[:12]}"
    for again in (site.run("lib", commit), site.run()):
        assert (again.asked, [one.number for one in again.queued]) == ((), [failed, own])

    # an hour later the rest; who was tested since needs nothing
    site.gerrit.review(failed, labels={"Verified": 1}, user="zuul")
    made = site.run(later=3700)
    assert ([one.number for one in made.asked], made.queued) == ([own], ())
    for again in (site.run(later=7300), site.run("lib", commit, later=7300)):
        assert (again.asked, again.queued) == ((), ())
    assert [len(said) for said in site.comments(*everyone)] == [1, 0, 0, 1, 1, 0, 0, 0]


def test_a_later_merge_asks_again_once_all_targets_have_it_and_one_that_is_not_merged_does_not(site):
    first = site.propose("alone", "one")
    site.publish_rpm("alone")
    wait_a_second()
    commit = site.merge("alone")
    made = site.run("alone", commit)
    assert (made.asked, made.waiting) == ((), (f"{site.name}/alone main",))
    site.publish_rpm("alone")
    assert [one.number for one in site.run().asked] == [first]

    wait_a_second()
    trees.git(site.place / "alone", "pull", "-q", "--ff-only", f"{site.gerrit.url}{site.name}/alone", "main")
    ahead = site.propose("alone", "next", None)
    head = site.gerrit.change(ahead)["current_revision"]
    with pytest.raises(RequestError, match=f"main of {site.name}/alone: {head[:12]} is not merged into it"):
        site.run("alone", head)
    site.gerrit.submit_by_force(ahead)
    assert site.publish("alone") == head
    # one target is late: after an hour nobody waits for it
    assert site.run("alone", head).asked == ()
    assert [one.number for one in site.run(later=3700).asked] == [first]
    # the event of the first merge comes once more
    assert site.run("alone", commit).asked == ()
    assert len(site.comments(first)[0]) == 2
