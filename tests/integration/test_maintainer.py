"""What a maintainer has on their own machine beyond a check: a shell in a failed build, chosen steps, profiles, comparison."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import terminal
import trees

from pkgci import failed
from pkgci.artifacts import Build
from pkgci.change import Change
from pkgci.compile import compile
from pkgci.config import Config
from pkgci.engines.base import BuildRef
from pkgci.engines.local import LocalEngine
from pkgci.errors import PackageError, RequestError
from pkgci.publish import publish
from pkgci.store import Store

PKGCI = Path(sys.executable).with_name("pkgci")
DEB, RPM = "bookworm-amd64", "debianrpm-amd64"
OWN = BuildRef("compile-by-hand", 7)


def environment(configuration: Config) -> dict[str, str]:
    return {**os.environ, "PKGCI_CONFIG": str(configuration.directory), "TERM": "dumb"}


def pkgci(configuration: Config, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command as a person does, without a terminal."""
    command = [PKGCI, *arguments]
    return subprocess.run(command, env=environment(configuration), capture_output=True, text=True, check=False)


def build(place: Path, files: dict, target: str, configuration: Config | None = None, **parameters: str) -> Build:
    """Commit `files` in the tree `small` and build it."""
    trees.commit(place / "small", files)
    configuration = configuration or trees.config(place)
    (place / "artifacts").mkdir(exist_ok=True)
    given = trees.local(configuration, place / "small", **parameters)
    return compile(configuration, target, given, place / "artifacts", OWN)


def failing() -> dict[str, str]:
    """Return the files of a package whose build fails in both formats, after it has left something."""
    files = trees.deb() | trees.rpm()
    files["debian/rules"] += "\noverride_dh_auto_build:\n\techo half >made\n\techo boom >&2; exit 7\n"
    files["rpm/small.spec"] = files["rpm/small.spec"].replace(
        "%install\n", "%build\necho half >made\nexit 7\n%install\n"
    )
    return files


def with_tests() -> dict[str, str]:
    """Return the files of a package whose tests fail, and need what is nowhere, in both formats."""
    files = trees.deb(depends=", no-such-package <!nocheck>")
    files["debian/rules"] += (
        "\noverride_dh_auto_test:\nifeq (,$(filter nocheck,$(DEB_BUILD_OPTIONS)))\n\texit 7\nendif\n"
    )
    more = "%bcond_without check\n%if %{with check}\nBuildRequires: no-such-package\n%endif\n"
    files |= trees.rpm(more=more)
    files["rpm/small.spec"] = files["rpm/small.spec"].replace("%files\n", "%check\nexit 7\n\n%files\n")
    return files


def documented() -> dict[str, str]:
    """Return the files of a package with documentation that a build without it leaves out, in both formats."""
    files = trees.deb()
    files["debian/rules"] += (
        "\nexecute_after_dh_install:\n"
        "ifeq (,$(filter nodoc,$(DEB_BUILD_OPTIONS) $(DEB_BUILD_PROFILES)))\n"
        "\tinstall -D -m 644 debian/changelog debian/small/usr/share/small/manual\nendif\n"
    )
    files |= trees.rpm(more="%bcond_without doc\n%bcond_with pkg_small_extra\n")
    spec = files["rpm/small.spec"]
    for condition, file in (("doc", "manual"), ("pkg_small_extra", "extra")):
        path = f"%{{_datadir}}/small/{file}"
        install = f"%if %{{with {condition}}}\ninstall -D -m 644 small %{{buildroot}}{path}\n%endif\n"
        spec = spec.replace("%files\n", f"{install}\n%files\n%if %{{with {condition}}}\n{path}\n%endif\n")
    files["rpm/small.spec"] = spec
    return files


def content(configuration: Config, made: Build) -> str:
    """Return the list of files in the package of a build."""
    found = Store(configuration).lookup(made.key)
    assert found is not None
    [file] = [found.directory / package.file for package in made.packages]
    tool = ["dpkg-deb", "-c"] if file.suffix == ".deb" else ["rpm", "-qpl", "--nosignature"]
    return subprocess.run([*tool, file], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, str]:
    """A check of a package that fails for both targets: its configuration, and what was said."""
    place = tmp_path_factory.mktemp("broken")
    trees.commit(place / "small", failing())
    configuration = trees.config(place)
    done = pkgci(configuration, "check", "--only", "compile", place / "small")
    assert done.returncode == 1, done.stdout + done.stderr
    return configuration, done.stdout


def test_a_failed_check_says_how_to_get_a_shell(broken: tuple[Config, str]):
    for target in (DEB, RPM):
        assert f"a shell in its root: pkgci shell compile-{target}/1" in broken[1]


