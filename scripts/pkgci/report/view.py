"""What a run of `build` or `gate` says to people, from its artifacts alone: the one source of the page and of summaries.

Everything here is bounded: of a long list the first is shown, and how much more there is. What a text may do to a page
or a terminal is not decided here.
"""

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar
from urllib.parse import quote, urlsplit

from pkgci.artifacts import (
    Build,
    Child,
    Contents,
    Dependant,
    Difference,
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
    Record,
    Repository,
    Result,
    Run,
    ScenarioOutcome,
    Systest,
    Verified,
)
from pkgci.errors import InfrastructureError
from pkgci.formats import apt, repomd
from pkgci.text import listed, plain
from pkgci.web import LOOPBACK

PAGE = "index.html"
# of each list on the page
PACKAGES, FILES, FINDINGS, RELATIONS, TEXT_LINES, LINKS = 60, 200, 100, 60, 120, 200
FILES_IN_ALL = 3000
TO_INSTALL = 10  # packages in one command
# an excerpt: lines before and after the one that says why; before it, of a job that only lists findings in its console
BEFORE, AFTER, BEFORE_FINDINGS = 9, 3, 2
LINE = 300
LOG_BYTES = 1 << 20
# the index of a system test's logs: so many, what is read of each and of all, and of that so many lines that tell of an error
LOGS, SEARCHED_BYTES, SEARCHED_IN_ALL, ERRORS = 100, 4 << 20, 32 << 20, 3
ERROR = re.compile(r"\b(error|fail(ed|ure)?|fatal|panic|traceback|segfault|killed)\b", re.IGNORECASE)
COMPARED = 300  # what `last_words` takes of a line
VERDICTS = {"SUCCESS": "Passed", "FAILURE": "Failed", "ABORTED": "Aborted"}
BLAME = {
    "none": "",
    "package": "The package is at fault.",
    "request": "The request is wrong: a parameter, or the configuration.",
    "infrastructure": "The machines are at fault, not the change: the same may pass when it is tried again.",
    "aborted": "It was stopped before its end; this says nothing about the change.",
    "bug": "This is a bug in pkgci; the change is not at fault.",
}
SEVERITIES = ("error", "warning", "info")
TIME_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ?")
# what a step and its engine say at the end of every log
EPILOGUE = re.compile(
    r"\w+ (SUCCESS|FAILURE|ABORTED) \(fault: |The step ended with status |asked to stop|Finished: |Build step '"
    r"|Archiving artifacts"
)

Item = TypeVar("Item")
AnyRecord = TypeVar("AnyRecord", bound=Record)


@dataclass(frozen=True)
class Cut(Generic[Item]):
    """The first of a list, and how many more there are."""

    items: tuple[Item, ...] = ()
    more: int = 0

    @classmethod
    def of(cls, items: Iterable[Item], most: int) -> "Cut[Item]":
        """Cut a list after `most` items."""
        kept = tuple(items)
        return cls(kept[:most], max(0, len(kept) - most))

    def __len__(self) -> int:
        return len(self.items) + self.more

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)


@dataclass(frozen=True)
class Line:
    """A line of a log; `marked` is the one that says why."""

    number: int
    text: str
    marked: bool


@dataclass(frozen=True)
class Excerpt:
    """The lines of a job's log around the one that says why it failed. Links are relative to the artifacts."""

    job: str
    log: str
    link: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Job:
    """One job of the run. `start`, `waited` and `ran` are percents of the run's time, for a bar.

    `about` is its project where that is another one than the run's.
    """

    child: Child
    step: str
    about: str
    state: str
    link: str | None
    reason: str
    waiting: float
    start: float
    waited: float
    ran: float
    parts: tuple[tuple[str, float], ...]

    @property
    def rerun(self) -> str:
        """The command that repeats it where it ran."""
        return f"pkgci jobs run {self.child.job} --rerun {self.child.number}"

    @property
    def command(self) -> str:
        """The command that repeats it with all parameters spelled out."""
        return command(self.child.job, self.child.parameters)


