"""What any step costs before its work begins: with ten thousand packages configured, beside one.

A step is started as a job starts it, and ended when it says its first line of work: the git command with which it fetches
the project. Until then it has read the configuration, validated its parameters and found project, release and package.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import trees
from table import Row, timed

from pkgci.config import Config

PACKAGES = 10_000
PKGCI = Path(sys.executable).with_name("pkgci")
TARGET = "bookworm-amd64"


def rows(runs: int) -> Iterator[Row]:
    """Measure; each run once with many packages and once with one."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        many, one = (_configured(place / str(count), count) for count in (PACKAGES, 1))
        for configuration in (many, one):
            # the index is made once
            _start(configuration, place)
        measured = [(timed(lambda: _start(many, place)), timed(lambda: _start(one, place))) for _ in range(3 * runs)]
    ours, theirs = zip(*measured, strict=True)
    yield Row(f"start of a step, {PACKAGES} packages", "one package", ours, theirs, ratio=1.2, seconds=0.3)


def _configured(place: Path, count: int) -> Config:
    """Return a configuration with `count` packages, the project `group/p0` among them."""
    place.mkdir()
    packages = {f"p{number}": {"source": f"group/p{number}"} for number in range(count)}
    paths = {kind: str(place / kind) for kind in ("cache", "state", "data")}
    return trees.config(place, packages, gerrit=f"file://{place}/nowhere/", paths=paths)


def _start(configuration: Config, place: Path) -> None:
    """Start `build` and end it at its first line of work."""
    given = {"ZUUL_PROJECT": "group/p0", "ZUUL_BRANCH": "main", "PKGCI_CONFIG": str(configuration.directory)}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ZUUL_")} | given
    command = [PKGCI, "build", TARGET]
    with subprocess.Popen(
        command, cwd=place, env=environment | {"WORKSPACE": str(place)}, stdout=subprocess.PIPE, start_new_session=True
    ) as step:
        assert step.stdout is not None
        said = b""
        while b"\n+ git " not in said:
            block = os.read(step.stdout.fileno(), 1 << 16)
            if not block:
                raise SystemExit(f"the step ended before its work: {said.decode()}")
            said += block
        os.killpg(step.pid, signal.SIGKILL)
