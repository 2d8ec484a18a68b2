"""Mirrors of released repositories: real rsync daemons, a real sshd, and what their readers see."""

import json
import multiprocessing
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trees
import yaml
from clients import Apt, dnf, download_by_apt, download_by_dnf, pkgci, read_until, run
from mirrors import EXAMPLE, Fleet, example, fleet
from released import built, built_rpm, put, put_rpm
from servers import Line

from pkgci.artifacts import Sync
from pkgci.engines.base import BuildRef
from pkgci.engines.local import LocalEngine
from pkgci.errors import InfrastructureError, RequestError
from pkgci.gaterecord import GatedBuild, GatedChange, GateRecord
from pkgci.locks import locked
from pkgci.mirrors import remote
from pkgci.released.records import Origin, Publication
from pkgci.released.repository import Repository, publish, rollback
from pkgci.where import where


@pytest.fixture
def mirrors(tmp_path: Path, gnupg):
    with fleet(tmp_path, gnupg) as made:
        yield made


def test_what_is_published_reaches_mirrors_by_an_rsync_daemon_and_by_ssh(mirrors: Fleet):
    mirrors.rsyncd("europe")
    mirrors.sshd("america")
    put(mirrors.config, built(mirrors.config, "hello", "1.0-1"), built(mirrors.config, "other", "3"))
    # an operator's own
    (Repository(mirrors.config, "rocket", "bookworm").root / "favicon.ico").write_bytes(b"\x00\xff\xfe")
    first = mirrors.synced()
    index = mirrors.tree("europe") / "bookworm/current/dists/bookworm/InRelease"
    times = [index.stat().st_mtime]
    assert {(one.name, one.before, one.after, one.whole) for one in first.mirrors} == {
        ("europe", 0, 1, True),
        ("america", 0, 1, True),
    }
    put(mirrors.config, built(mirrors.config, "hello", "1.0-2"))
    second = mirrors.synced()
    for one in second.mirrors:
        assert (one.before, one.after, one.whole) == (1, 2, False)
        assert [change.model_dump() for change in one.packages] == [
            {"name": "hello", "architecture": "all", "before": "1.0-1", "after": "1.0-2"}
        ]
        assert one.bytes > 1000
    times.append(index.stat().st_mtime)
    assert [one.bytes for one in mirrors.synced().mirrors] == [0, 0]
    rollback(mirrors.config, "rocket", "bookworm", 1, "broken")
    mirrors.synced()
    times.append(index.stat().st_mtime)
    assert times[0] + 1 <= times[1] <= times[2] - 1, "clients ask for what is newer, by whole seconds"
    assert (mirrors.tree("america") / "bookworm/favicon.ico").read_bytes() == b"\x00\xff\xfe"
    index = next((mirrors.tree("europe") / "bookworm/current/dists/bookworm/main/binary-amd64").glob("*.gz"))
    assert index.stat().st_nlink == 3, "an index file is a hard link to what all generations share"


def test_rpm_repositories_lead_to_the_mirror_by_its_own_mirror_list(mirrors: Fleet, tmp_path):
    mirrors.rsyncd("europe")
    mirrors.sshd("america")
    put_rpm(mirrors.config, built_rpm(mirrors.config, "hello", "1.0"))
    mirrors.synced("debianrpm")
    put_rpm(mirrors.config, built_rpm(mirrors.config, "hello", "2.0"))
    mirrors.synced("debianrpm")
    for name in ("europe", "america"):
        place = mirrors.tree(name) / "debianrpm"
        url = f"{mirrors.settings[name]['url']}debianrpm/"
        assert (place / "mirrorlist").read_text() == f"{url}generations/2/\n"
        assert json.loads((place / "repository.json").read_text())["url"] == url
        dnf(tmp_path / name, (place / "pkgci.repo").read_text(), "install", "hello-2.0-1")
        assert (tmp_path / name / "root/usr/share/hello/text").read_text() == "2.0\n"


