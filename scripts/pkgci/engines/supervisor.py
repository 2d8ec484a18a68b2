"""The process that runs one build of the local engine, from its queue to its result: `CONFIGURATION JOB/NUMBER LOCK`.

LOCK is the descriptor of the build's lock, already held; it is let go only by this process' end. Everything happens in one
thread, since a step dies with the thread that started it.
"""

import contextlib
import ctypes
import fcntl
import os
import re
import select
import shlex
import signal
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from xml.parsers import expat

from pkgci.command import supervised
from pkgci.config import Config
from pkgci.engines.base import BuildRef, Outcome, Tests
from pkgci.engines.definitions import read
from pkgci.engines.local import POLL, LocalEngine, remove, try_lock
from pkgci.engines.processes import COOKIE, SUPERVISOR, kill_all
from pkgci.errors import Exit, PkgciError
from pkgci.text import plain, spelled_out

MINUTE = 60.0  # seconds
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
JUNIT_BYTES = 16 << 20
_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


class Supervisor:
    """Runs one build.

    Args:
        engine: the engine that the build belongs to.
        ref: the build, queued.
        lock: the descriptor of its lock, held.
    """

    def __init__(self, engine: LocalEngine, ref: BuildRef, lock: int) -> None:
        self.engine = engine
        self.ref = ref
        self.directory = engine.directory(ref)
        self.workspace = self.directory / "workspace"
        self.definition = read(self.directory / "job.xml", ref.job)
        self.record = engine.record(ref)
        self.log = Log(self.directory / "log", self.definition.timestamps)
        self._lock = lock
        self._terminated = False
        self._step: int | None = None
        self._status: int | None = None
        self._deadline: float | None = None
        self._stopped: Outcome | None = None
        self._reason = ""

    def run(self) -> None:
        """Run the build; its record says how it ended."""
        os.set_inheritable(self._lock, False)
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self.log.say(f"{self.ref}, label {self.record.label}")
        for name, value in self.record.parameters.items():
            if value:
                self.log.say(f"{name}={shlex.quote(spelled_out(value))}")
        try:
            with self._executor() as granted:
                result: Outcome = self._build() if granted else "ABORTED"
            if not granted:
                self._because("asked to stop while it was queued")
        except Exception as error:  # whatever happens, the build must end; a bug shows its traceback in the log
            self._kill()
            result = "FAILURE"
            self._because(f"the engine failed: {error}")
            if not isinstance(error, OSError | PkgciError):
                self.log.say(traceback.format_exc())
        remove(self.workspace)
        self.log.say(f"Finished: {result}")
        self._update(state=result, ended=datetime.now(UTC), reason=self._reason)
        if self.definition.days is not None:
            try:
                self.engine.discard(self.ref.job, self.definition.days)
            except PkgciError as error:
                self.log.say(str(error))

    def _on_sigterm(self, *_: object) -> None:
        self._terminated = True

    def _because(self, reason: str) -> None:
        self._reason = reason
        self.log.say(reason)

    def _update(self, **fields: object) -> None:
        self.record = self.record.model_copy(update=fields)
        self.record.write(self.directory / "build.json")

    def _asked_to_stop(self) -> bool:
        return self._terminated or (self.directory / "abort").exists()

    @contextlib.contextmanager
    def _executor(self) -> Iterator[bool]:
        """Wait for a free executor of the label, oldest build first, and hold it; yield False when aborted before."""
        ticket = self.engine.ticket(self.record)
        slot = None
        waiting = False
        while slot is None and not self._asked_to_stop():
            if _first(ticket):
                slot = self._free_slot(ticket.parents[1])
            if slot is None:
                if not waiting:
                    self.log.say(f"Waiting for an executor of the label {self.record.label}")
                waiting = True
                time.sleep(POLL)
        ticket.unlink(missing_ok=True)
        try:
            yield slot is not None
        finally:
            if slot is not None:
                os.close(slot)

    def _free_slot(self, label: Path) -> int | None:
        for index in range(self.engine.config.settings.executors.of(self.definition.label) or 0):
            slot = os.open(label / f"{index}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            try:
                fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(slot)
            else:
                return slot
        return None

    def _build(self) -> Outcome:
        """Run the steps and collect what they left."""
        self._update(state="running", started=datetime.now(UTC))
        if self.definition.timeout is not None:
            self._deadline = time.monotonic() + self.definition.timeout * MINUTE
        self.workspace.mkdir()
        result = self._run_steps()
        self._describe()
        self._archive()
        tests, readable = self._read_junit()
        if tests:
            self._update(tests=tests)
        if result == "SUCCESS" and (not readable or (tests and tests.failed)):
            self._because("the steps passed, but the JUnit results say otherwise")
            result = "FAILURE"
        return result

    def _run_steps(self) -> Outcome:
        for command in self.definition.commands:
            status = self._run_step(command)
            if self._stopped:
                return self._stopped
            if status in (Exit.ABORTED, -signal.SIGTERM):
                return "ABORTED"
            if status:
                self.log.say(f"The step ended with status {status}")
                return "FAILURE"
        return "SUCCESS"

    def _run_step(self, command: str) -> int:
        """Run one shell step as Jenkins does, to the end of all its processes; return its status."""
        script = self.directory / "script"
        script.write_text(command)
        first = command.partition("\n")[0]
        shell = shlex.split(first[2:]) if first.startswith("#!") else ["/bin/sh", "-xe"]
        output, write = os.pipe()
        try:
            # pipes, signals and status are this loop's own: it also collects orphans, which `Popen.wait` would not
            process = subprocess.Popen(
                supervised([*shell, script]),
                cwd=self.workspace,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=write,
                stderr=write,
                start_new_session=True,
            )
        finally:
            os.close(write)
        self._step, self._status = process.pid, None
        kill_at = None
        while self._status is None:
            self._pass_on(output, POLL)
            self._reap()
            if self._status is not None:
                break
            if kill_at is None and self._must_stop():
                os.kill(process.pid, signal.SIGTERM)
                kill_at = time.monotonic() + GRACE
            elif kill_at is not None and time.monotonic() > kill_at:
                self._kill()
        self._kill()
        while self._pass_on(output, 0):
            pass
        os.close(output)
        process.returncode = self._status
        return self._status

    def _must_stop(self) -> bool:
        """Decide whether the step is to be stopped now, and what the result will be."""
        if self._asked_to_stop():
            self._because("asked to stop")
            self._stopped = "ABORTED"
        elif self._deadline is not None and time.monotonic() > self._deadline:
            self._because(f"no end after {self.definition.timeout} minutes, the job's time limit; stopped")
            self._stopped = "FAILURE"
        return self._stopped is not None

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name != SUPERVISOR}
        own_tools = str(Path(sys.executable).parent)
        return {
            **inherited,
            **self.record.parameters,
            "BUILD_NUMBER": str(self.ref.number),
            "BUILD_TAG": f"{self.ref.job}-{self.ref.number}",
            "BUILD_URL": self.engine.urls(self.ref).build,
            "JOB_NAME": self.ref.job,
            "NODE_NAME": self.record.node,
            "PATH": f"{own_tools}:{os.environ.get('PATH', os.defpath)}",
            "PKGCI_CONFIG": str(self.engine.config.directory),
            "PKGCI_ENGINE": "local",
            "PYTHONUNBUFFERED": "1",
            "WORKSPACE": str(self.workspace),
            COOKIE: self.record.cookie,
        }

    def _pass_on(self, output: int, seconds: float) -> bool:
        """Wait up to `seconds` for output of the step and write it to the log; return whether there was some."""
        if not select.select([output], [], [], seconds)[0]:
            return False
        data = os.read(output, 1 << 16)
        self.log.write(data)
        if not data and seconds:
            time.sleep(0.01)  # it closed its output: it is about to end, or lives on
        return bool(data)

    def _reap(self) -> None:
        """Collect the status of ended children: the step, and orphans that came to this process."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._step:
                    self._status = os.waitstatus_to_exitcode(ended[1])

    def _kill(self) -> None:
        left = kill_all(self.record.cookie, os.getpid(), self._reap)
        if left:
            self.log.say(f"{left} processes of this build cannot be killed")

    def _archive(self) -> None:
        """Keep what the patterns name. The workspace goes away, so its files are linked, not copied."""
        archive = self.directory / "archive"
        for path in self._files(self.definition.archive, self.log.say):
            kept = archive / path.relative_to(self.workspace)
            kept.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, kept, follow_symlinks=False)

    def _files(self, patterns: tuple[str, ...], complain: Callable[[str], None] = lambda _: None) -> Iterator[Path]:
        """Yield the regular files in the workspace that match one of the Ant patterns, sorted.

        The content is hostile: no symbolic link is followed, whatever it leads to, and nothing else is opened.
        """
        wanted = [_ant(pattern) for pattern in patterns]
        for folder, folders, files in os.walk(self.workspace):
            folders.sort()
            for name in sorted(files + [name for name in folders if Path(folder, name).is_symlink()]):
                path = Path(folder, name)
                relative = path.relative_to(self.workspace).as_posix()
                if not any(pattern.fullmatch(relative) for pattern in wanted):
                    continue
                if stat.S_ISREG(path.lstat().st_mode):
                    yield path
                else:
                    complain(f"Not archived, since it is no regular file: {relative}")

    def _describe(self) -> None:
        """Set the build's description from its log, as the job says."""
        if self.definition.about is None:
            return
        with (self.directory / "log").open(errors="replace") as stream:
            for line in stream.read(1 << 16).splitlines():
                said = line.partition(" ")[2] if self.definition.timestamps else line
                found = re.search(self.definition.about, said)
                if found:
                    self._update(description=found[1][:200])
                    return

    def _read_junit(self) -> tuple[Tests | None, bool]:
        """Return the counts of all JUnit files, or None without any, and whether all could be read."""
        counts, readable = None, True
        for path in self._files(self.definition.junit):
            try:
                one = count_tests(path)
            except (ValueError, OSError) as error:
                self.log.say(f"Cannot read the JUnit results {path.name}: {error}")
                readable = False
            else:
                counts = [old + new for old, new in zip(counts or (0, 0, 0), one, strict=True)]
        return (Tests(total=counts[0], failed=counts[1], skipped=counts[2]) if counts else None), readable


