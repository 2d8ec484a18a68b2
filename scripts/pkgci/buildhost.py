"""Runs a sandbox on another machine, a build host, by ssh. Both ends of the connection are here.

The agent logs in with a key for which the host knows one command only, `pkgci build-host`. That says what it is, takes one
request, and asks for what it lacks: the root, which it keeps, and the files. Back come the log, live, and the archive of
`/out`, which is as hostile as that of a sandbox here. A sandbox there has no network: nothing in a request asks for it.

While a sandbox runs, both ends give signs of life. Who hears none ends: the agent with an error, the host with its sandbox
and all in it. So a connection that breaks, in whatever way, leaves nothing running.
"""

import hashlib
import io
import logging
import os
import select
import signal
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, Annotated, Literal

import paramiko
from pydantic import Field, StringConstraints, ValidationError

from pkgci import sandbox, ssh
from pkgci.config import Config, Limits, Section
from pkgci.errors import Aborted, InfrastructureError, PackageError, PkgciError, RequestError
from pkgci.text import printable

log = logging.getLogger(__name__)

COMMAND = "pkgci build-host"
BEAT = 10.0  # seconds between signs of life
SILENCE = 60.0  # seconds after which the other end is taken for dead
GRACE = 600  # seconds that a host has beyond the time limit of a script, to make the root and to send what came out
BLOCK = 1 << 16
REQUEST_BYTES = 1 << 20
SIZE = struct.Struct(">I")
# what the host sends: a letter, the size of what follows, and that
FRAME = struct.Struct(">cI")
ROOT, FILES, LOG, OUT, KEPT, ALIVE, END = b"R", b"F", b"L", b"O", b"K", b"A", b"E"


class Request(Section):
    """What the agent asks for. The root and the files follow when the host asks for them."""

    root: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    root_bytes: int = Field(ge=0)
    files_bytes: int = Field(ge=0)
    limits: Limits
    arguments: tuple[str, ...]
    keep: bool


class End(Section):
    """How it ended: the script's status, or whose fault it is that there is none, and why."""

    status: int | None = None
    fault: Literal["package", "infrastructure"] = "infrastructure"
    reason: str = ""


def greeting() -> str:
    """Return the line by which a host says what it is: equal lines mean equal sandboxes, and that both ends understand."""
    code = hashlib.sha256()
    for name in ("buildhost.py", "sandbox.py", "sandbox.sh"):
        code.update(Path(__file__).with_name(name).read_bytes())
    return f"{COMMAND} {version('pkgci')} {code.hexdigest()[:16]}"


def contained(
    config: Config,
    name: str,
    digest: str,
    base: Path,
    files: IO[bytes],
    archive: IO[bytes],
    *,
    limits: Limits,
    log_to: IO[bytes],
    arguments: tuple[str, ...] = (),
    network: bool = False,
    keep: IO[bytes] | None = None,
) -> int:
    """Do on a build host what `sandbox.contained` does here.

    Args:
        config: the configuration.
        name: the build host's, in `build_hosts`.
        digest: the sha256 of `base`.
        base: as of `sandbox.contained`, and so are `files`, `archive`, `limits`, `log_to`, `arguments` and `keep`.
        network: there is none.

    Returns:
        The status of the script.

    Raises:
        PackageError: as of `sandbox.contained`.
        RequestError: the configured identity cannot be used.
        InfrastructureError: the host cannot be reached, is another one, is lost, or cannot make the sandbox.
    """
    assert not network
    left = {LOG: sandbox.LOG_BYTES, OUT: limits.disk_mib << 20, **({KEPT: limits.disk_mib << 20} if keep else {})}
    with _connected(config, name) as host, base.open("rb") as root:
        log.info("in a sandbox on %s", host.name)
        request = Request(
            root=digest,
            root_bytes=os.fstat(root.fileno()).st_size,
            files_bytes=os.fstat(files.fileno()).st_size,
            limits=limits,
            arguments=arguments,
            keep=keep is not None,
        )
        host.ask(request)
        for kind, content in host.answers(limits.seconds + GRACE):
            if kind == ROOT:
                log.info("sending it the build root, %d MiB, once", request.root_bytes >> 20)
                host.send(root)
            elif kind == FILES:
                host.send(files)
                host.alive()
            elif kind == END:
                archive.seek(0)
                return host.status(content)
            elif kind != ALIVE:
                left[kind] = left.get(kind, -1) - len(content)
                if left[kind] < 0:
                    break
                if kind == LOG:
                    log_to.write(content)
                    log_to.flush()
                elif kind == OUT:
                    archive.write(content)
                elif keep:
                    # nobody may be there to take it; what the script ended with counts
                    with suppress(BrokenPipeError):
                        os.write(keep.fileno(), content)
        raise host.garbage()


