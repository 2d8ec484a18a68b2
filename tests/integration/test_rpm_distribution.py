"""A target whose base is an RPM distribution: a tiny one, made here from Debian's files, with rpm in charge of them."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trees
import yaml

from pkgci import repository, roots
from pkgci.artifacts import Build
from pkgci.compile import compile
from pkgci.config import EMBEDDED, Config
from pkgci.errors import InfrastructureError, PackageError
from pkgci.install import install
from pkgci.store import Store
from pkgci.upstream import apt_sources, isolated_apt
from pkgci.vm import guest
from pkgci.vm.image import MACHINE

TARGET = "mini-amd64"
USERLAND = ("bzip2", "ca-certificates", "cpio", "createrepo-c", "dbus", "debugedit", "dnf", "dracut-core", "file")
USERLAND += (
    "iproute2",
    "kmod",
    "linux-image-cloud-amd64",
    "openssh-server",
    "patch",
    "perl",
    "rpm",
    "systemd-sysv",
    "udev",
    "unzip",
)
USERLAND += ("xz-utils", "zstd")
# what an RPM distribution has none of, what a package has none of, and units that Debian's scripts enabled
GONE = ("dev/*", "etc/apt", "etc/dpkg", "etc/init.d", "etc/rc?.d", "etc/systemd/system/*", "initrd.img*", "vmlinuz*")
GONE += ("usr/bin/apt*", "usr/bin/dpkg*", "usr/lib/apt", "usr/lib/dpkg", "var/cache/*", "var/lib/apt", "var/lib/dpkg")
SPEC = """\
Name: {name}
Version: {version}
Release: 1
Summary: Part of a distribution for tests
License: CC0-1.0
AutoReqProv: no
{more}
%define __os_install_post %{{nil}}
%define debug_package %{{nil}}
%define _binary_payload w1.zstdio
%description
%{{summary}}.
%install
cp -al {tree}/. %{{buildroot}}
%files
%defattr(-,root,root,-)
"""


def run(*argv: str | Path, **more) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


class Key:
    """A key of its own, below `place`."""

    def __init__(self, place: Path) -> None:
        self.home = place
        place.mkdir(mode=0o700)
        self._gpg("--passphrase", "", "--quick-generate-key", place.name, "rsa2048", "sign", "never")
        self.public = self._gpg("--armor", "--export")

    def sign_packages(self, *packages: Path) -> None:
        macros = ["-D", "__gpg /usr/bin/gpg", "-D", f"_gpg_path {self.home}", "-D", f"_gpg_name {self.home.name}"]
        run("rpmsign", *macros, "--addsign", *packages)

    def sign_index(self, index: Path) -> None:
        self._gpg("--armor", "--yes", "--detach-sign", "--output", f"{index}.asc", str(index))

    def _gpg(self, *argv: str) -> str:
        return run("gpg", "--homedir", self.home, "--batch", "--quiet", *argv)


@dataclass(frozen=True)
class Distribution:
    """The distribution: `repository` is served at `url`; `key` signs it, and `other` does not."""

    repository: Path
    url: str
    key: Key
    other: Key

    def index(self) -> None:
        """Write its index anew, and sign it."""
        run(Path(sys.executable).with_name("createrepo_c"), "--general-compress-type=gz", self.repository)
        self.key.sign_index(self.repository / "repodata" / "repomd.xml")


def package(top: Path, name: str, provides: Sequence[str] = (), version: int = 1) -> Path:
    """Make a package of all below `top`/NAME."""
    tree = top / name
    listed = [path.name for path in tree.iterdir()]
    more = "\n".join(f"Provides: {one}" for one in provides)
    spec = SPEC.format(name=name, version=version, more=more, tree=tree) + "".join(f"/{one}\n" for one in listed)
    (top / f"{name}.spec").write_text(spec)
    run("rpmbuild", "-bb", "--quiet", "-D", f"_topdir {top}/rpm", "-D", f"_dbpath {top}/db", top / f"{name}.spec")
    return next(top.glob(f"rpm/RPMS/*/{name}-{version}-1.*.rpm"))


def move(top: Path, name: str, paths: Sequence[str]) -> None:
    """Move files out of the userland into a tree of their own."""
    for path in paths:
        new = top / name / path
        new.parent.mkdir(parents=True, exist_ok=True)
        (top / "basesystem" / path).rename(new)


def packages(top: Path) -> list[Path]:
    """Make the packages of the distribution from a root of Debian."""
    base = top / "basesystem"
    base.mkdir()
    sources = apt_sources(Config(EMBEDDED).target("bookworm-amd64"))
    make = ["mmdebstrap", "--mode=unshare", "--variant=minbase", "--format=tar", f"--include={','.join(USERLAND)}"]
    make += [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("man", "doc", "locale")]
    make += ["--dpkgopt=force-unsafe-io", "bookworm", str(top / "root.tar")]
    run(*make, *(source.line() for source in sources), env=os.environ | isolated_apt(top))
    run("tar", "-C", base, "--exclude=./dev/*", "-xpf", top / "root.tar")
    (top / "root.tar").unlink()
    dracut = (base / "var/lib/dpkg/info/dracut-core.list").read_text().split()
    for path in [found for pattern in GONE for found in base.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    move(top, "dracut", [path[1:] for path in dracut if (base / path[1:]).is_file()])
    move(top, "kernel", ["boot", "usr/lib/modules"])
    move(top, "rpm-build", ["usr/bin/rpmbuild"])
    # as RPM distributions have it
    units = base / "usr/lib/systemd/system"
    (units / "ssh.service").rename(units / "sshd.service")
    trees.write(
        base,
        {"etc/rpm/macros": "%_dbpath /var/lib/rpm\n", "usr/lib/os-release": 'ID=mini\nPLATFORM_ID="platform:mini"\n'},
    )
    trees.write(top, {"greeting/usr/bin/greeting": "#!/bin/sh\necho hello\n", "foreign/usr/bin/foreign": "#!/bin/sh\n"})
    provides = {*roots.SMALL, *roots.BUILD, *MACHINE, "/bin/sh"} - {"kernel", "dracut", "rpm-build", "/usr/bin/perl"}
    return [
        package(top, "basesystem", sorted(provides)),
        *(package(top, name) for name in ("dracut", "kernel", "rpm-build", "greeting", "foreign")),
    ]


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Distribution]:
    top = tmp_path_factory.mktemp("distribution")
    place = top / "repository"
    place.mkdir()
    for path in packages(top):
        path.rename(place / path.name)
    made = [*place.glob("*.rpm")]
    foreign = next(place.glob("foreign*.rpm"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=place)) as server:
        ours = Distribution(place, f"http://127.0.0.1:{server.server_port}/", Key(top / "ours"), Key(top / "other"))
        ours.key.sign_packages(*(path for path in made if path != foreign))
        ours.other.sign_packages(foreign)
        ours.index()
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield ours
        server.shutdown()
        thread.join()
    shutil.rmtree(top)


@pytest.fixture(scope="module")
def config(distribution: Distribution, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """A configuration with the distribution as its only target; nothing of it goes to the user's caches."""
    top = tmp_path_factory.mktemp("config")
    paths = {name: str(top / name) for name in ("cache", "state", "data")}
    made = trees.config(top, paths=paths)
    (top / "data" / "snapshots").unlink()
    # but the Debian root that it begins with
    (top / "cache" / "roots").mkdir(parents=True)
    tools = roots.dnf_root(Config(EMBEDDED)).path.parent
    (top / "cache" / "roots" / tools.name).symlink_to(tools)
    for path in (made.directory / "targets").iterdir():
        path.unlink()
    target = {"format": "rpm", "codename": "mini", "architecture": "amd64", "tag": "mini", "base": "rpm"}
    upstream = {"repositories": [distribution.url], "keys": ["keys/mini.asc"]}
    trees.write(made.directory, {"keys/mini.asc": distribution.key.public, "keys/other.asc": distribution.other.public})
    (made.directory / "targets" / f"{TARGET}.yaml").write_text(yaml.safe_dump({**target, "upstream": upstream}))
    (made.directory / "releases" / "default.yaml").write_text(yaml.safe_dump({"branches": [".*"], "targets": [TARGET]}))
    yield made
    shutil.rmtree(top)