@dataclass(frozen=True)
class PackageView:
    """A binary package: its size in bytes if known, what is in it, and what changed against its former version."""

    package: Package
    size: int | None
    contents: PackageContents | None
    files: Cut[PackagedFile]
    relations: tuple[tuple[str, Cut[str]], ...]
    scripts: tuple[tuple[str, Cut[str]], ...]
    difference: "DifferenceView | None"

    @property
    def anchor(self) -> str:
        """The id of its part of the page."""
        return f"package-{self.package.name}-{self.package.architecture}"


@dataclass(frozen=True)
class DifferenceView:
    """What a package changes against its former version."""

    difference: Difference
    files: Cut[FileDifference]
    scripts: tuple[tuple[str, Cut[str]], ...]

    @property
    def summary(self) -> str:
        """It in a few words."""
        if self.difference.notice:
            return self.difference.notice
        files = self.difference.files
        counts = (
            (sum(one.former is None for one in files), "file added", "files added"),
            (sum(one.now is None for one in files), "file removed", "files removed"),
            (sum(None not in (one.former, one.now) for one in files), "file changed", "files changed"),
            (len(self.difference.relations), "dependency field changed", "dependency fields changed"),
            (len(self.difference.scripts), "maintainer script changed", "maintainer scripts changed"),
        )
        said = [_count(*count) for count in counts if count[0]]
        return ", ".join(said) or "the same files, dependencies and scripts"


@dataclass(frozen=True)
class LintView:
    """What lint found, the worst first; apart from it what is known from the released package."""

    record: Lint
    findings: Cut[LintFinding]
    known: Cut[LintFinding]
    counts: tuple[tuple[str, int], ...]

    @property
    def tone(self) -> str:
        """How bad the worst is: `failed` where it fails the job."""
        worst = [name for name, _ in self.counts][:1]
        bad = worst and self.record.fails in SEVERITIES[SEVERITIES.index(worst[0]) :]
        return "failed" if bad else "aborted" if worst and worst[0] != "info" else "passed"

    @property
    def summary(self) -> str:
        """It in a few words."""
        found = [_count(number, severity, severity if severity == "info" else "") for severity, number in self.counts]
        known = f"; {len(self.known)} known from the released package" if self.known else ""
        silenced = f"; {self.record.overridden} overridden" if self.record.overridden else ""
        return (", ".join(found) or ("nothing new" if known else "nothing found")) + known + silenced


@dataclass(frozen=True)
class Tested:
    """One package of the install test."""

    outcome: InstallOutcome
    link: str | None
    findings: Cut[Finding]


@dataclass(frozen=True)
class InstallView:
    """How the install test ended."""

    record: Install
    packages: Cut[Tested]

    @property
    def tone(self) -> str:
        """Whether it `passed` or `failed`."""
        return "passed" if all(outcome.passed for outcome in self.record.packages) else "failed"

    @property
    def summary(self) -> str:
        """It in a few words."""
        upgrades = [outcome for outcome in self.record.packages if outcome.former_version and not outcome.notice]
        said = [
            self._of([outcome for outcome in self.record.packages if not outcome.former_version], "package"),
            self._of(upgrades, "upgrade") if upgrades else "",
        ]
        return ", ".join(filter(None, said))

    @staticmethod
    def _of(outcomes: Sequence[InstallOutcome], what: str) -> str:
        failed, total = sum(not outcome.passed for outcome in outcomes), _count(len(outcomes), what)
        return f"{failed} of {total} failed" if failed else f"{total} passed"


@dataclass(frozen=True)
class SystestView:
    """How the system test ended, what failed first."""

    record: Systest
    outcomes: Cut[tuple[ScenarioOutcome, str | None]]

    @property
    def tone(self) -> str:
        """Whether it `passed` or `failed`."""
        return "failed" if any(outcome.result == "failed" for outcome in self.record.outcomes) else "passed"

    @property
    def summary(self) -> str:
        """It in a few words."""
        results = [outcome.result for outcome in self.record.outcomes]
        counts = [(word, results.count(word)) for word in ("passed", "failed", "skipped")]
        said = ", ".join(f"{number} {word}" for word, number in counts if number) or "no test"
        return f"{said}, at the second attempt" if self.record.retried else said


