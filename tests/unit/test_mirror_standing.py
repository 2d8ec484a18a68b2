"""Where mirrors are, whatever they serve; and which mirrors there are, whatever else is configured."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from pkgci import maintain, mirror
from pkgci.artifacts import Maintained, Maintenance, ReleaseOutcome, Sync
from pkgci.change import Parameters
from pkgci.config import Config
from pkgci.errors import InfrastructureError, RequestError
from pkgci.mirrors import standing
from pkgci.mirrors.jobs import sync_job
from pkgci.mirrors.standing import mirrored, standings
from pkgci.publish import go_on
from pkgci.released.records import Generation
from pkgci.released.repository import Repository
from pkgci.step import StepContext

NOW = datetime(2026, 1, 1, tzinfo=UTC)
URL = "http://127.0.0.1:1/{}/"
RSYNC = "rsync://127.0.0.1:1/{}/"


def generation(number: int) -> Generation:
    about = {"time": NOW, "stamp": number, "kind": "publish", "by": "me"}
    return Generation(number=number, **about, added=(), removed=())


def describe(config: Config, release: str, **mirrors: dict) -> Config:
    """Add a release for one target, with these mirrors."""
    text = yaml.safe_dump({"branches": [release], "targets": ["bookworm-amd64"], "mirrors": mirrors})
    (config.directory / f"releases/{release}.yaml").write_text(text)
    return Config(config.directory)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A release at generation 2, with one mirror."""
    for name in ("targets", "releases"):
        (tmp_path / "etc" / name).mkdir(parents=True)
    paths = {name: str(tmp_path / name) for name in ("data", "cache", "state")}
    released = {"gnupg_home": str(tmp_path), "key": "A" * 40}
    (tmp_path / "etc/config.yaml").write_text(yaml.safe_dump({"paths": paths, "released": released}))
    (tmp_path / "etc/targets/bookworm-amd64.yaml").write_text(
        "format: deb\ncodename: bookworm\narchitecture: amd64\ntag: t\nupstream: {machine: true}\n"
    )
    made = describe(Config(tmp_path / "etc"), "rocket", europe={"url": URL.format(1), "rsync": RSYNC.format(1)})
    root = made.data / "repositories/rocket/bookworm"
    for number in (1, 2):
        generation(number).write(root / f"log/{number}.json")
    (root / "current").symlink_to("generations/2")
    return made


def said(config: Config, monkeypatch, shown: object, free: bytes = b"1073741824\n") -> tuple[str, bool]:
    """Return what is said of the mirror when it serves this, and whether somebody has to look at it."""
    served = json.dumps(shown).encode() if isinstance(shown, dict) else shown
    monkeypatch.setattr(standing, "fetch", lambda url: free if url.endswith("/free") else served)
    (one,) = standings(config)
    return one.line(NOW), one.late


PLACE = "rocket/bookworm europe"
RECORD = generation(2).model_dump(mode="json", by_alias=True)


@pytest.mark.parametrize(
    ("shown", "line", "late"),
    [
        (RECORD, "generation 2, 0 s old, up to date, 1.0 GiB free", False),
        ({**RECORD, "number": 1, "stamp": 1}, "generation 1, 0 s old, 1 behind, for 0 s, 1.0 GiB free", True),
        ({**RECORD, "number": 99}, "shows a generation 99 that rocket/bookworm does not have", True),
        # of a repository that was begun anew
        ({**RECORD, "by": "you"}, "shows a generation 2 that rocket/bookworm does not have", True),
        ({**RECORD, "time": "2026-01-01T00:00:00"}, "unknown: {} is none of ours", True),
        ({**RECORD, "number": -5}, "unknown: {} is none of ours", True),
        (b"\xff", "unknown: {} is none of ours", True),
        (None, "unknown: http://127.0.0.1:1/1/ has no bookworm/current/generation.json", True),
    ],
)
def test_what_a_mirror_shows(config: Config, monkeypatch, shown, line, late):
    expected = line.format("http://127.0.0.1:1/1/bookworm/current/generation.json")
    assert said(config, monkeypatch, shown) == (f"{PLACE}: {expected}", late)


@pytest.mark.parametrize("free", [b"9" * 400, "٣".encode(), b"much", b"", b"-1"])
def test_free_space_that_is_no_number_is_unknown(config: Config, monkeypatch, free: bytes):
    assert said(config, monkeypatch, RECORD, free)[0].endswith("up to date, free space unknown")


def test_a_mirror_of_what_is_not_published_yet_is_not_late(config: Config, monkeypatch):
    (config.data / "repositories/rocket/bookworm/current").unlink()
    assert said(config, monkeypatch, None) == (f"{PLACE}: nothing is published yet", False)
    assert said(config, monkeypatch, RECORD)[1]


