"""What is merged and not released is published, some at once, whatever becomes of the others."""

from collections.abc import Callable
from pathlib import Path

import pytest
from local_jobs import end_all, make_engine

from pkgci import step
from pkgci.artifacts import Result, Unpublished, UnpublishedBuild
from pkgci.change import Parameters
from pkgci.republish import republish

JOBS = """
- defaults:
    name: global
    concurrent: true
    quiet-period: 0
    properties:
      - build-discarder: {{days-to-keep: 30}}
    wrappers:
      - timeout: {{timeout: 1, fail: true}}
      - timestamps
    publishers:
      - archive: {{artifacts: artifacts/**, allow-empty: true, default-excludes: false}}

- job:
    name: unpublished
    node: build
    parameters:
      - string: {{name: PARENT}}
      - string: {{name: CORRELATION}}
      - string: {{name: PACKAGE}}
    builders:
      - shell: mkdir artifacts; cp '{found}' artifacts/unpublished.json

- job:
    name: build-deb
    node: control
    parameters:
      - string: {{name: PARENT}}
      - string: {{name: CORRELATION}}
      - string: {{name: ZUUL_PROJECT}}
      - string: {{name: ZUUL_REFNAME}}
      - string: {{name: ZUUL_NEWREV}}
      - string: {{name: ZUUL_PIPELINE}}
    builders:
      - shell: |
          echo "$ZUUL_PROJECT $ZUUL_REFNAME $ZUUL_NEWREV $ZUUL_PIPELINE" >>'{found}.built'
          test "$ZUUL_PROJECT" != tools/bad
"""


def missing(name: str, hold: str = "") -> UnpublishedBuild:
    return UnpublishedBuild(
        package=name,
        project=f"tools/{name}",
        branch="main",
        commit="1" * 40,
        target="deb",
        repository="rocket/bookworm",
        released="1",
        hold=hold,
    )


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Result, list[str]]]:
    """Run the job for what was found; return its result, and what was built."""
    found = tmp_path / "found.json"
    engine = make_engine(tmp_path, JOBS.format(found=found), executors=2)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in ("PARENT", "JOB_NAME", "BUILD_NUMBER", "PKGCI_ENGINE"):
        monkeypatch.delenv(name, raising=False)

    def running(*builds: UnpublishedBuild, problems: tuple[str, ...] = ()) -> tuple[Result, list[str]]:
        Unpublished(missing=builds, problems=problems).write(found)
        parameters = Parameters.read({"ZUUL_PIPELINE": "periodic"})
        step.run("republish", lambda context: republish(context, parameters), engine)
        built = Path(f"{found}.built")
        lines = sorted(built.read_text().splitlines()) if built.exists() else []
        return Result.read(here / "artifacts" / "result.json"), lines

    yield running
    end_all(engine)


def test_what_is_missing_is_published_as_a_merge_event_would_have_it(run):
    result, built = run(*(missing(f"p{number}") for number in range(6)))
    assert (result.exit, result.reason) == (0, "6 of 6 missing builds published")
    assert built == [f"tools/p{number} main {'1' * 40} periodic" for number in range(6)]


def test_what_is_on_hold_is_named_and_left_alone(run):
    result, built = run(missing("good"), missing("held", hold="eats disks"))
    expected = "1 of 1 missing builds published; held of rocket/bookworm is on hold: eats disks"
    assert (result.exit, result.reason) == (0, expected)
    assert built == [f"tools/good main {'1' * 40} periodic"]


def test_one_that_fails_keeps_none_of_the_others_back(run):
    result, built = run(missing("bad"), missing("good"))
    assert len(built) == 2
    assert result.exit == 3
    expected = "1 of 2 missing builds published; first failure: build-deb/1 ended without a result; see its log"
    assert result.reason == expected


def test_a_package_that_cannot_be_compared_is_an_infrastructure_failure_after_the_others_are_published(run):
    result, built = run(missing("good"), problems=("lost: cannot list the branches",))
    assert len(built) == 1
    assert (result.exit, result.reason) == (3, "1 of 1 missing builds published; lost: cannot list the branches")
