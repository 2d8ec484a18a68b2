"""Tiny valid packages, made without the formats' tools, so that there can be thousands; and builds of them in a store."""

import gzip
import hashlib
import io
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import createrepo_c

from pkgci.artifacts import Contents, Package, PackageContents, PackagedFile
from pkgci.config import Config
from pkgci.store import Entry, Record, Store, describe

TREE = "7" * 40


def deb(
    directory: Path,
    name: str,
    version: str,
    *,
    architecture: str = "all",
    source: str = "",
    files: Mapping[str, bytes] | None = None,
    fields: Mapping[str, str] | None = None,
    scripts: Mapping[str, str] | None = None,
) -> Path:
    """Write a binary package into `directory`; see deb(5). `files` are by their absolute paths, `scripts` by their names."""
    about = {
        "Package": name,
        **({"Source": source} if source else {}),
        "Version": version,
        "Architecture": architecture,
        "Maintainer": "A Person <person@example.org>",
        "Section": "misc",
        "Priority": "optional",
        **(fields or {}),
        "Description": f"what {name} is\n It is a package for tests.",
    }
    control = "".join(f"{field}: {value}\n" for field, value in about.items()).encode()
    content = files if files is not None else {f"/usr/share/{name}/text": version.encode()}
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": _tar(
            {"/control": control, **{f"/{script}": text.encode() for script, text in (scripts or {}).items()}}
        ),
        "data.tar.gz": _tar(content),
    }
    written = b"!<arch>\n"
    for member, data in members.items():
        written += (
            f"{member:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    path = directory / f"{name}_{version.partition(':')[2] or version}_{architecture}.deb"
    path.write_bytes(written)
    stanza = control.decode().rstrip() + f"\nFilename: ./{path.name}\n"
    path.with_suffix(".stanza").write_text(stanza)
    said = PackageContents(
        name=name,
        version=version,
        architecture=architecture,
        file=path.name,
        installed=0,
        relations={field: tuple(words.split(", ")) for field, words in (fields or {}).items()},
        scripts={},
        files=tuple(PackagedFile(path=file, mode="-rw-r--r--", size=len(data)) for file, data in content.items()),
    )
    path.with_suffix(".contents").write_text(said.model_dump_json())
    return path


def _tar(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        made: set[str] = set()
        for path, content in files.items():
            parents = path.strip("/").split("/")[:-1]
            for depth in range(len(parents) + 1):
                parent = "./" + "/".join(parents[:depth])
                if parent not in made:
                    made.add(parent)
                    directory = tarfile.TarInfo(parent)
                    directory.type, directory.mode = tarfile.DIRTYPE, 0o755
                    tar.addfile(directory)
            member = tarfile.TarInfo(f".{path}")
            member.size, member.mode = len(content), 0o755 if content.startswith(b"#!") else 0o644
            tar.addfile(member, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), 6, mtime=0)


def dsc(directory: Path, source: str, version: str, build_depends: str = "") -> list[Path]:
    """Write a native source package into `directory`; return its files."""
    plain = version.partition(":")[2] or version
    tarball = directory / f"{source}_{plain}.tar.gz"
    tarball.write_bytes(_tar({f"/{source}/debian/rules": b"#!/usr/bin/make -f\n"}))
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    path = directory / f"{source}_{plain}.dsc"
    path.write_text(
        f"Format: 3.0 (native)\nSource: {source}\nBinary: {source}\nArchitecture: all\nVersion: {version}\n"
        "Maintainer: A Person <person@example.org>\n"
        + (f"Build-Depends: {build_depends}\n" if build_depends else "")
        + f"Checksums-Sha256:\n {digest} {tarball.stat().st_size} {tarball.name}\n"
        f"Files:\n {'0' * 32} {tarball.stat().st_size} {tarball.name}\n"
    )
    return [tarball, path]


def deliver_debs(
    config: Config,
    place: Path,
    source: str,
    version: str,
    debs: Sequence[Path],
    *,
    key: str = "",
    target: str = "bookworm-amd64",
    tree: str = TREE,
    packaging: str = "",
    dsc_name: str = "",
    build_depends: str = "",
    namespace: str = "release",
) -> Entry:
    """Put a build of binary packages that `deb` made into the store, with a source package (of another name, if given)."""
    place.mkdir(parents=True, exist_ok=True)
    stanzas = place / "index.packages"
    stanzas.write_text("\n".join(path.with_suffix(".stanza").read_text() for path in debs))
    contents = place / "contents.json"
    known = [path.with_suffix(".contents") for path in debs if path.with_suffix(".contents").exists()]
    said = [PackageContents.model_validate_json(path.read_bytes()) for path in known]
    Contents(packages=tuple(said)).write(contents)
    files = [*debs, *dsc(place, dsc_name or source, version, build_depends), stanzas, contents]
    packages = []
    for path in debs:
        said = dict(
            line.split(": ", 1) for line in path.with_suffix(".stanza").read_text().splitlines() if line[0] != " "
        )
        packages.append(
            Package(
                name=said["Package"],
                version=said["Version"],
                architecture=said["Architecture"],
                file=path.name,
                sha256=describe(path).sha256,
            )
        )
    return deliver(
        config, source, version, target, packages, files, key=key, tree=tree, packaging=packaging, namespace=namespace
    )


def deliver(
    config: Config,
    source: str,
    version: str,
    target: str,
    packages: Sequence[Package],
    files: Sequence[Path],
    *,
    key: str = "",
    tree: str = TREE,
    packaging: str = "",
    namespace: str = "release",
) -> Entry:
    """Put a build into the store, from one tree, or from two."""
    described = [describe(path) for path in files]
    made_from = [source, version, target, tree, packaging, namespace, *sorted(file.sha256 for file in described)]
    key = key or hashlib.sha256("\n".join(made_from).encode()).hexdigest()
    record = Record(
        key=key,
        algorithm=1,
        package=source,
        version=version,
        target=target,
        format=config.target(target).format,
        trees=(tree, packaging or tree),
        namespace=namespace,
        packages=tuple(packages),
        files=tuple(described),
    )
    store = Store(config)
    with store.claim(key, wait=0) as lease:
        return lease if isinstance(lease, Entry) else store.deliver(lease, record, files)


def rpm(directory: Path, name: str, version: str, *, files: Mapping[str, bytes]) -> Path:
    """Write a binary package `NAME-VERSION-1.noarch.rpm` into `directory`, as rpm's own format page says.

    Source: https://rpm-software-management.github.io/rpm/manual/format_v4.html
    """
    folders = sorted({f"{path.rpartition('/')[0]}/" for path in files})
    paths = sorted(files)
    count = len(paths)
    payload = b"".join(_cpio(f".{path}", files[path], number) for number, path in enumerate(paths, start=1))
    packed = gzip.compress(payload + _cpio("TRAILER!!!", b"", 0), 6, mtime=0)
    text, texts, words, short, word = 6, 8, 9, 3, 4
    tags: list[tuple[int, int, list]] = [
        (100, texts, ["C"]),
        (1000, text, [name]),
        (1001, text, [version]),
        (1002, text, ["1"]),
        (1004, words, [f"what {name} is"]),
        (1005, words, ["It is a package for tests."]),
        (1006, word, [1_700_000_000]),
        (1009, word, [sum(map(len, files.values()))]),
        (1014, text, ["MIT"]),
        (1016, words, ["Unspecified"]),
        (1021, text, ["linux"]),
        (1022, text, ["noarch"]),
        (1028, word, [len(files[path]) for path in paths]),
        (1030, short, [0o100644] * count),
        (1033, short, [0] * count),
        (1034, word, [1_700_000_000] * count),
        (1035, texts, [hashlib.sha256(files[path]).hexdigest() for path in paths]),
        (1036, texts, [""] * count),
        (1037, word, [0] * count),
        (1039, texts, ["root"] * count),
        (1040, texts, ["root"] * count),
        (1044, text, [f"{name}-{version}-1.src.rpm"]),
        (1045, word, [0xFFFFFFFF] * count),
        (1047, texts, [name]),
        (1048, word, [0x100000A, 0x100000A]),
        (1049, texts, ["rpmlib(CompressedFileNames)", "rpmlib(PayloadFilesHavePrefix)"]),
        (1050, texts, ["3.0.4-1", "4.0-1"]),
        (1095, word, [1] * count),
        (1096, word, list(range(1, count + 1))),
        (1097, texts, [""] * count),
        (1112, word, [8]),
        (1113, texts, [f"{version}-1"]),
        (1116, word, [folders.index(f"{path.rpartition('/')[0]}/") for path in paths]),
        (1117, texts, [path.rpartition("/")[2] for path in paths]),
        (1118, texts, folders),
        (1124, text, ["cpio"]),
        (1125, text, ["gzip"]),
        (1126, text, ["6"]),
        (5011, word, [8]),
        (5062, text, ["utf-8"]),
        (5092, texts, [hashlib.sha256(packed).hexdigest()]),
        (5093, word, [8]),
    ]
    header = _header(63, tags)
    digests = [(273, text, [hashlib.sha256(header).hexdigest()]), (1000, word, [len(header) + len(packed)])]
    signature = _header(62, digests)
    lead = struct.pack(">4sBBhh66shh16x", b"\xed\xab\xee\xdb", 3, 0, 0, 1, f"{name}-{version}-1".encode()[:65], 1, 5)
    path = directory / f"{name}-{version}-1.noarch.rpm"
    path.write_bytes(lead + signature + b"\0" * (-len(signature) % 8) + header + packed)
    return path


def _header(region: int, tags: Sequence[tuple[int, int, list]]) -> bytes:
    index, store = [], b""
    for tag, kind, values in tags:
        if kind in (3, 4):
            size = {3: 2, 4: 4}[kind]
            store += b"\0" * (-len(store) % size)
            data = struct.pack(f">{len(values)}{'H' if kind == 3 else 'I'}", *values)
        else:
            data = b"".join(value.encode() + b"\0" for value in values)
        index.append(struct.pack(">IIII", tag, kind, len(store), len(values)))
        store += data
    # the first entry says where the last 16 bytes are, which say where the entries begin
    index.insert(0, struct.pack(">IIII", region, 7, len(store), 16))
    store += struct.pack(">IIiI", region, 7, -16 * len(index), 16)
    return b"\x8e\xad\xe8\x01\0\0\0\0" + struct.pack(">II", len(index), len(store)) + b"".join(index) + store


def _cpio(path: str, content: bytes, number: int) -> bytes:
    name = path.encode() + b"\0"
    mode = 0o100644 if number else 0
    fields = [number, mode, 0, 0, 1, 1_700_000_000 if number else 0, len(content), 0, 0, 0, 0, len(name), 0]
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name
    return head + b"\0" * (-len(head) % 4) + content + b"\0" * (-len(content) % 4)


SPEC = """Name: {name}
Version: {version}
Release: {release}
Summary: What {name} is
License: MIT
BuildArch: noarch
{more}
%description
It is a package for tests.
%install
mkdir -p %{{buildroot}}/usr/share/{name}
echo {version} > %{{buildroot}}/usr/share/{name}/text
%files
/usr/share/{name}
"""


def rpmbuilt(
    directory: Path, name: str, version: str, release: str = "1", more: str = "", spec: str = SPEC
) -> list[Path]:
    """Build an RPM package and its source package by rpmbuild itself; return them."""
    path = directory / f"{name}.spec"
    path.write_text(spec.format(name=name, version=version, release=release, more=more))
    words = ["rpmbuild", "-ba", "--nodeps", "-D", f"_topdir {directory}", "-D", f"_dbpath {directory}/db", str(path)]
    subprocess.run(words, check=True, capture_output=True)
    return sorted(directory.glob("*RPMS/**/*.rpm"))


def rpm_index(place: Path, rpms: Sequence[Path]) -> list[Path]:
    """Write what the sandbox of a build leaves of RPM packages for the index into `place`; return the files."""
    read = [createrepo_c.package_from_rpm(str(path), location_href=path.name) for path in rpms]
    files = []
    kinds = (("metadata", "primary"), ("filelists", "filelists"), ("otherdata", "other"))
    for (root, kind), texts in zip(kinds, zip(*map(createrepo_c.xml_dump, read), strict=True), strict=True):
        files.append(place / f"index.{kind}.xml")
        files[-1].write_text(f'<?xml version="1.0" encoding="UTF-8"?>\n<{root}>\n{"".join(texts)}</{root}>')
    binary = [package for package in read if package.arch != "src"]
    files.append(place / "index.digests")
    lines = [f"{one.location_href} {digest}\n" for one in binary for *_, digest in one.files]
    files[-1].write_text("".join(lines))
    return files


def deliver_rpms(
    config: Config,
    source: str,
    version: str,
    rpms: Sequence[Path],
    *,
    index: Sequence[Path] = (),
    target: str = "debianrpm-amd64",
    tree: str = TREE,
) -> Entry:
    """Put a build of RPM packages into the store; they are of the source's name and version.

    `index` is what `rpm_index` made, where it is not to be made here.
    """
    made = [
        Package(name=source, version=version, architecture="noarch", file=path.name, sha256=describe(path).sha256)
        for path in rpms
        if not path.name.endswith(".src.rpm")
    ]
    with tempfile.TemporaryDirectory() as scratch:
        files = [*rpms, *(index or rpm_index(Path(scratch), rpms))]
        return deliver(config, source, version, target, made, files, tree=tree)
