"""A real Gerrit on loopback, from the jars in Maven Central (REST, git and ssh are complete; there are no web pages).

A site with users, labels and access rights is made once a user, and copied for each server. Users, by name and password:
`admin`, `zuul` (votes and submits) and `pkgci` (comments); a key of each for ssh is in `keys`.
"""

import hashlib
import inspect
import json
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import requests
import trees
from cached import cached, digest, jars, java_home

from pkgci import web
from pkgci.command import supervised

VERSION = "3.9.1"
GERRIT, CRYPTO = "com.google.gerrit:gerrit", "org.bouncycastle:bc"
JARS = {
    f"{GERRIT}-acceptance-framework:{VERSION}": "28d6d73a50af086b952b3b6ef9ba9ded45c7c895ce8273f8b6b6c3545f2563f2",
    f"{GERRIT}-plugin-api:{VERSION}": "61b4f368fb2a33494a6afb949d427a1f3e81c2de84cce00ae67aa16ba7d6c7e5",
    f"{CRYPTO}pg-jdk18on:1.72": "dd3d45a4063103acac7403e447e36b2d21e4e31e326cc54314ca7bc128861514",
    f"{CRYPTO}pkix-jdk18on:1.72": "56a054cb170d41fb1f8ba0b29568806258b7ffefdc5e98b77ef96d4740f3d6bc",
    f"{CRYPTO}prov-jdk18on:1.72": "39287f2208a753db419f5ca529d6c80f094614aa74d790331126b3c9c6b85fda",
    f"{CRYPTO}util-jdk18on:1.72": "45377fdb6560a971eea725f507d91fd6b8fbd0797d61bfc86f2cb653c58186a4",
}
HERE = Path(__file__).parent
JAVA_OPTIONS = (
    "-Xmx512m",
    "-XX:TieredStopAtLevel=1",
    "-XX:+UseSerialGC",
    "-Dflogger.backend_factory=com.google.common.flogger.backend.log4j.Log4jBackendFactory#getInstance",
    "-Dflogger.logging_context=com.google.gerrit.server.logging.LoggingContext#getInstance",
)
# what `init --dev` gives the administrator
PASSWORDS = {"admin": "secret", "zuul": "zuulpass", "pkgci": "pkgcipass"}
SETTINGS = {
    "gerrit.basePath": "git",
    "auth.type": "DEVELOPMENT_BECOME_ANY_ACCOUNT",
    "auth.gitBasicAuthPolicy": "HTTP",
    "sshd.threads": "4",
    "sendemail.enable": "false",
    "cache.directory": "cache",
}
VERIFIED = {
    "values": {" 0": "No score", "-1": "Fails", "-2": "Gate fails", "+1": "Passes", "+2": "Gate passes"},
    "default_value": 0,
    # MaxWithBlock is refused here: a submit requirement says it
    "function": "NoBlock",
    "copy_condition": "changekind:NO_CODE_CHANGE",
}
WORKFLOW = {"values": {" 0": "Ready", "-1": "WIP", "+1": "Approved"}, "default_value": 0, "function": "NoBlock"}
START_SECONDS = 300


