"""A real server of Jenkins' line on loopback: Eclipse Hudson 3.3.2, from Maven Central, behind `hudson_shim.py`.

Jenkins itself is in no registry of packages. Hudson has the same REST interface and runs the same jobs, but for elements of
their XML that it does not know: discarder, timeout, time stamps and descriptions of builds are dropped. It needs Java 8,
which is taken, with the C library that it is built for, from Debian's unstable distribution, into a directory of its own.

With JENKINS_URL, JENKINS_USER and JENKINS_TOKEN_FILE in the environment the tests use that server instead; its agents need
`pkgci`, PKGCI_ENGINE=jenkins and PKGCI_CONFIG in their environment.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import requests
from cached import cached, final, jars, unpack
from trees import free_port

from pkgci import web
from pkgci.command import run, supervised
from pkgci.config import Jenkins

VERSION = "3.3.2"
PARTS = {
    f"org.eclipse.hudson:hudson-war:{VERSION}:war": "29db3f39025edbd547f445a9d46b9a9eff9ddf1411cde2adc8b52b3503f9536c",
    "org.hudsonci.plugins:maven-plugin:3.0.1:hpi": "2d246cc9e417385996dde08551348f195184b0acf4effc6fc50b65b613804763",
    "org.hudsonci.plugins:groovy-support-plugin:3.0.3:hpi": "b135e2674cfa07435a8ce24ba3a36c81a1d0617e72c405af483e9e4bb52feb82",
}
# of Debian's unstable distribution, with what it is linked against
PACKAGES = ("openjdk-8-jre-headless", "libc6")
LABELS = ("gate", "control", "build", "repository", "systest")
HERE = Path(__file__).parent
START_SECONDS = 180
CONFIGURATION = """<?xml version='1.0' encoding='UTF-8'?>
<hudson>
  <version>1.0</version>
  <numExecutors>{executors}</numExecutors>
  <mode>NORMAL</mode>
  <label>{labels}</label>
  <quietPeriod>0</quietPeriod>
  <scriptSupport class="org.hudsonci.plugins.groovy.GroovyScriptSupport"/>
