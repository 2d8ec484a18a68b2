"""What every step of a job runs in: its log, its signals, its result, the builds that it starts, the one that started it.

A step is a function that takes a `StepContext` and returns the reason for its success in one line. `run` turns whatever
else happens into an exit code and `artifacts/result.json`.
"""

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from pkgci import engines
from pkgci.artifacts import ARTIFACTS, Child, Result
from pkgci.config import Config
from pkgci.engines.base import BuildRef, Engine, Outcome
from pkgci.errors import (
    DISK,
    Aborted,
    Exit,
    InfrastructureError,
    PackageError,
    PkgciError,
    RequestError,
    TriedTwiceError,
)
from pkgci.locks import scratch
from pkgci.text import log_plainly, spelled_out

log = logging.getLogger(__name__)

# a step that is aborted has 10 s until it is killed; its children get most of them to end
CHILDREN_END = 8.0
SCRATCH = "pkgci-step-"
POLL = 0.2  # seconds that several children are waited for together, each in its turn
FAULTS = {
    Exit.PASSED: "none",
    Exit.PACKAGE: "package",
    Exit.REQUEST: "request",
    Exit.INFRASTRUCTURE: "infrastructure",
    Exit.ABORTED: "aborted",
}
Key = TypeVar("Key", bound=Hashable)


class _ChildBugError(PkgciError):
    """A bug in pkgci ended a child."""


ERRORS = {"package": PackageError, "request": RequestError, "aborted": Aborted, "bug": _ChildBugError}


@dataclass(frozen=True)
class _Running:
    """A child that runs: its parameters, when it was started, and the same by a clock that never jumps."""

    parameters: dict[str, str]
    at: datetime
    since: float


