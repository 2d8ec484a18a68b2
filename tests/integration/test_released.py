"""Released repositories, as real apt and dnf see them: publication, readers, and what must hold however a run ends."""

import hashlib
import multiprocessing
import os
import re
import shutil
import tempfile
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

import packages
import pytest
import trees
from clients import Apt, dnf, download_by_apt, download_by_dnf, pkgci, read_until, run
from debian.deb822 import Release
from released import ORIGIN, built, built_rpm, configure, faults, leftovers, put, put_rpm, refused, root, state
from servers import nginx

from pkgci import repository, server
from pkgci.artifacts import PackageContents
from pkgci.change import Change
from pkgci.config import Config
from pkgci.errors import InfrastructureError, PackageError, RequestError
from pkgci.keys import SigningKey
from pkgci.publish import publish as publish_job
from pkgci.released import checks, closure, remote
from pkgci.released.audit import audit
from pkgci.released.checks import HeldError, OlderError
from pkgci.released.records import Commit, Origin, Provenance, Publication
from pkgci.released.repository import Repository, publish, rollback, try_to_publish
from pkgci.store import Store


@pytest.fixture
def config(tmp_path: Path, gnupg) -> Config:
    return configure(tmp_path, gnupg)


def test_apt_installs_what_is_published_and_then_the_next_version(config, tmp_path):
    first = put(config, built(config, "hello", "1.0-1"), built(config, "other", "3"))
    apt = Apt(tmp_path / "apt", (root(config) / "pkgci.sources").read_text())
    with server.serve(config):
        update = apt("update", "-o", "Debug::Acquire::http=true", "-o", "APT::Update::Error-Mode=any")
        apt("download", "hello=1.0-1", "other=3")
        apt("source", "--download-only", "hello")
        second = put(config, built(config, "hello", "1.0-2"))
        apt("update", "-o", "APT::Update::Error-Mode=any")
        apt("download", "hello")
    assert "/by-hash/SHA256/" in update.stdout + update.stderr
    assert (first.number, second.number) == (1, 2)
    assert [build.version for build in second.removed] == ["1.0-1"]
    assert second.stamp > first.stamp
    names = {path.name for path in (tmp_path / "apt").iterdir()}
    assert {"hello_1.0-1_all.deb", "hello_1.0-2_all.deb", "other_3_all.deb", "hello_1.0-1.dsc"} <= names


def test_dnf_installs_what_is_published_and_then_the_next_version_with_all_signatures_checked(config, tmp_path):
    put_rpm(config, built_rpm(config, "hello", "1.0"), built_rpm(config, "other", "3"))
    repo = (root(config, "debianrpm") / "pkgci.repo").read_text()
    assert "gpgcheck=1\n" in repo
    assert "repo_gpgcheck=1\n" in repo
    with server.serve(config):
        dnf(tmp_path / "dnf", repo, "install", "hello-1.0-1", "other")
        put_rpm(config, built_rpm(config, "hello", "1.0", "2"))
        upgraded = dnf(tmp_path / "dnf", repo, "--refresh", "upgrade").stdout
        plain = repo.replace("mirrorlist=", "baseurl=").replace("/mirrorlist\n", "/\n")
        listed = dnf(
            tmp_path / "dnf2", plain, "repoquery", "--qf", "%{name}-%{version}-%{release}.%{arch}"
        ).stdout.split()
    assert (tmp_path / "dnf/root/usr/share/hello/text").read_text() == "1.0\n"
    assert "hello-1.0-2.noarch" in upgraded
    assert set(listed) == {"hello-1.0-2.noarch", "hello-1.0-2.src", "other-3-1.noarch", "other-3-1.src"}
    assert not faults(config, "debianrpm")


def test_a_lower_version_is_refused_by_the_formats_own_comparison(config):
    put(config, built(config, "hello", "1.0-10"))
    refused(config, OlderError, "hello 1.0-9 is lower than 1.0-10", built(config, "hello", "1.0-9"))
    refused(config, OlderError, "hello 1.0~rc1-10 is lower", built(config, "hello", "1.0~rc1-10"))
    put_rpm(config, built_rpm(config, "hello", "1.10"))
    older = built_rpm(config, "hello", "1.9")
    refused(config, OlderError, "hello 1.9-1 is lower than 1.10-1", older, codename="debianrpm")


def test_a_lower_version_of_a_binary_package_from_another_source_is_refused(config, tmp_path):
    put(config, built(config, "hello", "2"))
    stolen = packages.deb(tmp_path, "hello", "1", source="thief")
    entry = packages.deliver_debs(config, tmp_path, "thief", "1", [stolen])
    message = r"hello 1 \(all\) of thief is lower than 2, which rocket/bookworm has from hello"
    refused(config, OlderError, message, Publication(entry.record.key, ORIGIN))


