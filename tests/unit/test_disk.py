"""Files of caches are there as a whole or not at all, and a full disk leaves no part of one."""

import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pkgci.formats.base import Metadata, cached, keep

LARGE = 8192


@pytest.fixture
def _full() -> Iterator[None]:
    """Let no file have more than half of `LARGE`."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGE // 2, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def downloaded(cache: Path) -> object:
    return keep(SimpleNamespace(cache=cache), "0" * 64, bytes(LARGE))


def answered(cache: Path) -> object:
    place = SimpleNamespace(config=SimpleNamespace(cache=cache), root=SimpleNamespace(id="0" * 64))
    made = SimpleNamespace(model_dump_json=lambda: "x" * LARGE)
    return cached(place, "metadata", [], Metadata, lambda: made)


@pytest.mark.usefixtures("_full")
@pytest.mark.parametrize("fill", [downloaded, answered])
def test_a_full_disk_leaves_nothing(tmp_path: Path, fill: Callable[[Path], object]):
    with pytest.raises(OSError, match="File too large"):
        fill(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_is_kept_is_whole(tmp_path: Path):
    path = downloaded(tmp_path)
    assert path.read_bytes() == bytes(LARGE)
    assert list(path.parent.iterdir()) == [path]
