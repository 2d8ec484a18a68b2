"""Reading over HTTP: where redirects are followed, and how far."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trees
import yaml

from pkgci import web
from pkgci.config import Config
from pkgci.errors import InfrastructureError
from pkgci.formats import base
from pkgci.formats.base import Dependencies, Dependency


class _Handler(BaseHTTPRequestHandler):
    """`/N` is N redirects away from `content`; `/file` leads to a file of this machine."""

    def do_GET(self) -> None:
        left = self.path.removeprefix("/")
        self.send_response(200 if left == "0" else 302)
        if left != "0":
            self.send_header("Location", "file:///etc/hostname" if left == "file" else f"/{int(left) - 1}")
        self.send_header("Content-Length", "7")
        self.end_headers()
        self.wfile.write(b"content")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_an_upstreams_redirects_are_followed_and_not_more_than_a_few(url):
    assert web.read(f"{url}{web.REDIRECTS}", upstream=True, largest=100) == b"content"
    with pytest.raises(InfrastructureError, match="TooManyRedirects"):
        web.read(f"{url}{web.REDIRECTS + 1}", upstream=True, largest=100)


def test_a_redirect_to_a_file_is_not_followed(url):
    with pytest.raises(InfrastructureError, match=r"cannot read .*: InvalidSchema"):
        web.read(f"{url}file", upstream=True, largest=100)


@pytest.mark.parametrize("setting", ["url", "repositories"])
def test_a_package_of_a_test_repository_is_not_looked_for_elsewhere(tmp_path: Path, url: str, setting: str):
    directory = trees.config(tmp_path, paths={"cache": str(tmp_path / "cache")}).directory
    dependency = Dependency(file="small.deb", sha256=hashlib.sha256(b"content").hexdigest(), url=f"{url}1")
    settings = yaml.safe_load((directory / "config.yaml").read_text())
    wanted = Dependencies(install=(dependency,))
    (directory / "config.yaml").write_text(yaml.safe_dump(settings | {setting: url if setting == "url" else [url]}))
    with pytest.raises(InfrastructureError, match="HTTP status 302"):
        base.download(Config(directory), wanted)
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    assert [path.read_bytes() for path in base.download(Config(directory), wanted)] == [b"content"]