def test_the_same_version_with_another_content_is_refused_also_when_it_is_not_released_any_more(config):
    put(config, built(config, "hello", "1"))
    other = built(config, "hello", "1", files={"/usr/share/hello/text": b"other"})
    refused(config, PackageError, r"hello 1 \(all\) of hello has another content", other)
    put(config, built(config, "hello", "2"))
    rollback(config, "rocket", "bookworm", 1, "broken")
    Repository(config, "rocket", "bookworm").unhold("hello")
    changed = built(config, "hello", "2", files={"/usr/share/hello/text": b"other"})
    refused(config, PackageError, r"hello 2 \(all\) of hello has another content", changed)


def test_what_the_store_did_not_build_from_a_branch_of_the_release_is_refused(config):
    put(config, built(config, "other", "1"))
    hello = built(config, "hello", "1")
    foreign = ORIGIN.model_copy(update={"branch": "wild"})
    moved = Origin(branch="main", commits=(Commit(project="tools/hello", commit="c" * 40, tree="8" * 40),))
    refused(config, RequestError, "is not in the store", Publication("0" * 64, ORIGIN))
    refused(config, RequestError, "is from branch wild, which release rocket", Publication(hello.key, foreign))
    refused(config, RequestError, "is built from the trees 7{40}, not from what", Publication(hello.key, moved))
    refused(config, RequestError, "hello for bookworm-amd64 comes twice", hello, built(config, "hello", "2"))
    rpm = built_rpm(config, "hello", "1")
    refused(config, RequestError, "hello 1-1 is built for debianrpm-amd64, which rocket/bookworm", rpm)


