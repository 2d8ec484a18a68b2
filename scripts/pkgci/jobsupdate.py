"""Loads the job definitions into Jenkins: shows first what would change, and changes nothing else.

A server writes a definition in its own way, so what it has cannot be compared with what was rendered. Both are remembered of
each definition that was loaded: one that is rendered otherwise now has changed; one that the server has otherwise now was
edited there. What nobody remembers is compared as far as XML can be.
"""

import contextlib
import difflib
import hashlib
import io
import logging
import re
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote
from xml.etree import ElementTree

from pkgci import source
from pkgci.config import ROOT, Config
from pkgci.engines.definitions import render
from pkgci.engines.jenkins import JenkinsEngine, managed
from pkgci.errors import InfrastructureError, RequestError
from pkgci.locks import locked
from pkgci.text import plain

log = logging.getLogger(__name__)
DECLARATION = re.compile(rb"\A\s*<\?xml[^>]*\?>")


@dataclass(frozen=True)
class Difference:
    """One job that is not on the server as it is defined; `lines` show how, as diff(1) does, and `xml` is what to load."""

    job: str
    kind: Literal["new", "changed", "edited", "deleted"]
    lines: tuple[str, ...]
    xml: bytes = b""


class Update:
    """What the server has, beside what is defined.

    Args:
        config: says where the server is, and who loads.
        jobs: the directory with the definitions.

    Raises:
        RequestError: a definition does not render, or there is none; a job of such a name is not ours. Nothing is changed.
        InfrastructureError: the server does not answer, or refuses.
    """

    def __init__(self, config: Config, jobs: Path) -> None:
        rendered = render(jobs, config.cache / "jobs")
        self._defined = {path.parent.name: path.read_bytes() for path in sorted(rendered.glob("*/config.xml"))}
        if not self._defined:
            raise RequestError(f"{jobs} defines no job; all of the server's would be deleted")
        settings = config.settings.jenkins
        self.engine = JenkinsEngine(config, settings.loader if settings else None)
        name = hashlib.sha256(self.engine.url.encode()).hexdigest()[:16]
        self._memory = config.state / "jobs-update" / name
        self._memory.mkdir(parents=True, exist_ok=True)
        self.differences = tuple(self._compare())

    def shown(self) -> str:
        """Return the differences for a person: the names, then the XML."""
        names = "".join(f"{one.kind:8} {one.job}\n" for one in self.differences)
        texts = ("\n".join([f"\n{one.kind} {one.job}", *one.lines, ""]) for one in self.differences)
        return plain(names + "".join(texts)) or "the server has all jobs as they are defined\n"

    def apply(self) -> str:
        """Load what is new or has changed, then delete what is no longer defined; return what was done, in one line.

        Raises:
            InfrastructureError: the server does not answer, or refuses a definition; what was loaded before stays. Or it
                has other definitions by now.
        """
        done: list[str] = []
        with locked(self._memory):
            if tuple(self._compare()) != self.differences:
                raise InfrastructureError(
                    f"{self.engine.url} has changed since its differences were shown; start again"
                )
            for one in self.differences:
                if one.kind == "deleted":
                    if self._busy(one.job):
                        log.warning("%s has builds; it is deleted by an update when it has none", one.job)
                        continue
                    self.engine.ask("POST", f"job/{quote(one.job)}/doDelete")
                    self._forget(one.job)
                else:
                    where = f"createItem?name={quote(one.job)}" if one.kind == "new" else _place(one.job)
                    self.engine.ask("POST", where, data=one.xml)
                    self._remember(one.job, one.xml)
                log.info("%s: %s", one.kind, one.job)
                done.append(one.kind)
        counts = [f"{done.count(kind)} {kind}" for kind in ("new", "changed", "edited", "deleted") if kind in done]
        return f"{', '.join(counts) or 'nothing'} of {len(self._defined)} jobs at {self.engine.url}"

    def _compare(self) -> Iterator[Difference]:
        """Yield the differences; what is deleted comes last."""
        listed = self.engine.ask_json("", "jobs[name,description]").get("jobs") or []
        there = {one["name"]: managed(one.get("description")) for one in listed}
        for job, xml in self._defined.items():
            if job not in there:
                yield Difference(job, "new", _diff("", _readable(xml)), xml)
            elif not there[job]:
                raise RequestError(
                    f"{self.engine.url} has a job {job} that is none of ours; rename it, or delete it there"
                )
            else:
                yield from self._changed(job, xml, self._served(job))
        for job in sorted(name for name, ours in there.items() if ours and name not in self._defined):
            served = self._served(job)
            # another repository's templates may say the same of themselves
            if re.search(rb"<command>exec pkgci [a-z-]+( |<)", served):
                yield Difference(job, "deleted", _diff(_readable(served), ""))

    def _changed(self, job: str, xml: bytes, served: bytes) -> Iterator[Difference]:
        loaded, answered = (self._file(job, kind) for kind in ("loaded", "served"))
        if not (loaded.exists() and answered.exists()):
            if _readable(served) != _readable(xml):
                yield Difference(job, "changed", _diff(_readable(served), _readable(xml)), xml)
        elif loaded.read_bytes() != xml:
            yield Difference(job, "changed", _diff(_readable(loaded.read_bytes()), _readable(xml)), xml)
        elif answered.read_bytes() != served:
            yield Difference(job, "edited", _diff(_readable(served), _readable(answered.read_bytes())), xml)

    def _served(self, job: str) -> bytes:
        return self.engine.ask("GET", _place(job)).content

    def _busy(self, job: str) -> bool:
        said = self.engine.ask_json(f"job/{quote(job)}", "inQueue,builds[building]")
        return bool(said.get("inQueue")) or any(build.get("building") for build in said.get("builds") or ())

    def _file(self, job: str, kind: str) -> Path:
        return self._memory / f"{job}.{kind}.xml"

    def _remember(self, job: str, xml: bytes) -> None:
        # one without the other is no memory: a crash in between costs an update
        self._forget(job)
        self._file(job, "loaded").write_bytes(xml)
        self._file(job, "served").write_bytes(self._served(job))

    def _forget(self, job: str) -> None:
        for kind in ("served", "loaded"):
            self._file(job, kind).unlink(missing_ok=True)


