"""What createrepo_c said of the packages of an RPM build, in its sandbox: the files `index.*` that rpm-build.sh leaves.

No package is opened here. The files are XML, and hostile: they are bounded, have no DOCTYPE and no elements but those that
createrepo_c writes, and must say of each package what the build lists. From what is read the index is written anew:
nothing of the files' own text gets into it.

Source: https://createrepo-c.readthedocs.io; the elements are those of its `xml_dump_*.c`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.parsers import expat

from pkgci.artifacts import Package
from pkgci.errors import InfrastructureError, PackageError
from pkgci.formats.base import WORD
from pkgci.lazy import Lazy

createrepo_c = Lazy("createrepo_c")

# bytes and elements of a file; characters of a text or an attribute; of a path
BYTES, COUNT, TEXT, PATH = 16 << 20, 500_000, 1 << 20, 4096
# attributes of createrepo_c.Package that are elements of `primary`: by themselves, and below `format`
TEXTS = {"name": "name", "arch": "arch", "summary": "summary", "description": "description", "url": "url"}
TEXTS |= {"checksum": "pkgId", "packager": "rpm_packager"}
TEXTS |= {f"format/rpm:{name}": f"rpm_{name}" for name in ("license", "vendor", "group", "buildhost", "sourcerpm")}
RELATIONS = ("provides", "requires", "conflicts", "obsoletes", "suggests", "enhances", "recommends", "supplements")
# what each file has below `package`
PRIMARY = {*TEXTS, "version", "time", "size", "location", "format", "format/file", "format/rpm:header-range"}
PRIMARY |= {f"format/rpm:{name}{below}" for name in RELATIONS for below in ("", "/rpm:entry")}
ELEMENTS = {"primary": PRIMARY, "filelists": {"version", "file"}, "other": {"version", "changelog"}}
DIGESTS = "index.digests"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
SEVERAL_LINES = ("description", "changelog")
FLAGS = (None, "LT", "LE", "EQ", "GE", "GT")
KINDS = ("", "dir", "ghost")

# an element below `package`: where it is, its attributes, its text
Element = tuple[str, Mapping[str, str], str]


def read(directory: Path, source: str, packages: Sequence[Package]) -> "dict[str, createrepo_c.Package]":
    """Return what createrepo_c said of the packages of a build, by their files' names.

    Args:
        directory: has the files.
        source: the source package's name.
        packages: the binary packages of the build.

    Returns:
        Each of `packages`, and the source package if there is one. Time, size and checksum are those of the files as the
        sandbox had them.

    Raises:
        PackageError: a file is not of its form, or what it says is not what the build lists.
        InfrastructureError: a file is missing.
    """
    listed = {package.file: package for package in packages}
    found: dict[str, createrepo_c.Package] = {}
    primary, *others = (_Fragment(directory, source, kind) for kind in ELEMENTS)
    for _, elements in primary.packages:
        package = _package(primary, elements)
        name = package.location_href or ""
        known, epoch = listed.get(name), "" if package.epoch == "0" else f"{package.epoch}:"
        said = (package.name, f"{epoch}{package.version}-{package.release}", package.arch)
        own = name.endswith(".src.rpm") and (package.name, package.arch) == (source, "src")
        if name in found or not (known or own):
            raise primary.refused(f"is about {ascii(name)[:200]}, not once about each package of the build")
        # the index does not tell an epoch of 0 from none, rpm does
        if known and said != (known.name, known.version.removeprefix("0:"), known.architecture):
            raise PackageError(f"{name} is {ascii(' '.join(said))[1:-1][:300]}, not what its build lists")
        found[name] = package
    missing = sorted(listed.keys() - found.keys())
    if missing:
        raise primary.refused(f"says nothing about {missing[0]}")
    digests = _digests(directory, source)
    for fragment in others:
        left = {(package.pkgId, package.name, package.arch): package for package in found.values()}
        for about, elements in fragment.packages:
            package = left.pop(tuple(about.get(name, "") for name in ("pkgid", "name", "arch")), None)
            if package is None:
                raise fragment.refused("is not about the packages of the build, once about each")
            if fragment.kind == "other":
                _put(package, "changelogs", _changelogs(fragment, elements))
            else:
                _put(package, "files", _files(fragment, package, elements, digests.get(package.location_href)))
        if left:
            raise fragment.refused(f"says nothing about {next(iter(left.values())).location_href}")
    return found


def _content(directory: Path, source: str, name: str) -> bytes:
    path = directory / name
    try:
        if path.stat().st_size > BYTES:
            raise PackageError(f"{source}: {name} has more than {BYTES >> 20} MiB")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InfrastructureError(f"{path} is missing: the build left no data for the index; build it again") from error


class _Fragment:
    """One of the XML files; `packages` has the attributes and the elements of each package in it."""

    def __init__(self, directory: Path, source: str, kind: str) -> None:
        self.kind, self._source, self._name = kind, source, f"index.{kind}.xml"
        self.packages: list[tuple[Mapping[str, str], list[Element]]] = []
        self._path: list[str] = []
        self._attributes: Mapping[str, str] = {}
        self._text: list[str] = []
        self._left = COUNT
        parser = expat.ParserCreate("UTF-8")
        parser.buffer_text = True
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = self._text.append, self._doctype
        try:
            parser.Parse(_content(directory, source, self._name), True)
        except expat.ExpatError as error:
            raise self.refused(f"is no XML: {error}") from error

    def refused(self, why: str) -> PackageError:
        """Return the error that says why the file cannot be what createrepo_c wrote about the build."""
        return PackageError(f"{self._source}: {self._name} {why}")

    def _start(self, tag: str, attributes: Mapping[str, str]) -> None:
        self._path.append(tag)
        where = "/".join(self._path[2:])
        if len(self._path) == 2 and tag == "package":
            self.packages.append((attributes, []))
        elif len(self._path) > 1 and where not in ELEMENTS[self.kind]:
            raise self.refused(f"has the element {ascii(tag)[1:-1][:80]}, which createrepo_c does not write there")
        self._left -= 1
        if self._left < 0:
            raise self.refused(f"has more than {COUNT} elements")
        for name, value in attributes.items():
            self._check(name, value)
        self._attributes = attributes
        self._text.clear()

    def _end(self, _: str) -> None:
        where, text = "/".join(self._path[2:]), "".join(self._text).replace("\r\n", "\n")
        if where:
            # between elements there is white space
            text = "" if text.isspace() else text
            self._check(where, text)
            self.packages[-1][1].append((where, self._attributes, text))
        self._path.pop()
        self._text.clear()

    def _doctype(self, *_: object) -> None:
        raise self.refused("has a DOCTYPE, which createrepo_c does not write")

    def _check(self, where: str, text: str) -> None:
        if len(text) > TEXT:
            raise self.refused(f"has more than {TEXT >> 20} MiB in {where}")
        if CONTROL.search(text) or ("\n" in text and where not in SEVERAL_LINES):
            raise self.refused(f"has control characters in {where}")


def _package(primary: _Fragment, elements: Sequence[Element]) -> "createrepo_c.Package":
    """Return a package as `primary` describes it."""
    package = createrepo_c.Package()
    package.checksum_type = "sha256"
    relations: dict[str, list[tuple]] = {name: [] for name in RELATIONS}
    try:
        for where, said, text in elements:
            if where in TEXTS:
                setattr(package, TEXTS[where], text)
            elif where == "version":
                package.epoch = str(_number(primary, said["epoch"]))
                package.version, package.release = said["ver"], said["rel"]
            elif where == "time":
                package.time_build = _number(primary, said["build"])
            elif where == "size":
                package.size_installed = _number(primary, said["installed"])
                package.size_archive = _number(primary, said["archive"])
            elif where == "location":
                package.location_href = said["href"]
            elif where == "format/rpm:header-range":
                package.rpm_header_start = _number(primary, said["start"])
                package.rpm_header_end = _number(primary, said["end"])
            elif where.endswith("/rpm:entry"):
                words = (said["name"], *(said.get(name) for name in ("flags", "epoch", "ver", "rel")))
                if words[1] not in FLAGS:
                    raise primary.refused(f"has the comparison {ascii(words[1])[:80]}, which rpm does not have")
                relations[where.split("/")[1].removeprefix("rpm:")].append((*words, said.get("pre") == "1"))
    except KeyError as error:
        raise primary.refused(f"does not say {error} of a package") from error
    for word in (package.name, package.version, package.release, package.arch):
        if not WORD.fullmatch(word or ""):
            raise primary.refused(f"has {ascii(word)[:80]} in the place of a name, version, release or architecture")
    for name, found in relations.items():
        _put(package, name, found)
    return package


def _put(package: "createrepo_c.Package", attribute: str, values: Sequence[tuple]) -> None:
    # each is put before the former ones
    setattr(package, attribute, list(reversed(values)))


def _changelogs(other: _Fragment, elements: Sequence[Element]) -> list[tuple[str, int, str]]:
    """Return the entries of a package's changelog: author, date, text."""
    return [
        (said.get("author", ""), _number(other, said.get("date", "")), text)
        for where, said, text in elements
        if where == "changelog"
    ]


