"""The logs of machines under test, fetched from inside when a system test ends: all machines at once, within one time limit.

Until then they are written as they grow: a machine that is lost, a test that is killed, and one that is aborted, where nobody
waits for more, leave what was said before.
What cannot be had says so in its place. The console of each machine is none of these.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

from pkgci.config import Target
from pkgci.errors import InfrastructureError
from pkgci.logs import LOG_BYTES, LogFile
from pkgci.vm.machine import Machine, qemu_version
from pkgci.vm.remote import GuestError
from pkgci.vm.snapshot import PACKAGES

log = logging.getLogger(__name__)

SECONDS = 120
# also of one that was restarted
LOGIN_SECONDS = 5
# what the package manager said, of these and of all sessions
MANAGER = {
    "deb": ("apt.log", ("/run/pkgci/log", "/var/log/apt/history.log", "/var/log/apt/term.log", "/var/log/dpkg.log")),
    "rpm": ("dnf.log", ("/run/pkgci/log", "/var/log/dnf.log", "/var/log/dnf.rpm.log")),
}
JOURNAL = 'journalctl --no-pager -o short-precise | tail -c "$1"'
JOURNAL_GROWS = "exec journalctl --no-pager -o short-precise --follow --lines=all"
# usage: BYTES PATTERN...; a pattern has no space, a file's name may have one
TAILS = """
size=$1; shift
IFS=
for pattern; do
    shift
    for file in $pattern; do [ ! -f "$file" ] || set -- "$@" "$file"; done
done
[ "$#" = 0 ] || exec tail -v -c "$((size / $#))" -- "$@"
"""
# the same; what is not there yet is waited for, by its name
TAILS_GROW = """
shift
IFS=
for pattern; do
    shift
    set -- "$@" $pattern
done
exec tail -v -c +1 -F -- "$@" 2>/dev/null
"""
VERSIONS_FILE = "versions.txt"
VERSIONS = "uname -a; sed -n 's/^PRETTY_NAME=//p' /etc/os-release; "


def follow(target: Target, machines: Mapping[Path, Machine], products: Sequence[str] = ()) -> None:
    """Begin to write the logs that `fetch` writes at the end, by threads that end with the machines.

    Args:
        target: what they are made for.
        machines: as of `fetch`.
        products: as of `fetch`.
    """
    for place, machine in machines.items():
        for name, _, grows, arguments in _logs(target, products):
            file = LogFile(place / name)
            file.write(_head(name))
            threading.Thread(target=_follow, args=(machine, file, grows, arguments), daemon=True).start()


def _follow(machine: Machine, file: LogFile, script: str, arguments: Sequence[str]) -> None:
    # a log that is lost, or cannot be written, changes no test; what is fetched at the end says why
    with suppress(InfrastructureError, OSError), file:
        machine.follow(script, str(LOG_BYTES), *arguments, to=file, limit=LOG_BYTES)


def _head(name: str) -> bytes:
    """Return what a log begins with that its machine does not know."""
    return f"{qemu_version()}\n".encode() if name == VERSIONS_FILE else b""


def _logs(target: Target, products: Sequence[str]) -> Iterator[tuple[str, str, str, Sequence[str]]]:
    """Yield the logs of a machine: the file, the script that says it, the one that goes on to say it, their arguments."""
    manager, files = MANAGER[target.format]
    yield manager, TAILS, TAILS_GROW, files
    if products:
        yield "product.log", TAILS, TAILS_GROW, products
    yield "journal.log", JOURNAL, JOURNAL_GROWS, ()
    versions = VERSIONS + PACKAGES[target.base]
    yield VERSIONS_FILE, versions, versions, ()


def fetch(target: Target, machines: Mapping[Path, Machine], products: Sequence[str] = ()) -> None:
    """Write the journal, the package manager's and the product's logs, and the versions of all that is in, of machines.

    Args:
        target: what they are made for.
        machines: by the directories that take their logs.
        products: shell patterns of absolute paths: the product's own logs.
    """
    until = time.monotonic() + SECONDS
    threads = ThreadPoolExecutor(len(machines))
    ends = [threads.submit(_fetch, target, machine, place, products, until) for place, machine in machines.items()]
    done, left = wait(ends, until - time.monotonic())
    # those that hang end with their machines
    threads.shutdown(wait=False, cancel_futures=True)
    for end in done:
        end.result()
    if left:
        log.info("the logs of %d machines could not be had in time", len(left))


def _fetch(target: Target, machine: Machine, place: Path, products: Sequence[str], until: float) -> None:
    with suppress(InfrastructureError):
        try:
            machine.run("true", timeout=LOGIN_SECONDS)
        except GuestError:
            # it may have been restarted
            machine.connect(LOGIN_SECONDS)
    for name, script, _, arguments in _logs(target, products):
        path = place / name
        try:
            left = max(0.1, until - time.monotonic())
            done = machine.run(script, str(LOG_BYTES), *arguments, timeout=left, limit=2 * LOG_BYTES)
            said = _head(name) + done.output
        except InfrastructureError as error:
            before = path.read_bytes() if path.exists() else _head(name)
            said = before + f"the {'rest of the ' if before else ''}log is lost: {error}\n".encode()
        # another file than the one that is written as the log grows, which nobody needs any more then
        new = path.with_name(f".{name}.new")
        with LogFile(new) as file:
            file.write(said)
        new.replace(path)