class Gerrit:
    """A server with a site of its own below `directory`: `site/`, `keys/`, `home/`, `log`.

    Usage: `with Gerrit(directory) as gerrit`, or `start` and `stop`. The server ends with the process that starts it. With
    `whole_topic` what has one topic is submitted together.
    """

    def __init__(self, directory: Path, whole_topic: bool = False) -> None:
        self.directory, self.site, self.log = directory, directory / "site", directory / "log"
        if not self.site.exists():
            shutil.copytree(_made(), directory, dirs_exist_ok=True)
        self.http_port, self.ssh_port = trees.free_port(), trees.free_port()
        self.process: subprocess.Popen | None = None
        _configure(self.site, self.http_port, self.ssh_port)
        _set(self.site, "change.submitWholeTopic", str(whole_topic).lower())

    @property
    def url(self) -> str:
        """Where its REST interface is, with `a/` below it for who has a password, and its projects' repositories."""
        return f"http://127.0.0.1:{self.http_port}/"

    def git_url(self, user: str = "admin") -> str:
        """Return below which its repositories are, over HTTP, with a password in it."""
        return f"http://{user}:{PASSWORDS[user]}@127.0.0.1:{self.http_port}/a/"

    def ssh_url(self, user: str = "zuul") -> str:
        """Return below which its repositories are, over ssh: with `identity` and the host's key in `known_hosts`."""
        return f"ssh://{user}@127.0.0.1:{self.ssh_port}/"

    def identity(self, user: str = "zuul") -> Path:
        """Return the private key of a user, for ssh."""
        return self.directory / "keys" / user

    @property
    def host_key(self) -> str:
        """The public key of its ssh server: type and key."""
        return " ".join((self.site / "etc" / "ssh_host_ed25519_key.pub").read_text().split()[:2])

    @property
    def known_hosts(self) -> Path:
        """A file of ssh with the server's key."""
        path = self.directory / "known_hosts"
        path.write_text(f"[127.0.0.1]:{self.ssh_port} {self.host_key}\n")
        return path

    def password_file(self, user: str = "pkgci") -> Path:
        """Return a file with a user's password."""
        path = self.directory / f"{user}.password"
        path.write_text(f"{PASSWORDS[user]}\n")
        path.chmod(0o600)
        return path

    def start(self) -> None:
        """Start it, and wait until it answers by HTTP and ssh; again after `stop`, at the same addresses."""
        self.process = _daemon(self.directory, _libraries(), self.url)

    def stop(self) -> None:
        """End it as an operator does: what was not yet written to its index is."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def restart(self) -> None:
        """End it and start it again."""
        self.stop()
        self.start()

    def __enter__(self) -> "Gerrit":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.kill()
        self.stop()

    def ask(self, verb: str, path: str, words: object = None, user: str = "admin"):
        """Return what the REST interface answers to a user, from its JSON; `path` is what comes after `a/`."""
        return _ask(self.url, verb, path, words, user)

    # projects

    def create_project(
        self, name: str, tree: Path | None = None, submit_type: str = "MERGE_IF_NECESSARY", branch: str = "main"
    ) -> None:
        """Create a project whose branch is the HEAD of a tree, or an empty commit.

        Args:
            name: of the project.
            tree: a git tree.
            submit_type: as in `set_submit_type`.
            branch: its only one.
        """
        words = {"branches": [branch], "create_empty_commit": tree is None, "submit_type": submit_type}
        self.ask("put", f"projects/{quote(name, safe='')}", words)
        if tree is not None:
            self.push_directly(tree, name, branch)

    def push_directly(self, tree: Path, project: str, branch: str = "main") -> None:
        """Push the HEAD of a tree to a branch, without a review."""
        trees.git(tree, "push", "-q", self.git_url() + project, f"HEAD:refs/heads/{branch}")

    def set_submit_type(self, project: str, kind: str) -> None:
        """Set how changes are submitted.

        Args:
            project: its name.
            kind: FAST_FORWARD_ONLY, MERGE_IF_NECESSARY, MERGE_ALWAYS, CHERRY_PICK, REBASE_IF_NECESSARY or
                REBASE_ALWAYS.
        """
        self.ask("put", f"projects/{quote(project, safe='')}/config", {"submit_type": kind})

    def tip(self, project: str, branch: str = "main") -> str:
        """Return the commit that a branch is at."""
        return self.ask("get", f"projects/{quote(project, safe='')}/branches/{quote(branch, safe='')}")["revision"]

    # changes

    def push(self, tree: Path, project: str, branch: str = "main", topic: str = "", user: str = "admin") -> int:
        """Push the HEAD of a tree for review and return the change's number; what comes before it must be pushed already.

        HEAD gets a Change-Id when it has none; with the one of a change it is a new patch set: `trees.git(tree, "commit",
        "--amend", "--no-edit", ...)`, or `amend`, keeps it.
        """
        message = trees.git(tree, "log", "-1", "--format=%B")
        if "\nChange-Id: I" not in message:
            unique = hashlib.sha1(f"{project} {trees.git(tree, 'rev-parse', 'HEAD')} {time.time_ns()}".encode())
            trees.git(tree, "commit", "-q", "--amend", "-m", f"{message.strip()}\n\nChange-Id: I{unique.hexdigest()}")
        target = f"HEAD:refs/for/{branch}" + (f"%topic={topic}" if topic else "")
        trees.git(tree, "push", "-q", self.git_url(user) + project, target)
        head = trees.git(tree, "rev-parse", "HEAD")
        query = quote(f"commit:{head} project:{project} branch:{branch}")
        (found,) = self.ask("get", f"changes/?q={query}")
        return found["_number"]

    def amend(self, tree: Path, files: Mapping[str, str], project: str, branch: str = "main") -> int:
        """Push the HEAD of a tree with other files as a new patch set of its change; return the change's number."""
        trees.write(tree, files)
        trees.git(tree, "add", "-A")
        trees.git(tree, "commit", "-q", "--amend", "--no-edit", "--allow-empty")
        return self.push(tree, project, branch)

    def review(
        self, number: int, message: str = "", labels: Mapping[str, int] | None = None, user: str = "admin"
    ) -> None:
        """Comment and vote on the current patch set, as a person does."""
        self.ask(
            "post", f"changes/{number}/revisions/current/review", {"message": message, "labels": labels or {}}, user
        )

    def approve(self, number: int) -> None:
        """Let a reviewer agree, and approve: Workflow +1 is what starts a gate. Verified is left to Zuul."""
        self.review(number, labels={"Code-Review": 2, "Workflow": 1})

    def submit(self, number: int, user: str = "admin") -> None:
        """Submit a change, with all that it is submitted together with."""
        self.ask("post", f"changes/{number}/submit", {}, user)

    def submit_by_force(self, number: int) -> None:
        """Submit a change past the gate: an administrator gives what it takes, not Workflow, which starts the gate."""
        self.review(number, labels={"Code-Review": 2, "Verified": 2})
        self.submit(number)

    def abandon(self, number: int) -> None:
        """Abandon a change."""
        self.ask("post", f"changes/{number}/abandon", {})

    def ref(self, number: int) -> str:
        """Return the ref of a change's current patch set."""
        change = self.change(number)
        return change["revisions"][change["current_revision"]]["ref"]

    def change(self, number: int) -> dict:
        """Return a change, as its `detail` is: `status` (NEW, MERGED, ABANDONED), `current_revision`, `submittable`, ..."""
        options = "o=CURRENT_REVISION&o=CURRENT_COMMIT&o=SUBMITTABLE&o=MESSAGES&o=DETAILED_LABELS&o=DETAILED_ACCOUNTS"
        return self.ask("get", f"changes/{number}/detail?{options}")

    def messages(self, number: int, user: str | None = None) -> list[str]:
        """Return what was said on a change, oldest first: all, or by one user."""
        said = self.change(number)["messages"]
        return [entry["message"] for entry in said if user in (None, entry.get("author", {}).get("username"))]

    def votes(self, number: int, label: str) -> dict[str, int]:
        """Return who gave which vote on the current patch set, without zeros."""
        given = self.change(number)["labels"].get(label, {}).get("all", [])
        return {vote["username"]: vote["value"] for vote in given if vote.get("value")}

    def merged(self, number: int) -> bool:
        """Tell whether a change is merged."""
        return self.change(number)["status"] == "MERGED"


