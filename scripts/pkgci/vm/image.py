"""Disk images: what a machine boots from. Made without privileges, once per machine, and cached.

Two stages: a plain system with a kernel, shared by all targets of one upstream (an RPM distribution's is one of the roots,
and has the target's packages already); and from it, for each target, a disk with the target's own packages, keys for ssh
made here, and everything switched off that would cost boot time.
"""

import hashlib
import json
import logging
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from pkgci.artifacts import Record
from pkgci.command import program_digest, run
from pkgci.config import Config, Limits, Target
from pkgci.errors import InfrastructureError, RequestError
from pkgci.lazy import Lazy
from pkgci.locks import make_once
from pkgci.roots import distribution_key, distribution_root, failure
from pkgci.sandbox import Files, execute, namespaces
from pkgci.upstream import apt_configuration, apt_sources

ed25519 = Lazy("cryptography.hazmat.primitives.asymmetric.ed25519")
serialization = Lazy("cryptography.hazmat.primitives.serialization")
log = logging.getLogger(__name__)

SCRIPT = Path(__file__).with_suffix(".sh")
HOST_PROVIDES = Path(__file__).parents[1] / "host-provides.sh"
# sparse, and so is what is made from it: only what is written takes space
DISK_MIB = 6144
LIMITS = Limits(seconds=900, processes=4096, disk_mib=2 * DISK_MIB, memory_mib=4096)
PLAIN = ("linux-image-cloud-amd64", "initramfs-tools", "lz4", "systemd", "systemd-sysv", "dbus", "udev", "kmod")
PLAIN += ("openssh-server", "iproute2")
FORMAT = {"deb": (), "rpm": ("rpm", "dnf")}
# the same of an RPM distribution, and what snapshots and tests use in the guest; by names that Fedora and its kin share
MACHINE = ("kernel", "dracut", "systemd", "openssh-server", "iproute", "e2fsprogs", "dnf", "shadow-utils")
MACHINE += ("coreutils", "diffutils", "findutils", "gawk", "grep", "sed", "tar", "util-linux", "/usr/bin/perl")
# the kernel's package makes the initrd: small, with what a machine of ours has, packed so that it unpacks fast
INITRD = r"""
mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"
printf 'MODULES=list\nCOMPRESS=lz4\nBUSYBOX=n\nFSTYPE=ext4\nRESUME=none\n' >"$1/etc/initramfs-tools/conf.d/pkgci.conf"
printf '%s\n' virtio_pci virtio_blk virtio_net ext4 crc32c_generic >"$1/usr/share/initramfs-tools/modules.d/pkgci"
"""
# a temporary directory of its own: whatever kills it, nothing is left that only sub-ids may remove
SCRATCH = 'mount --make-rprivate /; mount -t tmpfs -o mode=1777 tmpfs /tmp; cd /; "$@" 2>/tmp/log || { tail /tmp/log; exit 1; }'


class ImageRecord(Record):
    """`image.json`: what an image was made from (its key), and the guest's own ssh key."""

    key: str
    made: float
    host_key: str


@dataclass(frozen=True)
class Image:
    """An image: `disk` (qcow2), `kernel`, `initrd`, `identity` (the private key that logs in), all below `directory`."""

    directory: Path
    key: str
    host_key: str


def image_key(target: Target, build: Path | None = None) -> str:
    """Return the key of all that a target's image is made from.

    Args:
        target: the target.
        build: a script that is run in it as the last thing, with the directory that it lies in.

    Raises:
        RequestError: the target has no upstream, or the script cannot be read.
    """
    scripts = [Path(__file__).read_text(), _script(target), HOST_PROVIDES.read_text()]
    description = [target.format, target.machine.packages]
    own = [build.name, hashlib.sha256(directory_of(build)).hexdigest()] if build else []
    return _digest([_plain_key(target), description, scripts, program_digest("qemu-img"), *own])


def image(config: Config, target: Target, name: str, build: Path | None = None) -> Image:
    """Return the image of a target's machines; make it when it is not there or older than `root_days`.

    Args:
        config: says where images are kept, and how long.
        target: what it is made from.
        name: what messages call it.
        build: as of `image_key`.

    Raises:
        RequestError: see `image_key`.
        InfrastructureError: one of the tools failed.
    """
    key = image_key(target, build)

    def make(new: Path) -> None:
        log.info("%s: preparing the machine's disk (once; about a minute)", name)
        _make_disk(target, key, _plain(config, target, name), build, new)

    place = _cached(config, key, make, _has_record)
    record = ImageRecord.read(place / "image.json")
    return Image(place, key, record.host_key)


