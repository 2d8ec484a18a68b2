"""A mirror as rsync and its readers reach it: what is there, sending, comparing, removing.

Source: rsync(1), rsyncd.conf(5), rrsync(1), ssh_config(5).
"""

import os
import re
import shutil
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pkgci.command import run
from pkgci.config import Mirror
from pkgci.errors import InfrastructureError
from pkgci.lazy import Lazy
from pkgci.released.repository import CURRENT

request = Lazy("urllib.request")

CONNECT_SECONDS = 10
# what a command may take, and more for what it is about, at so many bytes a second. rsync's own timeout does not end a
# sender whose keep-alive messages nobody reads
SECONDS = 120
SLOWEST = 128 << 10
# a mirror's web server may see its files a little later than rsync
SEEN_SECONDS = 10.0
POLL = 0.2
LARGEST = 64 << 20
# where rsync writes what has not its name yet, below the codename's directory
TEMPORARY = ".new"
POINTER = re.compile(r"generations/([1-9][0-9]{0,8})")
SENT = re.compile(rb"^Total bytes sent: ([0-9]+)$", re.MULTILINE)
SSH_CONFIG = """
BatchMode yes
ConnectTimeout {seconds}
ForwardAgent no
GlobalKnownHostsFile /dev/null
HostKeyAlgorithms ssh-ed25519
HostKeyAlias mirror
HostName {host}
IdentitiesOnly yes
IdentityFile "{identity}"
LogLevel ERROR
Port {port}
ServerAliveCountMax 4
ServerAliveInterval 15
StrictHostKeyChecking yes
User {user}
UserKnownHostsFile "{known}"
"""


@dataclass(frozen=True)
class Seen:
    """What a mirror has: where its pointer leads to (None: there is none), its generations, and whether TEMPORARY is there."""

    pointer: str | None
    generations: frozenset[int]
    temporary: bool

    @property
    def number(self) -> int:
        """The generation that the pointer leads to; 0 for none, or none of ours."""
        return int(found[1]) if self.pointer and (found := POINTER.fullmatch(self.pointer)) else 0


