"""`pkgci doctor`: what this machine lacks to run the jobs, and the command that mends each.

It looks and changes nothing.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml

from pkgci.buildhost import reach
from pkgci.command import run
from pkgci.config import ROOT, Config
from pkgci.engines.jenkins import JenkinsEngine
from pkgci.errors import PkgciError
from pkgci.released.key import ReleaseKey
from pkgci.review import account
from pkgci.sandbox import memory_control, namespaces, sub_ids
from pkgci.server import serve
from pkgci.upstream import apt_sources, rpm_repositories
from pkgci.zuul import claimed

# a command of each Debian package in bindep.txt that not every machine has
TOOLS = {
    "dnf": "dnf",
    "git": "git",
    "gpg": "gnupg",
    "gpgv": "gpgv",
    "ip": "iproute2",
    "mmdebstrap": "mmdebstrap",
    "newuidmap": "uidmap",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "rpm": "rpm",
    "rsync": "rsync",
    "socat": "socat",
    "ssh": "openssh-client",
    "zstd": "zstd",
}
FREE_GIB = 10
MEMORY = {
    "cgroup": "as a whole, by a cgroup",
    "systemd": "as a whole, by a scope of systemd",
    "process": "for each process by itself only: neither a cgroup nor a user's systemd is at hand",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: whether it is as it must be, and how to mend it."""

    what: str
    good: bool
    mend: str = ""

    def line(self) -> str:
        """Return it for a person."""
        return f"ok      {self.what}" if self.good else f"MISSING {self.what}; mend it: {self.mend}"


def examine(config: Config) -> Iterator[Finding]:
    """Look at everything that the jobs need on this machine."""
    yield from system()
    yield Finding(f"memory of a build is limited {MEMORY[memory_control()]}", True)
    yield from places(config)
    try:
        with serve(config):
            yield Finding(f"repositories can be served at {config.settings.url}", True)
    except (PkgciError, OSError) as error:
        yield Finding(f"serving at {config.settings.url}: {error}", False, "set `url` in config.yaml to another port")
    yield from _configured(config)


def system() -> Iterator[Finding]:
    """Look at what an administrator sets up."""
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    yield Finding(f"tools: {', '.join(missing) or 'all'}", not missing, f"sudo apt-get install {' '.join(missing)}")
    ids = sub_ids("subuid") is not None and sub_ids("subgid") is not None
    # it finds the first free range: two users must not share one
    yield Finding("a range of sub-ids for this user", ids, f"{ROOT / 'scripts' / 'setup.sh'}")
    if ids and not missing:
        done = run([*namespaces(network=False), "true"], check=False, quiet=True)
        allow = "sudo sysctl kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0"
        yield Finding("user namespaces", done.returncode == 0, allow)


def places(config: Config) -> Iterator[Finding]:
    """Look at the directories that everything is kept in."""
    for kind, place in (("cache", config.cache), ("state", config.state), ("data", config.data)):
        setting = f"set paths.{kind} in {config.directory / 'config.yaml'}"
        there = _existing(place)
        yield Finding(f"{kind} can be written: {place}", os.access(there, os.W_OK), setting)
        free = shutil.disk_usage(there).free >> 30
        yield Finding(f"disk space for {kind}: {free} GiB free", free >= FREE_GIB, setting)


def _configured(config: Config) -> Iterator[Finding]:
    """Hold the configuration's targets against the jobs', and look for their upstream."""
    entries = yaml.safe_load((ROOT / "jobs" / "targets.yaml").read_text())
    jobs = sorted(name for entry in entries for name in entry["project"]["target"])
    for name in config.names("targets"):
        try:
            target = config.target(name)
            config.build_host(name)
            distribution = target.base == "rpm"
            sources = rpm_repositories(target) if distribution else [source.suite for source in apt_sources(target)]
            yield Finding(f"upstream of {name}: {', '.join(sources)}", True)
        except PkgciError as error:
            yield Finding(f"target {name}", False, str(error))
    try:
        yield Finding(f"{len(config.targets())} targets, one independent of each codename", True)
    except PkgciError as error:
        yield Finding("targets as a whole", False, str(error))
    for name in config.settings.build_hosts:
        try:
            reach(config, name)
            yield Finding(f"build host {name} answers, with the same pkgci", True)
        except PkgciError as error:
            yield Finding(f"build host {name}", False, str(error))
    yield from _release_key(config)
    review = config.settings.review
    if review and Path(review.password_file).exists():
        try:
            yield Finding(f"{review.url} lets {account(config)} in, who comments on what could not be published", True)
        except PkgciError as error:
            yield Finding(f"review system: {error}", False, f"see `review` in {config.directory / 'config.yaml'}")
    yield from _jenkins(config)
    named = config.names("targets")
    mend = f"make {ROOT / 'jobs' / 'targets.yaml'} name what {config.directory / 'targets'} has: {', '.join(named)}"
    yield Finding(f"targets of the jobs: {', '.join(jobs)}", jobs == named, mend)
    if config.settings.zuul:
        definitions = ROOT / "zuul" / "zuul.d" / "jobs.yaml"
        listed = [entry["job"] for entry in yaml.safe_load(definitions.read_text())]
        there, wanted = next(job["branches"] for job in listed if "branches" in job), claimed(config)
        yield Finding(f"branches that Zuul votes on: {there}", there == wanted, f"make it {wanted} in {definitions}")


def _release_key(config: Config) -> Iterator[Finding]:
    """Look at the key of released repositories, on the machine that has it."""
    released = config.settings.released
    if released is None or not Path(released.gnupg_home).is_dir():
        return
    try:
        key = ReleaseKey(config, config.data / "released")
        warning, expires = key.warning(datetime.now(UTC)), key.expires
        key.detach_sign(b"")
        until = f"expires on {expires:%Y-%m-%d}" if expires else "never expires"
        yield Finding(warning or f"release key {key.fingerprint} signs, and {until}", not warning, warning)
    except PkgciError as error:
        yield Finding(f"release key: {error}", False, f"import it into {released.gnupg_home}, or unlock its gpg-agent")


def _jenkins(config: Config) -> Iterator[Finding]:
    """Look at the server of the engine `jenkins`, on a machine that has the account's token."""
    settings = config.settings.jenkins
    if settings is None or not Path(settings.token_file).exists():
        return
    try:
        there = JenkinsEngine(config).jobs()
        yield Finding(
            f"{settings.url} lets {settings.user} in: {len(there)} of our jobs", bool(there), "make jobs-update"
        )
    except PkgciError as error:
        yield Finding(f"Jenkins: {error}", False, f"see `jenkins` in {config.directory / 'config.yaml'}")


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
