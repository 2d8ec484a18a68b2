"""The whole way with Zuul 2: real Gerrit and Zuul 2.6.0, the Gearman worker, and the local engine, which builds and tests."""

import os
import re
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import trees
from clients import gnupg_home
from gerrit_server import Gerrit
from zuul2_server import Zuul2

from pkgci.artifacts import Build
from pkgci.command import supervised
from pkgci.engines.base import BuildRef
from pkgci.engines.local import LocalEngine
from pkgci.text import printable

PROJECT = "packages/small"
CHECK, COMPILE, GATE = "build-bookworm-amd64", "compile-bookworm-amd64", "gate-bookworm-amd64"
# as a site may do it: the tests of what is built are the gate's alone, which has no such parameter
FUNCTION = """

_ours = change_parameters


def change_parameters(item, params):
    _ours(item, params)
    params["RUN_TESTS"] = "false"
"""
# machines boot and restore slowly without KVM
SECONDS = 900


class Site:
    """All that runs, and what is known of it."""

    def __init__(self, place: Path, gerrit: Gerrit, gnupg: tuple[str, str]) -> None:
        self.gerrit, self.place = gerrit, place
        self.tree = place / "small"
        trees.commit(self.tree, trees.deb())
        gerrit.create_project(PROJECT, self.tree)
        gerrit.create_project("pkgci")
        soon = datetime.now().astimezone() + timedelta(minutes=2)
        projects = {PROJECT: ["package"], "pkgci": ["repositories"]}
        self.zuul = Zuul2(place / "zuul", gerrit, projects, periodic=f"{soon.minute} {soon.hour} * * *")
        with (self.zuul.directory / "functions.py").open("a") as stream:
            stream.write(FUNCTION)
        released = {"gnupg_home": gnupg[0], "key": gnupg[1]}
        account = {"url": gerrit.url, "user": "pkgci", "password_file": str(gerrit.password_file("pkgci"))}
        settings = {"gerrit": gerrit.url, "sources": [self.zuul.git_url], "released": released}
        settings |= {"review": {**account, "retrigger": {}}}
        self.config = trees.config(place, {"small": {"source": PROJECT}}, **settings)
        self.engine = LocalEngine(self.config)
        self.worker: subprocess.Popen | None = None

    def work(self) -> None:
        """Start the worker, and wait until it has registered."""
        words = [Path(sys.executable).with_name("pkgci"), "gearman-worker", "--server", self.zuul.address]
        environment = {**os.environ, "PKGCI_CONFIG": str(self.config.directory)}
        with (self.place / "worker.log").open("ab") as log:
            self.worker = subprocess.Popen(supervised(words), env=environment, stderr=log)
        self.until(lambda: f"build:{CHECK}" in self.zuul.functions())

    def until(self, condition, seconds: float = SECONDS) -> None:
        """Wait until a condition holds; when it does not, say what the worker and the builds have said."""
        try:
            self.zuul.until(condition, seconds)
        except AssertionError as error:
            logs = [(self.place / "worker.log").read_text(), *map(self._log, self.builds())]
            raise AssertionError(f"{error}\n" + "\n".join(logs)) from None

    def builds(self, job: str = "", **parameters: str) -> list[BuildRef]:
        """Return all builds, or those of a job, with these parameters."""
        jobs = [job] if job else self.engine.jobs()
        refs = [ref for name in jobs for ref in self.engine.builds(name)]
        return [ref for ref in refs if parameters.items() <= self.engine.record(ref).parameters.items()]

    def tested(self, number: int) -> list[BuildRef]:
        """Return the builds of a change's check that have ended."""
        refs = ((ref, self.engine.record(ref)) for ref in self.engine.builds(CHECK))
        return [ref for ref, known in refs if known.parameters.get("ZUUL_CHANGE") == str(number) and not known.alive]

    def _log(self, ref: BuildRef) -> str:
        said = b"".join(self.engine.log(ref)).decode(errors="replace")
        return f"== {ref}\n" + "\n".join(printable(line, 300) for line in said.splitlines()[-30:])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    place = tmp_path_factory.mktemp("zuul2")
    with gnupg_home() as gnupg, Gerrit(place / "gerrit") as gerrit:
        made = Site(place, gerrit, gnupg)
        with made.zuul:
            made.work()
            yield made
            made.worker.terminate()
            assert made.worker.wait(60) == 0


