"""The job `lint`: what lintian or rpmlint says of the source and binary packages of a build, in the sandbox.

The packages come from the store by the build's key. Which findings fail the job, the release says; which are silenced,
the package itself, by its format's own overrides.
"""

import logging
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from pkgci import passed
from pkgci.artifacts import Lint, LintFinding
from pkgci.change import Change, release_of
from pkgci.config import Config
from pkgci.errors import PackageError
from pkgci.formats import FORMATS
from pkgci.formats.base import Linted, Place
from pkgci.roots import tools_root
from pkgci.store import Entry, Record, Store

log = logging.getLogger(__name__)

SEVERITIES = ("error", "warning", "info")
FINDINGS = 1000


def lint(
    config: Config, target_name: str, change: Change, build_key: str, artifacts: Path, repeat: bool = True
) -> Lint:
    """Lint a build, unless the same passed before; write `lint.json`, `junit/lint.xml` and `logs/lint.log` below `artifacts`.

    Args:
        config: the configuration.
        target_name: the target that it was built for.
        change: the change that it was built from; its branch says the release.
        build_key: its key in the store.
        artifacts: an existing directory.
        repeat: lint it in any case.

    Returns:
        What is in `lint.json`.

    Raises:
        PackageError: a finding is as severe as the release forbids; the records are written.
        RequestError: there is no such build, or no release claims the branch.
        InfrastructureError: the tool or its root is at fault.
    """
    fails = release_of(config, change).lint.fails
    entry = Store(config).required(build_key, target_name)
    name = config.package_of(change.project)
    target = config.target(target_name)
    place = Place(
        config=config,
        target_name=target_name,
        target=target,
        root=tools_root(config, target_name),
        limits=config.limits(config.package(name)) if name else config.settings.limits,
        log_path=artifacts / "logs" / "lint.log",
    )

    def made_from() -> list:
        described = [one.model_dump(mode="json") for one in (entry.record, target, place.limits)]
        return [*described, fails, place.root.id]

    return passed.once(
        config, artifacts / "lint.json", Lint, made_from, lambda: _lint(place, entry, fails, artifacts), repeat=repeat
    )


def _lint(place: Place, entry: Entry, fails: str, artifacts: Path) -> Lint:
    """Lint a build, and write what comes of it."""
    linted = FORMATS[place.target.format].lint(place, entry.record.package, entry.record.packages, entry.directory)
    record = _record(entry.record, fails, linted)
    record.write(artifacts / "lint.json")
    failing = _failing(record)
    _write_junit(entry.record, record, failing, artifacts / "junit" / "lint.xml")
    for finding in record.findings:
        log.info("%s: %s", finding.severity, _line(finding))
    log.info("%s: %s", record.tool, summary(record))
    if failing:
        more = f" (and {len(failing) - 1} more)" if len(failing) > 1 else ""
        raise PackageError(f"lint of {_line(failing[0])}{more}; the release fails on: {fails}")
    return record


def summary(record: Lint) -> str:
    """Return in a few words how much was found."""
    count = Counter(finding.severity for finding in record.findings)
    words = [f"{count[severity]} {severity}{'' if count[severity] == 1 else 's'}" for severity in SEVERITIES[:2]]
    return f"{', '.join(words)}, {count['info']} info, {record.overridden} overridden by the package"


def _record(build: Record, fails: str, linted: Linted) -> Lint:
    """Return the record: the findings in the order of their severity, of very many only the first."""
    findings = sorted(linted.findings, key=lambda finding: SEVERITIES.index(finding.severity))
    return Lint(
        target=build.target,
        package=build.package,
        version=build.version,
        key=build.key,
        tool=linted.tool,
        fails=fails,
        findings=tuple(findings[:FINDINGS]),
        omitted=max(0, len(findings) - FINDINGS),
        overridden=linted.overridden,
    )


def _failing(record: Lint) -> list[LintFinding]:
    severities = () if record.fails == "never" else SEVERITIES[: SEVERITIES.index(record.fails) + 1]
    return [finding for finding in record.findings if finding.severity in severities]


def _line(finding: LintFinding) -> str:
    name = f"{finding.package} (source)" if finding.source else finding.package
    # rpmlint's words begin with the file
    file = finding.file if finding.file and not finding.message.startswith(finding.file) else ""
    return ": ".join(filter(None, [name, finding.tag, file, finding.message]))


def _write_junit(build: Record, record: Lint, failing: list[LintFinding], path: Path) -> None:
    """Write the findings in the XML form that Jenkins' JUnit plugin reads: a test case a package."""
    cases = [(record.package, True), *((package.name, False) for package in build.packages)]
    suite = ET.Element("testsuite", name=f"lint-{record.target}", tests=str(len(cases)))
    failed = 0
    for name, source in cases:
        case = ET.SubElement(suite, "testcase", classname=f"lint.{record.target}")
        case.set("name", f"{name} (source)" if source else name)
        own = [finding for finding in record.findings if (finding.package, finding.source) == (name, source)]
        wrong = [finding for finding in own if finding in failing]
        if wrong:
            failed += 1
            failure = ET.SubElement(case, "failure", message=_line(wrong[0]))
            failure.text = "\n".join(map(_line, wrong))
        tolerated = [f"{finding.severity}: {_line(finding)}" for finding in own if finding not in failing]
        if tolerated:
            ET.SubElement(case, "system-out").text = "\n".join(tolerated)
    suite.set("failures", str(failed))
    path.parent.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