@dataclass(frozen=True)
class SystestLog:
    """A log of the system test: where it is, its size in bytes, and its first lines that tell of an error."""

    path: str
    url: str
    size: int
    errors: tuple[Line, ...]


@dataclass(frozen=True)
class GateView:
    """A gate's builds, each with the link to its page if it has one."""

    record: Gate
    builds: Cut[tuple[GateBuild, str | None]]

    @property
    def tone(self) -> str:
        """Whether all builds `passed`, one `failed`, or was `aborted`."""
        results = {build.result for build in self.record.builds}
        return "failed" if "FAILURE" in results else "passed" if results <= {"SUCCESS"} else "aborted"

    @property
    def summary(self) -> str:
        """It in a few words."""
        made = sum(build.result == "SUCCESS" for build in self.record.builds)
        stored = sum(build.origin == "store" for build in self.record.builds)
        said = f"{made} of {_count(len(self.record.builds), 'package')} built"
        return said + (f", {stored} of them taken from the store" if stored else "")

    def line(self, build: GateBuild) -> str:
        """Return what came of a build in one line."""
        states = {"": "not started", "SUCCESS": "built", "FAILURE": "failed", "ABORTED": "aborted"}
        state = "from the store" if build.origin == "store" else states[build.result]
        return f"{build.version} {state}".strip() + (f", against {', '.join(build.after)}" if build.after else "")

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know besides."""
        notes = [one for one in [_named(self.record.dependants)] if one]
        notes += [f"{one.project}, branch {one.branch}: nothing to build: {one.reason}" for one in self.record.skipped]
        notes += ["recorded: what was tested is published once it is merged"] if self.record.recorded else []
        return tuple(notes)


@dataclass(frozen=True)
class Use:
    """How to use the test repository: the client's file, as it lies in the repository, and what a user types."""

    record: Repository
    client_name: str
    client: Cut[str]
    commands: tuple[str, ...]

    @property
    def local(self) -> bool:
        """Whether only this machine reaches it."""
        return urlsplit(self.record.url).hostname in LOOPBACK


@dataclass(frozen=True)
class Link:
    """A file of the run: its URL relative to the artifacts, its path below them, its size in bytes."""

    url: str
    path: str
    size: int


@dataclass(frozen=True)
class View:
    """A run. What was not reached, or cannot be read, is None or empty."""

    result: Result
    run: Run | None
    build: Build | None
    gate: GateView | None
    verified: Verified | None
    excerpts: tuple[Excerpt, ...]
    jobs: tuple[Job, ...]
    packages: Cut[PackageView]
    lint: LintView | None
    install: InstallView | None
    systest: SystestView | None
    systest_logs: Cut[SystestLog]
    use: Use | None
    links: Cut[Link]
    problems: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """One word or two."""
        if self.result.result == "SUCCESS" and self.result.reason.startswith("nothing to build"):
            return "Nothing to build"
        return VERDICTS[self.result.result]

    @property
    def blame(self) -> str:
        """Who has to act, in a sentence."""
        return BLAME[self.result.fault]

    @property
    def subject(self) -> str:
        """What was built for what, as far as it is known."""
        if self.run is None:
            by_itself = self.systest and self.result.step == "systest"
            return f"system test for {self.systest.record.target}" if by_itself else ""
        what = _count(len(self.gate.record.changes), "change") if self.gate and self.gate.record.changes else ""
        return f"{what or self.run.package or self.run.change.project} for {self.run.target}"

    @property
    def built(self) -> str:
        """Where the packages came from, and what was asked of the build beyond the usual."""
        if not self.build:
            return ""
        said = ["taken from the store: the same input was built before"] if self.build.origin == "store" else []
        said += [f"built with {', '.join(self.build.profiles)}"] if self.build.profiles else []
        if self.build.reproducible is not None:
            said.append("the same when built again" if self.build.reproducible else "not the same when built again")
        return "; ".join(said)

    @property
    def outcome(self) -> str:
        """Why it did not pass, or what did, in one line."""
        if self.result.result != "SUCCESS" or not self.build or (self.run and self.run.untested):
            return self.result.reason
        said = [
            _count(len(self.packages), "package") + (" built" if self.build.origin == "built" else " from the store")
        ]
        for what, part in (("lint", self.lint), ("install test", self.install), ("system test", self.systest)):
            said += [f"{what}: {part.summary}"] if part else []
        if self.run and self.run.parameters.get("RUN_TESTS") == "false":
            said.append("tests were not asked for")
        said += [self.dependants] if self.dependants else []
        return "; ".join(said)

    @property
    def dependants(self) -> str:
        """Which packages build-depend on what changes, and are not built anew, in one line; nothing when none are known."""
        return _named(self.verified.dependants) if self.verified else ""

    @property
    def ended(self) -> datetime:
        """When the run ended."""
        return self.result.started + timedelta(seconds=self.result.seconds)

    @property
    def commands(self) -> tuple[str, str] | None:
        """The commands that repeat the whole run: where it ran, and with all parameters spelled out."""
        if self.run is None:
            return None
        rerun = f"pkgci jobs run {self.run.job} --rerun {self.run.number}" if self.run.number is not None else ""
        return rerun, command(self.run.job, self.run.parameters)


