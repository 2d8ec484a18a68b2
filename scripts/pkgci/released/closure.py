"""Whether a publication newly breaks dependencies: asked of apt's and dnf's own solvers, over release and upstream.

Only packages that it can concern are asked about: those that come, and those that depend on a name which a build that
comes or goes provides. One that cannot be installed afterwards is refused unless it could not be before either.

An RPM target that is built on Debian has no upstream of RPM packages: there, what no package of the release provides is
taken as given.
"""

import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Protocol

from pkgci.command import run
from pkgci.config import Target
from pkgci.errors import InfrastructureError, PackageError
from pkgci.lazy import Lazy
from pkgci.locks import locked
from pkgci.upstream import apt_sources, dnf_files, isolated_apt

createrepo_c = Lazy("createrepo_c")

State = Mapping[str, Sequence[bytes]]

SECONDS = 600
APT_DEPENDS = re.compile(r"^(?:Pre-Depends|Depends): (.+)$", re.MULTILINE)
APT_BUILD_DEPENDS = re.compile(r"^Build-Depends(?:-Arch|-Indep)?: (.+(?:\n .+)*)$", re.MULTILINE)
APT_PROVIDES = re.compile(r"^Provides: (.+)$", re.MULTILINE)
RPM_PART = {part: re.compile(rf"<rpm:{part}>(.*?)</rpm:{part}>", re.DOTALL) for part in ("provides", "requires")}
RPM_ENTRY = re.compile(r'<rpm:entry name="([^"]*)"([^>]*)>')
RPM_FILE = re.compile(r"<file(?: type=\"ghost\")?>([^<]*)</file>")


@dataclass(frozen=True)
class Packet:
    """A package by the names that apt or dnf knows it by, with what it needs and what it offers, by name."""

    name: str
    exact: str
    depends: frozenset[str]
    offers: frozenset[str]


@dataclass(frozen=True)
class Case:
    """A question: what the index says before and after, by metadata file, and which packages may be concerned.

    Each of those is with what it was before, or None when it is new.
    """

    before: State
    after: State
    concerned: tuple[tuple[Packet, Packet | None], ...]


class Solver(Protocol):
    """A package manager over upstream and one of the two states."""

    def unmet(self, packet: Packet) -> str:
        """Return why a package cannot be installed, in one line; nothing when it can."""


def case(
    form: str,
    before: State,
    after: State,
) -> Case | None:
    """Return what has to be asked, or None when no package is concerned.

    Args:
        form: `deb` or `rpm`.
        before: what the index says now, by metadata file, a text for each package.
        after: what it will say.
    """
    read = _apt_packet if form == "deb" else _rpm_packet
    then, now = _main(before), _main(after)
    gone, coming = (sorted(map(read, map(bytes.decode, texts)), key=str) for texts in (then - now, now - then))
    former = {packet.name: packet for packet in gone}
    names = {name for packet in [*gone, *coming] for name in packet.offers}
    # a quick look before the careful one
    mentioned = re.compile("|".join(sorted(map(re.escape, names))) or "(?!)")
    same = [read(text.decode()) for text in sorted(then & now) if mentioned.search(text.decode())]
    concerned = [(packet, former.get(packet.name)) for packet in coming if packet.depends]
    concerned += [(packet, packet) for packet in same if packet.depends & names]
    return Case(before, after, tuple(concerned)) if concerned else None


def check(asked: Case, target: Target, form: str, cache: Path) -> None:
    """Ask, and refuse what is newly broken.

    Args:
        asked: the question.
        target: says what is upstream.
        form: `deb` or `rpm`.
        cache: a directory of our own, for what is known of upstream.

    Raises:
        PackageError: it names the package, and what its package manager says.
        InfrastructureError: upstream cannot be read.
    """
    solver = _apt if form == "deb" else _dnf
    states = asked.before, asked.after
    with solver(1, states, target, cache) as after:
        failing = [(packet, former, why) for packet, former in asked.concerned for why in [after.unmet(packet)] if why]
    if not failing:
        return
    with solver(0, states, target, cache) as before:
        for packet, former, why in failing:
            if former is None or not before.unmet(former):
                raise PackageError(f"{packet.exact} cannot be installed once this is published: {why}")


def unmet(form: str, state: State, target: Target, cache: Path) -> Iterator[str]:
    """Yield a line for each package that cannot be installed, with what its package manager says.

    Args:
        form: `deb` or `rpm`.
        state: what the index says, by metadata file, a text for each package.
        target: says what is upstream.
        cache: as of `check`.

    Raises:
        InfrastructureError: upstream cannot be read.
    """
    read, solver = (_apt_packet, _apt) if form == "deb" else (_rpm_packet, _dnf)
    packets = sorted((read(text.decode()) for text in _main(state)), key=lambda packet: packet.exact)
    with solver(0, (state,), target, cache) as now:
        for packet in packets:
            why = now.unmet(packet) if packet.depends else ""
            if why:
                yield f"{packet.exact} cannot be installed: {why}"


