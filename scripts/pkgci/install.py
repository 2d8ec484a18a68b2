"""The install test: each package of a build is installed, tried and removed on its own, in a machine restored for it.

Where a released repository has a former version of it, that is installed in one more machine, and upgraded to this one,
which is tried and removed there too.

The machine runs the package's code as root, so nothing that it says is trusted: its output is bounded, and read as text
with a form of its own. What decides here is the absence of findings, so a package that forges them only harms itself.
"""

import logging
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import get_args

from pkgci import passed, repository
from pkgci.artifacts import Finding, Install, InstallOutcome, Repository, RepositoryPackage
from pkgci.config import Config, Target
from pkgci.errors import InfrastructureError, PackageError
from pkgci.formats import FORMATS
from pkgci.released import remote
from pkgci.server import serve
from pkgci.text import lines, printable
from pkgci.vm import guest
from pkgci.vm.machine import Machine
from pkgci.vm.remote import GuestError
from pkgci.vm.snapshot import Snapshot

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Step:
    """A step: the word for it in the guest, the phase of what it finds, its time limit, if it is told the exact package."""

    word: str
    phase: str
    seconds: int
    exact: bool = False


STEPS = {
    "install": _Step("install", "install", 900, exact=True),
    "upgrade": _Step("replace", "upgrade", 900, exact=True),
    "try": _Step("try", "run", 900),
    "remove": _Step("remove", "remove", 600),
}
LOG_BYTES = 1 << 20
FINDINGS_BYTES = 1 << 18
FINDINGS = 50
PHASES = get_args(Finding.model_fields["phase"].annotation)


def install(
    config: Config,
    target_name: str,
    repositories: Sequence[str],
    build_key: str,
    artifacts: Path,
    repeat: bool = True,
) -> Install:
    """Run the install test, unless the same passed before.

    It leaves `install.json`, `junit/install.xml` and `logs/PACKAGE.log` below `artifacts`.

    Args:
        config: the configuration.
        target_name: the target.
        repositories: URLs of `repository.json` files, below the configured prefixes.
        build_key: only packages of this build are tested; all, if empty.
        artifacts: an existing directory.
        repeat: run it in any case.

    Returns:
        What is in `install.json`.

    Raises:
        PackageError: a package fails; the records are written.
        RequestError: a repository is not allowed, of another target, or has nothing to test.
        InfrastructureError: the machines are at fault.
    """
    target = config.target(target_name)
    with serve(config):
        records = repository.read(config, target_name, repositories)
        tested = repository.under_test(records, build_key)
        snapshot = guest.plain(config, target_name)
        log.info("snapshot %s of %s", snapshot.id, f"{snapshot.manifest.created:%Y-%m-%d %H:%M}")

        def made_from() -> list:
            tolerated = [_tolerated(config, package) for package in tested]
            described = [target.model_dump(mode="json"), snapshot.id, guest.upstream_digest(target)]
            return [*described, repository.decisive(records, tested), tolerated]

        def run() -> Install:
            outcomes = _run(config, target, snapshot, records, tested, artifacts)
            record = Install(
                target=target_name,
                snapshot=snapshot.id,
                repositories=tuple(repositories),
                notice=target.notice,
                packages=tuple(outcomes),
            )
            return _kept(record, artifacts)

        return passed.once(
            config,
            artifacts / "install.json",
            Install,
            made_from,
            run,
            repeat=repeat,
            repositories=tuple(repositories),
        )


def _kept(record: Install, artifacts: Path) -> Install:
    """Write the records; a package that failed is an error."""
    record.write(artifacts / "install.json")
    _write_junit(record, artifacts / "junit" / "install.xml")
    failed = [outcome for outcome in record.packages if not outcome.passed]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        what = "upgrade" if failed[0].former_version else "install test"
        raise PackageError(f"{what} of {_line(failed[0].findings[0])}{more}")
    return record


def _run(
    config: Config,
    target: Target,
    snapshot: Snapshot,
    records: Sequence[Repository],
    tested: Sequence[RepositoryPackage],
    artifacts: Path,
) -> list[InstallOutcome]:
    """Test each package in machines of its own, and keep what they said."""
    former = _former(target, records, tested)
    proxy = guest.proxy(config, target, records)
    settings = guest.settings(target, records, tested)
    script = guest.script(target)
    outcomes = []
    for package in tested:
        for before in (None, *former.get(package.name, ())):
            started = time.monotonic()
            with snapshot.restored(config, proxy) as (machine,):
                findings, notice = [], ""
                if before:
                    where, released = before
                    machine.put(guest.settings(target, [where], []))
                    notice = _install_former(machine, script, released)
                if not notice:
                    machine.put(settings)
                    step = "upgrade" if before else "install"
                    findings = _test(machine, script, step, package, _tolerated(config, package))
                said = _log_of(machine)
            outcome = InstallOutcome(
                package=package.name,
                version=package.version,
                former_version=before[1].version if before else "",
                notice=notice,
                passed=not findings,
                seconds=round(time.monotonic() - started, 1),
                findings=tuple(findings),
            )
            path = artifacts / outcome.log
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(lines(said))
            log.info(
                "%s %s: %s, %.1f s",
                outcome.name,
                outcome.version,
                notice or ("passed" if not findings else "FAILED"),
                outcome.seconds,
            )
            for finding in findings:
                log.info("  %s", _line(finding))
            outcomes.append(outcome)
    return outcomes