def command(job: str, parameters: Mapping[str, str]) -> str:
    """Return the shell command that runs a job by hand."""
    words = ["pkgci", "jobs", "run", job, *(f"{name}={value}" for name, value in parameters.items() if value)]
    return " ".join(shlex.quote(word) for word in words)


def read(artifacts: Path) -> View:
    """Make the view of a run from its artifacts.

    Args:
        artifacts: what a build of the job `build`, `gate` or `systest` left, with `result.json`.

    Raises:
        InfrastructureError: there is no `result.json`.
    """
    result = Result.read(artifacts / "result.json")
    problems: list[str] = []

    def record(model: type[AnyRecord], path: Path) -> AnyRecord | None:
        if not path.is_file():
            return None
        try:
            return model.read(path)
        except InfrastructureError:
            problems.append(f"{path.relative_to(artifacts)} cannot be read")
            return None

    def left(model: type[AnyRecord], name: str) -> tuple[AnyRecord, Path] | tuple[None, None]:
        found = [(made, place) for place in directories if (made := record(model, place / name))]
        return found[-1] if found else (None, None)

    run = record(Run, artifacts / "run.json")
    gate = record(Gate, artifacts / "gate.json")
    children = sorted(result.children, key=lambda child: child.started)
    # packages of changes ahead have their own reports
    directories = [artifacts / child.directory for child in children if not _about(run, child)]
    build, _ = left(Build, "build.json")
    repository, _ = left(Repository, "repository.json")
    contents, _ = left(Contents, "contents.json")
    former, _ = left(Former, "former.json")
    directories = [artifacts / child.directory for child in children]
    verified, _ = left(Verified, "verified.json")
    lint, _ = left(Lint, "lint.json")
    install, installed_in = left(Install, "install.json")
    jobs = []
    for child, directory in zip(children, directories, strict=True):
        own = record(Result, directory / "result.json")
        made = record(Build, directory / "build.json")
        jobs.append(_job(artifacts, result, run, child, own, made.seconds if made else {}))
    tests = [artifacts / job.child.directory for job in jobs if job.step.startswith("systest")]
    if result.step == "systest":
        directories = tests = [artifacts]
    systest, tested_in = left(Systest, "systest.json")

    def inside(job: Job) -> list[Job]:
        own = record(Result, artifacts / job.child.directory / "result.json") if job.step == "build" else None
        found = []
        for child in own.children if own else ():
            placed = child.model_copy(update={"directory": f"{job.child.directory}/{child.directory}"})
            found.append(
                _job(artifacts, result, run, placed, record(Result, artifacts / placed.directory / "result.json"), {})
            )
        return found

    return View(
        result=result,
        run=run,
        build=build,
        gate=_gate(artifacts, gate) if gate else None,
        verified=verified,
        excerpts=tuple(_excerpts(artifacts, result, jobs, inside, install, systest)),
        jobs=tuple(jobs),
        packages=_packages(build, contents, former),
        lint=_lint(lint) if lint else None,
        install=_install(artifacts, install, installed_in) if install and installed_in else None,
        systest=_systest(artifacts, systest, tested_in) if systest and tested_in else None,
        systest_logs=_systest_logs(artifacts, tests),
        use=_use(repository) if repository else None,
        links=_links(artifacts),
        problems=tuple(problems),
    )