def test_a_file_that_differs_from_its_record_is_refused(config):
    put(config, built(config, "other", "1"))
    hello = built(config, "hello", "1")
    path = next(Store(config).place(hello.key).glob("*.deb"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    refused(config, InfrastructureError, "is damaged in the store; build it again", hello)


def test_an_operator_sees_the_history_takes_a_version_back_and_audits(config):
    put(config, built(config, "hello", "1"), built(config, "other", "1"))
    put(config, built(config, "hello", "2"))
    code, said = pkgci(config, "repo", "rollback", "rocket/bookworm", "1", "hello", "--reason", "it eats disks")
    assert (code, said) == (0, "generation 3 of rocket/bookworm\n  hello (bookworm-amd64): 2 -> 1; on hold\n")
    code, said = pkgci(config, "repo", "log", "rocket/bookworm", "-n", "2")
    assert code == 0
    assert said.startswith("on hold: hello, since generation 3: it eats disks\n     3  ")
    assert "  rollback  by process " in said
    assert said.endswith("        hello (bookworm-amd64): 1 -> 2\n")
    code, said = pkgci(config, "repo", "diff", "rocket/bookworm", "1", "2")
    assert (code, said) == (0, "hello (bookworm-amd64): 1 -> 2\n")
    assert pkgci(config, "repo", "diff", "rocket/bookworm", "1", "3") == (0, "")
    code, said = pkgci(config, "repo", "diff", "rocket/bookworm", "1", "4")
    assert (code, said.count("\n")) == (2, 1)
    assert "rocket/bookworm has no generation 4" in said
    code, said = pkgci(config, "repo", "unhold", "rocket/bookworm", "hello")
    assert (code, said) == (0, "hello was on hold since generation 3: it eats disks\n")
    assert pkgci(config, "repo", "unhold", "rocket/bookworm", "../hello")[0] == 2
    assert pkgci(config, "repo", "audit", "rocket/bookworm", "--all", "--quick") == (0, "0 faults\n")
    next((root(config) / "pool/other").glob("*/provenance.json")).unlink()
    code, said = pkgci(config, "repo", "audit", "rocket/bookworm", "--quick")
    assert code == 3
    assert "other_1_all.deb: without an origin: no provenance.json beside it that can be read\n" in said
    release = config.directory / "releases/rocket.yaml"
    release.write_text(release.read_text().replace("main", "stable"))
    said = pkgci(config, "repo", "audit", "rocket/bookworm", "--quick")[1]
    assert "hello_1_all.deb: from branch 'main', which release rocket does not claim\n" in said
    assert pkgci(config, "repo", "log", "rocket/none")[0] == 2
    assert pkgci(config, "repo", "log", "rocket")[0] == 2


FILE = {"/usr/bin/tool": b"#!/bin/sh\n"}


def test_files_that_conflict_with_another_package_of_the_release_are_refused_and_found(config, monkeypatch):
    put(config, built(config, "hello", "1", files=FILE))
    clash = built(config, "clash", "1", files=FILE)
    refused(config, PackageError, "clash 1 has the file /usr/bin/tool, which hello 1 of rocket/bookworm has too", clash)
    with monkeypatch.context() as unchecked:
        unchecked.setattr(checks, "_conflicts", lambda *_: None)
        put(config, built(config, "wrong", "1", files=FILE))
    (found,) = faults(config)[:1]
    assert "wrong 1 has the file /usr/bin/tool, which hello 1 of rocket/bookworm has too" in found
    both = [built(config, name, "1", files={"/usr/bin/two": b""}) for name in ("a", "b")]
    refused(config, PackageError, "has the file /usr/bin/two", *both)


def test_a_package_of_which_not_all_files_are_known_is_refused(config, tmp_path):
    put(config, built(config, "other", "1"))
    deb = packages.deb(tmp_path, "hello", "1", files={"/usr/share/a": b"", "/usr/share/b": b""})
    known = deb.with_suffix(".contents")
    said = PackageContents.model_validate_json(known.read_bytes())
    known.write_text(said.model_copy(update={"files": said.files[:1], "more_files": 1}).model_dump_json())
    entry = packages.deliver_debs(config, tmp_path, "hello", "1", [deb])
    refused(config, PackageError, "hello 1 has too many files: 1 are not known", Publication(entry.record.key, ORIGIN))


def test_files_do_not_conflict_between_packages_that_say_so_or_once_the_file_has_moved(config):
    put(config, built(config, "hello", "1", files=FILE))
    put(config, built(config, "clash", "1", files=FILE, fields={"Conflicts": "hello"}))
    put(config, built(config, "replaces", "1", files=FILE, fields={"Replaces": "clash, hello (<< 2)"}))
    refused(config, PackageError, "replaces 1", built(config, "hello", "2", files=FILE))
    moved = [built(config, "hello", "2"), built(config, "clash", "2"), built(config, "replaces", "2", files=FILE)]
    assert put(config, *moved).number == 4


def test_rpm_packages_may_share_a_file_but_not_its_place(config):
    def at(name: str, content: str) -> Publication:
        with tempfile.TemporaryDirectory() as scratch:
            install = f"%install\nmkdir -p %{{{{buildroot}}}}/etc; echo {content} > %{{{{buildroot}}}}/etc/shared\n"
            spec = packages.SPEC.replace("%install\n", install)
            rpms = packages.rpmbuilt(Path(scratch), name, "1", spec=spec + "/etc/shared\n")
            return Publication(packages.deliver_rpms(config, name, "1-1", rpms).record.key, ORIGIN)

    put_rpm(config, at("one", "same"))
    put_rpm(config, at("two", "same"))
    refused(
        config, PackageError, "three .* has the file /etc/shared, which", at("three", "other"), codename="debianrpm"
    )


def test_what_is_released_already_changes_nothing_and_what_comes_late_does_not_come_back(config):
    one, two = built(config, "hello", "1"), built(config, "hello", "2")
    put(config, two)
    before = state(config)
    assert put(config, two).number == 1
    refused(config, OlderError, "hello 1 is lower than 2", one)
    assert state(config) == before


def test_binaries_that_a_source_no_longer_builds_go_with_its_next_publication(config, tmp_path):
    debs = [packages.deb(tmp_path, name, "1", source="hello") for name in ("hello", "hello-doc")]
    entry = packages.deliver_debs(config, tmp_path / "one", "hello", "1", debs)
    put(config, Publication(entry.record.key, ORIGIN))
    put(config, built(config, "hello", "2"))
    apt = Apt(tmp_path / "apt", (root(config) / "pkgci.sources").read_text())
    with server.serve(config):
        apt("update")
        gone = apt("download", "hello-doc", check=False)
        apt("download", "hello=2")
    assert "Unable to locate package hello-doc" in gone.stderr


def test_a_rollback_is_a_new_generation_and_a_hold_that_publication_respects(config, tmp_path):
    put(config, built(config, "hello", "1"), built(config, "other", "1"))
    put(config, built(config, "hello", "2"))
    third = put(config, built(config, "other", "2"))
    back = rollback(config, "rocket", "bookworm", 1, "it eats disks", ["hello"])
    assert (back.number, back.kind, back.reason) == (4, "rollback", "it eats disks")
    assert back.stamp > third.stamp
    apt = Apt(tmp_path / "apt", (root(config) / "pkgci.sources").read_text())
    with server.serve(config):
        apt("update")
        apt("download", "hello=1", "other=2")
    three = built(config, "hello", "3")
    message = (
        r"hello is on hold since generation 4 of rocket/bookworm: it eats disks; `pkgci repo unhold rocket/bookworm"
    )
    refused(config, RequestError, message, three)
    put(config, built(config, "other", "3"))
    Repository(config, "rocket", "bookworm").unhold("hello")
    assert put(config, three).number == 6
    assert not faults(config)


def test_a_lost_or_damaged_index_is_made_again_and_gives_the_same_metadata(config):
    put(config, *(built(config, f"p{number}", "1") for number in range(12)))
    put(config, built(config, "p3", "2"))
    rollback(config, "rocket", "bookworm", 1, "why not")
    repository = Repository(config, "rocket", "bookworm")
    index = repository.place / "index.sqlite"
    lists = {}
    for damage in (lambda: None, index.unlink, lambda: index.write_bytes(b"no database" * 1000)):
        damage()
        with repository.opened():
            lists[damage] = [
                repository.index.get(f"list {name}") for name in repository.form.lists(repository._at(1, None, 0))
            ]
            assert repository.index.live_at(3) == repository.index.live_at(1) != repository.index.live_at(2)
    first, *others = lists.values()
    assert all(first)
    assert all(other == first for other in others)
    Repository(config, "rocket", "bookworm").unhold("p3")
    assert put(config, built(config, "p3", "3")).number == 4
    assert not faults(config)


def test_former_generations_go_once_no_reader_can_be_at_them_with_all_that_only_they_had(gnupg, tmp_path, monkeypatch):
    config = configure(tmp_path, gnupg, keep_generations=2, keep_hours=72)
    for version in range(1, 6):
        put(config, built(config, "hello", str(version)))
    assert len(list((root(config) / "generations").iterdir())) == 5
    monkeypatch.setattr("pkgci.released.repository.time.time", lambda: time.time_ns() / 1e9 + 73 * 3600)
    put(config, built(config, "hello", "6"))
    assert sorted(path.name for path in (root(config) / "generations").iterdir()) == ["4", "5", "6"]
    versions = sorted(path.name for path in (root(config) / "pool").glob("hello/*/*.deb"))
    assert versions == [f"hello_{version}_all.deb" for version in (4, 5, 6)]
    assert len(list((root(config) / "by-hash/SHA256").iterdir())) == 3 * 2 * 2
    assert not faults(config)
    with pytest.raises(RequestError, match="generation 2 of rocket/bookworm is not kept any more"):
        rollback(config, "rocket", "bookworm", 2, "why")
    assert [path.name for path in sorted((root(config) / "log").iterdir())] == [
        f"{number}.json" for number in range(1, 7)
    ]


def _hold_lock(config: Config, ready, end) -> None:
    with Repository(config, "rocket", "bookworm").opened():
        ready.set()
        end.wait()


def test_who_waits_for_the_lock_says_who_holds_it_and_gives_up_with_exit_3(gnupg, tmp_path):
    config = configure(tmp_path, gnupg, wait_seconds=0)
    publication = built(config, "hello", "1")
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    holder = context.Process(target=_hold_lock, args=(config, ready, end))
    holder.start()
    ready.wait(30)
    with pytest.raises(
        InfrastructureError, match=f"repository rocket/bookworm is still held by process {holder.pid} on"
    ):
        put(config, publication)
    end.set()
    holder.join()
    assert put(config, publication).number == 1


def _publish_each(config: Config, publications: list[Publication]) -> None:
    for publication in publications:
        put(config, publication)


def test_twenty_processes_publish_a_hundred_packages_and_all_are_there_in_order(config):
    publications = [built(config, f"package-{number}", "1") for number in range(100)]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_publish_each, args=(config, publications[start::20])) for start in range(20)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 20
    repository = Repository(config, "rocket", "bookworm")
    generations = [repository.generation(number) for number in range(1, 101)]
    assert repository.current() == generations[-1]
    assert all(later.stamp > earlier.stamp for earlier, later in pairwise(generations))
    assert {build.source for one in generations for build in one.added} == {f"package-{one}" for one in range(100)}
    assert len(list(repository.form.read(repository.root / "current", repository.key))) == 300
    assert not list(audit(repository))


def test_a_merged_change_is_published_to_the_released_repository_of_its_branch(gnupg, tmp_path):
    gerrit, work = tmp_path / "gerrit/tools/hello", tmp_path / "work"
    commit = trees.commit(work, trees.deb("hello"))
    trees.git(work, "clone", "-q", "--bare", work, gerrit)
    config = configure(tmp_path, gnupg, top={"gerrit": f"file://{tmp_path}/gerrit/"})
    tree = trees.git(work, "rev-parse", "HEAD^{tree}")
    one = built(config, "hello", "1", tree=tree)
    change = Change(project="tools/hello", branch="main", commit=commit)
    for _ in range(2):
        made = publish_job(config, "bookworm-amd64", change, one.key, "run-1", tmp_path / "artifacts")
        assert made.url == f"{config.settings.url}rocket/bookworm/"
        assert (root(config) / made.packages[0].file).is_file()
        assert Repository(config, "rocket", "bookworm").current().number == 1
    said = Provenance.read((root(config) / made.packages[0].file).with_name("provenance.json"))
    sources = said.predicate["buildDefinition"]["resolvedDependencies"]
    assert sources == [{"uri": "git+tools/hello@main", "digest": {"gitCommit": commit, "gitTree": tree}}]
    with server.serve(config):
        assert repository.read(config, "bookworm-amd64", [f"{made.url}repository.json"])[0].codename == "bookworm"
    other = built(config, "hello", "2")
    with pytest.raises(RequestError, match="hello 2 is not built from what main of tools/hello has or had"):
        publish_job(config, "bookworm-amd64", change, other.key, "run-1", tmp_path / "artifacts")


def test_what_is_released_of_a_package_is_read_by_the_url_of_its_repository(config):
    put(config, built(config, "hello", "1"), built(config, "other", "3"))
    put_rpm(config, built_rpm(config, "hello", "2"), built_rpm(config, "other", "3"))
    with server.serve(config):
        for target, version in (("bookworm-amd64", "1"), ("debianrpm-amd64", "2-1")):
            (url,) = repository.of_release(config, target, "rocket")
            (record,) = repository.read(config, target, [url])
            assert (record.released, record.packages) == (True, ())
            (package,) = remote.listed(record, "amd64", {"hello", "none"}).packages
            assert (package.name, package.version, package.source) == ("hello", version, "hello")
            assert remote.record(record, package).key == package.key
            assert package.file.startswith(f"pool/hello/{package.key[:16]}/hello")
            if record.format == "deb":
                assert remote.inside(record, package).packages[0].name == "hello"
        assert repository.of_release(config, "bookworm-amd64", "") == []


def fetched(url: str) -> bytes:
    """Read a URL."""
    with urllib.request.urlopen(url) as answer:
        return answer.read()


# in soak 200
PUBLICATIONS = int(os.environ.get("PKGCI_PUBLICATIONS", "20"))


def test_readers_never_see_a_broken_or_stale_repository_while_publications_run(gnupg, tmp_path):
    config = configure(tmp_path, gnupg, top={"serve": False})
    debs = [built(config, "hello", f"1.{number}", files={}) for number in range(PUBLICATIONS + 1)]
    rpms = [built_rpm(config, "hello", f"1.{number}") for number in range(PUBLICATIONS + 1)]
    put(config, debs[0])
    put_rpm(config, rpms[0])
    sources = (root(config) / "pkgci.sources").read_text()
    repo = (root(config, "debianrpm") / "pkgci.repo").read_text()
    base = {codename: f"{config.settings.url}rocket/{codename}/" for codename in ("bookworm", "debianrpm")}
    context = multiprocessing.get_context("fork")
    end, failures, rounds, newest = context.Event(), context.Queue(), context.Value("i", 0), context.Value("i", 0)

    def with_apt() -> None:
        download_by_apt(tmp_path / "apt", sources, newest.value)

    def with_dnf() -> None:
        download_by_dnf(tmp_path / "dnf", repo, newest.value)

    port = int(config.settings.url.rstrip("/").rpartition(":")[2])
    with nginx(tmp_path / "nginx", port, f"server {{ listen 127.0.0.1:{port}; root {config.data}/repositories; }}"):
        paused = Apt(tmp_path / "paused", sources)
        paused("update")
        dnf(tmp_path / "paused-dnf", repo, "makecache")
        release = Release(fetched(f"{base['bookworm']}dists/bookworm/InRelease"))
        index = {one: fetched(f"{one}repodata/repomd.xml") for one in (base["debianrpm"], mirror(base["debianrpm"]))}
        readers = [
            context.Process(target=read_until, args=(end, look, failures, rounds)) for look in (with_apt, with_dnf)
        ]
        for reader in readers:
            reader.start()
        for number in range(1, PUBLICATIONS + 1):
            put(config, debs[number])
            put_rpm(config, rpms[number])
            newest.value = number
        end.set()
        for reader in readers:
            reader.join()
        # who has paused since before the first of them
        paused("download", "hello=1.0")
        dnf(tmp_path / "paused-dnf", repo, "-C", "repoquery", "hello")
        dnf(tmp_path / "paused-dnf", repo, "install", "--downloadonly", f"--downloaddir={tmp_path}", "hello-1.0")
        for one in release["SHA256"]:
            if str(one["name"]).endswith((".gz", ".zst")):
                folder = str(one["name"]).rpartition("/")[0]
                content = fetched(f"{base['bookworm']}dists/bookworm/{folder}/by-hash/SHA256/{one['sha256']}")
                assert hashlib.sha256(content).hexdigest() == one["sha256"]
        for url, text in index.items():
            for digest, path in re.findall(
                rb'<checksum type="sha256">(\w+)</checksum>\s*<location href="([^"]+)"/>', text
            ):
                assert hashlib.sha256(fetched(url + path.decode())).hexdigest() == digest.decode()
    assert failures.empty(), failures.get()
    assert rounds.value >= 2
    stamps = [
        Repository(config, "rocket", "bookworm").generation(number).stamp for number in range(1, PUBLICATIONS + 2)
    ]
    assert all(later > earlier for earlier, later in pairwise(stamps))


def mirror(base: str) -> str:
    """Return what the mirror list of an RPM repository names."""
    return fetched(f"{base}mirrorlist").decode().strip()


@pytest.mark.parametrize(
    ("name", "fields", "error"),
    [
        ("../hello", {}, "a name or version in its record cannot be one of a package"),
        ("hello\n", {}, "a name or version in its record cannot be one of a package"),
        ("hello", {"X-Note": "a\x1b[2Jb"}, "index.packages has control characters"),
        ("hello", {"X-Note": "x" * (5 << 20)}, "index.packages has more than 4 MiB"),
    ],
)
def test_hostile_names_and_control_data_are_refused(config, tmp_path, name, fields, error):
    put(config, built(config, "other", "1"))
    deb = packages.deb(tmp_path, "hello", "1", fields=fields)
    entry = packages.deliver_debs(config, tmp_path, name, "1", [deb], dsc_name="hello")
    refused(config, PackageError, error, Publication(entry.record.key, ORIGIN))
    assert leftovers(config) == []


def test_a_truncated_package_is_refused(config, tmp_path):
    put(config, built(config, "other", "1"))
    deb = packages.deb(tmp_path, "hello", "1")
    deb.write_bytes(deb.read_bytes()[:-100])
    # as the sandbox of a build says of what it cannot read
    deb.with_suffix(".contents").unlink()
    entry = packages.deliver_debs(config, tmp_path, "hello", "1", [deb])
    refused(config, PackageError, "hello_1_all.deb: the sandbox of its build", Publication(entry.record.key, ORIGIN))
    put_rpm(config, built_rpm(config, "other", "1"))
    rpms = packages.rpmbuilt(tmp_path, "hello", "1")
    whole = rpms[0].read_bytes()
    for cut, message in ((-10, "rpm finds its digests wrong"), (200, "is not the file that createrepo_c read in")):
        # only of a whole header there is an index
        rpms[0].write_bytes(whole[:-10])
        index = packages.rpm_index(tmp_path, rpms)
        rpms[0].write_bytes(whole[:cut])
        entry = packages.deliver_rpms(config, "hello", "1-1", rpms, index=index)
        refused(config, PackageError, message, Publication(entry.record.key, ORIGIN), codename="debianrpm")


def test_an_rpm_index_that_is_not_of_the_build_or_hostile_is_refused(config, tmp_path):
    put_rpm(config, built_rpm(config, "other", "1"))
    rpms = packages.rpmbuilt(tmp_path, "hello", "1")
    index = packages.rpm_index(tmp_path, rpms)
    texts = {path: path.read_text() for path in index}
    entity = '<!DOCTYPE metadata [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><metadata>'
    huge = f"<changelog>{'x' * (2 << 20)}</changelog></package>"
    for name, former, latter, message in (
        ("primary", 'href="hello', 'href="../../hello', "is about '../../hello-1-1.noarch.rpm', not once"),
        ("primary", "<name>hello", "<name>../hello", "index.primary.xml has '../hello' in the place of a name"),
        ("primary", "<name>hello", "<name>other", "hello-1-1.noarch.rpm is other 1-1 noarch, not what its build"),
        ("primary", "<metadata>", entity, "index.primary.xml has a DOCTYPE"),
        ("primary", "What hello is", "&#155;2J", "index.primary.xml has control characters in summary"),
        ("other", "</package>", huge, "index.other.xml has more than 1 MiB in changelog"),
    ):
        for path, text in texts.items():
            path.write_text(text.replace(former, latter) if path.stem == f"index.{name}" else text)
        entry = packages.deliver_rpms(config, "hello", "1-1", rpms, index=index)
        refused(config, PackageError, message, Publication(entry.record.key, ORIGIN), codename="debianrpm")
    assert leftovers(config, "debianrpm") == []


def test_a_symbolic_link_in_the_pool_is_not_followed(config, tmp_path):
    put(config, built(config, "other", "1"))
    (tmp_path / "elsewhere").mkdir()
    (root(config) / "pool/hello").symlink_to(tmp_path / "elsewhere")
    refused(config, InfrastructureError, "pool/hello is a symbolic link", built(config, "hello", "1"))
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (root(config) / "pool/hello").unlink()
    put(config, built(config, "hello", "1"))
    (deb,) = (root(config) / "pool/hello").glob("*/*.deb")
    content = deb.read_bytes()
    deb.unlink()
    (tmp_path / "copy.deb").write_bytes(content)
    deb.symlink_to(tmp_path / "copy.deb")
    assert any("is, or is reached by, a symbolic link" in fault for fault in faults(config))


def test_no_file_of_the_store_changes_by_a_publication(config):
    def files() -> dict[str, tuple]:
        found = [path for path in (config.data / "store").rglob("*") if path.is_file()]
        stats = {path: path.stat() for path in found}
        return {str(p): (s.st_ino, s.st_mode, s.st_size, s.st_mtime_ns, p.read_bytes()) for p, s in stats.items()}

    deb, rpm = built(config, "hello", "1"), built_rpm(config, "hello", "1")
    before = files()
    put(config, deb)
    put_rpm(config, rpm)
    assert files() == before
    signed = next((root(config, "debianrpm") / "pool/hello").glob("*/*.noarch.rpm"))
    assert not any(signed.samefile(path) for path in before)
    assert any(signed.samefile(path) for path in (config.data / "signed").rglob("*.rpm"))


def test_apt_refuses_what_is_tampered_with_unsigned_or_signed_by_another_key(config, tmp_path):
    put(config, built(config, "hello", "1"))
    sources = (root(config) / "pkgci.sources").read_text()
    distribution = root(config) / "current/dists/bookworm"
    good = {path: path.read_bytes() for path in distribution.glob("*Release*")}
    (deb,) = (root(config) / "pool/hello").glob("*/*.deb")
    stranger = SigningKey(config)

    def updated(name: str) -> bool:
        with server.serve(config):
            return (
                Apt(tmp_path / name, sources)("update", "-o", "APT::Update::Error-Mode=any", check=False).returncode
                == 0
            )

    assert updated("good")
    (distribution / "InRelease").write_bytes(
        good[distribution / "InRelease"].replace(b"Origin: pkgci", b"Origin: other")
    )
    assert not updated("tampered")
    (distribution / "InRelease").write_bytes(stranger.clearsign(good[distribution / "Release"]))
    assert not updated("stranger")
    for name in ("InRelease", "Release.gpg"):
        (distribution / name).unlink()
    assert not updated("unsigned")
    for path, content in good.items():
        path.write_bytes(content)
    assert updated("again")
    content = deb.read_bytes()
    deb.unlink()
    deb.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with server.serve(config):
        spoilt = Apt(tmp_path / "good", sources)("download", "hello", check=False)
    assert spoilt.returncode != 0
    assert "Hash Sum mismatch" in spoilt.stderr


def test_dnf_refuses_what_is_tampered_with_unsigned_or_signed_by_another_key(config, tmp_path):
    put_rpm(config, built_rpm(config, "hello", "1"))
    repo = (root(config, "debianrpm") / "pkgci.repo").read_text()
    index = root(config, "debianrpm") / "current/repodata/repomd.xml"
    signature = index.with_name("repomd.xml.asc")
    good = {path: path.read_bytes() for path in (index, signature)}
    stranger = SigningKey(config)

    def made(name: str) -> bool:
        with server.serve(config):
            return dnf(tmp_path / name, repo, "makecache", check=False).returncode == 0

    assert made("good")
    index.write_bytes(good[index] + b"\n")
    assert not made("tampered")
    index.write_bytes(good[index])
    signature.write_bytes(stranger.detach_sign(good[index]))
    assert not made("stranger")
    signature.unlink()
    assert not made("unsigned")
    signature.write_bytes(good[signature])
    # an index that is signed, of a package that is not
    (pool,) = (root(config, "debianrpm") / "pool/hello").iterdir()
    (package,) = pool.glob("*.noarch.rpm")
    (unsigned,) = (config.data / "store").glob(f"*/*/{package.name}")
    package.unlink()
    shutil.copyfile(unsigned, package)
    shutil.rmtree(index.parent)
    run("createrepo_c", "--no-database", "-o", index.parents[1], index.parents[1])
    signature.write_bytes(Repository(config, "rocket", "debianrpm").key.detach_sign(index.read_bytes()))
    with server.serve(config):
        refused = dnf(tmp_path / "package", repo, "install", "hello", check=False)
    assert refused.returncode != 0
    assert "is not signed" in refused.stdout + refused.stderr


def test_a_dependency_that_a_publication_newly_breaks_is_refused_by_apt_with_upstream(config):
    lib = built(config, "libfoo1", "1", fields={"Depends": "libc6"})
    app = built(config, "app", "1", fields={"Depends": "libfoo1 (>= 1), libfoo1 (<< 2), libc6"})
    put(config, lib, app)
    lib2 = built(config, "libfoo1", "2", fields={"Depends": "libc6"})
    refused(config, PackageError, "app=1 cannot be installed once this is published: app : Depends: libfoo1 ", lib2)
    app2 = built(config, "app", "2", fields={"Depends": "libfoo1 (>= 2)"})
    refused(config, PackageError, "app=2 cannot be installed once this is published", app2)
    try_to_publish(config, "rocket", "bookworm", [lib2, app2])
    assert put(config, lib2, app2).number == 2
    nowhere = built(config, "app", "3", fields={"Depends": "libfoo1, no-such-package"})
    refused(config, PackageError, "app=3 cannot be installed", nowhere)


def test_nobody_waits_for_the_lock_while_dependencies_are_asked_about(gnupg, tmp_path, monkeypatch):
    config = configure(tmp_path, gnupg, wait_seconds=0)
    put(config, built(config, "lib", "1"))
    check, asked = closure.check, []

    def meanwhile(*words) -> None:
        asked.append(words)
        if len(asked) in (1, 2):
            put(config, built(config, f"other-{len(asked)}", "1"))
        check(*words)

    monkeypatch.setattr(closure, "check", meanwhile)
    app = built(config, "app", "1", fields={"Depends": "lib"})
    try_to_publish(config, "rocket", "bookworm", [app])
    # another one came between: asked again, and then once more, with the lock
    assert put(config, app).number == 4
    assert len(asked) == 3
    good = built(config, "app", "2", fields={"Depends": "lib"})
    try_to_publish(config, "rocket", "bookworm", [good])
    assert put(config, good).number == 5
    assert len(asked) == 4


def test_siblings_that_cannot_be_published_do_not_keep_the_others_back(config):
    put(config, built(config, "hello", "1", files=FILE))
    clash, good = built(config, "clash", "1", files=FILE), built(config, "good", "1")
    lost = Publication("0" * 64, ORIGIN)
    done = publish(config, "rocket", "bookworm", [good], [clash, lost])
    assert [build.source for build in done.generation.added] == ["good"]
    assert "is not in the store" in done.left[0]
    assert "clash 1: clash 1 has the file /usr/bin/tool, which hello 1" in done.left[1]
    with pytest.raises(PackageError, match="clash 1 has the file"):
        publish(config, "rocket", "bookworm", [clash], [built(config, "other", "1")])


def test_what_a_rollback_breaks_is_said_and_what_mends_it_can_be_tried(config, caplog):
    put(config, built(config, "lib", "1"))
    put(config, built(config, "lib", "2"))
    put(config, built(config, "app", "1", fields={"Depends": "lib (>= 2)"}))
    rollback(config, "rocket", "bookworm", 1, "it eats disks", ["lib"])
    assert "generation 4 of rocket/bookworm: app=1 cannot be installed once this is published: app : Dep" in caplog.text
    fix = [built(config, "lib", "3")]
    try_to_publish(config, "rocket", "bookworm", fix)
    assert "lib is on hold since generation 4 of rocket/bookworm: it eats disks" in caplog.text
    with pytest.raises(HeldError, match="lib is on hold since generation 4"):
        try_to_publish(config, "rocket", "bookworm", fix, approved=True)


@pytest.mark.parametrize("reason", ["", " ", "two\nlines", "x" * 1001, "a\x1b[2J"])
def test_a_rollback_needs_a_reason_of_one_line(config, reason):
    put(config, built(config, "hello", "1"))
    put(config, built(config, "hello", "2"))
    with pytest.raises(RequestError, match="the reason of a rollback must be one line of 1 to 1000 characters"):
        rollback(config, "rocket", "bookworm", 1, reason)
    assert Repository(config, "rocket", "bookworm").holds() == {}


def test_a_dependency_that_was_broken_before_does_not_stop_others(config, monkeypatch):
    with monkeypatch.context() as without:
        without.setattr(Repository, "question", lambda *_: None)
        put(config, built(config, "app", "1", fields={"Depends": "no-such-package"}), built(config, "lib", "1"))
    assert put(config, built(config, "app", "2", fields={"Depends": "no-such-package, lib"})).number == 2
    assert put(config, built(config, "lib", "2")).number == 3
    (found,) = audit(Repository(config, "rocket", "bookworm"), solve=True)
    assert found.startswith("app=2 cannot be installed: app : Depends: no-such-package")


def test_a_dependency_that_a_publication_newly_breaks_is_refused_by_dnf(config):
    put_rpm(
        config, built_rpm(config, "lib", "1"), built_rpm(config, "app", "1", more="Requires: lib < 2, /bin/sh, other")
    )
    lib2 = built_rpm(config, "lib", "2")
    message = r"app-0:1-1.noarch cannot be installed once this is published: .*nothing provides lib < 2"
    refused(config, PackageError, message, lib2, codename="debianrpm")
    app2 = built_rpm(config, "app", "2", more="Requires: lib >= 2, /bin/sh, other")
    assert put_rpm(config, lib2, app2).number == 2
    app3 = built_rpm(config, "app", "3", more="Requires: lib >= 3")
    message = "app-0:3-1.noarch cannot be installed once this is published: .*nothing provides lib >= 3"
    refused(config, PackageError, message, app3, codename="debianrpm")
    # a file that only the list of all files names
    put_rpm(config, built_rpm(config, "reader", "1", more="Requires: (/usr/share/lib/text and /bin/sh)"))
    spec = packages.SPEC.replace("/usr/share/{name}/text", "/usr/share/{name}/other")
    message = "reader-0:1-1.noarch cannot be installed once this is published: .*nothing provides"
    refused(config, PackageError, message, built_rpm(config, "lib", "3", spec=spec), codename="debianrpm")
    assert list(audit(Repository(config, "rocket", "debianrpm"), solve=True)) == []
