"""The install test: each package of a build is installed, tried and removed on its own, in a machine restored for it.

The machine runs the package's code as root, so nothing that it says is trusted: its output is bounded, and read as text
with a form of its own. What decides here is the absence of findings, so a package that forges them only harms itself.
"""

import logging
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import get_args

from pkgci import passed, repository
from pkgci.artifacts import Finding, Install, InstallOutcome, Repository, RepositoryPackage
from pkgci.config import Config, Target
from pkgci.errors import InfrastructureError, PackageError
from pkgci.server import serve
from pkgci.text import lines, printable
from pkgci.vm import guest
from pkgci.vm.machine import Machine
from pkgci.vm.remote import GuestError
from pkgci.vm.snapshot import Snapshot

log = logging.getLogger(__name__)

INSTALL_SECONDS = 900
TRY_SECONDS = 900
REMOVE_SECONDS = 600
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
        more = f" (and {len(failed) - 1} more packages)" if len(failed) > 1 else ""
        raise PackageError(f"install test of {_line(failed[0].findings[0])}{more}")
    return record


def _run(
    config: Config,
    target: Target,
    snapshot: Snapshot,
    records: Sequence[Repository],
    tested: Sequence[RepositoryPackage],
    artifacts: Path,
) -> list[InstallOutcome]:
    """Test each package in a machine of its own, and keep what the machine said."""
    proxy = guest.proxy(config, target, records)
    settings = guest.settings(target, records, tested)
    script = guest.script(target)
    outcomes = []
    for package in tested:
        started = time.monotonic()
        with snapshot.restored(config, proxy) as machine:
            machine.put(settings)
            findings, said = _test(machine, script, package, _tolerated(config, package))
        (artifacts / "logs").mkdir(parents=True, exist_ok=True)
        (artifacts / "logs" / f"{package.name}.log").write_text(lines(said))
        outcome = InstallOutcome(
            package=package.name,
            version=package.version,
            passed=not findings,
            seconds=round(time.monotonic() - started, 1),
            findings=tuple(findings),
        )
        log.info(
            "%s %s: %s, %.1f s",
            package.name,
            package.version,
            "passed" if outcome.passed else "FAILED",
            outcome.seconds,
        )
        for finding in findings:
            log.info("  %s", _line(finding))
        outcomes.append(outcome)
    return outcomes


def _tolerated(config: Config, package: RepositoryPackage) -> tuple[str, ...]:
    """Return the patterns of files that may stay, from the entry of the package's source package, if it has one."""
    if not (config.directory / "packages" / f"{package.source}.yaml").is_file():
        return ()
    return config.package(package.source).install.leftovers


def _test(
    machine: Machine, script: str, package: RepositoryPackage, tolerated: Sequence[str]
) -> tuple[list[Finding], bytes]:
    """Install, try and remove one package; return what is wrong with it, and the log."""
    findings: list[Finding] = []
    for step, phase, seconds, arguments in (
        ("install", "install", INSTALL_SECONDS, (package.name, package.version, package.architecture)),
        ("try", "run", TRY_SECONDS, (package.name,)),
        ("remove", "remove", REMOVE_SECONDS, (package.name,)),
    ):
        try:
            done = machine.run(script, step, *arguments, timeout=seconds, limit=FINDINGS_BYTES)
        except GuestError as error:
            findings.append(Finding(package=package.name, phase=phase, message=str(error)))
            break
        if step == "install" and done.status == 75:
            last = _log_of(machine).decode(errors="replace").strip().splitlines() or ["no output"]
            raise InfrastructureError(f"cannot read the repositories in the machine: {last[-1]}")
        found = _parse(package.name, phase, done.text())
        if done.status:
            message = f"the test was ended in the machine, with status {done.status}"
            found.append(Finding(package=package.name, phase=phase, message=message))
        findings += [item for item in found if not _is_tolerated(item, tolerated)]
        if step == "install" and found:
            break
    if len(findings) > FINDINGS:
        more = f"and {len(findings) - FINDINGS} more findings"
        findings[FINDINGS:] = [Finding(package=package.name, phase=findings[-1].phase, message=more)]
    return findings, _log_of(machine)


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
    """Write the result in the XML form that Jenkins' JUnit plugin reads: a test case a package."""
    failed = sum(not outcome.passed for outcome in record.packages)
    suite = ET.Element(
        "testsuite", name=f"install-{record.target}", tests=str(len(record.packages)), failures=str(failed)
    )
    for outcome in record.packages:
        case = ET.SubElement(suite, "testcase", classname=f"install.{record.target}", name=outcome.package)
        case.set("time", str(outcome.seconds))
        if not outcome.passed:
            failure = ET.SubElement(case, "failure", message=_line(outcome.findings[0]))
            failure.text = "\n".join(map(_line, outcome.findings))
    path.parent.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
