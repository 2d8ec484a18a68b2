"""Builds of tiny real packages in the sandbox: what becomes of good and of bad input, versions, and the store."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trees

from pkgci.artifacts import Build
from pkgci.compile import compile
from pkgci.errors import InfrastructureError, PackageError, RequestError
from pkgci.formats import deb, rpm
from pkgci.roots import build_root
from pkgci.store import Store

DEB, RPM = "bookworm-amd64", "debianrpm-amd64"
PATCH = """--- a/small
+++ b/small
@@ -1,2 +1,3 @@
 #!/bin/sh
 echo small
+echo patched
"""
C_PROGRAM = {
    "hello.c": '#include <stdio.h>\nint main(void) { puts("hello " __FILE__); return 0; }\n',
    "Makefile": "all:\n\t$(CC) $(CFLAGS) $(CPPFLAGS) $(LDFLAGS) -o small hello.c\n",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path


def build(place: Path, files: dict, target: str, configuration=None, **parameters: str) -> Build:
    """Commit `files` in the tree `small` and build it."""
    trees.commit(place / "small", files)
    configuration = configuration or trees.config(place)
    artifacts = place / "artifacts"
    artifacts.mkdir(exist_ok=True)
    return compile(configuration, target, trees.local(configuration, place / "small", **parameters), artifacts)


def entry(configuration, made: Build) -> Path:
    found = Store(configuration).lookup(made.key)
    assert found is not None
    return found.directory


def content(directory: Path, file: str) -> str:
    """Return the list of files in a built package."""
    tool = ["dpkg-deb", "-c"] if file.endswith(".deb") else ["rpm", "-qpl", "--nosignature"]
    return subprocess.run([*tool, directory / file], check=True, capture_output=True, text=True).stdout


def names(made: Build) -> list[str]:
    return sorted(package.file for package in made.packages)


def test_a_native_deb(place: Path):
    configuration = trees.config(place)
    made = build(place, trees.deb(version="1.0"), DEB, configuration)
    tree = made.source_tree[:8]
    assert names(made) == [f"small_1.0+pkg1.1~t{tree}+deb12_all.deb"]
    files = {file.name for file in made.files}
    assert f"small_1.0+pkg1.1~t{tree}+deb12.tar.xz" in files
    assert {Path(name).suffix for name in files} >= {".dsc", ".buildinfo", ".changes", ".deb"}
    assert "./usr/bin/small" in content(entry(configuration, made), names(made)[0])


@pytest.mark.parametrize("applied", [False, True])
def test_a_quilt_deb_is_the_same_whether_git_holds_its_patches_applied_or_not(place: Path, applied: bool):
    configuration = trees.config(place)
    files = trees.deb() | {
        "debian/source/format": "3.0 (quilt)\n",
        "debian/patches/series": "# a comment\nadd.patch -p1\n",
        "debian/patches/add.patch": PATCH,
    }
    if applied:
        files["small"] += "echo patched\n"
    made = build(place, files, DEB, configuration)
    directory = entry(configuration, made)
    unpacked = place / "unpacked"
    subprocess.run(["dpkg-deb", "-x", directory / names(made)[0], unpacked], check=True)
    assert (unpacked / "usr/bin/small").read_text() == "#!/bin/sh\necho small\necho patched\n"
    orig = next(directory.glob("*.orig.tar.xz"))
    listed = subprocess.run(["tar", "-xOf", orig, "--wildcards", "*/small"], check=True, capture_output=True, text=True)
    assert "patched" not in listed.stdout


def test_several_binary_packages_with_an_epoch_and_arch_all(place: Path):
    files = trees.deb(version="2:1.0-1") | C_PROGRAM
    files["debian/control"] += "\nPackage: small-bin\nArchitecture: any\nDepends: ${misc:Depends}, ${shlibs:Depends}\n"
    files["debian/control"] += "Description: the other package\n It holds one program.\n"
    files["debian/small.install"] = "debian/rules usr/share/small\n"
    files["debian/small-bin.install"] = "small usr/bin\n"
    del files["small"]
    made = build(place, files, DEB)
    suffix = f"1.0+pkg1.1~t{made.source_tree[:8]}-1+deb12"
    assert made.version == f"2:{suffix}"
    assert names(made) == [
        f"small-bin-dbgsym_{suffix}_amd64.deb",
        f"small-bin_{suffix}_amd64.deb",
        f"small_{suffix}_all.deb",
    ]
    assert {package.name: package.kind for package in made.packages}["small-bin-dbgsym"] == "debug"


def test_a_deb_has_the_same_bits_as_sbuilds(place: Path):
    configuration = trees.config(place)
    files = trees.deb() | C_PROGRAM
    files["debian/control"] = files["debian/control"].replace("Architecture: all", "Architecture: any")
    del files["small"]
    made = build(place, files, DEB, configuration)
    directory = entry(configuration, made)
    output = place / "sbuild"
    output.mkdir()
    source = next(directory.glob("*.dsc"))
    command = ["sbuild", "--chroot-mode=unshare", f"--chroot={build_root(configuration, DEB).path}", "--dist=bookworm"]
    command += ["--arch-any", "--arch-all", "--no-run-lintian", "--no-run-piuparts", "--no-run-autopkgtest"]
    command += ["--no-apt-update", "--no-apt-upgrade", "--no-apt-distupgrade", "--bd-uninstallable-explainer=none"]
    done = subprocess.run([*command, source], cwd=output, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    theirs = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("*.deb")}
    assert theirs == {package.file: package.sha256 for package in made.packages}


@pytest.mark.parametrize("target", [DEB, RPM])
def test_the_same_input_gives_the_same_bits_twice_with_one_processor_or_more(place: Path, target: str):
    files = trees.deb() | trees.rpm()
    made, processors = [], os.sched_getaffinity(0)
    for name, used in (("one", processors), ("two", {min(processors)})):
        # the second build happens in a state of its own, so that the store does not answer for it
        (place / name).mkdir()
        os.sched_setaffinity(0, used)
        try:
            made.append(build(place / name, files, target))
        finally:
            os.sched_setaffinity(0, processors)
    assert [one.origin for one in made] == ["built", "built"]
    bits = [{file.name: file.sha256 for file in one.files if file.name != "index.packages"} for one in made]
    if target == DEB:
        # a buildinfo names the time of the build and the number of processors, and a .changes names the buildinfo; neither
        # is published
        bits = [
            {name: sha for name, sha in one.items() if not name.endswith((".buildinfo", ".changes"))} for one in bits
        ]
    assert bits[0] == bits[1]


def test_an_rpm_with_several_sources_and_patches(place: Path):
    configuration = trees.config(place)
    more = "Source1: extra.conf\nPatch0: add.patch\n"
    files = trees.rpm(more=more) | {"rpm/extra.conf": "extra\n", "rpm/add.patch": PATCH}
    spec = files["rpm/small.spec"].replace("%setup -q", "%autosetup -p1")
    files["rpm/small.spec"] = spec.replace(
        "%files", "install -D -m 644 %{SOURCE1} %{buildroot}/etc/extra.conf\n\n%files\n/etc/extra.conf"
    )
    made = build(place, files, RPM, configuration)
    assert names(made) == [f"small-1.0-1.pkg1.1~t{made.source_tree[:8]}.drpm.noarch.rpm"]
    directory = entry(configuration, made)
    assert "/etc/extra.conf" in content(directory, names(made)[0])
    source = next(directory.glob("*.src.rpm"))
    assert {"add.patch", "extra.conf", "small-1.0.tar.gz", "small.spec"} <= set(
        content(source.parent, source.name).split()
    )


def test_release_without_dist_gets_the_suffix_too(place: Path):
    made = build(place, trees.rpm(release="3"), RPM)
    assert made.version == f"1.0-3.pkg1.1~t{made.source_tree[:8]}.drpm"
    assert made.packages[0].version == made.version


def test_a_missing_build_requirement_fails_and_is_named(place: Path):
    with pytest.raises(PackageError, match="no-such-package"):
        build(place, trees.rpm(more="BuildRequires: no-such-package\n"), RPM)


@pytest.mark.parametrize("requirement", ["http://127.0.0.1:1/evil.rpm", "/etc/pki/evil.rpm"])
def test_a_build_requirement_that_is_a_url_or_a_file_is_refused(place: Path, requirement: str):
    with pytest.raises(PackageError, match="is no name of a capability"):
        build(place, trees.rpm(more=f"BuildRequires: {requirement}\n"), RPM)


def test_what_a_build_leaves_beside_its_packages_is_nobodys(place: Path):
    files = trees.deb()
    files["debian/rules"] += (
        "\noverride_dh_builddeb:\n\tdh_builddeb\n\techo x >../index.html; echo x >../repository.json\n"
    )
    made = build(place, files, DEB)
    assert not {"index.html", "repository.json"} & {file.name for file in made.files}


def test_an_unknown_build_dependency_fails_and_is_named(place: Path):
    with pytest.raises(PackageError, match="no-such-package"):
        build(place, trees.deb(depends=", no-such-package"), DEB)


def test_a_build_dependency_is_installed_from_upstream(place: Path):
    files = trees.deb(depends=", sl")
    files["debian/rules"] += "\noverride_dh_auto_build:\n\ttest -x /usr/games/sl\n"
    assert build(place, files, DEB).origin == "built"


def test_what_a_spec_runs_when_it_is_read_runs_in_the_sandbox_only(place: Path):
    witness = place / "witness"
    files = trees.rpm(version=f"%(touch {witness}; echo 1.0)")
    made = build(place, files, RPM)
    assert made.version.startswith("1.0-1.")
    assert not witness.exists()


@pytest.mark.parametrize("target", [DEB, RPM])
def test_the_same_input_again_comes_from_the_store(place: Path, target: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    configuration = trees.config(place)
    files = trees.deb() | trees.rpm()
    first = build(place, files, target, configuration)
    # a new patch set with the same tree, and as many commits
    trees.git(place / "small", "commit", "-q", "--amend", "-m", "Say it better")
    again = compile(configuration, target, trees.local(configuration, place / "small"), place / "artifacts")
    assert (first.origin, again.origin) == ("built", "store")
    assert again.key == first.key
    assert again.packages == first.packages
    assert "taken from the store" in caplog.text


def test_two_processes_at_once_build_once(place: Path):
    configuration = trees.config(place)
    trees.commit(place / "small", trees.deb())
    trees.local(configuration, place / "small")
    program = """
