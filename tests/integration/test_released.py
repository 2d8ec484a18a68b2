"""Released repositories, as real apt and dnf see them: publication, readers, and what must hold however a run ends."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import packages
import pytest
import yaml
from clients import Apt, free_port, run

from pkgci import server
from pkgci.config import Config
from pkgci.released.records import Commit, Origin, Publication
from pkgci.released.repository import Repository, publish
from pkgci.store import Entry

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


def put(config: Config, *publications: Publication):
    return publish(config, "rocket", "bookworm", publications)


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
