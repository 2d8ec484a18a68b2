"""lintian and rpmlint on tiny real packages: clean, faulty, overridden, hostile."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trees
import yaml

from pkgci.artifacts import Lint, LintFinding, Result
from pkgci.compile import compile
from pkgci.config import Config
from pkgci.errors import InfrastructureError, PackageError, RequestError
from pkgci.formats import FORMATS
from pkgci.formats.base import Place
from pkgci.lint import lint
from pkgci.roots import build_root

PKGCI = Path(sys.executable).with_name("pkgci")
DEB, RPM = "bookworm-amd64", "debianrpm-amd64"
# what makes lintian or rpmlint see an error, with its tag, and what overrides it
ERRORS = {
    DEB: (
        "no-copyright-file",
        {"debian/copyright": None},
        {"debian/small.lintian-overrides": "# it is in the public domain\nsmall: no-copyright-file\n"},
    ),
    RPM: (
        "no-changelogname-tag",
        {"rpm/small.spec": trees.SPEC.partition("\n%changelog")[0].format(name="small", version=1, release=1, more="")},
        {"rpm/small.rpmlintrc": 'import os; os.system("touch /witness")\naddFilter("no-changelogname-tag")\n'},
    ),
}
# names that a terminal or a page would obey; dpkg refuses a line break in one, rpm what is no text
HOSTILE = {DEB: r"a\033[31mred\033]0;title\007<b>&amp;", RPM: r"a\342\200\256red<b>&amp; x.src: E: forged"}


@dataclass(frozen=True)
class Built:
    """A build in the store, ready to be linted."""

    config: Config
    parameters: trees.Parameters
    key: str
    artifacts: Path
    repositories: tuple[str, ...] = ()

    def lint(self, target: str) -> Lint:
        change = self.parameters.change(self.config)
        return lint(self.config, target, change, self.key, self.repositories, self.artifacts)

    @property
    def record(self) -> Lint:
        return Lint.read(self.artifacts / "lint.json")

    @property
    def failures(self) -> dict[str, str]:
        """What JUnit says of the packages that fail, by their names."""
        suite = ET.parse(self.artifacts / "junit" / "lint.xml").getroot()
        return {case.get("name", ""): text for case in suite if (text := case.findtext("failure"))}


def build(place: Path, target: str, *changes: dict, packages: dict | None = None, release: dict | None = None) -> Built:
    """Build the package `small` with changes of its files; None takes one away."""
    files = trees.deb() | trees.rpm()
    for change in changes:
        files |= change
    trees.commit(place / "small", {name: text for name, text in files.items() if text is not None})
    config = trees.config(place, packages)
    if release is not None:
        path = config.directory / "releases" / "default.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | release))
    artifacts = place / "artifacts"
    artifacts.mkdir()
    parameters = trees.local(config, place / "small")
    return Built(config, parameters, compile(config, target, parameters, artifacts).key, artifacts)


def errors(record: Lint) -> list[LintFinding]:
    return [finding for finding in record.findings if finding.severity == "error"]


@pytest.mark.parametrize("target", [DEB, RPM])
def test_a_good_package_passes_and_what_is_tolerated_is_recorded(tmp_path: Path, target: str):
    built = build(tmp_path, target)
    made = built.lint(target)
    assert made == built.record
    assert made.tool.startswith("lintian 2." if target == DEB else "rpmlint 2.")
    assert (errors(made), made.fails, made.overridden, made.omitted) == ([], "error", 0, 0)
    assert {finding.severity for finding in made.findings} >= {"warning"}
    suite = ET.parse(built.artifacts / "junit" / "lint.xml").getroot()
    assert [case.get("name") for case in suite] == ["small (source)", "small"]
    assert built.failures == {}
    assert "warning: small" in ET.tostring(suite, encoding="unicode")


def test_a_build_that_passed_is_not_linted_once_more_unless_the_release_asks_for_more(tmp_path: Path):
    built = build(tmp_path, DEB)
    first = built.lint(DEB)
    again = replace(built, artifacts=tmp_path / "again")
    again.artifacts.mkdir()
    change = built.parameters.change(built.config)
    second = lint(built.config, DEB, change, built.key, (), again.artifacts, repeat=False)
    assert (second.findings, second.tool) == (first.findings, first.tool)
    assert second == again.record
    assert (first.note, second.note[:10]) == ("", "passed on ")
    assert again.failures == {}
    path = built.config.directory / "releases" / "default.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"lint": {"fails": "warning"}}))
    for _ in range(2):
        with pytest.raises(PackageError, match="the release fails on: warning"):
            lint(Config(built.config.directory), DEB, change, built.key, (), tmp_path / "artifacts", repeat=False)


@pytest.mark.parametrize("target", [DEB, RPM])
def test_an_error_fails_and_is_in_the_records(tmp_path: Path, target: str):
    tag, fault, _ = ERRORS[target]
    built = build(tmp_path, target, fault)
    with pytest.raises(PackageError, match=f"lint of small.*: {tag}.*; the release fails on: error"):
        built.lint(target)
    assert {(finding.package, finding.tag) for finding in errors(built.record)} == {("small", tag)}
    assert tag in built.failures["small"]


@pytest.mark.parametrize("target", [DEB, RPM])
def test_the_packages_own_override_silences_it_and_is_counted(tmp_path: Path, target: str):
    _, fault, override = ERRORS[target]
    made = build(tmp_path, target, fault, override).lint(target)
    assert errors(made) == []
    assert made.overridden > 0
    assert not Path("/witness").exists()


@pytest.mark.parametrize("target", [DEB, RPM])
def test_a_release_may_fail_on_warnings(tmp_path: Path, target: str):
    built = build(tmp_path, target, release={"lint": {"fails": "warning"}})
    with pytest.raises(PackageError, match="the release fails on: warning"):
        built.lint(target)
    assert built.record.fails == "warning"
    assert built.failures


@pytest.mark.parametrize("target", [DEB, RPM])
def test_a_release_may_fail_on_nothing(tmp_path: Path, target: str):
    built = build(tmp_path, target, ERRORS[target][1], release={"lint": {"fails": "never"}})
    assert errors(built.lint(target))
    assert built.failures == {}


def test_the_job_by_hand_ends_with_1_and_names_the_finding(tmp_path: Path):
    tag, fault, _ = ERRORS[DEB]
    built = build(tmp_path / "in", DEB, fault)
    given = {**built.parameters.values, "BUILD_KEY": built.key, "PKGCI_CONFIG": str(built.config.directory)}
    command = [PKGCI, "lint", DEB]
    done = subprocess.run(
        command, env={**os.environ, **given}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    result = Result.read(tmp_path / "artifacts" / "result.json")
    assert (result.fault, result.reason) == ("package", f"lint of small: {tag}; the release fails on: error")


@pytest.mark.parametrize("target", [DEB, RPM])
def test_hostile_names_reach_neither_log_nor_records_raw(
    tmp_path: Path, target: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    name = f"$(printf '{HOSTILE[target]}')"
    files = trees.deb() | trees.rpm()
    # a program without a manual page
    files["debian/rules"] += (
        f'\noverride_dh_auto_install:\n\techo x >"debian/small/usr/bin/{name.replace("$", "$$")}"\n'
    )
    files["debian/small.dirs"] = "usr/bin\n"
    files["rpm/small.spec"] = files["rpm/small.spec"].replace(
        "\n%files", f'echo x >"%{{buildroot}}/usr/bin/{name}"\n\n%files\n/usr/bin/a*'
    )
    built = build(tmp_path, target, files, release={"lint": {"fails": "info"}})
    capfd.readouterr()
    caplog.clear()
    with pytest.raises(PackageError):
        built.lint(target)
    said = [*(finding.message + (finding.file or "") for finding in built.record.findings), *caplog.messages]
    said += built.failures.values()
    said += "".join(capfd.readouterr()).splitlines()
    assert any("red" in words for words in said)
    assert [words for words in said if not words.replace("\n", "").isprintable()] == []


@pytest.mark.parametrize("target", [DEB, RPM])
def test_a_missing_tool_is_the_infrastructures_fault(tmp_path: Path, target: str):
    config = trees.config(tmp_path)
    root, log = build_root(config, target), tmp_path / "log"
    place = Place(config, target, config.target(target), root, config.settings.limits, log)
    with pytest.raises(InfrastructureError, match=r"^the lint tool failed with status [0-9]+: .*lint.*") as caught:
        FORMATS[config.target(target).format].lint(place, "small", [], tmp_path)
    assert "\n" not in str(caught.value)


def test_a_package_that_cannot_be_read_is_at_fault_itself(tmp_path: Path):
    # dpkg reads the control data of such a package; nobody can read the rest
    broken = "\noverride_dh_builddeb:\n\tdh_builddeb\n\tfor f in ../*.deb; do ar d $$f data.tar.xz; done\n"
    built = build(tmp_path, DEB, {"debian/rules": trees.RULES + broken})
    with pytest.raises(PackageError, match="lint of small: malformed-deb-archive: "):
        built.lint(DEB)


def test_a_tool_that_hangs_on_a_packages_filter_ends_at_the_packages_limit(tmp_path: Path):
    filters = {"rpm/small.rpmlintrc": 'addFilter("((a+)+)+b")\n'}
    spec = {"rpm/small.spec": trees.rpm()["rpm/small.spec"].replace("It holds", "a" * 200 + " It holds")}
    built = build(tmp_path, RPM, filters, spec, packages={"small": {"source": "small", "limits": {"seconds": 30}}})
    with pytest.raises(PackageError, match="no end after 30 s"):
        built.lint(RPM)


def test_a_tool_that_reaches_the_packages_limit_of_memory_is_the_packages_fault(tmp_path: Path):
    built = build(tmp_path, DEB)
    entry = built.config.directory / "packages" / "small.yaml"
    entry.write_text("source: small\nlimits: {memory_mib: 64}\n")
    with pytest.raises(PackageError, match="lint reached a limit of memory, processes or disk, or crashed: "):
        replace(built, config=Config(built.config.directory)).lint(DEB)


def test_a_build_that_is_not_in_the_store_or_is_of_another_target_is_a_wrong_request(tmp_path: Path):
    built = build(tmp_path, DEB)
    with pytest.raises(RequestError, match=f"is for {DEB}, not for {RPM}"):
        built.lint(RPM)
    change = built.parameters.change(built.config)
    with pytest.raises(RequestError, match=f"is not in the store; run compile-{DEB} again"):
        lint(built.config, DEB, change, "0" * 64, (), built.artifacts)
