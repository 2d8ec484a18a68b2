"""Test repositories as apt and dnf themselves see them, from tiny real packages; publication and cleaning of them."""

import gzip
import hashlib
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import Mock

import createrepo_c
import packages
import pytest
import trees
from clients import Apt, dnf, run

from pkgci import copied, repository, server
from pkgci.artifacts import Package, Repository
from pkgci.change import Change, QueueItem
from pkgci.config import Config
from pkgci.errors import InfrastructureError, PackageError, RequestError
from pkgci.formats import apt as apt_indexes
from pkgci.keys import SigningKey
from pkgci.locks import locked
from pkgci.publish import publish
from pkgci.store import Entry, Record, Store, describe

KEYS = {"deb": "d" * 64, "rpm": "e" * 64}
TARGETS = {"deb": "bookworm-amd64", "rpm": "debianrpm-amd64"}
NOW = datetime.now(UTC)

CONTROL = """Source: hello
Section: misc
Priority: optional
Maintainer: A Person <person@example.org>
Standards-Version: 4.6.2

Package: hello
Architecture: all
Description: says hello
 It does so in
 .
 several lines.
"""
RULES = """#!/usr/bin/make -f
build clean:
binary binary-indep binary-arch:
\tmkdir -p debian/hello/DEBIAN debian/hello/usr/share/hello
\techo hello > debian/hello/usr/share/hello/text
\tdpkg-gencontrol -phello -Pdebian/hello -DBuilt-By-Test=yes
\tdpkg-deb --root-owner-group --build debian/hello ..
build-arch build-indep: build
"""
CHANGELOG = """hello (1:2.0~rc1+b) bookworm; urgency=medium

  * A change.

 -- A Person <person@example.org>  Sun, 09 Sep 2001 01:46:40 +0000
"""
SPEC = """Name: hello
Epoch: 1
Version: 2.0~rc1
Release: 1
Summary: Says hello
License: MIT
URL: http://example.org/?a&b
BuildArch: noarch
Provides: greeting = 6
Requires: greeting >= 5, (greeting if two)
Requires(post): greeting
Recommends: more
Supplements: other
Conflicts: old < 1:2-3
%description
Says <hello>
and more.
%install
mkdir -p %{buildroot}/usr/share/hello %{buildroot}/etc/hello
echo hello > %{buildroot}/usr/share/hello/text
touch "%{buildroot}/etc/hello/it's ü" %{buildroot}/etc/hello/ghost
ln -s text %{buildroot}/usr/share/hello/link
%files
/usr/share/hello
%dir /etc/hello
"/etc/hello/it's ü"
%ghost /etc/hello/ghost
%changelog
* Tue Jan 02 2024 A Person <person@example.org> - 1-2
- second & last
* Mon Jan 01 2024 A Person <person@example.org> - 1-1
- first
"""


@pytest.fixture(scope="session")
def deb_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A real source package, its binary package and the stanza that a build leaves for the index."""
    top = tmp_path_factory.mktemp("deb")
    tree = top / "hello-2.0"
    (tree / "debian" / "source").mkdir(parents=True)
    for name, content in {
        "control": CONTROL,
        "rules": RULES,
        "changelog": CHANGELOG,
        "source/format": "3.0 (native)\n",
    }.items():
        (tree / "debian" / name).write_text(content)
    (tree / "debian" / "rules").chmod(0o755)
    run("dpkg-buildpackage", "-us", "-uc", "--no-check-builddeps", "-b", "-d", cwd=tree)
    run("dpkg-source", "-b", tree, cwd=top)
    (top / "index.packages").write_text(run("dpkg-scanpackages", "--multiversion", ".", cwd=top).stdout)
    return [path for path in top.iterdir() if path.is_file()]


@pytest.fixture(scope="session")
def rpm_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A real source RPM, its binary package, and what a build leaves for the index."""
    top = tmp_path_factory.mktemp("rpm")
    (top / "hello.spec").write_text(SPEC)
    run("rpmbuild", "-ba", "--nodeps", "-D", f"_topdir {top}", "-D", f"_dbpath {top}/db", top / "hello.spec")
    rpms = list(top.glob("*RPMS/**/*.rpm"))
    return [*rpms, *packages.rpm_index(top, rpms)]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    etc = tmp_path / "etc"
    (etc / "targets").mkdir(parents=True)
    (etc / "config.yaml").write_text(
        f"url: http://127.0.0.1:{trees.free_port()}/\ngerrit: file://{tmp_path}/gerrit/\n"
        f"paths: {{data: {tmp_path / 'data'}, cache: {tmp_path / 'cache'}}}\n"
    )
    for form, name in TARGETS.items():
        codename = name.partition("-")[0]
        (etc / "targets" / f"{name}.yaml").write_text(
            f"format: {form}\ncodename: {codename}\narchitecture: amd64\ntag: t\nupstream: {{machine: true}}\n"
        )
    return Config(etc)