def reach(config: Config, name: str) -> None:
    """Log in to a build host and see that it has the same pkgci.

    Raises:
        RequestError: as of `contained`.
        InfrastructureError: as of `contained`.
    """
    with _connected(config, name):
        pass


class _Host:
    """A build host, from the agent's side."""

    def __init__(self, name: str, channel: paramiko.Channel) -> None:
        self.name = name
        self._channel = channel
        self._read = bytearray()
        self._heard = time.monotonic()
        # when the next sign of life is due: never, until the host waits for it
        self._due = float("inf")

    def greet(self) -> None:
        """Read what it says of itself, and refuse another than this machine would say."""
        while b"\n" not in self._read and len(self._read) < 1000:
            block = self._next()
            if not block:
                break
            self._read += block
        line, _, rest = bytes(self._read).partition(b"\n")
        self._read[:] = rest
        said = line.decode(errors="replace")
        if said == greeting():
            return
        if not said.startswith(f"{COMMAND} "):
            raise InfrastructureError(
                f"{self.name} does not answer as `{COMMAND}`: {printable(said) or self._error()}; "
                "that must be the forced command of the key in its authorized_keys, and nothing else may be said"
            )
        raise InfrastructureError(
            f"{self.name} has another pkgci than this machine, {printable(said)!r} instead of {greeting()!r}; "
            "install the same on both"
        )

    def ask(self, request: Request) -> None:
        """Send the request."""
        said = request.model_dump_json().encode()
        self.send(io.BytesIO(SIZE.pack(len(said)) + said))

    def send(self, stream: IO[bytes]) -> None:
        """Send the rest of a stream. A host that does not take it is about to say why."""
        self._channel.settimeout(SILENCE)
        with suppress(OSError):
            while block := stream.read(BLOCK):
                self._channel.sendall(block)
        self._heard = time.monotonic()

    def alive(self) -> None:
        """Give signs of life from now on: the host has all that it asked for."""
        self._due = time.monotonic()

    def answers(self, seconds: float) -> Iterator[tuple[bytes, bytes]]:
        """Yield the frames that it sends, until `seconds` after it was last asked for something."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            kind, size = FRAME.unpack(self._take(FRAME.size))
            if size > BLOCK:
                raise self.garbage()
            yield kind, self._take(size)
            if kind in (ROOT, FILES):
                deadline = time.monotonic() + seconds
        raise InfrastructureError(f"{self.name}: no end after {seconds:.0f} s")

    def status(self, content: bytes) -> int:
        """Return the script's status that an END frame has, or raise the error that stands there."""
        try:
            end = End.model_validate_json(content)
        except ValidationError:
            raise self.garbage() from None
        if end.status is not None:
            return end.status
        if end.fault == "package":
            raise PackageError(printable(end.reason))
        raise InfrastructureError(f"{self.name}: {printable(end.reason)}")

    def garbage(self) -> InfrastructureError:
        """Return the error of an answer that breaks the rules."""
        return InfrastructureError(f"{self.name} answers what `{COMMAND}` never says; look at what runs there")

    def _take(self, size: int) -> bytes:
        while len(self._read) < size:
            block = self._next()
            if not block:
                raise InfrastructureError(f"the connection to {self.name} is lost: {self._error()}")
            self._read += block
        taken = bytes(self._read[:size])
        del self._read[:size]
        return taken

    def _next(self) -> bytes:
        """Return the next bytes; none at the end. Gives signs of life meanwhile."""
        self._channel.settimeout(BEAT)
        while True:
            try:
                block = self._channel.recv(BLOCK)
            except TimeoutError:
                block = None
            now = time.monotonic()
            if now >= self._due:
                self._due = now + BEAT
                # an end that is not there any more shows when reading
                with suppress(OSError):
                    self._channel.sendall(b"\0")
            if block is not None:
                self._heard = now
                return block
            if now - self._heard > SILENCE:
                raise InfrastructureError(f"the connection to {self.name} is lost: nothing heard for {SILENCE:.0f} s")

    def _error(self) -> str:
        """Return what it said last on stderr."""
        said = self._channel.recv_stderr(BLOCK) if self._channel.recv_stderr_ready() else b""
        lines = said.decode(errors="replace").strip().splitlines()
        return printable(lines[-1]) if lines else "it said nothing"


