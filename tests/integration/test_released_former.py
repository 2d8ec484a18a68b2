"""What a release makes possible before the merge: a package beside its released version, in build, lint and install test."""

import os
import re
import sys
import tempfile
import xml.etree.ElementTree as ET
from datetime import UTC, datetime, timedelta
from pathlib import Path

import packages
import pytest
import trees
from clients import run

from pkgci import repository, server
from pkgci.artifacts import Former, Install, InstallOutcome, Lint
from pkgci.compile import compile
from pkgci.config import Config
from pkgci.errors import PackageError
from pkgci.install import install
from pkgci.released.records import Commit, Origin, Publication
from pkgci.released.repository import publish
from pkgci.store import Entry, Store

DEB, RPM = "bookworm-amd64", "debianrpm-amd64"
# what lint calls an error
TAGS = {DEB: "no-copyright-file", RPM: "no-changelogname-tag"}
FILES = trees.deb() | trees.rpm()
FILES["rpm/small.spec"] = trees.SPEC.partition("\n%changelog")[0].format(name="small", version=1, release=1, more="")
del FILES["debian/copyright"]


@pytest.fixture
def config(tmp_path: Path, gnupg) -> Config:
    released = {"gnupg_home": gnupg[0], "key": gnupg[1]}
    # what has no entry belongs to no release
    return trees.config(tmp_path, {"small": {"source": "small"}}, released=released)


def release(config: Config, target: str, *entries: Entry) -> None:
    """Publish builds to the released repository."""
    made = [
        Publication(
            entry.record.key,
            Origin(
                branch="main",
                commits=tuple(Commit(project="small", commit="c" * 40, tree=tree) for tree in entry.record.trees),
            ),
        )
        for entry in entries
    ]
    publish(config, "default", config.target(target).codename, made)


@pytest.mark.parametrize("target", [DEB, RPM])
def test_a_check_holds_a_package_against_the_released_one_and_tries_the_upgrade(config, tmp_path, target):
    tree = tmp_path / "small"
    trees.commit(tree, FILES)
    (tmp_path / "artifacts").mkdir()
    parameters = trees.local(config, tree, RUN_TESTS="false", ZUUL_PIPELINE="gate")
    built = compile(config, target, parameters, tmp_path / "artifacts")
    release(config, target, Store(config).required(built.key, target))
    (config.state / "changes/small").unlink()
    trees.commit(tree, {"small": "#!/bin/sh\necho smaller\n"})
    pkgci = [sys.executable, "-c", "from pkgci.cli import main; main()", "check"]
    env = {"PKGCI_CONFIG": str(config.directory), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = run(*pkgci, "--target", target, "--only", "lint,install", tree, env=env)
    left = config.state / f"jobs/build-{target}/builds/1/archive/artifacts"
    (difference,) = Former.read(left / f"compile-{target}/former.json").packages
    assert (difference.released, difference.former_version) == (True, built.packages[0].version)
    assert ("/usr/bin/small", "/usr/bin/small") in [(one.former.path, one.now.path) for one in difference.files]
    lint = Lint.read(left / f"lint-{target}/lint.json")
    assert {finding.tag for finding in lint.findings if finding.known} >= {TAGS[target]}
    assert lint.released == built.version
    anew, upgrade = Install.read(left / f"install-{target}/install.json").packages
    assert (anew.former_version, upgrade.former_version) == ("", built.packages[0].version)
    assert (upgrade.passed, upgrade.notice) == (True, "")
    cases = ET.parse(left / f"install-{target}/junit/install.xml").getroot()
    assert [case.get("name") for case in cases] == ["small", f"small, upgrade from {upgrade.former_version}"]
    assert re.search(f"against the released {re.escape(upgrade.former_version)}: . files? changed", done.stdout)
    assert "known from the released package" in done.stdout
    assert "install test: 1 package passed, 1 upgrade passed" in done.stdout
    page = (left / "index.html").read_text()
    assert "Against what is released" in page
    assert f"known from the released {built.version}" in page
    assert f"upgrade from the released {upgrade.former_version}" in page


def deb(config: Config, version: str, name: str, scripts: dict[str, str]) -> Entry:
    """Put a build of one package with maintainer scripts into the store."""
    with tempfile.TemporaryDirectory() as scratch:
        text = {script: f"#!/bin/sh\n{body}\n" for script, body in scripts.items()}
        made = packages.deb(Path(scratch), name, version, scripts=text)
        return packages.deliver_debs(config, Path(scratch), name, version, [made])


def test_an_upgrade_that_fails_is_the_packages_fault_and_a_broken_released_version_is_not(config, tmp_path):
    release(
        config,
        DEB,
        deb(config, "1", "fragile", {}),
        deb(config, "1", "mended", {"postinst": "echo sorry; exit 1"}),
        deb(config, "3", "late", {}),
    )
    tested = [
        deb(config, "2", "fragile", {"preinst": '[ "$1" = install ] || { echo no way; exit 1; }'}),
        deb(config, "2", "mended", {}),
        deb(config, "2", "late", {}),
    ]
    with server.serve(config):
        expires = datetime.now(UTC) + timedelta(days=1)
        made = repository.write(config, DEB, "run", tested, expires)
        urls = [f"{config.settings.url}{path}/repository.json" for path in (f"test/run/{DEB}", "default/bookworm")]
        assert made.url in urls[0]
        with pytest.raises(PackageError, match=r"^upgrade of fragile: upgrade: .*pre-installation script"):
            install(config, DEB, urls, "", tmp_path)
    found: dict[str, InstallOutcome] = {one.name: one for one in Install.read(tmp_path / "install.json").packages}
    assert set(found) == {"fragile", "fragile, upgrade from 1", "mended", "mended, upgrade from 1", "late"}
    assert [name for name, one in found.items() if not one.passed] == ["fragile, upgrade from 1"]
    assert found["mended, upgrade from 1"].notice.startswith("not tried: the released version 1 cannot be installed: ")
    assert "no way" in (tmp_path / found["fragile, upgrade from 1"].log).read_text()
    suite = ET.parse(tmp_path / "junit/install.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("5", "1", "1")