def deliver(config: Config, form: str, files: list[Path], name: str, architecture: str, version: str, key="") -> Entry:
    key = key or KEYS[form]
    described = [describe(path) for path in files]
    listed = tuple(
        Package(name=name, version=version, architecture=architecture, file=file.name, sha256=file.sha256)
        for file in described
        if file.name.endswith((f"_{architecture}.deb", f".{architecture}.rpm"))
    )
    record = Record(
        key=key,
        algorithm=1,
        package="hello",
        version=version,
        target=TARGETS[form],
        format=form,
        packages=listed,
        files=tuple(described),
    )
    with Store(config).claim(key, wait=0) as lease:
        return Store(config).deliver(lease, record, files)


@pytest.fixture
def deb(config: Config, deb_files: list[Path]) -> Entry:
    return deliver(config, "deb", deb_files, "hello", "all", "1:2.0~rc1+b")


@pytest.fixture
def rpm(config: Config, rpm_files: list[Path]) -> Entry:
    return deliver(config, "rpm", rpm_files, "hello", "noarch", "1:2.0~rc1-1")


def written(config: Config, entry: Entry, run_name: str = "run-1", days: int = 1) -> tuple[Repository, Path]:
    expires = datetime.now(UTC) + timedelta(days=days)
    made = repository.write(config, entry.record.target, run_name, [entry], expires)
    return made, config.data / "repositories" / "test" / run_name / entry.record.target


def test_apt_updates_from_the_repository_and_downloads_package_and_source(config, deb, tmp_path):
    made, root = written(config, deb)
    apt = Apt(tmp_path / "apt", (root / "pkgci.sources").read_text())
    with server.serve(config):
        update = apt("update", "-o", "Debug::Acquire::http=true", "-o", "APT::Update::Error-Mode=any")
        apt("download", "hello=1:2.0~rc1+b")
        apt("source", "--download-only", "hello")
    assert "/by-hash/SHA256/" in update.stdout + update.stderr
    # apt writes a version's colon as %3a
    fetched = {path.name.replace("1%3a", ""): path.read_bytes() for path in (tmp_path / "apt").glob("hello_*")}
    published = {path.name: path.read_bytes() for path in (root / "pool/hello").iterdir()}
    assert Path(made.packages[0].file).name in published
    assert len(published) == 3
    assert fetched == published


def test_apt_refuses_the_repository_with_another_key(config, deb, tmp_path):
    _, root = written(config, deb)
    sources = (root / "pkgci.sources").read_text()
    stranger = SigningKey(_other(config, tmp_path)).export_public()
    signed_by = "".join(f" {line or '.'}\n" for line in stranger.splitlines())
    apt = Apt(tmp_path / "apt", sources[: sources.index("Signed-By:")] + f"Signed-By:\n{signed_by}")
    with server.serve(config):
        refused = apt("update", check=False)
    assert refused.returncode != 0
    assert "NO_PUBKEY" in refused.stderr + refused.stdout


