"""`pkgci import`: what becomes of an unpacked tree, and what is refused before anything is prepared."""

import io
import re
import resource
import subprocess
import tarfile
from pathlib import Path

import pytest

from pkgci.config import Config
from pkgci.errors import PackageError, RequestError
from pkgci.importer import _commit, import_package

FILE, LINK, HARD, FIFO = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE


def commit(place: Path, members: list[tuple[str, bytes, str]]) -> Path:
    """Return a repository with a commit of a tar with these members: name, kind, content or where it leads."""
    with tarfile.TarFile(place / "tree.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "" if kind == FILE else content
            info.size = len(content) if kind == FILE else 0
            tar.addfile(info, io.BytesIO(content.encode()))
    made = place / "made"
    subprocess.run(["git", "init", "-q", "--template=", "-b", "main", made], check=True)
    _commit(made, place / "tree.tar", "Import it")
    return made


def test_files_and_links_are_committed_whatever_their_names(tmp_path: Path):
    made = commit(tmp_path, [("./d/a", FILE, "x\n"), ('./q"\\', FILE, ""), ("./long" + "g" * 150, LINK, "d/a")])
    assert (made / "d" / "a").read_text() == "x\n"
    assert (made / 'q"\\').read_text() == ""
    assert (made / ("long" + "g" * 150)).readlink() == Path("d/a")


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (("./.git/config", FILE, "x"), "not allowed in a tree"),
        (("./.GIT/config", FILE, "x"), "invalid path"),
        (("./git~1/config", FILE, "x"), "invalid path"),
        (("../a", FILE, "x"), "not allowed in a tree"),
        (("/a", FILE, "x"), "not allowed in a tree"),
        ((".", FILE, "x"), "not allowed in a tree"),
        (("a\nb", FILE, "x"), "not allowed in a tree"),
        (("a", HARD, "b"), "neither a file nor a symbolic link"),
        (("a", FIFO, ""), "neither a file nor a symbolic link"),
    ],
)
def test_what_does_not_belong_in_a_tree_is_the_packages_fault(tmp_path: Path, member: tuple, said: str):
    with pytest.raises(PackageError, match=f"cannot import .*{said}"):
        commit(tmp_path, [member])


def test_a_large_file_is_never_in_memory_as_a_whole(tmp_path: Path):
    size = 64 << 20
    with (tmp_path / "tree.tar").open("wb") as tar:
        info = tarfile.TarInfo("./large")
        info.size = size
        tar.write(info.tobuf(tarfile.GNU_FORMAT))
        tar.truncate(size + 10240)
    subprocess.run(["git", "init", "-q", "--template=", "-b", "main", tmp_path / "made"], check=True)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    (taken,) = re.findall(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    resource.setrlimit(resource.RLIMIT_DATA, ((int(taken) << 10) + size // 2, limits[1]))
    try:
        _commit(tmp_path / "made", tmp_path / "tree.tar", "Import it")
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    assert (tmp_path / "made" / "large").stat().st_size == size


def test_a_directory_whose_parent_is_missing_is_refused_before_anything_is_prepared(tmp_path: Path):
    (tmp_path / "small.dsc").write_text("")
    with pytest.raises(RequestError, match=f"{tmp_path}/missing is no directory; make it first"):
        import_package(Config(), tmp_path / "small.dsc", tmp_path / "missing" / "tree")


@pytest.mark.parametrize("content", ["Files: x\n", "Files:\n x\n", "", "nonsense\n"])
def test_a_dsc_that_names_no_files_is_refused(tmp_path: Path, content: str):
    (tmp_path / "small.dsc").write_text(content)
    with pytest.raises(RequestError, match=r"cannot import .*small\.dsc: it names no files"):
        import_package(Config(), tmp_path / "small.dsc", None)
