"""The logs of machines, fetched when a system test ends. Real machines are in `tests/integration/test_systest.py`."""

import threading
import time
from pathlib import Path

import pytest
import trees

from pkgci import guestlogs
from pkgci.vm.remote import Completed, GuestError, LostError


class Guest:
    """A machine that answers everything, hangs until it is killed, or is gone."""

    def __init__(self, how: str = "answers") -> None:
        self.how = how
        self.killed = threading.Event()

    def connect(self, _: float) -> None:
        raise GuestError("no ssh")

    def run(self, script: str, *_: str, timeout: float, limit: int = 0) -> Completed:
        del limit
        if self.how == "hangs":
            self.killed.wait(timeout)
            raise GuestError("no end")
        if self.how == "gone":
            raise LostError
        return Completed(0, f"\x1b[1msaid\x1b[0m {len(script)}\n".encode())


@pytest.fixture
def target(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(guestlogs, "qemu_version", lambda: "QEMU 7")
    return trees.config(tmp_path / "configuration").target("bookworm-amd64")


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


@pytest.mark.parametrize(
    ("products", "files"),
    [
        ((), ["apt.log", "journal.log", "versions.txt"]),
        (("/var/log/a/*.log",), ["apt.log", "journal.log", "product.log", "versions.txt"]),
    ],
)
def test_each_machine_has_its_logs_as_plain_text(target, tmp_path, products, files):
    guestlogs.fetch(target, {tmp_path / "one": Guest(), tmp_path / "two": Guest()}, products)
    assert names(tmp_path / "one") == names(tmp_path / "two") == files
    assert (tmp_path / "one" / "journal.log").read_text().startswith("said ")
    assert (tmp_path / "one" / "versions.txt").read_text().startswith("QEMU 7\nsaid ")


def test_what_cannot_be_had_says_so(target, tmp_path):
    guestlogs.fetch(target, {tmp_path / "one": Guest("gone")})
    assert (tmp_path / "one" / "journal.log").read_text() == "the log is lost: the connection to the machine is lost\n"


@pytest.mark.parametrize("aborted", [False, True])
def test_machines_that_hang_cost_one_time_limit_together_and_nothing_of_the_others(
    target, tmp_path, monkeypatch, aborted
):
    monkeypatch.setattr(guestlogs, "ABORTED_SECONDS" if aborted else "SECONDS", 1)
    guests = {tmp_path / str(number): Guest("hangs" if number % 2 else "answers") for number in range(6)}
    began = time.monotonic()
    guestlogs.fetch(target, guests, aborted=aborted)
    assert time.monotonic() - began < 2
    assert names(tmp_path / "0") == names(tmp_path / "4") == ["apt.log", "journal.log", "versions.txt"]
    for guest in guests.values():
        guest.killed.set()