def _other(config: Config, tmp_path: Path) -> Config:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text(f"url: {config.settings.url}\npaths: {{data: {tmp_path / 'otherdata'}}}\n")
    return Config(other)


def test_the_index_has_the_control_fields_and_says_what_apt_needs(config, deb):
    made, root = written(config, deb)
    index = (root / "dists/bookworm/main/binary-amd64/Packages").read_text()
    assert "Package: hello\n" in index
    assert "Built-By-Test: yes\n" in index
    assert "Description: says hello\n It does so in\n .\n several lines.\n" in index
    assert f"Filename: {made.packages[0].file}\n" in index
    assert f"SHA256: {made.packages[0].sha256}\n" in index
    release = (root / "dists/bookworm/Release").read_text()
    assert "Label: pkgci-test-run-1\n" in release
    assert "Acquire-By-Hash: yes\n" in release
    assert (root / made.packages[0].file).samefile(deb.directory / Path(made.packages[0].file).name)
    assert Repository.read(root / "repository.json") == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("Version: 1:2.0~rc1+b", "Version: 9"), "is not a package that the build lists"),
        (lambda text: text + "\n" + text, "is not a package that the build lists, once"),
        (lambda _: "", "says nothing about hello_"),
        (lambda text: text.replace("Section: misc", "Section: mi\x1bsc"), "has control characters"),
        (lambda text: text.replace("Section: misc", "Section: misc\r\nEssential: yes"), "has control characters"),
        (lambda text: text.replace("Section: misc", "Section:"), "the control field Section is empty"),
        (lambda text: text.replace("Section: misc", "Se/ction: misc"), "is no name of a control field"),
        (lambda text: text.replace("Section: misc", "X-Large: " + "x" * (4 << 20)), "has more than 4 MiB"),
        (lambda text: text.replace("Filename: .", "Filename: ../../etc"), None),
        (lambda text: text.replace("Section: misc", "Section: misc\nSHA512: 00"), None),
        (lambda text: text.replace("Section: misc", "Depends: a,\n b"), None),
    ],
)
def test_control_data_of_a_build_are_taken_with_care(
    config, deb_files, tmp_path, change: Callable[[str], str], message: str | None
):
    stanzas = next(path for path in deb_files if path.name == "index.packages")
    altered = tmp_path / "index.packages"
    altered.write_bytes(change(stanzas.read_text()).encode())
    files = [altered if path == stanzas else path for path in deb_files]
    entry = deliver(config, "deb", files, "hello", "all", "1:2.0~rc1+b")
    if message:
        with pytest.raises(PackageError, match=message):
            written(config, entry)
        assert not (config.data / "repositories/test/run-1/bookworm-amd64").exists()
        return
    _, root = written(config, entry)
    index = (root / "dists/bookworm/main/binary-amd64/Packages").read_text()
    assert "Filename: pool/hello/hello_" in index
    assert "SHA512" not in index
    assert "Depends: a, b\n" in index or "Depends" not in index


def test_dnf_lists_and_downloads_package_and_source_with_the_index_signed(config, rpm, tmp_path):
    made, root = written(config, rpm)
    repo = (root / "pkgci.repo").read_text()
    assert "repo_gpgcheck=1" in repo
    with server.serve(config):
        listed = dnf(
            tmp_path / "dnf", repo, "repoquery", "--qf", "%{name}-%{epoch}:%{version}-%{release}.%{arch}"
        ).stdout.split()
        located = dnf(tmp_path / "dnf", repo, "repoquery", "--location", "hello.noarch").stdout.split()
        dnf(tmp_path / "dnf", repo, "install", "--downloadonly", f"--downloaddir={tmp_path}", "hello-1:2.0~rc1-1")
    assert {"hello-1:2.0~rc1-1.noarch", "hello-1:2.0~rc1-1.src"} <= set(listed)
    assert made.url + made.packages[0].file in located
    assert describe(tmp_path / "hello-2.0~rc1-1.noarch.rpm").sha256 == made.packages[0].sha256


