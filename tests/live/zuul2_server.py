"""A real Zuul 2.6.0 on loopback: `zuul-server` with its Gearman server, and a merger; and its validator of layouts.

It is a program of Python 2.7, which Debian had last in bullseye: from there the interpreter is unpacked into the cache, from
the mirror that this machine's apt uses, and pip puts `zuul2-requirements.txt` beside it. Two of them are newer than Zuul's own
metadata allows: GitPython and paramiko, or they would fail against today's git and ssh.
"""

import inspect
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import gear
import trees
import yaml
from cached import PIP, cached, digest, unpack
from gerrit_server import Gerrit

from pkgci.command import run, supervised
from pkgci.config import ROOT

HERE = Path(__file__).parent
VERSION = "2.6.0"
REQUIREMENTS = HERE / "zuul2-requirements.txt"
SUITE = "bullseye"
PYTHON = "python2.7/usr/bin/python2.7"
PACKAGES = ("libffi7", "libpython2.7-minimal", "libpython2.7-stdlib", "libssl1.1", "python2.7-minimal")
# the last one that makes environments of Python 2.7; it has pip for them
VIRTUALENV = ("virtualenv==20.21.1", "distlib==0.3.6", "filelock==3.12.0", "platformdirs==3.5.1")
# Zuul's own Gearman server cannot have another
GEARMAN_PORT = 4730
CONFIGURATION = """
[gearman]
server = {address}
port = {gearman}
check_job_registration = false

[gearman_server]
start = true
listen_address = {address}

[webapp]
listen_address = {address}
port = {web}

[zuul]
layout_config = {layout}
state_dir = {directory}/state
pidfile = {directory}/state/zuul.pid
status_url = http://{address}:{web}/status
job_name_in_report = true

[merger]
git_dir = {directory}/state/git
zuul_url = file://{directory}/state/git
git_user_email = zuul@example.org
git_user_name = Zuul
pidfile = {directory}/state/merger.pid

[connection gerrit]
driver = gerrit
server = 127.0.0.1
port = {ssh}
user = zuul
sshkey = {identity}
baseurl = {gerrit}
"""
START_SECONDS = 120


def installed() -> Path:
    """Return the cached directory with Zuul: its interpreter `python2.7/`, `libraries/`, and `zuul/` with what pip made."""
    parts = (digest(REQUIREMENTS), PACKAGES, VIRTUALENV, inspect.getsource(_install))
    return cached(f"zuul-{VERSION}", parts, _install)


def environment(place: Path) -> dict[str, str]:
    """Return the variables that Zuul's programs of `place`, as of `installed`, run with."""
    # not by the programs in `zuul/bin`, which name the directory where they were made
    own = {"LD_LIBRARY_PATH": str(place / "libraries"), "PYTHONUSERBASE": str(place / "zuul")}
    # it would write its own beside the files of this repository
    return {**os.environ, **own, "PYTHONDONTWRITEBYTECODE": "1"}


