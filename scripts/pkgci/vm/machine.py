"""One virtual machine: QEMU, driven by QMP, and its guest, driven by ssh. What is in it is none of this module's business.

A machine lives in a directory of its own, with files of fixed names (`disk`, `kernel`, `initrd`, `ram`, `state`, `proxy`),
so that the command line of all machines of a kind is the same text: a saved state fits one command line only.
The guest reaches nothing but port 3128 of 10.0.2.100, where each connection leads to the Unix socket `proxy`.
What it says on its console is in `serial.log`, as plain text, up to `CONSOLE_BYTES`.
"""

import json
import logging
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pkgci.command import run, supervised
from pkgci.errors import InfrastructureError
from pkgci.lazy import Lazy
from pkgci.logs import LogFile, record
from pkgci.ssh import connect, public_key
from pkgci.text import printable
from pkgci.vm.remote import Access, Completed, DeafError, EndlessError, Fault, FaultError, GuestError, LostError, Remote

paramiko, qmp, legacy = Lazy("paramiko"), Lazy("qemu.qmp"), Lazy("qemu.qmp.legacy")
log = logging.getLogger(__name__)
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

QEMU = "qemu-system-x86_64"
# a versioned type: the unversioned one changes its hardware from one QEMU to the next
MACHINE_TYPE = "pc-i440fx-7.2"
KERNEL_ARGUMENTS = (
    "root=/dev/vda rw rootfstype=ext4 net.ifnames=0 console=ttyS0 quiet loglevel=3 audit=0 mitigations=off nokaslr "
    "cryptomgr.notests random.trust_cpu=on fsck.mode=skip"
)
CONTROL_SECONDS = 120
# the file of `pack`
PACKED = "vm.zst"
MEMORY_BYTES_A_SECOND = 1 << 40
CONSOLE_BYTES = 16 << 20
# a machine that does all that it is asked for in a half of this time, if it has a processor of the host to itself
FAIR_SECONDS = 900
LOGIN_SECONDS = 30
# what the host has done to a machine, not who is in it: no space left, a disk that fails, an image that is damaged
DISK_EVENTS = ("BLOCK_IO_ERROR", "BLOCK_IMAGE_CORRUPTED")

Accelerator = Literal["kvm", "tcg"]
# of a restored machine: the host's time, or that at which it was frozen, from which on it runs
Clock = Literal["host", "frozen"]


