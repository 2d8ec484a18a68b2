"""Real servers on loopback, each with files of its own in a directory: sshd, nginx, rsync daemons."""

import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from trees import free_port

from pkgci.command import supervised

SSHD = shutil.which("sshd", path="/usr/local/sbin:/usr/sbin:/sbin")
SSHD_CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {directory}/host
AuthorizedKeysFile {directory}/authorized_keys
PidFile none
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
# the test's directory is below one that all may write to
StrictModes no
"""


def wait_for(port: int, log: Path) -> None:
    """Wait until somebody listens; `log` is the failure's message."""
    deadline = time.monotonic() + 20
    while True:
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


class Sshd:
    """An sshd of this user, whose clients get one command only; its keys are in `directory`."""

    def __init__(self, directory: Path, command: str) -> None:
        assert SSHD, "these tests need openssh-server"
        self.directory = directory
        for name in ("host", "identity", "other"):
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name]
            subprocess.run(make, check=True)
        self.answers(command)
        if os.getuid() == 0:
            # where it puts the half of itself that has no rights
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self.port = free_port()
        configuration = directory / "sshd_config"
        configuration.write_text(SSHD_CONFIG.format(port=self.port, directory=directory))
        self.server = subprocess.Popen(supervised([SSHD, "-D", "-E", directory / "log", "-f", configuration]))
        wait_for(self.port, directory / "log")

    def answers(self, command: str) -> None:
        """Let a command answer from now on."""
        key = (self.directory / "identity.pub").read_text()
        (self.directory / "authorized_keys").write_text(f'command="{command}",restrict {key}')

    def account(self, **other: object) -> dict:
        """Return where to log in, as a configuration names it."""
        entry = {"host": "127.0.0.1", "port": self.port, "user": getpass.getuser()}
        entry |= {"host_key": (self.directory / "host.pub").read_text().strip()}
        return {**entry, "identity": str(self.directory / "identity"), **other}

    def sessions(self) -> list[int]:
        """Return the processes of sshd that hold a connection."""
        listed = subprocess.run(["ps", "-eo", "pid,ppid,comm"], check=True, capture_output=True, text=True).stdout
        ours, found = {self.server.pid}, []
        for pid, parent, name in (line.split()[:3] for line in listed.splitlines()[1:]):
            if int(parent) in ours and name == "sshd":
                ours.add(int(pid))
                found.append(int(pid))
        return found

    def end(self) -> None:
        """End it, and whoever is connected."""
        for pid in [*self.sessions(), self.server.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.server.wait()


@contextmanager
def nginx(place: Path, port: int, server: str) -> Iterator[None]:
    """Serve by nginx; `server` is its block, which listens on a port. Its files, and its log `access`, are in `place`."""
    place.mkdir(parents=True)
    temporary = "".join(f"{kind}_temp_path {place}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = "user root;" if os.getuid() == 0 else ""
    (place / "nginx.conf").write_text(
        # one process, which dies with this one
        f"{user} daemon off; master_process off; pid {place}/pid; error_log {place}/error; events {{}}\n"
        f"http {{ access_log {place}/access; {temporary}\n"
        f"{server}\n}}\n"
    )
    command = supervised(["nginx", "-p", place, "-c", place / "nginx.conf", "-e", place / "error"])
    with subprocess.Popen(command) as process:
        try:
            wait_for(port, place / "error")
            yield
        finally:
            process.terminate()


class Rsyncd:
    """An rsync daemon with one module, `released`, that is the directory `tree`; `more` are further parameters of it."""

    def __init__(self, directory: Path, tree: Path, more: Mapping[str, str] | None = None) -> None:
        self.directory, self.tree, self.port = directory, tree, free_port()
        directory.mkdir(parents=True, exist_ok=True)
        tree.mkdir(parents=True, exist_ok=True)
        self.start(more)

    @property
    def url(self) -> str:
        """Its module."""
        return f"rsync://127.0.0.1:{self.port}/released/"

    def start(self, more: Mapping[str, str] | None = None) -> None:
        """Start it, again after `end`."""
        user = {"uid": "root", "gid": "root"} if os.getuid() == 0 else {}
        module = {"path": str(self.tree), "read only": "no", "use chroot": "no", "munge symlinks": "no", **user}
        lines = [f"{key} = {value}" for key, value in {**module, **(more or {})}.items()]
        configuration = self.directory / "rsyncd.conf"
        top = [
            f"log file = {self.directory / 'log'}",
            "address = 127.0.0.1",
            f"port = {self.port}",
            "reverse lookup = no",
        ]
        configuration.write_text("\n".join([*top, "[released]", *lines]) + "\n")
        (self.directory / "log").touch()
        self.server = subprocess.Popen(supervised(["rsync", "--daemon", "--no-detach", f"--config={configuration}"]))
        wait_for(self.port, self.directory / "log")

    def end(self) -> None:
        """End it; who is connected stays."""
        self.server.terminate()
        self.server.wait()

    def idle(self) -> None:
        """Wait until it serves nobody."""
        children = Path(f"/proc/{self.server.pid}/task/{self.server.pid}/children")
        deadline = time.monotonic() + 20
        while children.exists() and children.read_text():
            assert time.monotonic() < deadline, os.popen(
                "ps -eo pid,ppid,stat,etimes,wchan:20,args | grep [r]sync"
            ).read()
            time.sleep(0.01)


class Line:
    """A line to a port, through one of its own, which may be cut, fall silent, or say something else, at a byte.

    Each piece takes `delay` seconds on its way. `lengths` are the bytes that came back over each connection.
    """

    def __init__(self, port: int, delay: float = 0) -> None:
        self.target, self.delay = port, delay
        self.lengths: list[int] = []
        self.fault: tuple[str, int, int] | None = None
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.server.accept()
                number = len(self.lengths)
                self.lengths.append(0)
                there = socket.create_connection(("127.0.0.1", self.target))
                threading.Thread(target=self._pass, args=(client, there), daemon=True).start()
                threading.Thread(target=self._pass, args=(there, client, number), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket, number: int | None = None) -> None:
        """Pass on what `one` says; the faults are in what comes back over a connection of a number."""
        kind, connection, at = self.fault or ("", -1, 0)
        with suppress(OSError):
            while data := one.recv(1 << 16):
                if self.delay:
                    time.sleep(self.delay)
                if number is not None:
                    passed = self.lengths[number]
                    self.lengths[number] += len(data)
                    if number == connection and passed + len(data) > at:
                        if kind == "silent":
                            threading.Event().wait(60)
                        if kind == "garbage":
                            data = data[: max(0, at - passed)] + random.Random(at).randbytes(4096)
                        else:
                            other.sendall(data[: max(0, at - passed)])
                            break
                other.sendall(data)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def restart(self, fault: tuple[str, int, int] | None = None) -> None:
        """Count from the first connection again, with a fault: its kind, the connection, the byte."""
        self.lengths, self.fault = [], fault

    def end(self) -> None:
        """Let nobody connect any more."""
        # a close alone does not wake who accepts
        with suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
