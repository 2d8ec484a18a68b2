"""DEB packages: source package from an unpacked tree, version, build dependencies by apt, build by dpkg-buildpackage.

Sources: Debian Policy 5 (control files), dpkg-source(1) for `3.0 (quilt)`, reproducible-builds.org for SOURCE_DATE_EPOCH.
"""

import re
import shlex
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from pkgci.artifacts import Package
from pkgci.command import run
from pkgci.errors import InfrastructureError, PackageError, PkgciError
from pkgci.formats import base, contents, lintian
from pkgci.formats.base import Built, Dependencies, Dependency, Linted, Metadata, Place, Request
from pkgci.lazy import Lazy
from pkgci.sandbox import Files
from pkgci.source import Tree, blobs, identities, names
from pkgci.upstream import apt_configuration, apt_sources, index_digest

deb822 = Lazy("debian.deb822")

PACKAGING = "debian/control"
METADATA = ("debian/changelog", "debian/control")
INDEX_BYTES = 16 << 20


def packaged(tree: Tree, package: str) -> bool:
    """Return whether the tree has `debian/control`."""
    return "debian/control" in names(tree)


def inspect(request: Request, packaging: Tree) -> Metadata:
    """Read name, version, date and build dependencies from `debian/`.

    Raises:
        PackageError: changelog or control file are broken.
    """
    arguments = "all" if request.target.independent else "any", ",".join(request.profiles)

    def make() -> Metadata:
        files = Files()
        for blob in blobs(packaging, METADATA):
            files.add(f"/in/{blob.path}", blob.content)
        files.add_directory("/in")
        with tempfile.TemporaryDirectory() as output:
            base.sandboxed(
                request,
                "deb-inspect.sh",
                *arguments,
                files=files,
                output=Path(output),
                failure=lambda _, said: PackageError(f"{packaging.project}: cannot read its packaging: {said}"),
            )
            return base.parsed(Path(output, "metadata.json"), f"{packaging.project}: debian/")

    made_from = [identities(packaging, METADATA), arguments]
    return base.cached(request, "metadata", made_from, Metadata, make)


def version(request: Request, metadata: Metadata) -> str:
    """Return the source version: the suffix in the upstream part, the target's tag in the revision.

    So an orig tarball of one name never has two contents. A native package has both at its end.
    """
    upstream, dash, revision = metadata.version.rpartition("-")
    if not dash:
        return f"{metadata.version}+{base.suffix(request)}+{request.target.tag}"
    return f"{upstream}+{base.suffix(request)}-{revision}+{request.target.tag}"


def newer(one: str, other: str) -> bool:
    """Return whether version `one` sorts above `other` (deb-version(7))."""
    return run(["dpkg", "--compare-versions", one, "gt", other], check=False, quiet=True).returncode == 0


def resolve(request: Request, metadata: Metadata) -> Dependencies:
    """Ask apt for the exact build dependencies, from upstream and the request's repositories.

    Raises:
        PackageError: they cannot be satisfied.
        InfrastructureError: a repository cannot be read.
    """
    upstream = apt_sources(request.target)
    tests = [f"{one.url}dists/{one.codename}/InRelease" for one in request.repositories]
    digest = index_digest([source.release_url for source in upstream], upstream=True)
    digests = [digest, index_digest(tests, upstream=False)]

    def make() -> Dependencies:
        files = Files()
        lines = [source.line() for source in upstream]
        for number, one in enumerate(request.repositories):
            files.add(f"/etc/apt/keyrings/pkgci-{number}.asc", one.signing_key)
            # the clock of the repositories' host may be ahead
            options = f"[signed-by=/etc/apt/keyrings/pkgci-{number}.asc check-date=no]"
            lines.append(f"deb {options} {one.url} {one.codename} {one.component}")
        files.add("/in/sources.list", "\n".join([*lines, ""]))
        # before the upstream's, whatever the versions (apt_preferences(5))
        pins = [
            f"Package: {package.name}\nPin: version {package.version}\nPin-Priority: 1001\n"
            for one in request.repositories
            for package in one.packages
        ]
        files.add("/etc/apt/preferences.d/pkgci", "\n".join(pins))
        files.add("/in/debian/control", _control(request, metadata))
        files.add("/etc/apt/apt.conf.d/90pkgci", apt_configuration())
        lists = request.config.cache / "lists" / digest
        for path in sorted(lists.glob("*")):
            files.add_file(f"/in/lists/{path.name}", path)
        with tempfile.TemporaryDirectory() as directory:
            output = Path(directory)

            def failure(_: int, said: str) -> PkgciError:
                # once apt has planned, it could read the repositories
                at_fault = PackageError if (output / "plan").exists() else InfrastructureError
                return at_fault(f"{metadata.name}: build dependencies cannot be resolved: {said}")

            base.sandboxed(
                request,
                "deb-resolve.sh",
                *(",".join(request.profiles), "update" if tests or not lists.is_dir() else "known"),
                files=files,
                output=output,
                failure=failure,
                network=True,
            )
            _keep_lists(output / "lists", lists, {urlsplit(url).netloc for url in tests})
            found = []
            for line in (output / "uris").read_text().splitlines():
                uri, file, _, hashed = shlex.split(line)
                found.append(Dependency(file=file, url=uri, sha256=hashed.removeprefix("SHA256:")))
            return Dependencies(
                install=tuple(sorted(found, key=lambda one: one.file)),
                remove=tuple(sorted(re.sub(":.*", "", name) for name in (output / "remove").read_text().split())),
            )

    made_from = [digests, _control(request, metadata), request.profiles]
    return base.cached(request, "dependencies", made_from, Dependencies, make)


