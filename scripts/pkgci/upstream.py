"""The operating system's package repositories that builds and machines of a target see.

Debian's mirror is the one that this machine's own apt already uses, unless the target names others; an RPM
distribution's are named by the target: no address of a mirror stands in this repository.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pkgci import web
from pkgci.command import run
from pkgci.config import EMBEDDED, Config, Target
from pkgci.errors import RequestError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
INDEX_BYTES = 16 << 20


@dataclass(frozen=True)
class Source:
    """One APT source: what a line `deb URI SUITE COMPONENT...` of sources.list(5) says."""

    uri: str
    suite: str
    components: tuple[str, ...]

    def line(self) -> str:
        """Return the line of sources.list(5)."""
        return f"deb [signed-by={KEYRING}] {self.uri} {self.suite} {' '.join(self.components)}"

    @property
    def release_url(self) -> str:
        """The URL of the suite's InRelease file."""
        return f"{self.uri.rstrip('/')}/dists/{self.suite}/InRelease"


def apt_sources(target: Target) -> tuple[Source, ...]:
    """Return the upstream APT sources of a target whose base is Debian.

    Raises:
        RequestError: this machine's apt has no source for the target's codename.
    """
    if not target.upstream.machine:
        words = [line.split() for line in target.upstream.repositories]
        return tuple(Source(uri, suite, tuple(components)) for uri, suite, *components in words)
    codename = target.base_codename or target.codename
    suites = target.upstream.suites or (codename,)
    found: dict[tuple[str, str], list[str]] = {}
    for line in _machine_sources():
        uri, suite, component, *origin = line.split(" ", 3)
        # before the first `apt-get update` the origin is not known yet; a third party's is, or its key is refused
        if suite in suites and (not origin or origin[0] in ("", "Debian", "$(ORIGIN)")):
            components = found.setdefault((uri, suite), [])
            if component not in components:
                components.append(component)
    if not any(suite == codename for _, suite in found):
        raise RequestError(
            f"this machine's apt has no source for {codename}; name the upstream's repositories in the target"
        )
    return tuple(Source(uri, suite, tuple(components)) for (uri, suite), components in sorted(found.items()))


@cache
def _machine_sources() -> tuple[str, ...]:
    """Return this machine's APT sources, a line `URI SUITE COMPONENT ORIGIN` each; see apt-get(8), indextargets."""
    fields = "$(REPO_URI) $(RELEASE) $(COMPONENT) $(ORIGIN)"
    # apt reads all package lists for it; where this machine keeps no cache of them, that takes a while each time
    place = Config(EMBEDDED).cache / "apt"
    place.mkdir(parents=True, exist_ok=True)
    options = [f"-oDir::Cache::pkgcache={place / 'pkgcache.bin'}", "-oDir::Cache::srcpkgcache="]
    listed = run(["apt-get", *options, "indextargets", "--format", fields, "Created-By: Packages"], quiet=True).stdout
    return tuple(listed.decode().splitlines())


def apt_configuration() -> str:
    """Return apt.conf(5) text for a private apt: this machine's own `Acquire::*` settings and none of its hooks."""
    dump = run(["apt-config", "dump"], quiet=True).stdout.decode()
    kept = [
        line
        for line in dump.splitlines()
        if line.startswith("Acquire::") and not line.startswith(("Acquire::IndexTargets", "Acquire::Languages"))
    ]
    own = ['Acquire::Languages "none";', 'Acquire::Retries "3";', 'APT::Install-Recommends "false";']
    own += ['APT::Sandbox::User "root";', 'DPkg::Options { "--force-unsafe-io"; };']
    return "\n".join([*kept, *own, ""])


def isolated_apt(directory: Path) -> dict[str, str]:
    """Write a private apt configuration into `directory`; return the environment that makes tools there use it."""
    path = directory / "apt.conf"
    isolation = 'Dir::Etc::parts "/dev/null";\nDir::Etc::sourceparts "/dev/null";\n'
    path.write_text(apt_configuration() + isolation)
    return {"APT_CONFIG": os.fspath(path)}


def rpm_repositories(target: Target) -> tuple[str, ...]:
    """Return the upstream's base URLs, each with a slash at its end, of a target whose base is an RPM distribution."""
    return tuple(url.rstrip("/") + "/" for url in target.upstream.repositories)


def dnf_files(target: Target) -> dict[str, str]:
    """Return the files, by their absolute paths, with which dnf reads the upstream of an RPM distribution (dnf.conf(5)).

    The URLs stand in lists of mirrors: what dnf keeps of a repository is named after the list, so that it is found again
    in a machine that asks for the same by another scheme. Keys are imported from nowhere else.
    """
    files, lines = {}, []
    for number, key in enumerate(target.upstream.keys):
        files[f"/etc/pki/pkgci/upstream-{number}.asc"] = key
    keys = " ".join(f"file://{path}" for path in files)
    for number, url in enumerate(rpm_repositories(target)):
        mirrors = f"/etc/pki/pkgci/upstream-{number}.mirrors"
        files[mirrors] = f"{url}\n"
        lines += [f"[upstream-{number}]", f"name=upstream {number}", f"mirrorlist=file://{mirrors}", f"gpgkey={keys}"]
        lines += ["enabled=1", "gpgcheck=1", f"repo_gpgcheck={int(target.upstream.index_signed)}"]
        # some distributions' dnf would go on without one that it cannot read or verify
        lines += ["skip_if_unavailable=0", "metadata_expire=-1", ""]
    return {**files, "/etc/yum.repos.d/upstream.repo": "\n".join(lines)}


def digest(target: Target) -> str:
    """Return one digest of the indexes of all that roots and machines of a target are made from, as they are now.

    Raises:
        RequestError: this machine's apt has no source for the target's codename.
        InfrastructureError: one of them cannot be read.
    """
    if target.base == "rpm":
        return index_digest([f"{url}repodata/repomd.xml" for url in rpm_repositories(target)], upstream=True)
    return index_digest([source.release_url for source in apt_sources(target)], upstream=True)


def index_digest(urls: list[str], *, upstream: bool) -> str:
    """Return one digest of the index files at `urls` as they are now (InRelease or repomd.xml).

    Args:
        urls: the files.
        upstream: they are the operating system's; see `web.session`.

    Raises:
        InfrastructureError: one of them cannot be read.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:
        contents = pool.map(lambda url: web.read(url, upstream=upstream, largest=INDEX_BYTES), urls)
        return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()
