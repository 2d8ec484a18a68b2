"""apt and dnf themselves, each in directories of its own, where they know one repository and nothing else."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pkgci.config import Config


def run(*argv: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None, check: bool = True):
    """Run a command; its output is the failure's message."""
    environment = {**os.environ, "LC_ALL": "C.UTF-8", **(env or {})}
    done = subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


@contextmanager
def gnupg_home() -> Iterator[tuple[str, str]]:
    """Yield a home of GnuPG with a key, and its fingerprint; its agent ends with it."""
    # the path of an agent's socket must be short
    with tempfile.TemporaryDirectory(prefix="pkgci-t-", dir="/tmp") as home:
        words = ["gpg", "--homedir", home, "--batch", "--passphrase", ""]
        run(*words, "--quick-generate-key", "Released <released@example.org>", "rsa3072", "sign", "never")
        listed = run(*words, "--with-colons", "--list-keys").stdout.splitlines()
        yield home, next(line.split(":")[9] for line in listed if line.startswith("fpr:"))
        run("gpgconf", "--homedir", home, "--kill", "gpg-agent")


class Apt:
    """A real apt with directories of its own, which knows the one repository and nothing else."""

    def __init__(self, directory: Path, sources: str) -> None:
        self.directory = directory
        for name in ("state/lists/partial", "cache/archives/partial", "etc/sources.list.d", "etc/preferences.d"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        (directory / "etc/sources.list.d/pkgci.sources").write_text(sources)
        (directory / "status").touch()
        (directory / "apt.conf").write_text(
            f'Dir "{directory}";\nDir::State "state";\nDir::State::status "{directory}/status";\nDir::Cache "cache";\n'
            f'Dir::Etc "etc";\nDir::Etc::parts "/dev/null";\nDir::Etc::trusted "/dev/null";\n'
            f'Dir::Etc::trustedparts "/dev/null";\nDir::Log "log";\nAPT::Sandbox::User "root";\n'
            f'Acquire::Languages "none";\nAcquire::http::Proxy "DIRECT";\nAPT::Architecture "amd64";\n'
        )

    def __call__(self, *words: str, check: bool = True):
        env = {"APT_CONFIG": str(self.directory / "apt.conf")}
        return run("apt-get", "-q", *words, cwd=self.directory, env=env, check=check)


def dnf(directory: Path, repo: str, *words: str, check: bool = True):
    """A real dnf with directories of its own, which knows the one repository and nothing else."""
    (directory / "repos").mkdir(parents=True, exist_ok=True)
    path = directory / "repos" / "pkgci.repo"
    # a newer one would make dnf forget what it has
    if not path.exists() or path.read_text() != repo:
        path.write_text(repo)
    (directory / "dnf.conf").write_text(
        "".join(
            ["[main]\n", "gpgcheck=1\nmodule_platform_id=platform:ci\nretries=1\nplugins=0\n"]
            + [f"{name}={directory}/{place}\n" for name, place in {"reposdir": "repos", "cachedir": "cache"}.items()]
            + [f"{name}={directory}/{place}\n" for name, place in {"logdir": "log", "persistdir": "persist"}.items()]
        )
    )
    fixed = ["-y", "-c", directory / "dnf.conf", f"--installroot={directory / 'root'}", "--releasever=1"]
    # dnf's install insists on being root, if only of its own namespace
    root = ["unshare", "--map-root-user"] if os.getuid() else []
    try:
        return run(*root, "dnf", *fixed, *words, env={"HOME": str(directory), "no_proxy": "127.0.0.1"}, check=check)
    finally:
        # dnf leaves the agent running that it started to read the repository's key
        for home in directory.glob("**/pubring"):
            run("gpgconf", "--homedir", home, "--kill", "gpg-agent")


def download_by_apt(place: Path, sources: str, least: int) -> None:
    """Update and download hello, whose version is 1.LEAST or a later one."""
    apt = Apt(place, sources)
    apt("update", "-o", "APT::Update::Error-Mode=any")
    apt("download", "hello")
    got = max(place.glob("hello_*.deb"), key=lambda path: path.stat().st_mtime)
    assert int(got.name.split("_")[1][2:]) >= least, f"{got.name} is older than 1.{least}"
    got.unlink()


def download_by_dnf(place: Path, repo: str, least: int) -> None:
    """Refresh and download hello, whose version is 1.LEAST or a later one."""
    dnf(place, repo, "--refresh", "makecache")
    dnf(place, repo, "install", "--downloadonly", f"--downloaddir={place}", "hello")
    (got,) = place.glob("hello-*.rpm")
    assert int(got.name.split("-")[1][2:]) >= least, f"{got.name} is older than 1.{least}"
    got.unlink()


def read_until(end, look: Callable[[], None], failures, rounds) -> None:
    """Call `look` until the event `end`; what it raises goes to the queue `failures`, `rounds` counts."""
    while not end.is_set():
        try:
            look()
            with rounds.get_lock():
                rounds.value += 1
        except AssertionError as error:
            failures.put(str(error)[-2000:])


def pkgci(config: Config, *words: str) -> tuple[int, str]:
    """Run the command; return its exit code and what it says."""
    command = [sys.executable, "-c", "from pkgci.cli import main; main()", *words]
    done = run(*command, env={"PKGCI_CONFIG": str(config.directory)}, check=False)
    return done.returncode, done.stdout + done.stderr
