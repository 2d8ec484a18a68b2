"""What the servers of these tests are made from, made once a user: `$XDG_CACHE_HOME/pkgci-test/NAME-DIGEST/`.

A directory appears whole, by a rename, under a lock; what it is made from decides its name.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from filelock import FileLock

from pkgci.command import supervised


def cached(name: str, parts: object, make: Callable[[Path], None]) -> Path:
    """Return a directory that is made when it is not there.

    Args:
        name: what it is, and its version.
        parts: all that decides its content; its `repr` gives the digest.
        make: fills the directory that it gets, which is renamed afterwards.
    """
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pkgci-test"
    directory = place / f"{name}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"
    if not directory.exists():
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if not directory.exists():
                new = directory.with_name(f"{directory.name}.new")
                shutil.rmtree(new, ignore_errors=True)
                new.mkdir()
                make(new)
                new.rename(directory)
    return directory


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
        subprocess.run(supervised([sys.executable, "-m", "venv", place]), check=True)
        pip = [place / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run(supervised([*pip, "-c", constraints, *requirements]), check=True)
        # its scripts begin with where it is
        here = os.fsencode(directory)
        for script in (place / "bin").iterdir():
            if script.is_file() and not script.is_symlink():
                script.write_bytes(script.read_bytes().replace(here, here.removesuffix(b".new")))

    return cached(name, (sys.version, requirements, digest(constraints), below), make)


def java_home(major: int = 17) -> Path:
    """Return where Debian has a Java development kit of a version."""
    found = sorted(Path("/usr/lib/jvm").glob(f"java-{major}-openjdk-*/bin/javac"))
    assert found, f"these tests need openjdk-{major}-jdk-headless"
    return found[0].parent.parent