def test_dnf_refuses_an_altered_index(config, rpm, tmp_path):
    _, root = written(config, rpm)
    index = root / "repodata/repomd.xml"
    index.chmod(0o644)
    index.write_text(index.read_text().replace("</repomd>", "<!-- altered --></repomd>"))
    with server.serve(config):
        refused = dnf(tmp_path / "dnf", (root / "pkgci.repo").read_text(), "makecache", check=False)
    assert refused.returncode != 0
    assert "repomd.xml GPG signature verification error" in refused.stderr


def test_an_rpm_that_is_not_what_its_build_lists_is_the_packages_fault(config, rpm_files):
    entry = deliver(config, "rpm", rpm_files, "hello", "noarch", "1:3-1")
    with pytest.raises(PackageError, match=r"is hello 1:2.0~rc1-1 noarch, not what its build lists"):
        written(config, entry)


def test_the_index_is_what_createrepo_c_itself_would_write(config, rpm):
    _, root = written(config, rpm)
    for path in root.glob("pool/hello/*.rpm"):
        location = path.relative_to(root).as_posix()
        itself = createrepo_c.xml_dump(createrepo_c.package_from_rpm(str(path), location_href=location))
        for kind, text in zip(("primary", "filelists", "other"), itself, strict=True):
            (index,) = (root / "repodata").glob(f"*-{kind}.xml.gz")
            assert text in gzip.decompress(index.read_bytes()).decode()


def test_an_rpm_that_is_not_the_file_that_its_sandbox_read_is_refused(config, rpm_files, tmp_path):
    others = [path for path in rpm_files if not path.name.endswith(".noarch.rpm")]
    package = tmp_path / "hello-2.0~rc1-1.noarch.rpm"
    package.write_bytes(b"no package")
    entry = deliver(config, "rpm", [*others, package], "hello", "noarch", "1:2.0~rc1-1")
    with pytest.raises(PackageError, match=r"hello-2.0~rc1-1.noarch.rpm is not the file that createrepo_c read"):
        written(config, entry)


def test_a_repository_written_again_replaces_the_former_one_whole(config, rpm):
    _, root = written(config, rpm)
    (root / "former").touch()
    made, _ = written(config, rpm)
    assert not (root / "former").exists()
    assert Repository.read(root / "repository.json") == made
    assert [path.name for path in root.parent.iterdir()] == [root.name]


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "-option", "a b", "x" * 101])
def test_a_runs_name_that_is_no_plain_name_is_refused(config, rpm, name):
    with pytest.raises(RequestError, match="a name has letters, digits"):
        written(config, rpm, name)


def test_two_builds_with_a_file_of_the_same_name_are_refused(config, rpm, rpm_files):
    other = deliver(config, "rpm", rpm_files, "hello", "noarch", "1:2.0~rc1-1", key="f" * 64)
    with pytest.raises(RequestError, match="two builds make it"):
        repository.write(config, rpm.record.target, "run-1", [rpm, other], NOW)


def _write_and_die(config: Config, entry: Entry, step: int) -> None:
    calls = []

    def dying(call):
        def wrapped(*arguments, **options):
            calls.append(call)
            if len(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapped

    os.link, os.rename, repository.shutil.rmtree = dying(os.link), dying(os.rename), dying(repository.shutil.rmtree)
    SigningKey.detach_sign = dying(SigningKey.detach_sign)
    Path.write_text = dying(Path.write_text)
    written(config, entry)


def test_killed_at_any_step_there_is_the_old_repository_the_new_one_or_none_and_the_next_run_mends_it(config, rpm):
    SigningKey(config).export_public()
    states = set()
    for step in range(1, 50):
        _, root = written(config, rpm)
        process = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(config, rpm, step))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        states.add(root.exists())
        if root.exists():
            assert len(Repository.read(root / "repository.json").packages) == 1
            assert (root / "repodata/repomd.xml.asc").exists()
        written(config, rpm)
        assert [path.name for path in root.parent.iterdir()] == [root.name]
    assert step > 8
    assert True in states