class StepContext:
    """What a step is given: the configuration, the engine, and its children.

    Args:
        engine: what runs the children; by default the one that the environment names.
    """

    def __init__(self, engine: Engine | None = None) -> None:
        self.children: list[Child] = []
        self._running: dict[BuildRef, _Running] = {}
        self._directories: dict[BuildRef, Path] = {}
        if engine is not None:
            self.engine = engine

    @cached_property
    def config(self) -> Config:
        """The configuration."""
        return Config()

    @cached_property
    def engine(self) -> Engine:
        """The engine that this step's children run on."""
        return engines.current(self.config)

    @property
    def own(self) -> BuildRef | None:
        """The build that this step belongs to; None when it was started outside any engine."""
        job, number = os.environ.get("JOB_NAME", ""), os.environ.get("BUILD_NUMBER", "")
        return BuildRef.parse(f"{job}/{number}") if job and number else None

    def child(self, job: str, parameters: Mapping[str, str]) -> BuildRef:
        """Start a build that ends when this step does.

        Args:
            job: the job's name.
            parameters: its parameters, without `PARENT` and `CORRELATION`.

        Returns:
            The build, which may still be queued. Give it to `finish`.

        Raises:
            RequestError: the job or a parameter is unknown.
            InfrastructureError: the engine failed.
        """
        started_by = {"PARENT": str(self.own or ""), "CORRELATION": uuid.uuid4().hex}
        ref = self.engine.start(job, {**parameters, **started_by})
        self._running[ref] = _Running(dict(parameters), datetime.now(UTC), time.monotonic())
        # a build in a queue may have no number yet
        if not any(other.job == job for other in self._directories):
            self._directories[ref] = ARTIFACTS / job
        log.info("started %s", ref)
        return ref

    def launch(self, job: str, parameters: Mapping[str, str]) -> BuildRef:
        """Start a build that goes on by itself, whatever becomes of this step: nobody waits for it.

        Args:
            job: as of `child`.
            parameters: as of `child`.

        Returns:
            The build.

        Raises:
            RequestError: as `child`.
            InfrastructureError: as `child`.
        """
        ref = self.engine.start(job, {**parameters, "CORRELATION": uuid.uuid4().hex})
        log.info("started %s, which goes on by itself", ref)
        return ref

    def finish(self, ref: BuildRef, timeout: float | None = None) -> Outcome | None:
        """Wait for a child, take what it left to `directory(ref)`, its log as `console.log`, and note how it ended.

        Args:
            ref: what `child` returned.
            timeout: seconds to wait at most.

        Returns:
            Its result; None when `timeout` passed first.

        Raises:
            InfrastructureError: the engine failed.
        """
        outcome = self.engine.wait(ref, timeout)
        if outcome is None:
            return None
        build = self.engine.numbered(ref)
        # what was taken out of a queue never had a number
        directory = self._directories.setdefault(ref, ARTIFACTS / f"{ref.job}-{build.number or ref.request}")
        started = self._running.pop(ref)
        seconds = round(time.monotonic() - started.since, 1)
        self.children.append(
            Child(
                job=ref.job,
                number=build.number,
                directory=directory.name,
                parameters=started.parameters,
                result=outcome,
                started=started.at,
                seconds=seconds,
            )
        )
        log.info("%s: %s after %.1f s", build, outcome, seconds)
        try:
            with tempfile.TemporaryDirectory(dir=ARTIFACTS.parent) as scratch:
                self.engine.artifacts(ref, Path(scratch))
                # without the name that all artifacts lie below
                kept = Path(scratch, ARTIFACTS)
                kept.mkdir(exist_ok=True)
                kept.rename(directory)
            with (directory / "console.log").open("wb") as stream:
                stream.writelines(self.engine.log(ref))
        except OSError as error:
            raise InfrastructureError(f"cannot keep the artifacts of {ref}: {error}") from error
        return outcome

    def run_together(self, jobs: Sequence[tuple[str, Mapping[str, str]]]) -> list[Path]:
        """Run jobs at once, to their end. The first that does not pass ends the step, which aborts those that still run.

        Args:
            jobs: each job's name, and its parameters as of `child`; empty ones are left to the job's default.

        Returns:
            The directories with what they left, in the order of `jobs`.

        Raises:
            PkgciError: what the first ended with, naming it.
        """
        left = self.run_ordered(dict.fromkeys(range(len(jobs)), ()), lambda number, _: jobs[number])
        return [left[number] for number in range(len(jobs))]

    def run_ordered(
        self,
        after: Mapping[Key, Collection[Key]],
        job: Callable[[Key, Mapping[Key, Path]], tuple[str, Mapping[str, str]]],
    ) -> dict[Key, Path]:
        """Run jobs, each as soon as those that it comes after have passed; the first that does not pass ends the step.

        Args:
            after: for each job, by a key of the caller's, the keys of those that it comes after; there is no cycle.
            job: returns a job's name, and its parameters as of `run_together`, from its key and what is done.

        Returns:
            The directories with what they left.

        Raises:
            PkgciError: what the first ended with, naming it.
        """
        done: dict[Key, Path] = {}
        running: dict[Key, BuildRef] = {}
        while len(done) < len(after):
            for key in [
                key for key in after if key not in done and key not in running and done.keys() >= set(after[key])
            ]:
                name, given = job(key, done)
                running[key] = self.child(name, {name: value for name, value in given.items() if value})
            for key, ref in list(running.items()):
                outcome = self.finish(ref, POLL / len(running))
                if outcome is None:
                    continue
                del running[key]
                if outcome != "SUCCESS":
                    raise _failure(self.engine.numbered(ref), self.directory(ref))
                done[key] = self.directory(ref)
        return done

    def run_each(
        self,
        jobs: Sequence[tuple[str, Mapping[str, str]]],
        at_once: int,
        lost: Callable[[BuildRef, Mapping[str, str]], str] = lambda *_: "",
    ) -> list[PkgciError | None]:
        """Run jobs to their end, some at once, whatever becomes of the others.

        Args:
            jobs: as of `run_together`.
            at_once: so many.
            lost: says why a build is not waited for any more, from it and its parameters; it is asked often.

        Returns:
            How each ended, in their order: None when it passed; also one that cannot be started, or be asked for.
        """
        ended: list[PkgciError | None] = [None] * len(jobs)
        left = list(enumerate(jobs))
        running: dict[BuildRef, int] = {}
        while left or running:
            while left and len(running) < at_once:
                number, (job, given) = left.pop(0)
                try:
                    running[self.child(job, {name: value for name, value in given.items() if value})] = number
                except (RequestError, InfrastructureError) as error:
                    ended[number] = error
            for ref, number in list(running.items()):
                try:
                    outcome = self.finish(ref, POLL / len(running))
                    if outcome is None:
                        if why := lost(ref, jobs[number][1]):
                            self.engine.abort(ref)
                            raise InfrastructureError(why)
                        continue
                    if outcome != "SUCCESS":
                        ended[number] = _failure(self.engine.numbered(ref), self.directory(ref))
                except (RequestError, InfrastructureError) as error:
                    # should it still run, it is aborted at this step's end
                    ended[number] = error
                del running[ref]
        return ended

    def directory(self, ref: BuildRef) -> Path:
        """Return where `finish` has put what a child left: `artifacts/JOB`, with its number if it is not the job's first."""
        return self._directories[ref]

    def abort_children(self) -> None:
        """Abort the children that still run, and finish those that end soon enough."""
        until = time.monotonic() + CHILDREN_END
        running = list(self._running)
        for act in (self.engine.abort, lambda ref: self.finish(ref, max(0.0, until - time.monotonic()))):
            for ref in running:
                try:
                    act(ref)
                except PkgciError as error:
                    # the others are aborted all the same; this one ends itself by its watch on PARENT
                    log.info("cannot abort %s: %s", ref, error)