def _main(state: State) -> set[bytes]:
    """Return the texts that say what packages need and offer."""
    return {text for name, texts in state.items() if name == "primary" or name.endswith("/Packages") for text in texts}


def offered(form: str, texts: Iterable[bytes]) -> set[str]:
    """Return the names that binary packages offer, by what the index says of them."""
    read = _apt_packet if form == "deb" else _rpm_packet
    return {name for text in texts for name in read(text.decode()).offers}


def build_depending(form: str, texts: Iterable[bytes], names: Collection[str]) -> set[str]:
    """Return the source packages that build-depend on one of these names.

    Args:
        form: `deb` or `rpm`.
        texts: what the index says of source packages; of an RPM repository also of others.
        names: the names.
    """
    found = set()
    mentioned = re.compile("|".join(sorted(map(re.escape, names))) or "(?!)")
    for text in (text.decode() for text in texts):
        if mentioned.search(text):
            source, needs = (_apt_source if form == "deb" else _rpm_source)(text)
            found |= {source} if needs & set(names) else set()
    return found


def _apt_source(text: str) -> tuple[str, set[str]]:
    words = [word.strip() for field in APT_BUILD_DEPENDS.findall(text) for word in re.split(r"[,|]", field)]
    name = re.search("^Package: (.+)$", text, re.MULTILINE)
    return name[1] if name else "", {re.split(r"[ (:\[<]", word, maxsplit=1)[0] for word in words}


def _rpm_source(text: str) -> tuple[str, set[str]]:
    if "<arch>src</arch>" not in text:
        return "", set()
    return re.findall("<name>([^<]*)</name>", text)[0], _rpm_names(text, "requires")


def _rpm_names(text: str, part: str) -> set[str]:
    return {unescape(name) for found in RPM_PART[part].findall(text) for name, _ in RPM_ENTRY.findall(found)}


def _apt_packet(text: str) -> Packet:
    fields = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line and not line.startswith(" "))
    depends = {
        re.split(r"[ (:]", word.strip(), maxsplit=1)[0]
        for field in APT_DEPENDS.findall(text)
        for word in re.split(r"[,|]", field)
    }
    provided = {word.split()[0] for field in APT_PROVIDES.findall(text) for word in field.split(",") if word.split()}
    name = fields["Package"]
    return Packet(name, f"{name}={fields['Version']}", frozenset(depends), frozenset({name, *provided}))


def _rpm_packet(text: str) -> Packet:
    name = re.findall("<name>([^<]*)</name>", text)[0]
    ((epoch, version, release),) = re.findall('<version epoch="([^"]*)" ver="([^"]*)" rel="([^"]*)"/>', text)[:1]
    (architecture,) = re.findall("<arch>([^<]*)</arch>", text)[:1]
    offers = _rpm_names(text, "provides") | set(map(unescape, RPM_FILE.findall(text))) | {name}
    depends = frozenset() if architecture == "src" else frozenset(_rpm_names(text, "requires"))
    return Packet(name, f"{name}-{epoch or 0}:{version}-{release}.{architecture}", depends, frozenset(offers))


