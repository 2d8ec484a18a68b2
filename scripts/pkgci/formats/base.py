"""What both package formats do, by the same verbs, and what they share.

A format reads a package's metadata, makes its version, resolves its build dependencies, and builds it. Everything that
looks into a file of the change happens in the sandbox; what comes back is data that the models here bound and check.
"""

import hashlib
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from pkgci import web
from pkgci.artifacts import LintFinding, Package, Repository
from pkgci.config import Config, Limits, Release, Target
from pkgci.errors import InfrastructureError, PackageError, PkgciError
from pkgci.roots import Root
from pkgci.sandbox import Files, execute
from pkgci.source import Blob, Sources, Tree, blobs, names
from pkgci.tail import Tail

log = logging.getLogger(__name__)

PACKAGE_BYTES = 2 << 30
METADATA_BYTES = 1 << 20
LINT_BYTES = 32 << 20
# how a tool of any language says that it has no more memory, processes or disk
EXHAUSTED = (
    "out of memory|memoryerror|cannot allocate memory|(cannot|failed to) map |can't start new thread|no space left on"
)
# a tool that only says that another failed, whose own words come before
PASSED_ON = re.compile(
    r"^make(\[\d+\])?: \*\*\* \[|^dpkg-buildpackage: error: .* subprocess |^dh_\w+: error: .* returned exit code "
    r"|^dh_\w+: error: Aborting due to earlier error|^error: Bad exit status from |^collect2: error: ld returned "
    # fakeroot's last words, once what it serves has ended
    r"|^semop\("
)
COMPILER = re.compile(r"^\S+:\d+(:\d+)?: (fatal )?error: ")
# what may go into an argument, a file name or a line of a configuration: neither an option nor a second line
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+~^:_-]*", re.ASCII)

# Debian Policy 5.6.1 and 5.6.12; rpm allows the same letters and, in versions, also ^ and _
SourceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9+._-]*$", max_length=100)]
Version = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+~^_:-]*$", max_length=100)]


class Data(BaseModel):
    """What a sandbox said about a package: untrusted, so every field has a form."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


Capability = Annotated[str, StringConstraints(max_length=4096)]


class Metadata(Data):
    """What a package says of itself. `date` is in seconds since the epoch, 0 when the package names none.

    `needs` are the names in `depends` that count for this target and these profiles, of alternatives all; `offers` are
    the names of its binary packages, and what they are said to provide.
    """

    name: SourceName
    version: Version
    date: int = Field(ge=0)
    depends: tuple[Annotated[str, StringConstraints(max_length=1 << 16)], ...] = Field(max_length=10_000)
    needs: tuple[Capability, ...]
    offers: tuple[Capability, ...]


class Dependency(Data):
    """A package that the build needs beyond the root: its file name, which holds its exact version, and its sha256."""

    file: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9+.:~^_%-]*$")]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    url: str = ""


class Dependencies(Data):
    """What has to be installed and removed before the build."""

    install: tuple[Dependency, ...] = ()
    remove: tuple[SourceName, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a format's scripts run: in a sandbox of the target, over which root, within which limits, with its log where."""

    config: Config
    target_name: str
    target: Target
    root: Root
    limits: Limits
    log_path: Path


@dataclass(frozen=True)
class Request(Place):
    """What is to be built, with what, and where.

    `profiles` are the package's own and those asked for; with the latter the result is `partial`: not what is released.
    `keep` takes the root of a build that fails. `vary` changes what must not matter to the result.
    """

    release: Release
    sources: Sources
    repositories: tuple[Repository, ...]
    final: bool
    profiles: tuple[str, ...]
    partial: bool
    keep: Path | None = None
    vary: bool = False

    def options(self) -> tuple[str, str]:
        """Return the arguments of both formats' build scripts that say how to build."""
        return ",".join(self.profiles), "yes" if self.vary else "no"


