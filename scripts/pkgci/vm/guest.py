"""What install and system tests do with a guest: the plain machine that packages are tried in, and its package sources.

The shell that runs in the guest is `guest.sh`, with `guest-deb.sh` or `guest-rpm.sh` for what differs.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pkgci.artifacts import Repository, RepositoryPackage
from pkgci.config import Config, MachineSection, Node, Target
from pkgci.errors import InfrastructureError
from pkgci.formats import repomd
from pkgci.keys import dearmoured
from pkgci.upstream import digest
from pkgci.vm.proxy import Proxy, Rule
from pkgci.vm.snapshot import Plan, Planned, Snapshot, Step, UnfitError, ensure, upstream_rules

# the one machine of an install test
PLAIN = "node"
HERE = Path(__file__).parent


class OutdatedError(InfrastructureError):
    """The machines of an environment were frozen by another version of QEMU: they have to be prepared anew."""

    def __init__(self, environment: str, reason: str) -> None:
        super().__init__(f"environment {environment}: {reason}; it has to be prepared anew")
        self.environment = environment


def plain(config: Config, target_name: str, renew: bool = False, anew: bool = False) -> Snapshot:
    """Return the snapshot of the plain machine of a target; make it where needed, see `ensure`.

    Raises:
        RequestError: the target is unknown, or its base is not supported.
        InfrastructureError: it cannot be made.
    """
    return ensure(config, plain_plan(config, target_name), renew, anew)


def plain_plan(config: Config, target_name: str) -> Plan:
    """Return what the plain machine of a target is made from.

    Raises:
        RequestError: the target is unknown, or its base is not supported.
    """
    return Plan(target_name, {PLAIN: Planned(config.target(target_name))}, setup(config.target(target_name)))


def environment(config: Config, name: str, target_name: str, renew: bool = False, anew: bool = False) -> Snapshot:
    """Return the snapshot of the machines of an environment; make it where needed.

    One machine that does not differ from the target's plain machine is that one.

    Args:
        config: the configuration.
        name: the environment's name.
        target_name: the target.
        renew: as of `ensure`.
        anew: as of `ensure`.

    Raises:
        RequestError: the environment or the target is unknown, a script of it cannot be read, or the base is not supported.
        InfrastructureError: it cannot be made.
    """
    return ensure(config, environment_plan(config, name, target_name), renew, anew)


def environment_plan(config: Config, name: str, target_name: str) -> Plan:
    """Return what the machines of an environment are made from; see `environment`.

    Raises:
        RequestError: the environment or the target is unknown.
    """
    home, described = config.environment(name)
    target = config.target(target_name)
    addresses = described.addresses()
    nodes = {
        node: Planned(
            target.model_copy(update={"machine": _machine(target, one)}),
            addresses[node],
            home / one.build if one.build else None,
            one.boot,
            one.disks,
        )
        for node, one in described.nodes.items()
    }
    (first, *others) = nodes.values()
    alike = first == Planned(target) and described.clock == "host"
    if alike and not (others or described.deploy or described.health):
        return plain_plan(config, target_name)
    deploy, health = (
        tuple(Step(step.node, home / step.script, step.seconds) for step in steps)
        for steps in (described.deploy, described.health)
    )
    return Plan(_set_name(name, target_name), nodes, setup(target), deploy, health, described.clock)


def check_qemu(config: Config, name: str, target_name: str) -> None:
    """Check that the machines of an environment, if they are several, were frozen by the QEMU that is here.

    One machine is made anew within a test; to deploy a product there would take longer than a test is waited for.

    Raises:
        OutdatedError: they were not.
    """
    latest = config.data / "snapshots" / _set_name(name, target_name) / "latest"
    if len(config.environment(name)[1].nodes) == 1 or not latest.exists():
        return
    # one that cannot even be read is damaged, which is another matter
    with suppress(UnfitError):
        snapshot = Snapshot(latest.resolve())
        try:
            snapshot.check_qemu()
        except UnfitError as error:
            raise OutdatedError(name, str(error)) from error


def names(config: Config) -> set[str]:
    """Return what the snapshots of the plain machines and environments of a configuration are called.

    Raises:
        RequestError: an environment cannot be read.
    """
    targets = config.names("targets")
    found = set(targets)
    for name in {*config.names("environments"), "default"}:
        found |= {_set_name(name, target) for target in config.environment(name)[1].targets or targets}
    return found


def _set_name(name: str, target_name: str) -> str:
    # the sign is in no name of a target
    return f"{name}@{target_name}"


def _machine(target: Target, described: Node) -> MachineSection:
    """Return the target's machine, with what an environment says of one of its own."""
    return MachineSection(
        packages=tuple(dict.fromkeys((*target.machine.packages, *described.packages))),
        memory_mib=described.memory_mib or target.machine.memory_mib,
    )


