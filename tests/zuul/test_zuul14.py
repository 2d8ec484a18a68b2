"""The configuration of current Zuul: held against the rendered jobs, and read by Zuul itself, which refuses a bad one."""

import json
import re
from pathlib import Path

import pytest
import trees
import yaml
import zuul_server
from zuul_server import Zuul

from pkgci.config import EMBEDDED, ROOT, Config
from pkgci.zuul import JOB_SECONDS, claimed

DEFINITIONS = ROOT / "zuul" / "zuul.d"
TARGETS = Config(EMBEDDED).names("targets")


def entries(kind: str) -> list[dict]:
    """Return all entries of a kind."""
    return [
        entry[kind]
        for path in sorted(DEFINITIONS.iterdir())
        for entry in yaml.safe_load(path.read_text())
        if kind in entry
    ]


JOBS = {job["name"]: job for job in entries("job")}


def test_every_job_starts_one_of_the_engines_and_every_target_has_its_own():
    rendered = set(Path(ROOT, "tests/jobs/expected.txt").read_text().split())
    concrete = {name for name, job in JOBS.items() if not job.get("abstract")}
    assert concrete <= rendered
    assert concrete >= {f"{step}-{target}" for step in ("build", "gate") for target in TARGETS}
    packaged = {name for name, job in JOBS.items() if job["parent"] == "package"}
    assert packaged == {name for name in concrete if name.startswith(("build-", "gate-"))}
    assert {JOBS[name]["parent"] for name in concrete - packaged} == {JOBS["package"]["parent"]} == {"engine"}


def test_the_branches_of_packages_are_those_that_releases_claim():
    assert JOBS["package"]["branches"] == claimed(Config(EMBEDDED))


def test_a_package_has_the_jobs_of_every_target_in_every_pipeline():
    (template,) = entries("project-template")
    steps = {"check": "build", "gate": "gate", "post": "build"}
    expected = {pipeline: [f"{step}-{target}" for target in TARGETS] for pipeline, step in steps.items()}
    assert {pipeline: template[pipeline]["jobs"] for pipeline in steps} == expected


def test_every_job_is_used():
    used = {job for kind in ("project", "project-template") for entry in entries(kind) for job in jobs_of(entry)}
    assert used - {"noop"} == JOBS.keys() - {"engine", "package"}


def jobs_of(entry: dict) -> list[str]:
    return [job for part in entry.values() if isinstance(part, dict) for job in part.get("jobs", ())]


def test_every_pipeline_says_what_it_does():
    described = {one["name"]: one.get("description", "") for one in entries("pipeline")}
    assert [name for name, text in described.items() if len(text) < 50] == []
    assert set(described) == {"check", "gate", "post", "periodic"}


def test_the_jobs_time_limit_is_the_tenants_and_above_the_engines():
    assert JOBS["engine"]["timeout"] == JOB_SECONDS
    minutes = [
        int(limit)
        for path in (ROOT / "jobs" / "templates").iterdir()
        if path.stem != "debug-session"  # which no job waits for
        for limit in re.findall(r"minutes: ([0-9]+)", path.read_text())
    ]
    assert max(minutes) * 60 * 2 <= JOB_SECONDS


ACCEPTED = ("recheck", "Recheck ", "recheck flaky mirror", "recheck: packages/lib has been merged")
REFUSED = ("please recheck", "recheckin", "recheck\nor not", "not recheck", "")


@pytest.mark.parametrize("before", ["", "Patch Set 3:\n\n", "Patch Set 12: Code-Review+1 -Workflow\n\n(1 comment)\n\n"])
def test_who_may_ask_for_a_test_and_how(before):
    (check,) = (one for one in entries("pipeline") if one["name"] == "check")
    (asked,) = (one["comment"] for one in check["trigger"]["gerrit"] if one["event"] == "comment-added")
    assert [words for words in ACCEPTED if not re.search(asked, before + words)] == []
    assert [words for words in REFUSED if re.search(asked, before + words)] == []


# Zuul itself


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("zuul")
    trees.commit(directory / "trees" / "packages" / "small", trees.deb())
    zuul_server.config_project(directory / "trees" / "pkgci")
    ours = {"load-branch": "main", "include-branches": ["main"], "extra-config-paths": "zuul/zuul.d/"}
    packages = {"packages/small": {"include": []}}
    source = {"trees": {"config-projects": [{"pkgci": ours}], "untrusted-projects": [packages]}}
    tenants = directory / "tenants.yaml"
    tenants.write_text(json.dumps([{"tenant": {"name": "t", "max-job-timeout": JOB_SECONDS, "source": source}}]))
    made = Zuul(directory, tenants)
    try:
        made.start_zookeeper()
        made.start_part("merger")
        yield made
    finally:
        made.__exit__()


def test_zuul_takes_it(server):
    done = server.validate()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize(
    ("file", "good", "bad", "said"),
    [
        ("projects.yaml", "- gate-bookworm-amd64", "- gate-bookworm-amd46", "Job gate-bookworm-amd46 not defined"),
        ("pipelines.yaml", "manager: dependent", "manager: depending", "depending"),
        ("jobs.yaml", "timeout: 172800", "timeout: 172801", "max-job-timeout"),
    ],
)
def test_zuul_refuses_a_bad_one(server, file, good, bad, said):
    tree = server.directory / "trees" / "pkgci"
    path = tree / "zuul" / "zuul.d" / file
    before = path.read_text()
    assert good in before
    trees.commit(tree, {f"zuul/zuul.d/{file}": before.replace(good, bad)})
    try:
        done = server.validate()
    finally:
        trees.commit(tree, {f"zuul/zuul.d/{file}": before})
    assert done.returncode == 1
    assert said in done.stdout + done.stderr
