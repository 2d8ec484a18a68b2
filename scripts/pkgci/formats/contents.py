"""What is in binary packages, as the format's own tools read it in the sandbox; see deb-contents.sh and rpm-contents.sh.

A build leaves it as `contents.json` beside its packages. All of it is a package's word: it is cut to limits here, and
what cannot be understood is left out. Of a DEB package it decides which files conflict with another one's: there, one of
whose files some are left out is not published.
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pkgci.artifacts import Contents, Package, PackageContents, PackagedFile
from pkgci.lazy import Lazy

deb822 = Lazy("debian.deb822")

NAME = "contents.json"
# bytes of what the scripts leave for one package; of a script; characters of one relation; files of all packages
BYTES, SCRIPT_BYTES, WORD, FILES = 16 << 20, 1 << 16, 500, 100_000
RELATIONS = 2000
PATH = 4096
DEB_RELATIONS = (
    *("Pre-Depends", "Depends", "Recommends", "Suggests", "Enhances"),
    *("Breaks", "Conflicts", "Replaces", "Provides", "Built-Using"),
)
DEB_SCRIPTS = ("preinst", "postinst", "prerm", "postrm", "config", "triggers", "conffiles")
RPM_RELATIONS = {
    "REQUIRES": "Requires",
    "RECOMMENDS": "Recommends",
    "SUGGESTS": "Suggests",
    "SUPPLEMENTS": "Supplements",
    "ENHANCES": "Enhances",
    "CONFLICTS": "Conflicts",
    "OBSOLETES": "Obsoletes",
    "PROVIDES": "Provides",
}
RPM_SCRIPTS = {
    "PRETRANS": "%pretrans",
    "PREIN": "%pre",
    "POSTIN": "%post",
    "PREUN": "%preun",
    "POSTUN": "%postun",
    "POSTTRANS": "%posttrans",
    "VERIFYSCRIPT": "%verifyscript",
}
# tar(1), --quoting-style=c; the size of a device is its numbers
TAR_LINE = re.compile(
    r'^(?P<mode>[-dlhcbpsC?]\S{9})\S* +\S+ +(?P<size>[\d,]+) +\S+ +\S+ "(?P<path>(?:[^"\\]|\\.)*)"'
    r'(?: (?:->|link to) "(?P<target>(?:[^"\\]|\\.)*)")?$',
    re.MULTILINE,
)
QUOTED = r"'(?:[^']|'\\'')*'"
RPM_LINE = re.compile(rf"^(?P<mode>\S{{10}}) (?P<size>\d+) (?P<path>{QUOTED}) (?P<target>{QUOTED})$", re.MULTILINE)
RPM_TAG = re.compile(rf"^(?P<name>[A-Z]+(?:\.program)?) (?P<value>{QUOTED})$", re.MULTILINE)
C_ESCAPES = {"n": 10, "t": 9, "r": 13, "a": 7, "b": 8, "f": 12, "v": 11}


def write(form: str, output: Path, packages: Sequence[Package]) -> Path:
    """Write `contents.json` of a build into its output; see `read`. Returns its path."""
    path = output / NAME
    if path.is_dir():
        # nothing of ours
        shutil.rmtree(path)
    read(form, output, packages).write(path)
    return path


def read(form: str, output: Path, packages: Sequence[Package]) -> Contents:
    """Read what a contents script left.

    Args:
        form: `deb` or `rpm`.
        output: what the sandbox's `/out` became.
        packages: the binary packages that it was to read.

    Returns:
        What is in those of them that could be read.
    """
    found, left = [], FILES
    for package in packages:
        place = output / "contents" / package.file
        if not (place / "files").is_file():
            continue
        installed, relations, scripts = (_deb if form == "deb" else _rpm)(place)
        files = tuple((_deb_files if form == "deb" else _rpm_files)(_text(place / "files")))[:left]
        left -= len(files)
        count = _number(_text(place / "count"))
        found.append(
            PackageContents(
                name=package.name,
                version=package.version,
                architecture=package.architecture,
                file=package.file,
                installed=installed,
                relations={name: words for name, words in relations.items() if words},
                scripts={name: text for name, text in scripts.items() if text},
                files=files,
                # tar counts the root, too
                more_files=max(0, count - len(files) - (form == "deb")),
            )
        )
    return Contents(packages=tuple(found))


def _text(path: Path, largest: int = BYTES) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as stream:
        return stream.read(largest).decode(errors="replace")


def _number(text: str) -> int:
    return int(text) if re.fullmatch(r"[0-9]{1,15}\s*", text, re.ASCII) else 0


def _script(text: str) -> str:
    whole = text.rstrip("\n")
    return whole if len(whole) < SCRIPT_BYTES else f"{whole[:SCRIPT_BYTES]}\n[cut after {SCRIPT_BYTES >> 10} KiB]"


def _deb(place: Path) -> tuple[int, Mapping[str, tuple[str, ...]], Mapping[str, str]]:
    """Return installed size, relations and maintainer scripts of a DEB package (Debian Policy 5.6.20, 7, 6)."""
    try:
        control = deb822.Deb822(_text(place / "control"))
    except ValueError:
        control = deb822.Deb822()
    relations = {name: tuple(_split(control.get(name, ""))) for name in DEB_RELATIONS}
    scripts = {name: _script(_text(place / name, SCRIPT_BYTES + 1)) for name in DEB_SCRIPTS}
    return _number(control.get("Installed-Size", "")) << 10, relations, scripts


def _split(field: str) -> list[str]:
    words = [" ".join(word.split())[:WORD] for word in field.split(",")]
    return [word for word in words if word][:RELATIONS]


def _deb_files(text: str) -> Iterator[PackagedFile]:
    for line in TAR_LINE.finditer(text):
        target, mode, path = line["target"], line["mode"], _from_c(line["path"]).removeprefix("./").strip("/")
        if not path:
            # the root itself
            continue
        yield PackagedFile(
            path=f"/{path}"[:PATH],
            # a hard link is the file that it leads to
            mode=mode.replace("h", "-", 1) if mode.startswith("h") else mode,
            size=_number(line["size"]),
            target=None if target is None else _from_c(target)[:PATH],
        )


def _from_c(text: str) -> str:
    """Return what a string of C stands for."""

    def one(found: re.Match[bytes]) -> bytes:
        word = found[1].decode()
        return bytes([int(word, 8) & 255 if word.isdigit() else C_ESCAPES.get(word, ord(word))])

    return re.sub(rb"\\([0-7]{1,3}|.)", one, text.encode(), flags=re.DOTALL).decode(errors="replace")


def _rpm(place: Path) -> tuple[int, Mapping[str, tuple[str, ...]], Mapping[str, str]]:
    """Return installed size, relations and scriptlets of an RPM package."""
    tags = _text(place / "tags")
    relations: dict[str, list[str]] = {name: [] for name in RPM_RELATIONS.values()}
    programs: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for tag in RPM_TAG.finditer(tags):
        name, _, program = tag["name"].partition(".")
        value = _from_shell(tag["value"])
        if name in RPM_RELATIONS:
            # what rpm itself must be able to do says nothing of the package
            if not value.startswith("rpmlib("):
                relations[RPM_RELATIONS[name]].append(value[:WORD])
        elif name in RPM_SCRIPTS and program:
            programs.setdefault(RPM_SCRIPTS[name], []).append(value)
        elif name in RPM_SCRIPTS:
            texts[RPM_SCRIPTS[name]] = value
    scripts = {name: _script(f"#!{' '.join(words)}\n{texts.get(name, '')}") for name, words in programs.items()}
    scripts["triggers"] = _script(_text(place / "triggers", SCRIPT_BYTES + 1))
    installed = re.match(r"installed ([0-9]{1,15})$", tags, re.MULTILINE)
    return (
        int(installed[1]) if installed else 0,
        {name: tuple(words[:RELATIONS]) for name, words in relations.items()},
        scripts,
    )


def _rpm_files(text: str) -> Iterator[PackagedFile]:
    for line in RPM_LINE.finditer(text):
        target = _from_shell(line["target"])[:PATH]
        yield PackagedFile(
            path=_from_shell(line["path"])[:PATH],
            mode=line["mode"],
            size=_number(line["size"]),
            target=target or None,
        )


def _from_shell(text: str) -> str:
    """Return what a word in single quotes stands for."""
    return text[1:-1].replace("'\\''", "'")
