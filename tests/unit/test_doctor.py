"""What `pkgci doctor` looks for is what the project's own files install."""

import re
from pathlib import Path

import trees

from pkgci.config import ROOT, Config
from pkgci.doctor import TOOLS, examine


def test_every_tool_comes_from_a_package_that_setup_installs():
    lines = (ROOT / "bindep.txt").read_text().splitlines()
    installed = {line for line in lines if re.fullmatch(r"[a-z0-9+.-]+", line)}
    assert set(TOOLS.values()) <= installed


def test_targets_that_the_jobs_do_not_have_are_found(tmp_path: Path):
    configuration = trees.config(tmp_path)
    (configuration.directory / "targets" / "debianrpm-amd64.yaml").unlink()
    findings = {finding.what: finding for finding in examine(Config(configuration.directory))}
    found = findings["targets of the jobs: bookworm-amd64, debianrpm-amd64"]
    assert not found.good
    assert "bookworm-amd64" in found.line()


def test_two_targets_that_both_build_what_is_architecture_independent_are_found(tmp_path: Path):
    targets = trees.config(tmp_path).directory / "targets"
    (targets / "bookworm-arm.yaml").write_text((targets / "bookworm-amd64.yaml").read_text())
    lines = [finding.line() for finding in examine(Config(targets.parent))]
    assert any("codename bookworm: bookworm-amd64 and bookworm-arm with `independent: true`" in line for line in lines)


def test_branches_that_zuul_votes_on_and_no_release_claims_are_found(tmp_path: Path):
    configuration = trees.config(tmp_path, zuul={"project": "ci/pkgci"})
    releases = configuration.directory / "releases"
    (releases / "default.yaml").write_text("branches: [main]\ntargets: [bookworm-amd64]\n")
    (releases / "other.yaml").write_text("branches: ['stable/.*']\ntargets: [bookworm-amd64]\n")
    findings = {finding.what: finding for finding in examine(Config(configuration.directory))}
    found = findings["branches that Zuul votes on: ^(.*)$"]
    assert not found.good
    assert "make it ^(main|stable/.*)$ in" in found.line()