def test_a_change_is_voted_on_gated_merged_and_published(site):
    gerrit = site.gerrit
    trees.commit(site.tree, {"small": "#!/bin/sh\necho better\n"}, "Say it better")
    number = gerrit.push(site.tree, PROJECT)
    site.until(lambda: gerrit.votes(number, "Verified"))
    said = gerrit.messages(number, "zuul")
    assert gerrit.votes(number, "Verified") == {"zuul": 1}, said
    (report,) = re.findall(rf"{CHECK} file://(\S+/index\.html) : SUCCESS", said[-1])
    assert PROJECT in Path(report).read_text()
    gerrit.approve(number)
    site.until(lambda: gerrit.merged(number))
    assert [
        text for text in gerrit.messages(number, "zuul") if re.search(rf"Gate passed.*{GATE} .* : SUCCESS", text, re.S)
    ]
    # Zuul starts post by the branch's move
    site.until(lambda: site.builds(CHECK, ZUUL_PIPELINE="post"))
    (post,) = site.builds(CHECK, ZUUL_PIPELINE="post")
    assert site.engine.wait(post, SECONDS) == "SUCCESS"
    assert list((site.config.data / "repositories/default/bookworm/pool").rglob("small_1.0+pkg1.2-*_all.deb"))


def test_a_new_patch_set_stops_the_former_ones_build(site):
    gerrit = site.gerrit
    trees.commit(site.tree, {"debian/rules": f"{trees.RULES}\noverride_dh_auto_build:\n\tsleep 500\n"}, "Take long")
    number = gerrit.push(site.tree, PROJECT)
    about = {"ZUUL_CHANGE": str(number), "ZUUL_PATCHSET": "1"}
    site.until(lambda: [ref for ref in site.builds(COMPILE, **about) if site.engine.state(ref) == "running"])
    gerrit.amend(site.tree, {"debian/rules": f"{trees.RULES}\noverride_dh_auto_build:\n\tfalse\n"}, PROJECT)
    site.until(lambda: not [ref for ref in site.builds(**about) if site.engine.record(ref).alive])
    assert {site.engine.state(ref) for job in (CHECK, COMPILE) for ref in site.builds(job, **about)} == {"ABORTED"}
    site.until(lambda: gerrit.votes(number, "Verified"))
    assert gerrit.votes(number, "Verified") == {"zuul": -1}
    assert re.search(rf"{CHECK} \S+ : FAILURE", gerrit.messages(number, "zuul")[-1])
    gerrit.abandon(number)


def test_a_killed_worker_is_a_retry_not_a_vote(site):
    gerrit = site.gerrit
    trees.git(site.tree, "reset", "-q", "--hard", "HEAD~")
    trees.commit(site.tree, {"README": "Read.\n"}, "Read me")
    number = gerrit.push(site.tree, PROJECT)
    site.until(lambda: site.builds(CHECK, ZUUL_CHANGE=str(number)))
    site.worker.kill()
    site.worker.wait()
    site.work()
    site.until(lambda: gerrit.votes(number, "Verified"))
    assert gerrit.votes(number, "Verified") == {"zuul": 1}
    first, second = site.builds(CHECK, ZUUL_CHANGE=str(number))
    assert (site.engine.state(first), site.engine.state(second)) == ("ABORTED", "SUCCESS")
    gerrit.abandon(number)


def test_the_periodic_pipeline_looks_after_the_repositories(site):
    for job in ("repository-maintain", "republish"):
        site.until(lambda job=job: site.builds(job))
        (ref,) = site.builds(job)
        assert site.engine.wait(ref, SECONDS) == "SUCCESS"


def test_an_open_review_is_tested_again_on_what_was_merged_since(site):
    gerrit = site.gerrit
    trees.git(site.tree, "fetch", "-q", gerrit.url + PROJECT, "main")
    trees.git(site.tree, "reset", "-q", "--hard", "FETCH_HEAD")
    trees.commit(site.tree, {"NEWS": "New.\n"}, "Tell the news")
    number = gerrit.push(site.tree, PROJECT)
    site.until(lambda: gerrit.votes(number, "Verified"))
    assert gerrit.votes(number, "Verified") == {"zuul": 1}
    trees.git(site.tree, "reset", "-q", "--hard", "FETCH_HEAD")
    merged = trees.commit(site.tree, {"TODO": "Nothing.\n"}, "Past all review")
    gerrit.push_directly(site.tree, PROJECT)
    # its publication asks Zuul by a comment
    site.until(lambda: len(site.tested(number)) == 2)
    again = site.tested(number)[-1]
    (asked,) = gerrit.messages(number, "pkgci")
    assert asked.endswith(f"recheck tested before the merge of {PROJECT} main {merged[:12]}")
    archive = site.engine.directory(again) / "archive/artifacts"
    assert site.engine.state(again) == "SUCCESS"
    version = Build.read(archive / "compile-bookworm-amd64" / "build.json").version
    count = trees.git(site.tree, "rev-list", "--count", "HEAD")
    assert f"+pkg1.{int(count) + 1}" in version, "on top of what was merged"
