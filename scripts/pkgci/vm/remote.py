"""A guest, as what runs outside of it sees it: by ssh, as root, with limits on all that it says."""

import base64
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tarfile import TarFile, TarInfo

from pkgci.errors import InfrastructureError
from pkgci.lazy import Lazy

paramiko = Lazy("paramiko")

FILES_SECONDS = 120
FILE_BYTES = 64 << 20


class GuestError(InfrastructureError):
    """The guest hangs, is gone, or floods us. Whoever ran something in it knows whose fault that is."""


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

    def run(self, script: str, *arguments: str, timeout: float, input: bytes = b"", limit: int = 1 << 20) -> Completed:
        """Run a shell script in the guest, as root.

        Args:
            script: POSIX shell, run with `sh -eu`.
            arguments: its arguments.
            timeout: seconds until its connection is cut; what it started may go on.
            input: its standard input.
            limit: bytes of output that are accepted.

        Raises:
            GuestError: no end within `timeout`, more than `limit` bytes of output, or the connection is lost.
        """
        assert self._client
        end = time.monotonic() + timeout
        output = bytearray()
        try:
            transport = self._client.get_transport()
            channel = transport.open_session(timeout=timeout) if transport else None
            if channel is None:
                raise GuestError("the connection to the machine is lost")
            with channel:
                channel.set_combine_stderr(True)
                channel.settimeout(timeout)
                channel.exec_command(shlex.join(["sh", "-euc", script, "sh", *arguments]))
                channel.sendall(input)
                channel.shutdown_write()
                while block := channel.recv(65536):
                    output += block
                    if len(output) > limit:
                        raise GuestError(f"a command in the machine wrote more than {limit} bytes")
                    channel.settimeout(max(0.0, end - time.monotonic()))
                channel.status_event.wait(max(0.0, end - time.monotonic()))
                status = channel.exit_status
        except TimeoutError as error:
            raise GuestError(f"a command in the machine did not end within {timeout:.0f} s") from error
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise GuestError(f"the connection to the machine is lost: {error}") from error
        if status < 0:
            raise GuestError("the connection to the machine is lost")
        return Completed(status, bytes(output))

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
            raise GuestError(f"cannot write files in the machine: {done.text().strip()}")

    def get(self, path: str, timeout: float = FILES_SECONDS) -> bytes:
        """Return the content of a file of the guest, up to `FILE_BYTES`."""
        # encoded, so that what cat has to say is no content
        done = self.run('base64 -w 0 -- "$1"', path, timeout=timeout, limit=2 * FILE_BYTES)
        if done.status:
            raise GuestError(f"cannot read {path} in the machine: {done.text().strip()}")
        return base64.b64decode(done.output)
