"""Released repositories when a publication is killed, or the disk is full or read-only: whole for readers, always."""

import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from clients import Apt, dnf, run
from injected import killed_at, with_own_disk
from released import built, built_rpm, configure, faults, leftovers, put, put_rpm, refused, root

from pkgci import server
from pkgci.config import Config
from pkgci.errors import InfrastructureError
from pkgci.released.records import Generation, Publication
from pkgci.released.repository import Repository


@pytest.fixture
def config(tmp_path: Path, gnupg) -> Config:
    return configure(tmp_path, gnupg)


def killed_everywhere(
    config: Config, codename: str, work: Callable[[], Generation], place: Path, every: int = 1
) -> int:
    """Kill `work`, which makes generation 2, at each (or `every` third, ...) of its fault points; return how many there are.

    After each the repository is whole for a reader, the next run succeeds, and nothing is left over. Every tenth time
    apt or dnf itself looks.
    """
    saved, points, number, seen = place / "saved", None, 1 - every, set()
    shutil.copytree(config.data, saved, symlinks=True)
    while points is None:
        number += every
        shutil.rmtree(config.data)
        shutil.copytree(saved, config.data, symlinks=True)
        points = killed_at(number, work)
        assert not faults(config, codename), number
        if number % 10 == 0:
            look(config, codename, place / f"client-{number}")
        seen.add(os.readlink(root(config, codename) / "current"))
        assert work().number == 2, number
        assert not faults(config, codename), number
        assert leftovers(config, codename) == [], number
    assert seen == {"generations/1", "generations/2"}
    return points


def look(config: Config, codename: str, place: Path) -> None:
    """Let apt or dnf download what the repository offers as `hello`."""
    with server.serve(config):
        if codename == "bookworm":
            apt = Apt(place, (root(config) / "pkgci.sources").read_text())
            apt("update", "-o", "APT::Update::Error-Mode=any")
            apt("download", "hello")
        else:
            repo = (root(config, codename) / "pkgci.repo").read_text()
            dnf(place, repo, "install", "--downloadonly", f"--downloaddir={place}", "hello")


def test_a_publication_of_debs_is_killed_at_every_fault_point(config, tmp_path):
    put(config, built(config, "hello", "1.0-1"), built(config, "other", "3"))
    publication = built(config, "hello", "1.0-2")
    assert killed_everywhere(config, "bookworm", lambda: put(config, publication), tmp_path) > 50
    assert put(config, built(config, "hello", "1.0-3")).number == 3
    assert not faults(config)


def test_a_publication_of_rpms_is_killed_at_every_fault_point(config, tmp_path):
    put_rpm(config, built_rpm(config, "hello", "1.0"))
    publication = built_rpm(config, "hello", "2.0")
    # what both formats do has been killed everywhere with the other; in soak all the same
    every = 1 if "PKGCI_KILLS" in os.environ else 3
    assert killed_everywhere(config, "debianrpm", lambda: put_rpm(config, publication), tmp_path, every) > 50


def test_the_removal_of_former_generations_is_killed_at_every_fault_point(gnupg, tmp_path, monkeypatch):
    config = configure(tmp_path, gnupg, keep_generations=1)
    for version in ("1", "2", "3"):
        put(config, built(config, "hello", version))
    monkeypatch.setattr("pkgci.released.repository.time.time", lambda: time.time_ns() / 1e9 + 73 * 3600)
    shutil.copytree(config.data, tmp_path / "saved", symlinks=True)
    points, number = None, 0
    while points is None:
        number += 1
        shutil.rmtree(config.data)
        shutil.copytree(tmp_path / "saved", config.data, symlinks=True)
        points = killed_at(number, lambda: Repository(config, "rocket", "bookworm").maintain(datetime.now(UTC)))
        assert not faults(config), number
        put(config, built(config, "hello", "3"))
        assert not faults(config), number
        Repository(config, "rocket", "bookworm").maintain(datetime.now(UTC))
        assert sorted(path.name for path in (root(config) / "generations").iterdir()) == ["2", "3"], number
        assert len(list((root(config) / "pool").glob("hello/*/*.deb"))) == 2, number
        # of the first one stays what it was
        assert leftovers(config) == ["1"], number
    assert points > 10


def failure(config: Config, publication: Publication) -> str:
    """Publish, and return what an expected error says, or nothing."""
    try:
        put(config, publication)
    except InfrastructureError as error:
        return str(error)
    return ""


def test_a_full_disk_is_said_in_one_line_and_leaves_the_repository_whole(config):
    outcomes = []

    def work() -> None:
        versions = [built(config, "hello", f"1.{number}") for number in range(50)]
        put(config, built(config, "other", "1"), versions[0])
        for number in range(1, 50, 3):
            free = os.statvfs(config.data).f_bavail * 4096
            with (config.data / "ballast").open("wb") as ballast:
                ballast.write(b"x" * max(0, free - number * 4096))
            said = failure(config, versions[number])
            assert re.fullmatch("|.*(No space left|disk is full|disk I/O error|status 2).*", said), said
            outcomes.append(not said)
            assert not faults(config)
            (config.data / "ballast").unlink()
            put(config, versions[number])
            assert leftovers(config) == []
            assert not faults(config)
        assert set(outcomes) == {False, True}

    with_own_disk(config.data, "24m", work)


def test_a_read_only_file_system_is_said_in_one_line_and_readers_go_on(config):
    def work() -> None:
        put(config, built(config, "hello", "1"))
        two = built(config, "hello", "2")
        run("mount", "-o", "remount,ro", config.data)
        with pytest.raises(InfrastructureError, match="Read-only file system") as raised:
            put(config, two)
        assert "\n" not in str(raised.value)
        assert not faults(config)
        run("mount", "-o", "remount,rw", config.data)
        assert put(config, two).number == 2

    with_own_disk(config.data, "24m", work)


class BreaksOff(BaseHTTPRequestHandler):
    """A server that is lost in the middle of every answer."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(b"Origin: Debian\n")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_lost_connection_is_said_in_one_line_and_changes_nothing(config):
    put(config, built(config, "hello", "1"))
    with ThreadingHTTPServer(("127.0.0.1", 0), BreaksOff) as upstream:
        threading.Thread(target=upstream.serve_forever, daemon=True).start()
        target = config.directory / "targets/bookworm-amd64.yaml"
        mirror = f"{{repositories: ['http://127.0.0.1:{upstream.server_port}/ bookworm main']}}"
        target.write_text(target.read_text().replace("{machine: true}", mirror))
        lost = Config(config.directory)
        needy = built(lost, "needy", "1", fields={"Depends": "hello"})
        refused(lost, InfrastructureError, "since upstream cannot be read: E: Failed to fetch http://127", needy)
        upstream.shutdown()
    target.write_text(target.read_text().replace(mirror, "{machine: true}"))
    assert put(config, needy).number == 2
