"""The engine that needs no server: it runs `jobs/` as Jenkins would, and its state is files.

Below the state directory, `jobs/NAME/builds/N/` holds one build: `build.json` (`BuildRecord`), `job.xml` (the definition
it runs by), `log`, `archive/`, `lock`, and, once somebody has described it, `description`. Each build has one supervising
process (`supervisor.py`), which holds `lock` for as long as it lives: a build that has not ended and whose lock is free has
lost its supervisor, and whoever looks next ends it as aborted. There is no daemon; any number of processes may use the
engine at once.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

from pkgci.config import ROOT, Config
from pkgci.disk import replacing
from pkgci.engines.base import BuildInfo, BuildRef, Outcome, State, Urls
from pkgci.engines.definitions import Definition, parameter_values, read, render
from pkgci.engines.processes import SUPERVISOR, kill_all
from pkgci.errors import InfrastructureError, RequestError

POLL = 0.05  # seconds
COMMAND = [sys.executable, "-m", "pkgci.engines.supervisor"]

# what a build inherits from whoever starts it; everything else, another job's parameters above all, stays behind
INHERITED = re.compile(
    r"HOME|LOGNAME|USER|PATH|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|XDG_\w+|SSH_AUTH_SOCK|SSL_CERT_\w+|REQUESTS_CA_BUNDLE"
    r"|(http|https|ftp|no)_proxy|(HTTP|HTTPS|FTP|NO)_PROXY"
)


class BuildRecord(BuildInfo):
    """`build.json` of the engine's state: one build. `cookie` marks its processes."""

    label: str
    cookie: str