def test_three_mirrors_of_different_speed_and_one_that_was_away_for_ten_generations(mirrors: Fleet):
    mirrors.rsyncd("europe")
    away = mirrors.rsyncd("america")
    mirrors.sshd("asia")
    slow = Line(mirrors.rsyncds["europe"].port, delay=0.05)
    mirrors.add("europe", rsync=f"rsync://127.0.0.1:{slow.port}/released/")
    versions = [built(mirrors.config, "hello", str(number)) for number in range(1, 13)]
    put(mirrors.config, versions[0], built(mirrors.config, "other", "1"))
    mirrors.synced()
    away.end()
    for number, version in enumerate(versions[1:11], start=2):
        put(mirrors.config, version)
        if number in (2, 7, 11):
            assert "no pointer was switched, since america: " in mirrors.failed()
            assert mirrors.shown() == {"europe": 1, "america": 1, "asia": 1}
    # who cannot wait for it puts it aside
    mirrors.add("america", aside="its disk is being replaced")
    done = mirrors.sync()
    assert (done.fault, done.notice) == ("", "america is aside: its disk is being replaced")
    assert mirrors.shown() == {"europe": 11, "america": 1, "asia": 11}
    mirrors.add("america", aside="")
    away.start()
    put(mirrors.config, versions[11])
    done = mirrors.synced()
    assert {one.name: (one.before, one.whole) for one in done.mirrors} == {
        "europe": (11, False),
        "america": (1, False),
        "asia": (11, False),
    }
    assert {len(one.packages) for one in done.mirrors} == {1}
    pool = {name: len(list((mirrors.tree(name) / "bookworm/pool/hello").iterdir())) for name in mirrors.settings}
    # what it has never shown is not sent to it
    assert pool["america"] == 2
    slow.end()


def test_a_broken_deb_sync_holds_back_neither_rpm_nor_another_release(mirrors: Fleet):
    mirrors.rsyncd("europe")
    releases = mirrors.config.directory / "releases"
    known = yaml.safe_load((releases / "rocket.yaml").read_text())
    base = known["mirrors"]["europe"]
    other = {"url": f"{base['url']}sled/", "rsync": f"{base['rsync']}sled/"}
    (mirrors.tree("europe") / "sled").mkdir()
    (releases / "sled.yaml").write_text(yaml.safe_dump({**known, "branches": ["sled"], "mirrors": {"europe": other}}))
    mirrors.configured()
    hello = built(mirrors.config, "hello", "1")
    put(mirrors.config, hello)
    put_rpm(mirrors.config, built_rpm(mirrors.config, "hello", "1"))
    sled = Origin(branch="sled", commits=hello.origin.commits)
    publish(mirrors.config, "sled", "bookworm", [Publication(hello.key, sled)])
    (mirrors.tree("europe") / "bookworm/current").mkdir(parents=True)
    with pytest.raises(InfrastructureError, match="rocket/bookworm: no pointer was switched") as raised:
        mirrors.job("deb")
    assert "sled" not in str(raised.value)
    assert (mirrors.tree("europe") / "sled/bookworm/current").is_symlink()
    done = Sync.read(mirrors.place / "artifacts/sync.json")
    assert {one.release: bool(one.fault) for one in done.repositories} == {"rocket": True, "sled": False}
    mirrors.job("rpm")
    assert mirrors.shown("debianrpm") == {"europe": 1}
    (mirrors.tree("europe") / "bookworm/current").rmdir()
    mirrors.job("deb")
    assert mirrors.shown() == {"europe": 1}


def test_who_finds_a_sync_at_work_leaves_it_to_that_one_however_long_it_takes(mirrors: Fleet, monkeypatch):
    mirrors.rsyncd("europe")
    put(mirrors.config, built(mirrors.config, "hello", "1"))
    compare, left = remote.Remote.compare, []

    def slow(self: remote.Remote, tree: Path, size: int) -> None:
        monkeypatch.setattr(remote.Remote, "compare", compare)
        put(mirrors.config, built(mirrors.config, "hello", "2"))
        mirrors.add("america", rsync="rsync://127.0.0.1:1/released/", aside="not there yet")
        left.append(mirrors.job("deb", "rocket").repositories)
        # as the timer, and as a person who wants all gone through
        left.append(mirrors.job("deb").repositories)
        left.append((mirrors.sync(whole=True),))
        compare(self, tree, size)

    monkeypatch.setattr(remote.Remote, "compare", slow)
    done = mirrors.job("deb", "rocket")
    assert [(one.generation, one.fault) for one in done.repositories] == [(1, ""), (2, "")]
    assert [one.whole for one in done.repositories[1].mirrors] == [True]
    assert done.repositories[1].notice == "america is aside: not there yet"
    notices = [one.notice for (one,) in left]
    assert len(notices) == 3
    assert all(re.match(f"left to the sync that is at work: process {os.getpid()} on ", one) for one in notices)
    assert mirrors.shown()["europe"] == 2


