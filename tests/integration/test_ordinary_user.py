"""The product for a user without any rights: set-up, doctor, sandbox and a whole check, in an account made for it."""

import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import terminal
import trees

from pkgci.config import EMBEDDED, ROOT, Config
from pkgci.prepare import prepare

NAME = "pkgci-test"


class Account:
    """A user of this machine with a copy of the project in its home."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.home = Path(pwd.getpwnam(name).pw_dir)
        self.project = self.home / "pkgci"

    def command(self, *command: str | Path) -> list[str | Path]:
        """Return what runs a command as this user, with nothing of the environment but the way to the network."""
        kept = [
            f"{name}={value}"
            for name, value in os.environ.items()
            if name.startswith(("PIP_", "SSL_CERT")) or name.lower().endswith(("_proxy", "_ca_bundle"))
        ]
        clean = ["env", "-i", f"HOME={self.home}", "PATH=/usr/local/bin:/usr/bin:/bin", "LC_ALL=C.UTF-8", *kept]
        return ["runuser", "-u", self.name, "--", *clean, *command]

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command in the project as this user."""
        argv = self.command(*command)
        return subprocess.run(argv, cwd=self.project, capture_output=True, text=True, check=False)

    def own(self, path: Path) -> None:
        subprocess.run(["chown", "-R", f"{self.name}:", path], check=True)


@pytest.fixture(scope="module")
def account() -> Iterator[Account]:
    """Make the account; its caches are a copy of this user's, so that minutes are not spent twice."""
    assert os.getuid() == 0, "these tests make a user: run them as root"
    _remove()
    subprocess.run(["useradd", "-m", "-s", "/bin/sh", NAME], check=True)
    try:
        made = Account(NAME)
        listed = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0"):
            if name and (ROOT / name).is_file():
                (made.project / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, made.project / name)
        # another user's repositories may be served at the default one, by other tests
        url = f"url: http://127.0.0.1:{trees.free_port()}/\n"
        (made.project / EMBEDDED.relative_to(ROOT) / "config.yaml").write_text(url)
        config = Config()
        prepare(config, config.names("targets"))
        for source, place in ((config.cache, ".cache/pkgci"), (config.data, ".local/share/pkgci")):
            for kind in ("roots", "images", "snapshots"):
                if (source / kind).exists():
                    copy = ["cp", "-a", "--reflink=auto", "--sparse=always", source / kind, made.home / place]
                    (made.home / place).mkdir(parents=True, exist_ok=True)
                    subprocess.run(copy, check=True)
        made.own(made.home)
        yield made
    finally:
        _remove()


def _remove() -> None:
    subprocess.run(["pkill", "-KILL", "-u", NAME], check=False, capture_output=True)
    subprocess.run(["userdel", "-r", NAME], check=False, capture_output=True)
    # another account of the name may have another id
    shutil.rmtree(Path(tempfile.gettempdir(), f"pytest-of-{NAME}"), ignore_errors=True)


@pytest.fixture(scope="module")
def ready(account: Account) -> Account:
    done = account.run("scripts/setup.sh")
    assert done.returncode == 0, done.stdout + done.stderr
    return account


@pytest.fixture(scope="module")
def testing(ready: Account) -> Account:
    """The account, where it can run tests itself."""
    installed = ready.run(".venv/bin/pip", "install", "-q", "-c", "constraints.txt", "pytest")
    assert installed.returncode == 0, installed.stderr
    return ready


def test_setup_without_rights_says_the_one_command_and_ends_with_3(account: Account):
    entries = {path: path.read_text() for path in (Path("/etc/subuid"), Path("/etc/subgid"))}
    for path, text in entries.items():
        path.write_text("".join(line for line in text.splitlines(True) if not line.startswith(f"{NAME}:")))
    try:
        done = account.run("scripts/setup.sh")
    finally:
        for path, text in entries.items():
            path.write_text(text)
    assert done.returncode == 3
    assert re.search(r"sudo sh -c .*usermod --add-subuids [0-9]+-[0-9]+ --add-subgids", done.stderr)


def test_doctor_finds_nothing_missing(ready: Account):
    done = ready.run(".venv/bin/pkgci", "doctor")
    assert done.returncode == 0, done.stdout
    assert "MISSING" not in done.stdout


def test_the_sandbox_holds(testing: Account):
    chosen = "nobody or network or outlives or time_limit or dies_with or disk or number or memory_of_a or socket"
    done = testing.run(".venv/bin/pytest", "-q", "tests/integration/test_sandbox.py", "-k", chosen)
    assert done.returncode == 0, done.stdout
    assert "10 passed" in done.stdout


def test_a_build_host_works_without_rights(testing: Account):
    chosen = "root_is_sent or within_5_seconds or connection_that_is_killed"
    done = testing.run(".venv/bin/pytest", "-q", "tests/integration/test_build_host.py", "-k", chosen)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def test_a_package_passes_for_all_targets(ready: Account):
    tree = ready.home / "small"
    own_tests = {"debian/tests/control": "Tests: works\nDepends: @\n", "debian/tests/works": "#!/bin/sh\nsmall\n"}
    trees.commit(tree, trees.deb() | trees.rpm() | own_tests)
    ready.own(tree)
    done = ready.run(".venv/bin/pkgci", "check", tree)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "preparing" not in done.stderr
    assert "install-debianrpm-amd64" in done.stdout
    # installation, four tests of the scenario, and that of the package
    assert "system test: 6 passed" in done.stdout
    left = subprocess.run(["pgrep", "-u", NAME, "-a", "-r", "D,R,S,T"], capture_output=True, text=True, check=False)
    assert left.stdout == ""


def test_a_failed_build_has_a_shell(ready: Account):
    tree = ready.home / "broken"
    files = trees.deb("broken")
    files["debian/rules"] += "\noverride_dh_auto_build:\n\techo half >made; exit 7\n"
    trees.commit(tree, files)
    ready.own(tree)
    done = ready.run(".venv/bin/pkgci", "check", "--only", "compile", tree)
    assert done.returncode == 1, done.stdout + done.stderr
    command = ready.command(ready.project / ".venv/bin/pkgci", "shell", "broken")
    status, said = terminal.session(command, ["id -un; cat made; tty", "exit"])
    assert status == 0, said
    assert re.search(r"^builder\nhalf\n/dev/console$", said, re.MULTILINE), said


def test_hostile_and_broken_input_harms_itself_only(testing: Account):
    small = testing.home / "full"
    small.mkdir()
    tests = ["tests/integration/test_hostile.py", "tests/integration/test_install.py", "-k", "test_hostile or attack"]
    command = testing.command("env", f"PKGCI_SMALL={small}", ".venv/bin/pytest", "-q", *tests)
    # a file system that is gone with the tests
    mounting = 'mount -t tmpfs -o "size=64m,mode=700,uid=$1" small "$2"; shift 2; exec "$@"'
    user = str(testing.home.stat().st_uid)
    namespace = ["unshare", "--mount", "sh", "-euc", mounting, "sh", user, small, *command]
    done = subprocess.run(namespace, cwd=testing.project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    # there is no cgroup for it
    assert "1 skipped" in done.stdout
