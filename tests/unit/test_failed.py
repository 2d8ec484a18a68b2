"""Roots of failed builds: how long and how many are kept, and which one a person means."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pkgci import failed
from pkgci.clean import clean
from pkgci.config import Config, Limits
from pkgci.engines.local import LocalEngine
from pkgci.errors import RequestError
from pkgci.locks import locked
from pkgci.shell import find

NOW = datetime.now(UTC)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "etc").mkdir()
    paths = f"{{data: {tmp_path / 'data'}, cache: {tmp_path / 'cache'}, state: {tmp_path / 'state'}}}"
    (tmp_path / "etc" / "config.yaml").write_text(f"failed_root_days: 3\nfailed_roots_mib: 2\npaths: {paths}\n")
    return Config(tmp_path / "etc")


def leave(config: Config, job: str, number: int, kib: int = 100, hours: float = 0) -> None:
    """Keep the root of a build that failed some hours ago."""
    with failed.roots(config).room(NOW) as room:
        if kib:
            (room / failed.ROOT).write_bytes(os.urandom(kib << 10))
        build = failed.FailedBuild(
            job=job,
            number=number,
            parent=f"build-{number}/{number}",
            target=job.removeprefix("compile-"),
            package="hello",
            version="1",
            reason="hello: the build failed",
            ended=NOW - timedelta(hours=hours),
            limits=Limits(seconds=7),
        )
        failed.keep(config, room, build)


def names(config: Config) -> list[str]:
    return [str(build) for _, build in failed.roots(config).all()]


def test_a_root_is_kept_with_what_is_known_of_its_build(config):
    leave(config, "compile-a", 1)
    [(directory, build)] = failed.roots(config).all()
    assert (directory / failed.ROOT).stat().st_size == 100 << 10
    assert (str(build), build.limits.seconds) == ("compile-a/1", 7)


def test_a_build_without_a_root_or_with_one_that_is_too_large_leaves_nothing(config):
    leave(config, "compile-a", 1, kib=0)
    leave(config, "compile-a", 2, kib=3000)
    assert list((config.state / "failed").iterdir()) == []


def test_the_oldest_go_when_all_together_are_too_large(config):
    for number in (1, 2, 3):
        leave(config, "compile-a", number, kib=900, hours=3 - number)
    assert names(config) == ["compile-a/3", "compile-a/2"]


def test_clean_removes_what_is_too_old(config):
    leave(config, "compile-a", 1, hours=1)
    leave(config, "compile-a", 2)
    later = NOW + timedelta(days=3)
    assert clean(config, remove=False, now=later).failed == (config.state / "failed" / "compile-a-1",)
    assert names(config) == ["compile-a/2", "compile-a/1"]
    report = clean(config, remove=True, now=later)
    assert names(config) == ["compile-a/2"]
    assert report.freed > 100 << 10


def test_a_root_in_use_stays_and_what_a_killed_build_left_goes(config):
    leave(config, "compile-a", 1, hours=80)
    leave(config, "compile-a", 2, hours=80)
    used, killed = (config.state / "failed" / name for name in ("compile-a-2", ".killed"))
    killed.mkdir()
    with locked(used, shared=True), failed.roots(config).room(NOW) as room:
        assert room.exists()
        assert not killed.exists()
    assert names(config) == ["compile-a/2"]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("", "compile-b/2"),
        ("compile-a/1", "compile-a/1"),
        ("build-1/1", "compile-a/1"),
        ("2", "compile-b/2"),
        ("compile-a", "compile-a/1"),
        ("a", "compile-a/1"),
        ("hello", "compile-b/2"),
    ],
)
def test_a_build_is_found_by_what_a_person_would_type(config, wanted, found):
    leave(config, "compile-a", 1, hours=1)
    leave(config, "compile-b", 2)
    assert str(find(config, LocalEngine(config), wanted)[1]) == found


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("", r"no failed build has left a root; .*; roots are kept of: none"),
        ("7", "no root is kept of a build '7'; roots are kept of: none"),
        ("a/b", "names no build"),
        ("compile-x/7", "there is no build compile-x/7"),
    ],
)
def test_when_there_is_none_it_says_why(config, wanted, said):
    with pytest.raises(RequestError, match=said):
        find(config, LocalEngine(config), wanted)


def test_what_is_kept_is_listed_with_its_package(config):
    leave(config, "compile-a", 1, hours=1)
    with pytest.raises(RequestError, match=r"no root is kept of a build '7'; roots are kept of: compile-a/1 \(hello\)"):
        find(config, LocalEngine(config), "7")


def test_a_number_that_several_builds_have_is_refused_with_their_names(config):
    leave(config, "compile-a", 1, hours=1)
    leave(config, "compile-b", 1)
    with pytest.raises(RequestError, match="several builds have the number 1: compile-b/1, compile-a/1"):
        find(config, LocalEngine(config), "1")
