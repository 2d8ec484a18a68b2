"""Released repositories, as real apt and dnf see them: publication, readers, and what must hold however a run ends."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import packages
import pytest
import yaml
from clients import Apt, dnf, free_port, run

from pkgci import server
from pkgci.config import Config
from pkgci.released.audit import audit
from pkgci.released.records import Commit, Origin, Publication
from pkgci.released.repository import Repository, publish

ORIGIN = Origin(branch="main", commits=(Commit(project="tools/hello", commit="c" * 40, tree=packages.TREE),))


@pytest.fixture(scope="session")
def gnupg():
    """A home of GnuPG with a key, by its fingerprint; its agent ends with the tests."""
    # the path of an agent's socket must be short
    with tempfile.TemporaryDirectory(prefix="pkgci-t-", dir="/tmp") as home:
        words = ["gpg", "--homedir", home, "--batch", "--passphrase", ""]
        run(*words, "--quick-generate-key", "Released <released@example.org>", "rsa3072", "sign", "never")
        listed = run(*words, "--with-colons", "--list-keys").stdout.splitlines()
        yield home, next(line.split(":")[9] for line in listed if line.startswith("fpr:"))
        run("gpgconf", "--homedir", home, "--kill", "gpg-agent")


def configure(place: Path, gnupg: tuple[str, str], **released: object) -> Config:
    etc = place / "etc"
    (etc / "targets").mkdir(parents=True)
    (etc / "releases").mkdir()
    settings = {
        "url": f"http://127.0.0.1:{free_port()}/",
        "paths": {"data": str(place / "data"), "cache": str(place / "cache")},
        "released": {"gnupg_home": gnupg[0], "key": gnupg[1], **released},
    }
    (etc / "config.yaml").write_text(yaml.safe_dump(settings))
    for form, codename in (("deb", "bookworm"), ("rpm", "debianrpm")):
        (etc / "targets" / f"{codename}-amd64.yaml").write_text(
            f"format: {form}\ncodename: {codename}\narchitecture: amd64\ntag: t\nupstream: {{machine: true}}\n"
        )
    (etc / "releases" / "rocket.yaml").write_text("branches: [main]\ntargets: [bookworm-amd64, debianrpm-amd64]\n")
    return Config(etc)


@pytest.fixture
def config(tmp_path: Path, gnupg) -> Config:
    return configure(tmp_path, gnupg)


def built(config: Config, name: str, version: str, **more) -> Publication:
    """Put a build of one DEB package into the store; return what publishes it."""
    with tempfile.TemporaryDirectory() as scratch:
        deb = packages.deb(Path(scratch), name, version, source=more.pop("source", ""), **more)
        entry = packages.deliver_debs(config, Path(scratch), name, version, [deb])
    return Publication(entry.record.key, ORIGIN)


def built_rpm(config: Config, name: str, version: str, release: str = "1", more: str = "") -> Publication:
    """Put a build of one RPM package into the store; return what publishes it."""
    with tempfile.TemporaryDirectory() as scratch:
        rpms = packages.rpmbuilt(Path(scratch), name, version, release, more)
        entry = packages.deliver_rpms(config, name, f"{version}-{release}", rpms)
    return Publication(entry.record.key, ORIGIN)


def put(config: Config, *publications: Publication):
    return publish(config, "rocket", "bookworm", publications)


def put_rpm(config: Config, *publications: Publication):
    return publish(config, "rocket", "debianrpm", publications)


def root(config: Config, codename: str = "bookworm") -> Path:
    return config.data / "repositories" / "rocket" / codename


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
        listed = dnf(tmp_path / "dnf2", plain, "repoquery", "--qf", "%{name}-%{version}-%{release}.%{arch}").stdout.split()
    assert (tmp_path / "dnf/root/usr/share/hello/text").read_text() == "1.0\n"
    assert "hello-1.0-2.noarch" in upgraded
    assert set(listed) == {"hello-1.0-2.noarch", "hello-1.0-2.src", "other-3-1.noarch", "other-3-1.src"}
    assert not faults(config, "debianrpm")


def faults(config: Config, codename: str = "bookworm") -> list[str]:
    """What a reader finds wrong in any generation that is kept."""
    repository = Repository(config, "rocket", codename)
    return [*audit(repository), *audit(repository, "generations/[0-9]*")]


class Fault:
    """Kills this process when it comes to its `number`-th fault point: whatever Python's audit events name.

    So the points are all those calls that touch the file system, run a program or reach the database, found by running
    the code; see https://docs.python.org/3/library/audit_events.html.
    """

    EVENTS = ("open", "os.", "shutil.", "subprocess.", "sqlite3.", "pathlib.", "tempfile.")

    def __init__(self, number: int) -> None:
        self.number, self.count, self.armed = number, 0, True
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if not event.startswith(self.EVENTS) or not self.armed:
            return
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")) and not (
            arguments[1] is None and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            return  # reading changes nothing
        self.count += 1
        if self.count == self.number:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_at(number: int, work: Callable[[], object]) -> int | None:
    """Do `work` in a process that is killed at a fault point; return None if it was, else how many there are."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        fault = Fault(number)
        work()
        fault.armed = False
        os.write(writing, str(fault.count).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        said = stream.read()
    _, status = os.waitpid(child, 0)
    assert said or os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    return int(said) if said else None


def test_killed_at_any_point_readers_see_the_old_or_the_new_and_the_next_run_succeeds(config, tmp_path):
    put(config, built(config, "hello", "1.0-1"), built(config, "other", "3"))
    saved = tmp_path / "saved"
    shutil.copytree(config.data, saved, symlinks=True)
    publication = built(config, "hello", "1.0-2")
    shutil.copytree(config.data / "store", saved / "store", dirs_exist_ok=True)
    seen = set()
    number = 0
    points = None
    while points is None:
        number += 1
        shutil.rmtree(config.data)
        shutil.copytree(saved, config.data, symlinks=True)
        points = killed_at(number, lambda: put(config, publication))
        assert not faults(config), number
        seen.add(os.readlink(root(config) / "current"))
        assert put(config, publication).number == 2
        assert not faults(config), number
        assert leftovers(config) == [], number
    assert put(config, built(config, "hello", "1.0-3")).number == 3
    assert not faults(config)
    assert number > 50
    assert seen == {"generations/1", "generations/2"}


def leftovers(config: Config, codename: str = "bookworm") -> list[str]:
    """What nothing refers to, in the repository and beside it."""
    places = [root(config, codename), config.data / "released" / "rocket" / codename]
    hidden = [str(path) for place in places for path in place.rglob(".*") if "/key-" not in str(path)]
    kept = {int(path.name) for path in (places[0] / "generations").iterdir()}
    known = {int(path.stem) for path in (places[0] / "log").iterdir()}
    journal = [str(path) for path in places[1].glob("journal.json")]
    pool = {path.parent for path in (places[0] / "pool").glob("*/*/entry.json")}
    empty = [str(path) for path in (places[0] / "pool").glob("*/*") if path not in pool]
    return [*(path for path in hidden if not path.endswith("/.owner")), *journal, *empty, *map(str, kept ^ known)]
