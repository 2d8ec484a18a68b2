"""Where anything of a change is executed, and where its files are interpreted.

A sandbox is a throw-away root over a prepared base, for root and for an ordinary user alike: namespaces of its own for
users (a range of sub-ids, so that not even its root is anybody on the host), mounts, processes, IPC, host name and
network. Files go in and come out as tar streams; no directory of the host is visible inside. Its disk is a tmpfs of a
limited size, so that nothing is left behind however it ends; when the process that waits for it dies, so does all in it.
"""

import fcntl
import io
import logging
import os
import pty
import pwd
import select
import signal
import subprocess
import tarfile
import tempfile
import termios
import time
import tty
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from pkgci.command import run, supervised
from pkgci.config import Limits
from pkgci.errors import DISK, InfrastructureError, PackageError
from pkgci.locks import locked
from pkgci.text import PlainLog

log = logging.getLogger(__name__)

# passed as text: the file itself may lie where the sandbox's ids may not read
SCRIPT = Path(__file__).with_suffix(".sh").read_text()
IDS = 65536
# keyctl(2): join a new, empty session keyring; the one of whoever runs this would come along otherwise
NEW_KEYRING = ["perl", "-e", "syscall(250, 1, 0); exec @ARGV or exit 127;", "--"]
TREE_DOES_NOT_FIT = 97
# how the sandbox ends when its limit of memory is reached: the kernel sends SIGKILL to it, or systemd SIGTERM to its scope
KILLED = {status for one in (signal.SIGKILL, signal.SIGTERM) for status in (-one, 128 + one)}
SCOPE_SECONDS = 10
TIMED_OUT = 124
PACK_SECONDS = 300
LOG_BYTES = 100 << 20
OUT_FILES = 10_000
CGROUP = "pkgci-"
# of version 2, of version 1
MEMORY_LIMITS = ("memory.max", "memory.limit_in_bytes")
MEMORY_EVENTS = ("memory.events", "memory.oom_control")
# not this process's own: a user's has no /usr/sbin, where pivot_root is
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Outcome:
    """How a sandbox ended: its script's exit status and the regular files that it left in `/out`, below `directory`."""

    status: int
    files: tuple[Path, ...] = ()


