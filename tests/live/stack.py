"""All servers together on loopback: Gerrit, Zuul, the engines, a mirror, and tiny packages.

A review that is pushed to this Gerrit gets its vote as it would in production. The engine's host is reached by sshd; which
engine runs what Zuul starts from now on, the local one or the server of Jenkins' line, is chosen by `use`.
"""

import contextlib
import json
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import trees
from clients import gnupg_home
from gerrit_server import Gerrit
from hudson_server import Hudson, load
from local_jobs import end_all
from mirrors import example
from servers import Rsyncd, Sshd, nginx
from zuul_server import Zuul, config_project

from pkgci.artifacts import ARTIFACTS, Result
from pkgci.config import ROOT
from pkgci.engines.base import BuildRef, Engine
from pkgci.engines.jenkins import JenkinsEngine
from pkgci.engines.local import INHERITED, LocalEngine
from pkgci.released.repository import CURRENT
from pkgci.server import serve
from pkgci.zuul import claimed

PROJECT = "ci/pkgci"
DEB, RPM = "bookworm-amd64", "debianrpm-amd64"
RELEASE = """branches: [main, stable/.*]
targets: [bookworm-amd64, debianrpm-amd64]
mirrors: {{europe: {{url: "{url}", rsync: "{rsync}"}}}}
"""
# those of packages/quick-* take no tests before the gate: what a scenario is not about
VARIANTS = """
- project:
    name: ^packages/quick-.*
    check:
      jobs:
        - build-bookworm-amd64: &quick
            vars:
              pkgci_parameters:
                ONLY: compile,publish
        - build-debianrpm-amd64: *quick
"""