class LocalEngine:
    """The verbs of `base.Engine`, on files.

    Args:
        config: gives the places of state and cache, and the executors of each label.
        jobs_directory: the job definitions.

    Raises:
        RequestError: (any verb) a job or build that does not exist; definitions that this engine does not know.
        InfrastructureError: (any verb) the state cannot be read or written.
    """

    watch = 2.0
    patience = 900.0

    def __init__(self, config: Config, jobs_directory: Path = ROOT / "jobs") -> None:
        self.config = config
        self._definitions = jobs_directory
        self._jobs = config.state / "jobs"

    @cached_property
    def _rendered(self) -> Path:
        return render(self._definitions, self.config.cache / "jobs")

    def jobs(self) -> list[str]:
        """See `base.Engine`."""
        return sorted(path.name for path in self._rendered.iterdir())

    def nodes(self, label: str) -> dict[str, bool]:
        """See `base.Engine`. This host is the only one, by its name."""
        return {socket.gethostname(): True} if self.config.settings.executors.of(label) else {}

    def definition(self, job: str) -> Definition:
        """Return what `job` is."""
        if job not in self.jobs():
            raise RequestError(f"there is no job {job!r}; `pkgci jobs list` shows all")
        return read(self._rendered / job / "config.xml", job)

    def start(self, job: str, parameters: Mapping[str, str]) -> BuildRef:
        """See `base.Engine`."""
        definition = self.definition(job)
        if self.config.settings.executors.of(definition.label) is None:
            raise RequestError(
                f"job {job}: {self.config.directory / 'config.yaml'}: no executors for {definition.label}"
            )
        record = BuildRecord(
            job=job,
            number=0,
            label=definition.label,
            state="queued",
            parameters=parameter_values(job, definition.parameters, parameters),
            cookie=uuid.uuid4().hex,
            queued=datetime.now(UTC),
            node=socket.gethostname(),
        )
        with _disk(f"start {job}"):
            record, lock = self._create(record)
            ref = BuildRef(job, record.number)
            try:
                ticket = self.ticket(record)
                ticket.parent.mkdir(parents=True, exist_ok=True)
                os.link(self.directory(ref) / "lock", ticket)
                self._supervise(ref, lock)
            finally:
                os.close(lock)
        return ref

    def numbered(self, ref: BuildRef) -> BuildRef:
        """See `base.Engine`. Here each build has its number from the start."""
        return ref

    def wait(self, ref: BuildRef, timeout: float | None = None) -> Outcome | None:
        """See `base.Engine`."""
        until = None if timeout is None else time.monotonic() + timeout
        while (record := self.record(ref)).alive:
            if until is not None and time.monotonic() >= until:
                return None
            time.sleep(POLL)
        return record.state

    def state(self, ref: BuildRef) -> State:
        """See `base.Engine`."""
        return self.record(ref).state

    def log(self, ref: BuildRef, follow: bool = False) -> Iterator[bytes]:
        """See `base.Engine`."""
        with _disk(f"read the log of {ref}"), (self.directory(ref) / "log").open("rb") as stream:
            while True:
                # asked first: what a build wrote before it ended is read after that
                alive = follow and self.record(ref).alive
                while piece := stream.read(1 << 16):
                    yield piece
                if not alive:
                    return
                time.sleep(POLL)

    def artifacts(self, ref: BuildRef, destination: Path) -> None:
        """See `base.Engine`."""
        archive = self.directory(ref) / "archive"
        with _disk(f"copy the artifacts of {ref} to {destination}"):
            if archive.is_dir():
                shutil.copytree(archive, destination, dirs_exist_ok=True)

    def abort(self, ref: BuildRef) -> None:
        """See `base.Engine`."""
        if self.record(ref).alive:
            with _disk(f"abort {ref}"):
                (self.directory(ref) / "abort").touch()

    def builds(self, job: str) -> list[BuildRef]:
        """See `base.Engine`."""
        with _disk(f"list the builds of {job}"):
            folder = self._jobs / job / "builds"
            names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        if not names and job not in self.jobs():
            raise RequestError(f"there is no job {job!r}; `pkgci jobs list` shows all")
        return [BuildRef(job, number) for number in sorted(int(name) for name in names if name.isdigit())]

    def find(self, job: str, correlation: str) -> BuildRef | None:
        """See `base.Engine`."""
        for ref in reversed(self.builds(job)):
            with contextlib.suppress(RequestError):  # discarded by now
                if self.record(ref).parameters.get("CORRELATION") == correlation:
                    return ref
        return None

    def record(self, ref: BuildRef) -> BuildRecord:
        """See `base.Engine`. A build whose supervisor was killed is ended as aborted."""
        record = self._record(ref)
        with _disk(f"read the description of {ref}"), contextlib.suppress(FileNotFoundError):
            described = (self.directory(ref) / "description").read_text()
            return record.model_copy(update={"description": described})
        return record

    def describe(self, ref: BuildRef, description: str) -> None:
        """See `base.Engine`. It is a file of its own: `build.json` is its supervisor's, as long as that lives."""
        with _disk(f"describe {ref}"), replacing(self.directory(ref) / "description") as new:
            new.write(description.encode())

    def _record(self, ref: BuildRef) -> BuildRecord:
        directory = self.directory(ref)
        record = BuildRecord.read(directory / "build.json")
        if not record.alive:
            return record
        with _disk(f"look at {ref}"), try_lock(directory / "lock") as free:
            if not free:
                return record
            # read again: it may have ended in between
            record = BuildRecord.read(directory / "build.json")
            if record.alive:
                kill_all(record.cookie)
                remove(directory / "workspace")
                reason = "its supervising process was killed"
                record = record.model_copy(update={"state": "ABORTED", "ended": datetime.now(UTC), "reason": reason})
                record.write(directory / "build.json")
                with (directory / "log").open("a") as log:
                    log.write(f"\nFinished: ABORTED: {reason}\n")
        return record

    def urls(self, ref: BuildRef) -> Urls:
        """See `base.Engine`. Without a web server that shows them, they are files of this machine."""
        settings = self.config.settings
        place = f"{settings.builds}{ref.job}/builds/{ref.number}" if settings.builds else self.directory(ref).as_uri()
        return Urls(build=f"{place}/", log=f"{place}/log", archive=f"{place}/archive/")

    def discard(self, job: str, days: int) -> None:
        """Delete the builds of `job` that ended more than `days` days ago."""
        limit = datetime.now(UTC) - timedelta(days=days)
        with _disk(f"discard builds of {job}"):
            builds = self._jobs / job / "builds"
            with self._numbering(job):
                for ref in self.builds(job):
                    record = self.record(ref)
                    if record.ended and record.ended < limit:
                        # out of sight first: nobody sees half a build
                        (builds / str(ref.number)).rename(builds / f".{ref.number}")
            for doomed in builds.glob(".[0-9]*"):
                remove(doomed)

    def directory(self, ref: BuildRef) -> Path:
        """Return the directory of an existing build."""
        directory = self._jobs / ref.job / "builds" / str(ref.number)
        if "/" in ref.job or ref.job.startswith(".") or not directory.is_dir():
            raise RequestError(f"there is no build {ref}; `pkgci jobs list` shows each job's last one")
        return directory

    def ticket(self, record: BuildRecord) -> Path:
        """Return a build's place in the queue of its label: a link to its lock, by a name that sorts by age."""
        name = f"{record.queued.timestamp():020.6f}-{record.job}-{record.number}"
        return self.config.state / "labels" / record.label / "queue" / name

    def _create(self, record: BuildRecord) -> tuple[BuildRecord, int]:
        """Make the directory of a new build, complete; return its numbered record and its lock, held."""
        home = self._jobs / record.job
        builds = home / "builds"
        builds.mkdir(parents=True, exist_ok=True)
        with self._numbering(record.job):
            number = _next_number(home / "next", builds)
            new = builds / ".new"
            shutil.rmtree(new, ignore_errors=True)  # of a start that was killed
            new.mkdir()
            shutil.copyfile(self._rendered / record.job / "config.xml", new / "job.xml")
            record = record.model_copy(update={"number": number})
            record.write(new / "build.json")
            (new / "log").touch()
            lock = os.open(new / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX)
            new.rename(builds / str(number))
        return record, lock

    @contextlib.contextmanager
    def _numbering(self, job: str) -> Iterator[None]:
        """Hold the lock under which builds of `job` come and go."""
        with (self._jobs / job / "lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _supervise(self, ref: BuildRef, lock: int) -> None:
        """Start the supervisor of a build; it inherits the lock, so that there is no moment at which nobody holds it."""
        environment = {name: value for name, value in os.environ.items() if INHERITED.fullmatch(name)}
        with (self.directory(ref) / "log").open("ab") as log:
            # its parent exits at once: it is nobody's child to wait for, and outlives who started it
            subprocess.run(
                ["setsid", "--fork", *COMMAND, str(self.config.directory), str(ref), str(lock)],
                check=True,
                cwd="/",
                start_new_session=True,
                env={**environment, SUPERVISOR: str(ref)},
                pass_fds=(lock,),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )


def _next_number(file: Path, builds: Path) -> int:
    """Take the next build number; once taken it is never given again, whatever becomes of the build."""
    taken = [int(path.name) for path in builds.iterdir() if path.name.isdigit()]
    number = max([json.loads(file.read_text()) if file.exists() else 1, *(one + 1 for one in taken)])
    new = file.with_name(".next.new")
    with new.open("w") as stream:
        stream.write(f"{number + 1}\n")
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)
    return number


def remove(tree: Path) -> None:
    """Remove a directory tree as far as possible, with directories that a build has made read-only."""
    for folder, folders, _ in os.walk(tree):
        for name in folders:
            if not (path := Path(folder, name)).is_symlink():
                path.chmod(0o700)
    shutil.rmtree(tree, ignore_errors=True)


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Take a lock file if it is free; yield whether it was."""
    with path.open("r+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def _disk(doing: str) -> Iterator[None]:
    """Turn an error of the operating system into one that says what was being done."""
    try:
        yield
    except (OSError, shutil.Error, subprocess.CalledProcessError) as error:
        raise InfrastructureError(f"cannot {doing}: {error}") from error
