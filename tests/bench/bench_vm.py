"""What restoring machines costs beside booting them, each until all let us in by ssh and their clocks are right."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from table import Row, timed

from pkgci.config import EMBEDDED, ROOT, Config
from pkgci.vm import guest
from pkgci.vm.image import image
from pkgci.vm.machine import Hardware, Machine
from pkgci.vm.proxy import Proxy
from pkgci.vm.remote import Access
from pkgci.vm.snapshot import AWAKE, RESTORE_SECONDS, Snapshot

TARGET = "bookworm-amd64"
BOOT_SECONDS = 600


def rows(runs: int) -> Iterator[Row]:
    """Measure; each run restores the plain machine of a target, and boots one of the same image."""
    config = Config(EMBEDDED)
    snapshot = guest.plain(config, TARGET)
    measured = [(_restored(config, snapshot), timed(lambda: _boot(config, snapshot))) for _ in range(runs)]
    ours, theirs = zip(*measured, strict=True)
    yield Row("a machine restored, until ssh", "booted", ours, theirs, ratio=0.1)
    product = Config(ROOT / "etc" / "reference")
    sets = [_deployed(product) for _ in range(runs)]
    ours, theirs = zip(*sets, strict=True)
    yield Row("the reference product restored, until ssh to all", "booted and deployed", ours, theirs, ratio=0.05)


def _deployed(config: Config) -> tuple[float, float]:
    """Return what restoring the reference product takes, and what its machines took to boot and be deployed just before."""
    snapshot = guest.environment(config, "depot", TARGET, anew=True)
    return _restored(config, snapshot), snapshot.manifest.seconds


def _restored(config: Config, snapshot: Snapshot) -> float:
    start = time.monotonic()
    with snapshot.restored(config, Proxy((), config.cache / "proxy")):
        return time.monotonic() - start


def _boot(config: Config, snapshot: Snapshot) -> None:
    origin = image(config, config.target(TARGET), TARGET)
    with TemporaryDirectory() as scratch:
        directory = Path(scratch)
        for name in ("kernel", "initrd"):
            (directory / name).symlink_to(origin.directory / name)
        for name in ("ram", "state"):
            (directory / name).touch()
        overlay = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", origin.directory / "disk", "-F", "qcow2"]
        subprocess.run([*overlay, directory / "disk"], check=True)
        hardware = Hardware(snapshot.manifest.accelerator, snapshot.manifest.nodes[0].memory_mib)
        access = Access(origin.directory / "identity", origin.host_key)
        with Machine(directory, hardware, access) as machine:
            machine.boot()
            machine.connect(BOOT_SECONDS)
            machine.run(AWAKE, f"{time.time():.3f}", timeout=RESTORE_SECONDS, input=b"x" * 256)