def directory_of(script: Path) -> bytes:
    """Return a tar archive of the directory of a script, the same whenever its content is.

    Raises:
        RequestError: there is no such script, or something beside it cannot be read.
    """
    if not script.is_file():
        raise RequestError(f"{script}: there is no such script; an environment names it")
    archive = BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in sorted(script.parent.rglob("*")):
            name = str(path.relative_to(script.parent))
            if path.is_dir() or "__pycache__" in name:
                continue
            info = tarfile.TarInfo(name)
            info.mode = 0o755 if os.access(path, os.X_OK) else 0o644
            try:
                content = path.read_bytes()
            except OSError as error:
                raise RequestError(f"{path}: cannot read: {error.strerror}") from error
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return archive.getvalue()


def _has_record(place: Path) -> bool:
    """Return whether an image has its record; a crash of the machine may have cut it short."""
    try:
        return bool(ImageRecord.read(place / "image.json"))
    except InfrastructureError:
        return False


def _script(target: Target) -> str:
    return SCRIPT.with_name(f"image-{target.base}.sh").read_text() + SCRIPT.read_text()


def _plain(config: Config, target: Target, name: str) -> Path:
    """Return the tar of the plain system that the target's image is made from."""
    if target.base == "rpm":
        return distribution_root(config, target, name, (*MACHINE, *target.machine.packages)).path
    return _cached(config, f"plain-{_plain_key(target)}", lambda place: _make_plain(target, place)) / "root.tar"


def _plain_key(target: Target) -> str:
    if target.base == "rpm":
        return distribution_key(target, (*MACHINE, *target.machine.packages))
    return _digest([[source.line() for source in apt_sources(target)], program_digest("mmdebstrap"), PLAIN, INITRD])


def _digest(made_from: object) -> str:
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]


def _cached(
    config: Config, key: str, make: Callable[[Path], None], whole: Callable[[Path], bool] = Path.exists
) -> Path:
    """Return the directory of `key`, made by `make` unless it is there, `whole` and young enough."""
    place = config.cache / "images" / key

    def young() -> bool:
        return whole(place) and abs(time.time() - place.stat().st_mtime) < config.settings.root_days * 86400

    make_once(place, young, make)
    return place


def _make_plain(target: Target, place: Path) -> None:
    """Make `place`/root.tar: Debian with a kernel and an ssh server, and apt's lists."""
    command = [*namespaces(network=True), "sh", "-euc", SCRATCH, "sh"]
    command += ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=tar", f"--include={','.join(PLAIN)}"]
    # the lists stay: a guest needs far longer to load them
    command += ["--skip=cleanup/apt/lists,cleanup/apt/cache", "--dpkgopt=force-unsafe-io"]
    command += [f"--aptopt={line}" for line in apt_configuration().splitlines() if line.startswith("Acquire::")]
    command += [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("man", "doc", "locale")]
    command += [f"--essential-hook={INITRD}", target.base_codename or target.codename, "-"]
    command += [source.line() for source in apt_sources(target)]
    root = place / "root.tar"
    # as a stream: in a private home, sub-ids cannot open a file
    with root.open("wb") as output:
        done = run(command, output=output, check=False, timeout=LIMITS.seconds, quiet=True)
    if done.returncode:
        raise failure("a machine's disk: mmdebstrap", root)


def _make_disk(target: Target, key: str, root: Path, build: Path | None, place: Path) -> None:
    """Make `place`/{disk,kernel,initrd,identity,image.json} from a plain root."""
    identity, host = ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()
    files = Files()
    files.add("/etc/ssh/ssh_host_ed25519_key", _private(host), 0o600)
    files.add("/etc/ssh/ssh_host_ed25519_key.pub", _public(host) + "\n")
    files.add("/root/.ssh/authorized_keys", _public(identity) + "\n", 0o600)
    files.add("/pkgci-host-provides", HOST_PROVIDES.read_text())
    if build:
        files.add("/pkgci-build.tar", directory_of(build))
    packages = (*FORMAT[target.format], *target.machine.packages) if target.base == "debian" else ()
    said = place / "image.log"
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        with said.open("wb") as log_to:
            outcome = execute(
                root,
                _script(target),
                arguments=(target.format, str(DISK_MIB), build.name if build else "", *packages),
                files=files,
                output=Path(scratch),
                limits=LIMITS,
                log_to=log_to,
                network=True,
            )
        if outcome.status:
            raise failure("a machine's disk: image.sh", said)
        for name in ("kernel", "initrd"):
            Path(scratch, name).rename(place / name)
        run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", Path(scratch, "disk"), place / "disk"], quiet=True)
    (place / "identity").touch(0o600)
    (place / "identity").write_bytes(_private(identity))
    for name in ("disk", "kernel", "initrd"):
        (place / name).chmod(0o444)
    ImageRecord(key=key, made=time.time(), host_key=_public(host)).write(place / "image.json")


def _private(key: "ed25519.Ed25519PrivateKey") -> bytes:
    form = serialization.PrivateFormat.OpenSSH
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _public(key: "ed25519.Ed25519PrivateKey") -> str:
    form = serialization.PublicFormat.OpenSSH
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, form).decode()
