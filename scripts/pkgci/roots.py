"""The prepared roots, to build in and with tools for packages: made once per machine, used by every sandbox of a target.

A root is an uncompressed tar, made without privileges, cached under the key of all that it is made from and made anew
when it is older than `root_days`. Its identity is the digest of its content; that of a build root enters every build's
key.

Debian's are made by mmdebstrap. An RPM distribution's are made by dnf in a sandbox, in two steps as mock has them: with
Debian's dnf a small root, good for nothing but running the distribution's own dnf, and with that one the root. So the
database in it, and what its packages' scripts did, are its own rpm's.
"""

import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pkgci.command import program_digest, run
from pkgci.config import ROOT, Config, Limits, Target, Upstream
from pkgci.errors import InfrastructureError
from pkgci.locks import make_once
from pkgci.sandbox import Files, execute
from pkgci.upstream import apt_sources, dnf_files, isolated_apt

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
    "rpm": ("rpm", "dnf", "bzip2", "cpio", "createrepo-c", "debugedit", "elfutils", "file", "unzip", "zstd"),
}
# what begins an RPM distribution's roots: of Debian, then of the distribution
DNF = ("ca-certificates", "dnf", "rpm")
SMALL = ("ca-certificates", "coreutils", "dnf", "tar", "util-linux")
# What Fedora and its kin build in, by the names that they have in common, and what the scripts in formats/ use. What only
# one of them has (the package of its release, that of its macros) is the target's to say.
BUILD = ("bash", "bzip2", "ca-certificates", "coreutils", "cpio", "createrepo_c", "diffutils", "dnf", "file")
BUILD += ("findutils", "gawk", "grep", "gzip", "patch", "perl(JSON::PP)", "rpm-build", "sed", "shadow-utils")
BUILD += ("tar", "unzip", "util-linux", "which", "xz", "zstd")
SCRIPT = Path(__file__).with_suffix(".sh")
LIMITS = Limits(seconds=1800, processes=4096, disk_mib=12288, memory_mib=4096)


@dataclass(frozen=True)
class Root:
    """A prepared root: its tar, and the sha256 of its content."""

    path: Path
    id: str


def build_root(config: Config, name: str) -> Root:
    """Return the build root of the target `name`; make it when it is not there or too old.

    Raises:
        RequestError: the target is unknown, or this machine's apt has no source for it.
        InfrastructureError: mmdebstrap or dnf failed.
    """
    target = config.target(name)
    if target.base == "rpm":
        return distribution_root(config, target, name, (*BUILD, *target.root.packages), user="builder")
    return _debian_root(config, name, target, _build_command(target))


def tools_root(config: Config, name: str) -> Root:
    """Return the root with the tools that read packages of the target `name`; targets of one base share it.

    Those for an RPM distribution's packages are of this machine's own Debian.

    Raises:
        RequestError: the target is unknown, or this machine's apt has no source for it.
        InfrastructureError: mmdebstrap failed.
    """
    base = _debian_base(config.target(name))
    return _debian_root(config, name, base, _tools_command(base))


def has_tools_root(config: Config, name: str) -> bool:
    """Return whether the root of `tools_root` is there, and young enough."""
    base = _debian_base(config.target(name))
    return _existing(config.cache / "roots" / _debian_key(base, _tools_command(base)), config) is not None


def comparison_root(config: Config, name: str) -> Root:
    """Return the root with diffoscope, for packages of the target `name`; see `tools_root`."""
    base = _debian_base(config.target(name))
    return _debian_root(config, name, base, _comparison_command(base))


def dnf_root(config: Config) -> Root:
    """Return the root of this machine's own Debian release that begins those of RPM distributions; make it if needed.

    Raises:
        RequestError: this machine's apt has no source for its own release.
        InfrastructureError: mmdebstrap failed.
    """
    own = _own_debian()
    return _debian_root(config, "dnf", own, _dnf_command(own))


