"""Build hosts: a real sshd on loopback, and everything that may happen between it and an agent."""

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import paramiko
import pytest
import trees
import yaml
from processes import wait_until_gone, with_marker
from servers import Sshd

from pkgci import buildhost
from pkgci.artifacts import Build
from pkgci.buildhost import COMMAND, greeting
from pkgci.compile import compile
from pkgci.config import Config, Limits
from pkgci.doctor import examine
from pkgci.errors import InfrastructureError, PackageError, RequestError
from pkgci.roots import Root, build_root
from pkgci.sandbox import Files, Outcome, execute

DEB, RPM = "bookworm-amd64", "debianrpm-amd64"
PKGCI = Path(sys.executable).with_name("pkgci")


class BuildHost(Sshd):
    """This machine as a build host, by an sshd of its own; its keys, cache and configuration are in `directory`."""

    def __init__(self, directory: Path, cache: Path) -> None:
        self.cache = cache
        super().__init__(directory, self.command())

    def command(self, *, pkgci: str = f"{PKGCI} build-host") -> str:
        return f"env XDG_CACHE_HOME={self.cache} {pkgci}"

    def answers_by(self, program: str) -> None:
        """Let a Python program answer from now on, which has `say(bytes)`, `greet()`, and `host()`, the real one."""
        path = self.directory / "program.py"
        path.write_text(
            "import sys, time\nfrom pkgci import buildhost\nfrom pkgci.config import Config\n"
            "def host(): buildhost.serve(Config(), 0, 1)\n"
            "def say(data): sys.stdout.buffer.write(data); sys.stdout.flush()\n"
            f"def greet(): say(buildhost.greeting().encode() + b'\\n')\n{program}\n"
        )
        self.answers(self.command(pkgci=f"{sys.executable} {path}"))

    def config(self, place: Path, **other: object) -> Config:
        """Return a configuration by which all targets are built on this host."""
        place.mkdir(exist_ok=True)
        configuration = trees.config(place, build_hosts={"here": self.account(**other)})
        for name in (DEB, RPM):
            with (configuration.directory / "targets" / f"{name}.yaml").open("a") as target:
                target.write("\nbuild_host: here\n")
        return configuration


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of all hosts but those that a test gives another: a root is sent to it once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def host(tmp_path: Path, cache: Path) -> Iterator[BuildHost]:
    directory = tmp_path / "host"
    directory.mkdir()
    made = BuildHost(directory, cache)
    try:
        yield made
    finally:
        made.end()


@pytest.fixture(scope="session")
def root() -> Root:
    return build_root(Config(), DEB)


@pytest.fixture
def box(host: BuildHost, root: Root, tmp_path: Path):
    """Run a script in a sandbox on the host; return its outcome and what it said."""

    def run(script: str, config: Config | None = None, keep: Path | None = None, **limits: int) -> tuple[Outcome, str]:
        config = config or host.config(tmp_path / uuid.uuid4().hex)
        output, log = tmp_path / "out", tmp_path / "log"
        output.mkdir(exist_ok=True)
        with log.open("wb") as stream:
            outcome = execute(
                root.path,
                script,
                files=Files(),
                output=output,
                limits=Limits(**limits),
                log_to=stream,
                keep=keep,
                where=partial(buildhost.contained, config, "here", root.id),
            )
        return outcome, log.read_text(errors="replace")

    return run


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def one_line(error: pytest.ExceptionInfo) -> str:
    said = str(error.value)
    assert "\n" not in said
    assert said.isprintable()
    return said


def compiled(place: Path, configuration: Config, target: str) -> Build:
    artifacts = place / f"artifacts-{target}"
    artifacts.mkdir()
    return compile(configuration, target, trees.local(configuration, place / "small"), artifacts)


class Job:
    """A compile job as an engine starts it, of a package whose build says `marker` and then hangs."""

    def __init__(self, place: Path, configuration: Config, *pkgci: str | Path) -> None:
        self.marker = f"hang-{uuid.uuid4()}"
        files = trees.deb()
        files["debian/rules"] += (
            f"\noverride_dh_auto_build:\n\techo {self.marker}\n\tsh -c 'sleep 1000; : {self.marker}'\n"
        )
        trees.commit(place / "small", files)
        values = trees.local(configuration, place / "small").values
        self.workspace = place / "workspace"
        self.workspace.mkdir()
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("ZUUL_", "PKGCI_"))}
        with (self.workspace / "console").open("wb") as console:
            self.process = subprocess.Popen(
                [*(pkgci or [PKGCI]), "compile", DEB],
                cwd=self.workspace,
                env={**clean, **values, "PKGCI_CONFIG": str(configuration.directory)},
                stdout=console,
                stderr=console,
            )

    def said(self) -> str:
        return (self.workspace / "console").read_text()

    def wait_until_building(self) -> None:
        """Wait until the build's own line is in the job's log, while the build runs."""
        wait_for(lambda: f"\n{self.marker}" in self.said() or self.process.poll(), "nothing is built", 120)
        assert self.process.poll() is None, self.said()
        wait_for(lambda: with_marker(self.marker), "no process")

    def result(self) -> dict:
        return json.loads((self.workspace / "artifacts" / "result.json").read_text())


