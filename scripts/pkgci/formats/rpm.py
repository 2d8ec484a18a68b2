"""RPM packages: SRPM from tree and spec, version in Release, BuildRequires really checked, rebuild by rpmbuild.

Sources: rpm's documentation of spec files and of reproducible builds (`%use_source_date_epoch_as_buildtime`).
"""

import hashlib
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from pkgci.artifacts import Package
from pkgci.command import run
from pkgci.errors import InfrastructureError, PackageError, PkgciError
from pkgci.formats import base, contents, fragments, repomd, rpmlint
from pkgci.formats.base import Built, Dependencies, Dependency, Linted, Metadata, Place, Request
from pkgci.sandbox import Files
from pkgci.source import Tree, blobs, identities, names
from pkgci.upstream import index_digest, rpm_repositories

PACKAGING = "rpm/*.spec"
REQUIREMENT = re.compile(r"[A-Za-z0-9_/(][ -~]*", re.ASCII)


def packaged(tree: Tree, package: str) -> bool:
    """Return whether the tree has a spec in `rpm/`."""
    return _spec(tree, package) is not None


def _spec(tree: Tree, package: str) -> str | None:
    """Return the path of the package's spec: the only one in `rpm/`, or the one with the package's name."""
    specs = [path for path in names(tree) if PurePosixPath(path).match("rpm/*.spec") and path.count("/") == 1]
    if len(specs) > 1 and f"rpm/{package}.spec" not in specs:
        raise PackageError(f"{tree.project}: rpm/ has several specs and none is {package}.spec: {', '.join(specs)}")
    return f"rpm/{package}.spec" if len(specs) > 1 else next(iter(specs), None)


def _packaging(tree: Tree) -> list[str]:
    return [path for path in names(tree) if path.startswith("rpm/")]


def inspect(request: Request, packaging: Tree) -> Metadata:
    """Read name, version-release, changelog date and BuildRequires from the spec, which is executed for it.

    Raises:
        PackageError: the spec is broken, or uses %autorelease.
    """
    spec = _spec(packaging, request.sources.package)
    assert spec is not None
    (text,) = (blob.content for blob in blobs(packaging, [spec]))
    if b"%autorelease" in text or b"%{autorelease" in text or b"%{?autorelease" in text:
        raise PackageError(f"{packaging.project}: {spec} uses %autorelease: the same tree would give different bits")

    def make() -> Metadata:
        files = Files()
        for blob in blobs(packaging, _packaging(packaging)):
            base.add_blob(files, blob, "/in")
        files.add("/build/.rpmmacros", _conditions(request))
        with tempfile.TemporaryDirectory() as output:
            base.sandboxed(
                request,
                "rpm-inspect.sh",
                spec,
                files=files,
                output=Path(output),
                failure=lambda _, said: PackageError(f"{packaging.project}: cannot read {spec}: {said}"),
            )
            return base.parsed(Path(output, "metadata.json"), f"{packaging.project}: {spec}")

    made_from = [identities(packaging, _packaging(packaging)), spec, request.profiles]
    return base.cached(request, "metadata", made_from, Metadata, make)


def _conditions(request: Request) -> str:
    """Return the macros that rpmbuild's `--with` and `--without` would define for the request's profiles.

    A profile NAME is `--with NAME`, and noNAME is `--without NAME` too, so that Debian's `nodoc` turns off the condition
    `doc` of a spec. What cannot be in the name of a condition becomes `_`.
    """
    lines = []
    for profile in request.profiles:
        name = re.sub(r"\W", "_", profile, flags=re.ASCII)
        lines.append(f"%_with_{name} --with-{name}\n")
        if len(name) > 2 and name.startswith("no"):
            lines.append(f"%_without_{name[2:]} --without-{name[2:]}\n")
    return "".join(lines)


def dist(request: Request) -> str:
    """Return the value of %dist: vendor suffix, then the target's tag. It sorts above `.el9` and `.fc40`."""
    return f".{base.suffix(request)}.{request.target.tag}"


def version(request: Request, metadata: Metadata) -> str:
    """Return [epoch:]version-release as it will be; the suffix stands in Release."""
    return metadata.version + dist(request)


def newer(one: str, other: str) -> bool:
    """Return whether `[epoch:]version-release` `one` sorts above `other`, by rpm's own comparison."""

    def parts(text: str) -> tuple[str, str, str]:
        epoch, _, rest = text.rpartition(":")
        version, _, release = rest.rpartition("-")
        return epoch or "0", version, release

    for mine, theirs in zip(parts(one), parts(other), strict=True):
        # both are held to the pattern of a version: nothing in them ends a string of Lua
        compared = run(
            ["rpm", "--eval", f"%{{lua:print(rpm.vercmp('{mine}', '{theirs}'))}}"], quiet=True
        ).stdout.strip()
        if compared != b"0":
            return compared == b"1"
    return False


