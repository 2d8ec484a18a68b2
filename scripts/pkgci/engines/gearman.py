"""Offers the jobs of this repository to Zuul 2: a worker of its Gearman server, which runs them on an engine.

Zuul submits `build:JOB` with its parameters as JSON. The first answer (WORK_DATA) says which build that is and where it is
seen; WORK_STATUS follows as time passes; the last (WORK_COMPLETE) has the result: `SUCCESS`, or what fails a change. An end
without a result (WORK_FAIL) makes Zuul start the job again, up to the job's `attempts`: that is the answer when the machines
are at fault. `stop:MANAGER` aborts a build of this worker and `set_description:MANAGER` describes one.

Everything that comes from Gearman is untrusted: who reaches its port needs no password. Parameters are held against the
rules of `change`; those that a job does not have are dropped, as Jenkins drops them.

Source: http://gearman.org/protocol/; Zuul 2.6.0, "Launchers".
"""

import fcntl
import html
import itertools
import json
import logging
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import gear

from pkgci.artifacts import ARTIFACTS, Result
from pkgci.change import EVERY, Parameters
from pkgci.config import Config
from pkgci.engines.base import BuildRef, Engine, Outcome
from pkgci.engines.definitions import Definition
from pkgci.engines.local import try_lock
from pkgci.errors import InfrastructureError, PkgciError, RequestError
from pkgci.text import printable

log = logging.getLogger(__name__)

POLL = 0.5  # seconds between looks at a build
PROGRESS = 10.0  # seconds between reports of progress
NUMBERED = 10.0  # seconds in which a build that a server does not queue has its number
ENGINE_AWAY = 10.0  # seconds until an engine that does not answer is asked again
ARGUMENTS_BYTES = 1 << 20
REPORT = "index.html"
# of a job's last builds, those that are looked at for how long it takes
LAST = 5
# builds that may still be described: Zuul does so after their end
REMEMBERED = 1000
# what a worker says of a request itself: its own, not the requester's
_OWN = ("PARENT", "CORRELATION")


@dataclass(frozen=True)
class _Work:
    """A job as Gearman handed it over. Its handle means something on the connection that it came by, as long as that lasts."""

    job: gear.TextWorkerJob
    connected: float

    @property
    def name(self) -> str:
        """The job of this repository."""
        return self.job.name.partition(":")[2]

    @property
    def lost(self) -> bool:
        """Whether the server has given the job up: after a reconnection, its handle may be another job's."""
        connection = self.job.connection
        return not connection.connected or connection.connect_time != self.connected

    @property
    def addresses(self) -> list[str]:
        """This host's address, as the server sees it."""
        with suppress(OSError, AttributeError):
            return [self.job.connection.conn.getsockname()[0]]
        return []

    def arguments(self) -> dict[str, object]:
        """Return the JSON object that the job came with.

        Raises:
            RequestError: it came with something else.
        """
        raw = self.job.binary_arguments
        try:
            found = json.loads(raw) if len(raw) <= ARGUMENTS_BYTES else None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise RequestError(f"{self.job.name!r} came without a JSON object of parameters")
        return found

    def send(self, answer: str, *words: object) -> None:
        """Send an answer, the method of `gear.TextWorkerJob` by its name; nothing once the job is lost."""
        if not self.lost:
            # a connection that breaks now is noticed by the next look at `lost`
            with suppress(OSError, AttributeError):
                getattr(self.job, answer)(*words)


@dataclass
class _Known:
    """A build, the project that it is for, whether it runs, and whether it is to be aborted."""

    ref: BuildRef
    project: str
    running: bool = True
    unwanted: bool = False


