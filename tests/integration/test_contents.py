"""What is in real packages, with odd names, modes and scripts, and what a build changes against a former version."""

import io
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trees

from pkgci import repository
from pkgci.artifacts import Build, Contents, Former, Package, PackageContents
from pkgci.compile import compile
from pkgci.config import Limits
from pkgci.formats import base, contents
from pkgci.roots import build_root
from pkgci.sandbox import Files, execute
from pkgci.store import Store

DEB, RPM = "bookworm-amd64", "debianrpm-amd64"
ODD_DEB = r"""
override_dh_install:
	dh_install
	mkdir -p debian/small/opt/empty
	cd debian/small/opt && touch 'a "quoted" -> name' 'back\slash' "$$(printf '\377')" 'ünï'
	cd debian/small/opt && ln -s 'to -> where' link && echo x >one && ln one two

override_dh_fixperms:
	dh_fixperms
	chmod 4755 debian/small/usr/bin/small
"""
ODD_SPEC = """Name: small
Version: 1.0
Release: 1
Summary: Small package for tests
License: CC0-1.0
BuildArch: noarch
Source0: small-%{version}.tar.gz
Requires: bash >= 5
Recommends: nothing-such

%description
It holds one script.

%prep
%setup -q

%install
install -D -m 755 small %{buildroot}%{_bindir}/small
mkdir -p %{buildroot}/opt/odd
touch "%{buildroot}/opt/odd/it's 'so'" "%{buildroot}/opt/odd/ünï"
ln -s "to 'where'" %{buildroot}/opt/odd/link

%post
echo "it's 'installed'"

%preun -p <lua>
print("bye")

%triggerin -- bash
echo triggered

%files
%attr(4755, root, root) %{_bindir}/small
/opt/odd
"""


def build(place: Path, configuration, files: dict, target: str, **parameters: str) -> tuple[Build, Path]:
    """Build the tree `small` with these files; return the build and its artifacts."""
    if files:
        trees.commit(place / "small", files)
    artifacts = place / f"artifacts-{len(list(place.glob('artifacts-*')))}"
    artifacts.mkdir()
    given = trees.local(configuration, place / "small", **parameters)
    return compile(configuration, target, given, artifacts), artifacts


def inside(artifacts: Path) -> PackageContents:
    (package,) = Contents.read(artifacts / "contents.json").packages
    return package


def publish(configuration, target: str, made: Build) -> str:
    """Publish a build, and return where its repository.json is."""
    entry = Store(configuration).lookup(made.key)
    assert entry is not None
    written = repository.write(configuration, target, "former", [entry], datetime.now(UTC) + timedelta(days=1))
    return f"{written.url}repository.json"


def test_of_a_deb_with_odd_names_and_modes_and_of_a_hit_on_the_store(tmp_path: Path):
    configuration = trees.config(tmp_path)
    files = trees.deb() | {
        "debian/rules": trees.RULES + ODD_DEB,
        "debian/control": trees.CONTROL.format(name="small", depends="").replace(
            "\nDepends:", "\nProvides: tiny (= 1)\nConflicts: huge\nDepends: perl:any (>= 5) | bash,"
        ),
        "debian/postinst": "#!/bin/sh\nset -e\n# ünï\n#DEBHELPER#\n",
    }
    _, artifacts = build(tmp_path, configuration, files, DEB)
    package = inside(artifacts)
    modes = {file.path: file.mode for file in package.files}
    assert modes["/usr/bin/small"] == "-rwsr-xr-x"
    assert modes["/opt/empty"] == "drwxr-xr-x"
    names = {path.removeprefix("/opt/") for path in modes}
    assert names >= {'a "quoted" -> name', "back\\slash", "\N{REPLACEMENT CHARACTER}", "ünï"}
    targets = {file.path: file.target for file in package.files if file.target}
    assert targets["/opt/link"] == "to -> where"
    # of a file with two names one leads to the other
    assert targets.get("/opt/two", targets.get("/opt/one")) in ("./opt/one", "./opt/two")
    assert modes["/opt/one"] == modes["/opt/two"] == "-rw-r--r--"
    assert package.more_files == 0
    assert package.relations["Depends"] == ("perl:any (>= 5) | bash",)
    assert package.relations["Provides"] == ("tiny (= 1)",)
    assert package.scripts["postinst"].startswith("#!/bin/sh\nset -e\n# ünï")
    assert package.installed >= 1 << 10
    again, other = build(tmp_path, configuration, {}, DEB)
    assert again.origin == "store"
    assert (other / "contents.json").read_text() == (artifacts / "contents.json").read_text()
    assert again.seconds["contents"] < 1