def _named(dependants: Sequence[Dependant]) -> str:
    named = listed(f"{one.package} ({one.repository})" for one in dependants)
    return f"build-depend on what changes, and are not built anew: {named}" if named else ""


def _count(number: int, one: str, several: str = "") -> str:
    """Return `1 file`, `2 files`, and so on."""
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def _link(artifacts: Path, path: Path) -> str | None:
    """Return the relative URL of a file below the artifacts, None when there is none."""
    below = path.relative_to(artifacts)
    return quote(below.as_posix()) if ".." not in below.parts and path.is_file() and not path.is_symlink() else None


def _job(
    artifacts: Path, result: Result, run: Run | None, child: Child, own: Result | None, parts: Mapping[str, float]
) -> Job:
    def percent(seconds: float) -> float:
        return round(min(100.0, max(0.0, 100 * seconds / result.seconds)) if result.seconds else 0.0, 2)

    start = (child.started - result.started).total_seconds()
    waited = min(child.seconds, max(0.0, (own.started - child.started).total_seconds())) if own else 0.0
    return Job(
        child=child,
        step=child.job.removesuffix(f"-{run.target}") if run else child.job,
        about=_about(run, child),
        state=VERDICTS[child.result].lower(),
        link=_link(artifacts, artifacts / child.directory / "console.log"),
        reason=own.reason if own else "it left no result",
        waiting=waited,
        start=percent(start),
        waited=percent(waited),
        ran=percent(child.seconds - waited),
        parts=tuple(parts.items()),
    )


def _about(run: Run | None, child: Child) -> str:
    """Return the project of a job where that is another one than the run's."""
    own = run.parameters.get("ZUUL_PROJECT", "") if run else ""
    project = child.parameters.get("ZUUL_PROJECT", own)
    return project if project != own else ""


def _gate(artifacts: Path, record: Gate) -> GateView:
    pages = [_link(artifacts, artifacts / one.directory / PAGE) if one.directory else None for one in record.builds]
    return GateView(record, Cut.of(zip(record.builds, pages, strict=True), PACKAGES))


def _failed(jobs: Sequence[Job]) -> list[Job]:
    """Return those jobs that made a run fail, or that were stopped with it."""
    failed = [job for job in jobs if job.child.result == "FAILURE"]
    return failed or [job for job in jobs if job.child.result == "ABORTED"]


def _excerpts(
    artifacts: Path,
    result: Result,
    jobs: Sequence[Job],
    inside: Callable[[Job], Sequence[Job]],
    install: Install | None,
    systest: Systest | None,
) -> Iterator[Excerpt]:
    """Yield what the logs of those jobs say that made the run fail; of a `build`, of those that it started."""
    if result.result == "SUCCESS":
        return
    for job in [inner for failed in _failed(jobs) for inner in _failed(inside(failed)) or [failed]]:
        directory = artifacts / job.child.directory
        before = BEFORE_FINDINGS if job.step in ("lint", "install", "systest") else BEFORE
        yield from _excerpt(artifacts, job, directory / "console.log", job.reason, before)
        if job.step == "install" and install:
            for outcome in [outcome for outcome in install.packages if not outcome.passed][:2]:
                said = " ".join(finding.message for finding in outcome.findings)
                yield from _excerpt(artifacts, job, directory / outcome.log, said)
        if job.step == "systest" and systest:
            for test in [test for test in systest.outcomes if test.result == "failed" and test.log][:2]:
                yield from _excerpt(artifacts, job, directory / str(test.log), test.message)