@dataclass(frozen=True)
class Built:
    """The files of a build, and what the format's tool says the binary packages among them are."""

    files: tuple[Path, ...]
    packages: tuple[Package, ...]


@dataclass(frozen=True)
class Linted:
    """What a lint tool, by its name and version, found, and how many findings the package's own overrides silenced."""

    tool: str
    findings: tuple[LintFinding, ...]
    overridden: int


class Format(Protocol):
    """The verbs of a format. PACKAGING says, for people, what a tree with its packaging has."""

    PACKAGING: str

    def packaged(self, tree: Tree, package: str) -> bool:
        """Return whether the tree holds packaging of this format."""

    def inspect(self, request: Request, packaging: Tree) -> Metadata:
        """Read the packaging's metadata. Raises PackageError when they are broken."""

    def version(self, request: Request, metadata: Metadata) -> str:
        """Return the full version that the package is built with (DEB: source version; RPM: [epoch:]version-release)."""

    def newer(self, one: str, other: str) -> bool:
        """Return whether version `one` sorts above `other`, by the format's own comparison."""

    def resolve(self, request: Request, metadata: Metadata) -> Dependencies:
        """Return the exact build dependencies. Raises PackageError when they cannot be had."""

    def build(
        self, request: Request, metadata: Metadata, version: str, dependencies: Dependencies, output: Path
    ) -> Built:
        """Build source and binary packages into `output`. Raises PackageError when the build fails."""

    def lint(self, place: Place, source: str, packages: Sequence[Package], directory: Path) -> Linted:
        """Return what the format's lint tool says of a build's files in `directory`."""


def suffix(request: Request) -> str:
    """Return what a version gets after its base: vendor, release ordinal, non-merge commits, rebuild; a check's its tree.

    It only grows along a branch, and a check's sorts below the same change merged (`~`), a partial one's below that.
    """
    release, sources = request.release, request.sources
    rebuild = f".{sources.entry.rebuild}" if sources.entry.rebuild else ""
    tree = "" if request.final else f"~t{sources.digest[:8]}{'~partial' if request.partial else ''}"
    return f"{release.vendor}{release.ordinal}.{sources.count}{rebuild}{tree}"


def date(request: Request, metadata: Metadata) -> int:
    """Return SOURCE_DATE_EPOCH: the package's own date, or the latest author date of its commits."""
    return metadata.date or request.sources.date


def add_tree(files: Files, tree: Tree, at: str, without: Sequence[str] = ()) -> None:
    """Add the files of a tree below the absolute path `at`, but not those below the paths `without`."""
    skipped = tuple(f"{path}/" for path in without)
    for blob in blobs(tree, [path for path in names(tree) if not path.startswith(skipped)] if skipped else None):
        add_blob(files, blob, at)


def add_blob(files: Files, blob: Blob, at: str) -> None:
    """Add one file of a tree below the absolute path `at`."""
    if blob.mode == "120000":
        files.add_link(f"{at}/{blob.path}", os.fsdecode(blob.content))
    else:
        files.add_stream(f"{at}/{blob.path}", blob.stream, blob.size, 0o755 if blob.mode == "100755" else 0o644)


def script(name: str) -> str:
    """Return the text of a script beside this module, for the sandbox."""
    return Path(__file__).with_name(name).read_text()