def test_a_wish_that_a_killed_sync_had_is_the_next_ones(mirrors: Fleet):
    mirrors.rsyncd("europe")
    put(mirrors.config, built(mirrors.config, "hello", "1"))
    mirrors.synced()
    place = mirrors.state("europe").parent
    with locked(place):
        assert mirrors.sync(whole=True).notice.startswith("left to")
    assert [one.whole for one in mirrors.synced().mirrors] == [True]


def test_former_generations_stay_three_days_and_go_with_what_only_they_have(mirrors: Fleet, monkeypatch):
    monkeypatch.setattr(remote, "SEEN_SECONDS", 0.3)
    mirrors.rsyncd("europe", keep_generations=1)
    tree = mirrors.tree("europe") / "bookworm"
    one, two = built(mirrors.config, "hello", "1"), built(mirrors.config, "hello", "2")
    put(mirrors.config, one, built(mirrors.config, "other", "1"), built(mirrors.config, "third", "1"))
    mirrors.synced()
    put(mirrors.config, two)
    mirrors.synced()
    rollback(mirrors.config, "rocket", "bookworm", 1, "broken")
    mirrors.synced()
    # it never reaches the mirror's readers, but its files are there
    europe = mirrors.rsyncds["europe"]
    put(mirrors.config, built(mirrors.config, "other", "2"))
    mirrors.add("europe", url=mirrors.settings["europe"]["url"].replace("europe", "elsewhere"))
    mirrors.failed()
    mirrors.add("europe", url=mirrors.settings["europe"]["url"].replace("elsewhere", "europe"))
    put(mirrors.config, built(mirrors.config, "other", "3"))
    mirrors.synced()
    put(mirrors.config, built(mirrors.config, "third", "2"))
    mirrors.synced()
    assert mirrors.generations("europe") == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in tree.glob("pool/*/*/*.deb")) == [
        *("hello_1_all.deb", "hello_2_all.deb"),
        *("other_1_all.deb", "other_2_all.deb", "other_3_all.deb", "third_1_all.deb", "third_2_all.deb"),
    ]
    mirrors.age("europe")
    # while it cannot be reached nothing is forgotten
    europe.end()
    assert mirrors.sync().fault.startswith("former generations stay on europe: cannot remove from it: ")
    europe.start()
    mirrors.synced()
    assert mirrors.generations("europe") == [5, 6]
    assert sorted(path.name for path in tree.glob("pool/*/*/*.deb")) == [
        *("hello_1_all.deb", "other_3_all.deb", "third_1_all.deb", "third_2_all.deb"),
    ]
    assert mirrors.unnamed("europe") == set()


# in soak 200
SYNCS = int(os.environ.get("PKGCI_PUBLICATIONS", "20"))


def test_readers_never_see_a_broken_or_stale_mirror_while_syncs_run(mirrors: Fleet, tmp_path):
    mirrors.rsyncd("europe")
    mirrors.sshd("america")
    debs = [built(mirrors.config, "hello", f"1.{number}", files={}) for number in range(SYNCS + 1)]
    rpms = [built_rpm(mirrors.config, "hello", f"1.{number}") for number in range(SYNCS + 1)]
    context = multiprocessing.get_context("fork")
    end, failures, rounds, newest = context.Event(), context.Queue(), context.Value("i", 0), context.Value("i", 0)

    def with_apt(name: str) -> Callable[[], None]:
        sources = (mirrors.tree(name) / "bookworm/pkgci.sources").read_text()
        return lambda: download_by_apt(tmp_path / f"apt-{name}", sources, newest.value)

    def with_dnf(name: str) -> Callable[[], None]:
        repo = (mirrors.tree(name) / "debianrpm/pkgci.repo").read_text()
        return lambda: download_by_dnf(tmp_path / f"dnf-{name}", repo, newest.value)

    def sync(number: int) -> None:
        put(mirrors.config, debs[number])
        put_rpm(mirrors.config, rpms[number])
        mirrors.job("deb")
        mirrors.job("rpm")

    sync(0)
    # we have asked ourselves what is there before there was anything
    asked = len((tmp_path / "nginx/access").read_text().splitlines())
    paused = Apt(tmp_path / "paused", (mirrors.tree("america") / "bookworm/pkgci.sources").read_text())
    paused("update")
    looks = [look(name) for look in (with_apt, with_dnf) for name in mirrors.settings]
    readers = [context.Process(target=read_until, args=(end, look, failures, rounds)) for look in looks]
    for reader in readers:
        reader.start()
    for number in range(1, SYNCS + 1):
        sync(number)
        newest.value = number
    end.set()
    for reader in readers:
        reader.join()
    # who has paused since before the first of them
    paused("download", "hello=1.0")
    assert failures.empty(), failures.get()
    assert rounds.value >= 4
    assert mirrors.faults() + mirrors.faults("debianrpm") == []
    lines = (tmp_path / "nginx/access").read_text().splitlines()
    assert {line.split('"')[2].split()[0] for line in lines[:asked]} == {"200", "404"}
    answered = {line.split('"')[2].split()[0] for line in lines[asked:]}
    assert answered <= {"200", "206", "304"}