def _excerpt(artifacts: Path, job: Job, path: Path, reason: str, before: int = BEFORE) -> Iterator[Excerpt]:
    """Yield the part of a log that shows the reason, or its end; nothing when there is no such log."""
    link = _link(artifacts, path)
    if link is None:
        return
    first, lines = _tail(path)
    while lines and (not lines[-1].strip() or EPILOGUE.match(lines[-1])):
        lines.pop()
    squeezed = " ".join(reason.split())
    hits = []
    for index, line in enumerate(lines):
        compared = " ".join(line.strip()[:COMPARED].split())
        if len(compared) > 5 and compared in squeezed:
            hits.append((len(compared), index))
    marked = max(hits)[1] if hits else None
    at = len(lines) - 1 if marked is None else marked
    shown = range(max(0, at - before), min(len(lines), at + AFTER + 1))
    if shown:
        yield Excerpt(
            job=job.child.job,
            log=path.name,
            link=link,
            lines=tuple(Line(first + index, _short(lines[index]), index == marked) for index in shown),
        )


def _tail(path: Path) -> tuple[int, list[str]]:
    """Return the number of the first line of a log's last `LOG_BYTES`, and the lines as plain text without time stamps."""
    with path.open("rb") as stream:
        skipped, left = 0, path.stat().st_size - LOG_BYTES
        while left > 0 and (block := stream.read(min(left, 1 << 20))):
            skipped += block.count(b"\n")
            left -= len(block)
        text = plain(stream.read(LOG_BYTES).decode(errors="replace"))
    lines = [TIME_STAMP.sub("", line, count=1).expandtabs() for line in text.removesuffix("\n").split("\n")]
    return skipped + 1, lines


def _short(line: str) -> str:
    return line if len(line) <= LINE else f"{line[:LINE]} … ({len(line) - LINE} more characters)"


def _packages(build: Build | None, contents: Contents | None, former: Former | None) -> Cut[PackageView]:
    if build is None:
        return Cut()
    sizes = {file.name: file.size for file in build.files}
    known = {one.file: one for one in contents.packages} if contents else {}
    differences = {(one.name, one.architecture): one for one in former.packages} if former else {}
    packages = sorted(build.packages, key=lambda package: (package.kind, package.name, package.architecture))
    views, left = [], FILES_IN_ALL
    for package in packages[:PACKAGES]:
        inside = known.get(package.file)
        files = Cut.of(_leaves(inside.files) if inside else (), min(FILES, left))
        left -= len(files.items)
        difference = differences.get((package.name, package.architecture))
        views.append(
            PackageView(
                package=package,
                size=sizes.get(package.file),
                contents=inside,
                files=Cut(files.items, files.more + (inside.more_files if inside else 0)),
                relations=_each(inside.relations if inside else {}, RELATIONS, list),
                scripts=_each(inside.scripts if inside else {}, TEXT_LINES, _lines),
                difference=difference
                and DifferenceView(
                    difference, Cut.of(difference.files, FILES), _each(difference.scripts, TEXT_LINES, _lines)
                ),
            )
        )
    return Cut(tuple(views), len(packages) - len(views))


def _each(
    named: Mapping[str, object], most: int, items: Callable[[object], Sequence[str]]
) -> tuple[tuple[str, Cut[str]], ...]:
    return tuple((name, Cut.of(items(value), most)) for name, value in named.items())


def _lines(text: object) -> list[str]:
    return [_short(line.expandtabs()) for line in str(text).removesuffix("\n").split("\n")]


def _leaves(files: Sequence[PackagedFile]) -> list[PackagedFile]:
    """Return all but the directories that hold something."""
    parents = {file.path.rstrip("/").rpartition("/")[0] for file in files}
    return [file for file in files if not (file.mode.startswith("d") and file.path.rstrip("/") in parents)]


