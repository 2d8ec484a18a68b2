"""What it saves that install and system test of a build run at once: beside the same two by hand, one after the other.

Both are of one small package, on one machine, with the snapshots at hand. It is built once; of each run of the job `build`
after that only its tests count, from the start of the first to the end of the last.
"""

import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import trees
from table import Row, timed

from pkgci.artifacts import Build, Repository
from pkgci.engines.local import LocalEngine

TARGETS = ("bookworm-amd64", "debianrpm-amd64")
TESTS = ("install", "systest")


def rows(runs: int) -> Iterator[Row]:
    """Measure; in each run the tests are run by the flow and then by hand."""
    for target in TARGETS:
        at_once, in_turn = [], []
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            configuration = trees.config(place)
            trees.commit(place / "small", trees.deb() | trees.rpm())
            engine = LocalEngine(configuration)
            change = trees.local(configuration, place / "small").values
            given = {**change, "ONLY": ",".join(TESTS), "AGAIN": "true"}
            for number in range(runs + 1):
                seconds = _flow(engine, target, given)
                if number == 0:
                    # with the build itself, and with files that nobody has read yet
                    continue
                at_once.append(seconds)
                in_turn.append(sum(_by_hand(engine, target).values()))
                print(f"{target}: at once {at_once[-1]:.1f} s, in turn {in_turn[-1]:.1f} s", flush=True)
        yield Row(f"install and system test for {target}", "one after the other", at_once, in_turn, ratio=0.9)


def _flow(engine: LocalEngine, target: str, given: Mapping[str, str]) -> float:
    """Run the job `build`; return the seconds that its tests took."""
    _run(engine, f"build-{target}", given)
    records = [engine.record(engine.builds(f"{test}-{target}")[-1]) for test in TESTS]
    ends = [record.ended for record in records if record.ended]
    return (max(ends) - min(record.queued for record in records)).total_seconds()


def _by_hand(engine: LocalEngine, target: str) -> dict[str, float]:
    """Return the seconds of each test of the last build, started by itself."""
    build = engine.directory(engine.builds(f"build-{target}")[-1]) / "archive" / "artifacts"
    repository = Repository.read(build / f"publish-{target}" / "repository.json")
    key = Build.read(build / f"compile-{target}" / "build.json").key
    asked = {"REPOSITORIES": f"{repository.url}repository.json", "BUILD_KEY": key}
    return {test: timed(partial(_run, engine, f"{test}-{target}", asked)) for test in TESTS}


def _run(engine: LocalEngine, job: str, given: Mapping[str, str]) -> None:
    """Run a job to its end."""
    ref = engine.start(job, given)
    if engine.wait(ref) != "SUCCESS":
        raise SystemExit(f"{ref} does not pass: {b''.join(engine.log(ref)).decode()[-2000:]}")