@pytest.fixture
def build(config: Config, tmp_path: Path):
    def build_small(name: str, more: str = "", **files: str) -> Build:
        trees.commit(tmp_path / name, trees.rpm(name, more=more) | files)
        (tmp_path / "artifacts").mkdir(exist_ok=True)
        return compile(config, TARGET, trees.local(config, tmp_path / name), tmp_path / "artifacts")

    return build_small


def test_a_build_root_is_the_distributions_own(config):
    root = roots.build_root(config, TARGET)
    listed = run("tar", "-tf", root.path).splitlines()
    assert {"./usr/bin/rpmbuild", "./build/", "./var/lib/rpm/rpmdb.sqlite"} <= set(listed)
    assert not any(name.startswith("./var/lib/dpkg") for name in listed)
    assert roots.build_root(config, TARGET) == root


@pytest.fixture
def log_of_install(config: Config, tmp_path: Path):
    """What publishes a build, lets its packages pass the install test, and returns the log of the first."""

    def installed(made: Build) -> str:
        entry = Store(config).lookup(made.key)
        where = repository.write(config, TARGET, made.package, [entry], datetime.now(UTC) + timedelta(days=1))
        record = install(config, TARGET, [f"{where.url}repository.json"], made.key, tmp_path / "artifacts")
        assert [(outcome.package, outcome.passed) for outcome in record.packages] == [(made.package, True)]
        return (tmp_path / "artifacts" / "logs" / f"{made.package}.log").read_text()

    return installed