def _lint(record: Lint) -> LintView:
    findings = sorted(record.findings, key=lambda one: (SEVERITIES.index(one.severity), one.package, one.tag))
    new = [one for one in findings if not one.known]
    counts = [(severity, sum(one.severity == severity for one in new)) for severity in SEVERITIES]
    shown = Cut.of(new, FINDINGS)
    return LintView(
        record,
        Cut(shown.items, shown.more + record.omitted),
        Cut.of((one for one in findings if one.known), FINDINGS),
        tuple((name, number) for name, number in counts if number),
    )


def _install(artifacts: Path, record: Install, directory: Path) -> InstallView:
    tested = [
        Tested(
            outcome,
            _link(artifacts, directory / outcome.log),
            Cut.of(outcome.findings, FINDINGS),
        )
        for outcome in sorted(record.packages, key=lambda outcome: outcome.passed)
    ]
    return InstallView(record, Cut.of(tested, PACKAGES))


def _systest(artifacts: Path, record: Systest, directory: Path) -> SystestView:
    order = ("failed", "passed", "skipped")
    outcomes = sorted(record.outcomes, key=lambda outcome: order.index(outcome.result))
    linked = [(one, _link(artifacts, directory / one.log) if one.log else None) for one in outcomes]
    return SystestView(record, Cut.of(linked, FINDINGS))


def _systest_logs(artifacts: Path, directories: Sequence[Path]) -> Cut[SystestLog]:
    """Return the logs of system tests, by what they left, also of one that left no record."""
    found = [
        (url, path)
        for directory in directories
        # of a first attempt, too
        for place in sorted(directory.glob("logs*"))
        for path in sorted(place.rglob("*"))
        if (url := _link(artifacts, path))
    ]
    logs, left = [], SEARCHED_IN_ALL
    for url, path in found[:LOGS]:
        size = path.stat().st_size
        # whoever has aborted the run waits
        read = min(size, SEARCHED_BYTES, left)
        left -= read
        logs.append(SystestLog(path.relative_to(artifacts).as_posix(), url, size, tuple(_errors(path, read))))
    return Cut(tuple(logs), max(0, len(found) - LOGS))


def _errors(path: Path, read: int) -> Iterator[Line]:
    """Yield the first lines of the first bytes of a log, so many, that tell of an error."""
    with path.open("rb") as stream:
        text = plain(stream.read(read).decode(errors="replace"))
    numbered = ((number, line) for number, line in enumerate(text.split("\n"), 1) if ERROR.search(line))
    for number, line in islice(numbered, ERRORS):
        yield Line(number, _short(TIME_STAMP.sub("", line, count=1).expandtabs()), False)


def _use(record: Repository) -> Use:
    binary = [package for package in record.packages if package.kind == "binary"][:TO_INSTALL]
    if record.format == "deb":
        name, text = apt.CLIENT, apt.client(record.url, record.codename, record.signing_key)
        place, wanted = "/etc/apt/sources.list.d", [f"{one.name}={one.version}" for one in binary]
        install = ("sudo apt-get update", f"sudo apt-get install {' '.join(wanted)}")
    else:
        key = f"{record.url}key.asc"
        text = repomd.released_client(record.url, key) if record.released else repomd.client(record.url)
        name = repomd.CLIENT
        place, wanted = "/etc/yum.repos.d", [f"{one.name}-{one.version}" for one in binary]
        install = (f"sudo dnf install {' '.join(wanted)}",)
    commands = (f"sudo curl -fsSo {place}/{name} {record.url}{name}", *install)
    return Use(record, name, Cut.of(_lines(text), TEXT_LINES), commands)


def _links(artifacts: Path) -> Cut[Link]:
    """Return all files of the run."""
    found = []
    for path in sorted(artifacts.rglob("*")):
        url = _link(artifacts, path)
        if url and path.name != PAGE:
            found.append(Link(url, path.relative_to(artifacts).as_posix(), path.stat().st_size))
    return Cut.of(found, LINKS)