class Worker:
    """A worker of a Gearman server.

    Args:
        config: says where notes of running builds are kept, for the next worker if this one is killed.
        engine: runs the builds.
        definitions: the jobs that are offered, by name.
        server: the Gearman server's host.
        port: its port.
        at_once: builds that are started at once; what is beyond waits at the server, in Zuul's order.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        definitions: Mapping[str, Definition],
        server: str,
        port: int,
        at_once: int,
    ) -> None:
        self.engine = engine
        self.definitions = definitions
        self.server, self.port = server, port
        self.name = f"pkgci-{socket.gethostname()}-{os.getpid()}"
        self.stopping = False
        self._notes = config.state / "gearman"
        self._slots = threading.BoundedSemaphore(at_once)
        # by their jobs and the numbers that Zuul was told, the last ones
        self._known: dict[tuple[str, int], _Known] = {}
        self._unnumbered = itertools.count(-1, -1)
        self._lock = threading.Lock()

    def run(self) -> None:
        """Work until `stopping` is set, then finish what is running; a lost server is connected to again and again.

        Raises:
            InfrastructureError: the state cannot be written, or a bug ended it.
        """
        # it says on each packet what it does, and shows a traceback when a server goes away
        logging.getLogger("gear").setLevel(logging.CRITICAL)
        self._abort_left()
        control = self._connected("control")
        for verb in ("stop", "set_description"):
            control.registerFunction(f"{verb}:{self.name}")
        log.info("%s: connecting to the Gearman server %s:%d", self.name, self.server, self.port)
        # nothing is started here that could not be stopped
        while not (control.active_connections or self.stopping):
            time.sleep(POLL)
        builds = self._connected("builds")
        for name in self.definitions:
            builds.registerFunction(f"build:{name}")
        obeying = threading.Thread(target=self._control, args=[control], daemon=True)
        taking = threading.Thread(target=self._take, args=[builds], daemon=True)
        obeying.start()
        taking.start()
        connected = False
        while not self.stopping and taking.is_alive() and obeying.is_alive():
            if connected != bool(builds.active_connections):
                connected = not connected
                log.info("%s", f"connected, {len(self.definitions)} jobs offered" if connected else "connection lost")
            time.sleep(POLL)
        builds.stopWaitingForJobs()
        with self._lock:
            running = sum(known.running for known in self._known.values())
        log.info("no more jobs are taken; finishing %d", running)
        while taking.is_alive():
            # again, since it may just have been about to wait
            builds.stopWaitingForJobs()
            taking.join(POLL)
        builds.shutdown()
        control.shutdown()
        obeying.join()
        if not self.stopping:
            raise InfrastructureError("the worker cannot go on: see the traceback of its thread above")

    def _connected(self, part: str) -> gear.TextWorker:
        made = gear.TextWorker(f"{self.name}-{part}")
        made.addServer(self.server, self.port, keepalive=True, tcp_keepidle=60, tcp_keepintvl=10, tcp_keepcnt=6)
        return made

    def _take(self, worker: gear.TextWorker) -> None:
        """Start a thread for each job that comes, and wait for their ends once there come no more."""
        threads: list[threading.Thread] = []
        while not self.stopping:
            if not self._slots.acquire(timeout=POLL):
                continue
            work = self._next(worker) if self._engine_answers() else None
            if work is None:
                self._slots.release()
                continue
            threads = [thread for thread in threads if thread.is_alive()]
            threads.append(threading.Thread(target=self._build, args=[work], daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def _next(self, worker: gear.TextWorker) -> _Work | None:
        try:
            job = worker.getJob()
        except gear.InterruptedError:
            return None
        return _Work(job, job.connection.connect_time)

    def _engine_answers(self) -> bool:
        """Whether the engine can be given work now; a job that is not taken costs its change none of its attempts."""
        try:
            self.engine.jobs()
        except PkgciError as error:
            log.error("no jobs are taken, since the engine does not answer: %s", printable(str(error)))
            until = time.monotonic() + ENGINE_AWAY
            while time.monotonic() < until and not self.stopping:
                time.sleep(POLL)
            return False
        return True

    def _build(self, work: _Work) -> None:
        """Run one job to its end and answer it."""
        result = None
        try:
            result = self._run(work)
        except RequestError as error:
            result = "FAILURE"
            log.error("%s refused: %s", work.job.name, printable(str(error)))
        except (PkgciError, OSError) as error:
            log.error("%s is left to Zuul to start again: %s", work.job.name, printable(str(error)))
        except Exception:
            log.exception("%s: a bug in pkgci", work.job.name)
        finally:
            self._slots.release()
        if result:
            work.send("sendWorkComplete", json.dumps({"result": result}))
        else:
            work.send("sendWorkFail")

    def _run(self, work: _Work) -> str | None:
        """Return the result of one job, None for one that is to be started again."""
        expected = self._expected(work.name)
        values = self._values(work)
        ref = self._numbered(self.engine.start(work.name, {**values, "CORRELATION": uuid.uuid4().hex}))
        # it must be stopped also while it waits in a queue, where it has no number of its own
        number = ref.number or next(self._unnumbered)
        with self._noted(ref, number, values.get("ZUUL_PROJECT", "")) as known:
            log.info("%s for %s", ref, values.get("ZUUL_UUID", "nobody"))
            try:
                about = self._about(work, ref, number)
                work.send("sendWorkData", json.dumps(about))
                outcome = self._watch(work, known, expected)
                result, reason, report = self._verdict(ref, outcome)
            except Exception as error:
                with suppress(PkgciError):
                    self.engine.abort(ref)
                if isinstance(error, RequestError):
                    # a server that was restarted may have lost what was there
                    raise InfrastructureError(str(error)) from error
                raise
        log.info("%s: %s: %s", self.engine.numbered(ref), result or "to be started again", printable(reason))
        # Zuul takes a new URL from such data only, not from those of the end
        work.send("sendWorkData", json.dumps({**about, "url": report}))
        return result

    def _numbered(self, ref: BuildRef) -> BuildRef:
        """Return a build with its number, if it gets one soon."""
        until = time.monotonic() + NUMBERED
        while True:
            # a server that is away for a moment has the build all the same
            with suppress(InfrastructureError):
                ref = self.engine.numbered(ref)
            if ref.number or time.monotonic() > until:
                return ref
            time.sleep(POLL)

    def _values(self, work: _Work) -> dict[str, str]:
        """Return the parameters of a job that are given and known, validated."""
        arguments = work.arguments()
        known = [parameter.name for parameter in self.definitions[work.name].parameters if parameter.name not in _OWN]
        given = {name: arguments[name] for name in known if arguments.get(name) is not None}
        for name, value in given.items():
            if not isinstance(value, str):
                raise RequestError(f"parameter {name}: {str(value)[:120]!r} is not text")
        return dict(Parameters.read(given, EVERY).values)

    def _about(self, work: _Work, ref: BuildRef, number: int) -> dict[str, object]:
        return {
            "name": ref.job,
            "number": number,
            "manager": self.name,
            "url": self.engine.urls(ref).build,
            "worker_name": self.name,
            "worker_hostname": socket.gethostname(),
            "worker_ips": work.addresses,
            "worker_fqdn": socket.getfqdn(),
            "worker_program": "pkgci",
            "worker_version": version("pkgci"),
            "worker_extra": {},
        }

    def _watch(self, work: _Work, known: _Known, expected: int) -> Outcome:
        """Wait for a build's end and tell how far it is; abort it when nobody waits for it any more."""
        started, told, aborted = time.monotonic(), 0.0, False
        while (outcome := self.engine.wait(known.ref, POLL)) is None:
            passed = time.monotonic() - started
            if work.lost and not known.unwanted:
                # the server has told Zuul that the worker is lost, and Zuul starts the job again
                log.info("%s: aborted, since the Gearman server that asked for it is lost", known.ref)
                known.unwanted = True
            if known.unwanted and not aborted:
                # an engine that is away for a moment is asked again
                with suppress(InfrastructureError):
                    self.engine.abort(known.ref)
                    aborted = True
            if passed // PROGRESS > told:
                told = passed // PROGRESS
                work.send("sendWorkStatus", int(passed), max(expected, int(passed) + 1))
        return outcome

    def _expected(self, job: str) -> int:
        """Return the seconds that a job took the last time that it passed, or else may take at most."""
        for ref in reversed(self.engine.builds(job)[-LAST:]):
            with suppress(RequestError):  # discarded by now
                record = self.engine.record(ref)
                if record.state == "SUCCESS" and record.started and record.ended:
                    return int((record.ended - record.started).total_seconds())
        return (self.definitions[job].timeout or 60) * 60

    def _verdict(self, ref: BuildRef, outcome: Outcome) -> tuple[str | None, str, str]:
        """Return a build's result, None for one that is to be started again, the reason, and where its report is."""
        with tempfile.TemporaryDirectory() as scratch:
            self.engine.artifacts(ref, Path(scratch))
            left = Path(scratch, ARTIFACTS)
            urls = self.engine.urls(ref)
            report = f"{urls.archive}{ARTIFACTS}/{REPORT}" if (left / REPORT).is_file() else urls.build
            try:
                said = Result.read(left / "result.json")
            except InfrastructureError:
                if outcome == "ABORTED" and self.engine.record(ref).started is None:
                    return outcome, "aborted while it was queued", report
                # killed from outside, or never able to run
                return ("SUCCESS" if outcome == "SUCCESS" else None), "it has left no result.json", report
        again = outcome == "FAILURE" and said.fault == "infrastructure" and not said.tried_twice
        return (None if again else outcome), said.reason, report

    def _control(self, worker: gear.TextWorker) -> None:
        """Answer what is asked about builds of this worker."""
        while True:
            try:
                job = worker.getJob()
            except gear.InterruptedError:
                return
            work = _Work(job, job.connection.connect_time)
            try:
                self._obey(work)
            except PkgciError as error:
                log.error("%s: %s", printable(job.name), printable(str(error)))
            except Exception:
                log.exception("a bug in pkgci")
            work.send("sendWorkComplete", "{}")

    def _obey(self, work: _Work) -> None:
        arguments = work.arguments()
        name, number = arguments.get("name"), arguments.get("number")
        if not isinstance(name, str) or not isinstance(number, int):
            raise RequestError(f"{str(name)[:120]!r}, {str(number)[:120]!r} is no name and number of a build")
        known = self._known.get((name, number))
        if known is None:
            raise RequestError(f"{printable(name)}/{number} is no build of this worker")
        if work.job.name.startswith("stop:"):
            log.info("%s: Zuul stops it", known.ref)
            known.unwanted = True
        else:
            self.engine.describe(known.ref, f"{known.project}: {_text(arguments.get('html_description'))}")

    @contextmanager
    def _noted(self, ref: BuildRef, number: int, project: str) -> Iterator[_Known]:
        """Know a build as running, and keep a locked note of it that outlives this process."""
        known = _Known(ref, project)
        with self._lock:
            self._known[ref.job, number] = known
            if len(self._known) > REMEMBERED:
                del self._known[next(key for key, one in self._known.items() if not one.running)]
        note = self._notes / f"{ref.job}={ref.number}={ref.request}"
        try:
            # hidden until it is locked: another worker takes a free one for what a killed one has left
            with note.with_name(f".{note.name}").open("w") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                Path(stream.name).rename(note)
                yield known
                note.unlink(missing_ok=True)
        finally:
            known.running = False

    def _abort_left(self) -> None:
        """Abort the builds that a killed worker has left: Zuul has started them again."""
        try:
            self._notes.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InfrastructureError(f"cannot make {self._notes}: {error.strerror}") from error
        for note in self._notes.glob("[!.]*"):
            with suppress(FileNotFoundError), try_lock(note) as left:
                if left:
                    job, number, request = note.name.split("=")
                    ref = BuildRef(job, int(number), request)
                    log.info("%s: aborted, since a killed worker has left it", ref)
                    with suppress(RequestError):
                        self.engine.abort(ref)
                    note.unlink()


def _text(description: object) -> str:
    """Return Zuul's HTML as one line of text."""
    words = re.sub(r"<[^<>]*>", " ", description[:ARGUMENTS_BYTES]) if isinstance(description, str) else ""
    return printable(" ".join(html.unescape(words).split()), 200)