def test_a_further_mirror_is_taken_on_by_plain_rsync(mirrors: Fleet, tmp_path):
    europe = mirrors.rsyncd("europe")
    put(mirrors.config, built(mirrors.config, "hello", "1"), built(mirrors.config, "other", "1"))
    put_rpm(mirrors.config, built_rpm(mirrors.config, "hello", "1"))
    further = tmp_path / "mirrors/further"

    def take_on() -> None:
        for codename in ("bookworm", "debianrpm"):
            url = f"http://127.0.0.1:{mirrors.port}/further/{codename}"
            run(EXAMPLE / "take-on.sh", f"{europe.url}{codename}", further / codename, url)

    for number in (1, 2):
        mirrors.synced()
        mirrors.synced("debianrpm")
        take_on()
        for codename in ("bookworm", "debianrpm"):
            assert mirrors.faults_of(further, codename) == []
            assert (further / codename / "current").readlink() == Path(f"generations/{number}")
        put(mirrors.config, built(mirrors.config, "hello", str(number + 1)))
        put_rpm(mirrors.config, built_rpm(mirrors.config, "hello", str(number + 1)))
    base = f"http://127.0.0.1:{mirrors.port}"
    sources = (mirrors.tree("europe") / "bookworm/pkgci.sources").read_text()
    apt = Apt(tmp_path / "apt", sources.replace(f"{base}/europe/", f"{base}/further/"))
    apt("update", "-o", "APT::Update::Error-Mode=any")
    apt("download", "hello=2", "other=1")
    repo = (mirrors.tree("europe") / "debianrpm/pkgci.repo").read_text()
    dnf(tmp_path / "dnf", repo.replace(f"{base}/europe/", f"{base}/further/"), "install", "hello-2-1")


def test_an_operator_sees_where_each_mirror_is(mirrors: Fleet):
    rsyncd = mirrors.rsyncd("europe")
    rsyncd.end()
    said = dict(re.findall("^    ([a-z -]+) = (.*)$", example("rsyncd.conf", rsyncd.tree), re.MULTILINE))
    secrets, password = rsyncd.directory / "secrets", rsyncd.directory / "password"
    for path, content in ((secrets, "pkgci:secret\n"), (password, "secret\n")):
        path.write_text(content)
        path.chmod(0o600)
    here = {"uid": "root", "gid": "root"} if os.getuid() == 0 else {"use chroot": "no"}
    rsyncd.start({**said, **here, "hosts allow": "127.0.0.1", "secrets file": str(secrets)})
    put(mirrors.config, built(mirrors.config, "hello", "1"))
    assert "europe: cannot look at it: ERROR: auth failed on module released" in mirrors.failed()
    mirrors.add("europe", rsync=rsyncd.url.replace("//", "//pkgci@"), password=str(password))
    mirrors.sshd("america")
    mirrors.synced()
    put(mirrors.config, built(mirrors.config, "hello", "2"))
    mirrors.add("asia", url=f"http://127.0.0.1:{mirrors.port}/nowhere/", rsync=rsyncd.url, aside="not there yet")
    code, said = pkgci(mirrors.config, "mirror", "status")
    free = r"[0-9]+\.[0-9] GiB free\n"
    assert code == 3
    assert re.search(
        rf"^rocket/bookworm america: generation 1, [0-9]+ s old, 1 behind, for [0-9]+ s, {free}", said, re.M
    )
    assert re.search(
        rf"^rocket/bookworm europe: generation 1, [0-9]+ s old, 1 behind, for [0-9]+ s, {free}", said, re.M
    )
    assert re.search("^rocket/bookworm asia: unknown: .*/nowhere/ has no .*; aside: not there yet$", said, re.M)
    mirrors.add("asia", aside="")
    del mirrors.settings["asia"]
    mirrors.configured()
    _, said = pkgci(mirrors.config, "repo", "rollback", "rocket/bookworm", "1", "--reason", "broken")
    assert said.endswith("what it takes away; now: pkgci jobs run mirror-sync-deb RELEASE=rocket\n")
    mirrors.synced()
    code, said = pkgci(mirrors.config, "mirror", "status")
    assert (code, said.count("up to date"), said.count("nothing is published yet\n")) == (0, 2, 2)