@dataclass(frozen=True)
class Hardware:
    """What decides the command line of a machine."""

    accelerator: Accelerator
    memory_mib: int
    # of its interfaces in networks of machines, in order: `lan0`, `lan1`, ... are their backends' names
    addresses: tuple[str, ...] = ()
    # it boots by PXE from the first one of them, and not from the files `kernel` and `initrd`
    from_network: bool = False
    clock: Clock = "host"
    # beside the first one
    further_disks: int = 0

    def command(self) -> list[str]:
        """Return QEMU's command line as far as a saved state depends on it; file names are relative."""
        network = "user,id=net0,restrict=on,ipv6=off,hostfwd=tcp:127.0.0.1:0-:22"
        network += ",guestfwd=tcp:10.0.2.100:3128-cmd:socat -T600 - UNIX-CONNECT:proxy"
        return [
            QEMU,
            *("-machine", f"{MACHINE_TYPE},memory-backend=ram", "-accel", self.accelerator),
            *("-cpu", "host" if self.accelerator == "kvm" else "qemu64", "-smp", "1", "-m", f"{self.memory_mib}M"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"),
            *("-sandbox", "on,obsolete=deny,resourcecontrol=deny"),
            *(() if self.from_network else ("-kernel", "kernel", "-initrd", "initrd", "-append", KERNEL_ARGUMENTS)),
            *("-drive", "file=disk,if=none,id=disk0,format=qcow2,cache=unsafe,discard=unmap"),
            *("-device", "virtio-blk-pci,drive=disk0", "-netdev", network),
            *("-device", "virtio-net-pci,netdev=net0,romfile=,mac=52:54:00:00:00:01"),
            *("-device", "virtio-rng-pci", "-device", "vmgenid,guid=auto"),
            *(
                word
                for number, mac in enumerate(self.addresses)
                for word in ("-device", f"virtio-net-pci,netdev=lan{number},mac={mac},{self._firmware(number)}")
            ),
            *(
                word
                for disk in self.disks()[1:]
                for word in (
                    *("-drive", f"file={disk},if=none,id={disk},format=qcow2,cache=unsafe,discard=unmap"),
                    *("-device", f"virtio-blk-pci,drive={disk}"),
                )
            ),
            # else a restart of the guest would take the host's time from it
            *(("-rtc", "clock=vm") if self.clock == "frozen" else ()),
        ]

    def disks(self) -> list[str]:
        """Return the names of its disks' files: the first one is the guest's /dev/vda, and so on."""
        return ["disk", *(f"disk{number}" for number in range(1, self.further_disks + 1))]

    def _firmware(self, number: int) -> str:
        """Return what makes an interface one to boot from, or saves it the program for that."""
        return "bootindex=0" if self.from_network and number == 0 else "romfile="


def qemu_version() -> str:
    """Return QEMU's version line; a saved state fits one version only."""
    return run([QEMU, "--version"], quiet=True, timeout=CONTROL_SECONDS).stdout.decode().splitlines()[0]


def accelerator(kernel: Path) -> Accelerator:
    """Return `kvm` if it boots `kernel` here, else `tcg`. A device that exists proves nothing: some boot no Linux."""
    try:
        with Path("/dev/kvm").open("r+b"):
            pass
    except OSError:
        return "tcg"
    probe = [QEMU, "-machine", MACHINE_TYPE, "-accel", "kvm", "-cpu", "host", "-m", "256M", "-nodefaults"]
    probe += ["-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", str(kernel)]
    # without a root it cannot go further than this panic, after which -no-reboot ends QEMU
    probe += ["-append", "console=ttyS0 panic=-1"]
    try:
        said = run(probe, timeout=20, check=False, quiet=True).stdout
    except InfrastructureError:
        said = b""
    return "kvm" if b"Kernel panic" in said else "tcg"


@contextmanager
def blaming_the_host(machine: "Machine", seconds: float, doing: str) -> Iterator[None]:
    """Do something in a machine; when it is not done, say so if that is no doing of the machine's.

    Args:
        machine: the machine.
        seconds: what it may take; a machine that has a processor of the host to itself needs half of it at most.
        doing: what is done, for errors.

    Raises:
        GuestError: it is not done, and may be the machine's doing.
        FaultError: the connection to it was cut.
        InfrastructureError: this host was too busy with others to run it.
    """
    begun, waited = time.monotonic(), machine.waited()
    try:
        yield
    except (DeafError, EndlessError) as error:
        waited = machine.waited() - waited
        # of one that is busy without end, among as many as share the host's processors, it has its time
        if seconds - waited < min(seconds, FAIR_SECONDS) / 2:
            raise InfrastructureError(
                f"{doing}: {error}; for {waited:.0f} s of these the host had no processor for the machine; run fewer at once "
                "there, see its executors of the label systest"
            ) from error
        raise
    except LostError as error:
        try:
            machine.connect(LOGIN_SECONDS)
        except GuestError:
            raise error from None
        if machine.up_since(begun):
            raise FaultError(Fault.CUT, f"{doing}: {error}") from error
        raise


class Machine(Remote):
    """A machine in `directory`, which has its files, and where its own are made.

    Use it as a context manager: at the end no process is left. QEMU is killed as well when the thread that started it
    ends, however that happens.

    Args:
        directory: its directory.
        hardware: its hardware.
        access: how to log in.
        backends: arguments of QEMU that the hardware's interfaces in networks of machines need.

    Raises:
        InfrastructureError: (from any member) QEMU does not do what it should.
        GuestError: (from any member that talks to the guest) the guest does not.
    """

    def __init__(self, directory: Path, hardware: Hardware, access: Access, backends: Sequence[str] = ()) -> None:
        super().__init__(None)
        self._backends = backends
        self.directory = directory
        self._hardware = hardware
        self.access = access
        self._port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._console: threading.Thread | None = None
        self._watcher: threading.Thread | None = None
        self._disk_error = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        assert self._process
        return self._process.pid

    @property
    def disks(self) -> list[Path]:
        """The files of its disks."""
        return [self.directory / name for name in self._hardware.disks()]

    @property
    def clock(self) -> Clock:
        """The time that it has when it is restored."""
        return self._hardware.clock

    def boot(self) -> None:
        """Start from the disk, with the file `ram` as memory, so that `save` can leave it there."""
        self._start(share=True)

    def load(self) -> None:
        """Start from the files `ram`, which is read only (changes are private copies), and `state`; stand still.

        If there is a file of `pack`, both are taken from that one.
        """
        packed = (self.directory / PACKED).exists()
        self._start("-incoming", "defer", share=False)
        self._ignore_shared_memory()
        self._qmp("migrate-incoming", uri=f"exec:zstd -dcq <{PACKED}" if packed else "exec:cat <state")
        self._wait_for_migration()

    def go_on(self) -> None:
        """Let a machine run that stands still."""
        self._qmp("cont")

    def reset(self) -> None:
        """Restart it at once, as by the button; `connect` waits until it is up again."""
        self._disconnect()
        self._qmp("system_reset")

    def shut_down(self, seconds: float) -> None:
        """Have the guest halt; its `disk` is final then.

        Raises:
            GuestError: it has not within `seconds`.
            FaultError: QEMU was killed: what it had yet to write to the disk is lost.
        """
        with suppress(LostError):
            self.run("systemctl poweroff", timeout=seconds)
        self._disconnect()
        assert self._process
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise GuestError(f"the machine does not halt within {seconds:.0f} s") from None
        if status:
            raise self._failure("ended by itself")

    def stop(self) -> None:
        """Let a machine stand still."""
        self._disconnect()
        self._qmp("stop")

    def save(self) -> None:
        """Write `state` of a machine that was booted and stands still; `ram` and `disk` are final once it has quit."""
        self._ignore_shared_memory()
        self._qmp("migrate", uri="exec:cat >state")
        self._end()

    def pack(self, path: Path) -> None:
        """Write memory and devices of a machine that was restored and stands still to a file; its `disk` is final, too."""
        # it has memory of its own, which is written as well; by default QEMU holds back to spare a network
        self._qmp("migrate-set-parameters", **{"max-bandwidth": MEMORY_BYTES_A_SECOND})
        self._qmp("migrate", uri=f"exec:zstd -q -1 >{PACKED}")
        self._end()
        shutil.move(self.directory / PACKED, path)

    def _end(self) -> None:
        """Wait until its state is written, and let it quit."""
        self._wait_for_migration()
        # not killed: QEMU has yet to write the disk's metadata
        with suppress(qmp.QMPError):
            self._qmp("quit")
        assert self._process
        try:
            self._process.wait(CONTROL_SECONDS)
        except subprocess.TimeoutExpired:
            raise self._failure("does not quit") from None

    def kill(self) -> None:
        """End it at once."""
        self._disconnect()
        if self._process:
            self._process.kill()
            self._process.wait()
            with suppress(qmp.QMPError, EOFError):
                self._monitor.close()
            self._process = None
        # they end with the one who writes to them
        for thread in filter(None, (self._console, self._watcher)):
            thread.join()
        self._console = self._watcher = None

    def connect(self, seconds: float) -> None:
        """Wait until the guest's ssh server lets us in.

        Raises:
            DeafError: it did not within `seconds`.
            GuestError: it has another host key.
        """
        assert self._process
        port = self.port()
        identity = paramiko.Ed25519Key.from_private_key_file(str(self.access.identity))
        host_key = public_key(self.access.host_key)
        # errors that no second attempt mends
        final = (
            paramiko.BadHostKeyException,
            paramiko.AuthenticationException,
            paramiko.ssh_exception.IncompatiblePeer,
        )
        end = time.monotonic() + seconds
        while True:
            try:
                client = connect("127.0.0.1", port, "root", identity, host_key)
            except final as error:
                raise GuestError(f"cannot log in to the machine: {error}") from error
            # QEMU accepts connections long before the guest does
            except (OSError, EOFError, paramiko.SSHException) as error:
                if time.monotonic() > end:
                    raise DeafError(f"no ssh to the machine within {seconds:.0f} s: {error}") from error
                with suppress(subprocess.TimeoutExpired):
                    if self._process.wait(0.1) == 0:
                        raise GuestError("the machine was halted from within") from None
                    raise self._failure("ended by itself") from None
            else:
                self._disconnect()
                self._client = client
                return

    def run(self, script: str, *arguments: str, **options: Any) -> Completed:
        """Run a shell script in the guest; see `Remote.run`.

        Raises:
            GuestError: see there.
            FaultError: QEMU was killed, which nothing in the guest can do.
            InfrastructureError: the host has no space left for its disk.
        """
        try:
            return super().run(script, *arguments, **options)
        except GuestError:
            assert self._process
            with suppress(subprocess.TimeoutExpired):
                # its connections are closed before it has ended
                if self._process.wait(1) == -signal.SIGKILL:
                    raise self._failure("was killed") from None
            raise

    def console(self) -> str:
        """Return what it has said on its console so far."""
        return (self.directory / "serial.log").read_text(errors="replace")

    def port(self) -> int:
        """Return the port of 127.0.0.1 that leads to the guest's ssh server."""
        assert self._port is not None
        return self._port

    def waited(self) -> float:
        """Return for how many seconds its processor has been ready to run while this host's were busy with others."""
        waits = [0]
        for task in Path(f"/proc/{self.pid}/task").glob("*/schedstat"):
            # proc(5): the time on a processor, and that of waiting for one, in nanoseconds; the thread may have ended
            with suppress(OSError, IndexError):
                waits.append(int(task.read_text().split()[1]))
        # the threads beside that of the processor hardly run
        return max(waits) / 1e9

    def listen(self, address: str) -> int:
        """Have an IPv4 address of this host lead to the guest's ssh server as well; return the port there."""
        before = self._forwarded()
        said = self._qmp("human-monitor-command", **{"command-line": f"hostfwd_add net0 tcp:{address}:0-:22"})
        new = [port for port in self._forwarded() if port not in before]
        if not new:
            raise self._failure(f"cannot listen on {address}: {str(said).strip()!r}")
        return new[0]

    def _forwarded(self) -> list[int]:
        """Return the ports of this host that lead to the guest, the one of 127.0.0.1 that each machine has first."""
        text = str(self._qmp("human-monitor-command", **{"command-line": "info usernet"}))
        return [int(port) for port in re.findall(r"TCP\[HOST_FORWARD\]\s+\d+\s+\S+\s+(\d+)", text)]

    def _start(self, *more: str, share: bool) -> None:
        memory = f"memory-backend-file,id=ram,size={self._hardware.memory_mib}M,mem-path=ram"
        ours, theirs = socket.socketpair()
        events, told = socket.socketpair()
        with theirs, told, (self.directory / "qemu.log").open("wb") as said:
            # none of these is part of the machine as the guest sees it
            argv = [*self._hardware.command(), *self._backends, "-object", f"{memory},share={'on' if share else 'off'}"]
            for name, end in (("qmp", theirs), ("events", told)):
                argv += ["-chardev", f"socket,id={name},fd={end.fileno()}", "-mon", f"chardev={name},mode=control"]
            argv += more
            log.debug("+ %s", shlex.join(argv))
            try:
                self._process = subprocess.Popen(
                    # a connection of the guest is a process here
                    supervised(["prlimit", "--nofile=256", *argv]),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    bufsize=0,
                    stderr=said,
                    cwd=self.directory,
                    pass_fds=(theirs.fileno(), told.fileno()),
                    start_new_session=True,
                )
            except FileNotFoundError as error:
                raise InfrastructureError(
                    f"cannot run QEMU: {error.filename} is missing; see `pkgci doctor`"
                ) from error
        # always read: a console that nobody reads makes the guest wait
        assert self._process.stdout
        self._console = record(self._process.stdout, LogFile(self.directory / "serial.log", largest=CONSOLE_BYTES))
        self._watcher = threading.Thread(target=self._watch, args=(events, self._process), name="events", daemon=True)
        self._watcher.start()
        self._monitor = legacy.QEMUMonitorProtocol(ours)
        self._monitor.settimeout(CONTROL_SECONDS)
        if not select.select([ours], [], [], CONTROL_SECONDS)[0]:
            raise self._failure("does not answer")
        try:
            self._monitor.connect()
        except (qmp.QMPError, EOFError, OSError):
            raise self._failure("does not start") from None
        # asked for at once: QEMU is spoken to by the thread that started it only, the guest by any
        forwarded = self._forwarded()
        if not forwarded:
            raise self._failure("has no port for ssh")
        self._port = forwarded[0]

    def _watch(self, events: socket.socket, process: "subprocess.Popen[bytes]") -> None:
        """End QEMU when the host does not let it use the disk: the guest would stand still, and look as if it hung.

        Args:
            events: a connection of its own to QMP.
            process: QEMU.
        """
        with events, events.makefile("rb") as lines, suppress(OSError):
            events.sendall(b'{"execute": "qmp_capabilities"}')
            for line in lines:
                said = json.loads(line)
                if said.get("event") in DISK_EVENTS and not self._disk_error:
                    self._disk_error = printable(str(said["data"].get("reason") or said["data"].get("msg")))
                    process.kill()

    def _qmp(self, command: str, **arguments: object) -> object:
        try:
            return self._monitor.cmd(command, **arguments)
        except (qmp.QMPError, TimeoutError, EOFError, OSError) as error:
            raise self._failure(f"{command}: {error or type(error).__name__}") from error

    def _ignore_shared_memory(self) -> None:
        # the memory is a file already: only the devices' state is written and read
        self._qmp("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])

    def _wait_for_migration(self) -> None:
        assert self._process
        end = time.monotonic() + CONTROL_SECONDS
        while True:
            answer = self._qmp("query-migrate")
            status = answer.get("status") if isinstance(answer, dict) else None
            if status == "completed":
                return
            if status == "failed" or time.monotonic() > end:
                raise self._failure(f"saving or restoring its state: {status}")
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.01)
                raise self._failure("ended by itself")

    def _disconnect(self) -> None:
        if self._client:
            self._client.close()
            self._client = None

    def _failure(self, what: str) -> InfrastructureError:
        if self._disk_error:
            return InfrastructureError(
                f"the machine was ended, since this host cannot use its disk in {self.directory}: {self._disk_error}"
            )
        said = (self.directory / "qemu.log").read_text(errors="replace").strip().splitlines()
        error = f"QEMU {what}" + (f": {said[-1]}" if said else "")
        with suppress(subprocess.TimeoutExpired):
            # its connections are closed before it has ended
            if self._process and self._process.wait(1) < 0:
                return FaultError(Fault.KILLED, error)
        return InfrastructureError(error)
