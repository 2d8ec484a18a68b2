"""A person at a terminal, for tests of what needs one."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROWS, COLUMNS = 33, 111
PROMPTS = ("$ ", "# ")


def session(
    argv: Sequence[str | Path], lines: Sequence[str], env: Mapping[str, str] | None = None, seconds: float = 120
) -> tuple[int, str]:
    """Run a command on a terminal of its own, type each line once a shell prompts; return its status and what it said."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True)
    os.close(theirs)
    said, answered, waiting = "", 0, list(lines)
    deadline = time.monotonic() + seconds
    try:
        while True:
            assert time.monotonic() < deadline, said
            if not select.select([ours], [], [], 0.5)[0]:
                continue
            try:
                block = os.read(ours, 4096)
            except OSError:
                break
            said += block.decode(errors="replace")
            if waiting and said[answered:].endswith(PROMPTS):
                os.write(ours, f"{waiting.pop(0)}\n".encode())
                answered = len(said)
        return process.wait(timeout=30), said.replace("\r", "")
    finally:
        process.kill()
        process.wait()
        os.close(ours)
