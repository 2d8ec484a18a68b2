"""What a build costs beside sbuild, and what a hit on the store costs: medians of several runs.

usage: python tests/bench/bench_compile.py [RUNS]; `make bench`. It needs the tree of GNU hello that `make demo` makes.
Each figure is a ratio to the peer in the same run: machines differ, and are shared.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trees

from pkgci.compile import compile
from pkgci.config import Config
from pkgci.roots import build_root
from pkgci.store import Store

TARGET = "bookworm-amd64"


def sbuild(root: Path, source: Path, place: Path) -> None:
    """Build a source package by sbuild in the same root, its dependencies from the same mirror."""
    command = ["sbuild", "--chroot-mode=unshare", f"--chroot={root}", "--dist=bookworm", "--arch-any", "--arch-all"]
    command += ["--no-run-lintian", "--no-run-piuparts", "--no-run-autopkgtest", "--no-apt-upgrade"]
    command += ["--no-apt-distupgrade", "--apt-update", "--bd-uninstallable-explainer=none", str(source)]
    subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)


def main(runs: int) -> None:
    """Measure and print."""
    hello = Config().cache / "demo" / "hello"
    if not hello.exists():
        sys.exit("run `make demo` first: it makes the tree that is measured")
    times: dict[str, list[float]] = {"pkgci compile": [], "pkgci compile, from the store": [], "sbuild": []}
    for number in range(runs):
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            configuration = trees.config(place)
            (place / "artifacts").mkdir()
            parameters = trees.local(configuration, hello)
            made = []
            for name in list(times)[:2]:
                start = time.monotonic()
                made.append(compile(configuration, TARGET, parameters, place / "artifacts"))
                times[name].append(time.monotonic() - start)
            entry = Store(configuration).lookup(made[0].key)
            assert entry is not None
            assert [one.origin for one in made] == ["built", "store"]
            source = next(entry.directory.glob("*.dsc"))
            root = build_root(configuration, TARGET).path
            start = time.monotonic()
            sbuild(root, source, place)
            times["sbuild"].append(time.monotonic() - start)
        print(f"run {number + 1}: " + ", ".join(f"{name} {found[-1]:.1f} s" for name, found in times.items()))
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, median in medians.items():
        print(f"{name:32} {median:6.1f} s   {median / medians['sbuild']:.2f} of sbuild")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