@dataclass
class Files:
    """Files for the root of a sandbox: a tar stream under construction, all owned by the sandbox's root."""

    stream: IO[bytes] = field(default_factory=tempfile.TemporaryFile)

    def __post_init__(self) -> None:
        self._tar = tarfile.TarFile(fileobj=self.stream, mode="w", format=tarfile.GNU_FORMAT)

    def add(self, path: str, content: bytes | str, mode: int = 0o644) -> None:
        """Add a regular file with the absolute path `path` inside the root."""
        data = content.encode() if isinstance(content, str) else content
        self.add_stream(path, io.BytesIO(data), len(data), mode)

    def add_file(self, path: str, source: Path, mode: int = 0o644) -> None:
        """Add the host's regular file `source` under the absolute path `path`."""
        with source.open("rb") as stream:
            self.add_stream(path, stream, os.fstat(stream.fileno()).st_size, mode)

    def add_stream(self, path: str, stream: IO[bytes], size: int, mode: int = 0o644) -> None:
        """Add a regular file with the next `size` bytes of `stream`, which are never in memory as a whole."""
        info = self._info(path, mode)
        info.size = size
        self._tar.addfile(info, stream)
        # it remembers each file that it has written
        self._tar.members.clear()

    def add_link(self, path: str, to: str) -> None:
        """Add a symbolic link; where it leads is resolved inside the sandbox only."""
        info = self._info(path, 0o777)
        info.type, info.linkname = tarfile.SYMTYPE, to
        self._tar.addfile(info)

    def add_directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory."""
        info = self._info(path, mode)
        info.type = tarfile.DIRTYPE
        self._tar.addfile(info)

    def finished(self, script: str) -> IO[bytes]:
        """Return the stream with the script to run, complete and at its beginning."""
        self.add("/pkgci-script", script, 0o755)
        self._tar.close()
        self.stream.seek(0)
        return self.stream

    def _info(self, path: str, mode: int) -> tarfile.TarInfo:
        info = tarfile.TarInfo("." + path)
        info.mode, info.mtime = mode, 0
        return info


def sub_ids(kind: str) -> int | None:
    """Return the first id of this user's range in /etc/subuid or /etc/subgid (`subuid(5)`), or None.

    Args:
        kind: `subuid` or `subgid`.
    """
    user = pwd.getpwuid(os.getuid())
    try:
        lines = Path("/etc", kind).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, rest = line.partition(":")
        first, _, count = rest.partition(":")
        if name in (user.pw_name, str(user.pw_uid)) and count.isdigit() and int(count) >= IDS:
            return int(first)
    return None


def namespaces(network: bool) -> list[str]:
    """Return the command prefix that makes the namespaces; what follows it is root in them.

    Raises:
        InfrastructureError: this user has no range of sub-ids.
    """
    uid, gid = sub_ids("subuid"), sub_ids("subgid")
    if uid is None or gid is None:
        raise InfrastructureError("no range of 65536 sub-ids for this user; `pkgci doctor` says how to add one")
    unshare = ["unshare", "--user", f"--map-users={uid},0,{IDS}", f"--map-groups={gid},0,{IDS}"]
    unshare += ["--setuid", "0", "--setgid", "0", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
    # a change of credentials clears the parent-death signal: it is set once more on the inner side
    return supervised([*unshare, *([] if network else ["--net"]), *supervised(["env"])])


def execute(
    base: Path,
    script: str,
    *,
    files: Files,
    output: Path,
    limits: Limits,
    log_to: IO[bytes],
    arguments: tuple[str, ...] = (),
    network: bool = False,
    keep: Path | None = None,
    where: Callable[..., int] | None = None,
) -> Outcome:
    """Run `script` as root of a fresh sandbox.

    Args:
        base: the prepared root, an uncompressed tar.
        script: a POSIX shell script, run with `sh -eu`, as `/pkgci-script`; what it leaves in `/out` comes back.
        files: what to add to the root before; its stream is consumed.
        output: an existing directory that takes the regular files of `/out`.
        limits: time, processes, disk and memory.
        log_to: takes stdout and stderr, as plain text: nothing in it is obeyed by a terminal.
        arguments: the script's arguments.
        network: share the host's network. Only for trusted tools that fetch; never for code of a change.
        keep: where to make a packed tar of the root when the script fails or reaches its time limit, for `interactive`;
            nothing is there afterwards when it is larger than the disk, or cannot be written.
        where: does elsewhere what `contained` does, which makes the sandbox here.

    Returns:
        The status of the script and the files that came back.

    Raises:
        PackageError: the limit of time or log was reached, or `/out` holds something else than plain files and directories.
        InfrastructureError: the sandbox cannot be made.
    """
    with tempfile.TemporaryFile() as archive, PlainLog(log_to) as said:
        stdin = files.finished(script)
        given = {"limits": limits, "log_to": said, "arguments": arguments, "network": network}
        contain = where or contained
        if keep is None:
            status = contain(base, stdin, archive, **given)
        else:
            start = time.monotonic()
            with _packed(keep, limits.disk_mib << 20) as stream:
                status = contain(base, stdin, archive, keep=stream, **given)
            if status == TIMED_OUT and time.monotonic() - start >= limits.seconds:
                raise _too_long(limits.seconds)
        return Outcome(status, tuple(unpack(archive, output, limits.disk_mib << 20)))


def contained(
    base: Path,
    files: IO[bytes],
    archive: IO[bytes],
    *,
    limits: Limits,
    log_to: IO[bytes],
    arguments: tuple[str, ...] = (),
    network: bool = False,
    keep: IO[bytes] | None = None,
    socket: Path | None = None,
) -> int:
    """Do what `execute` does between two streams: what goes into the root, and what comes back, still hostile.

    Args:
        base: as of `execute`.
        files: what `Files.finished` returns, a file with a descriptor.
        archive: an open file that takes a tar of `/out`; it is at its beginning afterwards.
        limits: as of `execute`.
        log_to: takes stdout and stderr as they are.
        arguments: as of `execute`.
        network: as of `execute`.
        keep: takes a tar of the root when the script fails.
        socket: a Unix socket that anybody may write to, and the only thing outside that the script then reaches: it
            connects to `/proc/PID/fd/5` of its own process. Not together with `keep`.

    Returns:
        The status of the script; `TIMED_OUT` with `keep` when it reached its time limit.

    Raises:
        PackageError: the limit of time, log or memory was reached, or `files` cannot be unpacked.
        InfrastructureError: the sandbox cannot be made, or was killed from outside.
    """
    with base.open("rb") as root, _memory_limit(limits) as confined, _reference(socket) as reached:
        mode, seconds = (
            ("run", limits.seconds) if keep is None else (str(limits.seconds), limits.seconds + PACK_SECONDS)
        )
        command = [*confined.prefix, *_command(limits, network, mode, arguments)]
        streams = [root, archive, *filter(None, [keep, reached])]
        status = _wait(command, files, streams, log_to, seconds)
        archive.seek(0)
        if not archive.read(1):
            if status == TREE_DOES_NOT_FIT:
                raise PackageError("its files cannot be unpacked in the sandbox; see the log above")
            if status in KILLED and not confined.exceeded():
                raise InfrastructureError("the sandbox was killed from outside of it, not at a limit; try again")
            if status in KILLED:
                raise PackageError(f"killed, most likely at its memory limit of {limits.memory_mib} MiB")
            raise InfrastructureError(
                f"the sandbox ended with status {status} before or beside its script; see the log above"
            )
        archive.seek(0)
        return status


@contextmanager
def _reference(socket: Path | None) -> Iterator[IO[bytes] | None]:
    """Yield a descriptor that refers to a socket and opens nothing (O_PATH): the directories around it stay out of reach."""
    if socket is None:
        yield None
        return
    with open(os.open(socket, os.O_PATH), "rb", buffering=0) as stream:
        yield stream


def _command(limits: Limits, network: bool, mode: str, arguments: Sequence[str]) -> list[str]:
    """Return the command that runs `/pkgci-script` in a sandbox; `mode` is that of sandbox.sh."""
    variables = {"LC_ALL": "C.UTF-8", "HOME": "/root", "PATH": PATH}
    return [
        *namespaces(network),
        "-i",
        *(f"{name}={value}" for name, value in variables.items()),
        *("prlimit", f"--nproc={limits.processes}", "--core=0", f"--data={limits.memory_mib << 20}"),
        # no file can claim to be larger than the disk; this holds for the archive of /out too
        f"--fsize={limits.disk_mib << 20}",
        *("sh", "-c", SCRIPT, "sandbox.sh", str(limits.disk_mib), "yes" if network else "no", mode),
        *("sh", "-eu", "/pkgci-script", *arguments),
    ]


def _start(command: list[str], stdin: IO[bytes], streams: Sequence[IO[bytes]], stdout: int) -> subprocess.Popen[bytes]:
    """Start the sandbox's command with `streams` on the descriptors from 3 on, and no other."""
    # moved out of the way of 3, 4 and 5 first, and closed: a build that had them could write its own result
    passed = [fcntl.fcntl(stream.fileno(), fcntl.F_DUPFD, 10) for stream in streams]
    moves = " ".join(f"{number}<&{here} {here}<&-" for number, here in enumerate(passed, 3))
    wrapper = ["bash", "-c", f'exec {moves}; exec "$@"', "sandbox"]
    try:
        return subprocess.Popen(
            supervised([*NEW_KEYRING, *wrapper, *command]),
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            pass_fds=passed,
            start_new_session=True,
        )
    finally:
        for descriptor in passed:
            os.close(descriptor)