def setup(target: Target) -> str:
    """Return the script that prepares a guest before it is frozen."""
    return f"set -- baseline\n{script(target)}"


def script(target: Target) -> str:
    """Return the guest's script; `guest.sh` says how it is called."""
    return (HERE / f"guest-{target.format}.sh").read_text() + (HERE / "guest.sh").read_text()


def proxy(config: Config, target: Target, records: Sequence[Repository]) -> Proxy:
    """Return what a guest may reach: the repositories, and the upstream where that has packages of their format."""
    rules = upstream_rules(target) if _has_upstream(target) else ()
    return Proxy((*(Rule(record.url) for record in records), *rules), config.cache / "proxy")


def upstream_digest(target: Target) -> str:
    """Return one digest of the indexes of the upstream that a guest may reach, as they are now.

    Raises:
        InfrastructureError: one of them cannot be read.
    """
    return digest(target) if _has_upstream(target) else ""


def _has_upstream(target: Target) -> bool:
    """Return whether the upstream has packages of the target's format."""
    return target.format == "deb" or target.base == "rpm"


def settings(target: Target, records: Sequence[Repository], tested: Sequence[RepositoryPackage]) -> dict[str, bytes]:
    """Return the files that make the guest's package manager prefer the repositories, and `tested` in them, to all else.

    Args:
        target: the target.
        records: the repositories.
        tested: the packages under test.
    """
    return _deb_settings(records, tested) if target.format == "deb" else _rpm_settings(records, tested)


def _deb_settings(records: Sequence[Repository], tested: Sequence[RepositoryPackage]) -> dict[str, bytes]:
    """Return the guest's files for apt: sources with their keys, and preferences (apt_preferences(5)).

    Above 1000 a version is taken though a higher one is installed or at the upstream: what is tested before all.
    """
    files, sources, preferences = {}, [], []
    for number, record in enumerate(records):
        # binary: apt takes seconds to read an armoured key in an emulated machine
        key = f"/etc/apt/pkgci-{number}.gpg"
        files[key] = dearmoured(record.signing_key)
        fields = {"Types": "deb", "URIs": record.url, "Suites": record.codename, "Components": record.component}
        sources.append("".join(f"{name}: {value}\n" for name, value in {**fields, "Signed-By": key}.items()))
    for package in [package for record in records for package in record.packages]:
        priority = 1002 if package in tested else 1001
        preferences.append(f"Package: {package.name}\nPin: version {package.version}\nPin-Priority: {priority}\n")
    for directory in ("pkgci.d", "sources.list.d"):
        files[f"/etc/apt/{directory}/pkgci.sources"] = "\n".join(sources).encode()
    files["/etc/apt/preferences.d/pkgci"] = "\n".join(preferences).encode()
    return files


def _rpm_settings(records: Sequence[Repository], tested: Sequence[RepositoryPackage]) -> dict[str, bytes]:
    """Return the guest's files for dnf. The signed index vouches for the packages by their checksums.

    The lowest priority is taken first, whatever the versions (dnf.conf(5)).
    """
    files = {}
    for number, record in enumerate(records):
        name, key = f"pkgci-{number}", f"/etc/pki/rpm-gpg/pkgci-{number}.asc"
        priority = 1 + record.rank(tested)
        files[key] = record.signing_key.encode()
        lines = [f"[{name}]", f"name={name}", repomd.location(record), "enabled=1", f"priority={priority}"]
        lines += ["gpgcheck=0", "repo_gpgcheck=1", f"gpgkey=file://{key}"]
        files[f"/etc/yum.repos.d/{name}.repo"] = "\n".join([*lines, ""]).encode()
    return files