import logging, sys
from pathlib import Path
import trees
from pkgci.compile import compile
from pkgci.config import Config
place = Path(sys.argv[1])
artifacts = place / sys.argv[2]
artifacts.mkdir()
configuration = Config(place / "etc")
made = compile(configuration, "bookworm-amd64", trees.local(configuration, place / "small"), artifacts)
print("origin", made.origin)
"""
    command = [sys.executable, "-c", program, str(place)]
    environment = {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(Path.home()),
    }
    running = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True, env=environment) for name in ("a", "b")
    ]
    said = [process.communicate()[0].splitlines()[-1] for process in running]
    assert sorted(said) == ["origin built", "origin store"]


def test_an_entry_with_a_flipped_byte_is_built_again(place: Path):
    configuration = trees.config(place)
    first = build(place, trees.deb(), DEB, configuration)
    file = entry(configuration, first) / names(first)[0]
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    again = compile(configuration, DEB, trees.local(configuration, place / "small"), place / "artifacts")
    assert again.origin == "built"
    assert again.packages == first.packages


def test_a_failed_build_leaves_no_entry_and_says_why(place: Path):
    files = trees.deb()
    files["debian/rules"] += "\noverride_dh_auto_build:\n\techo boom >&2; exit 7\n"
    configuration = trees.config(place)
    with pytest.raises(PackageError, match=r"small: the build failed: .*rror"):
        build(place, files, DEB, configuration)
    assert list((configuration.data / "store").glob("??/*")) == []
    assert "boom" in (place / "artifacts" / "logs" / "build.log").read_text()


def test_a_build_that_hangs_ends_at_its_time_limit(place: Path):
    files = trees.deb()
    files["debian/rules"] += "\noverride_dh_auto_build:\n\tsleep 1000\n"
    limits = {"small": {"source": "small", "limits": {"seconds": 20}}}
    with pytest.raises(PackageError, match="no end after 20 s"):
        build(place, files, DEB, trees.config(place, packages=limits))


def test_a_build_that_tries_the_network_or_writes_outside_its_tree_fails(place: Path):
    files = trees.deb()
    tries = [
        "! getent hosts localhost.localdomain.invalid",
        "! bash -c 'exec 3<>/dev/tcp/10.0.2.2/80'",
        "! touch /usr/bin/outside",
        "! touch /etc/outside",
        "! rm /bin/ls",
        "! su -c true",
        "! mount -t tmpfs none /mnt",
        "! unshare -U -r true",
    ]
    files["debian/rules"] += "\noverride_dh_auto_build:\n" + "".join(f"\t{one}\n" for one in tries)
    assert build(place, files, DEB).origin == "built"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"debian/changelog": "nonsense\n"}, "small: cannot read its packaging: .*changelog"),
        ({"debian/changelog": ""}, "small: cannot read its packaging: .*changelog"),
        ({"debian/control": "Nonsense\n"}, "small: cannot read its packaging: .*control"),
        ({"debian/control": trees.CONTROL.format(name="other", depends="")}, "names the source other"),
        (
            {
                "debian/source/format": "3.0 (quilt)\n",
                "debian/patches/series": "p\n",
                "debian/patches/p": "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n",
            },
            "the source package cannot be made",
        ),
    ],
)
def test_broken_debian_packaging_is_the_packages_fault(place: Path, change: dict, said: str):
    with pytest.raises(PackageError, match=said):
        build(place, trees.deb() | change, DEB)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rpm/small.spec": "Name: small\n"}, r"cannot read rpm/small.spec: .*error"),
        ({"rpm/small.spec": "%{lua: error('x')}\n"}, r"cannot read rpm/small.spec"),
        ({"rpm/small.spec": trees.rpm(release="%autorelease")["rpm/small.spec"]}, "autorelease"),
        (
            {"rpm/small.spec": trees.rpm(more="Source1: gone.conf\n")["rpm/small.spec"]},
            "gone.conf is not in the packaging",
        ),
        (
            {"rpm/small.spec": trees.rpm(more="Patch0: gone.patch\n")["rpm/small.spec"]},
            "gone.patch is not in the packaging",
        ),
        ({"rpm/other.spec": "", "rpm/third.spec": "", "rpm/small.spec": None}, "several specs"),
    ],
)
def test_a_broken_spec_is_the_packages_fault(place: Path, change: dict, said: str):
    files = {name: text for name, text in (trees.rpm() | change).items() if text is not None}
    with pytest.raises(PackageError, match=said):
        build(place, files, RPM)


def test_other_trees_than_those_asked_for_are_refused(place: Path):
    with pytest.raises(InfrastructureError, match="moved since"):
        build(place, trees.deb(), DEB, SOURCE_TREE="0" * 40)


def test_a_project_that_nobody_knows_is_refused(place: Path):
    trees.commit(place / "small", trees.deb())
    configuration = trees.config(place, sources=[f"file://{place}/"])
    parameters = trees.local(configuration, place / "small", ZUUL_URL=f"file://{place}")
    (place / "artifacts").mkdir()
    with pytest.raises(RequestError, match="unknown project small"):
        compile(configuration, DEB, parameters, place / "artifacts")


@pytest.mark.parametrize(
    ("target", "format", "files"),
    [
        (DEB, deb, trees.deb(version="1:1.0-1")),
        (DEB, deb, trees.deb(version="1.0")),
        (RPM, rpm, trees.rpm(more="Epoch: 1\n")),
    ],
    ids=["epoch", "native", "rpm"],
)
def test_versions_grow_from_check_to_gate_to_the_next_change(place: Path, target: str, format, files: dict):
    configuration = trees.config(place)
    check = build(place, files, target, configuration).version
    gate = build(place, {}, target, configuration, RUN_TESTS="false").version
    # the same tree with one more commit, then with another base version
    after = build(place, {"more": "1"}, target, configuration).version
    assert format.newer(gate, check)
    assert not format.newer(check, gate)
    assert format.newer(after, gate)


def test_the_suffix_sorts_above_the_distributions_own(place: Path):
    made = build(place, trees.deb(), DEB, RUN_TESTS="false").version
    assert all(deb.newer(made, theirs) for theirs in ("1.0-1", "1.0-1+b1", "1.0-1+deb12u1"))
    assert deb.newer("1.1-1", made)
    assert deb.newer("1.0.1-1", made)
    made = build(place / "rpm", trees.rpm(), RPM, RUN_TESTS="false").version
    assert all(rpm.newer(made, theirs) for theirs in ("1.0-1", "1.0-1.el9", "1.0-1.el9_2.1", "1.0-1.fc40"))
    assert rpm.newer("1.0-2.el9", made)
    assert rpm.newer("1.1-1", made)


def test_a_pair_is_built_from_both_and_counts_the_commits_of_both(place: Path):
    packages = {"small": {"source": "small", "packaging": "small-packaging"}}
    configuration = trees.config(place, packages, gerrit=f"file://{place}/")
    files = trees.deb()
    trees.commit(place / "small-packaging", {name: text for name, text in files.items() if name.startswith("debian/")})
    trees.commit(place / "small-packaging", {"debian/README.source": "x\n"})
    made = build(place, {"small": files["small"]}, DEB, configuration, RUN_TESTS="false")
    assert made.version == "1.0+pkg1.3-1+deb12"
    assert made.source_tree != made.packaging_tree
    assert "./usr/bin/small" in content(entry(configuration, made), names(made)[0])


def test_a_version_below_the_branchs_is_refused(place: Path):
    configuration = trees.config(place)
    trees.commit(place / "small", trees.deb(version="2.0-1"))
    trees.git(place / "small", "checkout", "-q", "-b", "change")
    trees.commit(place / "small", trees.deb(version="1.0-1"))
    trees.git(place / "small", "update-ref", "refs/changes/1/base", "main")
    trees.git(place / "small", "update-ref", "refs/changes/1/change", "change")
    parameters = trees.local(configuration, place / "small", ZUUL_REF="refs/changes/1/change")
    (place / "artifacts").mkdir()
    with pytest.raises(PackageError, match=r"version 1\.0-1 is below 2\.0-1"):
        compile(configuration, DEB, parameters, place / "artifacts")