def test_a_publication_of_a_merged_change_starts_the_sync_and_does_not_fail_with_it(mirrors: Fleet, tmp_path):
    rsyncd = mirrors.rsyncd("europe")
    gerrit, work = tmp_path / "gerrit/tools/hello", tmp_path / "work"
    trees.commit(work, trees.deb("hello"))
    trees.git(work, "clone", "-q", "--bare", work, gerrit)
    settings = mirrors.config.directory / "config.yaml"
    known = yaml.safe_load(settings.read_text())
    known["paths"]["state"] = str(tmp_path / "state")
    settings.write_text(yaml.safe_dump({**known, "gerrit": f"file://{tmp_path}/gerrit/"}))
    mirrors.configured()
    engine = LocalEngine(mirrors.config)
    for number, outcome in ((1, "SUCCESS"), (2, "FAILURE")):
        commit = trees.commit(work, {"text": str(number)})
        trees.git(work, "push", "-q", gerrit, "HEAD:main")
        tree = trees.git(work, "rev-parse", "HEAD^{tree}")
        given = {"ZUUL_PROJECT": "tools/hello", "ZUUL_REFNAME": "main", "ZUUL_NEWREV": commit}
        key = built(mirrors.config, "hello", str(number), tree=tree).key
        published = engine.start("publish-bookworm-amd64", {**given, "BUILD_KEY": key})
        assert engine.wait(published) == "SUCCESS"
        sync = BuildRef("mirror-sync-deb", number)
        assert engine.wait(sync) == outcome, b"".join(engine.log(sync)).decode()
        assert engine.record(sync).parameters["RELEASE"] == "rocket"
        assert mirrors.shown() == {"europe": 1}
        rsyncd.end()
    gated = GatedChange(project="tools/hello", branch="main", number="4711", patchset="1", tree=tree, count=3)
    about = {"package": "hello", "branch": "main", "target": "bookworm-amd64", "key": key}
    build = GatedBuild(**about, source_tree=tree, packaging_tree=tree, changes=(0,))
    record = GateRecord(run="run", pipeline="gate", time=datetime.now(UTC), changes=(gated,), builds=(build,))
    record.write(mirrors.config.data / f"gate/{tree}.json")
    told = list(where(mirrors.config, engine, "4711"))
    assert re.search(r"publish-bookworm-amd64/2: SUCCESS: 1 packages at http", told[0])
    assert told[1].endswith("gate record of 4711,1: 1 builds of it are tested")
    assert told[2:4] == [
        f"merged into main of tools/hello as {commit[:12]}",
        "repository rocket/bookworm: hello 2 since generation 2",
    ]
    assert told[4].startswith("mirror europe of rocket/bookworm: not there, at generation 1: no pointer was switched")
    by_commit = list(where(mirrors.config, engine, commit[:8]))
    assert by_commit == [told[0], *told[3:]]
    with pytest.raises(RequestError, match="no build or gate record that is kept is about 4712,3"):
        list(where(mirrors.config, engine, "4712,3"))
    rsyncd.start()
    # as the timer starts it
    assert engine.wait(engine.start("mirror-sync-deb", {})) == "SUCCESS"
    engine.artifacts(BuildRef("mirror-sync-deb", 3), tmp_path / "archive")
    (done,) = Sync.read(tmp_path / "archive/artifacts/sync.json").repositories
    assert (done.release, done.generation, [one.after for one in done.mirrors]) == ("rocket", 2, [2])
    assert mirrors.shown() == {"europe": 2}
    assert list(where(mirrors.config, engine, "4711"))[-1] == "mirror europe of rocket/bookworm: there, at generation 2"