class Remote:
    """The copy of a repository on a mirror.

    Args:
        name: the mirror's name.
        mirror: where it is.
        codename: the repository's codename.
        scratch: a directory that is made, for files of one run.

    Raises:
        InfrastructureError: (from any member) the mirror does not answer, or refuses, or is not as it must be.
    """

    def __init__(self, name: str, mirror: Mirror, codename: str, scratch: Path) -> None:
        self.name, self.codename, self.scratch = name, codename, scratch
        self.url = f"{mirror.url}{codename}/"
        scratch.mkdir(parents=True)
        self._options = ["--no-motd", f"--timeout={SECONDS}"]
        if mirror.rsync:
            self._place = mirror.rsync
            self._options += [f"--contimeout={CONNECT_SECONDS}"]
            self._options += [f"--password-file={mirror.password}"] if mirror.password else []
            return
        assert mirror.ssh is not None
        # of no host's name: what it means is in the file
        self._place = f"mirror:{mirror.path}"
        self._options += ["--rsh=ssh -F ssh_config"]
        known = scratch / "known_hosts"
        known.write_text(f"mirror {mirror.ssh.host_key}\n")
        values = {"host": mirror.ssh.host, "port": mirror.ssh.port, "user": mirror.ssh.user}
        places = {"identity": mirror.ssh.identity, "known": known}
        # what ssh would expand
        quoted = {name: str(path).replace("%", "%%") for name, path in places.items()}
        (scratch / "ssh_config").write_text(SSH_CONFIG.format(seconds=CONNECT_SECONDS, **values, **quoted))

    def look(self) -> Seen:
        """Return what the mirror has.

        Raises:
            InfrastructureError: as every member; also when there is something else in the pointer's place.
        """
        there = self.fresh("seen")
        inside = ("", CURRENT, f"{TEMPORARY}/", "generations/", "generations/*/")
        rules = [f"--include=/{self.codename}/{name}" for name in inside]
        self._rsync("look at", ["-rl", *rules, "--exclude=*", self._place, f"{there}/"])
        copy = there / self.codename
        pointer = copy / CURRENT
        if os.path.lexists(pointer) and not pointer.is_symlink():
            raise InfrastructureError(
                f"{self.codename}/{CURRENT} is no symbolic link there; remove what is in its place"
            )
        numbers = {int(path.name) for path in copy.glob("generations/*") if path.name.isdecimal()}
        return Seen(
            os.readlink(pointer) if pointer.is_symlink() else None, frozenset(numbers), (copy / TEMPORARY).is_dir()
        )

    def make_room(self) -> None:
        """Make the directory that rsync writes to before a file gets its name; what was left in it goes."""
        tree = self.fresh("room")
        (tree / self.codename / TEMPORARY).mkdir(parents=True)
        rules = [f"--include=/{self.codename}/", f"--include=/{self.codename}/{TEMPORARY}/***", "--exclude=*"]
        self._rsync("write to", ["-r", "--delete", *rules, f"{tree}/", self._place])

    def send(self, tree: Path, size: int) -> int:
        """Send all files of a tree, of `size` bytes, by checksum only those that differ; return the bytes that were sent."""
        words = ["-rlHtcO", "--perms", "--chmod=D755,F644", "--stats", "--no-human-readable", self._temporary]
        said = self._rsync("send to", [*words, f"{tree}/", self._place], size)
        found = SENT.search(said)
        return int(found[1]) if found else 0

    def compare(self, tree: Path, size: int) -> None:
        """Compare all files of a tree, of `size` bytes, with what the mirror has, by checksum and time.

        Raises:
            InfrastructureError: as every member; also when one differs.
        """
        differ = self._rsync("compare", ["-rltcOni", f"{tree}/", self._place], size).splitlines()
        if differ:
            raise InfrastructureError(f"{len(differ)} files differ after they were sent, first {_clean(differ[0])}")

    def remove(self, names: Sequence[str]) -> None:
        """Remove files, links and directories with what is in them, by their paths; what is not there is no error."""
        tree = self.fresh("removed")
        paths = [f"{self.codename}/{name}" for name in names]
        for path in paths:
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
        words = ["-r", "--files-from=-", "--from0", "--no-implied-dirs", "--delete-missing-args", "--force"]
        self._rsync("remove from", [*words, f"{tree}/", self._place], names="\0".join(paths).encode())

    def point(self, tree: Path) -> None:
        """Send a pointer, which replaces the one that is there by a rename."""
        self._rsync("switch", ["-rlO", self._temporary, f"{tree}/", self._place])

    def check_served(self, path: str, content: bytes) -> None:
        """Wait until the mirror's web server serves a file with this content, SEEN_SECONDS at most.

        Raises:
            InfrastructureError: it does not.
        """
        until = time.monotonic() + SEEN_SECONDS
        while True:
            try:
                if self.served(path) == content:
                    return
                said = "not what was sent"
            except InfrastructureError as error:
                said = str(error)
            if time.monotonic() > until:
                raise InfrastructureError(
                    f"its readers do not see {path}: {said}; does {self.url} lead to what rsync writes?"
                )
            time.sleep(POLL)

    def served(self, path: str) -> bytes:
        """Return a file as the mirror's readers get it."""
        return fetch(urllib.parse.urljoin(self.url, path))

    def fresh(self, name: str) -> Path:
        """Return an empty directory of this run."""
        directory = self.scratch / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        return directory

    @property
    def _temporary(self) -> str:
        return f"--temp-dir={self.codename}/{TEMPORARY}"

    def _rsync(self, what: str, words: Sequence[str | Path], size: int = 0, names: bytes | None = None) -> bytes:
        # ssh's file is found from here: a path with a blank could not be named
        # rsync is two processes where it reads: killed, it would leave one that waits for ever, also at the other end.
        # timeout ends its whole group, when time is up or this process is gone
        seconds = str(int(SECONDS + size / SLOWEST))
        ended = ["setpriv", "--pdeathsig", "TERM", "--", "timeout", "--kill-after=10", seconds]
        argv = [*ended, "rsync", *self._options, *words]
        # a daemon that wants a password, and none is configured: nobody is asked for it
        environment = {"LC_ALL": "C", "RSYNC_PASSWORD": ""}
        done = run(argv, input=names, cwd=self.scratch, env=environment, check=False, quiet=True)
        if done.returncode == 124:
            raise InfrastructureError(f"cannot {what} it: no end after {seconds} s")
        if done.returncode:
            # the first line says what happened, the last one only that something did; ssh has lines of @
            said = next(filter(None, (line.strip(b" @") for line in done.stderr.splitlines())), b"it said nothing")
            raise InfrastructureError(f"cannot {what} it: {_clean(said)} (rsync status {done.returncode})")
        return done.stdout


def fetch(url: str) -> bytes:
    """Return what a web server serves, LARGEST at most, past caches.

    Raises:
        InfrastructureError: it does not.
    """
    asked = request.Request(url, headers={"Cache-Control": "no-cache"})
    try:
        with request.urlopen(asked, timeout=CONNECT_SECONDS) as response:
            return response.read(LARGEST)
    except (OSError, ValueError) as error:
        raise InfrastructureError(f"{url}: {_clean(str(error).encode())}") from error
    except Exception as error:
        # http.client: what answers is no web server
        raise InfrastructureError(f"{url}: {_clean(repr(error).encode())}") from error


def _clean(said: bytes) -> str:
    return ascii(said.decode(errors="replace").strip())[1:-1][:300]
