"""The install test: each package of a build is installed, tried and removed on its own, in a machine restored for it.

The machine runs the package's code as root, so nothing that it says is trusted: its output is bounded, and read as text
with a form of its own. What decides here is the absence of findings, so a package that forges them only harms itself.
"""

import base64
import logging
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import get_args

from pkgci import repository
from pkgci.artifacts import Finding, Install, InstallOutcome, Repository, RepositoryPackage
from pkgci.config import Config
from pkgci.errors import InfrastructureError, PackageError, RequestError
from pkgci.server import serve
from pkgci.vm.machine import GuestError, Machine
from pkgci.vm.proxy import Proxy, Rule
from pkgci.vm.snapshot import Snapshot, ensure, upstream_rules

log = logging.getLogger(__name__)

GUEST = Path(__file__).parent
INSTALL_SECONDS = 900
TRY_SECONDS = 900
REMOVE_SECONDS = 600
LOG_BYTES = 1 << 20
FINDINGS_BYTES = 1 << 18
FINDINGS = 50
PHASES = get_args(Finding.model_fields["phase"].annotation)


def prepare(config: Config, target_name: str) -> Snapshot:
    """Return the snapshot of the machine that packages of the target are installed in; make it where needed.

    Raises:
        RequestError: the target is unknown, or its base is not supported.
        InfrastructureError: it cannot be made.
    """
    return ensure(config, target_name, f"set -- baseline\n{_script(config, target_name)}")


def install(config: Config, target_name: str, repositories: Sequence[str], build_key: str, artifacts: Path) -> Install:
    """Run the install test; write `install.json`, `junit/install.xml` and `logs/PACKAGE.log` below `artifacts`.

    Args:
        config: the configuration.
        target_name: the target.
        repositories: URLs of `repository.json` files, below the configured prefixes.
        build_key: only packages of this build are tested; all, if empty.
        artifacts: an existing directory.

    Returns:
        What is in `install.json`.

    Raises:
        PackageError: a package fails; the records are written.
        RequestError: a repository is not allowed, of another target, or has nothing to test.
        InfrastructureError: the machines are at fault.
    """
    target = config.target(target_name)
    with serve(config):
        snapshot, outcomes = _run(config, target_name, repositories, build_key, artifacts)
    record = Install(
        target=target_name,
        snapshot=snapshot.id,
        repositories=tuple(repositories),
        notice=target.notice,
        packages=tuple(outcomes),
    )
    record.write(artifacts / "install.json")
    _write_junit(record, artifacts / "junit" / "install.xml")
    failed = [outcome for outcome in outcomes if not outcome.passed]
    if failed:
        more = f" (and {len(failed) - 1} more packages)" if len(failed) > 1 else ""
        raise PackageError(f"install test of {_line(failed[0].findings[0])}{more}")
    return record


def _run(
    config: Config, target_name: str, repositories: Sequence[str], build_key: str, artifacts: Path
) -> tuple[Snapshot, list[InstallOutcome]]:
    """Test each package in a machine of its own, and keep what the machine said."""
    target = config.target(target_name)
    records = repository.read(config, target_name, repositories)
    tested = [
        package
        for record in records
        for package in record.packages
        if package.kind == "binary" and build_key in ("", package.key)
    ]
    if not tested:
        raise RequestError(
            f"nothing to install: no binary package of build {build_key or '(any)'} in {len(records)} repositories"
        )
    snapshot = prepare(config, target_name)
    log.info("snapshot %s of %s", snapshot.id, f"{snapshot.manifest.created:%Y-%m-%d %H:%M}")
    upstream = upstream_rules(config, target_name) if target.format == "deb" else ()
    proxy = Proxy((*(Rule(record.url) for record in records), *upstream), config.cache / "proxy")
    settings = _deb_settings(records, tested) if target.format == "deb" else _rpm_settings(records)
    script = _script(config, target_name)
    outcomes = []
    for package in tested:
        started = time.monotonic()
        with snapshot.restored(config, proxy) as machine:
            machine.put(settings)
            findings, said = _test(machine, script, package, _tolerated(config, package))
        (artifacts / "logs").mkdir(parents=True, exist_ok=True)
        (artifacts / "logs" / f"{package.name}.log").write_bytes(said)
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
    return snapshot, outcomes


def _script(config: Config, target_name: str) -> str:
    """Return the guest's script."""
    name = f"install-{config.target(target_name).format}.sh"
    return (GUEST / name).read_text() + (GUEST / "install-guest.sh").read_text()


def _deb_settings(records: Sequence[Repository], tested: Sequence[RepositoryPackage]) -> dict[str, bytes]:
    """Return the guest's files for apt: sources with their keys, and preferences (apt_preferences(5)).

    Above 1000 a version is taken though a higher one is installed or at the upstream: what is tested before all.
    """
    files, sources, preferences = {}, [], []
    for number, record in enumerate(records):
        # binary: apt takes seconds to read an armoured key in an emulated machine
        key = f"/etc/apt/pkgci-{number}.gpg"
        files[key] = _dearmoured(record.signing_key)
        fields = {"Types": "deb", "URIs": record.url, "Suites": record.codename, "Components": record.component}
        sources.append("".join(f"{name}: {value}\n" for name, value in {**fields, "Signed-By": key}.items()))
    for package in [package for record in records for package in record.packages]:
        priority = 1002 if package in tested else 1001
        preferences.append(f"Package: {package.name}\nPin: version {package.version}\nPin-Priority: {priority}\n")
    files["/etc/apt/pkgci.d/pkgci.sources"] = "\n".join(sources).encode()
    files["/etc/apt/preferences.d/pkgci"] = "\n".join(preferences).encode()
    return files


def _dearmoured(key: str) -> bytes:
    """Return the binary form of an ASCII-armoured key (RFC 9580, 6.2)."""
    lines = key.split("\n\n", 1)[1].splitlines()
    return base64.b64decode("".join(line for line in lines if not line.startswith(("=", "-"))))


def _rpm_settings(records: Sequence[Repository]) -> dict[str, bytes]:
    """Return the guest's files for dnf. The signed index vouches for the packages by their checksums."""
    files = {}
    for number, record in enumerate(records):
        name, key = f"pkgci-{number}", f"/etc/pki/rpm-gpg/pkgci-{number}.asc"
        files[key] = record.signing_key.encode()
        lines = [f"[{name}]", f"name={name}", f"baseurl={record.url}", "enabled=1"]
        lines += ["gpgcheck=0", "repo_gpgcheck=1", f"gpgkey=file://{key}"]
        files[f"/etc/yum.repos.d/{name}.repo"] = "\n".join([*lines, ""]).encode()
    return files


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
                file=_printable(file) or None if known else None,
                message=_printable(message if known else line) or "no reason was given",
            )
        )
    return findings


def _is_tolerated(finding: Finding, patterns: Sequence[str]) -> bool:
    return finding.phase == "leftover" and any(fnmatchcase(finding.file or "", pattern) for pattern in patterns)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text).strip()[:1000]


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