def archive(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    """Return a tar with these members: contents of files, or what else they are."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, member in members.items():
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            info.size = len(member) if isinstance(member, bytes) else 0
            tar.addfile(info, io.BytesIO(member) if isinstance(member, bytes) else None)
    return stream.getvalue()


def deb_of(control: dict, data: dict) -> bytes:
    """Return a DEB package as no tool of Debian would make it (deb(5))."""
    parts = {"debian-binary": b"2.0\n", "control.tar": archive(control), "data.tar": archive(data)}
    made = b"!<arch>\n"
    for name, part in parts.items():
        made += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(part):<10}`\n".encode() + part + b"\n" * (len(part) % 2)
        )
    return made


def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


def test_of_a_deb_that_means_harm(tmp_path: Path):
    control = b"Package: small\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\nInstalled-Size: 1e99\n"
    depends = b"Depends: " + b"a" * 5000 + b", " + b", ".join(b"b%d" % number for number in range(9000)) + b"\n"
    scripts = {"preinst": special(tarfile.SYMTYPE, "/etc/shadow"), "prerm": special(tarfile.FIFOTYPE)}
    odd = {
        "./new\nline": b"x",
        "./\x1b[31m": b"x",
        "/absolute": b"x",
        "../above": b"x",
        "./" + "long/" * 900 + "x": b"x",
        "./device": special(tarfile.CHRTYPE),
        "./pipe": special(tarfile.FIFOTYPE),
        **{f"./many/{number}": b"" for number in range(12_000)},
    }
    package = deb_of({"control": control + depends, "postinst": b"true\n" * 50_000, **scripts}, odd)
    files = Files()
    files.add("/in/small.deb", package)
    with (tmp_path / "log").open("wb") as log:
        root = build_root(trees.config(tmp_path), DEB).path
        outcome = execute(
            root,
            base.script("deb-contents.sh"),
            arguments=("/in",),
            files=files,
            output=tmp_path,
            limits=Limits(),
            log_to=log,
        )
    assert outcome.status == 0, (tmp_path / "log").read_text()
    known = Package(name="small", version="1", architecture="all", file="small.deb", sha256="0" * 64)
    (found,) = contents.read("deb", tmp_path, [known, known.model_copy(update={"file": "missing.deb"})]).packages
    paths = {file.path: file.mode for file in found.files}
    assert {"/new\nline", "/\x1b[31m"} <= paths.keys()
    assert (paths["/device"][0], paths["/pipe"][0]) == ("c", "p")
    assert max(map(len, paths)) <= 4096
    assert "/absolute" in paths
    assert (len(paths), found.more_files) == (12_007, 0)
    assert found.installed == 0
    assert len(found.relations["Depends"]) == 2000
    assert max(map(len, found.relations["Depends"])) == 500
    assert list(found.scripts) == ["postinst"]
    assert found.scripts["postinst"].endswith("\n[cut after 64 KiB]")


def test_of_an_rpm_with_odd_names_and_modes(tmp_path: Path):
    configuration = trees.config(tmp_path)
    _, artifacts = build(tmp_path, configuration, trees.rpm() | {"rpm/small.spec": ODD_SPEC}, RPM)
    package = inside(artifacts)
    assert {file.path: (file.mode, file.target) for file in package.files} == {
        "/usr/bin/small": ("-rwsr-xr-x", None),
        "/opt/odd": ("drwxr-xr-x", None),
        "/opt/odd/it's 'so'": ("-rw-r--r--", None),
        "/opt/odd/ünï": ("-rw-r--r--", None),
        "/opt/odd/link": ("lrwxrwxrwx", "to 'where'"),
    }
    assert package.relations["Requires"][:1] == ("/bin/sh",)
    assert "bash >= 5" in package.relations["Requires"]
    assert package.relations["Recommends"] == ("nothing-such",)
    assert package.scripts["%post"] == "#!/bin/sh\necho \"it's 'installed'\""
    assert package.scripts["%preun"] == '#!<lua>\nprint("bye")'
    assert "triggerin scriptlet (using /bin/sh) -- bash\necho triggered" in package.scripts["triggers"]
    assert package.more_files == 0
    assert package.installed >= 21


def test_what_a_build_changes_against_the_former_version_in_a_repository(tmp_path: Path):
    configuration = trees.config(tmp_path)
    control = trees.CONTROL.format(name="small", depends="")
    deb = {
        "debian/control": control.replace("\nDepends:", "\nProvides: tiny (= ${binary:Version})\nDepends: bash,"),
        "debian/postinst": "#!/bin/sh\nset -e\ntrue\n",
    }
    spec = trees.SPEC.format(name="small", version="1.0", release="1", more="Requires: bash")
    spec = spec.replace("%files", "%post\ntrue\n\n%files")
    former = {
        target: build(tmp_path, configuration, trees.deb() | trees.rpm() | deb | {"rpm/small.spec": spec}, target)[0]
        for target in (DEB, RPM)
    }
    changed = {
        "small": "#!/bin/sh\necho small and larger\n",
        "debian/control": deb["debian/control"].replace("bash,", "perl,"),
        "debian/postinst": "#!/bin/sh\nset -e\nfalse || true\n",
        "debian/small.install": "small usr/bin\nsmall opt/small\n",
        "rpm/small.spec": spec.replace("Requires: bash", "Requires: perl")
        .replace("%post\ntrue", "%post\nfalse || true")
        .replace(
            "%{buildroot}%{_bindir}/small\n",
            "%{buildroot}%{_bindir}/small\ninstall -D small %{buildroot}/opt/small/small\n",
        )
        .replace("%files\n", "%files\n/opt/small/small\n"),
    }
    for target, script, field in ((DEB, "postinst", "Depends"), (RPM, "%post", "Requires")):
        url = publish(configuration, target, former[target])
        made, artifacts = build(tmp_path, configuration, changed, target, REPOSITORIES=url)
        (found,) = Former.read(artifacts / "former.json").packages
        assert (found.name, found.version, found.notice) == ("small", made.version, "")
        assert found.former_version == former[target].version
        assert url.startswith(found.repository)
        different = {(one.now or one.former).path: (one.former, one.now) for one in found.files}
        assert different["/opt/small/small"][0] is None
        assert [side.size for side in different["/usr/bin/small"]] == [21, 32]
        # nothing but what has changed: a package's own version, in what it provides, has not
        (relation,) = found.relations
        assert (relation.field, relation.removed, relation.added) == (field, ("bash",), ("perl",))
        assert "\n-true\n+false || true" in found.scripts[script]
        assert list(found.scripts) == [script]


def test_a_former_version_that_cannot_be_had_stops_nothing(tmp_path: Path):
    configuration = trees.config(tmp_path)
    made, artifacts = build(tmp_path, configuration, trees.deb(), DEB)
    assert not (artifacts / "former.json").exists()
    url = publish(configuration, DEB, made)
    (pool,) = (configuration.data / "repositories").rglob("*.deb")
    pool.unlink()
    _, artifacts = build(tmp_path, configuration, {"small": "#!/bin/sh\necho other\n"}, DEB, REPOSITORIES=url)
    (found,) = Former.read(artifacts / "former.json").packages
    assert found.notice.startswith("not compared: there is nothing at http://127.0.0.1:")
    assert found.files == ()


@pytest.mark.parametrize("target", [DEB, RPM])
def test_the_very_same_package_in_a_repository_is_no_former_version(tmp_path: Path, target: str):
    configuration = trees.config(tmp_path)
    made, _ = build(tmp_path, configuration, trees.deb() | trees.rpm(), target)
    url = publish(configuration, target, made)
    again, artifacts = build(tmp_path, configuration, {}, target, REPOSITORIES=url)
    assert again.packages == made.packages
    assert not (artifacts / "former.json").exists()