@pytest.fixture
def job(host: BuildHost, tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path, host.config(tmp_path / "agent"))
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()


@pytest.mark.parametrize("target", [DEB, RPM])
def test_a_package_has_the_same_bits_from_there_as_from_here(host: BuildHost, tmp_path: Path, target: str):
    trees.commit(tmp_path / "small", trees.deb() | trees.rpm())
    (tmp_path / "local").mkdir()
    here = compiled(tmp_path, trees.config(tmp_path / "local"), target)
    shutil.move(tmp_path / f"artifacts-{target}", tmp_path / "artifacts-local")
    # what is known of the package is not asked again, unless the cache is another one
    configuration = host.config(tmp_path / "agent")
    there = compiled(tmp_path, configuration, target)
    assert (here.origin, there.origin) == ("built", "built")
    assert there.packages == here.packages
    assert there.packages
    assert "Accepted publickey" in (host.directory / "log").read_text()
    assert (tmp_path / f"artifacts-{target}" / "logs" / "build.log").stat().st_size > 1000


def test_the_root_is_sent_to_a_host_that_lacks_it_and_not_again(
    host: BuildHost, root: Root, tmp_path: Path, box, caplog
):
    caplog.set_level("INFO")
    host.cache = tmp_path / "empty"
    host.answers(host.command())
    for _ in range(2):
        outcome, said = box("echo here; exit 3")
        assert (outcome.status, said) == (3, "here\n")
    assert caplog.text.count("sending it the build root") == 1
    kept = list((host.cache / "pkgci" / "roots").iterdir())
    assert [path.name for path in kept] == [f"{root.id}.tar"]
    assert kept[0].stat().st_size == root.path.stat().st_size


def test_a_root_that_is_not_what_it_is_said_to_be_is_not_kept(host: BuildHost, root: Root, tmp_path: Path):
    host.cache = tmp_path / "empty"
    host.answers(host.command())
    wrong = tmp_path / "root.tar"
    wrong.write_bytes(b"x" * 100_000)
    with pytest.raises(InfrastructureError, match="did not arrive as it was sent") as error:
        execute(
            wrong,
            "true",
            files=Files(),
            output=tmp_path,
            limits=Limits(),
            log_to=sys.stdout.buffer,
            where=partial(buildhost.contained, host.config(tmp_path / "agent"), "here", root.id),
        )
    assert "build host here" in one_line(error)
    assert list((host.cache / "pkgci" / "roots").iterdir()) == []


def test_files_come_back(box):
    outcome, _ = box("mkdir /out/d; head -c 3000000 /dev/zero >/out/d/x; ln -s x /out/d/y; rm /out/d/y")
    assert [(path.name, path.stat().st_size) for path in outcome.files] == [("x", 3_000_000)]


def test_there_is_no_network(box):
    outcome, said = box("ip -o link 2>/dev/null || cat /proc/net/dev")
    assert "lo:" in said
    assert "eth" not in said
    assert outcome.status == 0


def test_limits_hold_there_and_are_the_packages_fault(box):
    with pytest.raises(PackageError, match="no end after 3 s, its time limit") as error:
        box("sleep 1000", seconds=3)
    one_line(error)
    with pytest.raises(PackageError, match="it said more than 100 MiB"):
        box("yes")


def test_the_root_of_a_failed_script_is_kept_here(box, tmp_path: Path):
    kept = tmp_path / "root.tar.zst"
    outcome, _ = box("echo why >/root/witness; exit 1", keep=kept)
    assert outcome.status == 1
    listed = subprocess.run(
        ["tar", "--zstd", "-xOf", kept, "./root/witness"], check=True, capture_output=True, text=True
    )
    assert listed.stdout == "why\n"


def test_an_abort_ends_the_build_there_within_5_seconds(job: Job):
    job.wait_until_building()
    job.process.send_signal(signal.SIGTERM)
    wait_until_gone(job.marker, 5)
    assert job.process.wait(5) == 143
    assert job.result()["result"] == "ABORTED"


def test_an_agent_that_is_killed_leaves_nothing_there(job: Job):
    job.wait_until_building()
    job.process.kill()
    wait_until_gone(job.marker, 5)


