"""`pkgci zuul`: what a playbook of current Zuul asks of the host that starts jobs, and the tenant's configuration.

It is the forced command of the executor's key there. A request comes as JSON on stdin: what to do, and the variables of Zuul's
job. Of a job that runs, the log goes to stderr as it grows; the answer, one JSON object, is on stdout. A job of Zuul has the
name of the engine's job that it starts.

Zuul stops a playbook by SIGKILL: the connection ends, and with it the build. What an executor left that was lost
as a whole (its playbook `end.yaml` did not run either) ends when the job is tried again.

Sources: Zuul 14, "Job content" (variables, return values) and "Tenant configuration".
"""

import os
import re
import select
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pkgci import report, review
from pkgci.artifacts import ARTIFACTS, Child, Lint, Result
from pkgci.change import EVERY, NO_COMMIT, Parameters
from pkgci.config import Config
from pkgci.engines.base import BuildInfo, BuildRef, Engine, Urls
from pkgci.errors import Aborted, Exit, InfrastructureError, PkgciError, RequestError
from pkgci.jobs import exit_of
from pkgci.text import PlainLog, printable

WATCH = 1.0  # seconds between looks at the connection
ENDS = 30.0  # seconds that an aborted build gets
REQUEST_BYTES = 8 << 20
LOG_BYTES = 64 << 20  # of a build's log, what compiler's findings are looked for in
COMMENTS = 30
# of the job in zuul.d/, and so for every job of the tenant
JOB_SECONDS = 172800
# gcc, clang, and what else prints findings as they do: FILE:LINE[:COLUMN]: error: WORDS; what follows the file
FINDING = re.compile(r":([1-9][0-9]{0,6})(?::[0-9]{1,6})?: ((?:fatal )?error|warning): (.{1,500})")
PATH_LENGTH = 300
PLACE = re.compile(r"([^:]{1,300}):([1-9][0-9]{0,6})")


class _Variables(BaseModel):
    """A part of Zuul's variables; what is not named is not looked at."""

    model_config = ConfigDict(extra="ignore", frozen=True, defer_build=True, coerce_numbers_to_str=True)


class Project(_Variables):
    """`project` of an item."""

    name: str


class Item(_Variables):
    """One of `zuul.items`: a change of the queue, oldest first."""

    project: Project
    branch: str = ""
    change: str = ""
    patchset: str = ""

    @property
    def queued(self) -> str:
        """It as ZUUL_CHANGES names it; Gerrit's ref of a patch set has the last two digits of the number in front."""
        ref = f"refs/changes/{self.change[-2:].zfill(2)}/{self.change}/{self.patchset}"
        return f"{self.project.name}:{self.branch}:{ref}"


class Job(Item):
    """The variables `zuul`."""

    job: str
    build: str
    buildset: str
    pipeline: str
    attempts: int = Field(1, ge=1, le=100)
    oldrev: str = ""
    newrev: str = ""
    items: tuple[Item, ...] = ()

    @property
    def parameters(self) -> dict[str, str]:
        """The parameters of the engine's job, by the names that Zuul 2 has for them.

        A job of a timer is about no change: then there are none.
        """
        about = {"ZUUL_PROJECT": self.project.name, "ZUUL_PIPELINE": self.pipeline, "ZUUL_UUID": self.build}
        if self.change:
            about |= {"ZUUL_BRANCH": self.branch, "ZUUL_CHANGE": self.change, "ZUUL_PATCHSET": self.patchset}
            return about | {"ZUUL_CHANGES": "^".join(item.queued for item in self._queue)}
        if self.oldrev or self.newrev:
            moved = {"ZUUL_OLDREV": self.oldrev or NO_COMMIT, "ZUUL_NEWREV": self.newrev or NO_COMMIT}
            return about | {"ZUUL_REFNAME": self.branch} | moved
        return {}

    @property
    def _queue(self) -> Sequence[Item]:
        """The changes of the queue, this one last: of changes that depend on each other any may be."""
        others = [item for item in self.items if item.change and item.change != self.change]
        return [*others, self]

    def correlation(self, attempt: int) -> str:
        """What the engine's build of an attempt is found by."""
        return f"{self.buildset}-{attempt}"


