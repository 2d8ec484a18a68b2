"""Git trees of tiny real packages, and configurations, for tests."""

import random
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import yaml

from pkgci.change import Parameters, local_changes
from pkgci.config import EMBEDDED, Config

CHANGELOG = """{name} ({version}) unstable; urgency=medium

  * Release.

 -- A Maintainer <maintainer@example.org>  Mon, 01 Jan 2024 00:00:00 +0000
"""
CONTROL = """Source: {name}
Section: misc
Priority: optional
Maintainer: A Maintainer <maintainer@example.org>
Build-Depends: debhelper-compat (= 13){depends}
Standards-Version: 4.6.2

Package: {name}
Architecture: all
Depends: ${{misc:Depends}}
Description: package for tests
 It holds one script.
"""
RULES = "#!/usr/bin/make -f\n%:\n\tdh $@\n"
SPEC = """Name: {name}
Version: {version}
Release: {release}
Summary: Small package for tests
License: CC0-1.0
BuildArch: noarch
Source0: {name}-%{{version}}.tar.gz
{more}
%description
It holds one script.

%prep
%setup -q

%install
install -D -m 755 {name} %{{buildroot}}%{{_bindir}}/{name}

%files
%{{_bindir}}/{name}

%changelog
* Mon Jan 01 2024 A Maintainer <maintainer@example.org> - {version}-1
- Release.
"""


def deb(name: str = "small", version: str = "1.0-1", depends: str = "") -> dict[str, str]:
    """Return the files of a DEB package that installs one script."""
    return {
        name: "#!/bin/sh\necho small\n",
        "debian/changelog": CHANGELOG.format(name=name, version=version),
        "debian/copyright": "Nobody has a right to this package: it is in the public domain.\n",
        "debian/control": CONTROL.format(name=name, depends=depends),
        "debian/rules": RULES,
        f"debian/{name}.install": f"{name} usr/bin\n",
    }


def rpm(name: str = "small", version: str = "1.0", release: str = "1%{?dist}", more: str = "") -> dict[str, str]:
    """Return the files of an RPM package that installs one script."""
    return {
        name: "#!/bin/sh\necho small\n",
        f"rpm/{name}.spec": SPEC.format(name=name, version=version, release=release, more=more),
    }


def git(tree: Path, *arguments: str) -> str:
    """Run git in a tree, with a fixed identity and dates, and return what it says."""
    identity = {
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "T"), ("EMAIL", "t@localhost"), ("DATE", "1700000000 +0000"))
    }
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1", **identity}
    done = subprocess.run(["git", "-C", tree, *arguments], env=environment, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def write(tree: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files below `tree`; scripts become executable."""
    for name, content in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(data)
        path.chmod(0o755 if data.startswith(b"#!") else 0o644)


def commit(tree: Path, files: Mapping[str, str | bytes], message: str = "Change") -> str:
    """Commit files on the branch `main` of a tree, which is made if it is not there; return the commit."""
    if not (tree / ".git").exists():
        tree.mkdir(parents=True, exist_ok=True)
        git(tree, "init", "-q", "-b", "main")
    write(tree, files)
    git(tree, "add", "-A")
    git(tree, "commit", "-q", "--allow-empty", "-m", message)
    return git(tree, "rev-parse", "HEAD")


def free_port() -> int:
    """Return a port of loopback that nobody uses, and that the kernel gives to nobody who does not ask for it."""
    while True:
        port = random.randrange(10_000, 30_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def config(place: Path, packages: Mapping[str, object] | None = None, **settings: object) -> Config:
    """Return a configuration like the embedded default, with a free port, and state and data below `place`.

    The cache is the user's own, and so are the snapshots, which take minutes to make.
    """
    directory = place / "etc"
    for kind in ("targets", "releases", "packages"):
        (directory / kind).mkdir(parents=True)
        for path in (EMBEDDED / kind).glob("*.yaml"):
            (directory / kind / path.name).write_bytes(path.read_bytes())
    paths = {"state": str(place / "state"), "data": str(place / "data")}
    url = {"url": f"http://127.0.0.1:{free_port()}/"}
    (directory / "config.yaml").write_text(yaml.safe_dump({**url, "paths": paths, "keep_runs": "failed", **settings}))
    snapshots = Config(EMBEDDED).data / "snapshots"
    snapshots.mkdir(parents=True, exist_ok=True)
    (place / "data").mkdir()
    (place / "data" / "snapshots").symlink_to(snapshots)
    for name, entry in (packages or {}).items():
        (directory / "packages" / f"{name}.yaml").write_text(yaml.safe_dump(entry))
    return Config(directory)


def local(configuration: Config, tree: Path, **more: str) -> Parameters:
    """Return the parameters of a local change: the branch `main` of `tree`, under the name of its directory."""
    place = configuration.state / "changes" / tree.name
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(tree)
    change = {"ZUUL_PROJECT": tree.name, "ZUUL_BRANCH": "main", "ZUUL_REF": "refs/heads/main"}
    return Parameters.read({**change, "ZUUL_URL": local_changes(configuration), **more})
