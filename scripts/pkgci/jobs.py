"""`pkgci jobs`: what a person does with single jobs: list them, run one, repeat a build, read its log, abort it."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from pkgci import engines
from pkgci.artifacts import Result
from pkgci.config import Config
from pkgci.engines.base import BuildRef, Engine
from pkgci.errors import Exit, InfrastructureError, RequestError

# of one run only: a repeated build has no parent that still runs
_RUN = ("PARENT", "CORRELATION")
POLL = 0.5  # seconds between looks at a queue


def list_jobs(engine: Engine) -> str:
    """Return a table of all jobs, each with its last build and how that one ended or where it is."""
    rows = []
    for job in engine.jobs():
        builds = engine.builds(job)
        rows.append((job, str(builds[-1].number), engine.state(builds[-1])) if builds else (job, "-", "never ran"))
    width = max((len(job) for job, _, _ in rows), default=0)
    return "".join(f"{job:{width}}  {number:>5}  {state}\n" for job, number, state in rows)


def list_builds(engine: Engine, job: str) -> str:
    """Return a table of a job's builds that are kept, newest first: when, how each ended, and for which change.

    Raises:
        RequestError: there is no such job.
    """
    rows = []
    for ref in reversed(engine.builds(job)):
        record = engine.record(ref)
        rows.append(f"{ref.number:>5}  {record.queued:%Y-%m-%d %H:%M}  {record.state:7}  {record.description}\n")
    return "".join(rows)


def run(engine: Engine, job: str, parameters: Mapping[str, str], rerun: int | None = None) -> BuildRef:
    """Start a build by hand.

    Args:
        engine: what runs it.
        job: the job's name.
        parameters: its parameters; what is not given has its default, or, with `rerun`, what it had then.
        rerun: the number of a former build of the job that is repeated.

    Returns:
        The build, which may still be queued.

    Raises:
        RequestError: there is no such job, parameter or former build.
        InfrastructureError: it cannot be started.
    """
    former = {} if rerun is None else engine.record(BuildRef(job, rerun)).parameters
    return engine.start(job, {key: value for key, value in former.items() if key not in _RUN} | dict(parameters))


def begun(engine: Engine, ref: BuildRef) -> BuildRef:
    """Return a build with its number, once it has one: on a server it may have to wait for it. Ctrl-C aborts it.

    Raises:
        InfrastructureError: nobody can tell where it is.
    """
    try:
        while not (build := engine.numbered(ref)).number and engine.state(ref) == "queued":
            time.sleep(POLL)
    except KeyboardInterrupt:
        engine.abort(ref)
        return ref
    return build


def follow(engine: Engine, ref: BuildRef) -> Exit:
    """Write a build's log to stdout until it has ended, and return how it ended as an exit code.

    Ctrl-C aborts the build and follows it to its end.

    Raises:
        RequestError: there is no such build.
        InfrastructureError: its log cannot be read.
    """
    seen = 0
    while True:
        try:
            position = 0
            for piece in engine.log(ref, follow=True):
                _write(piece[max(0, seen - position) :])
                position += len(piece)
                seen = max(seen, position)
            return exit_of(engine, ref)
        except KeyboardInterrupt:
            engine.abort(ref)


def exit_of(engine: Engine, ref: BuildRef) -> Exit:
    """Wait for a build and return its result as an exit code: the step's own where it left one.

    Raises:
        RequestError: there is no such build.
        InfrastructureError: its state or artifacts cannot be read.
    """
    result = engine.wait(ref)
    if result == "SUCCESS":
        return Exit.PASSED
    if result == "ABORTED":
        return Exit.ABORTED
    with TemporaryDirectory() as scratch:
        engine.artifacts(ref, Path(scratch))
        try:
            code = Exit(Result.read(Path(scratch, "artifacts", "result.json")).exit)
        except (InfrastructureError, ValueError):
            # a step says itself how it ended, unless it was killed
            return Exit.INFRASTRUCTURE
    # the step passed, or was stopped by a time limit, and yet the build failed
    return Exit.PACKAGE if code in (Exit.PASSED, Exit.ABORTED) else code


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _engine() -> Engine:
    return engines.current(Config())


@click.group("jobs")
def jobs() -> None:
    """Run any one job by hand, and look at its builds."""


@jobs.command("list")
@click.argument("job", required=False)
def _list(job: str | None) -> None:
    """Show all jobs with the last build of each, or all builds of JOB."""
    click.echo(list_builds(_engine(), job) if job else list_jobs(_engine()), nl=False)


@jobs.command("run")
@click.argument("job")
@click.argument("parameters", metavar="[NAME=VALUE]...", nargs=-1)
@click.option("--rerun", metavar="N", type=int, help="Repeat build N, with the parameters that it had.")
@click.option("-d", "--detach", is_flag=True, help="Return when it is started, instead of showing its log to the end.")
def _run(job: str, parameters: tuple[str, ...], rerun: int | None, detach: bool) -> None:
    """Run JOB with the given parameters. Ctrl-C aborts it."""
    values = {}
    for word in parameters:
        name, equals, value = word.partition("=")
        if not equals:
            raise RequestError(f"{word!r} is no parameter; write NAME=VALUE")
        values[name] = value
    engine = _engine()
    ref = begun(engine, run(engine, job, values, rerun))
    click.echo(str(ref))
    if not detach:
        sys.exit(follow(engine, ref))


@jobs.command("log")
@click.argument("job")
@click.argument("number", type=int)
@click.option("-f", "--follow", "following", is_flag=True, help="Until the build has ended.")
def _log(job: str, number: int, following: bool) -> None:
    """Show the log of build NUMBER of JOB."""
    for piece in _engine().log(BuildRef(job, number), following):
        _write(piece)


@jobs.command("abort")
@click.argument("job")
@click.argument("number", type=int)
def _abort(job: str, number: int) -> None:
    """Abort build NUMBER of JOB and wait for its end."""
    engine = _engine()
    ref = BuildRef(job, number)
    engine.abort(ref)
    click.echo(f"{ref}: {engine.wait(ref)}")


@jobs.command("artifacts")
@click.argument("job")
@click.argument("number", type=int)
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
def _artifacts(job: str, number: int, directory: Path) -> None:
    """Copy what build NUMBER of JOB archived to DIRECTORY."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot make {directory}: {error.strerror}") from error
    _engine().artifacts(BuildRef(job, number), directory)
