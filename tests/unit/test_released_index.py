"""The index of a released repository: however it came about, the same packages give the same bytes."""

import gzip
import random
from pathlib import Path

import pytest
import zstandard

from pkgci.released import closure
from pkgci.released import index as module
from pkgci.released.index import COMPRESSIONS, Index, Stanza

LIST = "main/binary-amd64/Packages"


def stanza(source: str, version: int) -> bytes:
    chosen = random.Random(f"{source} {version}")
    words = " ".join(
        f"lib{chosen.randrange(4000)}-{chosen.randrange(30)} (>= {chosen.randrange(9)}.{version})," for _ in range(12)
    )
    digest = f"{chosen.getrandbits(256):064x}"
    head = f"Package: {source}\nVersion: {version}\nDepends: {words}\n"
    return f"{head}SHA256: {digest}\nSize: {chosen.randrange(10**6)}\n\n".encode()


def put(index: Index, versions: dict[str, int], source: str, version: int | None) -> None:
    """Publish a version of a source package, or take it away."""
    with index.transaction():
        index.begin(index.generation + 1, 0)
        if source in versions:
            index.remove(f"{source} {versions.pop(source)}")
        if version is not None:
            key = f"{source} {version}"
            index.add(key, (source, "t", str(version)), [])
            index.fill(key, source, [Stanza(LIST, source, stanza(source, version))], [f"/usr/{source}"])
            versions[source] = version
        index.refresh(LIST, [source])


def content(index: Index, compression: str) -> bytes:
    return b"".join(index.join(LIST, compression))


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index(tmp_path / "index.sqlite", tuple(COMPRESSIONS))


def test_any_order_of_publications_gives_what_the_packages_alone_give(index, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SOURCES_IN_CHUNK", 5)
    chosen, versions = random.Random(1), {}
    for number in range(400):
        source = f"source-{chosen.randrange(60)}"
        put(index, versions, source, None if chosen.random() < 0.3 else number)
    fresh = Index(tmp_path / "fresh.sqlite", tuple(COMPRESSIONS))
    again: dict[str, int] = {}
    for source in sorted(versions):
        put(fresh, again, source, versions[source])
    plain = b"".join(stanza(source, versions[source]) for source in sorted(versions))
    for compression in COMPRESSIONS:
        assert content(index, compression) == content(fresh, compression)
    assert content(index, "plain") == plain
    assert gzip.decompress(content(index, "gz")) == plain
    reader = zstandard.ZstdDecompressor().stream_reader(content(index, "zst"), read_across_frames=True)
    assert reader.read() == plain
    assert index.count(LIST) == len(versions)
    index.refresh(LIST, None)
    assert content(index, "gz") == content(fresh, "gz")


def test_an_empty_list_is_a_compressed_file_all_the_same(index):
    index.refresh(LIST, [])
    assert gzip.decompress(content(index, "gz")) == b""


def test_joined_chunks_are_at_most_five_percent_larger_than_the_whole(index):
    sources = [f"source-{number}" for number in range(5000)]
    with index.transaction():
        for source in sources:
            index.add(source, (source, "t", "1"), [])
            index.fill(source, source, [Stanza(LIST, source, stanza(source, 1))], [])
        index.refresh(LIST, None)
    plain = content(index, "plain")
    for compression in ("gz", "zst"):
        assert len(content(index, compression)) <= 1.05 * len(COMPRESSIONS[compression](plain))


def fail(index: Index) -> None:
    with index.transaction():
        index.begin(1, 0)
        raise ValueError("no")


def test_a_failed_transaction_leaves_nothing(index):
    with pytest.raises(ValueError, match="no"):
        fail(index)
    assert index.generation == 0


def test_source_packages_that_build_depend_on_a_name_are_found():
    deb = [
        b"Package: one\nBuild-Depends: debhelper (>= 13),\n libsmall-dev:native (>= 1) <!nocheck> | x\nVersion: 1\n",
        b"Package: two\nBuild-Depends-Indep: libsmall-dev-tools, y\n",
        b"Package: three\nBinary: libsmall-dev\n",
        b"Package: four\nBuild-Depends-Arch: z, libsmall-dev\n",
    ]
    assert closure.build_depending("deb", deb, {"libsmall-dev"}) == {"one", "four"}
    needs = b'<rpm:requires><rpm:entry name="pkgconfig(small)"/></rpm:requires>'
    rpm = [
        b"<name>one</name><arch>src</arch>" + needs,
        b"<name>two</name><arch>x86_64</arch>" + needs,
        b"<name>three</name><arch>src</arch><summary>pkgconfig(small)</summary>",
    ]
    assert closure.build_depending("rpm", rpm, {"pkgconfig(small)"}) == {"one"}
