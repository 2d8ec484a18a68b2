"""What a build costs beside sbuild, and what a hit on the store costs beside the build."""

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import trees
from hello import TREE
from table import Row, timed

from pkgci.compile import compile
from pkgci.config import Config
from pkgci.roots import build_root
from pkgci.store import Store

TARGET = "bookworm-amd64"


def rows(runs: int) -> Iterator[Row]:
    """Measure; each run builds, takes the same from the store, and builds by sbuild."""
    builds, hits, sbuilds = zip(*(_run() for _ in range(runs)), strict=True)
    yield Row("compile of hello", "sbuild", builds, sbuilds, ratio=0.7)
    yield Row("compile of hello from the store", "the first one", hits, builds, ratio=0.25)


def _run() -> tuple[float, float, float]:
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        configuration = trees.config(place)
        (place / "artifacts").mkdir()
        parameters = trees.local(configuration, TREE)
        made = []

        def build() -> None:
            made.append(compile(configuration, TARGET, parameters, place / "artifacts"))

        first, again = timed(build), timed(build)
        assert [one.origin for one in made] == ["built", "store"]
        entry = Store(configuration).lookup(made[0].key)
        assert entry is not None
        source = next(entry.directory.glob("*.dsc"))
        return first, again, timed(lambda: _sbuild(configuration, source, place))


def _sbuild(configuration: Config, source: Path, place: Path) -> None:
    """Build a source package by sbuild in the same root, its dependencies from the same mirror."""
    root = build_root(configuration, TARGET).path
    command = ["sbuild", "--chroot-mode=unshare", f"--chroot={root}", "--dist=bookworm", "--arch-any", "--arch-all"]
    command += ["--no-run-lintian", "--no-run-piuparts", "--no-run-autopkgtest", "--no-apt-upgrade"]
    command += ["--no-apt-distupgrade", "--apt-update", "--bd-uninstallable-explainer=none", str(source)]
    subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