@contextmanager
def _connected(config: Config, name: str) -> Iterator[_Host]:
    """Log in to a build host and read its greeting."""
    entry = config.settings.build_hosts[name]
    identity, host_key = _identity(config, name), ssh.public_key(entry.host_key)
    host = f"build host {name} ({entry.user}@{entry.host}:{entry.port})"
    client = None
    try:
        try:
            client = ssh.connect(entry.host, entry.port, entry.user, identity, host_key)
            transport = client.get_transport()
            if transport is None:
                raise EOFError
            channel = transport.open_session(timeout=SILENCE)
            channel.exec_command(COMMAND)
        except paramiko.BadHostKeyException as error:
            raise InfrastructureError(
                f"{host} has the host key {error.key.fingerprint} instead of the configured {host_key.fingerprint}; "
                "somebody else answers there, or its key was changed"
            ) from error
        # a ValueError is an answer that paramiko cannot read
        except (OSError, EOFError, ValueError, paramiko.SSHException) as error:
            reason = printable(str(error)) or type(error).__name__
            raise InfrastructureError(f"cannot log in to {host}, host key {host_key.fingerprint}: {reason}") from error
        connection = _Host(host, channel)
        connection.greet()
        yield connection
    finally:
        if client:
            client.close()


def _identity(config: Config, name: str) -> paramiko.PKey:
    """Read the private key for a build host."""
    path = Path(config.settings.build_hosts[name].identity)
    place = config.place_of("config.yaml", "build_hosts", name, "identity")
    try:
        if path.stat().st_mode & 0o077:
            raise RequestError(f"{place}: {path} is open to others than its owner; chmod 600 it")
        return paramiko.Ed25519Key.from_private_key_file(str(path))
    except OSError as error:
        raise RequestError(f"{place}: cannot read {path}: {error.strerror}") from error
    except (paramiko.SSHException, ValueError) as error:
        raise RequestError(f"{place}: {path} is no private key of the kind ed25519 without a passphrase") from error


def serve(config: Config, stdin: int, stdout: int) -> None:
    """Answer one request of an agent, then end; the process is this one's alone.

    Args:
        config: says where roots are kept.
        stdin: the descriptor to read from the agent.
        stdout: the descriptor to write to it.

    Raises:
        Aborted: the agent has gone.
    """

    def stop(*_: object) -> None:
        raise Aborted("stopped: the agent has gone")

    signal.signal(signal.SIGTERM, stop)
    agent = _Agent(stdin, stdout)
    request = agent.request()
    if request is None:
        return
    try:
        root = _root(config, request, agent)
        with tempfile.TemporaryFile(dir=config.cache) as files, tempfile.TemporaryFile(dir=config.cache) as archive:
            agent.send(FILES)
            files.writelines(agent.receive(request.files_bytes))
            files.seek(0)
            with agent.watched(), tempfile.TemporaryFile(dir=config.cache) as kept:
                status = sandbox.contained(
                    *(root, files, archive),
                    limits=request.limits,
                    log_to=_Log(agent),
                    arguments=request.arguments,
                    keep=kept if request.keep else None,
                )
                kept.seek(0)
                for kind, stream in ((OUT, archive), (KEPT, kept)):
                    while block := stream.read(BLOCK):
                        agent.send(kind, block)
                end = End(status=status)
    except Aborted:
        raise
    except PkgciError as error:
        end = End(fault="package" if isinstance(error, PackageError) else "infrastructure", reason=str(error))
    except OSError as error:
        end = End(reason=f"{error.filename or config.cache}: {error.strerror or error}")
    agent.send(END, end.model_dump_json().encode())