def distribution_root(config: Config, target: Target, name: str, packages: Sequence[str], user: str = "") -> Root:
    """Return a root of a target's RPM distribution; make it when it is not there or too old.

    Args:
        config: says where roots are kept, and how long.
        target: names the distribution; its base is `rpm`.
        name: what messages call it.
        packages: names, or other capabilities, of what is in the root beside all that these need.
        user: a user whom the root gets: uid 1000, at home in /build.

    Raises:
        InfrastructureError: dnf failed: a package is not there, a repository cannot be read, a signature is not good.
    """

    def make_small(new: Path) -> None:
        _install(name, target, dnf_root(config), SMALL, "", new)

    def make(new: Path) -> None:
        small = _prepared(config, name, distribution_key(target, SMALL), make_small)
        _install(name, target, small, packages, user, new)

    return _prepared(config, name, distribution_key(target, packages, user), make)


def distribution_key(target: Target, packages: Sequence[str], user: str = "") -> str:
    """Return the key of all that a root of an RPM distribution is made from; see `distribution_root`."""
    own = _own_debian()
    begun = [_debian_key(own, _dnf_command(own)), SCRIPT.read_text(), dnf_files(target)]
    return _digest([*begun, target.base_codename or target.codename, list(packages), user])


def failure(what: str, said: Path) -> InfrastructureError:
    """Return the error of a tool that should make `what`, and whose last words are the end of the file `said`."""
    with said.open("rb") as stream:
        stream.seek(max(0, said.stat().st_size - 4000))
        text = stream.read().decode(errors="replace")
    log.error("%s", text)
    lines = text.strip().splitlines() or ["no output"]
    errors = [line for line in lines if line.startswith(("E:", "error:", "Error:"))] or lines
    return InfrastructureError(f"cannot make {what}: {errors[-1]}")


def _debian_root(config: Config, name: str, target: Target, command: list[str]) -> Root:
    """Return the root that mmdebstrap makes by `command`, of the Debian that `target` names."""

    def make(new: Path) -> None:
        log.info("preparing a root of %s (once; about half a minute)", name)
        said = new / "log"
        environment = isolated_apt(new) | {"SOURCE_DATE_EPOCH": "0"}
        words = [*command, str(new / "root.tar"), *(source.line() for source in apt_sources(target))]
        with said.open("wb") as output:
            done = run(words, env=environment, check=False, quiet=True, output=output)
        if done.returncode:
            raise failure(f"a root of {name}: mmdebstrap", said)

    return _prepared(config, name, _debian_key(target, command), make)


def _prepared(config: Config, name: str, key: str, make: Callable[[Path], None]) -> Root:
    """Return the root of `key`; when there is none or it is too old, `make` writes root.tar into a new directory.

    What else `make` leaves in that directory is removed.
    """
    place = config.cache / "roots" / key

    def make_whole(new: Path) -> None:
        _remove_older(config, name)
        with tempfile.TemporaryDirectory(dir=new) as scratch:
            make(Path(scratch))
            Path(scratch, "root.tar").rename(new / "root.tar")
        with (new / "root.tar").open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        (new / "root.json").write_text(json.dumps({"target": name, "sha256": digest, "made": time.time()}))

    make_once(place, lambda: _existing(place, config) is not None, make_whole)
    root = _existing(place, config)
    assert root
    return root


def _build_command(target: Target) -> list[str]:
    """Return the mmdebstrap command for a build root, without the place of the result and the sources."""
    command = _command("buildd", *INCLUDE[target.format], *target.root.packages)
    command += ["--dpkgopt=force-unsafe-io", '--customize-hook=chroot "$1" useradd -u 1000 -m -d /build builder']
    if target.format == "rpm":
        command += [f"--customize-hook=upload {shlex.quote(str(HOST_PROVIDES))} /root/host-provides.sh"]
        command += [f"--customize-hook=upload {shlex.quote(str(RPM_MACROS))} /usr/lib/rpm/macros.d/macros.debianrpm"]
        command += ['--customize-hook=chroot "$1" sh -eu /root/host-provides.sh']
    return [*command, target.base_codename or target.codename]