def _too_long(seconds: int) -> PackageError:
    return PackageError(f"no end after {seconds} s, its time limit; killed")


def _wait(command: list[str], stdin: IO[bytes], streams: Sequence[IO[bytes]], log_to: IO[bytes], seconds: int) -> int:
    """Run the sandbox's command with the base on descriptor 3 and the result on 4; return its status."""
    process = _start(command, stdin, streams, subprocess.PIPE)
    assert process.stdout is not None
    deadline, left = time.monotonic() + seconds, LOG_BYTES
    try:
        with process.stdout as said:
            while True:
                readable, _, _ = select.select([said], [], [], max(0.0, deadline - time.monotonic()))
                if not readable:
                    raise _too_long(seconds)
                block = os.read(said.fileno(), 1 << 16)
                if not block:
                    break
                left -= len(block)
                if left < 0:
                    raise PackageError(f"it said more than {LOG_BYTES >> 20} MiB, the limit of a log; killed")
                log_to.write(block)
                log_to.flush()
        # all that could write has ended, so this is about to
        return process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def _packed(place: Path, largest: int) -> Iterator[IO[bytes]]:
    """Yield a stream whose content is packed into the file `place`, of `largest` bytes at most.

    It is there afterwards if anything was written, all of it, and what is done meanwhile succeeds.
    """
    command = ["prlimit", f"--fsize={largest}", "zstd", "-q", "-1", "-o", str(place)]
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source:
        packing = subprocess.Popen(supervised(command), stdin=source, stderr=subprocess.DEVNULL)
    whole = False
    try:
        with os.fdopen(writing, "wb") as stream:
            yield stream
        whole = True
    finally:
        if not whole:
            packing.kill()
        # of a script that succeeds there is nothing, and that is packed in a few bytes
        if packing.wait() or not whole or place.stat().st_size < 1000:
            place.unlink(missing_ok=True)


