"""A guest, as what runs outside of it sees it: by ssh, as root, with limits on all that it says."""

import base64
import logging
import shlex
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from io import BytesIO
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from tarfile import TarFile, TarInfo
from typing import IO

from pkgci.errors import DISK, InfrastructureError
from pkgci.lazy import Lazy
from pkgci.text import printable

paramiko = Lazy("paramiko")
log = logging.getLogger(__name__)

FORWARD_SECONDS = 30
UPTIME_SECONDS = 30
FILES_SECONDS = 120
FILE_BYTES = 64 << 20


class GuestError(InfrastructureError):
    """The guest hangs, is gone, or floods us. Whoever ran something in it knows whose fault that is."""


class DeafError(GuestError):
    """The guest does not let us in within its time."""


class EndlessError(GuestError):
    """A command in the guest did not end within its time."""


class LostError(GuestError):
    """The connection to the guest is lost, whoever has ended it."""

    def __init__(self, reason: object = "") -> None:
        super().__init__(f"the connection to the machine is lost{reason and f': {reason}'}")


class Fault(Enum):
    """What may come over machines that no package does: after one of these, and nothing else, a test is run once again."""

    KILLED = "QEMU was killed, or has crashed"
    NOT_RESTORED = "a machine was not restored within its time"
    CUT = "the connection to a machine was cut, though the machine was well"


class FaultError(InfrastructureError):
    """One of the listed faults has come over a machine."""

    def __init__(self, fault: Fault, detail: object) -> None:
        super().__init__(f"{fault.value}: {detail}")


@dataclass(frozen=True)
class Access:
    """How to log in: the private key's file, and the guest's own public key in the form `ssh-ed25519 BASE64`."""

    identity: Path
    host_key: str


@dataclass(frozen=True)
class Completed:
    """How a command in the guest ended, and what it wrote (stdout and stderr in one)."""

    status: int
    output: bytes

    def text(self) -> str:
        """Return the output as text; the guest is not trusted to write UTF-8."""
        return self.output.decode(errors="replace")


