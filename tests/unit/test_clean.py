"""`pkgci clean`: what has expired goes, what is referred to, in use or young stays, and the report counts what is freed."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pkgci.artifacts import Repository, RepositoryPackage
from pkgci.clean import clean
from pkgci.config import Config
from pkgci.errors import InfrastructureError
from pkgci.locks import locked
from pkgci.store import Record, Store, describe

NOW = datetime(2030, 1, 1, tzinfo=UTC)
KEY = "a" * 64


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "etc").mkdir()
    paths = f"{{data: {tmp_path / 'data'}, cache: {tmp_path / 'cache'}}}"
    (tmp_path / "etc" / "config.yaml").write_text(f"store_days: 30\npaths: {paths}\n")
    return Config(tmp_path / "etc")


@pytest.fixture
def store(config: Config, tmp_path: Path) -> Store:
    """A store with one build of one file of 1000 bytes, last used 31 days ago."""
    file = tmp_path / "hello.deb"
    file.write_bytes(b"x" * 1000)
    store = Store(config)
    record = Record(
        key=KEY,
        algorithm=1,
        package="hello",
        version="1",
        target="t",
        format="deb",
        packages=(),
        files=(describe(file),),
    )
    with store.claim(KEY, wait=0) as lease:
        store.deliver(lease, record, [file])
    age(store, 31)
    return store


def age(store: Store, days: int) -> None:
    used = (NOW - timedelta(days=days)).timestamp()
    os.utime(store.place(KEY), (used, used))


def repository(config: Config, store: Store, expires: datetime) -> Path:
    """Make a repository that refers to the build of the store and links to its file."""
    directory = config.data / "repositories" / "test" / "run" / "t"
    directory.mkdir(parents=True)
    os.link(store.place(KEY) / "hello.deb", directory / "hello.deb")
    package = RepositoryPackage(
        name="hello", version="1", architecture="all", file="hello.deb", sha256="", source="hello", key=KEY
    )
    Repository(
        url="http://127.0.0.1/",
        format="deb",
        codename="c",
        target="t",
        packages=(package,),
        signing_key="",
        expires=expires,
    ).write(directory / "repository.json")
    return directory


def size(*paths: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in paths)


def test_without_remove_nothing_goes_and_the_report_says_what_would(config, store):
    directory = repository(config, store, NOW - timedelta(seconds=1))
    freed = size(directory / "repository.json", directory / "hello.deb", store.place(KEY) / "entry.json")
    report = clean(config, remove=False, now=NOW)
    assert (report.repositories, report.builds, report.freed) == ((directory,), (KEY,), freed)
    assert directory.exists()
    assert store.place(KEY).exists()
    assert report.lines()[0] == f"would remove repository {directory}"
    assert report.lines()[-1].endswith("nothing is removed without --yes")


def test_an_expired_repository_and_the_build_that_only_it_referred_to_go(config, store):
    directory = repository(config, store, NOW - timedelta(seconds=1))
    foreseen = clean(config, remove=False, now=NOW)
    report = clean(config, remove=True, now=NOW)
    assert not directory.parent.exists()
    assert not store.place(KEY).exists()
    assert report.freed == foreseen.freed
    assert list((config.data / "store" / "new").iterdir()) == []


def test_a_repository_that_has_not_expired_stays_with_its_build(config, store):
    directory = repository(config, store, NOW + timedelta(seconds=1))
    report = clean(config, remove=True, now=NOW)
    assert (report.repositories, report.builds, report.freed) == ((), (), 0)
    assert directory.exists()
    assert store.place(KEY).exists()


def test_a_build_used_within_the_minimum_age_stays_and_its_file_counts_as_not_freed(config, store):
    age(store, 29)
    directory = repository(config, store, NOW - timedelta(seconds=1))
    freed = size(directory / "repository.json")
    report = clean(config, remove=True, now=NOW)
    assert (report.repositories, report.builds, report.freed) == ((directory,), (), freed)
    assert store.lookup(KEY)


def test_a_repository_that_is_being_written_stays(config, store):
    directory = repository(config, store, NOW - timedelta(seconds=1))
    with locked(directory.parent):
        report = clean(config, remove=True, now=NOW)
    assert (report.repositories, report.builds) == ((), ())
    assert directory.exists()


def test_a_build_that_is_being_read_stays(config, store):
    with locked(store.place(KEY), shared=True):
        assert clean(config, remove=True, now=NOW).builds == ()
    assert store.place(KEY).exists()


def test_what_killed_processes_left_goes(config):
    unfinished = config.data / "repositories" / "test" / "run" / ".t.new"
    unfinished.mkdir(parents=True)
    left = config.data / "store" / "new" / ("b" * 64)
    left.mkdir(parents=True)
    clean(config, remove=True, now=NOW)
    assert not unfinished.exists()
    assert not left.exists()


def test_a_repository_of_which_nothing_is_known_stops_the_cleaning(config, store):
    directory = repository(config, store, NOW - timedelta(seconds=1))
    (directory / "repository.json").write_text("{}")
    with pytest.raises(InfrastructureError, match="cannot read"):
        clean(config, remove=True, now=NOW)
    assert store.place(KEY).exists()


def test_what_lies_unused_in_the_cache_goes_and_what_is_young_stays(config):
    for name, days in (("roots/old", 31), ("roots/young", 29), ("packages/old", 31), ("git/old", 31)):
        path = config.cache / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("roots"):
            path.mkdir()
            (path / "root.tar").write_text("x" * 100)
        else:
            path.write_text("x" * 10)
        used = (NOW - timedelta(days=days)).timestamp()
        os.utime(path, (used, used))
    old = size(config.cache / "roots" / "old" / "root.tar", config.cache / "packages" / "old")
    assert clean(config, remove=False, now=NOW).freed == old
    report = clean(config, remove=True, now=NOW)
    assert [path.relative_to(config.cache).as_posix() for path in report.cached] == ["packages/old", "roots/old"]
    left = sorted(path.relative_to(config.cache).as_posix() for path in config.cache.glob("*/*"))
    assert left == ["git/old", "roots/young"]


def test_what_a_killed_signing_left_goes(config):
    left = config.data / "signed" / "KEY" / "ab" / ".abcd.4711"
    left.parent.mkdir(parents=True)
    for days, there in ((29, True), (31, False)):
        left.write_bytes(b"x")
        os.utime(left, ((NOW - timedelta(days=days)).timestamp(),) * 2)
        clean(config, remove=True, now=NOW)
        assert left.exists() is there