def resolve(request: Request, metadata: Metadata) -> Dependencies:
    """Ask dnf for what the BuildRequires need beyond the root, from the request's repositories and the distribution's.

    What the root offers is in its own rpm database; rpmbuild itself refuses what is missing in the end.

    Raises:
        PackageError: they cannot be satisfied.
        InfrastructureError: a repository cannot be read.
    """
    for requirement in metadata.depends:
        # rpm and dnf would take these for an option, a URL or a file
        if not REQUIREMENT.fullmatch(requirement) or "://" in requirement or requirement.endswith(".rpm"):
            raise PackageError(f"{metadata.name}: BuildRequires: {ascii(requirement)[:100]} is no name of a capability")
    upstream = rpm_repositories(request.target) if request.target.base == "rpm" else ()
    tests = [one.url for one in request.repositories]
    if not upstream and not tests:
        return Dependencies()
    digests = [_index_digest(upstream, upstream=True), _index_digest(tests, upstream=False)]

    def make() -> Dependencies:
        files = Files()
        lines = []
        for number, one in enumerate(request.repositories):
            files.add(f"/etc/pki/pkgci-{number}.asc", one.signing_key)
            lines += [f"[pkgci-{number}]", f"name=pkgci {number}", repomd.location(one), "enabled=1", "gpgcheck=0"]
            lines += ["repo_gpgcheck=1", f"gpgkey=file:///etc/pki/pkgci-{number}.asc", "skip_if_unavailable=0"]
            # the changes ahead before what is released, and both before the distribution's, whatever the versions
            lines += [f"priority={1 + one.released}", ""]
        files.add("/in/pkgci.repo", "\n".join(lines))
        files.add("/in/requires", "\n".join([*metadata.depends, ""]))
        with tempfile.TemporaryDirectory() as directory:

            def failure(_: int, said: str) -> PkgciError:
                missing = "nothing provides" in said or "Unable to find a match" in said
                at_fault = PackageError if missing else InfrastructureError
                return at_fault(f"{metadata.name}: build dependencies cannot be resolved: {said}")

            made = base.sandboxed(
                request, "rpm-resolve.sh", files=files, output=Path(directory), failure=failure, network=True
            )
            return Dependencies(install=tuple(_keep(request, path) for path in made))

    def there(found: Dependencies) -> bool:
        # they are downloaded with the answer; the cache may have been cleaned since
        return all(base.kept(request.config, dependency).exists() for dependency in found.install)

    return base.cached(request, "dependencies", [digests, metadata.depends], Dependencies, make, there)


def _index_digest(repositories: Iterable[str], *, upstream: bool) -> str:
    return index_digest([f"{url}repodata/repomd.xml" for url in repositories], upstream=upstream)


def _keep(request: Request, path: Path) -> Dependency:
    """Move a package that dnf downloaded and checked to the cache from which builds take theirs."""
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    base.keep(request.config, digest, content)
    return Dependency(file=path.name, sha256=digest)


def build(request: Request, metadata: Metadata, version: str, dependencies: Dependencies, output: Path) -> Built:
    """Make the SRPM and rebuild it, in one sandbox without network.

    Raises:
        PackageError: the SRPM or the build failed; a missing BuildRequires is named.
    """
    files = Files()
    sources = request.sources
    spec = _spec(sources.packaging, sources.package)
    assert spec is not None
    own = [] if sources.pair else ["rpm", *(["debian"] if "debian/control" in names(sources.source) else [])]
    files.add("/build/.rpmmacros", _conditions(request))
    files.add_directory("/build/tree")
    base.add_tree(files, sources.source, "/build/tree", without=own)
    for blob in blobs(sources.packaging, _packaging(sources.packaging)):
        base.add_blob(files, blob, "/build/packaging")
    for dependency, path in zip(dependencies.install, base.download(request.config, dependencies), strict=True):
        files.add_file(f"/deps/{dependency.file}", path)
    upstream = metadata.version.rpartition(":")[2].rpartition("-")[0]
    files.add("/pkgci-contents", base.script("rpm-contents.sh"))
    made = base.sandboxed(
        request,
        "rpm-build.sh",
        *(spec, metadata.name, upstream, dist(request), str(base.date(request, metadata)), *request.options()),
        files=files,
        output=output,
        failure=base.build_failure(metadata.name, "SRPM"),
        keep=request.keep,
    )
    packages = _packages(output, metadata)
    # what a repository would refuse is not kept
    fragments.read(output, metadata.name, packages)
    files_made = base.made_files(
        made, output, r"[^/]+\.(rpm|rpmlintrc)|index\.(digests|(primary|filelists|other)\.xml)"
    )
    return Built((*files_made, contents.write("rpm", output, packages)), packages)


def lint(place: Place, source: str, packages: Sequence[Package], directory: Path) -> Linted:
    """Return what rpmlint says of the packages of a build, with the package's own filters if it brought some.

    Raises:
        PackageError: a limit was reached.
        InfrastructureError: rpmlint failed.
    """
    files = Files()
    configurations = ["rpmlint.toml", *(["rpmlint-debian.toml"] if place.target.base == "debian" else [])]
    for name in configurations:
        files.add(f"/in/config/{name}", base.script(name))
    for path in sorted(directory.glob("*.rpm")):
        files.add_file(f"/in/packages/{path.name}", path)
    for path in directory.glob("*.rpmlintrc"):
        files.add_file("/in/rpmlintrc", path)
    said = base.lint_output(place, "rpm-lint.sh", files)
    return rpmlint.read(said["findings"], said.get("unfiltered"), said["tool"].decode(), source)


def _packages(output: Path, metadata: Metadata) -> tuple[Package, ...]:
    """Return the binary packages that rpm's query listed; its word counts for names, never for files."""
    packages = []
    try:
        for line in (output / "packages").read_text().splitlines():
            name, version, architecture, file = line.split()
            debug = name.endswith(("-debuginfo", "-debugsource"))
            packages.append(base.described(name, version, architecture, output / Path(file).name, debug=debug))
    except (ValueError, OSError) as error:
        raise PackageError(f"{metadata.name}: its binary packages cannot be read: {error}") from error
    built = sorted(path.name for path in output.glob("*.rpm") if not path.name.endswith(".src.rpm"))
    if sorted(package.file for package in packages) != built:
        raise PackageError(f"{metadata.name}: its packages and what rpm says do not agree: {', '.join(built)}")
    return tuple(packages)
