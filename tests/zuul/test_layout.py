"""The layout for Zuul 2: against the jobs that Jenkins Job Builder renders, and by the validator of the real Zuul 2.6.0."""

import re
from pathlib import Path

import pytest
import yaml
from zuul2_server import validate

from pkgci.config import EMBEDDED, ROOT, Config
from pkgci.engines.definitions import read_all, render

LAYOUT = ROOT / "zuul/layout.yaml"


@pytest.fixture(scope="module")
def jobs():
    return read_all(render(ROOT / "jobs", Config(EMBEDDED).cache / "jobs"))


@pytest.fixture(scope="module")
def layout():
    return yaml.safe_load(LAYOUT.read_text())


def changed(tmp_path: Path, old: str, new: str) -> Path:
    """Return a copy of the layout with another text in it."""
    text = LAYOUT.read_text()
    assert old in text
    path = tmp_path / "layout.yaml"
    path.write_text(text.replace(old, new, 1))
    (tmp_path / "functions.py").write_text((ROOT / "zuul/functions.py").read_text())
    return path


def test_zuul_accepts_the_layout(jobs, tmp_path):
    done = validate(LAYOUT, jobs, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_zuul_refuses_a_job_that_is_not_rendered(jobs, tmp_path):
    done = validate(LAYOUT, set(jobs) - {"gate-bookworm-amd64"}, tmp_path)
    assert done.returncode
    assert "Job gate-bookworm-amd64 not defined" in done.stdout


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("manager: DependentPipelineManager", "manager: SomeManager", "not a valid value for dictionary value"),
        ("- name: package\n    check:", "- name: package\n    chek:", "extra keys not allowed"),
        ("change_parameters", "other_parameters", "Unable to find function other_parameters"),
        ("      - name: repositories\n", "      - name: none\n", "none"),
    ],
)
def test_zuul_refuses_a_bad_layout(jobs, tmp_path, old, new, said):
    done = validate(changed(tmp_path, old, new), jobs, tmp_path)
    assert done.returncode
    assert said in done.stdout + done.stderr


def test_a_package_is_checked_gated_and_published_for_each_target(layout, jobs):
    (package,) = [template for template in layout["project-templates"] if template["name"] == "package"]
    for pipeline, step in (("check", "build"), ("gate", "gate"), ("post", "build")):
        assert package[pipeline] == sorted(name for name in jobs if name.startswith(f"{step}-"))


def test_each_pipeline_is_described_and_only_gate_submits(layout):
    assert [pipeline["name"] for pipeline in layout["pipelines"]] == ["check", "gate", "post", "periodic"]
    for pipeline in layout["pipelines"]:
        assert len(pipeline["description"].split()) > 10
        assert pipeline.get("success", {}).get("gerrit", {}).get("submit", False) is (pipeline["name"] == "gate")


def test_messages_cannot_end_the_quotation_that_zuul_puts_them_in(layout):
    messages = [text for pipeline in layout["pipelines"] for key, text in pipeline.items() if key.endswith("-message")]
    assert messages
    assert not [text for text in messages if set(text) & set('"\\`$')]


def test_it_is_ascii():
    assert all(path.read_text().isascii() for path in (ROOT / "zuul").glob("*.*") if path.is_file())


@pytest.mark.parametrize(
    ("comment", "starts"),
    [
        ("recheck", True),
        ("Patch Set 2:\n\nrecheck", True),
        ("Patch Set 2: Code-Review+1\n\nRecheck ", True),
        ("Patch Set 12: Workflow+1 Code-Review-1\n\n(3 comments)\n\nrecheck", True),
        ("Patch Set 2:\n\nplease recheck", False),
        ("Patch Set 2:\n\nrecheck: the mirror is back", True),
        ("Patch Set 2:\n\nrecheck\n\nand more", False),
        (
            "Patch Set 2: Verified-1\n\nCheck failed. Each line leads to a report; the comment recheck runs it again.",
            False,
        ),
        ("rechecked", False),
    ],
)
def test_comments_that_start_a_check(layout, comment, starts):
    (check,) = [pipeline for pipeline in layout["pipelines"] if pipeline["name"] == "check"]
    (rule,) = [trigger["comment"] for trigger in check["trigger"]["gerrit"] if "comment" in trigger]
    assert bool(re.search(rule, comment)) is starts


@pytest.mark.parametrize(
    ("ref", "publishes"),
    [("refs/heads/main", True), ("main", True), ("refs/changes/01/1/1", False), ("refs/meta/config", False)],
)
def test_refs_whose_move_starts_post(layout, ref, publishes):
    (post,) = [pipeline for pipeline in layout["pipelines"] if pipeline["name"] == "post"]
    assert bool(re.match(post["trigger"]["gerrit"][0]["ref"], ref)) is publishes


def test_a_parameter_function_leaves_what_a_build_has(jobs):
    space: dict = {}
    exec((ROOT / "zuul/functions.py").read_text(), space)
    zuuls = [
        "ZUUL_UUID",
        "ZUUL_PROJECT",
        "ZUUL_PIPELINE",
        "ZUUL_URL",
        "ZUUL_BRANCH",
        "ZUUL_CHANGE",
        "ZUUL_PATCHSET",
        "ZUUL_CHANGES",
        "ZUUL_REF",
    ]
    parameters = dict.fromkeys([*zuuls, "ZUUL_VOTING", "BASE_LOG_PATH", "LOG_PATH", "ZUUL_CHANGE_IDS"], "x")
    parameters["ZUUL_COMMIT"] = None
    space["change_parameters"](None, parameters)
    assert list(parameters) == zuuls
    for job in ("build-bookworm-amd64", "gate-bookworm-amd64"):
        assert set(zuuls) <= {parameter.name for parameter in jobs[job].parameters}
