"""The sandbox, with a real root: what is in it, what it may do, and that nothing of it stays."""

import ctypes
import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import uuid
from functools import partial
from pathlib import Path

import pytest
from processes import wait_until_gone, with_marker

from pkgci.config import Config, Limits
from pkgci.errors import InfrastructureError, PackageError
from pkgci.roots import Root, build_root
from pkgci.sandbox import OUT_FILES, Files, Outcome, _cgroup, contained, execute, memory_control, unpack


@pytest.fixture(scope="session")
def root() -> Root:
    return build_root(Config(), "bookworm-amd64")


@pytest.fixture
def box(root: Root, tmp_path: Path):
    """Run a script in a sandbox; return its outcome and what it said."""

    def run(script: str, *, network: bool = False, files: Files | None = None, **limits: int) -> tuple[Outcome, str]:
        output, log = tmp_path / "out", tmp_path / "log"
        output.mkdir(exist_ok=True)
        with log.open("wb") as stream:
            outcome = execute(
                root.path,
                script,
                files=files or Files(),
                output=output,
                limits=Limits(**limits),
                log_to=stream,
                network=network,
            )
        return outcome, log.read_text(errors="replace")

    return run


def test_files_go_in_and_come_out_with_the_scripts_status(box):
    files = Files()
    files.add("/in/a b", "content\n")
    files.add_link("/in/link", "a b")
    outcome, said = box('mkdir /out/d; cat /in/link >/out/d/x; echo "to the log"; exit 3', files=files)
    assert outcome.status == 3
    assert [path.name for path in outcome.files] == ["x"]
    assert outcome.files[0].read_text() == "content\n"
    assert "to the log" in said


def test_it_is_root_inside_and_nobody_on_the_host(box):
    marker = f"sleep 98765{os.getpid()}"
    owners = []

    def look():
        deadline = time.monotonic() + 20
        while not owners and time.monotonic() < deadline:
            owners.extend(Path(f"/proc/{pid}").stat().st_uid for pid in with_marker(marker.replace(" ", "\0")))

    watcher = threading.Thread(target=look)
    watcher.start()
    _, said = box(f"id -u; timeout 2 {marker} || true")
    watcher.join()
    assert said.splitlines()[0] == "0"
    assert owners
    assert all(owner >= 65536 for owner in owners)


def test_nothing_of_the_host_is_visible(box, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o644)
    os.environ["PKGCI_TEST_SECRET"] = "secret"
    _, said = box(f"""
        cat {secret} || true
        env
        ls /proc | grep -c '^[0-9]'
        ls /proc/self/fd
        cat /proc/1/root{secret} || true
        mkdir /escape; chroot /escape /bin/true 2>/dev/null || true
        cut -d' ' -f5 /proc/self/mountinfo
    """)
    del os.environ["PKGCI_TEST_SECRET"]
    assert "secret" not in said.replace(f"{secret}", "")
    assert "/.host" not in said


def test_no_descriptor_but_the_three_usual_ones_is_open(box):
    _, said = box("ls /proc/self/fd")
    # the fourth is the directory that ls reads
    assert said.split() == ["0", "1", "2", "3"]


def test_the_keyring_of_whoever_runs_it_does_not_come_along(box):
    # keyctl(2): KEYCTL_GET_KEYRING_ID of the session keyring
    ours = ctypes.CDLL(None).syscall(250, 0, -3, 0)
    _, said = box("perl -e 'print syscall(250, 0, -3, 0)'")
    assert int(said) != ours


def test_there_is_no_network(box):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"perl -MIO::Socket::INET -e 'exit !IO::Socket::INET->new(\"127.0.0.1:{port}\")'"
        without, _ = box(connect)
        with_network, _ = box(connect, network=True)
    assert without.status != 0
    assert with_network.status == 0


def test_loopback_works_inside(box):
    outcome, said = box("""
        perl -MIO::Socket::INET -e '
            my $s = IO::Socket::INET->new(Listen => 1, LocalAddr => "127.0.0.1") or die;
            IO::Socket::INET->new("127.0.0.1:" . $s->sockport) or die "no loopback"'
    """)
    assert outcome.status == 0, said


def test_a_socket_is_all_that_is_reached_of_what_is_outside(root: Root, tmp_path: Path):
    with socket.socket(socket.AF_UNIX) as server, (tmp_path / "log").open("wb") as log:
        # by its directory: a path may be too long for a socket
        before = os.getcwd()
        os.chdir(tmp_path)
        server.bind("reached")
        os.chdir(before)
        (tmp_path / "reached").chmod(0o666)
        server.listen()
        answer = threading.Thread(target=lambda: server.accept()[0].sendall(b"from outside"), daemon=True)
        answer.start()
        ask = "perl -MIO::Socket::UNIX -e 'print readline(IO::Socket::UNIX->new(Peer => shift) or die $!)'"
        outcome = execute(
            root.path,
            f'{ask} "/proc/$$/fd/5" >/out/said; ! ls "/proc/$$/fd/5/.." && ! cat "/proc/$$/fd/5"',
            files=Files(),
            output=tmp_path,
            limits=Limits(),
            log_to=log,
            where=partial(contained, socket=tmp_path / "reached"),
        )
    assert outcome.status == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "said").read_text() == "from outside"


def test_no_process_outlives_it(box):
    marker = f"outlive-{uuid.uuid4()}"
    box(f"setsid sh -c 'sleep 1000; : {marker}' >/dev/null 2>&1 &\n sleep 0.2")
    assert with_marker(marker) == []


