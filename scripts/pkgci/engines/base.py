"""The verbs of an engine. Jobs meet only here: they start each other with parameters and read each other's artifacts."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field

from pkgci.artifacts import Part, Record
from pkgci.errors import RequestError

Outcome = Literal["SUCCESS", "FAILURE", "ABORTED"]
State = Literal["queued", "running"] | Outcome


@dataclass(frozen=True, order=True)
class BuildRef:
    """One build of a job; as text `JOB/NUMBER`, the form of the parameter `PARENT`.

    In a server's queue a build has no number yet: then `number` is 0, and `request` is its parameter `CORRELATION`.
    """

    job: str
    number: int
    request: str = ""

    def __str__(self) -> str:
        return f"{self.job} (request {self.request})" if self.request else f"{self.job}/{self.number}"

    @classmethod
    def parse(cls, text: str) -> "BuildRef":
        """Read `JOB/NUMBER`.

        Raises:
            RequestError: it is something else.
        """
        job, _, number = text.rpartition("/")
        if not job or not re.fullmatch(r"[0-9]{1,9}", number, re.ASCII):
            raise RequestError(f"{text!r} names no build; write JOB/NUMBER")
        return cls(job, int(number))


@dataclass(frozen=True)
class Urls:
    """Where a person finds a build: its page, its console log, and the directory (with `/`) of what it archived."""

    build: str
    log: str
    archive: str


class Tests(Part):
    """What the JUnit files of a build say: numbers of test cases."""

    total: int
    failed: int
    skipped: int


class BuildInfo(Record):
    """What an engine knows of one build."""

    job: str
    number: int
    state: State
    parameters: dict[str, str]
    queued: datetime
    started: datetime | None = None
    ended: datetime | None = None
    reason: str = Field("", description="why it ended so, where its steps' status does not say it")
    tests: Tests | None = None
    description: str = ""
    node: str = Field("", description="where it runs or ran; empty while that is open")

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.state in ("queued", "running")


class Engine(Protocol):
    """What runs jobs. Every verb raises RequestError for a job or build that does not exist.

    `watch` is how often, in seconds, a build looks at another one that it ends with; an engine that could not tell for
    `patience` seconds is not asked any more.
    """

    watch: float
    patience: float

    def jobs(self) -> list[str]:
        """Return the names of all jobs, sorted."""

    def nodes(self, label: str) -> dict[str, bool]:
        """Return the names of the nodes that take jobs of a label, each with whether it is there now."""

    def start(self, job: str, parameters: Mapping[str, str]) -> BuildRef:
        """Start a build; it may still be queued, and then have no number yet. An unknown parameter is a RequestError."""

    def numbered(self, ref: BuildRef) -> BuildRef:
        """Return the build with its number, or `ref` itself while it has none. Every verb takes either."""

    def wait(self, ref: BuildRef, timeout: float | None = None) -> Outcome | None:
        """Wait until the build has ended; return its result, or None when `timeout` seconds passed first."""

    def state(self, ref: BuildRef) -> State:
        """Return where the build is."""

    def log(self, ref: BuildRef, follow: bool = False) -> Iterator[bytes]:
        """Yield the console log in pieces; with `follow`, until the build has ended."""

    def artifacts(self, ref: BuildRef, destination: Path) -> None:
        """Copy what the build archived to `destination`, an existing directory."""

    def abort(self, ref: BuildRef) -> None:
        """Ask the build to stop; nothing when it has ended. Use `wait` to see it end."""

    def builds(self, job: str) -> list[BuildRef]:
        """Return the builds of `job` that are kept, oldest first."""

    def find(self, job: str, correlation: str) -> BuildRef | None:
        """Return the build of `job` that was started with this value of CORRELATION; None when there is none."""

    def record(self, ref: BuildRef) -> BuildInfo:
        """Return all that is known of a build."""

    def urls(self, ref: BuildRef) -> Urls:
        """Return where a person finds the build."""

    def describe(self, ref: BuildRef, description: str) -> None:
        """Replace a build's description by a line of plain text."""