@pytest.mark.parametrize(
    ("target", "directory", "variable", "command"),
    [
        (DEB, "/build/small-1.0+pkg1.1~t", "DEB_BUILD_OPTIONS='parallel=", "dpkg-buildpackage -us -uc -b -rfakeroot"),
        (
            RPM,
            "/build/rpm/BUILD/small-1.0",
            "RPM_BUILD_NCPUS=",
            "rpmbuild --rebuild --nosignature /build/rpm/SRPMS/small-",
        ),
    ],
)
def test_the_shell_is_where_the_build_was_and_repeats_its_command(
    broken: tuple[Config, str], target: str, directory: str, variable: str, command: str
):
    lines = ["id -un; pwd; cat made; tty; stty size", "export -p | grep -v LC_", "sleep 100 &", "jobs; kill %1"]
    lines += ["touch made.again; $(cat /pkgci/command) 2>&1 | tail -n 3", "exit 3"]
    status, said = terminal.session([PKGCI, "shell", target], lines, environment(broken[0]))
    assert status == 0, said
    assert said.startswith(f"compile-{target}/1: small: the build failed: ")
    assert f"It failed at: {command}" in said
    assert re.search(r"^builder$", said, re.MULTILINE)
    assert re.search(rf"^{re.escape(directory)}.*\nhalf\n/dev/console\n33 111$", said, re.MULTILINE), said
    assert variable.replace("'", '"') in said
    assert "SOURCE_DATE_EPOCH=" in said
    assert "Running" in said
    assert "no job control" not in said
    assert re.search(r"exit status 2|Bad exit status", said)


def test_the_shell_has_no_network_and_what_is_done_in_it_stays_in_it(broken: tuple[Config, str]):
    lines = ["id -un; ls /witness; grep -c : /proc/net/dev; touch /witness", "exit"]
    for _ in range(2):
        status, said = terminal.session([PKGCI, "shell", f"build-{DEB}/1", "--root"], lines, environment(broken[0]))
        assert status == 0, said
        assert re.search(r"^root\n.*cannot access '/witness'.*\n1$", said, re.MULTILINE), said


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (
            "1",
            rf"several builds have the number 1: compile-{DEB}/1, compile-{RPM}/1|several .*{RPM}/1, compile-{DEB}/1",
        ),
        ("9", rf"no root is kept of a build '9'; roots are kept of: .*compile-{DEB}/1 \(small\)"),
        (f"compile-{DEB}/9", f"there is no build compile-{DEB}/9"),
        (f"build-{DEB}/0", f"there is no build build-{DEB}/0"),
        ("/", "names no build"),
        (f"compile-{DEB}/1", "a shell needs a terminal"),
    ],
)
def test_a_build_of_which_no_root_is_kept_is_one_line_and_exit_2(broken: tuple[Config, str], wanted: str, said: str):
    done = pkgci(broken[0], "shell", wanted)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert re.search(said, done.stderr)


def test_only_the_steps_asked_for_run_with_what_they_need(tmp_path: Path):
    trees.commit(tmp_path / "small", trees.deb())
    configuration = trees.config(tmp_path)
    done = pkgci(configuration, "check", "--only", "compile,lint", tmp_path / "small")
    assert done.returncode == 0, done.stdout + done.stderr
    engine = LocalEngine(configuration)
    ran = {job.removesuffix(f"-{DEB}") for job in engine.jobs() if engine.builds(job)}
    assert ran == {"build", "compile", "lint"}
    done = pkgci(configuration, "shell", f"compile-{DEB}/1")
    assert done.returncode == 2
    assert f"compile-{DEB}/1 has passed: only a failed build leaves its root" in done.stderr


def test_without_being_asked_a_build_leaves_no_root(tmp_path: Path):
    configuration = trees.config(tmp_path)
    with pytest.raises(PackageError):
        build(tmp_path, failing(), DEB, configuration)
    assert failed.roots(configuration).all() == []


def test_a_build_that_reaches_the_packages_time_limit_leaves_its_root(tmp_path: Path):
    files = trees.deb()
    files["debian/rules"] += "\noverride_dh_auto_build:\n\tsetsid sleep 1000 & sleep 1000\n"
    entry = {"source": "small", "limits": {"seconds": 30}}
    configuration = trees.config(tmp_path, packages={"small": entry}, limits={"disk_mib": 4000})
    with pytest.raises(PackageError, match="no end after 30 s, its time limit; killed"):
        build(tmp_path, files, DEB, configuration, KEEP_ROOT="true")
    [(directory, kept)] = failed.roots(configuration).all()
    assert (str(kept), kept.package) == ("compile-by-hand/7", "small")
    assert (kept.limits.seconds, kept.limits.disk_mib) == (30, 4000)
    listed = subprocess.run(
        ["tar", "--zstd", "-tf", directory / failed.ROOT], check=True, capture_output=True, text=True
    )
    assert re.search(r"^\./build/small-[^/]*/debian/rules$", listed.stdout, re.MULTILINE)