@contextlib.contextmanager
def definitions(config: Config) -> Iterator[Path]:
    """Yield the directory with the definitions that the job loads: those that are merged, where the configuration says it.

    No parameter has a say in it: whoever defines a job has the agents.

    Raises:
        RequestError: the project has no such branch, or no `jobs/` on it.
        InfrastructureError: the remote does not answer.
    """
    settings = config.settings.jenkins
    if settings is None or settings.definitions is None:
        yield ROOT / "jobs"
        return
    wanted = settings.definitions
    if not config.settings.gerrit:
        raise RequestError(f"{config.directory / 'config.yaml'}: no `gerrit`; it says what is merged")
    repository = source.init(config.cache / "git" / f"{wanted.project}.git")
    commit = source.fetch_ref(repository, config.settings.gerrit + wanted.project, f"refs/heads/{wanted.branch}")
    packed = source.git(repository, "archive", "--format=tar", commit, "jobs", check=False)
    if packed.returncode:
        raise RequestError(f"{wanted.project} has no jobs/ on the branch {wanted.branch}")
    log.info("the definitions of %s at %s", wanted.project, commit)
    with tempfile.TemporaryDirectory() as place:
        try:
            with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
                archive.extractall(place, members=[one for one in archive if one.isreg() or one.isdir()])  # noqa: S202 - git made it
        except tarfile.TarError as error:
            raise InfrastructureError(f"cannot unpack the definitions of {wanted.project}: {error}") from error
        yield Path(place, "jobs")


def update(config: Config, dry_run: bool) -> str:
    """Run the job: load what is merged; return what was done, in one line.

    Args:
        config: the configuration.
        dry_run: only show the differences.

    Raises:
        RequestError: as of `Update` and `definitions`.
        InfrastructureError: as of these.
    """
    if config.settings.jenkins is None:
        return "nothing to load: the configuration names no Jenkins, and the local engine reads jobs/ itself"
    place = config.state / "jobs-update"
    place.mkdir(parents=True, exist_ok=True)
    # one after the other: what was merged later is loaded later
    with locked(place), definitions(config) as jobs:
        found = Update(config, jobs)
        for line in found.shown().splitlines():
            log.info("%s", line)
        return f"dry run: {len(found.differences)} jobs differ" if dry_run else found.apply()


def _place(job: str) -> str:
    return f"job/{quote(job)}/config.xml"


def _readable(xml: bytes) -> str:
    """Return XML by the line, without what a server adds to each definition: the plugins' versions."""
    try:
        # Jenkins says that it is XML 1.1, which expat does not read
        root = ElementTree.fromstring(DECLARATION.sub(b"", xml))  # noqa: S314 of the server that runs all jobs
    except ElementTree.ParseError as error:
        raise InfrastructureError(f"a definition is no XML: {error}") from error
    for element in root.iter():
        element.attrib.pop("plugin", None)
        if len(element):
            element.text = None
        element.tail = None
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode")


def _diff(old: str, new: str) -> tuple[str, ...]:
    lines: Sequence[str] = list(
        difflib.unified_diff(old.splitlines(), new.splitlines(), "server", "defined", lineterm="")
    )
    return tuple(lines)
