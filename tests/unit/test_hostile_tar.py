"""What a sandbox hands back is a tar that a package may have written: reading it takes no more than it should."""

import io
import tarfile
import tempfile
from pathlib import Path

import pytest

from pkgci.errors import PackageError
from pkgci.sandbox import HEADER_BYTES, hostile_tar, unpack

MANY = 3000


def header(kind: bytes, size: int, name: str = "x") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def negative() -> bytes:
    """Return the header of a file with a size below zero."""
    made = bytearray(header(tarfile.REGTYPE, 0))
    made[124:136] = b"\xff" + (256**11 - 512).to_bytes(11, "big")
    made[148:156] = b" " * 8
    made[148:156] = b"%06o\0 " % sum(made[:512])
    return bytes(made)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_header_that_claims_to_be_huge_is_refused_unread(tmp_path: Path, kind: bytes):
    with tempfile.TemporaryFile() as archive:
        archive.write(header(kind, 1 << 30))
        archive.truncate((1 << 30) + 4096)
        archive.seek(0)
        with pytest.raises(PackageError, match="the build's output cannot be read: a header is too long"):
            list(unpack(archive, tmp_path, 8 << 30))
        assert archive.tell() < HEADER_BYTES


@pytest.mark.parametrize(
    "content",
    [
        (header(tarfile.XHDTYPE, 11) + b"11 a=bcdef\n".ljust(512, b"\0")) * MANY,
        # a map of a sparse file that goes on without end
        header(tarfile.GNUTYPE_SPARSE, 0)[:482] + b"\1" + bytes(29) + (bytes(504) + b"\1" + bytes(7)) * MANY,
        negative() + bytes(10240),
    ],
    ids=["chain", "sparse", "negative"],
)
def test_headers_without_end_are_the_packages_fault(tmp_path: Path, content: bytes):
    with pytest.raises(PackageError, match="the build's output cannot be read"):
        list(unpack(io.BytesIO(content), tmp_path, 8 << 30))


def test_names_of_any_length_and_sparse_files_are_read(tmp_path: Path):
    name = "/".join(["directory" * 20] * 10)
    archive = io.BytesIO()
    with tarfile.TarFile(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for one in ("small", name):
            info = tarfile.TarInfo(one)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    archive.seek(0)
    assert [path.read_bytes() for path in unpack(archive, tmp_path, 1 << 20)] == [b"abc", b"abc"]
    archive.seek(0)
    with hostile_tar(archive, "it") as read:
        assert [(member.name, read.extractfile(member).read()) for member in read] == [
            ("small", b"abc"),
            (name, b"abc"),
        ]