class _Agent:
    """An agent, from the build host's side."""

    def __init__(self, stdin: int, stdout: int) -> None:
        self._stdin = stdin
        self._stdout = stdout
        self._writing = threading.Lock()
        # a write must end too when the other end has gone without a word
        os.set_blocking(stdout, False)

    def request(self) -> Request | None:
        """Say what this is, and read a request; None when the agent only wanted to know."""
        self._write(f"{greeting()}\n".encode())
        if not self._readable():
            return None
        first = os.read(self._stdin, SIZE.size)
        if not first:
            return None
        (size,) = SIZE.unpack(first + b"".join(self.receive(SIZE.size - len(first))))
        if size > REQUEST_BYTES:
            raise InfrastructureError(f"a request of {size} bytes: the agent has another protocol")
        try:
            return Request.model_validate_json(b"".join(self.receive(size)))
        except ValidationError as error:
            raise InfrastructureError("a request of another form: the agent has another protocol") from error

    def send(self, kind: bytes, content: bytes = b"") -> None:
        """Send a frame."""
        with self._writing:
            self._write(FRAME.pack(kind, len(content)) + content)

    def receive(self, size: int) -> Iterator[bytes]:
        """Yield the next `size` bytes."""
        while size:
            block = os.read(self._stdin, min(size, BLOCK)) if self._readable() else b""
            if not block:
                raise Aborted("the agent has gone before it had sent all")
            size -= len(block)
            yield block

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Give signs of life, and end this process by SIGTERM when the agent gives none."""
        ended = threading.Event()

        def look() -> None:
            while self._readable() and os.read(self._stdin, BLOCK) and not ended.is_set():
                # who holds the lock is writing, and what does not get through must not keep this from noticing why
                if self._writing.acquire(blocking=False):
                    try:
                        if self._writable(0):
                            self._write(FRAME.pack(ALIVE, 0))
                    except Aborted:
                        break
                    finally:
                        self._writing.release()
            if not ended.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=look, name="watch", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _readable(self) -> bool:
        return bool(select.select([self._stdin], [], [], SILENCE)[0])

    def _writable(self, seconds: float) -> bool:
        return bool(select.select([], [self._stdout], [], seconds)[1])

    def _write(self, content: bytes) -> None:
        left = memoryview(content)
        try:
            while left:
                if not self._writable(SILENCE):
                    raise Aborted("the agent takes nothing any more")
                left = left[os.write(self._stdout, left) :]
        except OSError as error:
            raise Aborted("the agent has gone") from error


class _Log(io.RawIOBase):
    """What a sandbox says, sent to the agent as it is said."""

    def __init__(self, agent: _Agent) -> None:
        self._agent = agent

    def write(self, block) -> int:
        self._agent.send(LOG, bytes(block))
        return len(block)


def _root(config: Config, request: Request, agent: _Agent) -> Path:
    """Return the root that a request names; get it from the agent when it is not kept here. It appears whole or not at all."""
    kept = config.cache / "roots"
    path = kept / f"{request.root}.tar"
    with suppress(FileNotFoundError):
        os.utime(path)
        return path
    kept.mkdir(parents=True, exist_ok=True)
    for former in kept.glob("*.tar"):
        with suppress(FileNotFoundError):
            # so old that no agent uses it any more; what is being read stays until it is closed
            if former.stat().st_mtime < time.time() - config.settings.root_days * 86400:
                former.unlink()
    agent.send(ROOT)
    with tempfile.NamedTemporaryFile(dir=kept, suffix=".tar") as new:
        digest = hashlib.sha256()
        for block in agent.receive(request.root_bytes):
            digest.update(block)
            new.write(block)
        if digest.hexdigest() != request.root:
            raise InfrastructureError("the build root did not arrive as it was sent; try again")
        new.flush()
        os.fsync(new.fileno())
        # another agent may have sent it meanwhile
        with suppress(FileExistsError):
            os.link(new.name, path)
    return path
