"""A real Zuul 14 on loopback: ZooKeeper (which speaks TLS only), scheduler, executor, web server, or a merger alone.

Zuul and the Ansible that its executor runs are made once a user, each from exact versions. All processes end with the one that
starts them.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import requests
import trees
from cached import cached, java_home, venv
from gerrit_server import PASSWORDS, Gerrit
from servers import wait_for

from pkgci import web
from pkgci.command import run, supervised
from pkgci.engines.processes import COOKIE, kill_all

HERE = Path(__file__).parent
VERSION, ANSIBLE = "14.3.0", "11"
# with the jar of ZooKeeper names all else; these it does not
JARS = ("zookeeper", "slf4j-simple", "netty-codec")
START_SECONDS = 240
PARTS = ("scheduler", "executor", "web")

ZOOKEEPER = """tickTime=2000
dataDir={directory}/zookeeper
secureClientPort={port}
secureClientPortAddress=127.0.0.1
serverCnxnFactory=org.apache.zookeeper.server.NettyServerCnxnFactory
ssl.keyStore.location={certificates}/server.pem
ssl.trustStore.location={certificates}/ca.pem
admin.enableServer=false
"""
CONFIGURATION = """[zookeeper]
hosts=127.0.0.1:{zookeeper}
tls_cert={certificates}/client.crt
tls_key={certificates}/client.key
tls_ca={certificates}/ca.pem
session_timeout=20

[keystore]
password=not-a-secret

[database]
dburi=sqlite:///{directory}/zuul.db

[scheduler]
{tenants}
state_dir={directory}/state
command_socket={directory}/scheduler.sock

[merger]
git_dir={directory}/merger-git
git_user_name=Zuul
git_user_email=zuul@example.org
command_socket={directory}/merger.sock

[executor]
hostname=localhost
state_dir={directory}/state
git_dir={directory}/executor-git
job_dir={builds}
ansible_root={ansible}
manage_ansible=false
private_key_file={key}
variables={directory}/variables.yaml
finger_port={finger}
command_socket={directory}/executor.sock
{python}
# a busy machine refuses no job
load_multiplier=50
min_avail_hdd=0.1
disk_limit_per_job=-1

[web]
listen_address=127.0.0.1
port={web}
root=http://127.0.0.1:{web}/
command_socket={directory}/web.sock

[auth operator]
driver=HS256
allow_authz_override=true
realm=zuul.test
client_id=zuul.test
issuer_id=operator
secret=not-a-secret-of-more-than-thirty-two-bytes

[connection trees]
driver=git
baseurl=file://{directory}/trees
canonical_hostname=trees.test

[connection gerrit]
driver=gerrit
server=127.0.0.1
canonical_hostname=gerrit.test
port={gerrit_ssh}
baseurl={gerrit_url}
user=zuul
sshkey={gerrit_key}
password={gerrit_password}
auth_type=basic
"""


def zuul() -> Path:
    """Return where Zuul is installed."""
    return venv(f"zuul-{VERSION}", HERE / "zuul-constraints.txt", [f"zuul=={VERSION}"])


def ansible() -> Path:
    """Return the directory that Zuul looks for Ansible in: no more than its own modules need."""
    wanted = ["ansible-core", "jmespath", "netaddr", "voluptuous", "google-re2"]
    made = venv(f"zuul-ansible-{ANSIBLE}", HERE / "ansible-constraints.txt", wanted, ANSIBLE)
    # each version that it knows is looked for
    with suppress(FileExistsError):
        (made / "9").symlink_to(ANSIBLE)
    return made


def certificates() -> Path:
    """Return a directory with an authority of our own, and keys that it has certified, for ten years."""
    return cached("zuul-certificates", CERTIFY, lambda place: run(["sh", "-euc", CERTIFY], cwd=place))


CERTIFY = """
openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj /CN=tests -keyout ca.key -out ca.pem
printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\n' >names
for name in server client; do
    openssl req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout $name.key -out $name.csr
    openssl x509 -req -in $name.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 3650 -extfile names -out $name.crt
