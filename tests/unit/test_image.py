"""Which cached images are used. Real ones are made in the integration tests."""

import os
import time
from pathlib import Path

import pytest

from pkgci.config import Config
from pkgci.vm import image
from pkgci.vm.image import ImageRecord

TARGET = "bookworm-amd64"
DAY = 86400


@pytest.fixture
def config(tmp_path: Path, monkeypatch) -> Config:
    (tmp_path / "config.yaml").write_text(f"paths: {{cache: {tmp_path / 'cache'}}}\n")
    monkeypatch.setattr(image, "image_key", lambda *_: "key")
    monkeypatch.setattr(image, "_plain", lambda *_: Path())
    monkeypatch.setattr(image, "_make_disk", make)
    return Config(tmp_path)


def make(_target: object, key: str, _root: Path, _build: None, place: Path) -> None:
    ImageRecord(key=key, made=time.time(), host_key="made again").write(place / "image.json")


def found(config: Config) -> str:
    """Return which image is used."""
    return image.image(config, Config().target(TARGET), TARGET).host_key


@pytest.fixture
def record(config: Config) -> Path:
    """The record of an image that was made before."""
    path = config.cache / "images" / "key" / "image.json"
    path.parent.mkdir(parents=True)
    ImageRecord(key="key", made=time.time(), host_key="former").write(path)
    return path


@pytest.mark.usefixtures("record")
def test_an_image_is_made_once(config: Config):
    assert found(config) == "former"


@pytest.mark.parametrize("size", [0, 30])
def test_an_image_whose_record_was_cut_short_by_a_crash_of_the_machine_is_made_again(
    config: Config, record: Path, size: int
):
    os.truncate(record, size)
    assert found(config) == "made again"


@pytest.mark.parametrize(("days", "used"), [(-8, "made again"), (-6, "former"), (6, "former"), (8, "made again")])
def test_an_image_from_long_ago_or_of_a_clock_that_was_far_ahead_is_made_again(
    config: Config, record: Path, days: int, used: str
):
    then = time.time() + days * DAY
    os.utime(record.parent, (then, then))
    assert found(config) == used