class Git:
    """A remote repository, and a clone of it to work in."""

    def __init__(self, directory: Path) -> None:
        self.remote = directory / "gerrit" / "tools" / "hello"
        self.work = directory / "work"
        self.remote.mkdir(parents=True)
        run("git", "init", "-q", "--bare", "-b", "main", self.remote)
        run("git", "init", "-q", "-b", "main", self.work)
        self("config", "user.name", "A Person")
        self("config", "user.email", "person@example.org")
        self.base = self.commit("base")
        self.push("main")

    def __call__(self, *words: str) -> str:
        return run("git", *words, cwd=self.work).stdout.strip()

    def commit(self, subject: str) -> str:
        self("commit", "-q", "--allow-empty", "-m", subject)
        return self("rev-parse", "HEAD")

    def push(self, branch: str) -> None:
        self("push", "-q", str(self.remote), f"HEAD:{branch}")


@pytest.fixture
def git(tmp_path: Path) -> Git:
    return Git(tmp_path)


@pytest.fixture
def ahead(tmp_path: Path, monkeypatch) -> Callable[[], AbstractContextManager]:
    """What makes the clock of GnuPG and of the indexes two days fast while its context lasts."""
    then = datetime.now(UTC) + timedelta(days=2)
    fast = f'exec {shutil.which("gpg")} --faked-system-time {then:%Y%m%dT%H%M%S} "$@"'
    trees.write(tmp_path, {"bin/gpg": f"#!/bin/sh\n{fast}\n"})

    @contextmanager
    def clock():
        with monkeypatch.context() as patch:
            patch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
            patch.setattr(apt_indexes, "datetime", Mock(now=lambda _: then))
            yield

    return clock


def test_a_key_that_was_made_while_the_clock_was_ahead_is_used_when_it_is_set_back(config, tmp_path, ahead):
    with ahead():
        assert SigningKey(config).export_public()
    signed = tmp_path / "signed"
    signed.write_bytes(SigningKey(config).clearsign(b"data\n"))
    assert SigningKey(config).verify(signed) == b"data\n"


def test_apt_reads_what_was_signed_while_the_clock_was_ahead(config, deb, tmp_path, ahead):
    with ahead():
        _, root = written(config, deb)
    apt = Apt(tmp_path / "apt", (root / "pkgci.sources").read_text() + "Check-Date: no\n")
    with server.serve(config):
        apt("update", "-o", "APT::Update::Error-Mode=any")


def test_dnf_reads_what_was_signed_while_the_clock_was_ahead(config, rpm, tmp_path, ahead):
    with ahead():
        _, root = written(config, rpm)
    with server.serve(config):
        dnf(tmp_path, (root / "pkgci.repo").read_text(), "makecache")


def test_a_signature_removes_the_homes_that_killed_processes_left_and_no_other(config):
    homes = [Path(tempfile.mkdtemp(prefix="pkgci-gpg-", dir="/tmp")) for _ in range(2)]
    with locked(homes[0]):
        SigningKey(config).detach_sign(b"data")
    assert [home.exists() for home in homes] == [True, False]
    homes[0].rmdir()


def test_an_unmerged_change_is_published_to_a_test_repository_that_expires(config, rpm, git, tmp_path):
    change = Change(project="tools/hello", branch="main", commit=git.commit("change"))
    made = publish(config, rpm.record.target, change, rpm.record.key, "run-7", tmp_path / "artifacts")
    assert made.url == f"{config.settings.url}test/run-7/debianrpm-amd64/"
    assert Repository.read(tmp_path / "artifacts/repository.json") == made
    assert timedelta(days=13) < made.expires - NOW < timedelta(days=15)


def test_a_merged_change_is_refused_until_released_repositories_are_configured(config, rpm, git, tmp_path):
    change = Change(project="tools/hello", branch="main", commit=git.base)
    with pytest.raises(RequestError, match="released repositories are not configured"):
        publish(config, rpm.record.target, change, rpm.record.key, "run-7", tmp_path / "artifacts")