def test_nocheck_runs_no_tests_and_needs_nothing_for_them(tmp_path: Path):
    trees.commit(tmp_path / "small", with_tests())
    configuration = trees.config(tmp_path)
    done = pkgci(configuration, "check", "--only", "compile", tmp_path / "small")
    assert done.returncode == 1
    assert done.stdout.count("no-such-package") >= 2, done.stdout
    done = pkgci(configuration, "check", "--only", "compile", "--nocheck", tmp_path / "small")
    assert done.returncode == 0, done.stdout + done.stderr
    for target in (DEB, RPM):
        archive = LocalEngine(configuration).directory(BuildRef(f"compile-{target}", 2)) / "archive" / "artifacts"
        made = Build.read(archive / "build.json")
        assert made.profiles == ("nocheck",)
        assert "~partial" in made.version


@pytest.mark.parametrize("target", [DEB, RPM])
def test_a_build_with_profiles_is_another_build_and_never_has_a_released_version(tmp_path: Path, target: str):
    configuration = trees.config(tmp_path)
    full = build(tmp_path, documented(), target, configuration)
    without = build(tmp_path, {}, target, configuration, BUILD_PROFILES="nodoc,pkg.small.extra", RUN_TESTS="false")
    assert "/small/manual" in content(configuration, full)
    assert "/small/manual" not in content(configuration, without)
    assert ("/small/extra" in content(configuration, without)) == (target == RPM)
    assert full.key != without.key
    assert re.search(r"~t[0-9a-f]{8}~partial", without.version)


def test_a_packages_own_profiles_are_its_full_build(tmp_path: Path):
    entry = {"source": "small", "profiles": ["nocheck"]}
    configuration = trees.config(tmp_path, packages={"small": entry})
    made = build(tmp_path, with_tests(), DEB, configuration, RUN_TESTS="false")
    assert made.profiles == ("nocheck",)
    assert made.version == "1.0+pkg1.1-1+deb12"
    again = build(tmp_path, {}, DEB, configuration, RUN_TESTS="false", BUILD_PROFILES="nocheck")
    assert again.version == "1.0+pkg1.2-1+deb12"


def test_a_partial_build_of_a_merged_change_is_not_published(tmp_path: Path):
    released = {"gnupg_home": str(tmp_path), "key": "A" * 40}
    configuration = trees.config(tmp_path, gerrit=f"file://{tmp_path}/", released=released)
    made = build(tmp_path, trees.deb(), DEB, configuration, BUILD_PROFILES="nodoc")
    change = Change(project="small", branch="main", commit=trees.git(tmp_path / "small", "rev-parse", "HEAD"))
    with pytest.raises(RequestError, match="was built with other profiles than the package's own"):
        publish(configuration, DEB, change, made.key, "run-7", tmp_path / "artifacts")


@pytest.mark.parametrize("target", [DEB, RPM])
def test_a_reproducible_package_passes_also_when_the_store_has_it(tmp_path: Path, target: str):
    configuration = trees.config(tmp_path)
    files = trees.deb() | trees.rpm()
    assert build(tmp_path, files, target, configuration).reproducible is None
    parameters = trees.local(configuration, tmp_path / "small", REPRODUCIBLE="true")
    again = compile(configuration, target, parameters, tmp_path / "artifacts")
    assert (again.origin, again.reproducible) == ("store", True)
    assert {"again"} <= again.seconds.keys()


@pytest.mark.parametrize(
    ("target", "file", "where"),
    [(DEB, r"small_1\.0\S*_all\.deb", "usr/bin/small"), (RPM, r"small-1\.0\S*\.noarch\.rpm", "usr/bin/small")],
)
def test_a_package_that_embeds_the_day_is_reported_with_the_file_that_differs(
    tmp_path: Path, target: str, file: str, where: str
):
    files = trees.deb() | trees.rpm()
    files["debian/rules"] += "\nexecute_after_dh_install:\n\tdate +%F >>debian/small/usr/bin/small\n"
    spec = files["rpm/small.spec"]
    files["rpm/small.spec"] = spec.replace("%files\n", "date +%%F >>%{buildroot}%{_bindir}/small\n\n%files\n")
    with pytest.raises(PackageError, match=rf"small: not reproducible: built twice, {file} came out different"):
        build(tmp_path, files, target, REPRODUCIBLE="true")
    assert Build.read(tmp_path / "artifacts" / "build.json").reproducible is False
    explained = (tmp_path / "artifacts" / "logs" / "diffoscope.txt").read_text()
    assert re.search(rf"{where}(\n.*){{1,5}}-2\d\d\d-\d\d-\d\d\n.*\+2\d\d\d-\d\d-\d\d", explained), explained