class Stack:
    """The servers, each with its files below `directory`; all end with the `with`.

    Args:
        directory: takes all files.
        projects: the files of each project, by its name below `packages/`.
        pairs: the packages that are not of one project of their own name: source and packaging.
        settings: more of `config.yaml`.
    """

    def __init__(
        self,
        directory: Path,
        projects: Mapping[str, Mapping[str, str]],
        pairs: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        self.directory, self.projects = directory, projects
        self.gerrit = Gerrit(directory / "gerrit", whole_topic=True)
        pairs = pairs or {}
        paired = {name for pair in pairs.values() for name in pair}
        self.packages = {name: {"source": f"packages/{name}"} for name in projects if name not in paired}
        for name, (source, packaging) in pairs.items():
            self.packages[name] = {"source": f"packages/{source}", "packaging": f"packages/{packaging}"}
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> "Stack":
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._ends = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        home, key = stack.enter_context(gnupg_home())
        stack.enter_context(self.gerrit)
        builds, mirror = trees.free_port(), trees.free_port()
        etc = self.directory / "etc"
        self.hudson = Hudson(self.directory / "hudson", {"PKGCI_ENGINE": "jenkins", "PKGCI_CONFIG": str(etc)})
        self.config = trees.config(
            self.directory,
            self.packages,
            gerrit=self.gerrit.url,
            review={
                "url": self.gerrit.url,
                "user": "pkgci",
                "password_file": str(self.gerrit.password_file("pkgci")),
            },
            zuul={"project": PROJECT},
            jenkins=self.hudson.settings(),
            builds=f"http://127.0.0.1:{builds}/",
            released={"gnupg_home": home, "key": key},
        )
        stack.enter_context(self.hudson)
        load(self.config.settings.jenkins, ROOT / "jobs", self.directory)
        self.mirror = self.directory / "mirror"
        rsyncd = Rsyncd(self.directory / "rsyncd", self.mirror)
        stack.callback(rsyncd.end)
        self.mirror_url = f"http://127.0.0.1:{mirror}/"
        release = RELEASE.format(url=self.mirror_url, rsync=rsyncd.url)
        (etc / "releases" / "default.yaml").write_text(release)
        for name, files in self.projects.items():
            tree = self.tree(name)
            trees.commit(tree, files)
            self.gerrit.create_project(f"packages/{name}", tree)
        ours = config_project(self.directory / "ours")
        definitions = "zuul/zuul.d/jobs.yaml"
        # what an operator changes there: `pkgci doctor` says so
        jobs = (ours / definitions).read_text().replace("branches: ^(.*)$", f"branches: {claimed(self.config)}")
        trees.commit(ours, {definitions: jobs, "zuul/zuul.d/variants.yaml": VARIANTS})
        self.gerrit.create_project(PROJECT, ours)
        kept = self.config.state / "jobs"
        kept.mkdir(parents=True)
        listen = f"listen 127.0.0.1:{builds}; root {kept};"
        served = f"server {{ {listen} autoindex on; default_type text/plain; charset utf-8; }}\n"
        served += example("nginx.conf", self.mirror).replace("listen 80;", f"listen 127.0.0.1:{mirror};")
        stack.enter_context(nginx(self.directory / "nginx", mirror, served))
        host = self.directory / "host"
        host.mkdir()
        self.command = self._forced_command(host)
        self.sshd = Sshd(host, str(self.command))
        stack.callback(self.sshd.end)
        self.engines: dict[str, Engine] = {
            "local": LocalEngine(self.config),
            "jenkins": JenkinsEngine(self.config),
        }
        self.use("local")
        for engine in self.engines.values():
            stack.callback(end_all, engine)
        account = {key: value for key, value in self.sshd.account().items() if key != "identity"}
        self.zuul = Zuul(
            self.directory / "zuul",
            ROOT / "zuul" / "tenants",
            self.gerrit,
            host / "identity",
            {"pkgci_engine": account},
            {"PKGCI_CONFIG": str(self.config.directory)},
        )
        stack.enter_context(self.zuul)

    def use(self, name: str) -> None:
        """Let an engine, `local` or `jenkins`, run what Zuul starts from now on."""
        self.engine = self.engines[name]
        (self.directory / "host" / "engine").write_text(name)

    def _forced_command(self, host: Path) -> Path:
        """Write what the executor's key may run; return it. A session of sshd has nothing of this process' environment."""
        kept = {name: value for name, value in os.environ.items() if INHERITED.fullmatch(name)}
        environment = {**kept, "PKGCI_CONFIG": str(self.config.directory)}
        words = [f"{name}={value}" for name, value in environment.items()]
        pkgci = Path(sys.executable).parent / "pkgci"
        path = host / "command"
        engine = f'PKGCI_ENGINE="$(cat {shlex.quote(str(host / "engine"))})"'
        path.write_text(f"#!/bin/sh\nexec env -i {engine} {shlex.join([*words, str(pkgci), 'zuul'])}\n")
        path.chmod(0o755)
        return path

    def tree(self, name: str) -> Path:
        """Return the work tree of a package."""
        return self.directory / "work" / name

    def push(
        self, name: str, files: Mapping[str, str], message: str = "Change", base: str = "origin", topic: str = ""
    ) -> int:
        """Push a change to a package for review; return its number.

        Args:
            name: the package.
            files: what changes.
            message: of its commit; a Change-Id is added.
            base: `origin` for the branch as it is merged, or `HEAD` for the last change of this tree.
            topic: its topic.
        """
        tree = self.tree(name)
        project = f"packages/{name}"
        if base == "origin":
            trees.git(tree, "fetch", "-q", self.gerrit.git_url() + project, "main")
            trees.git(tree, "reset", "-q", "--hard", "FETCH_HEAD")
        trees.commit(tree, files, message)
        return self.gerrit.push(tree, project, topic=topic)

    def voted(self, number: int, seconds: float = 300) -> int:
        """Wait until Zuul has voted on the current patch set of a change; return the vote."""
        return self.wait(lambda: self.gerrit.votes(number, "Verified").get("zuul"), f"{number} is voted on", seconds)

    def approve(self, number: int) -> None:
        """Approve a change, and wait until it stands in the gate's queue."""

        def gated() -> bool:
            pipelines = self.zuul.ask("tenant/packages/status")["pipelines"]
            return any(f'"{number},' in json.dumps(one) for one in pipelines if one["name"] == "gate")

        self.gerrit.approve(number)
        self.wait(gated, f"{number} is gated")

    def merged(self, *numbers: int, seconds: float = 600) -> None:
        """Wait until changes are merged."""
        self.wait(lambda: all(map(self.gerrit.merged, numbers)), f"{numbers} are merged", seconds)

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 300):
        """Wait for a condition; return what it returned."""
        return self.zuul.wait(condition, what, seconds)

    def idle(self) -> None:
        """Wait until Zuul has nothing to do."""

        def waiting() -> list:
            pipelines = self.zuul.ask("tenant/packages/status")["pipelines"]
            return [head for one in pipelines for queue in one["change_queues"] for head in queue["heads"]]

        self.wait(lambda: not waiting(), "nothing is queued")

    def said(self, number: int) -> str:
        """Return what Zuul said last on a change."""
        return self.gerrit.messages(number, "zuul")[-1]

    def of_change(self, job: str, number: int) -> list[BuildRef]:
        """Return the engine's builds of a job for a change, oldest first."""
        parameters = {ref: self.engine.record(ref).parameters for ref in self.engine.builds(job)}
        return [ref for ref, given in parameters.items() if given.get("ZUUL_CHANGE") == str(number)]

    def of_merge(self, job: str, commit: str) -> list[BuildRef]:
        """Return the engine's builds of a job for a branch that has moved to a commit, oldest first."""
        parameters = {ref: self.engine.record(ref).parameters for ref in self.engine.builds(job)}
        return [ref for ref, given in parameters.items() if given.get("ZUUL_NEWREV") == commit]

    def archived(self, ref: BuildRef, name: str) -> Path:
        """Return a copy of one of the artifacts of a build that has ended."""
        # each engine counts by itself
        place = self.directory / "archived" / type(self.engine).__name__ / str(ref)
        if not place.exists():
            place.mkdir(parents=True)
            self.engine.artifacts(ref, place)
        return place / ARTIFACTS / name

    def published(self, name: str, target: str = DEB) -> Result:
        """Wait until the tip of a project's branch has been published for a target; return how that ended."""
        project = f"packages/{name}"
        commit = self.gerrit.tip(project)
        job = f"build-{target}"
        (build,) = self.wait(lambda: self.of_merge(job, commit), f"a build of {project} after its merge")
        self.wait(lambda: self.engine.wait(build, 1), f"{build} ends")
        return Result.read(self.archived(build, "result.json"))

    def released(self, target: str = DEB) -> Path:
        """Return the directory of the released repository of a target."""
        return self.config.data / "repositories" / "default" / self.config.target(target).codename

    def mirrored(self, target: str = DEB) -> Path:
        """Wait until the mirror has what is released for a target; return its directory."""
        released = self.released(target)
        place = self.mirror / released.name

        def same() -> bool:
            return place.is_dir() and (place / CURRENT).readlink().name == (released / CURRENT).readlink().name

        self.wait(same, f"the mirror has {released.name}")
        return place