def _control(request: Request, metadata: Metadata) -> str:
    """Return a control file that has the package's build dependencies, as far as this target's part needs them."""
    fields = [
        field for field in metadata.depends if request.target.independent or not field.split(":")[0].endswith("-Indep")
    ]
    return "\n".join(
        [f"Source: {metadata.name}", *fields, "", f"Package: {metadata.name}-build", "Architecture: any", ""]
    )


def _keep_lists(made: Path, lists: Path, without: Collection[str]) -> None:
    """Keep the upstream's package lists that apt has just read: the next package is resolved without reading them again.

    Those from the hosts `without` are of one run.
    """
    if not made.is_dir():
        return
    lists.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=lists.parent) as scratch:
        new = Path(scratch, "lists")
        new.mkdir()
        for path in made.iterdir():
            # apt names a list by its URL, with `_` for `/`
            if path.name.partition("_")[0] not in without:
                (new / path.name).write_bytes(path.read_bytes())
        try:
            new.rename(lists)
        except OSError:
            # another process kept the same lists at the same time
            return


def build(request: Request, metadata: Metadata, version: str, dependencies: Dependencies, output: Path) -> Built:
    """Build source and binary packages in one sandbox without network.

    Raises:
        PackageError: the source package or the build failed.
    """
    files = Files()
    sources = request.sources
    if sources.pair:
        base.add_tree(files, sources.source, "/build/tree", without=["debian"])
        for blob in blobs(sources.packaging, [path for path in names(sources.packaging) if path.startswith("debian/")]):
            base.add_blob(files, blob, "/build/tree")
    else:
        base.add_tree(files, sources.source, "/build/tree")
    for dependency, path in zip(dependencies.install, base.download(request.config, dependencies), strict=True):
        files.add_file(f"/deps/{dependency.file.replace('%3a', ':')}", path)
    files.add("/pkgci-contents", base.script("deb-contents.sh"))
    made = base.sandboxed(
        request,
        "deb-build.sh",
        *(metadata.name, version, request.target.codename, "all" if request.target.independent else "any"),
        *(
            str(base.date(request, metadata)),
            f"Built from tree {sources.digest}.",
            *request.options(),
            *dependencies.remove,
        ),
        files=files,
        output=output,
        failure=base.build_failure(metadata.name, "source package"),
        keep=request.keep,
    )
    files_made = base.made_files(made, output, r"[^/]+\.(deb|dsc|changes|buildinfo|tar\.[a-z0-9]+)|index\.packages")
    packages = _packages(output, metadata)
    return Built((*files_made, contents.write("deb", output, packages)), packages)


def lint(place: Place, source: str, packages: Sequence[Package], directory: Path) -> Linted:
    """Return what lintian says of the files of a build.

    Raises:
        PackageError: a limit was reached.
        InfrastructureError: lintian failed.
    """
    files = Files()
    for path in sorted(directory.iterdir()):
        if re.search(r"\.(dsc|deb|tar\.[a-z0-9]+)$", path.name):
            files.add_file(f"/in/{path.name}", path)
    said = base.lint_output(place, "deb-lint.sh", files)
    return lintian.read(said["findings"], said["tool"].decode(), source, {one.file: one.name for one in packages})


def _packages(output: Path, metadata: Metadata) -> tuple[Package, ...]:
    """Return the binary packages that dpkg-scanpackages found; its word counts for names, never for files."""
    index = output / "index.packages"
    try:
        if index.stat().st_size > INDEX_BYTES:
            raise PackageError(f"{metadata.name}: the control data of its packages have more than {INDEX_BYTES} bytes")
        with index.open("rb") as stream:
            stanzas = list(deb822.Packages.iter_paragraphs(stream, use_apt_pkg=False))
        packages = tuple(
            base.described(
                *(stanza["Package"], stanza["Version"], stanza["Architecture"]),
                output / Path(stanza["Filename"]).name,
                debug=stanza.get("Auto-Built-Package") == "debug-symbols",
            )
            for stanza in stanzas
        )
    except (KeyError, ValueError, OSError) as error:
        raise PackageError(f"{metadata.name}: its binary packages have no readable control data: {error}") from error
    built = sorted(path.name for path in output.glob("*.deb"))
    if sorted(package.file for package in packages) != built:
        raise PackageError(f"{metadata.name}: its packages and their control data do not agree: {', '.join(built)}")
    return packages