def test_a_connection_that_is_killed_is_the_infrastructures_fault_and_leaves_nothing(host: BuildHost, job: Job):
    job.wait_until_building()
    for pid in host.sessions():
        os.kill(pid, signal.SIGKILL)
    assert job.process.wait(20) == 3, job.said()
    wait_until_gone(job.marker, 5)
    result = job.result()
    assert result["fault"] == "infrastructure"
    assert f"the connection to build host here ({getpass.getuser()}@127.0.0.1:{host.port}) is lost" in result["reason"]
    assert "Traceback" not in job.said()


def test_a_host_from_which_nothing_is_heard_is_given_up(host: BuildHost, box, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(buildhost, "SILENCE", 3.0)
    monkeypatch.setattr(buildhost, "BEAT", 0.5)
    marker = f"silent-{uuid.uuid4()}"
    stopped = []

    def stop() -> None:
        wait_for(lambda: with_marker(marker), "no process")
        stopped.extend(host.sessions())
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        with pytest.raises(InfrastructureError, match="is lost: nothing heard for 3 s") as error:
            box(f"sh -c 'sleep 1000; : {marker}'")
    finally:
        thread.join()
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    one_line(error)
    wait_until_gone(marker)


def test_an_agent_from_which_nothing_is_heard_is_given_up(host: BuildHost, tmp_path: Path):
    host.answers_by("buildhost.SILENCE = 3.0\nbuildhost.BEAT = 0.5\nhost()")
    agent = "from pkgci import buildhost; buildhost.BEAT = 0.5; from pkgci.cli import main; main()"
    job = Job(tmp_path, host.config(tmp_path / "agent"), sys.executable, "-c", agent)
    try:
        job.wait_until_building()
        job.process.send_signal(signal.SIGSTOP)
        wait_until_gone(job.marker)
        wait_for(lambda: not with_marker(f"{host.directory}/program.py"), "the host's own process still runs")
    finally:
        job.process.kill()
        job.process.wait()


def test_a_silent_build_is_not_taken_for_a_lost_one(host: BuildHost, box, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(buildhost, "SILENCE", 2.0)
    monkeypatch.setattr(buildhost, "BEAT", 0.2)
    host.answers_by("buildhost.SILENCE = 2.0\nbuildhost.BEAT = 0.2\nhost()")
    outcome, said = box("sleep 5; echo end")
    assert (outcome.status, said) == (0, "end\n")


def test_a_wrong_host_key_is_refused(host: BuildHost, box, tmp_path: Path):
    other = (host.directory / "other.pub").read_text().strip()
    with pytest.raises(InfrastructureError) as error:
        box("true", host.config(tmp_path / "agent", host_key=other))
    fingerprints = [
        subprocess.run(["ssh-keygen", "-lf", host.directory / name], check=True, capture_output=True, text=True)
        for name in ("host.pub", "other.pub")
    ]
    theirs, expected = (done.stdout.split()[1] for done in fingerprints)
    said = one_line(error)
    assert f"127.0.0.1:{host.port}) has the host key {theirs} instead of the configured {expected}" in said
    assert "Accepted" not in (host.directory / "log").read_text()


def test_a_key_that_is_not_let_in_and_a_host_that_is_not_there_are_said(host: BuildHost, box, tmp_path: Path):
    with pytest.raises(InfrastructureError, match=r"cannot log in to build host here .*Authentication failed") as error:
        box("true", host.config(tmp_path / "one", identity=str(host.directory / "other")))
    one_line(error)
    port = trees.free_port()
    with pytest.raises(InfrastructureError, match=f"cannot log in to build host here .*{port}") as error:
        box("true", host.config(tmp_path / "two", port=port))
    one_line(error)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "cannot read .*: No such file"),
        (lambda path: path.chmod(0o644), "is open to others than its owner; chmod 600 it"),
        (lambda path: path.write_text("nonsense\n"), "is no private key of the kind ed25519"),
        (
            lambda path: subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", path], check=True),
            "is no private key of the kind ed25519 without a passphrase",
        ),
    ],
)
def test_an_identity_that_cannot_be_used_is_the_configurations_fault(host: BuildHost, box, tmp_path: Path, spoil, said):
    configuration = host.config(tmp_path / "agent")
    spoil(host.directory / "identity")
    with pytest.raises(RequestError, match=rf"config\.yaml:\d+: build_hosts\.here\.identity: .*{said}") as error:
        box("true", configuration)
    line = int(one_line(error).split(":")[1])
    assert "identity: " in (configuration.directory / "config.yaml").read_text().splitlines()[line - 1]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("say(b'welcome, user\\n')\nhost()", "does not answer as `pkgci build-host`: welcome, user"),
        ("sys.exit('no such thing \\033[31m')", "does not answer as `pkgci build-host`: no such thing"),
        ("say(b'\\0\\377' * 5000); time.sleep(1000)", "does not answer as `pkgci build-host`"),
        (f"print('{COMMAND} 0.0.1 0123456789abcdef')", "has another pkgci than this machine, 'pkgci build-host 0.0.1"),
        ("greet()\nsay(b'\\377' * 100000)", "answers what `pkgci build-host` never says"),
        ("greet()\nsay(b'X' + bytes(4))", "answers what `pkgci build-host` never says"),
        (
            "greet()\nsay(b'K' + bytes([0, 0, 0, 1, 0]))",
            "answers what `pkgci build-host` never says",
        ),
        (
            "greet()\nsay(b'E' + bytes([0, 0, 0, 1]) + b'{')",
            "answers what `pkgci build-host` never says",
        ),
        (
            "greet()\nwhile True: say(b'L' + bytes([0, 1, 0, 0]) + b'x' * 65536)",
            "answers what `pkgci build-host` never says",
        ),
        ("greet()\nsys.exit('why it ended')", "is lost: why it ended"),
    ],
)
def test_a_host_that_answers_something_else_is_the_infrastructures_fault(host: BuildHost, box, program: str, said: str):
    host.answers_by(program)
    with pytest.raises(InfrastructureError) as error:
        box("true")
    assert said in one_line(error)
    assert "build host here" in one_line(error)


