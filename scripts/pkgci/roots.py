"""The prepared roots, to build in and with tools for packages: made once per machine, used by every sandbox of a target.

A root is an uncompressed tar, made by mmdebstrap without privileges, cached under the key of all that it is made from
and made anew when it is older than `root_days`. Its identity is the digest of its content; that of a build root enters
every build's key.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from pkgci.command import run
from pkgci.config import ROOT, Config, Target
from pkgci.errors import InfrastructureError, RequestError
from pkgci.upstream import apt_sources, isolated_apt

log = logging.getLogger(__name__)

HOST_PROVIDES = Path(__file__).with_name("host-provides.sh")
RPM_MACROS = Path(__file__).with_name("formats") / "debianrpm.macros"
# what lints packages of both formats, and what runs a source package's own tests in a machine
TOOLS = ("autopkgtest", "lintian", "openssh-client", "rpm", "rpmlint", "socat")
# diffoscope, and what it reads the formats' packages and what is in them with
COMPARE = (
    "binutils",
    "bzip2",
    "cpio",
    "diffoscope-minimal",
    "file",
    "python3-rpm",
    "rpm2cpio",
    "xxd",
    "xz-utils",
    "zstd",
)
INCLUDE = {
    "deb": ("debhelper", "fakeroot"),
    "rpm": ("rpm", "dnf", "bzip2", "cpio", "debugedit", "elfutils", "file", "unzip", "zstd"),
}


@dataclass(frozen=True)
class Root:
    """A prepared root: its tar, and the sha256 of its content."""

    path: Path
    id: str


def build_root(config: Config, name: str) -> Root:
    """Return the build root of the target `name`; make it when it is not there or too old.

    Raises:
        RequestError: the target's base cannot be made.
        InfrastructureError: mmdebstrap failed.
    """
    return _prepared(config, name, _build_command)


def tools_root(config: Config, name: str) -> Root:
    """Return the root with the tools that read packages of the target `name`; targets of one base share it.

    Raises:
        RequestError: the target's base cannot be made.
        InfrastructureError: mmdebstrap failed.
    """
    return _prepared(config, name, _tools_command)


def comparison_root(config: Config, name: str) -> Root:
    """Return the root with diffoscope, for packages of the target `name`; it is of another target if that has no such tool.

    Raises:
        RequestError: no target has a Debian base.
        InfrastructureError: mmdebstrap failed.
    """
    names = [one for one in (name, *config.names("targets")) if config.target(one).base == "debian"]
    if not names:
        raise RequestError("no target has a Debian base, where diffoscope comes from")
    return _prepared(config, names[0], _comparison_command)


def _prepared(config: Config, name: str, command_of: Callable[[Target], list[str]]) -> Root:
    target = config.target(name)
    if target.base != "debian":
        raise RequestError(f"target {name}: base {target.base!r} is not supported yet; use `debian`")
    command = command_of(target)
    place = config.cache / "roots" / _key(target, command)
    root = _existing(place, config)
    if root:
        return root
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        root = _existing(place, config)
        if root is None:
            _remove_older(config, name)
            root = _make(name, target, command, place)
    return root


def _build_command(target: Target) -> list[str]:
    """Return the mmdebstrap command for a build root, without the place of the result and the sources."""
    command = _command("buildd", *INCLUDE[target.format], *target.root.packages)
    command += ["--dpkgopt=force-unsafe-io", '--customize-hook=chroot "$1" useradd -u 1000 -m -d /build builder']
    if target.format == "rpm":
        command += [f"--customize-hook=upload {HOST_PROVIDES} /root/host-provides.sh"]
        command += [f"--customize-hook=upload {RPM_MACROS} /usr/lib/rpm/macros.d/macros.debianrpm"]
        command += ['--customize-hook=chroot "$1" sh -eu /root/host-provides.sh']
    return [*command, target.base_codename or target.codename]


def _tools_command(target: Target) -> list[str]:
    """Return the mmdebstrap command for the root with the tools, likewise."""
    return [*_command("minbase", *TOOLS), "--dpkgopt=force-unsafe-io", target.base_codename or target.codename]


def _comparison_command(target: Target) -> list[str]:
    """Return the mmdebstrap command for the root with diffoscope, likewise."""
    return [*_command("minbase", *COMPARE), "--dpkgopt=force-unsafe-io", target.base_codename or target.codename]


def _command(variant: str, *packages: str) -> list[str]:
    include = ",".join(sorted(set(packages)))
    return ["mmdebstrap", "--mode=unshare", f"--variant={variant}", "--format=tar", f"--include={include}"]


def _key(target: Target, command: list[str]) -> str:
    version = run(["mmdebstrap", "--version"], quiet=True).stdout.decode().strip()
    uploaded = [path for path in (HOST_PROVIDES, RPM_MACROS) if any(str(path) in word for word in command)]
    scripts = [path.read_text() for path in uploaded]
    sources = [source.line() for source in apt_sources(target)]
    command = [word.replace(os.fspath(ROOT), "") for word in command]
    return hashlib.sha256(json.dumps([command, version, sources, scripts]).encode()).hexdigest()[:32]


def _existing(place: Path, config: Config) -> Root | None:
    try:
        made = json.loads((place / "root.json").read_text())
    except FileNotFoundError:
        return None
    if time.time() - made["made"] > config.settings.root_days * 86400:
        return None
    return Root(place / "root.tar", made["sha256"])


def _remove_older(config: Config, name: str) -> None:
    """Remove this target's roots that nobody can ask for any more."""
    for marker in (config.cache / "roots").glob("*/root.json"):
        made = json.loads(marker.read_text())
        if made["target"] == name and time.time() - made["made"] > config.settings.root_days * 86400:
            shutil.rmtree(marker.parent)


def _make(name: str, target: Target, command: list[str], place: Path) -> Root:
    log.info("preparing a root of %s (once; about half a minute)", name)
    shutil.rmtree(place, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{place.name}.", dir=place.parent) as directory:
        new = Path(directory, "root")
        new.mkdir()
        environment = isolated_apt(Path(directory)) | {"SOURCE_DATE_EPOCH": "0"}
        command = [*command, str(new / "root.tar"), *(source.line() for source in apt_sources(target))]
        done = run(command, env=environment, check=False, quiet=True)
        if done.returncode:
            said = done.stderr.decode(errors="replace")
            log.error("%s", said[-4000:])
            reason = [line for line in said.splitlines() if line.startswith("E:")] or said.splitlines() or ["no output"]
            raise InfrastructureError(f"cannot make a root of {name}: mmdebstrap: {reason[-1]}")
        digest = hashlib.sha256()
        with (new / "root.tar").open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
            os.fsync(stream.fileno())
        root = Root(place / "root.tar", digest.hexdigest())
        made = {"target": name, "sha256": root.id, "made": time.time()}
        (new / "root.json").write_text(json.dumps(made))
        new.rename(place)
    return root
