"""The logs of machines, fetched when a system test ends. Real machines are in `tests/integration/test_systest.py`."""

import re
import threading
import time
from pathlib import Path
from typing import IO

import pytest
import trees

from pkgci import guestlogs
from pkgci.vm.remote import Completed, GuestError, LostError


class Guest:
    """A machine that answers everything, hangs until it is killed, or is gone."""

    def __init__(self, how: str = "answers") -> None:
        self.how = how
        self.killed = threading.Event()
        self.told = threading.Semaphore(0)

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

    def follow(self, *_: str, to: IO[bytes], limit: int) -> None:
        del limit
        to.write(b"\x1b[1mbefore\x1b[0m\n")
        self.told.release()
        self.killed.wait(20)
        raise LostError


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


def test_machines_that_hang_cost_one_time_limit_together_and_nothing_of_the_others(target, tmp_path, monkeypatch):
    monkeypatch.setattr(guestlogs, "SECONDS", 1)
    guests = {tmp_path / str(number): Guest("hangs" if number % 2 else "answers") for number in range(6)}
    began = time.monotonic()
    guestlogs.fetch(target, guests)
    assert time.monotonic() - began < 2
    assert names(tmp_path / "0") == names(tmp_path / "4") == ["apt.log", "journal.log", "versions.txt"]
    for guest in guests.values():
        guest.killed.set()


@pytest.mark.parametrize(
    ("how", "journal"),
    [
        ("answers", r"said \d+\n"),
        ("gone", r"before\nthe rest of the log is lost: the connection to the machine is lost\n"),
    ],
)
def test_what_was_said_until_a_machine_is_gone_is_there_at_once_and_stays(target, tmp_path, how, journal):
    guest = Guest(how)
    guestlogs.follow(target, {tmp_path / "one": guest})
    for _ in range(3):
        assert guest.told.acquire(timeout=20)
    assert names(tmp_path / "one") == ["apt.log", "journal.log", "versions.txt"]
    # all that is left when this process is killed
    assert (tmp_path / "one" / "journal.log").read_text() == "before\n"
    assert (tmp_path / "one" / "versions.txt").read_text() == "QEMU 7\nbefore\n"
    guestlogs.fetch(target, {tmp_path / "one": guest})
    guest.killed.set()
    assert names(tmp_path / "one") == ["apt.log", "journal.log", "versions.txt"]
    assert re.fullmatch(journal, (tmp_path / "one" / "journal.log").read_text())
    assert (tmp_path / "one" / "versions.txt").read_text().startswith("QEMU 7\n")
