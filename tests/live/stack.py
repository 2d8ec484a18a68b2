"""All servers together on loopback: Gerrit, Zuul, the engine's host (sshd), a web server for builds, and tiny packages.

A review that is pushed to this Gerrit gets its vote as it would in production.
"""

import contextlib
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
from servers import Sshd, nginx
from zuul_server import Zuul, config_project

from pkgci.artifacts import ARTIFACTS, Result
from pkgci.config import ROOT
from pkgci.engines.base import BuildRef
from pkgci.engines.local import INHERITED, LocalEngine
from pkgci.server import serve

PROJECT = "ci/pkgci"
DEB = "bookworm-amd64"
RELEASE = """branches: [main, stable/.*]
targets: [bookworm-amd64, debianrpm-amd64]
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
        port = trees.free_port()
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
            builds=f"http://127.0.0.1:{port}/",
            released={"gnupg_home": home, "key": key},
        )
        (self.config.directory / "releases" / "default.yaml").write_text(RELEASE)
        self.engine = LocalEngine(self.config)
        for name, files in self.projects.items():
            tree = self.tree(name)
            trees.commit(tree, files)
            self.gerrit.create_project(f"packages/{name}", tree)
        ours = config_project(self.directory / "ours")
        trees.commit(ours, {"zuul/zuul.d/variants.yaml": VARIANTS})
        self.gerrit.create_project(PROJECT, ours)
        jobs = self.config.state / "jobs"
        jobs.mkdir(parents=True)
        server = (
            f"server {{ listen 127.0.0.1:{port}; root {jobs}; autoindex on; default_type text/plain; charset utf-8; }}"
        )
        stack.enter_context(nginx(self.directory / "nginx", port, server))
        host = self.directory / "host"
        host.mkdir()
        self.sshd = Sshd(host, str(self._forced_command(host)))
        stack.callback(self.sshd.end)
        engine = {key: value for key, value in self.sshd.account().items() if key != "identity"}
        self.zuul = Zuul(
            self.directory / "zuul",
            ROOT / "zuul" / "tenants",
            self.gerrit,
            host / "identity",
            {"pkgci_engine": engine},
            {"PKGCI_CONFIG": str(self.config.directory)},
        )
        stack.enter_context(self.zuul)

    def _forced_command(self, host: Path) -> Path:
        """Write what the executor's key may run; return it. A session of sshd has nothing of this process' environment."""
        kept = {name: value for name, value in os.environ.items() if INHERITED.fullmatch(name)}
        environment = {**kept, "PKGCI_CONFIG": str(self.config.directory)}
        words = [f"{name}={value}" for name, value in environment.items()]
        pkgci = Path(sys.executable).parent / "pkgci"
        path = host / "command"
        path.write_text(f"#!/bin/sh\nexec env -i {shlex.join([*words, str(pkgci), 'zuul'])}\n")
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

    def merged(self, *numbers: int, seconds: float = 600) -> None:
        """Wait until changes are merged."""
        self.wait(lambda: all(map(self.gerrit.merged, numbers)), f"{numbers} are merged", seconds)

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 300):
        """Wait for a condition; return what it returned."""
        return self.zuul.wait(condition, what, seconds)

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
        """Return where a build has archived one of its artifacts."""
        return self.engine.directory(ref) / "archive" / ARTIFACTS / name

    def published(self, name: str) -> Result:
        """Wait until the tip of a project's branch has been published; return how that ended."""
        project = f"packages/{name}"
        commit = self.gerrit.tip(project)
        job = f"build-{DEB}"
        (build,) = self.wait(lambda: self.of_merge(job, commit), f"a build of {project} after its merge")
        self.wait(lambda: self.engine.wait(build, 1), f"{build} ends")
        return Result.read(self.archived(build, "result.json"))


HOW = """
Gerrit  {gerrit}   (REST, git and ssh, no pages; user admin, password secret)
Zuul    {zuul}
builds  {builds}

Push a review:
    git clone {clone}packages/{name} && cd {name}
    (cd .git/hooks && curl -fsSO {gerrit}tools/hooks/commit-msg && chmod +x commit-msg)
    echo hello >README && git add README && git commit -m 'Say hello'
    git push origin HEAD:refs/for/main
What came of it, where 3 is the change's number:
    curl -s {gerrit}changes/3/messages
Approve it, which gates, merges and publishes it:
    curl -s -u admin:secret -H 'Content-Type: application/json' {gerrit}a/changes/3/revisions/current/review \\
        -d '{{"labels": {{"Code-Review": 2, "Workflow": 1}}}}'
What is released: {released}

Ctrl-C ends all of it.
"""


def main() -> None:
    """Start it for a person, with two packages, until Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="pkgci-live-") as directory:
        print("starting Gerrit and Zuul; the first time this takes some minutes", flush=True)
        with (
            Stack(Path(directory), {name: trees.deb(name) for name in ("hello", "world")}) as stack,
            serve(stack.config),
        ):
            print(
                HOW.format(
                    gerrit=stack.gerrit.url,
                    zuul=stack.zuul.url,
                    builds=stack.config.settings.builds,
                    clone=stack.gerrit.git_url(),
                    name="hello",
                    released=f"{stack.config.settings.url}default/bookworm/",
                ),
                flush=True,
            )
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()


if __name__ == "__main__":
    main()
