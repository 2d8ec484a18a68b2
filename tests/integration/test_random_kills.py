"""Any process of the pipeline may be killed at any moment: nothing is left behind, no result is wrong, the next run succeeds.

The pipeline runs in a process namespace of its own, so that every process in it is the pipeline's, wherever it went.
`make soak` repeats it a hundred times.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trees

from pkgci.artifacts import Build, Result
from pkgci.config import Config
from pkgci.engines.local import BuildRecord, LocalEngine
from pkgci.errors import InfrastructureError
from pkgci.store import Store

KILLS = int(os.environ.get("PKGCI_KILLS", "2"))
TARGET = "bookworm-amd64"
SECONDS_AFTER = 120  # what a killed build may need until all of its processes are gone


@pytest.mark.skipif(
    os.getuid() != 0, reason="a process namespace takes root; an ordinary user's runs are in test_hostile"
)
def test_whatever_process_is_killed_nothing_is_left_and_the_next_run_succeeds(tmp_path: Path):
    configuration = trees.config(tmp_path)
    trees.commit(tmp_path / "small", trees.deb())
    seed = os.environ.get("PKGCI_SEED", str(random.randrange(1 << 32)))
    program = ["sh", "-c", '"$@"', "sh", sys.executable, __file__, configuration.directory, tmp_path / "small", seed]
    namespace = ["unshare", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child"]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(Path(trees.__file__).parent)}
    done = subprocess.run([*namespace, *program], env=environment, check=False, timeout=900 + 300 * KILLS)
    assert done.returncode == 0, f"seed {seed}; see the output"


def processes() -> dict[int, str]:
    """Return the living processes of this namespace but its first, this one and kernel threads, by their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in (1, os.getpid()):
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command:
                    found[int(entry.name)] = command
    return found


def until(condition, what: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: {processes()}"
        time.sleep(0.1)


def run(configuration: Config, tree: Path, number: int, kill_after: float | None) -> tuple[BuildRecord, float, bool]:
    """Run the pipeline on a new change; kill one process of it on the way.

    Returns the build, its seconds, and whether what was killed was in a sandbox: there it looks as if the package did it.
    """
    trees.commit(tree, {"number": f"{number}\n"})
    engine = LocalEngine(configuration)
    started, inside = time.monotonic(), False
    ref = engine.start(f"build-{TARGET}", trees.local(configuration, tree).values)
    if kill_after is not None:
        engine.wait(ref, kill_after)
        alive = processes()
        if alive:
            victim = random.choice(sorted(alive))
            print(f"{number}: after {kill_after:.1f} s of {len(alive)}: {alive[victim][:100]}", flush=True)
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                inside = Path(f"/proc/{victim}").stat().st_uid != os.getuid()
                os.kill(victim, signal.SIGKILL)
    until(lambda: not engine.record(ref).alive, "the build does not end", 3600)
    return engine.record(ref), time.monotonic() - started, inside


def artifacts(configuration: Config, record: BuildRecord) -> Path:
    """Return what a build left."""
    return configuration.state / "jobs" / record.job / "builds" / str(record.number) / "archive" / "artifacts"


def said(configuration: Config, record: BuildRecord) -> str:
    """Return what is said of a build: by itself, or, where it could not, by the engine."""
    try:
        result = Result.read(artifacts(configuration, record) / "result.json")
    except InfrastructureError:
        return f"{record.state} {record.reason}"
    return f"{record.state} ({result.fault}) {result.reason}"


def check(configuration: Config, record: BuildRecord, mounts: str) -> None:
    """Check that nothing is left, and that what is said of the build is so."""
    until(lambda: not processes(), "processes are left", SECONDS_AFTER)
    assert Path("/proc/self/mounts").read_text() == mounts
    engine = LocalEngine(configuration)
    for job in engine.jobs():
        assert not any(engine.record(ref).alive for ref in engine.builds(job))
    store = Store(configuration)
    for entry in store.directory.glob("[0-9a-f][0-9a-f]/*"):
        assert store.lookup(entry.name), f"{entry} is damaged"
    top = artifacts(configuration, record)
    if record.state == "SUCCESS":
        assert Result.read(top / "result.json").result == "SUCCESS"
        assert store.lookup(Build.read(top / f"compile-{TARGET}" / "build.json").key)


def main(directory: str, tree: str, seed: str) -> None:
    """Kill, check, and run again, KILLS times."""
    random.seed(int(seed))
    print(f"seed {seed}", flush=True)
    configuration, mounts = Config(Path(directory)), Path("/proc/self/mounts").read_text()
    temporary = Path(os.environ["TMPDIR"])
    record, seconds, _ = run(configuration, Path(tree), 0, None)
    assert record.state == "SUCCESS", record
    for number in range(1, 2 * KILLS, 2):
        killed, _, inside = run(configuration, Path(tree), number, random.uniform(0, seconds))
        reason = said(configuration, killed)
        print(f"{number}: {reason}", flush=True)
        assert inside or "(package)" not in reason
        check(configuration, killed, mounts)
        record, seconds, _ = run(configuration, Path(tree), number + 1, None)
        assert record.state == "SUCCESS", record
        check(configuration, record, mounts)
        left = {str(path): path.stat().st_mtime for path in temporary.rglob("*")}
        assert not left, f"now is {time.time()}: {left}"


if __name__ == "__main__":
    main(*sys.argv[1:])
