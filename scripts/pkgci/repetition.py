"""What a system test's record says so that the test can be repeated, and by what two runs of one differ.

Nothing is run here, and nothing is judged: who repeats a test is told the differences.
"""

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from pkgci import passed
from pkgci.artifacts import Systest, UsedSnapshot
from pkgci.command import run
from pkgci.config import ROOT, Config, Environment
from pkgci.errors import InfrastructureError, RequestError
from pkgci.source import ISOLATED
from pkgci.vm.machine import qemu_version
from pkgci.vm.snapshot import BASE, FrozenNode, Manifest, Snapshot

MANIFEST = "manifest.json"
# digits of a checksum that tell two from each other for a person
SHOWN = 12


def use(snapshot: Snapshot, artifacts: Path) -> UsedSnapshot:
    """Put the manifest of a snapshot into the artifacts, and return what the record says of it."""
    content = (snapshot.directory / MANIFEST).read_bytes()
    used = UsedSnapshot(
        name=snapshot.manifest.name,
        id=snapshot.id,
        key=snapshot.manifest.key,
        sha256=hashlib.sha256(content).hexdigest(),
    )
    (artifacts / used.manifest).parent.mkdir(parents=True, exist_ok=True)
    (artifacts / used.manifest).write_bytes(content)
    return used


def named(config: Config, sha256: str, names: Sequence[str], machines: int) -> Snapshot:
    """Return the snapshot of this host whose manifest has a checksum, be it that of a kept run, after a look at its files.

    Args:
        config: says where snapshots and kept runs are.
        sha256: the checksum.
        names: what it may be the snapshot of.
        machines: how many it must have.

    Raises:
        RequestError: there is none, or it is of something else.
        UnfitError: it is damaged, or does not fit this host's QEMU.
    """
    kept = config.data.glob(f"runs/[!.]*/*/{BASE}/{MANIFEST}")
    for path in (*config.data.glob(f"snapshots/*/*/{MANIFEST}"), *kept):
        with suppress(FileNotFoundError):
            if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
                # not by the name `latest`, which may lead elsewhere soon
                snapshot = Snapshot(path.parent.resolve())
                if snapshot.manifest.name not in names or len(snapshot.manifest.nodes) != machines:
                    raise RequestError(f"parameter SNAPSHOTS: {snapshot.id} is not one of {' or '.join(names)}")
                snapshot.verify()
                return snapshot
    raise RequestError(
        f"parameter SNAPSHOTS: this host has no snapshot whose manifest has the sha256 {sha256}; copy it here, or have one "
        "made from the configuration (REBUILD_SNAPSHOT=true, pkgci replicate --rebuild)"
    )


def tools() -> dict[str, str]:
    """Return the versions of what runs a system test.

    Raises:
        InfrastructureError: QEMU is missing.
    """
    versions = {name: metadata.version(name) for name in ("paramiko", "pydantic", "pytest")}
    own = " ".join(filter(None, [metadata.version("pkgci"), commit(ROOT)]))
    return {**versions, "pkgci": own, "python": platform.python_version(), "qemu": qemu_version()}


def commit(directory: Path) -> str:
    """Return the commit of the Git repository that a directory is in, with `-dirty` if files are changed; or nothing."""
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(InfrastructureError):
        # root's repository, read by another user
        said = run(["git", "-c", "safe.directory=*", "-C", directory, *describe], check=False, env=ISOLATED, quiet=True)
        return said.stdout.decode().strip()
    return ""


def digests(home: Path, environment: Environment, scenarios: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of the files of each scenario, by what SCENARIOS calls it.

    It is empty for a source package's own tests, and of a suite whose program lies elsewhere.
    """
    found = {}
    for spelled in scenarios:
        scenario = environment.scenarios.get(spelled.partition(":")[0])
        path = home / (scenario.path or scenario.command[0]) if scenario else None
        files = [] if path is None else passed.files(path) if path.is_dir() else [_content(home, path)]
        found[spelled] = _digest(files) if any(files) else ""
    return found


def _content(home: Path, path: Path) -> str:
    inside = path.is_file() and path.resolve().is_relative_to(home.resolve())
    return path.read_bytes().hex() if inside else ""


def described(environment: Environment) -> str:
    """Return the sha256 of an environment's description."""
    return _digest(environment.model_dump(mode="json"))


def _digest(made_from: object) -> str:
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def differences(
    there: Systest, here: Systest, manifests: Mapping[str, Manifest], own: Mapping[str, Manifest]
) -> Iterator[str]:
    """Yield a line for each difference between what two runs of a system test ran on.

    Args:
        there: the record of the first one.
        here: that of the second one.
        manifests: those of the first one's snapshots, by the sha256 that its record has of them.
        own: the same of the second one.
    """
    for one, other in zip(there.snapshots, here.snapshots, strict=False):
        if one.sha256 != other.sha256:
            yield from _of_snapshots(other.name, manifests[one.sha256], own[other.sha256])
    yield from _changed("package under test", *(_packages(record) for record in (there, here)))
    yield from _changed("files of the scenario", *(_short(record.scenarios) for record in (there, here)))
    if there.described != here.described:
        yield f"environment {here.environment} is described in another way"
    if there.scenarios != here.scenarios or there.described != here.described:
        yield from _changed("configuration", {"commit": there.commit}, {"commit": here.commit})
    yield from _changed("version of", there.tools, here.tools)
    yield from _changed("parameter", {"SEED": str(there.seed)}, {"SEED": str(here.seed)})


def _packages(record: Systest) -> dict[str, str]:
    return {f"{one.name} ({one.architecture})": f"{one.version} {one.sha256[:SHOWN]}" for one in record.packages}


def _short(digests: Mapping[str, str]) -> dict[str, str]:
    return {name: digest[:SHOWN] or "its own" for name, digest in digests.items()}


def _of_snapshots(name: str, there: Manifest, here: Manifest) -> Iterator[str]:
    """Yield what is in one snapshot and not in the other; that they were made apart is no difference by itself."""
    for what, one, other in (
        ("QEMU", there.qemu, here.qemu),
        ("accelerator", there.accelerator, here.accelerator),
        ("clock", there.clock, here.clock),
        ("number of machines", str(len(there.nodes)), str(len(here.nodes))),
    ):
        yield from _changed(f"snapshot of {name}:", {what: one}, {what: other})
    # a plain machine has another name than the one of an environment
    for node, other in zip(there.nodes, here.nodes, strict=False):
        yield from _changed(f"{other.name}:", _facts(there, node), _facts(here, other))
        yield from _changed(f"{other.name}: package", _installed(node), _installed(other))


def _facts(manifest: Manifest, node: FrozenNode) -> dict[str, str]:
    kernel = next((file.sha256 for file in manifest.files if file.name == f"{node.name}.kernel"), "")
    facts = {"image key": node.image, "memory": f"{node.memory_mib} MiB", "networks": " ".join(node.networks)}
    facts |= {"addresses": " ".join(node.addresses), "disks": str(1 + node.further_disks), "boot": node.boot or ""}
    return {**facts, "kernel": kernel[:SHOWN]}


def _installed(node: FrozenNode) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in node.packages:
        package, _, version = line.partition(" ")
        # several kernels may be installed
        found[package] = " ".join(filter(None, [found.get(package), version]))
    return found


def _changed(what: str, there: Mapping[str, str], here: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(there.keys() | here.keys()):
        one, other = there.get(name) or "none", here.get(name) or "none"
        if one != other:
            yield f"{what} {name}: {one} there, {other} here"