def test_one_that_is_aside_is_not_late(config: Config, monkeypatch):
    aside = {"url": URL.format(1), "rsync": RSYNC.format(1), "aside": "it is moved"}
    expected = f"{PLACE}: unknown: http://127.0.0.1:1/1/ has no bookworm/current/generation.json; aside: it is moved"
    assert said(describe(config, "rocket", europe=aside), monkeypatch, None) == (expected, False)


def test_a_release_that_is_not_described_as_it_must_be_holds_no_other_back(config: Config, monkeypatch, tmp_path):
    (config.data / "repositories/rocket/bookworm/current").unlink()
    broken = config.directory / "releases/broken.yaml"
    for text in (
        "branchs: [x]\n",
        "branches: [x]\ntargets: [nosuch]\nmirrors: {m: {url: http://x/, rsync: rsync://x/y/}}\n",
    ):
        broken.write_text(text)
        config = Config(config.directory)
        done = mirror.mirror_sync(config, "deb", "rocket", tmp_path)
        assert [(one.release, one.notice, one.fault) for one in done.repositories] == [
            ("rocket", "nothing is published yet", "")
        ]
        with pytest.raises(InfrastructureError, match="release broken: "):
            mirror.mirror_sync(config, "deb", "", tmp_path)
        assert [(one.release, bool(one.fault)) for one in Sync.read(tmp_path / "sync.json").repositories] == [
            ("broken", True),
            ("rocket", False),
        ]
        with pytest.raises(RequestError):
            mirror.mirror_sync(config, "deb", "broken", tmp_path)
        monkeypatch.setattr(standing, "fetch", lambda _: None)
        assert [(one.repository, one.late) for one in standings(config)] == [
            ("broken", True),
            ("rocket/bookworm", False),
        ]


@pytest.mark.parametrize("same", ["url", "rsync"])
def test_two_mirrors_at_one_place_are_refused_also_of_two_releases(config: Config, same: str):
    other = {"url": URL.format(2), "rsync": RSYNC.format(2)}
    assert len(mirrored(describe(config, "sled", america=other), "rocket")) == 1
    taken = {**other, same: {"url": URL, "rsync": RSYNC}[same].format(1)}
    config = describe(config, "sled", america=taken)
    for release, names in (("rocket", "america of release sled"), ("sled", "europe of release rocket")):
        with pytest.raises(RequestError, match=f"{names} is at the same place"):
            mirrored(config, release)


def test_a_bug_in_one_repository_is_its_fault_and_the_others_are_recorded(
    config: Config, monkeypatch, tmp_path, caplog
):
    config = describe(config, "sled", america={"url": URL.format(2), "rsync": RSYNC.format(2)})
    sync = mirror.sync

    def broken(repository: Repository, *words) -> list:
        if repository.release == "rocket":
            raise ValueError("a bug")
        return sync(repository, *words)

    monkeypatch.setattr(mirror, "sync", broken)
    with pytest.raises(InfrastructureError, match=r"^rocket/bookworm: ValueError: a bug$"):
        mirror.mirror_sync(config, "deb", "", tmp_path)
    assert [one.fault for one in Sync.read(tmp_path / "sync.json").repositories] == ["ValueError: a bug", ""]
    assert "Traceback" in caplog.text


class Context(StepContext):
    """Of a step that starts jobs."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.launched: list[tuple[str, dict]] = []

    def launch(self, job: str, parameters: dict) -> None:
        self.launched.append((job, parameters))


def test_what_is_published_and_what_is_signed_anew_goes_to_the_mirrors(config: Config, tmp_path):
    context = Context(describe(config, "alone"))
    wanted = [("mirror-sync-deb", {"RELEASE": "rocket"})]
    go_on(context, Parameters({}), tmp_path)
    maintain.sync_mirrors(context, tmp_path)
    for repository, result in (("", "absent"), ("alone/bookworm", "published")):
        ReleaseOutcome(repository=repository, result=result, reason="").write(tmp_path / "released.json")
        go_on(context, Parameters({}), tmp_path)
    about = {"generation": 1, "valid_until": None, "cleaned": ()}
    names = {"rocket/bookworm": "", "alone/bookworm": "it is due"}
    for renewed in ("", "it is due"):
        done = [
            Maintained(repository=name, renewed=why, **about)
            for name, why in {**names, "rocket/bookworm": renewed}.items()
        ]
        Maintenance(repositories=tuple(done), key_expires=None, problems=()).write(tmp_path / "maintenance.json")
        maintain.sync_mirrors(context, tmp_path)
        assert context.launched == (wanted if renewed else [])
    ReleaseOutcome(repository="rocket/bookworm", result="published", reason="").write(tmp_path / "released.json")
    go_on(context, Parameters({}), tmp_path)
    assert context.launched == wanted * 2
    assert sync_job(config, "rocket/debianrpm") is None
