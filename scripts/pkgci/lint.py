"""The job `lint`: what lintian or rpmlint says of the source and binary packages of a build, in the sandbox.

The packages come from the store by the build's key. Which findings fail the job, the release says; which are silenced,
the package itself, by its format's own overrides. What the released package has too is known, and does not fail: that is
linted by the same tool, once.
"""

import logging
import re
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pkgci import passed, repository, web
from pkgci.artifacts import Lint, LintFinding
from pkgci.change import Change, release_of
from pkgci.config import Config
from pkgci.errors import InfrastructureError, PackageError
from pkgci.formats import FORMATS, base
from pkgci.formats.base import Linted, Place
from pkgci.released import remote
from pkgci.roots import tools_root
from pkgci.server import serve
from pkgci.store import Entry, Record, Store

log = logging.getLogger(__name__)

SEVERITIES = ("error", "warning", "info")
FINDINGS = 1000
NUMBER = re.compile(r"[0-9][A-Za-z0-9.+~^:_-]*")
# of a released build
LINTED = re.compile(r"\.(deb|dsc|tar\.[a-z0-9]+|rpm|rpmlintrc)$")


def lint(
    config: Config,
    target_name: str,
    change: Change,
    build_key: str,
    repositories: Sequence[str],
    artifacts: Path,
    repeat: bool = True,
) -> Lint:
    """Lint a build, unless the same passed before; write `lint.json`, `junit/lint.xml` and `logs/lint.log` below `artifacts`.

    Args:
        config: the configuration.
        target_name: the target that it was built for.
        change: the change that it was built from; its branch says the release.
        build_key: its key in the store.
        repositories: URLs of `repository.json` files, of which released ones are looked into.
        artifacts: an existing directory.
        repeat: lint it in any case.

    Returns:
        What is in `lint.json`.

    Raises:
        PackageError: a finding is as severe as the release forbids; the records are written.
        RequestError: there is no such build, or no release claims the branch.
        InfrastructureError: the tool or its root is at fault, or a finding cannot be held against the released package.
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
        former = _released(place, repositories, entry.record)
        return [*described, fails, place.root.id, former[1].key if former else ""]

    def run() -> Lint:
        return _lint(place, entry, fails, repositories, artifacts)

    with serve(config):
        return passed.once(config, artifacts / "lint.json", Lint, made_from, run, repeat=repeat)


def _lint(place: Place, entry: Entry, fails: str, repositories: Sequence[str], artifacts: Path) -> Lint:
    """Lint a build, and write what comes of it."""
    linted = FORMATS[place.target.format].lint(place, entry.record.package, entry.record.packages, entry.directory)
    record = _record(entry.record, fails, linted)
    if record.findings:
        record = _compare(place, repositories, record, entry.record)
    record.write(artifacts / "lint.json")
    failing = _failing(record)
    _write_junit(entry.record, record, failing, artifacts / "junit" / "lint.xml")
    for finding in record.findings:
        log.info("%s%s: %s", "known " if finding.known else "", finding.severity, _line(finding))
    log.info("%s: %s", record.tool, summary(record))
    if failing:
        more = f" (and {len(failing) - 1} more)" if len(failing) > 1 else ""
        raise PackageError(f"lint of {_line(failing[0])}{more}; the release fails on: {fails}")
    return record


def summary(record: Lint) -> str:
    """Return in a few words how much was found."""
    count = Counter(finding.severity for finding in record.findings if not finding.known)
    words = [f"{count[severity]} {severity}{'' if count[severity] == 1 else 's'}" for severity in SEVERITIES[:2]]
    known = sum(finding.known for finding in record.findings)
    also = f", {known} known from the released {record.released}" if record.released else ""
    return f"{', '.join(words)}, {count['info']} info, {record.overridden} overridden by the package{also}"


def _compare(place: Place, repositories: Sequence[str], record: Lint, build: Record) -> Lint:
    """Return the record with those findings marked, and last, that the released package has too."""
    try:
        found = _released(place, repositories, build)
        if found is None:
            return record
        make = partial(_lint_released, place, *found)
        former = base.cached(place, "lint", found[1].key, Lint, make)
    except InfrastructureError as error:
        if _failing(record):
            # it may be known
            raise
        log.info("findings cannot be held against the released package: %s", error)
        return record
    except PackageError as error:
        log.info("the released package cannot be linted: %s", error)
        return record
    left = Counter(_essence(finding) for finding in former.findings)
    findings = []
    for finding in record.findings:
        essence = _essence(finding)
        known = left[essence] > 0
        left[essence] -= known
        findings.append(finding.model_copy(update={"known": known}))
    # sorted() keeps the order of severity
    findings.sort(key=lambda finding: finding.known)
    return record.model_copy(update={"released": former.version, "findings": tuple(findings)})


def _released(place: Place, repositories: Sequence[str], build: Record) -> tuple[str, Record] | None:
    """Return where the files of the released build of the same source package lie, and its record, if there is one.

    Raises:
        InfrastructureError: a repository cannot be read.
    """
    names = [package.name for package in build.packages]
    for where in repository.read(place.config, place.target_name, repositories):
        if not where.released:
            continue
        for package in remote.listed(where, place.target.architecture, names).packages:
            former = remote.record(where, package)
            if former.package == build.package and former.key != build.key:
                return remote.place(where, package), former
    return None


def _lint_released(place: Place, url: str, former: Record) -> Lint:
    """Lint a released build, whose files lie below a URL."""
    with tempfile.TemporaryDirectory() as scratch:
        for file in former.files:
            if LINTED.search(file.name):
                content = web.read(f"{url}{file.name}", upstream=False, largest=base.PACKAGE_BYTES)
                Path(scratch, file.name).write_bytes(content)
        apart = replace(place, log_path=place.log_path.with_name("lint-released.log"))
        linted = FORMATS[former.format].lint(apart, former.package, former.packages, Path(scratch))
    return _record(former, "never", linted)


def _essence(finding: LintFinding) -> tuple[str, ...]:
    """Return what is the same in a finding of another version: its words without versions and other numbers."""
    words = (finding.tag, finding.message, finding.file or "")
    return (finding.package, str(finding.source), *(NUMBER.sub("N", word) for word in words))


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
    return [finding for finding in record.findings if finding.severity in severities and not finding.known]


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
        tolerated = [
            f"{'known from the released package, ' if finding.known else ''}{finding.severity}: {_line(finding)}"
            for finding in own
            if finding not in failing
        ]
        if tolerated:
            ET.SubElement(case, "system-out").text = "\n".join(tolerated)
    suite.set("failures", str(failed))
    path.parent.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