def sandboxed(
    place: Place,
    script_name: str,
    *arguments: str,
    files: Files,
    output: Path,
    failure: Callable[[int, str], PkgciError],
    network: bool = False,
    keep: Path | None = None,
) -> tuple[Path, ...]:
    """Run one of the scripts beside this module in a sandbox, its output going to the log.

    Args:
        place: where.
        script_name: the script's file name.
        arguments: its arguments.
        files: what is added to the root.
        output: takes what the script leaves in `/out`.
        failure: makes the error of a script that fails, from its status and the line of its output that says why.
        network: as of `sandbox.execute`.
        keep: as of `sandbox.execute`.

    Returns:
        The files that came back, sorted.
    """
    place.log_path.parent.mkdir(parents=True, exist_ok=True)
    with place.log_path.open("ab") as stream, Tail(place.log_path, sys.stdout.buffer):
        start = stream.tell()
        outcome = execute(
            place.root.path,
            script(script_name),
            arguments=arguments,
            files=files,
            output=output,
            limits=place.limits,
            log_to=stream,
            network=network,
            keep=keep,
            where=None if network else _build_host(place),
        )
    if outcome.status:
        raise failure(outcome.status, last_words(place.log_path, start, f"status {outcome.status}"))
    return tuple(sorted(outcome.files))


def _build_host(place: Place) -> Callable[..., int] | None:
    """Return what makes the sandbox on the build host of the target; None when it has none, and it is made here.

    What needs the network is made here too: it is trusted, and this machine may serve its repositories to itself alone.
    """
    host = place.config.build_host(place.target_name)
    if host is None:
        return None
    from pkgci import buildhost

    return partial(buildhost.contained, place.config, host, place.root.id)


def build_failure(name: str, source_package: str) -> Callable[[int, str], PkgciError]:
    """Return what makes the error of a build script, by the statuses that both formats' scripts end with."""
    what = {11: "its build dependencies do not install", 12: f"the {source_package} cannot be made"}
    return lambda status, said: PackageError(f"{name}: {what.get(status, 'the build failed')}: {said}")


def lint_output(place: Place, script_name: str, files: Files) -> dict[str, bytes]:
    """Run a lint script, and return what it left, by the names of its files.

    Raises:
        PackageError: the package made the tool reach a limit.
        InfrastructureError: the tool failed otherwise, or is missing.
    """

    def failure(status: int, said: str) -> PkgciError:
        # a tool without memory may also crash; and one that crashes on a package will do so again
        if status > 128 or re.search(EXHAUSTED, _end_of(place.log_path, 0), re.IGNORECASE):
            return PackageError(f"lint reached a limit of memory, processes or disk, or crashed: {said}")
        return InfrastructureError(f"the lint tool failed with status {status}: {said}")

    with tempfile.TemporaryDirectory() as output:
        made = sandboxed(place, script_name, files=files, output=Path(output), failure=failure)
        if sum(path.stat().st_size for path in made) > LINT_BYTES:
            raise PackageError(f"lint says more than {LINT_BYTES >> 20} MiB of it")
        return {path.name: path.read_bytes().strip() for path in made}


Model = TypeVar("Model", bound=BaseModel)


def cached(
    place: Place,
    kind: str,
    made_from: object,
    model: type[Model],
    make: Callable[[], Model],
    usable: Callable[[Model], bool] = lambda _: True,
) -> Model:
    """Return what `make` makes, from the cache if the same was made before from the same root and `made_from`.

    What is no longer `usable` is made again.
    """
    # what a script beside this module does is part of what its answer is made from
    code = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.*"))]
    key = hashlib.sha256(json.dumps([place.root.id, made_from, code]).encode()).hexdigest()
    path = place.config.cache / kind / f"{key}.json"
    with suppress(FileNotFoundError, ValidationError):
        found = model.model_validate_json(path.read_bytes())
        if usable(found):
            return found
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as new:
        new.write(made.model_dump_json())
    Path(new.name).replace(path)
    return made


def parsed(path: Path, what: str) -> Metadata:
    """Read what a sandbox wrote about a package.

    Raises:
        PackageError: it is not of the form of Metadata.
    """
    try:
        if path.stat().st_size > METADATA_BYTES:
            raise PackageError(f"{what}: what it says of itself has more than {METADATA_BYTES} bytes")
        return Metadata.model_validate_json(path.read_bytes())
    except OSError as error:
        raise PackageError(f"{what}: it said nothing of itself") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PackageError(f"{what}: {where}: {ascii(first.get('input'))[:80]}: {first['msg']}") from error