def _files(
    filelists: _Fragment, package: "createrepo_c.Package", elements: Sequence[Element], digests: Sequence[str] | None
) -> list[tuple[str, str, str, str]]:
    """Return the files of a package: kind, directory, name, digest; those of a source package have no digests."""
    files = [(said.get("type", ""), text) for where, said, text in elements if where == "file"]
    for kind, path in files:
        absolute = path.startswith("/") or package.arch == "src"
        if kind not in KINDS or not absolute or len(path) > PATH or ".." in path.split("/"):
            raise filelists.refused(f"has the path {ascii(path)[1:-1][:200]}, which no package can have")
    if digests is None:
        digests = [""] * len(files)
    if len(digests) != len(files):
        raise filelists.refused(f"and {DIGESTS} do not have the same files of {package.location_href}")
    return [
        (kind, path[: path.rfind("/") + 1], path[path.rfind("/") + 1 :], digest)
        for (kind, path), digest in zip(files, digests, strict=True)
    ]


def _digests(directory: Path, source: str) -> dict[str, list[str]]:
    """Return the digests of the files in each binary package, in its own order, by the package's file name."""
    digests: dict[str, list[str]] = {}
    for line in _content(directory, source, DIGESTS).decode(errors="replace").splitlines():
        found = re.fullmatch(r"(\S{1,255}) ([0-9a-f]{0,128})", line, re.ASCII)
        if not found:
            raise PackageError(f"{source}: {DIGESTS} has {ascii(line)[:80]}, which is no digest of a file")
        digests.setdefault(found[1], []).append(found[2])
    return digests


def _number(fragment: _Fragment, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text, re.ASCII):
        raise fragment.refused(f"has {ascii(text)[:80]} in the place of a number")
    return int(text)