class Request(_Variables):
    """What a playbook asks for: run the job, or abort what runs of it.

    `change` says whether the job is told what Zuul's is about, and `parameters` what else.
    """

    verb: Literal["run", "abort"]
    zuul: Job
    change: bool = True
    more: dict[str, str] = Field({}, alias="parameters")

    @property
    def parameters(self) -> dict[str, str]:
        """All parameters of the engine's build."""
        about = self.zuul.parameters if self.change else {}
        return {**self.more, **about, "CORRELATION": self.zuul.correlation(self.zuul.attempts)}

    @property
    def left(self) -> Iterator[str]:
        """What the engine's builds are found by that must not run on: of earlier attempts, or of this one, too."""
        last = self.zuul.attempts - (self.verb == "run")
        return map(self.zuul.correlation, range(1, last + 1))


class Answer(BaseModel):
    """What the playbook gets. `returned` is for `zuul_return`; `exit` is an exit code, `reason` one line.

    Zuul tries again after an infrastructure fault, but for one that was `tried_twice`.
    """

    exit: int
    tried_twice: bool = False
    reason: str
    returned: dict = Field(default_factory=dict)


def answer(config: Config, engine: Engine, stdin: BinaryIO, stdout: BinaryIO, stderr: BinaryIO) -> None:
    """Answer one request.

    Args:
        config: the configuration.
        engine: what runs jobs.
        stdin: gives the request.
        stdout: takes the answer; when nobody reads it any more, the build is aborted.
        stderr: takes the log.

    Raises:
        RequestError: it is no request.
        Aborted: the playbook has gone.
    """
    try:
        request = Request.model_validate_json(stdin.read(REQUEST_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        raise RequestError(f"the playbook's request: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    # names and ids become parts of paths and parameters: all are held against their rules first
    job = request.zuul
    Parameters.read(request.parameters, EVERY)
    try:
        left = [ref for known in request.left if (ref := engine.find(job.job, known)) and engine.record(ref).alive]
        ended = [_abort(engine, ref) for ref in left]
        if request.verb == "abort":
            said = Answer(exit=0, reason=f"aborted: {', '.join(ended)}" if ended else "nothing runs any more")
        else:
            with _watched(stdout):
                said = _run(config, engine, request, stderr)
    except Aborted:
        raise
    except PkgciError as error:
        reason = printable(f"{job.job}: {error}")
        said = Answer(exit=int(error.exit), reason=reason, returned={"zuul": {"warnings": [reason]}})
    stdout.write(said.model_dump_json().encode())
    stdout.flush()


def _abort(engine: Engine, ref: BuildRef) -> str:
    engine.abort(ref)
    engine.wait(ref, ENDS)
    return str(engine.numbered(ref))


def _run(config: Config, engine: Engine, request: Request, stderr: BinaryIO) -> Answer:
    """Run a job to its end."""
    ref = engine.start(request.zuul.job, request.parameters)
    try:
        return _follow(config, engine, request.zuul, ref, stderr)
    except RequestError as error:
        # a server that was restarted may have lost what was there
        raise InfrastructureError(str(error)) from error


def _follow(config: Config, engine: Engine, job: Job, ref: BuildRef, stderr: BinaryIO) -> Answer:
    """Follow a build; one that is not followed to its end is aborted."""
    try:
        with PlainLog(stderr) as log:
            log.write(f"{ref} {'on the engine' if ref.number else 'queued'}: {engine.urls(ref).build}\n".encode())
            stderr.flush()
            for piece in engine.log(ref, follow=True):
                if not ref.number:
                    ref = engine.numbered(ref)
                    log.write(f"{ref} on the engine: {engine.urls(ref).build}\n".encode())
                log.write(piece)
                stderr.flush()
        code = exit_of(engine, ref)
    except OSError as error:
        raise Aborted(f"the playbook takes no log any more: {error.strerror}") from error
    finally:
        if engine.record(ref).alive:
            _abort(engine, ref)
    with tempfile.TemporaryDirectory() as scratch:
        engine.artifacts(ref, Path(scratch))
        return _answer(config, job, engine.record(ref), engine.urls(ref), int(code), Path(scratch) / ARTIFACTS)


@contextmanager
def _watched(stdout: BinaryIO) -> Iterator[None]:
    """Raise Aborted in the main thread when nobody reads the answer any more, and when this process is to end."""

    def stop(*_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        raise Aborted("stopped: the playbook has gone")

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    ended = threading.Event()
    poll = select.poll()
    # the reader's end: of a pipe an error, of a socket a hang-up
    poll.register(stdout.fileno(), select.POLLHUP | select.POLLERR | select.POLLRDHUP)

    def look() -> None:
        while not ended.wait(WATCH):
            if poll.poll(0):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=look, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _answer(config: Config, job: Job, build: BuildInfo, urls: Urls, code: int, artifacts: Path) -> Answer:
    """Return what a build comes to, from what it archived."""
    try:
        result = Result.read(artifacts / "result.json")
    except InfrastructureError:
        if code and build.started:
            # killed from outside, or never able to run
            code = Exit.INFRASTRUCTURE
        reason = f"{job.job}: ended without a result: {build.reason or 'see its log'}"
        return Answer(exit=code, reason=reason, returned={"zuul": {"log_url": urls.build, "warnings": [reason]}})
    reason = build.reason or result.reason
    page = f"{urls.archive}{ARTIFACTS}/{report.PAGE}"
    kept = [("Log", urls.log, "log")]
    lines = [reason]
    if (artifacts / report.PAGE).is_file():
        kept.append(("Report", page, "report"))
        view = report.read(artifacts)
        if view.use:
            kept.append(("Test repository", view.use.record.url, "repository"))
            if not code:
                lines = [f"to try it: {' && '.join(view.use.commands)}"]
        if view.verdict != "Nothing to build":
            lines.append(f"report: {page} log: {urls.log}")
    about = {
        "log_url": urls.build,
        "artifacts": [{"name": name, "url": url, "metadata": {"type": kind}} for name, url, kind in kept],
        # Zuul's comment on the change has them
        "warnings": [printable(f"{job.job}: {line}") for line in lines],
        "file_comments": comments(config, job, artifacts),
    }
    said = printable(f"{job.job}: {reason}")
    return Answer(exit=code, tried_twice=result.tried_twice, reason=said, returned={"zuul": about})


def comments(config: Config, job: Job, artifacts: Path) -> dict[str, list[dict]]:
    """Return comments on the lines of the change's files that lint and compilers find fault with.

    Args:
        config: says where the review system is; without `review` there are no comments, since nobody says which files the
            change has.
        job: names the change.
        artifacts: what the engine's build left.

    Returns:
        Of a file of the change: comments in the form of `zuul.file_comments`.
    """
    if config.settings.review is None or not job.change:
        return {}
    found = [*_linted(artifacts), *_compiled(job, artifacts)]
    if not found:
        return {}
    try:
        files = review.files(config, job.change, job.patchset)
    except PkgciError as error:
        # a comment the less is no reason to fail
        print(f"no comments on lines: {error}", file=sys.stderr)
        return {}
    said: dict[str, list[dict]] = {}
    for path, line, level, message in list(dict.fromkeys(found)):
        file = _file(path, files)
        if file and sum(map(len, said.values())) < COMMENTS:
            comment = {"line": line, "message": f"{level}: {message} [{job.job}]", "level": level}
            said.setdefault(file, []).append(comment)
    return said


Found = tuple[str, int, str, str]


def _linted(artifacts: Path) -> Iterator[Found]:
    """Yield what lint says of lines: file, line, level, words."""
    for path in sorted(artifacts.glob("lint-*/lint.json")):
        for finding in Lint.read(path).findings:
            place = PLACE.fullmatch(finding.file or "")
            if place and finding.source and not finding.known:
                words = " ".join(filter(None, [finding.tag, finding.message]))
                # rpmlint names the spec by the package
                yield place[1], int(place[2]), finding.severity, words


def _compiled(job: Job, artifacts: Path) -> Iterator[Found]:
    """Yield what compilers say of lines, in the logs of the builds of the job's own project: file, line, level, words."""
    for directory in _compilations(job, artifacts):
        with (directory / "logs" / "build.log").open(errors="replace") as stream:
            for line in stream.read(LOG_BYTES).splitlines():
                match = FINDING.search(line)
                # what stands before it is a package's words, of any length
                said = line[: match.start()].rpartition(":")[2].strip() if match else ""
                if match and len(said) <= PATH_LENGTH:
                    yield said, int(match[1]), match[2].removeprefix("fatal "), printable(match[3], 500)


def _compilations(job: Job, artifacts: Path) -> Sequence[Path]:
    """Return what the jobs `compile` for the job's own project left, also those of builds below a gate."""
    found = []
    for path in (artifacts, *sorted(artifacts.glob("build-*"))):
        children: tuple[Child, ...] = ()
        if (path / "result.json").is_file():
            children = Result.read(path / "result.json").children
        for child in children:
            own = child.job.startswith("compile-") and child.parameters.get("ZUUL_PROJECT") == job.project.name
            if own and (path / child.directory / "logs" / "build.log").is_file():
                found.append(path / child.directory)
    return found


def _file(said: str, files: Sequence[str]) -> str | None:
    """Return the only one of the change's files that a tool can have meant: it may have said more of the path, or less."""
    parts = [part for part in said.split("/") if part not in ("", ".", "..")]
    meant = []
    for file in files:
        own = file.split("/")
        shorter = min(len(own), len(parts))
        if parts and own[-shorter:] == parts[-shorter:]:
            meant.append(file)
    return meant[0] if len(meant) == 1 else None


def claimed(config: Config) -> str:
    """Return the branches that releases claim, as `branches` of the job `package` is to have them."""
    patterns = [pattern for name in config.names("releases") for pattern in config.release(name).branches]
    return f"^({'|'.join(dict.fromkeys(patterns))})$"


def tenants(config: Config) -> str:
    """Return the tenant's configuration, as YAML: this repository, and the projects of packages that Gerrit has.

    No configuration is read from these: what runs for a package is not for its changes to say.

    Raises:
        RequestError: the configuration has no `zuul`, or no `review`, which says where Gerrit is.
        InfrastructureError: Gerrit does not answer.
    """
    settings = config.settings.zuul
    if settings is None or config.settings.review is None:
        missing = "zuul" if settings is None else "review"
        raise RequestError(f"{config.directory / 'config.yaml'}: no `{missing}`; the tenant's configuration needs it")
    head = review.head(config, settings.project)
    # its jobs are for all branches, not for the one that it is on itself; a timer would start them for each of its own
    ours = {"load-branch": head, "include-branches": [re.escape(head)], "implied-branch-matchers": False}
    ours["extra-config-paths"] = "zuul/zuul.d/"
    packages = [name for name in review.projects(config) if name != settings.project and config.package_of(name)]
    source = {
        "config-projects": [{settings.project: ours}],
        "untrusted-projects": [{name: {"include": []}} for name in packages],
    }
    tenant = {"name": settings.tenant, "max-job-timeout": JOB_SECONDS, "source": {settings.connection: source}}
    return yaml.safe_dump([{"tenant": tenant}], sort_keys=False)
