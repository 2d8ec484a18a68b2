"""A mirror as rsync and its readers reach it: what is there, sending, comparing, removing.

What it says is bounded: in bytes, in time, and it goes to no disk of ours.

Source: rsync(1), rsyncd.conf(5), rrsync(1), ssh_config(5).
"""

import os
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pkgci.command import supervised
from pkgci.config import Mirror
from pkgci.errors import InfrastructureError
from pkgci.lazy import Lazy
from pkgci.mirrors.stop import Stop
from pkgci.released.repository import CURRENT

request = Lazy("urllib.request")
errors = Lazy("urllib.error")

CONNECT_SECONDS = 10
# what a command may take, and more for what it is about, at so many bytes a second. rsync's own timeout does not end a
# sender whose keep-alive messages nobody reads
SECONDS = 120
SLOWEST = 128 << 10
# a mirror's web server may see its files a little later than rsync
SEEN_SECONDS = 10.0
POLL = 0.2
# a web server's whole answer, also when it comes byte by byte
FETCH_SECONDS = 20
# of what a web server or rsync says
LARGEST = 16 << 20
# where rsync writes what has not its name yet, below the codename's directory
TEMPORARY = ".new"
# of the directory, of a run's, without what is removed from a mirror
REMOVED = "removed"
POINTER = re.compile(r"generations/([1-9][0-9]{0,8})")
# of a listing: the kind, the name
LISTED = re.compile(r"^(.)\S* +[0-9,.]+ \S+ \S+ (.*)$", re.MULTILINE)
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
    """What a mirror has: where its pointer leads to (None: there is none), its generations (None: not looked at), and whether
    TEMPORARY is there."""

    pointer: str | None
    generations: frozenset[int] | None
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
        stop: what may end it.

    Raises:
        InfrastructureError: (from any member) the mirror does not answer, or refuses, or is not as it must be.
        Aborted: (from any member) it was stopped.
    """

    def __init__(self, name: str, mirror: Mirror, codename: str, scratch: Path, stop: Stop) -> None:
        self.name, self.codename, self.scratch, self.stop = name, codename, scratch, stop
        self.url = f"{mirror.url}{codename}/"
        # now: a pointer is taken away by it, also when our disk is full by then
        (scratch / REMOVED / codename).mkdir(parents=True)
        self._options = ["--no-motd", f"--timeout={SECONDS}"]
        if mirror.rsync:
            self._place = mirror.rsync
            # rsync writes little and waits for the answer: each such turn would take the 40 ms of a delayed ACK
            self._options += [f"--contimeout={CONNECT_SECONDS}", "--sockopts=TCP_NODELAY"]
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
        inside = ("", CURRENT, f"{TEMPORARY}/", "generations/", "generations/*/")
        rules = [f"--include=/{self.codename}/{name}" for name in inside]
        words = ["-rl", "--list-only", "--no-human-readable", *rules, "--exclude=*", self._place]
        said = self._rsync("look at", words).decode(errors="replace")
        there = {name.removeprefix(f"{self.codename}/"): kind for kind, name in LISTED.findall(said)}
        links = [name.partition(" -> ")[2] for name, kind in there.items() if name.startswith(f"{CURRENT} -> ")]
        if CURRENT in there:
            raise InfrastructureError(
                f"{self.codename}/{CURRENT} is no symbolic link there; remove what is in its place"
            )
        generations = (POINTER.fullmatch(name) for name, kind in there.items() if kind == "d")
        return Seen(
            links[0] if links else None, frozenset(int(one[1]) for one in generations if one), TEMPORARY in there
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
        tree = self.scratch / REMOVED
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
        while (found := self.served(path)) != content:
            if time.monotonic() > until:
                said = "there is none" if found is None else "not what was sent"
                raise InfrastructureError(
                    f"its readers do not see {path}: {said}; does {self.url} lead to what rsync writes?"
                )
            self._pause()

    def served(self, path: str) -> bytes | None:
        """Return a file as the mirror's readers get it, None when there is none. Who does not answer is asked again."""
        until = time.monotonic() + SEEN_SECONDS
        while True:
            try:
                return fetch(urllib.parse.urljoin(self.url, path))
            except InfrastructureError as error:
                if time.monotonic() > until:
                    raise InfrastructureError(f"its web server does not answer: {error}") from error
            self._pause()

    def _pause(self) -> None:
        self.stop.check()
        time.sleep(POLL)

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
        argv = [*ended, "prlimit", f"--fsize={LARGEST}", "rsync", *self._options, *words]
        # a daemon that wants a password, and none is configured: nobody is asked for it
        environment = {**os.environ, "LC_ALL": "C", "RSYNC_PASSWORD": ""}
        # in memory: our own disk may be full when a pointer has to be taken back
        with open(os.memfd_create("said"), "w+b") as said, open(os.memfd_create("errors"), "w+b") as refused:
            with (
                subprocess.Popen(
                    supervised(argv),
                    stdin=subprocess.DEVNULL if names is None else subprocess.PIPE,
                    stdout=said,
                    stderr=refused,
                    cwd=self.scratch,
                    env=environment,
                ) as process,
                self.stop.running(process),
            ):
                process.communicate(names)
            output, wrong = (_read(stream) for stream in (said, refused))
        if process.returncode == 124:
            raise InfrastructureError(f"cannot {what} it: no end after {seconds} s")
        if output is None or wrong is None:
            raise InfrastructureError(f"cannot {what} it: it says more than {LARGEST >> 20} MiB")
        if process.returncode:
            # the first line says what happened, the last one only that something did; ssh has lines of @
            first = next(filter(None, (line.strip(b" @") for line in wrong.splitlines())), b"it said nothing")
            raise InfrastructureError(f"cannot {what} it: {_clean(first)} (rsync status {process.returncode})")
        return output


def fetch(url: str) -> bytes | None:
    """Return what a web server serves, past caches and proxies; None when it says that there is no such thing for us.

    Raises:
        InfrastructureError: it does not answer so, or with more than LARGEST bytes, or for more than FETCH_SECONDS.
    """
    answers: list[bytes | InfrastructureError | None] = []
    # its own time limits are those of each read: who says a byte now and then has all the time
    asking = threading.Thread(target=lambda: answers.append(_ask(url)), daemon=True)
    asking.start()
    asking.join(FETCH_SECONDS)
    if not answers:
        raise InfrastructureError(f"{url}: no end after {FETCH_SECONDS} s")
    if isinstance(answers[0], InfrastructureError):
        raise answers[0]
    return answers[0]


def _ask(url: str) -> bytes | InfrastructureError | None:
    asked = request.Request(url, headers={"Cache-Control": "no-cache"})
    opener = request.build_opener(request.ProxyHandler({}))
    try:
        with opener.open(asked, timeout=CONNECT_SECONDS) as response:
            content = response.read(LARGEST + 1)
        return content if len(content) <= LARGEST else InfrastructureError(f"{url}: more than {LARGEST >> 20} MiB")
    except errors.HTTPError as error:
        with error:
            return None if 400 <= error.code < 500 else InfrastructureError(f"{url}: {_clean(str(error).encode())}")
    except (OSError, ValueError) as error:
        return InfrastructureError(f"{url}: {_clean(str(error).encode())}")
    except Exception as error:
        # http.client: what answers is no web server
        return InfrastructureError(f"{url}: {_clean(repr(error).encode())}")


def _read(stream: IO[bytes]) -> bytes | None:
    """Return what was written to a stream; None when that was cut at LARGEST."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    return stream.read() if size < LARGEST else None


def _clean(said: bytes) -> str:
    return ascii(said.decode(errors="replace").strip())[1:-1][:300]