def test_a_change_that_merges_while_a_gate_runs_stays_in_a_test_repository(config, rpm, git, tmp_path):
    change = Change(project="tools/hello", branch="main", commit=git.base)
    made = publish(config, rpm.record.target, change, rpm.record.key, "run-7", tmp_path / "artifacts", test=True)
    assert made.url == f"{config.settings.url}test/run-7/debianrpm-amd64/"


def test_a_merged_change_is_recognized_by_its_ref_when_it_is_started_again_by_hand(config, rpm, git, tmp_path):
    run("git", "update-ref", "refs/changes/01/1/1", git.base, cwd=git.remote)
    queue = (QueueItem("tools/hello", "main", "refs/changes/01/1/1"),)
    change = Change(project="tools/hello", branch="main", number="1", patchset="1", queue=queue, commit="f" * 40)
    with pytest.raises(RequestError, match="1 is merged into main of tools/hello"):
        publish(config, rpm.record.target, change, rpm.record.key, "run-7", tmp_path / "artifacts")


def test_a_build_that_is_not_in_the_store_or_for_another_target_cannot_be_published(config, rpm, tmp_path):
    change = Change(project="tools/hello", branch="main")
    with pytest.raises(RequestError, match="is not in the store"):
        publish(config, rpm.record.target, change, "0" * 64, "run-7", tmp_path)
    with pytest.raises(RequestError, match="is for debianrpm-amd64, not for bookworm-amd64"):
        publish(config, "bookworm-amd64", change, rpm.record.key, "run-7", tmp_path)


@pytest.fixture
def second(config: Config, tmp_path: Path) -> Config:
    """Another installation, with a key, a port and data of its own."""
    place = tmp_path / "second"
    shutil.copytree(config.directory, place)
    url, data = f"http://127.0.0.1:{trees.free_port()}/", tmp_path / "seconddata"
    (place / "config.yaml").write_text(f"url: {url}\npaths: {{data: {data}, cache: {config.cache}}}\n")
    return Config(place)


def copy(config: Config, second: Config, made: Repository) -> tuple[Repository, Path]:
    """Copy a repository of one installation to the other; return its record and its place there."""
    with server.serve(config):
        record = copied.copy(second, made.target, f"{made.url}repository.json", NOW + timedelta(days=3))
    return record, second.data / "repositories" / record.url.removeprefix(second.settings.url)


def content(root: Path) -> dict[str, bytes]:
    paths = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {str(path): (root / path).read_bytes() for path in paths if path.name not in ("repository.json", "key.asc")}


def test_apt_takes_package_and_source_from_a_copy_when_the_original_is_gone(config, deb, second, tmp_path):
    made, root = written(config, deb)
    record, place = copy(config, second, made)
    assert record == made.model_copy(update={"url": record.url, "expires": record.expires})
    assert record.expires == NOW + timedelta(days=3)
    before, after = content(root), content(place)
    # where it is, is said in one file only
    assert {name for name in before | after if before.get(name) != after.get(name)} == {"pkgci.sources"}
    shutil.rmtree(root)
    apt = Apt(tmp_path / "apt", (place / "pkgci.sources").read_text())
    with server.serve(second):
        apt("update", "-o", "APT::Update::Error-Mode=any")
        apt("download", "hello=1:2.0~rc1+b")
        apt("source", "--download-only", "hello")
    # who asks again has it for as long from then on
    again, _ = copy(config, second, made)
    assert again == record


def test_dnf_takes_a_package_from_a_copy(config, rpm, second, tmp_path):
    made, root = written(config, rpm)
    record, place = copy(config, second, made)
    assert {name for name in content(root) if content(root)[name] != content(place).get(name)} == {"pkgci.repo"}
    shutil.rmtree(root)
    with server.serve(second):
        repo = (place / "pkgci.repo").read_text()
        dnf(tmp_path / "dnf", repo, "install", "--downloadonly", f"--downloaddir={tmp_path}", "hello-1:2.0~rc1-1")
    assert describe(tmp_path / "hello-2.0~rc1-1.noarch.rpm").sha256 == record.packages[0].sha256


