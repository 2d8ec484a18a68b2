"""Records: written whole or not at all."""

import os
from pathlib import Path

from pkgci.artifacts import Repository


def test_a_record_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch):
    synced = []

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path.name, path.read_text(), (tmp_path / "repository.json").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    record = Repository(
        url="http://127.0.0.1/", format="deb", codename="x", target="x-amd64", packages=(), signing_key="", expires=None
    )
    record.write(tmp_path / "repository.json")
    text = (tmp_path / "repository.json").read_text()
    assert synced == [(".repository.json.new", text, False)]