def test_a_server_that_is_no_sshd_is_the_infrastructures_fault(host: BuildHost, box, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(InfrastructureError, match="cannot log in to build host here") as error:
            box("true", host.config(tmp_path / "agent", port=server.getsockname()[1]))
        thread.join()
    one_line(error)


def test_a_hostile_archive_from_there_is_refused(host: BuildHost, box, tmp_path: Path):
    host.answers_by(
        "import io, tarfile\ngreet()\n"
        "stream = io.BytesIO()\ntar = tarfile.TarFile(fileobj=stream, mode='w')\n"
        "tar.addfile(tarfile.TarInfo('../escape'))\ntar.close()\n"
        "for kind, content in ((b'O', stream.getvalue()), (b'E', b'{\"status\": 0}')):\n"
        "    say(buildhost.FRAME.pack(kind, len(content)) + content)\n"
    )
    with pytest.raises(PackageError, match="no plain file; refused"):
        box("true")
    assert not (tmp_path / "escape").exists()


def test_the_key_is_good_for_nothing_else(host: BuildHost):
    client = paramiko.SSHClient()
    # the host is this test's own sshd on loopback; what is asked is what it lets this key do
    client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
    key = paramiko.Ed25519Key.from_private_key_file(str(host.directory / "identity"))
    client.connect("127.0.0.1", host.port, getpass.getuser(), pkey=key, allow_agent=False, look_for_keys=False)
    with client:
        stdin, stdout, _ = client.exec_command("id")
        stdin.close()
        assert stdout.read().decode() == f"{greeting()}\n"


def test_the_doctor_tries_the_connection(host: BuildHost, tmp_path: Path):
    findings = {finding.what: finding for finding in examine(host.config(tmp_path / "one"))}
    assert findings["build host here answers, with the same pkgci"].good
    host.answers("echo hello")
    found = {finding.what: finding for finding in examine(host.config(tmp_path / "two"))}["build host here"]
    assert not found.good
    assert "does not answer as `pkgci build-host`: hello" in found.line()


def test_a_target_that_names_an_unknown_host_is_refused(host: BuildHost, tmp_path: Path):
    configuration = host.config(tmp_path / "agent")
    path = configuration.directory / "targets" / f"{DEB}.yaml"
    path.write_text(path.read_text().replace("build_host: here", "build_host: elsewhere"))
    with pytest.raises(RequestError) as error:
        configuration.build_host(DEB)
    line = path.read_text().splitlines().index("build_host: elsewhere") + 1
    expected = (
        f"{path}:{line}: build_host: no 'elsewhere' in build_hosts of {configuration.directory}/config.yaml: here"
    )
    assert one_line(error) == expected


def test_what_the_configuration_says_of_a_host_is_checked(host: BuildHost, tmp_path: Path):
    configuration = host.config(tmp_path / "agent")
    path = configuration.directory / "config.yaml"
    document = yaml.safe_load(path.read_text())
    for key, wrong in {
        "host": "-oProxyCommand=x",
        "user": "a b",
        "port": 0,
        "host_key": "ssh-rsa AAAA",
        "identity": "relative",
        "password": "secret",
    }.items():
        changed = {**document, "build_hosts": {"here": {**document["build_hosts"]["here"], key: wrong}}}
        path.write_text(yaml.safe_dump(changed))
        with pytest.raises(RequestError, match=rf"config\.yaml:\d+: build_hosts\.here\.{key}: ") as error:
            _ = Config(configuration.directory).settings
        one_line(error)
