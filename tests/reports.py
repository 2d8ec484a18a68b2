"""Artifacts of runs of `build`, as the jobs leave them, for tests of the report: made by the records' own models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pkgci.artifacts import (
    Build,
    ChangeSummary,
    Child,
    Contents,
    Dependant,
    Difference,
    File,
    FileDifference,
    Finding,
    Former,
    Gate,
    GateBuild,
    Install,
    InstallOutcome,
    Lint,
    LintFinding,
    Package,
    PackageContents,
    PackagedFile,
    RelationDifference,
    Repository,
    RepositoryPackage,
    Result,
    Run,
    ScenarioOutcome,
    SkippedBuild,
    Systest,
)

TARGET = "bookworm-amd64"
VERSION = "2.10+pkg1.3~tc718c76c-3+deb12"
BEGUN = datetime(2026, 11, 23, 7, 22, 11, tzinfo=UTC)
URL = "http://127.0.0.1:8470/test/hello-4711-2-ed8d15ef/bookworm-amd64/"
KEY = (
    "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n"
    + "mQGNBGsD4ucBDADHUZ5lFQA2\n" * 20
    + "=yv8y\n-----END PGP PUBLIC KEY BLOCK-----\n"
)
CHANGE = ChangeSummary(
    id="4711,2", project="tools/hello", branch="main", pipeline="check", subject="Greet in the language of the reader"
)
ZUUL = {
    "ZUUL_PROJECT": "tools/hello",
    "ZUUL_BRANCH": "main",
    "ZUUL_CHANGE": "4711",
    "ZUUL_PATCHSET": "2",
    "ZUUL_PIPELINE": "check",
    "ZUUL_URL": "https://review.localhost/",
    "ZUUL_CHANGES": "tools/hello:main:refs/changes/11/4711/2",
}
COMPILER = """2026-11-23T07:22:20.101Z == build
2026-11-23T07:22:20.302Z dpkg-buildpackage: info: source package hello
2026-11-23T07:22:21.303Z    dh_auto_build
2026-11-23T07:22:21.303Z \tmake -j2
2026-11-23T07:22:22.304Z make[1]: Entering directory '/build/hello-2.10'
2026-11-23T07:22:22.304Z gcc -DHAVE_CONFIG_H -I. -g -O2 -Wformat -c -o src/hello.o src/hello.c
2026-11-23T07:22:23.305Z \x1b[1msrc/hello.c:\x1b[0m In function 'main':
2026-11-23T07:22:23.305Z src/hello.c:62:3: error: expected ';' before 'return'
2026-11-23T07:22:23.305Z    62 |   return EXIT_SUCCESS;
2026-11-23T07:22:23.305Z       |   ^~~~~~
2026-11-23T07:22:23.406Z make[1]: *** [Makefile:1482: src/hello.o] Error 1
2026-11-23T07:22:23.406Z make[1]: Leaving directory '/build/hello-2.10'
2026-11-23T07:22:23.507Z dh_auto_build: error: make -j2 returned exit code 2
2026-11-23T07:22:23.608Z dpkg-buildpackage: error: debian/rules binary subprocess returned exit status 2
2026-11-23T07:22:23.709Z compile FAILURE (fault: package): hello: the build failed: src/hello.c:62:3: error: expected
2026-11-23T07:22:23.710Z Finished: FAILURE
"""
SCRIPT = """#!/bin/sh
set -e
if [ "$1" = configure ]; then
    update-alternatives --install /usr/bin/greet greet /usr/bin/hello 50
fi
"""


@dataclass
class RunOf:
    """Writes the artifacts of one run, job by job; `end` writes its result."""

    directory: Path
    children: list[Child] = field(default_factory=list)

    def begin(self, change: ChangeSummary = CHANGE, notice: str = "") -> "RunOf":
        """What `build` leaves first."""
        Run(
            job=f"build-{TARGET}",
            number=7,
            target=TARGET,
            notice=notice,
            change=change,
            package="hello",
            source_tree="c718c76c1a10289f963fc76fd40d3100d5961a02",
            packaging_tree="c718c76c1a10289f963fc76fd40d3100d5961a02",
            parameters={**ZUUL, "RUN_TESTS": "true"},
        ).write(self.directory / "run.json")
        return self

    def job(
        self, step: str, at: float, seconds: float, result: str = "SUCCESS", reason: str = "done", log: str = ""
    ) -> Path:
        """One job: started `at` seconds after the run; returns the directory with what it left."""
        started = BEGUN + timedelta(seconds=at)
        name = f"{step}-{TARGET}"
        parameters = {**ZUUL, "BUILD_KEY": "4" * 64} if step != "compile" else ZUUL
        self.children.append(
            Child(
                job=name,
                number=12,
                directory=name,
                parameters=parameters,
                result=result,
                started=started,
                seconds=seconds,
            )
        )
        self._result(name, step, result, reason, started + timedelta(seconds=1.2), seconds - 1.2, ())
        (self.directory / name / "console.log").write_text(log or f"2026-11-23T07:22:13.000Z {name}/12\n")
        return self.directory / name

    def end(
        self, result: str = "SUCCESS", reason: str = "hello: passed", fault: str = "", seconds: float = 62.3
    ) -> Path:
        """The run's own result; returns its artifacts."""
        self._result("", "build", result, reason, BEGUN, seconds, tuple(self.children), fault)
        return self.directory

    def _result(
        self,
        place: str,
        step: str,
        result: str,
        reason: str,
        started: datetime,
        seconds: float,
        children: tuple[Child, ...],
        fault: str = "",
    ) -> None:
        faults = {"SUCCESS": ("none", 0), "FAILURE": ("package", 1), "ABORTED": ("aborted", 143)}
        found, code = faults[result]
        Result(
            step=step,
            result=result,
            fault=fault or found,
            exit=code,
            reason=reason,
            started=started,
            seconds=round(seconds, 1),
            children=children,
        ).write(self.directory / place / "result.json")

    def compiled(self, packages: Mapping[str, PackageContents] | None = None, origin: str = "built") -> None:
        """A `compile` that passed, with two packages."""
        place = self.job("compile", 0.4, 24.1)
        packages = packages or {"hello": contents("hello"), "hello-dbgsym": contents("hello-dbgsym")}
        built = tuple(package(name, one) for name, one in packages.items())
        Build(
            change=CHANGE,
            package="hello",
            version=VERSION,
            target=TARGET,
            source_tree="c718c76c1a10289f963fc76fd40d3100d5961a02",
            packaging_tree="c718c76c1a10289f963fc76fd40d3100d5961a02",
            key="4" * 64,
            origin=origin,
            packages=built,
            files=tuple(File(name=one.file, size=54_321, sha256="0" * 64) for one in built),
            seconds={"fetch": 0.14, "root": 2.1, "metadata": 0.01, "dependencies": 1.6, "build": 19.2},
        ).write(place / "build.json")
        Contents(packages=tuple(packages.values())).write(place / "contents.json")
        (place / "logs").mkdir()
        (place / "logs" / "build.log").write_text("== build\n")

    def compared(self, *differences: Difference) -> None:
        """What `compile` found changed against former versions."""
        Former(packages=differences or (difference(),)).write(self.directory / f"compile-{TARGET}" / "former.json")

    def published(self) -> None:
        """A `publish` that passed."""
        place = self.job("publish", 24.8, 2.5)
        listed = [RepositoryPackage(**package("hello").model_dump(), source="hello", key="4" * 64)]
        Repository(
            url=URL,
            format="deb",
            codename="bookworm",
            target=TARGET,
            packages=tuple(listed),
            signing_key=KEY,
            expires=datetime(2026, 12, 7, tzinfo=UTC),
        ).write(place / "repository.json")

    def linted(self, findings: Sequence[LintFinding] = (), result: str = "SUCCESS", reason: str = "done") -> None:
        """A `lint`."""
        place = self.job("lint", 27.5, 9.0, result, reason, f"2026-11-23T07:22:40.000Z {reason}\n")
        Lint(
            target=TARGET,
            package="hello",
            version=VERSION,
            key="4" * 64,
            tool="lintian 2.116.3",
            fails="error",
            findings=tuple(findings),
            overridden=1,
        ).write(place / "lint.json")

    def installed(self, findings: Sequence[Finding] = ()) -> None:
        """An `install`, which failed if there are findings."""
        result, said = ("FAILURE", f"install test of {words(findings[0])}") if findings else ("SUCCESS", "done")
        lines = "".join(f"2026-11-23T07:22:59.000Z   {words(finding)}\n" for finding in findings)
        place = self.job("install", 27.5, 30.5, result, said, lines)
        Install(
            target=TARGET,
            snapshot=f"{TARGET}/20261123T073048-bef61e",
            repositories=(f"{URL}repository.json",),
            packages=(
                InstallOutcome(
                    package="hello", version=VERSION, passed=not findings, seconds=22.6, findings=tuple(findings)
                ),
            ),
        ).write(place / "install.json")
        (place / "logs").mkdir()
        (place / "logs" / "hello.log").write_text("Unpacking hello ...\nSetting up hello ...\n")

    def tested(self, failed: bool = False) -> None:
        """A `systest`."""
        place = self.job(
            "systest", 27.5, 33.9, "FAILURE" if failed else "SUCCESS", "1 test failed" if failed else "done"
        )
        outcomes = [
            ScenarioOutcome(scenario="smoke", test="greets", result="passed", seconds=3.1),
            ScenarioOutcome(
                scenario="smoke", test="greets in French", result="skipped", seconds=0, message="no locale"
            ),
        ]
        if failed:
            outcomes.append(
                ScenarioOutcome(
                    scenario="upgrade",
                    test="keeps its settings",
                    result="failed",
                    seconds=11.0,
                    message="/etc/hello.conf was reset",
                    log="logs/upgrade.log",
                )
            )
            (place / "logs").mkdir()
            (place / "logs" / "upgrade.log").write_text("upgrading\ncomparing\n/etc/hello.conf was reset\n")
        Systest(
            target=TARGET,
            environment="single",
            snapshot="single/20261123T060000-1b2c3d",
            repositories=(f"{URL}repository.json",),
            parameters={"ENVIRONMENT": "single"},
            packages=(package("hello"),),
            outcomes=tuple(outcomes),
        ).write(place / "systest.json")


def words(finding: Finding) -> str:
    """A finding in one line, as the install test says it."""
    return ": ".join(filter(None, (finding.package, finding.phase, finding.file, finding.message)))


def package(name: str, inside: PackageContents | None = None) -> Package:
    """A binary package."""
    file = inside.file if inside else f"{name}_{VERSION}_amd64.deb"
    kind = "debug" if name.endswith("-dbgsym") else "binary"
    return Package(name=name, version=VERSION, architecture="amd64", file=file, sha256="0" * 64, kind=kind)


def contents(name: str, **more: object) -> PackageContents:
    """What is in a package."""
    given: dict = {
        "name": name,
        "version": VERSION,
        "architecture": "amd64",
        "file": f"{name}_{VERSION}_amd64.deb",
        "installed": 284 << 10,
        "relations": {
            "Depends": ("libc6 (>= 2.34)", "dpkg (>= 1.15.4) | install-info"),
            "Breaks": ("hello-debhelper (<< 2.9)",),
        },
        "scripts": {"postinst": SCRIPT},
        "files": (
            PackagedFile(path="/usr/bin", mode="drwxr-xr-x", size=0),
            PackagedFile(path="/usr/bin/hello", mode="-rwxr-xr-x", size=31_496),
            PackagedFile(path="/usr/bin/hallo", mode="lrwxrwxrwx", size=0, target="hello"),
            PackagedFile(path="/usr/share/doc/hello/changelog.gz", mode="-rw-r--r--", size=5_120),
            PackagedFile(path="/usr/share/man/man1/hello.1.gz", mode="-rw-r--r--", size=1_234),
        ),
    }
    return PackageContents(**{**given, **more})


def difference(**more: object) -> Difference:
    """What changed against a former version."""
    grown = PackagedFile(path="/usr/bin/hello", mode="-rwxr-xr-x", size=31_496)
    given: dict = {
        "name": "hello",
        "architecture": "amd64",
        "version": VERSION,
        "former_version": "2.10+pkg1.2-3+deb12",
        "repository": "http://127.0.0.1:8470/rocket-2/bookworm/",
        "installed": 1536,
        "files": (
            FileDifference(
                former=None, now=PackagedFile(path="/usr/bin/hallo", mode="lrwxrwxrwx", size=0, target="hello")
            ),
            FileDifference(former=grown.model_copy(update={"size": 30_001}), now=grown),
            FileDifference(former=PackagedFile(path="/usr/lib/hello/helper", mode="-rwsr-xr-x", size=9_000), now=None),
        ),
        "relations": (RelationDifference(field="Depends", removed=("libc6 (>= 2.31)",), added=("libc6 (>= 2.34)",)),),
        "scripts": {
            "postinst": "--- former\n+++ now\n@@ -1,3 +1,3 @@\n set -e\n-true\n+update-alternatives --install /usr/bin/greet\n"
        },
    }
    return Difference(**{**given, **more})


FINDINGS = (
    LintFinding(
        package="hello",
        severity="warning",
        tag="no-manual-page",
        message="usr/bin/hallo has none",
        file="usr/bin/hallo",
    ),
    LintFinding(
        package="hello",
        severity="error",
        tag="possibly-insecure-handling-of-tmp-files",
        message="mktemp is not used in a maintainer script",
    ),
    LintFinding(
        package="hello", severity="info", tag="hardening-no-fortify-functions", message="", file="usr/bin/hello"
    ),
)


def passed(directory: Path) -> Path:
    """A run that passed, with all there is."""
    run = RunOf(directory).begin()
    run.compiled()
    run.compared()
    run.published()
    run.linted(FINDINGS[::2])
    run.installed()
    run.tested()
    return run.end()


def failed_build(directory: Path) -> Path:
    """A run whose package does not compile."""
    run = RunOf(directory).begin()
    reason = "hello: the build failed: src/hello.c:62:3: error: expected ';' before 'return'"
    run.job("compile", 0.4, 13.3, "FAILURE", reason, COMPILER)
    return run.end("FAILURE", f"compile-{TARGET}/12: {reason}", seconds=14.2)


def failed_lint(directory: Path) -> Path:
    """A run whose lint fails and stops the tests beside it."""
    run = RunOf(directory).begin()
    run.compiled(origin="store")
    run.published()
    reason = "lint of hello: error: possibly-insecure-handling-of-tmp-files: mktemp is not used in a maintainer script"
    run.linted(FINDINGS, "FAILURE", reason)
    run.job("install", 27.5, 9.6, "ABORTED", "stopped by SIGTERM")
    run.job("systest", 27.5, 9.7, "ABORTED", "stopped by SIGTERM")
    return run.end("FAILURE", f"lint-{TARGET}/12: {reason}", seconds=37.9)


def failed_install(directory: Path) -> Path:
    """A run whose package leaves a file behind."""
    run = RunOf(directory).begin(notice="Packages for Debian's own rpm, not for use on an RPM distribution.")
    run.compiled()
    run.published()
    run.linted()
    findings = [
        Finding(package="hello", phase="leftover", message="is still there after the removal", file="/etc/left-behind"),
        Finding(
            package="hello",
            phase="run",
            message="status 127: libgreet.so.1: cannot open shared object",
            file="/usr/bin/hello",
        ),
    ]
    run.installed(findings)
    run.tested(failed=True)
    return run.end("FAILURE", f"install-{TARGET}/12: install test of {words(findings[0])}")


def aborted(directory: Path) -> Path:
    """A run that was stopped while it compiled."""
    run = RunOf(directory).begin()
    run.job("compile", 0.4, 5.0, "ABORTED", "stopped by SIGTERM", COMPILER.partition("2026-11-23T07:22:23.305Z src")[0])
    return run.end("ABORTED", "stopped by SIGTERM", seconds=5.6)


def refused(directory: Path) -> Path:
    """A run whose parameters are wrong: nothing is known of it but the reason."""
    reason = "parameter ZUUL_PROJECT: '../../etc' is not allowed; it must match [A-Za-z0-9_]+"
    return RunOf(directory).end("FAILURE", reason, "request", 0.2)


def failed_gate(directory: Path) -> Path:
    """A gate of two changes and a project without packages, of which one change does not compile."""
    run = RunOf(directory).begin()
    run.job("order", 0.4, 3.1)
    reason = "hello: the build failed: src/hello.c:62:3: error: expected ';' before 'return'"
    inner = RunOf(directory / f"build-{TARGET}")
    inner.job("compile", 4.4, 13.3, "FAILURE", reason, COMPILER)
    run.job("build", 4.0, 14.2, "FAILURE", f"compile-{TARGET}/12: {reason}")
    inner.end("FAILURE", f"compile-{TARGET}/12: {reason}", seconds=14.2)
    (inner.directory / "index.html").write_text("its own report")
    common = {"branch": "main", "release": "rocket"}
    Gate(
        target=TARGET,
        changes=(ZUUL["ZUUL_CHANGES"], "tools/greet:main:refs/changes/12/4712/1"),
        builds=(
            GateBuild(
                project="tools/greet",
                change="4712,1",
                package="greet",
                after=("libgreet",),
                result="SUCCESS",
                version=VERSION,
                key="4" * 64,
                origin="store",
                repository=URL,
                **common,
            ),
            GateBuild(
                project="tools/hello",
                change="4711,2",
                package="hello",
                result="FAILURE",
                directory=f"build-{TARGET}",
                **common,
            ),
        ),
        skipped=(SkippedBuild(project="docs", branch="main", reason="no package has this project"),),
        dependants=(Dependant(repository="rocket/bookworm", package="farewell"),),
    ).write(directory / "gate.json")
    return run.end("FAILURE", f"build-{TARGET}/12: compile-{TARGET}/12: {reason}", seconds=20.0)


RUNS = (passed, failed_build, failed_lint, failed_install, failed_gate, aborted, refused)