def test_the_time_limit_ends_all_of_it(box):
    marker = f"hang-{uuid.uuid4()}"
    with pytest.raises(PackageError, match="no end after 5 s"):
        box(f"setsid sh -c 'sleep 1000; : {marker}' & sleep 1000", seconds=5)
    wait_until_gone(marker)


def test_it_dies_with_the_process_that_waits_for_it(root: Root, tmp_path: Path):
    marker = f"orphan-{uuid.uuid4()}"
    program = f"""
import sys
from pathlib import Path
from pkgci.config import Limits
from pkgci.sandbox import Files, execute
execute(Path({str(root.path)!r}), "setsid sh -c 'sleep 1000; : {marker}' & sleep 1000", files=Files(),
    output=Path({str(tmp_path)!r}), limits=Limits(), log_to=sys.stdout.buffer)
"""
    waiting = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    # the script's own process appears last; the ones before it only carry its text
    while not any(Path(f"/proc/{pid}/comm").read_text() == "sh\n" for pid in with_marker(marker)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    waiting.send_signal(signal.SIGKILL)
    waiting.wait()
    wait_until_gone(marker)


def test_the_log_is_limited(box):
    with pytest.raises(PackageError, match="it said more than 100 MiB"):
        box("yes")


def test_what_comes_back_is_limited(box):
    with pytest.raises(PackageError, match="more in its output than its limits allow"):
        box("truncate -s 600M /out/a /out/b", disk_mib=1000)
    outcome, said = box("truncate -s 1E /out/a", disk_mib=1000)
    assert outcome.status != 0
    assert "File size limit exceeded" in said


def test_the_number_of_files_that_come_back_is_limited(box, tmp_path: Path):
    with pytest.raises(PackageError, match="more in its output than its limits allow"):
        box("cd /out && seq 20000 | xargs touch")
    assert len(list((tmp_path / "out").iterdir())) <= OUT_FILES


def test_the_disk_is_limited(box):
    outcome, said = box("head -c 200M /dev/zero >/filled", disk_mib=900)
    assert outcome.status == 0, said
    outcome, said = box("head -c 1G /dev/zero >/dev/shm/filled", disk_mib=900)
    assert outcome.status != 0
    assert "No space left" in said


def test_the_number_of_processes_is_limited(box):
    outcome, said = box("for i in $(seq 200); do sleep 5 & done; wait", processes=64)
    assert outcome.status != 0
    assert "annot fork" in said


def test_the_memory_of_a_process_is_limited(box):
    outcome, said = box('perl -e \'$x = "a" x (1 << 29); print "had it\\n"\'', memory_mib=256)
    assert outcome.status != 0
    assert "had it" not in said


def test_the_memory_of_all_processes_is_limited_where_a_cgroup_can_be_made(box):
    if memory_control() != "cgroup":
        pytest.xfail("this user may make no cgroup: memory is limited per process")
    hungry = 'perl -e \'$x = "a" x (180 << 20); print "had it\\n"; sleep 2\''
    _, said = box(f"for i in 1 2 3 4 5 6 7 8; do {hungry} & done; wait", memory_mib=256, disk_mib=800)
    assert said.count("had it") < 8


def test_what_is_killed_from_outside_is_not_the_packages_fault(box):
    if memory_control() != "cgroup":
        pytest.xfail("this user may make no cgroup: nobody can tell who killed it")
    marker = f"killed-{uuid.uuid4()}"

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not (found := with_marker(marker)) and time.monotonic() < deadline:
            time.sleep(0.05)
        pid = found[0]
        while Path(f"/proc/{pid}/comm").read_text() != "unshare\n":
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(InfrastructureError, match="the sandbox was killed from outside of it"):
        box(f"sh -c 'sleep 1000; : {marker}'")
    killer.join()


def test_a_cgroup_whose_maker_was_killed_is_removed_by_the_next():
    program = "from pkgci.sandbox import _cgroup\nwith _cgroup() as group: print(group or '', flush=True); input()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as maker:
        left = Path(maker.stdout.readline().strip())
        if left == Path():
            maker.kill()
            pytest.xfail("this user may make no cgroup: memory is limited per process")
        with _cgroup() as other:
            assert other
            assert left.is_dir()
        maker.kill()
    assert left.is_dir()
    with _cgroup() as other:
        assert other
        assert not left.exists()
    assert not other.exists()


def test_a_root_that_cannot_be_made_is_the_machines_fault(box):
    with pytest.raises(InfrastructureError, match="before or beside its script"):
        box("true", disk_mib=64)


@pytest.mark.parametrize(
    ("name", "kind", "target"),
    [
        ("../escape", tarfile.REGTYPE, ""),
        ("/escape", tarfile.REGTYPE, ""),
        ("link", tarfile.SYMTYPE, "/etc/passwd"),
        ("hard", tarfile.LNKTYPE, "/etc/passwd"),
        ("fifo", tarfile.FIFOTYPE, ""),
        ("device", tarfile.CHRTYPE, ""),
    ],
)
def test_only_plain_files_below_the_output_are_taken(tmp_path: Path, name: str, kind: bytes, target: str):
    stream = io.BytesIO()
    with tarfile.TarFile(fileobj=stream, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        tar.addfile(info)
    stream.seek(0)
    output = tmp_path / "out"
    output.mkdir()
    with pytest.raises(PackageError, match="no plain file"):
        list(unpack(stream, output, 1 << 20))
    assert list(tmp_path.rglob("*")) == [output]