class Remote:
    """A guest that lets us in.

    Args:
        client: the connection; None until there is one.

    Raises:
        GuestError: (from any member) it does not do what was asked.
    """

    def __init__(self, client: "paramiko.SSHClient | None") -> None:
        self._client = client

    def run(
        self,
        script: str,
        *arguments: str,
        timeout: float,
        input: bytes = b"",
        limit: int = 1 << 20,
        to: IO[bytes] | None = None,
    ) -> Completed:
        """Run a shell script in the guest, as root.

        Args:
            script: POSIX shell, run with `sh -eu`.
            arguments: its arguments.
            timeout: seconds until its connection is cut; what it started may go on.
            input: its standard input.
            limit: bytes of output that are accepted.
            to: takes the output as it comes, so that it is there however this ends.

        Raises:
            EndlessError: no end within `timeout`.
            GuestError: more than `limit` bytes of output.
            LostError: the connection is lost.
        """
        end = time.monotonic() + timeout
        output = bytearray()
        try:
            with self._transport().open_session(timeout=timeout) as channel:
                channel.set_combine_stderr(True)
                channel.settimeout(timeout)
                channel.exec_command(shlex.join(["sh", "-euc", script, "sh", *arguments]))
                channel.sendall(input)
                channel.shutdown_write()
                while block := channel.recv(65536):
                    output += block
                    if to:
                        to.write(block)
                    if len(output) > limit:
                        raise GuestError(f"a command in the machine wrote more than {limit} bytes")
                    channel.settimeout(max(0.0, end - time.monotonic()))
                channel.status_event.wait(max(0.0, end - time.monotonic()))
                status = channel.exit_status
        except TimeoutError as error:
            raise EndlessError(f"a command in the machine did not end within {timeout:.0f} s") from error
        except (OSError, EOFError, paramiko.SSHException) as error:
            if isinstance(error, OSError) and error.errno in DISK:
                # it is `to` that cannot be written
                raise
            raise LostError(error) from error
        if status < 0:
            raise LostError
        return Completed(status, bytes(output))

    def follow(self, script: str, *arguments: str, to: IO[bytes], limit: int) -> None:
        """Run a shell script in the guest, as root, and write what it says to a stream as it comes, until it ends.

        Args:
            script: as of `run`.
            arguments: its arguments.
            to: the stream.
            limit: bytes after which it is left alone.

        Raises:
            LostError: the connection is lost.
        """
        try:
            with self._transport().open_session(timeout=FORWARD_SECONDS) as channel:
                channel.exec_command(shlex.join(["sh", "-euc", script, "sh", *arguments]))
                while limit > 0 and (block := channel.recv(min(limit, 1 << 16))):
                    to.write(block)
                    limit -= len(block)
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise LostError(error) from error

    def _transport(self) -> "paramiko.Transport":
        transport = self._client.get_transport() if self._client else None
        if transport is None:
            raise LostError
        return transport

    def up_since(self, then: float) -> bool:
        """Return whether the guest has not been restarted since a time, of the clock `time.monotonic`."""
        said = self.run("cat /proc/uptime", timeout=UPTIME_SECONDS)
        return float(said.text().split()[0]) > time.monotonic() - then

    @contextmanager
    def forward(self, port: int) -> Iterator[int]:
        """Yield a port of this host's loopback that leads to a TCP port of the guest's own, while the context lasts.

        Each connection goes through the ssh connection of its time; where nobody listens in the guest, it is closed.

        Args:
            port: of 127.0.0.1 in the guest.
        """
        with _Forward(self, port) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
            thread.start()
            try:
                yield server.server_address[1]
            finally:
                server.shutdown()
                thread.join()

    def put(self, files: Mapping[str, bytes], timeout: float = FILES_SECONDS) -> None:
        """Write files of the guest, by their absolute paths; the directories are made."""
        archive = BytesIO()
        with TarFile(fileobj=archive, mode="w") as tar:
            for path, content in files.items():
                info = TarInfo("." + path)
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
        done = self.run("tar -C / -xf -", timeout=timeout, input=archive.getvalue())
        if done.status:
            raise GuestError(f"cannot write files in the machine: {printable(done.text())}")

    def get(self, path: str, timeout: float = FILES_SECONDS) -> bytes:
        """Return the content of a file of the guest, up to `FILE_BYTES`."""
        # encoded, so that what cat has to say is no content
        done = self.run('base64 -w 0 -- "$1"', path, timeout=timeout, limit=2 * FILE_BYTES)
        if done.status:
            raise GuestError(f"cannot read {path} in the machine: {printable(done.text())}")
        return base64.b64decode(done.output)


class _Forward(ThreadingTCPServer):
    """Listens for connections to a port of a guest; when it is closed, they end."""

    daemon_threads = True

    def __init__(self, guest: Remote, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.guest, self.port = guest, port
        self.channels: set[paramiko.Channel] = set()
        self.closed = False

    def server_close(self) -> None:
        self.closed = True
        for channel in list(self.channels):
            channel.close()
        super().server_close()


class _Connection(BaseRequestHandler):
    """Copies both ways, until both have ended."""

    server: _Forward

    def handle(self) -> None:
        server = self.server
        try:
            channel = server.guest._transport().open_channel(
                "direct-tcpip", ("127.0.0.1", server.port), self.client_address, timeout=FORWARD_SECONDS
            )
        except (OSError, EOFError, paramiko.SSHException, GuestError) as error:
            log.info("no connection to port %d of the machine: %s", server.port, error)
            return
        with channel:
            server.channels.add(channel)
            # it may have been closed meanwhile, by who did not see this one
            if not server.closed:
                back = threading.Thread(target=self._copy_back, args=(channel,), daemon=True)
                back.start()
                with suppress(OSError):
                    while block := self.request.recv(1 << 16):
                        channel.sendall(block)
                    channel.shutdown_write()
                back.join()
            server.channels.discard(channel)

    def _copy_back(self, channel: "paramiko.Channel") -> None:
        with suppress(OSError):
            while block := channel.recv(1 << 16):
                self.request.sendall(block)
        with suppress(OSError):
            # one that is closed takes nothing more either
            self.request.shutdown(socket.SHUT_RDWR if channel.closed else socket.SHUT_WR)