def made_files(paths: Iterable[Path], output: Path, pattern: str) -> tuple[Path, ...]:
    """Return the files of a build that are packages or belong to them: directly in its output, named as `pattern` says.

    What else a build, or the scripts of what it was built with, left there is nobody's.
    """
    return tuple(path for path in paths if path.parent == output and re.fullmatch(pattern, path.name, re.ASCII))


def described(name: str, version: str, architecture: str, path: Path, *, debug: bool) -> Package:
    """Return a binary package by what the format's tool said of the file `path`, which is hashed here.

    Raises:
        ValueError: a word cannot be one of a package.
        OSError: there is no such file.
    """
    if not all(WORD.fullmatch(word) for word in (name, version, architecture)):
        raise ValueError(f"{name!r} {version!r} {architecture!r}: not the words of a package")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    kind = "debug" if debug else "binary"
    return Package(name=name, version=version, architecture=architecture, file=path.name, sha256=digest, kind=kind)


def last_words(path: Path, start: int, fallback: str) -> str:
    """Return the line of a log, from the byte offset `start`, that says best why something failed."""
    lines = [line.strip() for line in _end_of(path, start).splitlines() if line.strip()]
    for line, following in pairwise(lines):
        # rpmbuild and apt name the package in the line after, or in the one that says why
        if line.endswith("Failed build dependencies:"):
            return f"{line} {following}"[:300]
        if line.endswith("The following packages have unmet dependencies:"):
            return following[:300]
    words = ("error:", "Error ", "E: ", "ERROR", "FAILED", "fatal:", "***", "undefined reference to", "cannot find -l")
    marked = [line for line in lines if any(word in line for word in words)]
    own = [line for line in marked if not PASSED_ON.search(line)]
    # what follows a compiler's first error often follows from it; elsewhere the last one ended the build
    first = [line for line in own if COMPILER.match(line)][:1]
    return (first or own[-1:] or marked[:1] or lines[-1:] or [fallback])[0][:300]


def _end_of(path: Path, start: int) -> str:
    """Return the end of a log, from the byte offset `start` at most."""
    with path.open("rb") as stream:
        stream.seek(max(start, path.stat().st_size - 65536))
        return stream.read().decode(errors="replace").replace("\t", " ")


def download(config: Config, dependencies: Dependencies) -> list[Path]:
    """Return the dependencies' files, in order, downloading those that the cache does not hold.

    Raises:
        InfrastructureError: one cannot be had, or is not what the signed index says.
    """
    own = (config.settings.url, *config.settings.repositories)

    def one(dependency: Dependency) -> Path:
        path = kept(config, dependency)
        if path.exists():
            with path.open("rb") as stream:
                # a crash may have left less than was written
                whole = hashlib.file_digest(stream, "sha256").hexdigest() == dependency.sha256
            if whole:
                os.utime(path)
                return path
            path.unlink(missing_ok=True)
        if not dependency.url:
            raise InfrastructureError(f"{dependency.file} has left the cache since it was resolved; try again")
        upstream = not dependency.url.startswith(own)
        content = web.read(dependency.url, upstream=upstream, largest=PACKAGE_BYTES)
        if hashlib.sha256(content).hexdigest() != dependency.sha256:
            raise InfrastructureError(f"{dependency.url} is not what its repository's index says; retry later")
        return keep(config, dependency.sha256, content)

    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(one, dependencies.install))


def kept(config: Config, dependency: Dependency) -> Path:
    """Return where the download cache has a package, if it has it."""
    return config.cache / "packages" / dependency.sha256


def keep(config: Config, digest: str, content: bytes) -> Path:
    """Put a package into the download cache under its sha256; return where it is."""
    place = config.cache / "packages"
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place, delete=False) as new:
        new.write(content)
    return Path(new.name).replace(place / digest)