def validate(layout: Path, jobs: Iterable[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """Let Zuul check a layout against the names of the jobs that there are; its status is 0 when it accepts it."""
    place = installed()
    (directory / "jobs").write_text("".join(f"{name}\n" for name in jobs))
    values = dict.fromkeys(("ssh", "web"), 1) | {"gearman": GEARMAN_PORT, "identity": "", "gerrit": "http://127.0.0.1/"}
    (directory / "zuul.conf").write_text(
        CONFIGURATION.format(directory=directory, layout=layout, address="127.0.0.1", **values)
    )
    words = [
        place / PYTHON,
        "-m",
        "zuul.cmd.server",
        "-t",
        directory / "jobs",
        "-c",
        directory / "zuul.conf",
        "-l",
        layout,
    ]
    return subprocess.run(
        supervised(words), env=environment(place), cwd=directory, capture_output=True, text=True, check=False
    )


class Zuul2:
    """A scheduler and a merger that listen to a Gerrit, with files in `directory`, `server.log` and `merger.log` among them.

    Args:
        directory: new ones' place.
        gerrit: runs already, and has the projects.
        projects: by name, the templates of our layout that each uses; they replace the layout's own.
        periodic: when the pipeline of this name starts, as in cron; by default as our layout says.
    """

    def __init__(
        self, directory: Path, gerrit: Gerrit, projects: Mapping[str, Iterable[str]], periodic: str = ""
    ) -> None:
        self.directory, self.gerrit = directory, gerrit
        self.address = _free_address()
        self.place = installed()
        self.processes: list[subprocess.Popen] = []
        (directory / "state").mkdir(parents=True)
        layout = yaml.safe_load((ROOT / "zuul/layout.yaml").read_text())
        layout["projects"] = [
            {"name": name, "merge-mode": "merge", "template": [{"name": one} for one in templates]}
            for name, templates in projects.items()
        ]
        if periodic:
            (pipeline,) = [one for one in layout["pipelines"] if one["name"] == "periodic"]
            pipeline["trigger"]["timer"] = [{"time": periodic}]
        self.layout = directory / "layout.yaml"
        self.layout.write_text(yaml.safe_dump(layout))
        (directory / "functions.py").write_bytes((ROOT / "zuul/functions.py").read_bytes())

    @property
    def git_url(self) -> str:
        """Where its merger offers what it has merged; the project's name comes after it."""
        return f"file://{self.directory}/state/git/"

    def start(self) -> None:
        """Start both, and wait until they are connected to each other and to Gerrit."""
        home, tools = self.directory / "home", self.directory / "bin"
        for directory in (home / ".ssh", tools):
            directory.mkdir(parents=True, exist_ok=True)
        # the scheduler looks there; ssh, which the merger runs, looks in the user's real home
        (home / ".ssh/known_hosts").write_bytes(self.gerrit.known_hosts.read_bytes())
        (tools / "ssh").write_text(
            f'#!/bin/sh\nexec /usr/bin/ssh -F none -o BatchMode=yes -o UserKnownHostsFile={home}/.ssh/known_hosts "$@"\n'
        )
        (tools / "ssh").chmod(0o755)
        (self.directory / "zuul.conf").write_text(
            CONFIGURATION.format(
                directory=self.directory,
                layout=self.layout,
                address=self.address,
                gearman=GEARMAN_PORT,
                web=trees.free_port(),
                ssh=self.gerrit.ssh_port,
                identity=self.gerrit.identity(),
                gerrit=self.gerrit.url.rstrip("/"),
            )
        )
        variables = {**environment(self.place), "HOME": str(home), "PATH": f"{tools}:{os.environ['PATH']}"}
        variables["PYTHONUNBUFFERED"] = "1"
        for name in ("server", "merger"):
            arguments = [self.place / PYTHON, ROOT / "zuul/zuul2.py", name, "-d", "-c", self.directory / "zuul.conf"]
            with (self.directory / f"{name}.log").open("ab") as log:
                self.processes.append(
                    subprocess.Popen(
                        supervised(arguments), env=variables, cwd=self.directory, stdout=log, stderr=subprocess.STDOUT
                    )
                )
        self.until(lambda: "Authentication (publickey) successful" in self.log("server"))
        # the last of what it starts
        self.until(lambda: "Starting RPC" in self.log("server"))
        self.until(lambda: "merger:merge" in self.functions())

    def stop(self) -> None:
        """End both."""
        while self.processes:
            process = self.processes.pop()
            process.terminate()
            process.wait()

    def __enter__(self) -> "Zuul2":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def log(self, name: str) -> str:
        """Return what `server` or `merger` has said."""
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def functions(self) -> set[str]:
        """Return what workers are registered for at its Gearman server; nothing while that does not answer."""
        with suppress(OSError), socket.create_connection((self.address, GEARMAN_PORT), timeout=5) as connection:
            connection.sendall(gear.StatusAdminRequest().getCommand() + b"\n")
            said = b""
            while not said.endswith(b".\n") and (more := connection.recv(1 << 16)):
                said += more
            return {line.split()[0].decode() for line in said.splitlines()[:-1]}
        return set()

    def until(self, condition: Callable[[], object], seconds: float = START_SECONDS) -> None:
        """Wait until a condition holds, while both run."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [process.args for process in self.processes if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "".join(f"\n== {name}.log\n{self.log(name)[-6000:]}" for name in ("server", "merger"))
                raise AssertionError(f"{f'{ended} ended' if ended else 'the condition did not come to hold'}{logs}")
            time.sleep(0.2)


def _free_address() -> str:
    """Return an address of loopback where nobody has the Gearman port."""
    while True:
        address = f"127.{random.randrange(1, 255)}.{random.randrange(256)}.{random.randrange(1, 255)}"
        with suppress(OSError), socket.create_server((address, GEARMAN_PORT)):
            return address


def _install(place: Path) -> None:
    unpack(SUITE, dict.fromkeys(PACKAGES, place / "python2.7"))
    (place / "libraries").mkdir()
    for library in (place / "python2.7/usr/lib/x86_64-linux-gnu").glob("lib*.so.*"):
        library.rename(place / "libraries" / library.name)
    maker, pip = place / "virtualenv", [*PIP, "--no-deps"]
    run([sys.executable, "-m", "venv", maker])
    run([maker / "bin/python", *pip, *VIRTUALENV])
    python2 = {**environment(place), "PIP_FIND_LINKS": None}
    make = [maker / "bin/virtualenv", "-q", "--no-download", "--no-periodic-update"]
    run([*make, "--python", place / PYTHON, place / "zuul"], env=python2)
    run([place / "zuul/bin/python", *pip, "-r", REQUIREMENTS], env=python2)