def interactive(packed: Path, script: str, *, limits: Limits, arguments: tuple[str, ...] = ()) -> int:
    """Run `script` on this process's terminal, in a sandbox with a root that `execute` kept.

    It has a terminal of its own, between which and this one only bytes go: nothing in it reaches this one's settings or
    its queue of input.

    Args:
        packed: what `execute` made by `keep`.
        script: as of `execute`.
        limits: processes, disk and memory; there is none of time.
        arguments: the script's arguments.

    Returns:
        The status of the script, or of what failed before it.
    """
    files = Files().finished(script)
    ours, theirs = pty.openpty()
    with (
        subprocess.Popen(supervised(["zstd", "-dcq", packed]), stdout=subprocess.PIPE) as unpacking,
        open(os.devnull, "wb") as nowhere,
        _memory_limit(limits) as confined,
    ):
        assert unpacking.stdout is not None
        command = [*confined.prefix, *_command(limits, False, "shell", arguments)]
        process = _start(command, files, [unpacking.stdout, nowhere], theirs)
        os.close(theirs)
        unpacking.stdout.close()
        try:
            _relay(ours)
            return process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            os.close(ours)


def _relay(terminal: int) -> None:
    """Copy between this process's terminal, raw meanwhile, and another one's controlling side, until that one is closed."""

    def resize(*_: object) -> None:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8)))

    settings = termios.tcgetattr(0)
    before = signal.signal(signal.SIGWINCH, resize)
    resize()
    try:
        tty.setraw(0)
        sources = [0, terminal]
        while True:
            for source in select.select(sources, [], [])[0]:
                try:
                    block = os.read(source, 1 << 16)
                except OSError:
                    block = b""  # what Linux says when nobody has the other side open
                if not block and source == terminal:
                    return
                if not block:
                    sources.remove(0)
                while block:
                    block = block[os.write(terminal if source == 0 else 1, block) :]
    finally:
        signal.signal(signal.SIGWINCH, before)
        termios.tcsetattr(0, termios.TCSADRAIN, settings)


def memory_control() -> Literal["cgroup", "systemd", "process"]:
    """Return what limits the memory of a sandbox on this machine.

    All its processes together are limited by a cgroup that this user may make, or by one that systemd makes for it;
    otherwise the limit of each process (RLIMIT_DATA) is the only one.
    """
    with _cgroup() as group:
        if group:
            return "cgroup"
    return "systemd" if _scope_works() else "process"


@dataclass(frozen=True)
class _Confined:
    """A memory limit: the command prefix that puts a process and all its descendants under it, and the cgroup if it has one."""

    prefix: list[str]
    group: Path | None = None

    def exceeded(self) -> bool:
        """Return whether the kernel has killed something at the limit; also when nobody can tell."""
        for name in MEMORY_EVENTS:
            if self.group and (self.group / name).exists():
                return "\noom_kill 0\n" not in (self.group / name).read_text()
        return True


