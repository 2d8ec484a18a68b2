"""The logs of machines under test, fetched from inside when a system test ends: all machines at once, within one time limit.

What cannot be had says so in its place. The console of each machine is none of these: it is written as it is said.
"""

import logging
import time
from collections.abc import Mapping, Sequence
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
# of an abort, which is to have ended within five
ABORTED_SECONDS = 2
ABORTED_BYTES = 1 << 20
# also of one that was restarted
LOGIN_SECONDS = 5
# what the package manager said, of these and of all sessions
MANAGER = {
    "deb": ("apt.log", ("/run/pkgci/log", "/var/log/apt/history.log", "/var/log/apt/term.log", "/var/log/dpkg.log")),
    "rpm": ("dnf.log", ("/run/pkgci/log", "/var/log/dnf.log", "/var/log/dnf.rpm.log")),
}
JOURNAL = 'journalctl --no-pager -o short-precise | tail -c "$1"'
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
VERSIONS = "uname -a; sed -n 's/^PRETTY_NAME=//p' /etc/os-release; "


def fetch(
    target: Target, machines: Mapping[Path, Machine], products: Sequence[str] = (), *, aborted: bool = False
) -> None:
    """Write the journal, the package manager's and the product's logs, and the versions of all that is in, of machines.

    Args:
        target: what they are made for.
        machines: by the directories that take their logs.
        products: shell patterns of absolute paths: the product's own logs.
        aborted: somebody waits for the end: what is not there within two seconds is left out.
    """
    until = time.monotonic() + (ABORTED_SECONDS if aborted else SECONDS)
    threads = ThreadPoolExecutor(len(machines))
    ends = [
        threads.submit(_fetch, target, machine, place, products, until, aborted) for place, machine in machines.items()
    ]
    done, left = wait(ends, until - time.monotonic())
    # those that hang end with their machines
    threads.shutdown(wait=False, cancel_futures=True)
    for end in done:
        end.result()
    if left:
        log.info("the logs of %d machines could not be had in time", len(left))


def _fetch(target: Target, machine: Machine, place: Path, products: Sequence[str], until: float, aborted: bool) -> None:
    if not aborted:
        with suppress(InfrastructureError):
            try:
                machine.run("true", timeout=LOGIN_SECONDS)
            except GuestError:
                # it may have been restarted
                machine.connect(LOGIN_SECONDS)
    manager, files = MANAGER[target.format]
    size = ABORTED_BYTES if aborted else LOG_BYTES
    for name, script, arguments in (
        (manager, TAILS, files),
        *([("product.log", TAILS, products)] if products else []),
        ("journal.log", JOURNAL, ()),
        ("versions.txt", VERSIONS + PACKAGES[target.base], ()),
    ):
        try:
            left = max(0.1, until - time.monotonic())
            said = machine.run(script, str(size), *arguments, timeout=left, limit=2 * LOG_BYTES).output
        except InfrastructureError as error:
            said = f"the log is lost: {error}\n".encode()
        with LogFile(place / name) as file:
            if name == "versions.txt":
                file.write(f"{qemu_version()}\n".encode())
            file.write(said)