def test_a_copy_that_nothing_refers_to_any_more_is_cleaned_like_any_other(config, rpm, second):
    _, place = copy(config, second, written(config, rpm)[0])
    assert list(repository.expired(second, NOW + timedelta(days=2))) == []
    assert list(repository.expired(second, NOW + timedelta(days=4))) == [place]


def _release(root: Path, config: Config, change: Callable[[str], str]) -> None:
    """Change a Release file, and sign it as its owner would."""
    place, key = root / "dists" / "bookworm", SigningKey(config)
    text = change((place / "Release").read_text()).encode()
    (place / "Release").write_bytes(text)
    (place / "InRelease").write_bytes(key.clearsign(text))
    (place / "Release.gpg").write_bytes(key.detach_sign(text))


def _packages(root: Path, config: Config, change: Callable[[str], str]) -> None:
    """Change the index of packages, and sign it as its owner would."""
    path = root / "dists" / "bookworm" / "main" / "binary-amd64" / "Packages"
    former, new = path.read_bytes(), change(path.read_text()).encode()
    path.unlink()
    path.write_bytes(new)
    digest = hashlib.sha256(new).hexdigest()
    (path.parent / "by-hash" / "SHA256" / digest).write_bytes(new)
    old = f" {hashlib.sha256(former).hexdigest()} {len(former)} "
    _release(root, config, lambda text: text.replace(old, f" {digest} {len(new)} "))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda root, _: (root / "dists/bookworm/Release").write_text("other"), "gpgv .*: status"),
        (lambda root, config: _release(root, _other(config, root.parent), str), "gpgv .*: status"),
        (
            lambda root, config: _release(root, config, lambda text: text.replace(" main/binary", " ../../../etc")),
            "its index names a file 'dists/bookworm/../../../etc",
        ),
        (lambda root, config: _release(root, config, lambda _: "Origin: other\n"), "can be read: KeyError: 'SHA256'$"),
        (
            lambda root, config: _packages(root, config, lambda text: text.replace("\nSize: ", "\nSize: x")),
            "can be read: ValueError: invalid literal",
        ),
        (
            lambda root, config: _packages(root, config, lambda text: text.replace("pool/hello/", "/etc/cron.d/")),
            "its index does not have pool/hello/hello_",
        ),
        (
            lambda root, config: _packages(
                root, config, lambda text: f"{text}\nFilename: pool/../x\nSize: 1\nSHA256: 0\n"
            ),
            "its index names a file 'pool/../x'",
        ),
        (
            lambda root, config: _packages(
                root, config, lambda text: f"{text}\nFilename: pool/x\nSize: {1 << 60}\nSHA256: 0\n"
            ),
            "is larger than what is copied",
        ),
        (
            lambda root, config: _packages(
                root, config, lambda text: f"{text}\nFilename: pool/x\nSize: -1\nSHA256: 0\n"
            ),
            "its index names a file 'pool/x'",
        ),
        (lambda root, _: next(root.glob("pool/hello/*.deb")).write_bytes(b"other"), "another size or checksum"),
        (lambda root, _: next(root.glob("pool/hello/*.deb")).unlink(), "there is nothing at .*: HTTP status 404"),
    ],
)
def test_a_repository_that_is_not_what_was_signed_or_leads_elsewhere_is_not_copied(config, deb, second, harm, said):
    made, root = written(config, deb)
    for path in root.rglob("*"):
        # of the store, too
        if path.is_file():
            path.write_bytes(_cut_loose(path))
    harm(root, config)
    with pytest.raises(InfrastructureError, match=said) as caught:
        copy(config, second, made)
    assert "\n" not in str(caught.value)
    assert not list((second.data / "repositories").glob("test/*/[!.]*"))


def _cut_loose(path: Path) -> bytes:
    kept = path.read_bytes()
    path.unlink()
    return kept