@contextmanager
def _memory_limit(limits: Limits) -> Iterator[_Confined]:
    """Yield a memory limit for all processes of a sandbox together, where that can be.

    The tmpfs of the root counts as memory, so the disk limit is added.
    """
    limit = (limits.memory_mib + limits.disk_mib) << 20
    with _cgroup() as group:
        if group is None:
            yield _Confined(_scope(limit) if _scope_works() else [])
            return
        for name in MEMORY_LIMITS:
            if (group / name).exists():
                (group / name).write_text(str(limit))
        yield _Confined(["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(group / "cgroup.procs")], group)


def _scope(limit: int) -> list[str]:
    """Return the command prefix for a scope of the systemd of this user, or of the system for root; see systemd-run(1)."""
    scope = ["systemd-run", "--scope", "--quiet", "--collect", f"--property=MemoryMax={limit}"]
    scope += ["--property=MemorySwapMax=0", *(["--user"] if os.getuid() else []), "--"]
    # a job has no session, the user's systemd may run all the same
    runtime = os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}")
    return ["env", f"XDG_RUNTIME_DIR={runtime}", *scope]


@cache
def _scope_works() -> bool:
    try:
        return run([*_scope(1 << 30), "true"], check=False, quiet=True, timeout=SCOPE_SECONDS).returncode == 0
    except InfrastructureError:
        return False


@contextmanager
def _cgroup() -> Iterator[Path | None]:
    """Yield a new cgroup with a memory limit below this process's own (version 2, else 1); None where that is not allowed."""
    parents = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            mounts = ["/sys/fs/cgroup/memory"] if controllers else ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
            parents += [Path(mount + path.rstrip("/")) for mount in mounts]
    with ExitStack() as locks:
        group = next(filter(None, (_new_cgroup(parent, locks) for parent in parents)), None)
        try:
            yield group
        finally:
            if group:
                _remove_cgroup(group)


def _new_cgroup(parent: Path, locks: ExitStack) -> Path | None:
    """Make a cgroup and lock it, as long as `locks` lasts; remove those whose makers were killed."""
    for left in parent.glob(f"{CGROUP}*"):
        # it may be another user's, or the kernel still ends what was in it
        with suppress(OSError), locked(left, wait=False) as dead:
            if dead:
                left.rmdir()
    while True:
        group = parent / f"{CGROUP}{uuid.uuid4().hex}"
        try:
            group.mkdir()
        except OSError:
            return None
        # until it was locked, another process may have taken it for one that was left
        if locks.enter_context(locked(group, wait=False)):
            break
    if any((group / name).exists() for name in MEMORY_LIMITS):
        return group
    group.rmdir()
    return None


def _remove_cgroup(group: Path) -> None:
    """Remove a cgroup. What was in it has been killed; the kernel may need a moment to let the last of it go."""
    for _ in range(100):
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.05)
        else:
            return


def unpack(archive: IO[bytes], output: Path, largest: int) -> Iterator[Path]:
    """Unpack the regular files of a tar that a sandbox made into `output`, and yield their paths.

    The tar is hostile: only plain files and directories with relative names that stay below are taken, and not more than
    `OUT_FILES` files with `largest` bytes together.
    """
    try:
        with tarfile.open(fileobj=archive, mode="r:") as tar:
            for number, member in enumerate(tar):
                path = PurePosixPath(member.name)
                largest -= member.size
                if number >= OUT_FILES or largest < 0:
                    raise PackageError("the build left more in its output than its limits allow; refused")
                if member.isdir():
                    continue
                if not member.isreg() or path.is_absolute() or ".." in path.parts:
                    raise PackageError(f"the build left {member.name!r} in its output, which is no plain file; refused")
                target = output / path
                target.parent.mkdir(parents=True, exist_ok=True)
                tar.makefile(member, target)
                yield target
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        if isinstance(error, OSError) and error.errno in DISK:
            raise InfrastructureError(f"cannot keep a build's output in {output}: {error.strerror}") from error
        raise PackageError(f"the build's output cannot be read: {error}") from error
