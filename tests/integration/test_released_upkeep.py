"""What released repositories need from day to day, and what their users get: validity, the key, the keyring package."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from clients import Apt, dnf, run
from released import built, built_rpm, configure, faults, leftovers, put, put_rpm, root, state

from pkgci import doctor, server
from pkgci.artifacts import Maintenance
from pkgci.config import Config
from pkgci.errors import InfrastructureError, RequestError
from pkgci.maintain import maintain
from pkgci.released.repository import Repository

DAY = timedelta(days=1)


@pytest.fixture
def days_ago(monkeypatch):
    """Set the clock of publications back."""

    def go_back(days: int) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.now(tz) - days * DAY

        monkeypatch.setattr("pkgci.released.repository.datetime", Clock)

    return go_back


def maintained(config: Config, tmp_path: Path) -> Maintenance:
    """Run the job; return its record."""
    maintain(config, datetime.now(UTC), tmp_path)
    return Maintenance.read(tmp_path / "maintenance.json")


def test_apt_refuses_an_index_that_nobody_renewed_and_maintenance_renews_it_at_half_of_its_life(
    gnupg, tmp_path, days_ago
):
    config = configure(tmp_path, gnupg, valid_days=28)
    days_ago(29)
    put(config, built(config, "hello", "1"))
    put_rpm(config, built_rpm(config, "hello", "1"))
    apt = Apt(tmp_path / "apt", (root(config) / "pkgci.sources").read_text())
    with server.serve(config):
        old = apt("update", check=False)
    assert old.returncode != 0
    assert "is expired" in old.stderr
    assert any("has expired" in fault for fault in faults(config))
    days_ago(0)
    done = {one.repository: one for one in maintained(config, tmp_path).repositories}
    assert (done["rocket/bookworm"].generation, done["rocket/debianrpm"].generation) == (2, 1)
    assert done["rocket/bookworm"].renewed.startswith("it is valid until ")
    assert done["rocket/debianrpm"].valid_until is None
    with server.serve(config):
        apt("update", "-o", "APT::Update::Error-Mode=any")
        apt("download", "hello=1")
    repository = Repository(config, "rocket", "bookworm")
    now = datetime.now(UTC)
    assert repository.maintain(now + 13 * DAY).renewed == ""
    assert repository.maintain(now + 15 * DAY).renewed
    assert repository.current().kind == "renewal"
    assert not faults(config)
    assert leftovers(config) == []


def test_an_index_is_valid_for_ever_unless_the_configuration_says_otherwise(gnupg, tmp_path):
    config = configure(tmp_path, gnupg)
    put(config, built(config, "hello", "1"))
    release = (root(config) / "current/dists/bookworm/InRelease").read_text()
    assert "Valid-Until" not in release
    assert Repository(config, "rocket", "bookworm").maintain(datetime.now(UTC) + 1000 * DAY).renewed == ""
    etc = config.directory / "config.yaml"
    etc.write_text(etc.read_text().replace("released:\n", "released:\n  valid_days: 14\n"))
    config = Config(config.directory)
    assert Repository(config, "rocket", "bookworm").maintain(datetime.now(UTC)).renewed == "valid_days is 14 now"
    assert "Valid-Until" in (root(config) / "current/dists/bookworm/InRelease").read_text()


def test_maintenance_removes_former_generations_though_nothing_is_published(gnupg, tmp_path, monkeypatch):
    config = configure(tmp_path, gnupg, keep_generations=1, keep_hours=72)
    for version in range(1, 5):
        put(config, built(config, "hello", str(version)))
    assert maintained(config, tmp_path).repositories[0].cleaned == ()
    monkeypatch.setattr("pkgci.released.repository.time.time", lambda: datetime.now().timestamp() + 73 * 3600)
    assert maintained(config, tmp_path).repositories[0].cleaned == (1, 2)
    assert not faults(config)


@pytest.fixture
def short_key() -> Iterator[tuple[str, str]]:
    """A key that expires in 50 days, in a home of its own."""
    with tempfile.TemporaryDirectory(prefix="pkgci-t-", dir="/tmp") as home:
        words = ["gpg", "--homedir", home, "--batch", "--passphrase", ""]
        run(*words, "--quick-generate-key", "Released <released@example.org>", "ed25519", "sign", "50d")
        listed = run(*words, "--with-colons", "--list-keys").stdout.splitlines()
        yield home, next(line.split(":")[9] for line in listed if line.startswith("fpr:"))
        run("gpgconf", "--homedir", home, "--kill", "gpg-agent")


def test_who_maintains_is_told_before_the_key_expires_and_users_get_the_longer_one(short_key, tmp_path):
    config = configure(tmp_path, short_key)
    put(config, built(config, "hello", "1"))
    keyring = root(config) / "pkgci-rocket-keyring.deb"
    before = (root(config) / "key.asc").read_text(), keyring.read_bytes()
    with pytest.raises(InfrastructureError, match=f"the release key {short_key[1]} expires on .*, in 49 days; extend"):
        maintained(config, tmp_path)
    assert Maintenance.read(tmp_path / "maintenance.json").repositories[0].renewed == ""
    (finding,) = (one for one in doctor.examine(config) if "release key" in one.what)
    assert not finding.good
    run("gpg", "--homedir", short_key[0], "--batch", "--passphrase", "", "--quick-set-expire", short_key[1], "2y")
    assert maintained(config, tmp_path).repositories[0].renewed == "the public key has changed"
    assert (root(config) / "key.asc").read_text() != before[0]
    assert keyring.read_bytes() != before[1]
    (finding,) = (one for one in doctor.examine(config) if "release key" in one.what)
    assert finding.good
    assert "signs, and expires on" in finding.what


def test_what_is_made_for_users_is_on_the_disk_before_it_has_its_name_and_mended_when_it_is_damaged(
    gnupg, tmp_path, monkeypatch
):
    config = configure(tmp_path, gnupg)
    synced: set[int] = set()
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.add(os.stat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    put(config, built(config, "hello", "1"))
    place = config.data / "released/rocket/bookworm"
    (key,) = place.glob("key-*")
    files = [one for top in (root(config), key) for one in top.rglob("*") if one.is_file() and not one.is_symlink()]
    assert [str(one) for one in files if one.stat().st_ino not in synced] == []
    keyring = root(config) / "pkgci-rocket-keyring.deb"
    good = len(keyring.read_bytes())
    for damaged in (keyring, key / "keyring.gpg", root(config) / "key.asc"):
        damaged.write_bytes(b"")
    put(config, built(config, "hello", "2"))
    assert keyring.stat().st_size == pytest.approx(good, abs=50)
    assert (root(config) / "key.asc").read_bytes()
    for version in ("3", "4"):
        os.utime(Path(gnupg[0], "pubring.kbx"))
        put(config, built(config, "hello", version))
    assert len(list(place.glob("key-*"))) == 2
    assert not faults(config)


def test_a_repository_keeps_its_key(gnupg, short_key, tmp_path):
    config = configure(tmp_path, gnupg)
    put(config, built(config, "hello", "1"))
    put_rpm(config, built_rpm(config, "hello", "1"))
    etc = config.directory / "config.yaml"
    etc.write_text(etc.read_text().replace(gnupg[0], short_key[0]).replace(gnupg[1], short_key[1]))
    other = Config(config.directory)
    before = [state(config, codename) for codename in ("bookworm", "debianrpm")]
    for work in (
        lambda: put(other, built(other, "hello", "2")),
        lambda: Repository(other, "rocket", "debianrpm").maintain(datetime.now(UTC)),
    ):
        with pytest.raises(RequestError, match=f"are signed by the key {gnupg[1]}, which users have, and not by"):
            work()
    assert [state(config, codename) for codename in ("bookworm", "debianrpm")] == before


def test_a_backup_brings_back_what_users_read_and_publications_go_on_from_there(gnupg, tmp_path):
    config = configure(tmp_path, gnupg)
    put(config, built(config, "hello", "1"))
    put_rpm(config, built_rpm(config, "hello", "1"))

    def seen() -> list[dict[str, tuple]]:
        # but for inodes, and times of links
        states = [state(config, codename) for codename in ("bookworm", "debianrpm")]
        return [{path: file[1:] for path, file in one.items() if not Path(path).is_symlink()} for one in states]

    before = seen()
    # as docs/operator says
    run("rsync", "-aH", "--delete", f"{config.data}/", tmp_path / "backup/")
    put(config, built(config, "hello", "2"))
    shutil.rmtree(config.data)
    run("rsync", "-aH", "--delete", f"{tmp_path}/backup/", config.data)
    config = Config(config.directory)
    assert seen() == before
    assert [fault for codename in ("bookworm", "debianrpm") for fault in faults(config, codename)] == []
    (pooled,) = root(config).glob("pool/hello/*/hello_1_all.deb")
    assert pooled.stat().st_nlink > 1, "store and pool have a copy each"
    for index in (config.data / "released").rglob("index.sqlite*"):
        index.unlink()
    assert put(config, built(config, "hello", "3")).number == 2
    assert not faults(config)
    assert leftovers(config) == []
    with server.serve(config):
        apt = Apt(tmp_path / "apt", (root(config) / "pkgci.sources").read_text())
        apt("update", "-o", "APT::Update::Error-Mode=any")
        apt("download", "hello=3")


def test_the_keyring_package_gives_apt_the_key_and_the_lines(gnupg, tmp_path):
    config = configure(tmp_path, gnupg)
    put(config, built(config, "hello", "1"))
    package, tree = root(config) / "pkgci-rocket-keyring.deb", tmp_path / "installed"
    fields = run("dpkg-deb", "--show", "--showformat", "${Package} ${Architecture} ${Maintainer}", package).stdout
    assert fields == "pkgci-rocket-keyring all Released <released@example.org>"
    run("dpkg-deb", "--extract", package, tree)
    lines = (tree / "etc/apt/sources.list.d/pkgci-rocket.sources").read_text()
    assert "Signed-By: /usr/share/keyrings/pkgci-rocket.gpg\n" in lines
    with server.serve(config):
        apt = Apt(tmp_path / "apt", lines.replace("/usr/share", f"{tree}/usr/share"))
        apt("update", "-o", "APT::Update::Error-Mode=any")
        apt("download", "hello")
    assert f"curl -fsSO {config.settings.url}rocket/bookworm/{package.name}" in (root(config) / "README").read_text()
    made = package.stat()
    put(config, built(config, "hello", "2"))
    assert package.stat().st_mtime_ns == made.st_mtime_ns


def test_the_keyring_package_gives_dnf_the_key_and_the_lines(gnupg, tmp_path):
    config = configure(tmp_path, gnupg)
    put_rpm(config, built_rpm(config, "hello", "1"))
    place, installed = root(config, "debianrpm"), tmp_path / "one/root"
    Repository(config, "rocket", "debianrpm").key.verify_rpm(place / "pkgci-rocket-keyring.rpm")
    lines = (place / "pkgci.repo").read_text()
    with server.serve(config):
        dnf(tmp_path / "one", lines, "install", f"{config.settings.url}rocket/debianrpm/pkgci-rocket-keyring.rpm")
        lines = (installed / "etc/yum.repos.d/pkgci-rocket.repo").read_text()
        assert "gpgkey=file:///etc/pki/rpm-gpg/RPM-GPG-KEY-pkgci-rocket\n" in lines
        dnf(tmp_path / "two", lines.replace("file://", f"file://{installed}"), "install", "hello")