@contextmanager
def _apt(which: int, states: Sequence[State], target: Target, cache: Path) -> Iterator[Solver]:
    state = states[which]
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache), tempfile.TemporaryDirectory() as scratch:
        for name in ("state/lists/partial", "cache/archives/partial", "etc", "repository"):
            (cache / name).mkdir(parents=True, exist_ok=True)
        own = Path(scratch)
        texts = {text for name, found in state.items() if name.endswith("/Packages") for text in found}
        (own / "Packages").write_bytes(b"".join(sorted(texts)))
        upstream = [source.line() for source in apt_sources(target)] if _has_upstream(target) else []
        release = f"deb [trusted=yes allow-insecure=yes] file:{own} ./"
        (cache / "etc/sources.list").write_text("\n".join([*upstream, release, ""]))
        (cache / "status").touch()
        environment = isolated_apt(cache)
        options = {"Dir::State": cache / "state", "Dir::State::status": cache / "status", "Dir::Cache": cache / "cache"}
        options |= {"Dir::Etc": cache / "etc", "APT::Architecture": target.architecture, "Debug::NoLocking": "true"}
        apt = ["apt-get", "-q", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
        environment |= {"LC_ALL": "C"}
        update = [*apt, "-o", "APT::Update::Error-Mode=any", "update"]
        done = run(update, env=environment, timeout=SECONDS, check=False, quiet=True)
        if done.returncode:
            why = _why(done.stdout + done.stderr, "Failed to fetch", "E: ")
            raise InfrastructureError(
                f"dependencies cannot be checked, since upstream cannot be read: {why}; retry later"
            )

        class Apt:
            def unmet(self, packet: Packet) -> str:
                command = [*apt, "--simulate", "--no-install-recommends", "install", packet.exact]
                done = run(command, env=environment, timeout=SECONDS, check=False, quiet=True)
                return _why(done.stdout + done.stderr, " : ", "E: ") if done.returncode else ""

        yield Apt()


@contextmanager
def _dnf(which: int, states: Sequence[State], target: Target, cache: Path) -> Iterator[Solver]:
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache), tempfile.TemporaryDirectory() as scratch:
        own = Path(scratch)
        repos = own / "etc/yum.repos.d"
        repos.mkdir(parents=True)
        if target.base == "rpm":
            for path, text in dnf_files(target).items():
                place = own / path.lstrip("/")
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(text.replace("/etc/pki/pkgci/", f"{own}/etc/pki/pkgci/"))
        given = None if target.base == "rpm" else _given({text for state in states for text in state["primary"]})
        _write_rpm_repository(own / "release", states[which], given)
        (repos / "release.repo").write_text(
            f"[release]\nname=release\nbaseurl=file://{own}/release\nenabled=1\ngpgcheck=0\nmetadata_expire=0\npriority=1\n"
        )
        (own / "dnf.conf").write_text(
            f"[main]\nplugins=0\nreposdir={repos}\ncachedir={cache}/dnf\nlogdir={own}/log\npersistdir={own}/persist\n"
            "module_platform_id=platform:pkgci\ninstall_weak_deps=False\n"
        )
        # dnf insists on being root, if only of its own namespace
        command = ["unshare", "--map-root-user"] if os.getuid() else []
        command += ["dnf", "-y", "-c", str(own / "dnf.conf"), f"--installroot={own / 'root'}", "--releasever=1"]
        environment = {"LC_ALL": "C", "HOME": scratch}

        class Dnf:
            def unmet(self, packet: Packet) -> str:
                words = [*command, "--assumeno", "install", packet.exact]
                done = run(words, env=environment, timeout=SECONDS, check=False, quiet=True)
                said = done.stdout + done.stderr
                if b"Operation aborted." in said or not done.returncode:
                    return ""
                why = _why(said, "nothing provides", "Problem", "Error: ")
                if "nothing provides" in why or "Problem" in why or "Unable to find" in why:
                    return why
                raise InfrastructureError(f"dnf cannot say whether {packet.exact} can be installed: {why}")

        yield Dnf()


def _write_rpm_repository(place: Path, state: State, given: "createrepo_c.Package | None") -> None:
    """Write a repository of a state, and of one package more."""
    folder = place / "repodata"
    folder.mkdir(parents=True)
    index = createrepo_c.Repomd()
    files = {
        "primary": createrepo_c.PrimaryXmlFile,
        "filelists": createrepo_c.FilelistsXmlFile,
        "other": createrepo_c.OtherXmlFile,
    }
    for name, kind in files.items():
        path = folder / f"{name}.xml.gz"
        writer = kind(str(path), createrepo_c.GZ_COMPRESSION)
        writer.set_num_of_pkgs(len(state[name]) + bool(given))
        for text in state[name]:
            writer.add_chunk(text.decode())
        if given:
            writer.add_pkg(given)
        writer.close()
        record = createrepo_c.RepomdRecord(name, str(path))
        record.fill(createrepo_c.SHA256)
        index.set_record(record)
    (folder / "repomd.xml").write_text(index.xml_dump())


def _given(primary: Iterable[bytes]) -> "createrepo_c.Package":
    """Return a package that provides each capability which packages need and none of the release ever provided."""
    texts = [text.decode() for text in primary]
    offered = {name for text in texts for name in _rpm_packet(text).offers}
    package = createrepo_c.Package()
    package.name, package.version, package.release, package.arch, package.epoch = "upstream", "0", "0", "noarch", "0"
    package.pkgId, package.checksum_type, package.location_href = "0" * 64, "sha256", "upstream.rpm"
    needed: dict[tuple[str, ...], None] = {}
    for text in texts:
        for found in RPM_PART["requires"].findall(text):
            for name, rest in RPM_ENTRY.findall(found):
                said = dict(re.findall(r'(\w+)="([^"]*)"', rest))
                if unescape(name) not in offered and not name.startswith("("):
                    needed[(unescape(name), said.get("epoch", "0"), said.get("ver", ""), said.get("rel", ""))] = None
    package.provides = [
        (name, "EQ" if version else None, epoch, version, release, False) for name, epoch, version, release in needed
    ]
    return package


def _has_upstream(target: Target) -> bool:
    return target.upstream.machine or bool(target.upstream.repositories)


def _why(said: bytes, *marks: str) -> str:
    """Return the line of a solver's output that says why, as text for a log."""
    lines = [
        "".join(char for char in line if char.isprintable()).strip()
        for line in said.decode(errors="replace").splitlines()
    ]
    for mark in marks:
        for line in lines:
            if mark in f"{line} " and line:
                return line[:300]
    return (lines or ["it said nothing"])[-1][:300]