def _ask(url: str, verb: str, path: str, words: object, user: str):
    with web.session(url, upstream=False) as session:
        answer = session.request(verb, f"{url}a/{path}", json=words, auth=(user, PASSWORDS[user]), timeout=120)
    assert answer.ok, f"{verb} {path}: {answer.status_code} {answer.text[:2000]}"
    return json.loads(answer.text.removeprefix(")]}'")) if answer.text else None


def _libraries() -> str:
    """Return the class path: Gerrit's jars, and before them ours, which says the version and starts it."""
    found = jars(f"gerrit-jars-{VERSION}", JARS)

    def make(directory: Path) -> None:
        classes, version = directory / "classes", directory / "classes/com/google/gerrit/common/Version"
        version.parent.mkdir(parents=True)
        version.write_text(f"{VERSION}\n")
        words = [java_home() / "bin/javac", "-cp", f"{found}/*", "-d", classes, HERE / "GerritMain.java"]
        subprocess.run(words, check=True)

    launcher = cached(f"gerrit-launcher-{VERSION}", (digest(HERE / "GerritMain.java"), found.name), make)
    return ":".join(map(str, [launcher / "classes", *sorted(found.glob("*.jar"))]))


def _java(place: Path, libraries: str, *words: str | Path) -> list[str]:
    (place / "home").mkdir(exist_ok=True)
    java = [java_home() / "bin/java", *JAVA_OPTIONS, f"-Duser.home={place}/home", "-cp", libraries, "GerritMain"]
    return supervised([*java, *words])


