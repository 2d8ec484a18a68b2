"""`pkgci import`: makes a git tree of fully unpacked source, as the product wants it, from a source package.

The source package is unpacked in the sandbox; what comes back goes into git as objects, so that nothing in it is ever
interpreted here.
"""

import io
import logging
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path, PurePosixPath

from debian import deb822

from pkgci.command import run
from pkgci.config import Config
from pkgci.errors import InfrastructureError, PackageError, RequestError
from pkgci.formats.base import last_words, script
from pkgci.roots import build_root
from pkgci.sandbox import Files, execute, hostile_tar
from pkgci.source import ISOLATED

log = logging.getLogger(__name__)


def import_package(config: Config, package: Path, directory: Path | None) -> Path:
    """Unpack a source package into a new git repository.

    Args:
        config: the configuration; a target of the package's format provides the sandbox.
        package: a `.dsc`, whose files lie beside it, or a `.src.rpm`.
        directory: where to make the repository; by default one named as the package, in the current directory.

    Returns:
        The repository: one commit on the branch `main`.

    Raises:
        RequestError: the file is no source package, or the directory exists.
        PackageError: it cannot be unpacked.
    """
    format = {".dsc": "deb", ".rpm": "rpm"}.get(package.suffix)
    if format is None or not package.is_file() or (format == "rpm" and not package.name.endswith(".src.rpm")):
        raise RequestError(f"cannot import {package}: it must be an existing .dsc or .src.rpm file")
    if directory and directory.exists():
        raise RequestError(f"cannot import into {directory}: it exists already")
    if directory and not directory.absolute().parent.is_dir():
        raise RequestError(
            f"cannot import into {directory}: {directory.absolute().parent} is no directory; make it first"
        )
    targets = [name for name in config.names("targets") if config.target(name).format == format]
    if not targets:
        raise RequestError(f"cannot import {package}: no target has the format {format}")
    files = Files()
    for path in [package, *_parts(package)]:
        files.add_file(f"/in/{path.name}", path)
    with tempfile.TemporaryDirectory() as scratch:
        output, log_path = Path(scratch, "out"), Path(scratch, "log")
        output.mkdir()
        with log_path.open("wb") as stream:
            root = build_root(config, targets[0])
            text, limits = script(f"{format}-import.sh"), config.settings.limits
            outcome = execute(root.path, text, files=files, output=output, limits=limits, log_to=stream)
        if outcome.status:
            sys.stderr.write(log_path.read_text(errors="replace"))
            raise PackageError(f"cannot unpack {package}: {last_words(log_path, 0, 'no reason given')}")
        name, _, version = (output / "name").read_text(errors="replace")[:1000].strip().partition(" ")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+._-]*", name) or not re.fullmatch(r"[A-Za-z0-9.+~^_:-]+", version):
            raise PackageError(f"cannot import {package}: {name!r} {version!r} is no name and version of a package")
        directory = directory or Path(name)
        if directory.exists():
            raise RequestError(f"cannot import into {directory}: it exists already; name another directory")
        # whole or not at all: made beside its place, then renamed
        with tempfile.TemporaryDirectory(dir=directory.absolute().parent, prefix=f".{directory.name}.") as new:
            made = Path(new, "tree")
            run(["git", "init", "-q", "--template=", "-b", "main", made], quiet=True)
            _commit(made, output / "tree.tar", f"Import {name} {version}")
            made.rename(directory)
    return directory


def _parts(package: Path) -> list[Path]:
    """Return the files that a .dsc names; a .src.rpm has all in one."""
    if package.suffix != ".dsc":
        return []
    try:
        listed = [entry["name"] for entry in deb822.Dsc(package.read_bytes())["Files"]]
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"cannot import {package}: it names no files: {error}") from error
    paths = [package.parent / name for name in listed]
    for path in paths:
        if path.parent != package.parent or not path.is_file():
            raise RequestError(f"cannot import {package}: {path.name} must lie beside it")
    return paths


def _commit(repository: Path, archive: Path, message: str) -> None:
    """Commit the content of a tar archive, through git's own objects."""
    with tempfile.TemporaryFile() as stream:
        stream.write(b"commit refs/heads/main\ncommitter pkgci <pkgci@localhost> %d +0000\n" % time.time())
        stream.write(b"data %d\n%s\n" % (len(message.encode()), message.encode()))
        with archive.open("rb") as packed, hostile_tar(packed, "the unpacked tree") as tar:
            for member in tar:
                if member.isdir():
                    continue
                path = PurePosixPath(member.name)
                if path.is_absolute() or not path.parts or {"..", ".git"} & set(path.parts) or "\n" in member.name:
                    raise PackageError(f"cannot import {member.name!r}: not allowed in a tree")
                if not (member.isreg() or member.issym()):
                    raise PackageError(f"cannot import {member.name!r}: neither a file nor a symbolic link")
                link = member.linkname.encode(errors="surrogateescape")
                mode = b"120000" if member.issym() else b"100755" if member.mode & 0o100 else b"100644"
                quoted = str(path).replace("\\", "\\\\").replace('"', '\\"').encode(errors="surrogateescape")
                size = len(link) if member.issym() else member.size
                stream.write(b'M %s inline "%s"\ndata %d\n' % (mode, quoted, size))
                shutil.copyfileobj(io.BytesIO(link) if member.issym() else tar.extractfile(member), stream)
                stream.write(b"\n")
        stream.write(b"done\n")
        stream.seek(0)
        # what is larger is not read as a whole
        options = ["-c", "core.bigFileThreshold=1m", "-C", repository]
        run(["git", *options, "fast-import", "--quiet", "--done"], input=stream, env=ISOLATED, quiet=True)
    checked = run(["git", "-C", repository, "checkout", "-q", "main", "--"], check=False, env=ISOLATED, quiet=True)
    if checked.returncode:
        said = checked.stderr.decode(errors="replace").strip()[-200:]
        if "invalid path" in said:
            raise PackageError(f"cannot import it: {said}")
        raise InfrastructureError(f"cannot check out {repository}: {said}")
