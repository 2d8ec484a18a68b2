"""What holds of a sandbox before there is one: its time limit, and who it belongs to."""

import io
import os
import pwd
import tempfile
import time

import pytest

from pkgci import sandbox
from pkgci.errors import PackageError


class Slow(io.RawIOBase):
    """A log on a busy disk."""

    def write(self, block: bytes) -> int:
        time.sleep(0.05)
        return len(block)


def test_the_time_limit_holds_for_what_never_falls_silent():
    started = time.monotonic()
    with tempfile.TemporaryFile() as nothing, pytest.raises(PackageError, match="no end after 1 s"):
        sandbox._wait(["timeout", "20", "yes"], nothing, [], Slow(), 1)
    assert time.monotonic() - started < 10


def test_a_user_without_a_name_has_sub_ids_by_number(monkeypatch):
    def unknown(number: int):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(sandbox.Path, "read_text", lambda _: f"root:1:65536\n{os.getuid()}:100000:65536\n")
    assert sandbox.sub_ids("subuid") == 100000
