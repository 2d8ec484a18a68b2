"""What an environment polls: another content means that it has changed, and nothing else does."""

import os
from datetime import UTC, datetime
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from pkgci import systest
from pkgci.config import Config
from pkgci.errors import InfrastructureError, RequestError
from pkgci.locks import locked
from pkgci.poll import polled
from pkgci.vm import guest

ENVIRONMENT = "nodes: {{one: {{}}}}\nscenarios: {{any: scenarios/any.py}}\npoll: [{}]\n"


class Handler(SimpleHTTPRequestHandler):
    """Serves a directory, and notes what is asked for; without dates where the server is told so."""

    def log_request(self, *_: object) -> None:
        self.server.asked.append(self.command)

    def send_header(self, name: str, value: str) -> None:
        if self.server.dated or name != "Last-Modified":
            super().send_header(name, value)


@pytest.fixture
def site(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "image.iso").write_text("one")

    def handler(*words):
        return Handler(*words, directory=tmp_path / "site")

    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked, server.dated = [], True
        server.file, server.url = tmp_path / "site" / "image.iso", f"http://127.0.0.1:{server.server_port}/image.iso"
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "etc" / "environments").mkdir(parents=True)
    (tmp_path / "etc" / "config.yaml").write_text(f"paths: {{data: {tmp_path / 'data'}}}\n")
    return Config(tmp_path / "etc")


def changed(config: Config, *places: str) -> bool | None:
    with polled(config, "lab", config.directory, places) as said:
        return said


def touch(path: Path, seconds: int = 10) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + seconds * 10**9))


@pytest.mark.parametrize("dated", [True, False])
def test_a_url_has_changed_when_its_content_has(config, site, dated):
    site.dated = dated
    assert [changed(config, site.url), changed(config, site.url)] == [True, False]
    # without a date nothing but its content tells
    assert site.asked == ["HEAD", "GET", "HEAD"] + ([] if dated else ["GET"])
    touch(site.file)
    assert changed(config, site.url) is False
    site.file.write_text("two")
    touch(site.file, 20)
    assert [changed(config, site.url), changed(config, site.url)] == [True, False]


def test_a_file_has_changed_when_its_content_has(config):
    image = config.directory / "image.iso"
    image.write_text("one")
    assert [changed(config, "image.iso"), changed(config, "image.iso")] == [True, False]
    touch(image)
    assert changed(config, str(image.name)) is False
    image.write_text("three")
    assert changed(config, "image.iso") is True


def test_what_was_not_prepared_has_still_changed(config):
    (config.directory / "image.iso").write_text("one")
    with pytest.raises(ZeroDivisionError), polled(config, "lab", config.directory, ["image.iso"]):
        raise ZeroDivisionError
    assert changed(config, "image.iso") is True


def test_a_place_that_is_not_there_is_named(config, site):
    for place in ("no.iso", f"{site.url}x"):
        with pytest.raises(InfrastructureError, match=rf"^cannot read {place}, which the environment polls: "):
            changed(config, place)


def test_an_environment_is_prepared_anew_when_what_it_polls_has_changed(config, monkeypatch):
    renewed = []

    def environment(_: Config, name: str, target: str, renew: bool, anew: bool):
        renewed.append((name, target, renew, anew))
        return SimpleNamespace(id="lab/1", manifest=SimpleNamespace(created=datetime.now(UTC)))

    (config.directory / "targets").mkdir()
    (config.directory / "targets" / "a.yaml").write_text("")
    (config.directory / "image.iso").write_text("one")
    (config.directory / "environments" / "lab.yaml").write_text(ENVIRONMENT.format("image.iso"))
    monkeypatch.setattr(systest, "_environments", lambda *_: ["lab"])
    monkeypatch.setattr(guest, "environment", environment)
    for _ in range(2):
        systest.prepare_environment(config, "lab")
    assert renewed == [("lab", "a", True, True), ("lab", "a", True, False)]
    with locked(config.data / "polled" / "lab"):
        assert systest.prepare_environment(config, "lab").startswith("another build is at it")


@pytest.mark.parametrize("place", ["../image.iso", "''", "http://host:0/image.iso"])
def test_a_place_that_is_none_is_refused_with_its_line(config, place):
    (config.directory / "environments" / "lab.yaml").write_text(ENVIRONMENT.format(place))
    with pytest.raises(RequestError, match=r"environments/lab.yaml:3: poll.0: "):
        config.environment("lab")
