"""What the servers of these tests are made from, made once a user: `$XDG_CACHE_HOME/pkgci-test/NAME-DIGEST/`.

What a directory is made from decides its name.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pkgci.command import run, supervised
from pkgci.config import EMBEDDED, Config
from pkgci.locks import make_once
from pkgci.upstream import Source, apt_sources, isolated_apt

PIP = ("-m", "pip", "install", "-q", "--disable-pip-version-check")


def cached(name: str, parts: object, make: Callable[[Path], None]) -> Path:
    """Return a directory that is made when it is not there.

    Args:
        name: what it is, and its version.
        parts: all that decides its content; its `repr` gives the digest.
        make: fills the directory that it gets, which is `final` afterwards.
    """
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pkgci-test"
    directory = place / f"{name}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"
    make_once(directory, directory.exists, make)
    return directory


def final(making: Path) -> Path:
    """Return where a directory will be that is being made."""
    return making.with_name(making.name.removeprefix(".").removesuffix(".new"))


def digest(*files: Path) -> str:
    """Return the sha256 of files, one after the other."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def jars(name: str, checksums: Mapping[str, str]) -> Path:
    """Return a cached directory with artifacts, without what they depend on, from where Maven is configured to look.

    Args:
        name: of the directory.
        checksums: `GROUP:ARTIFACT:VERSION[:PACKAGING]` to sha256.
    """

    def make(directory: Path) -> None:
        for artifact, known in checksums.items():
            copy = ["mvn", "-q", "-B", "dependency:copy", f"-Dartifact={artifact}", f"-DoutputDirectory={directory}"]
            # a directory without a project
            done = subprocess.run(supervised(copy), cwd=directory, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{artifact} cannot be had by mvn: {done.stdout[-2000:]}{done.stderr[-500:]}"
            _, part, version, *packaging = artifact.split(":")
            found = directory / f"{part}-{version}.{packaging[0] if packaging else 'jar'}"
            assert digest(found) == known, f"{found.name} has sha256 {digest(found)}, not {known}"

    return cached(name, sorted(checksums.items()), make)


def venv(name: str, constraints: Path, requirements: Sequence[str], below: str = ".") -> Path:
    """Return a cached directory with a Python environment, from where pip is configured to look.

    Args:
        name: of the directory.
        constraints: the exact versions of all that is in it.
        requirements: what is in it, besides what that needs.
        below: where it is in the directory.
    """

    def make(directory: Path) -> None:
        place = directory / below
        run([sys.executable, "-m", "venv", place])
        run([place / "bin/python", *PIP, "-c", constraints, *requirements])
        # its scripts begin with where it is
        here, there = os.fsencode(directory), os.fsencode(final(directory))
        for script in (place / "bin").iterdir():
            if script.is_file() and not script.is_symlink():
                script.write_bytes(script.read_bytes().replace(here, there))

    return cached(name, (sys.version, requirements, digest(constraints), below), make)


def unpack(suite: str, packages: Mapping[str, Path]) -> None:
    """Unpack packages of one of Debian's suites, from the mirror that this machine's apt uses; nothing of it is changed.

    Args:
        suite: its name, also of one that this machine does not use.
        packages: by name, the directory that takes the files of each.
    """
    target = Config(EMBEDDED).target("bookworm-amd64")
    mirror = next(source.uri for source in apt_sources(target) if source.suite == target.codename)
    with tempfile.TemporaryDirectory() as scratch:
        apt = Path(scratch)
        for name in ("lists/partial", "cache/archives/partial"):
            (apt / name).mkdir(parents=True)
        (apt / "sources.list").write_text(f"{Source(mirror, suite, ('main',)).line()}\n")
        own = {"Dir::State": apt, "Dir::State::status": "/dev/null", "Dir::Cache": apt / "cache"}
        own |= {"Dir::State::lists": apt / "lists", "Dir::Etc::sourcelist": apt / "sources.list"}
        own |= {"Dir::Etc::preferencesparts": "/dev/null", "Dir::Etc::preferences": "/dev/null"}
        # the index of an old suite says no more until when it is valid
        options = [f"-o{name}={value}" for name, value in own.items()] + ["-oAcquire::Check-Valid-Until=false"]
        for words in (["update"], ["download", *packages]):
            run(["apt-get", "-q", *options, *words], cwd=apt, env=isolated_apt(apt))
        for name, place in packages.items():
            (file,) = apt.glob(f"{name}_*.deb")
            run(["dpkg-deb", "-x", file, place])


def java_home(major: int = 17) -> Path:
    """Return where Debian has a Java development kit of a version."""
    found = sorted(Path("/usr/lib/jvm").glob(f"java-{major}-openjdk-*/bin/javac"))
    assert found, f"these tests need openjdk-{major}-jdk-headless"
    return found[0].parent.parent