def _tools_command(target: Target) -> list[str]:
    """Return the mmdebstrap command for the root with the tools, likewise."""
    return [*_command("minbase", *TOOLS), "--dpkgopt=force-unsafe-io", target.base_codename or target.codename]


def _command(variant: str, *packages: str) -> list[str]:
    include = ",".join(sorted(set(packages)))
    return ["mmdebstrap", "--mode=unshare", f"--variant={variant}", "--format=tar", f"--include={include}"]


def _comparison_command(target: Target) -> list[str]:
    """Return the mmdebstrap command for the root with diffoscope, likewise."""
    return [*_command("minbase", *COMPARE), "--dpkgopt=force-unsafe-io", target.base_codename or target.codename]


def _dnf_command(target: Target) -> list[str]:
    """Return the mmdebstrap command for the root that begins an RPM distribution's, likewise."""
    return [*_command("minbase", *DNF), "--dpkgopt=force-unsafe-io", target.codename]


def _debian_base(target: Target) -> Target:
    """Return what names the Debian that tools for a target's packages come from."""
    return target if target.base == "debian" else _own_debian()


def _own_debian() -> Target:
    """Return a target that stands for this machine's own release of Debian."""
    codename = platform.freedesktop_os_release()["VERSION_CODENAME"]
    upstream = Upstream(machine=True, suites=(codename, f"{codename}-updates", f"{codename}-security"))
    return Target(format="deb", codename=codename, architecture="amd64", tag="own", upstream=upstream)


def _debian_key(target: Target, command: list[str]) -> str:
    uploaded = [path for path in (HOST_PROVIDES, RPM_MACROS) if any(str(path) in word for word in command)]
    scripts = [path.read_text() for path in uploaded]
    sources = [source.line() for source in apt_sources(target)]
    words = [word.replace(os.fspath(ROOT), "") for word in command]
    return _digest([words, program_digest("mmdebstrap"), sources, scripts])


def _digest(made_from: object) -> str:
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]


def _existing(place: Path, config: Config) -> Root | None:
    made = _made(place / "root.json")
    return Root(place / "root.tar", made["sha256"]) if made and not _old(made, config) else None


def _made(record: Path) -> dict | None:
    """Return what is recorded of a root, or None: it is not there, or a crash of the machine cut it short."""
    try:
        return json.loads(record.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _old(made: dict, config: Config) -> bool:
    """Return whether a root is too old, or was made by a clock that was far ahead."""
    return abs(time.time() - made["made"]) > config.settings.root_days * 86400


def _remove_older(config: Config, name: str) -> None:
    """Remove this target's roots that nobody can ask for any more."""
    for marker in (config.cache / "roots").glob("*/root.json"):
        made = _made(marker)
        if made and made["target"] == name and _old(made, config):
            shutil.rmtree(marker.parent)


def _install(name: str, target: Target, tools: Root, packages: Sequence[str], user: str, new: Path) -> None:
    """Make `new`/root.tar of a target's RPM distribution, by dnf in a sandbox over the root `tools`."""
    log.info("preparing a root of %s with %s and %d more packages (once)", name, packages[0], len(packages) - 1)
    files = Files()
    for path, text in dnf_files(target).items():
        files.add(path, text)
    said = new / "log"
    with said.open("wb") as log_to:
        outcome = execute(
            tools.path,
            SCRIPT.read_text(),
            arguments=(target.base_codename or target.codename, user, *packages),
            files=files,
            output=new,
            limits=LIMITS,
            log_to=log_to,
            network=True,
        )
    if outcome.status:
        raise failure(f"a root of {name}: dnf", said)
