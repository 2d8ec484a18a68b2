"""`pkgci import`: source packages, made by the formats' own tools, become git trees that build."""

import subprocess
from pathlib import Path

import pytest
import trees

from pkgci.compile import compile
from pkgci.config import Config
from pkgci.errors import PackageError, RequestError
from pkgci.importer import import_package

PATCH = """--- a/small
+++ b/small
@@ -1,2 +1,3 @@
 #!/bin/sh
 echo small
+echo patched
"""


def run(*command: str | Path, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True)


@pytest.fixture
def dsc(tmp_path: Path) -> Path:
    """A quilt source package with a patch, an executable, a symbolic link and a name with a quote."""
    top = tmp_path / "small-1.0"
    trees.write(top, {"small": "#!/bin/sh\necho small\n", 'a "quoted" name': "x\n"})
    (top / "link").symlink_to("small")
    run("tar", "-czf", "small_1.0.orig.tar.gz", "small-1.0", cwd=tmp_path)
    packaging = {name: text for name, text in trees.deb().items() if name.startswith("debian/")}
    packaging |= {"debian/source/format": "3.0 (quilt)\n", "debian/patches/series": "add.patch\n"}
    trees.write(top, packaging | {"debian/patches/add.patch": PATCH})
    run("dpkg-source", "-b", "small-1.0", cwd=tmp_path)
    return tmp_path / "small_1.0-1.dsc"


@pytest.fixture
def srpm(tmp_path: Path) -> Path:
    """A source package with a patch and a second source."""
    sources = tmp_path / "rpm" / "SOURCES"
    trees.write(tmp_path / "small-1.0", {"small": "#!/bin/sh\necho small\n"})
    trees.write(sources, {"add.patch": PATCH, "extra.conf": "extra\n"})
    run("tar", "-czf", sources / "small-1.0.tar.gz", "small-1.0", cwd=tmp_path)
    spec = trees.rpm(more="Source1: extra.conf\nPatch0: add.patch\n")["rpm/small.spec"]
    trees.write(tmp_path, {"small.spec": spec.replace("%setup -q", "%autosetup -p1")})
    run(
        "rpmbuild",
        "-bs",
        "--nodeps",
        "-D",
        f"_topdir {tmp_path / 'rpm'}",
        "-D",
        "dist %{nil}",
        "small.spec",
        cwd=tmp_path,
    )
    return tmp_path / "rpm" / "SRPMS" / "small-1.0-1.src.rpm"


def test_a_dsc_becomes_a_clean_tree_with_its_patches_applied(dsc: Path, tmp_path: Path):
    made = import_package(Config(), dsc, tmp_path / "tree")
    assert (made / "small").read_text().endswith("echo patched\n")
    assert (made / "link").is_symlink()
    assert (made / "small").stat().st_mode & 0o100
    assert (made / 'a "quoted" name').read_text() == "x\n"
    assert not (made / ".pc").exists()
    assert trees.git(made, "status", "--short") == ""
    assert trees.git(made, "log", "--format=%s") == "Import small 1.0-1"


def test_a_source_rpm_becomes_a_tree_that_builds_with_its_patches_applied(srpm: Path, tmp_path: Path):
    made = import_package(Config(), srpm, tmp_path / "small")
    assert (made / "small").read_text().endswith("echo patched\n")
    assert "Patch0" not in (made / "rpm/small.spec").read_text()
    assert (made / "rpm/extra.conf").read_text() == "extra\n"
    assert sorted(path.name for path in (made / "rpm").iterdir()) == ["extra.conf", "small.spec"]
    place = tmp_path / "place"
    configuration = trees.config(place)
    (place / "artifacts").mkdir()
    parameters = trees.local(configuration, made)
    assert compile(configuration, "debianrpm-amd64", parameters, place / "artifacts").packages[0].name == "small"


@pytest.mark.parametrize("name", ["missing.dsc", "small.deb", "small.rpm"])
def test_what_is_no_source_package_is_refused(tmp_path: Path, name: str):
    if name != "missing.dsc":
        (tmp_path / name).write_text("x")
    with pytest.raises(RequestError, match="must be an existing"):
        import_package(Config(), tmp_path / name, None)


def test_an_existing_directory_is_left_alone(dsc: Path, tmp_path: Path):
    (tmp_path / "tree").mkdir()
    with pytest.raises(RequestError, match="exists already"):
        import_package(Config(), dsc, tmp_path / "tree")


def test_a_dsc_without_its_files_says_which(dsc: Path, tmp_path: Path):
    (tmp_path / "small_1.0.orig.tar.gz").unlink()
    with pytest.raises(RequestError, match=r"small_1\.0\.orig\.tar\.gz must lie beside it"):
        import_package(Config(), dsc, tmp_path / "tree")


@pytest.mark.parametrize("content", ["", "nonsense\n", "Format: 3.0 (quilt)\nFiles:\n 0 0 ../../etc/passwd\n"])
def test_a_broken_dsc_is_refused_and_leaves_nothing(tmp_path: Path, content: str):
    broken = tmp_path / "broken.dsc"
    broken.write_text(content)
    with pytest.raises((RequestError, PackageError)):
        import_package(Config(), broken, tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