def _failure(ref: BuildRef, directory: Path) -> PkgciError:
    """Return the error that a child ended with, by its `result.json`; without one the engine ended it."""
    try:
        result = Result.read(directory / "result.json")
    except InfrastructureError:
        return InfrastructureError(f"{ref} ended without a result; see its log")
    machines = TriedTwiceError if result.tried_twice else InfrastructureError
    return ERRORS.get(result.fault, machines)(f"{ref}: {result.reason}")


def run(
    step: str,
    main: Callable[[StepContext], str],
    engine: Engine | None = None,
    report: Callable[[Path], object] | None = None,
) -> int:
    """Run a step in the current directory, to its exit code.

    `artifacts/` is emptied first. SIGTERM, SIGINT, and the end of the build that started this one (parameter `PARENT`),
    raise `Aborted` in `main`, once, so that its `finally` clauses clean up. However it ends, no child runs on.

    Args:
        step: the step's name, for `result.json`.
        main: the step; returns the reason for its success in one line.
        engine: as of `StepContext`.
        report: called with the artifacts once `result.json` is there; when it fails, that is logged and changes nothing.

    Returns:
        The exit code; see `errors.Exit`.
    """
    log_plainly(sys.stdout)
    log.info("About: %s", _about())
    started, start = datetime.now(UTC), time.monotonic()
    context = StepContext(engine)
    stop = _Stop()
    fault, twice, emptied = None, False, False
    with _signals(stop):
        try:
            try:
                _empty(ARTIFACTS)
                emptied = True
                with _watch(context, stop), _temporary():
                    reason, code = main(context), Exit.PASSED
            finally:
                stop.quiet()
                context.abort_children()
        except PkgciError as error:
            reason, code = str(error), error.exit
            fault = "bug" if isinstance(error, _ChildBugError) else None
            twice = isinstance(error, TriedTwiceError)
        except Exception as error:
            code = Exit.INFRASTRUCTURE
            if isinstance(error, OSError) and error.errno in DISK:
                reason = f"cannot write {error.filename or 'a file'}: {error.strerror}; make room, or mend the disk"
            else:
                log.exception("a bug in pkgci")
                reason, fault = f"{type(error).__name__}: {error}", "bug"
        result = Result(
            step=step,
            result={Exit.PASSED: "SUCCESS", Exit.ABORTED: "ABORTED"}.get(code, "FAILURE"),
            fault=fault or FAULTS[code],
            exit=code,
            reason=spelled_out(" ".join(reason.split())),
            started=started,
            seconds=round(time.monotonic() - start, 1),
            children=tuple(context.children),
            tried_twice=twice,
        )
        try:
            if emptied:
                result.write(ARTIFACTS / "result.json")
        except OSError as error:
            log.error("cannot write %s: %s", ARTIFACTS / "result.json", error)
            code = code or Exit.INFRASTRUCTURE
        if report is not None and emptied:
            try:
                report(ARTIFACTS)
            except (PkgciError, OSError) as error:
                log.error("cannot write the report: %s", error)
            except Exception:
                log.exception("cannot write the report: a bug in pkgci")
        log.info("%s %s (fault: %s): %s", step, result.result, result.fault, result.reason)
    return int(code)