</hudson>
"""
# the address by which it names itself
ADDRESS = """<?xml version='1.0' encoding='UTF-8'?>
<hudson.tasks.Mailer_-DescriptorImpl><hudsonUrl>{url}</hudsonUrl></hudson.tasks.Mailer_-DescriptorImpl>
"""


class Hudson:
    """A server with files of its own below `directory`: `home/`, `log`, `shim.log`.

    Usage: `with Hudson(directory, environment) as hudson`, or `start` and `stop`. It ends with the process that starts it.

    Args:
        directory: for its files; kept, it may be started again there.
        environment: variables of its builds, besides those of this process.
        executors: how many builds it runs at once, of all labels.
        labels: what it takes builds of by itself; agents may have others.
    """

    def __init__(
        self,
        directory: Path,
        environment: Mapping[str, str] | None = None,
        executors: int = 12,
        labels: tuple[str, ...] = LABELS,
    ) -> None:
        self.directory, self.home = directory, directory / "home"
        self.environment = dict(environment or {})
        self.port, self.shim_port = free_port(), free_port()
        self.process: subprocess.Popen | None = None
        self.shim: subprocess.Popen | None = None
        if not self.home.exists():
            directory.mkdir(exist_ok=True)
            self._make(executors, labels)

    @property
    def url(self) -> str:
        """Where it is, as Jenkins would answer."""
        return f"http://127.0.0.1:{self.shim_port}/"

    def settings(self) -> dict[str, object]:
        """Return `jenkins` of a configuration's `config.yaml` that leads here; it lets everybody in."""
        token = self.directory / "token"
        token.write_text("none\n")
        return {"url": self.url, "user": "pkgci", "token_file": str(token), "patience_seconds": 120}

    def start(self) -> None:
        """Start it, and wait until it answers; again after `stop` or `kill`, at the same address."""
        java = _java() / "bin/java"
        options = ["-Xmx512m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Djava.awt.headless=true"]
        # what `allowEmptyArchive` says in a job's XML, for all jobs
        options += ["-Dhudson.tasks.ArtifactArchiver.warnOnEmpty=true"]
        options += [f"-Duser.home={self.directory}", f"-DHUDSON_HOME={self.home}", "-jar", _parts("hudson-war", "war")]
        ports = [f"--httpPort={self.port}", "--httpListenAddress=127.0.0.1", "--skipInitSetup"]
        # what a builds's environment has of an engine that runs these tests is not for its builds
        mine = {
            name: value for name, value in os.environ.items() if not name.startswith(("PKGCI_", "JENKINS_", "ZUUL_"))
        }
        path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                supervised([java, *options, *ports]),
                env={**mine, **path, **self.environment, "HUDSON_HOME": str(self.home)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for who started it, who has its builds to end before
                start_new_session=True,
            )
        if self.shim is None:
            shim = [sys.executable, HERE / "hudson_shim.py", str(self.shim_port), str(self.port)]
            with (self.directory / "shim.log").open("ab") as log:
                self.shim = subprocess.Popen(
                    supervised(shim), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        deadline = time.monotonic() + START_SECONDS
        with web.session(self.url, upstream=False) as session:
            while True:
                with suppress(requests.RequestException):
                    answer = session.get(f"{self.url}api/json", timeout=10)
                    # while it starts, a page for persons has the same status
                    if answer.ok and "nodeDescription" in answer.text:
                        break
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    raise AssertionError(f"Hudson does not start: {(self.directory / 'log').read_text()[-4000:]}")
                time.sleep(0.1)
        # a port on all interfaces, for agents that nobody has
        self.groovy("hudson.model.Hudson.instance.tcpSlaveAgentListener?.shutdown()")

    def stop(self) -> None:
        """End it as an operator does; its address stays, and says that it is away."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def kill(self) -> None:
        """End it as a crash does."""
        if self.process is not None:
            self.process.kill()
        self.stop()

    def __enter__(self) -> "Hudson":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self.shim is not None:
            self.shim.kill()
            self.shim.wait()
            self.shim = None

    def groovy(self, script: str) -> str:
        """Let the server run a script, as an administrator does, and return what it says."""
        with web.session(self.url, upstream=False) as session:
            answer = session.post(f"{self.url}scriptText", data={"script": script}, timeout=60)
        assert answer.ok, answer.text[:2000]
        return answer.text

    def let_in(self, accounts: Mapping[str, tuple[str, ...]]) -> None:
        """Let nobody in but these accounts, with the password `secret`, and give each its permissions (`Item.Read`) only."""
        given = [
            f"realm.createAccount('{user}', 'secret')\n"
            + "".join(f"strategy.add(Permission.fromId('hudson.model.{one}'), '{user}')\n" for one in permissions)
            for user, permissions in accounts.items()
        ]
        self.groovy(
            "import hudson.security.*; import org.eclipse.hudson.security.*\n"
            "def realm = new HudsonPrivateSecurityRealm(false)\n"
            "def strategy = new GlobalMatrixAuthorizationStrategy()\n"
            f"{''.join(given)}"
            "def manager = HudsonSecurityEntitiesHolder.getHudsonSecurityManager()\n"
            "manager.setSecurityRealm(realm); manager.setAuthorizationStrategy(strategy)\n"
        )

    def agent(self) -> str:
        """Return the command that is an agent, for who is connected by its standard input and output."""
        jar = self.directory / "agent.jar"
        if not jar.exists():
            with web.session(self.url, upstream=False) as session:
                jar.write_bytes(session.get(f"{self.url}jnlpJars/slave.jar", timeout=60).content)
        path = f"PATH={Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
        return f"env {path} {_java() / 'bin/java'} -Xmx128m -jar {jar}"

    def add_agent(self, name: str, label: str, command: str) -> None:
        """Add an agent that the server reaches by a command."""
        home = self.directory / name
        home.mkdir()
        self.groovy(
            "import hudson.model.*; import hudson.slaves.*;"
            f"Hudson.instance.addNode(new DumbSlave('{name}', '', '{home}', '2', Node.Mode.EXCLUSIVE, '{label}',"
            f" new CommandLauncher('{command}'), new RetentionStrategy.Always(), []))"
        )

    def obey_nodes(self) -> None:
        """Let a build that has the parameter NODE run on the node of that name or label only, as nodelabelparameter does."""
        self.groovy(
            "import hudson.model.*; import hudson.model.queue.*\n"
            "class ByNode extends QueueTaskDispatcher {\n"
            "  CauseOfBlockage canTake(Node node, Queue.BuildableItem item) {\n"
            "    def wanted = item.getAction(ParametersAction)?.getParameter('NODE')?.value\n"
            "    if (!wanted || node.nodeName == wanted || node.labelString.split().contains(wanted)) return null\n"
            "    return new CauseOfBlockage() { String getShortDescription() { 'another node is wanted' } }\n"
            "  }\n"
            "  CauseOfBlockage canTake(Node node, Queue.Task task) { return null }\n"
            "}\n"
            "QueueTaskDispatcher.all().add(new ByNode())\n"
        )

    def _make(self, executors: int, labels: tuple[str, ...]) -> None:
        plugins = self.home / "plugins"
        plugins.mkdir(parents=True)
        for name in ("maven-plugin", "groovy-support-plugin"):
            shutil.copy(_parts(name, "hpi"), plugins / f"{name.removesuffix('-plugin')}.hpi")
        text = CONFIGURATION.format(executors=executors, labels=" ".join(labels))
        (self.home / "config.xml").write_text(text)
        (self.home / "hudson.tasks.Mailer.xml").write_text(ADDRESS.format(url=self.url))


def load(server: Jenkins, jobs: Path, directory: Path) -> None:
    """Load job definitions by the command that an operator uses, `jenkins-jobs update`; its files are in `directory`."""
    settings = directory / "jjb.ini"
    password = Path(server.token_file).read_text().strip()
    settings.write_text(
        f"[job_builder]\n[jenkins]\nurl={server.url}\nuser={server.user}\npassword={password}\nquery_plugins_info=False\n"
    )
    command = [sys.executable, "-m", "jenkins_jobs", "--conf", settings, "update", "--recursive", jobs]
    environment = {**os.environ, "XDG_CACHE_HOME": str(directory)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]


def _parts(name: str, kind: str) -> Path:
    (found,) = jars(f"hudson-{VERSION}", PARTS).glob(f"{name}-*.{kind}")
    return found


def _java() -> Path:
    """Return the home of a Java 8 that runs on this machine, of which nothing is changed."""
    recipe = (PACKAGES, (HERE / "hudson_server.py").read_text().partition("def _make_java")[2])
    return cached("java-8", recipe, _make_java) / "java/usr/lib/jvm/java-8-openjdk-amd64/jre"


def _make_java(directory: Path) -> None:
    unpack("sid", {PACKAGES[0]: directory / "java", PACKAGES[1]: directory / "libc"})
    home = directory / "java/usr/lib/jvm/java-8-openjdk-amd64/jre"
    # paths are absolute: those of the final place
    libraries = final(directory) / "libc/usr/lib/x86_64-linux-gnu"
    linked = ["--set-interpreter", libraries / "ld-linux-x86-64.so.2", "--force-rpath"]
    search = f"$ORIGIN/../lib/amd64/jli:{libraries}"
    run(["patchelf", *linked, "--set-rpath", search, home / "bin/java"])
    for link in home.rglob("*"):
        # its settings, which the package has in /etc
        if link.is_symlink() and (target := os.readlink(link)).startswith("/etc/"):
            link.unlink()
            shutil.copy(directory / "java" / target[1:], link) if (directory / "java" / target[1:]).exists() else None
