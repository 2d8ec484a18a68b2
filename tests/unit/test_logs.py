"""Logs that grow while something runs."""

import errno
import os
import re
import subprocess
from pathlib import Path

from pkgci import logs
from pkgci.logs import LogFile, record


def test_what_was_said_is_in_the_file_at_once_with_the_time(tmp_path: Path):
    log = LogFile(tmp_path / "logs" / "a.log", stamped=True)
    log.write(b"one\ntw")
    log.write(b"o\r\n\x1b[1mthree\x00\n")
    said = (tmp_path / "logs" / "a.log").read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ", "", line) for line in said] == ["one", "two", "three?"]
    log.close()


def test_of_a_long_log_beginning_and_end_are_kept(tmp_path: Path):
    with LogFile(tmp_path / "a.log", largest=100) as log:
        for number in range(100):
            log.write(b"line %d\n" % number)
    said = (tmp_path / "a.log").read_text()
    assert said.startswith("line 0\nline 1\n")
    assert said.endswith("line 98\nline 99\n")
    assert re.search(r"\n\[\d{3} bytes are left out\]\n", said)
    assert len(said) < 150


def test_a_line_that_comes_in_pieces_has_one_time(tmp_path: Path):
    with LogFile(tmp_path / "a.log", stamped=True) as log:
        log.write(b"x" * (1 << 17))
        log.write(b"x\nnext")
    assert len(re.findall(r"T\d\d:", (tmp_path / "a.log").read_text())) == 2


def test_who_writes_is_not_kept_waiting_when_the_disk_is_full(tmp_path: Path, monkeypatch, caplog):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(logs._Kept, "_keep", full)
    command = ["head", "-c", "1000000", "/dev/zero"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        record(process.stdout, LogFile(tmp_path / "a.log")).join(30)
        assert process.wait(30) == 0
    assert "a log is not whole" in caplog.text