class Log:
    """A build's console log: lines as they come, each with the time it began.

    Args:
        path: the file, appended to.
        timestamps: whether lines get their time in front.
    """

    def __init__(self, path: Path, timestamps: bool) -> None:
        self._stream = path.open("ab", buffering=0)
        self._timestamps = timestamps
        self._line_begins = True

    def say(self, text: str) -> None:
        """Write a line of the engine itself."""
        self.write((b"" if self._line_begins else b"\n") + plain(text.rstrip("\n")).encode() + b"\n")

    def write(self, data: bytes) -> None:
        """Write a piece of output."""
        time_now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        stamp = f"{time_now} ".encode() if self._timestamps else b""
        lines = re.findall(rb"[^\n]*\n|[^\n]+", data)
        stamped = [stamp + line for line in lines]
        if not self._line_begins:
            stamped[:1] = lines[:1]
        self._stream.write(b"".join(stamped))
        self._line_begins = data.endswith(b"\n") if data else self._line_begins


def count_tests(path: Path) -> tuple[int, int, int]:
    """Count the test cases of a JUnit XML file: all, failed (or in error), skipped.

    Raises:
        ValueError: it is no such file, has a document type (which could define entities), or is too large.
        OSError: it cannot be read.
    """
    cases: list[set[str]] = []

    def root(name: str, _: object) -> None:
        if name not in ("testsuite", "testsuites"):
            raise ValueError(f"its root is <{name}>")
        parser.StartElementHandler = element

    def element(name: str, _: object) -> None:
        if name == "testcase":
            cases.append(set())
        elif cases and name in ("failure", "error", "skipped"):
            cases[-1].add(name)

    def document_type(*_: object) -> None:
        raise ValueError("it has a document type")

    parser = expat.ParserCreate()
    parser.StartElementHandler = root
    parser.StartDoctypeDeclHandler = document_type
    with path.open("rb") as stream:
        data = stream.read(JUNIT_BYTES + 1)
    if len(data) > JUNIT_BYTES:
        raise ValueError(f"it has more than {JUNIT_BYTES >> 20} MiB")
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise ValueError(str(error)) from error
    failed = sum(bool(case & {"failure", "error"}) for case in cases)
    return len(cases), failed, sum("skipped" in case for case in cases)


def _ant(pattern: str) -> re.Pattern[str]:
    """Return an Ant pattern as a regular expression: `*` and `?` within a name, `**` any number of directories."""
    *folders, last = pattern.split("/")
    parts = ["(?:[^/]+/)*" if name == "**" else _ant_name(name) + "/" for name in folders]
    return re.compile("".join(parts) + (".*" if last == "**" else _ant_name(last)), re.DOTALL)


def _ant_name(name: str) -> str:
    return "".join({"*": "[^/]*", "?": "[^/]"}.get(character, re.escape(character)) for character in name)


def _first(ticket: Path) -> bool:
    """Whether nobody alive stands before `ticket` in its queue; tickets of the dead are removed."""
    for path in sorted(ticket.parent.iterdir()):
        if path == ticket:
            break
        with contextlib.suppress(FileNotFoundError), try_lock(path) as dead:
            if not dead:
                return False
            path.unlink()
    return True


def main() -> None:
    """Supervise the build that the command line names."""
    configuration, ref, lock = sys.argv[1:]
    Supervisor(LocalEngine(Config(Path(configuration))), BuildRef.parse(ref), int(lock)).run()


if __name__ == "__main__":
    main()