def _configure(site: Path, http: int, ssh: int) -> None:
    ports = {
        "gerrit.canonicalWebUrl": f"http://127.0.0.1:{http}/",
        "httpd.listenUrl": f"http://127.0.0.1:{http}/",
        "sshd.listenAddress": f"127.0.0.1:{ssh}",
        "sshd.advertisedAddress": f"127.0.0.1:{ssh}",
    }
    for key, value in {**SETTINGS, **ports}.items():
        _set(site, key, value)


def _set(site: Path, key: str, value: str) -> None:
    subprocess.run(["git", "config", "-f", site / "etc/gerrit.config", key, value], check=True)


def _daemon(place: Path, libraries: str, url: str) -> subprocess.Popen:
    """Start a server; its log is for failures. ssh answers before HTTP does."""
    with (place / "log").open("ab") as log:
        words = _java(place, libraries, "daemon", "--headless", "--console-log", "-d", place / "site")
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    deadline = time.monotonic() + START_SECONDS
    with web.session(url, upstream=False) as session:
        while True:
            with suppress(requests.RequestException):
                if session.get(f"{url}config/server/version", timeout=10).ok:
                    return process
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise AssertionError(f"Gerrit does not start: {(place / 'log').read_text()[-4000:]}")
            time.sleep(0.1)


def _made() -> Path:
    """Return the site that servers are copies of."""
    libraries = _libraries()
    recipe = [inspect.getsource(part) for part in (_make, _configure, _provision)]
    parts = (recipe, SETTINGS, PASSWORDS, VERIFIED, WORKFLOW, libraries)
    return cached(f"gerrit-site-{VERSION}", parts, lambda place: _make(place, libraries))


def _make(place: Path, libraries: str) -> None:
    site, keys = place / "site", place / "keys"
    for directory in (site / "etc", place / "home/.ssh", keys):
        directory.mkdir(parents=True)
    for user in PASSWORDS:
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"{user}@example.org", "-f", keys / user]
        subprocess.run(make, check=True)
    # `init` takes it for the administrator's
    shutil.copy(keys / "admin.pub", place / "home/.ssh/id_rsa.pub")
    http, ssh = trees.free_port(), trees.free_port()
    _configure(site, http, ssh)
    init = ("init", "--batch", "--dev", "--no-auto-start", "--skip-plugins", "--skip-all-downloads", "-d", site)
    done = subprocess.run(_java(place, libraries, *init), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"Gerrit's init: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    # a copy of the largest jar
    (site / "bin/gerrit.war").unlink(missing_ok=True)
    # init has put its own there
    _configure(site, http, ssh)
    url = f"http://127.0.0.1:{http}/"
    process = _daemon(place, libraries, url)
    try:
        _provision(url, keys)
    finally:
        process.terminate()
        process.wait()
    (place / "log").unlink()
    shutil.rmtree(site / "logs")


def _provision(url: str, keys: Path) -> None:
    """Create the users, the labels, the submit requirement and the access rights that Zuul needs."""

    def put(path: str, words: object) -> None:
        _ask(url, "put", path, words, "admin")

    for user, name in (("zuul", "Zuul"), ("pkgci", "Package CI")):
        key = (keys / f"{user}.pub").read_text()
        words = {"name": name, "email": f"{user}@example.org", "ssh_key": key, "http_password": PASSWORDS[user]}
        put(f"accounts/{user}", {**words, "groups": ["Service Users"]})
    put("projects/All-Projects/labels/Verified", VERIFIED)
    put("projects/All-Projects/labels/Workflow", WORKFLOW)
    rule = {"name": "Verified", "submittability_expression": "label:Verified=MAX AND -label:Verified=MIN"}
    put("projects/All-Projects/submit_requirements/Verified", {**rule, "allow_override_in_child_projects": True})
    groups = _ask(url, "get", "groups/", None, "admin")
    service, people = (groups[name]["id"] for name in ("Service Users", "Administrators"))
    allow = {"action": "ALLOW"}

    def votes(label: str, least: int, most: int) -> dict:
        each = {"action": "ALLOW", "min": least, "max": most}
        return {f"label-{label}": {"label": label, "rules": {service: each, people: each}}}

    rights = {**votes("Verified", -2, 2), **votes("Workflow", -1, 1), "submit": {"rules": {service: allow}}}
    access = {
        "refs/*": {"permissions": {"read": {"rules": {service: allow}}}},
        "refs/heads/*": {"permissions": rights},
    }
    _ask(url, "post", "projects/All-Projects/access", {"message": "Zuul", "add": access}, "admin")