def _former(
    target: Target, records: Sequence[Repository], tested: Sequence[RepositoryPackage]
) -> dict[str, list[tuple[Repository, RepositoryPackage]]]:
    """Return what released repositories have of the packages under test, where that is of a lower version."""
    newer = FORMATS[target.format].newer
    versions = {package.name: package.version for package in tested}
    found: dict[str, list[tuple[Repository, RepositoryPackage]]] = {}
    for where in (remote.listed(record, target.architecture, versions) for record in records if record.released):
        for package in where.packages:
            if newer(versions[package.name], package.version):
                found.setdefault(package.name, []).append((where, package))
            else:
                log.info("%s: the released version %s is not below this one: no upgrade", package.name, package.version)
    return found


def _install_former(machine: Machine, script: str, package: RepositoryPackage) -> str:
    """Install a released version; return why it could not be, or nothing."""
    try:
        found = _step(machine, script, "install", package)
    except GuestError as error:
        return f"not tried: the installation of the released version {package.version} ended by {error}"
    return f"not tried: the released version {package.version} cannot be installed: {_line(found[0])}" if found else ""


def _tolerated(config: Config, package: RepositoryPackage) -> tuple[str, ...]:
    """Return the patterns of files that may stay, from the entry of the package's source package, if it has one."""
    if not (config.directory / "packages" / f"{package.source}.yaml").is_file():
        return ()
    return config.package(package.source).install.leftovers


def _test(
    machine: Machine, script: str, first: str, package: RepositoryPackage, tolerated: Sequence[str]
) -> list[Finding]:
    """Install (or upgrade, as `first` says), try and remove one package; return what is wrong with it."""
    findings: list[Finding] = []
    for step in (first, "try", "remove"):
        try:
            found = _step(machine, script, step, package)
        except GuestError as error:
            findings.append(Finding(package=package.name, phase=STEPS[step].phase, message=str(error)))
            break
        findings += [item for item in found if not _is_tolerated(item, tolerated)]
        if step == first and found:
            break
    if len(findings) > FINDINGS:
        more = f"and {len(findings) - FINDINGS} more findings"
        findings[FINDINGS:] = [Finding(package=package.name, phase=findings[-1].phase, message=more)]
    return findings


def _step(machine: Machine, script: str, step: str, package: RepositoryPackage) -> list[Finding]:
    """Run one step of the guest's script for a package; return what it found.

    Raises:
        GuestError: the machine went away, or it took too long.
        InfrastructureError: the repositories cannot be read there.
    """
    described = STEPS[step]
    arguments = (package.name, package.version, package.architecture) if described.exact else (package.name,)
    done = machine.run(script, described.word, *arguments, timeout=described.seconds, limit=FINDINGS_BYTES)
    if described.exact and done.status == 75:
        last = _log_of(machine).decode(errors="replace").strip().splitlines() or ["no output"]
        raise InfrastructureError(f"cannot read the repositories in the machine: {last[-1]}")
    found = _parse(package.name, described.phase, done.text())
    if step == "upgrade":
        found = [one.model_copy(update={"phase": step}) if one.phase == "install" else one for one in found]
    if done.status:
        message = f"the test was ended in the machine, with status {done.status}"
        found.append(Finding(package=package.name, phase=described.phase, message=message))
    return found


def _parse(package: str, phase: str, text: str) -> list[Finding]:
    """Read the guest's findings; a line of another form is one, too."""
    findings = []
    for line in text.splitlines():
        said, file, message = [*line.split("\t", 2), "", ""][:3]
        known = said in PHASES
        findings.append(
            Finding(
                package=package,
                phase=said if known else phase,
                file=printable(file) or None if known else None,
                message=printable(message if known else line) or "no reason was given",
            )
        )
    return findings


def _is_tolerated(finding: Finding, patterns: Sequence[str]) -> bool:
    return finding.phase == "leftover" and any(fnmatchcase(finding.file or "", pattern) for pattern in patterns)


def _log_of(machine: Machine) -> bytes:
    """Return the end of the guest's log; it may be gone with the guest."""
    try:
        return machine.run('tail -c "$1" /run/pkgci/log', str(LOG_BYTES), timeout=60, limit=2 * LOG_BYTES).output
    except GuestError as error:
        return f"the log is lost: {error}\n".encode()


def _line(finding: Finding) -> str:
    parts = (finding.package, finding.phase, finding.file, finding.message)
    return ": ".join(part for part in parts if part)


def _write_junit(record: Install, path: Path) -> None:
    """Write the result in the XML form that Jenkins' JUnit plugin reads: a test case a package, and one an upgrade."""
    failed = sum(not outcome.passed for outcome in record.packages)
    suite = ET.Element(
        "testsuite", name=f"install-{record.target}", tests=str(len(record.packages)), failures=str(failed)
    )
    suite.set("skipped", str(sum(bool(outcome.notice) for outcome in record.packages)))
    for outcome in record.packages:
        case = ET.SubElement(suite, "testcase", classname=f"install.{record.target}", name=outcome.name)
        case.set("time", str(outcome.seconds))
        if outcome.notice:
            ET.SubElement(case, "skipped", message=outcome.notice)
        if not outcome.passed:
            failure = ET.SubElement(case, "failure", message=_line(outcome.findings[0]))
            failure.text = "\n".join(map(_line, outcome.findings))
    path.parent.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