class _Stop:
    """Raises Aborted in the main thread, once, and never when the step is already ending."""

    def __init__(self) -> None:
        self.reason = ""
        self._armed = True

    def quiet(self) -> None:
        self._armed = False

    def __call__(self, number: int, _: object) -> None:
        if self._armed:
            self.quiet()
            raise Aborted(self.reason or f"stopped by {signal.Signals(number).name}")


@contextlib.contextmanager
def _signals(stop: _Stop):
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _temporary() -> Iterator[None]:
    """Give the step's temporary files one place, which goes with it; the place of a step that was killed goes with the next."""
    before = tempfile.tempdir
    # tempfile itself finds out by a file, which stays when it is killed meanwhile
    named = before or os.environ.get("TMPDIR", "")
    place = named if named and os.access(named, os.W_OK | os.X_OK) else "/tmp"  # noqa: S108 - each there is made by mkdtemp(3)
    with scratch(Path(place), SCRATCH) as directory:
        tempfile.tempdir = str(directory)
        try:
            yield
        finally:
            tempfile.tempdir = before


@contextlib.contextmanager
def _watch(context: StepContext, stop: _Stop):
    """Stop the step when a build that it belongs to no longer runs: nobody would wait for its result."""
    watched = [BuildRef.parse(os.environ["PARENT"])] if os.environ.get("PARENT") else []
    # a server that is restarted, or loses the agent, leaves the step of a build behind
    if context.own and os.environ.get("PKGCI_ENGINE"):
        watched.append(context.own)
    if not watched:
        yield
        return
    engine = context.engine
    ended = threading.Event()

    def end(reason: str) -> None:
        if not ended.is_set():
            stop.reason = reason
            os.kill(os.getpid(), signal.SIGTERM)

    def look() -> None:
        # the parent may have ended while this one was queued
        told = time.monotonic()
        while True:
            for ref in watched:
                try:
                    if engine.state(ref) not in ("queued", "running"):
                        return end(f"stopped, since the build {ref} no longer runs")
                except RequestError:
                    return end(f"stopped, since the build {ref} is no longer there")
                except PkgciError as error:
                    # the engine cannot tell now; it is asked again
                    if time.monotonic() - told > engine.patience:
                        return end(f"stopped, since nobody can tell whether the build {ref} still runs: {error}")
                else:
                    told = time.monotonic()
            if ended.wait(engine.watch):
                return

    thread = threading.Thread(target=look, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        # a question to a server may still be under way
        thread.join(engine.watch)


def _empty(directory: Path) -> None:
    """Make `directory` exist, empty: what an earlier run in this workspace left is not this one's.

    Raises:
        RequestError: it is not from an earlier run, so a person started the step in a directory with another purpose.
        InfrastructureError: the file system fails.
    """
    ours = "WORKSPACE" in os.environ or not directory.exists() or (directory / "result.json").exists()
    if not ours and any(directory.iterdir()):
        raise RequestError(f"{directory.absolute()} is not from a run of pkgci; start the step in another directory")
    try:
        if directory.exists():
            shutil.rmtree(directory)
        directory.mkdir()
    except OSError as error:
        raise InfrastructureError(f"cannot empty {directory.absolute()}: {error}") from error


def _about() -> str:
    """Return what the build is about, for its description: project, change and pipeline, as far as they are given."""
    given = {name: os.environ.get(f"ZUUL_{name}", "") for name in ("PROJECT", "CHANGE", "PATCHSET", "PIPELINE")}
    change = ",".join(filter(None, [given["CHANGE"], given["PATCHSET"]])) or os.environ.get("SOURCE_TREE", "")[:8]
    # nothing is validated yet, and this may be about what is wrong
    return ascii(" ".join(filter(None, [given["PROJECT"], change, given["PIPELINE"]])) or "no change")[1:-1][:200]