HOW = """
Gerrit   {gerrit}   (REST, git and ssh, no pages; user admin, password secret)
Zuul     {zuul}
Jenkins  {jenkins}   (Hudson, in its place)

Push a review, which Zuul tests by jobs of Jenkins:
    git clone -c user.name=Admin -c user.email=admin@example.com {clone}packages/hello && cd hello
    curl -fsSo .git/hooks/commit-msg {gerrit}tools/hooks/commit-msg && chmod +x .git/hooks/commit-msg
    echo hello >README && git add README && git commit -m 'Say hello'
    git push origin HEAD:refs/for/main
What came of it, where 1 is the change's number, which the push has said:
    curl -s {gerrit}changes/1/messages | tail -n +2 | python3 -m json.tool
Approve it, which has it gated, merged and published:
    curl -s -u admin:secret -H 'Content-Type: application/json' {gerrit}a/changes/1/revisions/current/review \\
        -d '{{"labels": {{"Code-Review": 2, "Workflow": 1}}}}'
What is released, and its mirror:
    {released}
    {mirror}
The other package is packages/world. Ctrl-C ends all of it.
"""


def main() -> None:
    """Start it for a person, with two packages, until Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), tempfile.TemporaryDirectory(prefix="pkgci-live-") as directory:
        print("starting Gerrit, Zuul and Jenkins; the first time this takes some minutes", flush=True)
        with (
            Stack(Path(directory), {name: trees.deb(name) for name in ("hello", "world")}) as stack,
            serve(stack.config),
        ):
            stack.use("jenkins")
            words = HOW.format(
                gerrit=stack.gerrit.url,
                zuul=stack.zuul.url,
                jenkins=stack.hudson.url,
                clone=stack.gerrit.git_url(),
                released=f"{stack.config.settings.url}default/bookworm/",
                mirror=f"{stack.mirror_url}bookworm/",
            )
            print(words, flush=True)
            try:
                signal.pause()
            finally:
                print("ending all of it", flush=True)


if __name__ == "__main__":
    main()