def test_a_package_is_built_and_passes_the_install_test_in_the_distributions_own_machine(config, build, log_of_install):
    made = build("small", more="BuildRequires: greeting\nRequires: greeting\n")
    assert [package.file for package in made.packages] == [f"small-{made.version}.noarch.rpm"]
    assert "greeting-1-1" in log_of_install(made)
    installed = guest.plain(config, TARGET).manifest.nodes[0].packages
    assert {"basesystem 1-1", "kernel 1-1"} <= set(installed)


def test_what_has_left_the_distribution_since_the_snapshot_is_looked_for_again(
    config, build, log_of_install, distribution, tmp_path
):
    made = build("late", more="Requires: greeting\n")
    guest.plain(config, TARGET)
    trees.write(tmp_path, {"greeting/usr/bin/greeting": "#!/bin/sh\necho good day\n"})
    (former,) = distribution.repository.glob("greeting-*")
    latter = distribution.repository / "greeting-2-1.x86_64.rpm"
    package(tmp_path, "greeting", version=2).rename(latter)
    distribution.key.sign_packages(latter)
    aside = former.rename(tmp_path / former.name)
    distribution.index()
    try:
        said = log_of_install(made)
    finally:
        latter.unlink()
        aside.rename(former)
        distribution.index()
    assert "The upstream has moved" in said
    assert "greeting-2-1" in said


def test_a_dependency_that_has_left_the_cache_is_resolved_again(config, build):
    requires = "BuildRequires: greeting\n"
    build("first", more=requires)
    for path in (config.cache / "packages").iterdir():
        path.unlink()
    assert build("second", more=requires).origin == "built"
    for path in (config.cache / "packages").iterdir():
        os.truncate(path, 10)
    with pytest.raises(InfrastructureError, match=r"greeting-.* has left the cache since it was resolved; try again"):
        build("third", more=requires)


def test_a_build_requirement_that_the_distribution_lacks_is_named(build):
    with pytest.raises(PackageError, match="Unable to find a match: no-such-package"):
        build("lacking", more="BuildRequires: no-such-package\n")


def test_a_package_that_is_signed_with_another_key_is_not_installed(build):
    with pytest.raises(InfrastructureError, match="GPG"):
        build("trusting", more="BuildRequires: foreign\n")


def test_an_index_that_was_changed_is_not_believed(build, distribution):
    index = distribution.repository / "repodata" / "repomd.xml"
    text = index.read_text()
    index.write_text(text + "<!-- -->\n")
    try:
        with pytest.raises(InfrastructureError, match="GPG"):
            build("misled", more="BuildRequires: greeting\n")
    finally:
        index.write_text(text)


def test_a_root_of_packages_that_none_of_the_keys_signed_is_not_made(config):
    path = config.directory / "targets" / f"{TARGET}.yaml"
    text = path.read_text()
    path.write_text(text.replace("mini.asc", "other.asc"))
    try:
        with pytest.raises(InfrastructureError, match=r"cannot make a root of mini-amd64: dnf: .*GPG"):
            # what a configuration has read, it keeps
            roots.build_root(Config(config.directory), TARGET)
    finally:
        path.write_text(text)