done
cat server.key server.crt >server.pem
"""


class Zuul:
    """A Zuul with its files below `directory`; `log` of each part is there by its name.

    Args:
        directory: takes all of its files.
        tenants: the tenants' configuration: a YAML file, or a program that prints it.
        gerrit: a server; without one the connection `gerrit` leads nowhere, and `trees` has the git repositories below
            `directory`/trees.
        key: the executor's private key for ssh.
        variables: those of the site, which every playbook has.
        environment: more variables of the environment of the processes.
    """

    def __init__(
        self,
        directory: Path,
        tenants: Path,
        gerrit: Gerrit | None = None,
        key: Path = Path("/nonexistent"),
        variables: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.directory, self.gerrit = directory, gerrit
        for name in ("zookeeper", "state", "trees"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        # each build has a socket below it, and the path of one is limited to 107 characters
        self._builds = tempfile.TemporaryDirectory(prefix="zuul-")
        self.processes: dict[str, subprocess.Popen] = {}
        self.zookeeper_port, self.web_port = trees.free_port(), trees.free_port()
        # the executor's ssh-agents are nobody's children
        self._cookie = uuid.uuid4().hex
        git = {COOKIE: self._cookie, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        path = f"{zuul()}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._environment = {**os.environ, **git, "PATH": path, **(environment or {})}
        kind = "tenant_config_script" if os.access(tenants, os.X_OK) else "tenant_config"
        prefix = "" if sys.base_prefix == "/usr" else f"trusted_ro_paths={sys.base_prefix}"
        (directory / "zuul.conf").write_text(
            CONFIGURATION.format(
                directory=directory,
                builds=self._builds.name,
                zookeeper=self.zookeeper_port,
                web=self.web_port,
                finger=trees.free_port(),
                certificates=certificates(),
                ansible=ansible(),
                tenants=f"{kind}={tenants}",
                key=key,
                python=prefix,
                gerrit_ssh=gerrit.ssh_port if gerrit else 1,
                gerrit_url=gerrit.url if gerrit else "http://127.0.0.1:1/",
                gerrit_key=gerrit.identity("zuul") if gerrit else key,
                gerrit_password=PASSWORDS["zuul"],
            )
        )
        # YAML has JSON in it
        (directory / "variables.yaml").write_text(json.dumps(dict(variables or {})))
        options = {"directory": directory, "port": self.zookeeper_port, "certificates": certificates()}
        (directory / "zoo.cfg").write_text(ZOOKEEPER.format(**options))

    @property
    def url(self) -> str:
        """Where its pages are, and its REST interface below `api/`."""
        return f"http://127.0.0.1:{self.web_port}/"

    def start(self) -> None:
        """Start all of it, and wait until it has read the tenants' configuration and listens to Gerrit."""
        self.start_zookeeper()
        for part in PARTS:
            self.start_part(part)
        self.wait(self._ready, "Zuul is ready")

    def start_zookeeper(self) -> None:
        """Start ZooKeeper, and wait until it listens."""
        jars = ":".join(f"/usr/share/java/{name}.jar" for name in JARS)
        java = [java_home() / "bin/java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", jars]
        server = "org.apache.zookeeper.server.ZooKeeperServerMain"
        self._start("zookeeper", [*java, server, self.directory / "zoo.cfg"])
        wait_for(self.zookeeper_port, self.directory / "zookeeper.log")

    def start_part(self, part: str) -> None:
        """Start `scheduler`, `executor`, `web` or `merger`; it is not waited for."""
        self._start(part, [zuul() / "bin" / f"zuul-{part}", "-c", self.directory / "zuul.conf", "-f", "-d"])

    def kill(self, part: str) -> None:
        """Kill a part, as a crash of its machine does."""
        process = self.processes.pop(part)
        process.kill()
        process.wait()

    def stop(self) -> None:
        """End all of it."""
        for process in self.processes.values():
            process.terminate()
        deadline = time.monotonic() + 15
        for process in self.processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()
        kill_all(self._cookie)

    def __enter__(self) -> "Zuul":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        # nothing of it is used again
        for part in list(self.processes):
            self.kill(part)
        kill_all(self._cookie)
        self._builds.cleanup()

    def validate(self) -> subprocess.CompletedProcess[str]:
        """Let Zuul read all of the configuration; return how that ended. ZooKeeper and a merger or executor must run."""
        words = [zuul() / "bin/zuul-scheduler", "-c", self.directory / "zuul.conf", "-f", "--validate-tenants"]
        return subprocess.run(
            supervised(words),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )

    def reconfigure(self) -> None:
        """Let the scheduler list the projects again."""
        run([zuul() / "bin/zuul-scheduler", "-c", self.directory / "zuul.conf", "smart-reconfigure"])

    def log(self, part: str) -> str:
        """Return what a part has said."""
        return (self.directory / f"{part}.log").read_text(errors="replace")

    def ask(self, path: str):
        """Return what the REST interface answers, from its JSON; `path` is what comes after `api/`."""
        with web.session(self.url, upstream=False) as session:
            answer = session.get(f"{self.url}api/{path}", timeout=30)
        answer.raise_for_status()
        return answer.json()

    def builds(self, tenant: str = "packages", **about: object) -> list[dict]:
        """Return the builds that have ended, newest first; `about` are the query's fields, such as `change`."""
        query = "&".join(f"{key}={value}" for key, value in about.items())
        return self.ask(f"tenant/{tenant}/builds?{query}")

    def wait(self, condition: Callable[[], object], what: str, seconds: float = START_SECONDS):
        """Wait for a condition; return what it returned. It may raise errors of requests until then."""
        deadline = time.monotonic() + seconds
        while True:
            with suppress(requests.RequestException):
                found = condition()
                if found:
                    return found
            for part, process in self.processes.items():
                assert process.poll() is None, f"zuul {part} ended: {self.log(part)[-3000:]}"
            assert time.monotonic() < deadline, f"waited in vain until {what}; see the logs in {self.directory}"
            time.sleep(0.2)

    def _ready(self) -> bool:
        found = self.ask("components")
        states = {part: [one["state"] for one in found.get(part, [])] for part in ("scheduler", "executor")}
        running = all(states[part] == ["running"] for part in states)
        listens = self.gerrit is None or self._listens(self.gerrit)
        return running and listens and bool(self.ask("tenants"))

    def _listens(self, gerrit: Gerrit) -> bool:
        log = gerrit.site / "logs" / "sshd_log"
        return log.exists() and " zuul " in log.read_text()

    def _start(self, part: str, words: list[str | Path]) -> None:
        with (self.directory / f"{part}.log").open("ab") as log:
            self.processes[part] = subprocess.Popen(
                supervised(words),
                cwd=self.directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def config_project(tree: Path) -> Path:
    """Commit this repository's `zuul/` to a git tree, which is made; return it."""
    shutil.copytree(HERE.parents[1] / "zuul", tree / "zuul")
    trees.commit(tree, {}, "The pipelines")
    return tree
