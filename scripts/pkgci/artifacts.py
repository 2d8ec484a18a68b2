"""The JSON files that jobs leave under `artifacts/` and read from each other: their models, and nothing else.

Each file has a `schema` number; a reader refuses one that it does not know. The fields are a promise to users: a change
that a reader of the former form would not understand gets a new number.
"""

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pkgci.errors import InfrastructureError

ARTIFACTS = Path("artifacts")


class Record(BaseModel):
    """A file of a fixed form, read whole or refused, written whole or not at all."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, defer_build=True)

    schema_version: Literal[1] = Field(1, alias="schema")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the record from `path`.

        Raises:
            InfrastructureError: the file is missing or is not such a record.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
            raise InfrastructureError(f"cannot read {path}: {reason}") from error

    def write(self, path: Path) -> None:
        """Write the record to `path`, replacing what is there in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        with new.open("w") as stream:
            stream.write(self.model_dump_json(indent=2, by_alias=True) + "\n")
            stream.flush()
            # on disk before it has its name: a crash of the machine leaves none or a whole one
            os.fsync(stream.fileno())
        new.replace(path)


class Part(BaseModel):
    """A part of a record."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, defer_build=True)


class ChangeSummary(Part):
    """The change as a person knows it; `id` is `NUMBER,PATCHSET`, or the short tree id of a local change."""

    id: str
    project: str
    branch: str
    pipeline: str
    subject: str = ""


class Run(Record):
    """`run.json`: what a build of the job `build` is about, and the parameters to repeat it with.

    A change that cannot be fetched or merged has neither subject nor trees. `number` is None outside of an engine.
    `untested` says, after a merge, why what is published is not what a gate has tested.
    """

    job: str
    number: int | None
    target: str
    notice: str = ""
    change: ChangeSummary
    package: str = ""
    source_tree: str = ""
    packaging_tree: str = ""
    untested: str = ""
    parameters: dict[str, str]


class File(Part):
    """A file of a build, by its name, size in bytes and sha256 (hex)."""

    name: str
    size: int
    sha256: str


class Package(Part):
    """A binary package: what the format's own tools read from the file.

    `kind` says what it is for: only packages of kind `binary` are installed by the install test.
    """

    name: str
    version: str
    architecture: str
    file: str
    sha256: str
    kind: Literal["binary", "debug"] = "binary"


class Build(Record):
    """`build.json`: one build of one package for one target. `origin` says whether it was made or taken from the store.

    `reproducible` says whether it came out the same twice, None when that was not tried.
    """

    change: ChangeSummary
    package: str
    version: str
    target: str
    source_tree: str
    packaging_tree: str
    key: str
    profiles: tuple[str, ...] = ()
    reproducible: bool | None = None
    origin: Literal["built", "store"]
    packages: tuple[Package, ...]
    files: tuple[File, ...]
    seconds: dict[str, float]


class PackagedFile(Part):
    """A file of a binary package: its absolute path, mode as of `ls -l`, size in bytes, and where a link leads."""

    path: str = Field(max_length=4096)
    mode: str = Field(max_length=10)
    size: int = Field(ge=0)
    target: str | None = Field(None, max_length=4096)


class PackageContents(Part):
    """What is in the binary package of the file name `file`; `installed` is its size in bytes once it is.

    `relations` are its dependency fields by name, `scripts` its maintainer scripts or scriptlets. Of huge packages
    `more_files` says how many files are not listed.
    """

    name: str
    version: str
    architecture: str
    file: str
    installed: int = Field(ge=0)
    relations: dict[str, tuple[str, ...]]
    scripts: dict[str, str]
    files: tuple[PackagedFile, ...]
    more_files: int = Field(0, ge=0)


class Contents(Record):
    """`contents.json`: what is in the binary packages of a build, as the format's own tools read it in the sandbox."""

    packages: tuple[PackageContents, ...]


class FileDifference(Part):
    """A file that is in one of two packages only (the other is None), or differs in mode, size or where it leads."""

    former: PackagedFile | None
    now: PackagedFile | None


class RelationDifference(Part):
    """What a dependency field has lost and gained."""

    field: str
    removed: tuple[str, ...]
    added: tuple[str, ...]


class Difference(Part):
    """What a package changes against the former version of the same name in a repository, `released` or of a test.

    `scripts` are unified diffs by the script's name. `notice` says what could not be compared.
    """

    name: str
    architecture: str
    version: str
    former_version: str
    repository: str
    released: bool = False
    installed: int = Field(0, description="bytes more than before")
    files: tuple[FileDifference, ...] = ()
    relations: tuple[RelationDifference, ...] = ()
    scripts: dict[str, str] = Field(default_factory=dict)
    notice: str = ""


class Former(Record):
    """`former.json`: what a build changes against the former versions of its packages in REPOSITORIES."""

    packages: tuple[Difference, ...]


class RepositoryPackage(Package):
    """A package in a repository. `file` is the path below the repository's root, `source` the source package's name."""

    source: str
    key: str


class Repository(Record):
    """`repository.json`: where a repository is and what is in it. It lies at the repository's root, `url` + that name.

    A released one has so many packages that only its index says which.
    """

    url: str
    format: Literal["deb", "rpm"]
    codename: str
    component: str = "main"
    target: str
    packages: tuple[RepositoryPackage, ...]
    signing_key: str = Field(description="the public key, ASCII-armoured")
    expires: datetime | None = None
    released: bool = False

    def rank(self, tested: Sequence[RepositoryPackage]) -> int:
        """Return which repositories a package manager shall prefer: 0, with packages under test, before 1, before 2."""
        return 0 if any(package in tested for package in self.packages) else 1 + self.released


class ReleaseOutcome(Record):
    """`released.json`: what became of a merged change in the released repository `repository` (`RELEASE/CODENAME`).

    `unchanged` is what was released before, or came after a later merge. Of what is `absent` no gate has tested a build that
    counts: it has to be built. `tested` says whether it is, bit for bit, what a gate tested; `left` which builds of that
    gate were not published with it, and why.
    """

    repository: str
    result: Literal["published", "unchanged", "absent"]
    generation: int | None = None
    tested: bool = False
    reason: str
    left: tuple[str, ...] = ()


class UnpublishedBuild(Part):
    """A head of a branch that is not in the repository (`RELEASE/CODENAME`) of its release; `released` is what is there.

    `commit` is that of the source project. With `hold`, its reason, a person keeps it so.
    """

    package: str
    project: str
    branch: str
    commit: str
    target: str
    repository: str
    released: str
    hold: str = ""


class Unpublished(Record):
    """`unpublished.json`: what is merged and not released. `problems` says what could not be compared, and why."""

    missing: tuple[UnpublishedBuild, ...]
    problems: tuple[str, ...] = ()


class Retriggered(Part):
    """An open review that is tested again: its number, project and branch, and why, in one line."""

    number: int
    project: str
    branch: str
    reason: str


class Retriggers(Record):
    """`retrigger.json`: the reviews that Zuul was asked to test again, or (`dry`) would be; those `queued` for a later run.

    `waiting` are projects whose merge other targets have yet to publish; `problems` says what could not be looked at, and why.
    """

    dry: bool = False
    asked: tuple[Retriggered, ...] = ()
    queued: tuple[Retriggered, ...] = ()
    waiting: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


class Tested(Record):
    """What a test leaves. `passed_before` says when it passed with all the same input: then it was not run once more."""

    passed_before: datetime | None = None

    @property
    def note(self) -> str:
        """Why it was not run, in one line; empty if it was."""
        if self.passed_before is None:
            return ""
        when = f"{self.passed_before:%Y-%m-%d %H:%M} UTC"
        return f"passed on {when} with the same packages, machine, tools and repositories; not repeated"

    @property
    def whole(self) -> bool:
        """Whether all of it was run: what was not, may be run another time."""
        return True


class Finding(Part):
    """What an install test found wrong: with which package, in which phase, with which file if it is about one."""

    package: str
    phase: Literal["install", "upgrade", "version", "files", "run", "service", "remove", "leftover", "state"]
    message: str
    file: str | None = None


class InstallOutcome(Part):
    """One package of an install test: installed anew, or over the released version `former_version`.

    `notice` says why that could not be tried.
    """

    package: str
    version: str
    former_version: str = ""
    notice: str = ""
    passed: bool
    seconds: float
    findings: tuple[Finding, ...]

    @property
    def name(self) -> str:
        """What was tried, for people."""
        return f"{self.package}, upgrade from {self.former_version}" if self.former_version else self.package

    @property
    def log(self) -> str:
        """Where its log lies below the artifacts."""
        return f"logs/upgrade/{self.package}.log" if self.former_version else f"logs/{self.package}.log"


class Install(Tested):
    """`install.json`: each package under test, installed and removed on its own in a restored machine.

    Where a released repository has a former version, that is upgraded in another one: an outcome more.
    """

    target: str
    snapshot: str
    repositories: tuple[str, ...]
    notice: str = ""
    packages: tuple[InstallOutcome, ...]

    @property
    def whole(self) -> bool:
        """Whether each upgrade could be tried."""
        return not any(outcome.notice for outcome in self.packages)


class LintFinding(Part):
    """What a lint tool says of a package: its tag, which file of the package it is about (if any), and its words.

    With `source`, `package` is the source package's name. The released package has what is `known`, too.
    """

    package: str
    source: bool = False
    known: bool = False
    severity: Literal["error", "warning", "info"]
    tag: str
    message: str
    file: str | None = None


class Lint(Tested):
    """`lint.json`: what the format's lint tool says of the source and binary packages of a build.

    `fails` is the least severity that fails the job, unless the finding is known from the released package, of version
    `released`; what the packages' own overrides silence is only counted. Findings are in the order of their severity, known
    ones last; of very many the last are `omitted`.
    """

    target: str
    package: str
    version: str
    key: str
    tool: str = Field(description="name and version")
    fails: Literal["error", "warning", "info", "never"]
    released: str = ""
    findings: tuple[LintFinding, ...]
    omitted: int = 0
    overridden: int = 0


class ScenarioOutcome(Part):
    """One test of a system test: of which scenario, how it ended, and where its log is below the artifacts."""

    scenario: str
    test: str
    result: Literal["passed", "failed", "skipped"]
    seconds: float
    message: str = ""
    log: str | None = None


class UsedSnapshot(Part):
    """A snapshot that a test ran on: its manifest is `snapshots/NAME.json` below the artifacts, and has this sha256.

    The manifest says what is in it, and has the checksums of all its files: who has the same one has the same machines.
    """

    name: str
    id: str
    key: str
    sha256: str

    @property
    def manifest(self) -> str:
        """Where its manifest is, below the artifacts."""
        return f"snapshots/{self.name}.json"


class Systest(Tested):
    """`systest.json`: a system test, and everything needed to repeat it: `parameters` are the job's own.

    `retried` is the infrastructure fault after which all of it was run once again; empty when there was none.
    `snapshots` are the environment's, and that of a source package's own tests where it is another one; `scenarios` are those
    that ran, each with the sha256 of its files (empty for a package's own), and `commit` is that of the configuration
    (git-describe(1)), empty where it is in no repository. `tools` are the versions of what ran the test.
    """

    target: str
    environment: str
    snapshot: str
    repositories: tuple[str, ...]
    parameters: dict[str, str]
    packages: tuple[Package, ...] = Field(description="what was under test, at these exact versions")
    outcomes: tuple[ScenarioOutcome, ...]
    flavours: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="of each source package, in which ways it got into the product"
    )
    notice: str = ""
    retried: str = ""
    seed: int = 0
    snapshots: tuple[UsedSnapshot, ...] = ()
    scenarios: dict[str, str] = Field(default_factory=dict)
    commit: str = ""
    described: str = Field("", description="the sha256 of the environment's description")
    tools: dict[str, str] = Field(default_factory=dict)


class ReplicatedTest(Part):
    """A test of a system test that was replicated: its results there and here; empty where it did not run."""

    scenario: str
    test: str
    there: str
    here: str


class Replication(Record):
    """`replicate.json`: the system test at `url`, run once more here. `differences` are what it did not run on alike."""

    url: str
    target: str
    environment: str
    differences: tuple[str, ...]
    tests: tuple[ReplicatedTest, ...]

    @property
    def different(self) -> tuple[ReplicatedTest, ...]:
        """The tests that ended in another way; the system test is reproduced when there are none."""
        return tuple(test for test in self.tests if test.here != test.there)


class OrderedBuild(Part):
    """A package and branch that a queue touches: `project` is that of its last change there.

    `after` are the positions, from 0, of those builds of the order that it needs before.
    """

    project: str
    branch: str
    package: str = Field(description="the source package's name")
    release: str
    source_tree: str
    packaging_tree: str
    after: tuple[int, ...] = ()


class SkippedBuild(Part):
    """A project and branch of a queue for which there is nothing to build, and why."""

    project: str
    branch: str
    reason: str


class Order(Record):
    """`order.json`: the builds that a queue asks for, in its order, and which of them come after which."""

    target: str
    builds: tuple[OrderedBuild, ...]
    skipped: tuple[SkippedBuild, ...] = ()

    def needed(self, position: int) -> list[int]:
        """Return the positions of all builds that one needs before, directly or not, sorted."""
        found: set[int] = set()
        further = [position]
        while further:
            new = set(self.builds[further.pop()].after) - found
            found |= new
            further += new
        return sorted(found)


class Dependant(Part):
    """A source package of a released repository that build-depends on what a publication changes, and is not built anew."""

    repository: str
    package: str


class Verified(Record):
    """`verified.json`: a dry publication of builds, all of a release as one generation, which was not refused.

    `recorded` says that the gate record was written.
    """

    target: str
    keys: tuple[str, ...]
    repositories: tuple[str, ...] = Field(description="RELEASE/CODENAME of each")
    dependants: tuple[Dependant, ...] = ()
    recorded: bool = False


class GateBuild(Part):
    """A build of a gate run. `after` are the names of the source packages that it was built against.

    `result` is empty when it was not started; version, key, origin and repository are known once it passed.
    """

    project: str
    branch: str
    change: str
    package: str
    release: str
    after: tuple[str, ...] = ()
    result: Literal["", "SUCCESS", "FAILURE", "ABORTED"] = ""
    directory: str = Field("", description="below the artifacts: what it left")
    version: str = ""
    key: str = ""
    origin: Literal["", "built", "store"] = ""
    repository: str = ""


class Gate(Record):
    """`gate.json`: a gate run: its changes (as ZUUL_CHANGES names them), its builds with their repositories, and results."""

    target: str
    changes: tuple[str, ...]
    builds: tuple[GateBuild, ...]
    skipped: tuple[SkippedBuild, ...] = ()
    dependants: tuple[Dependant, ...] = ()
    systest: Literal["", "SUCCESS", "FAILURE", "ABORTED"] = ""
    recorded: bool = False


class PackageChange(Part):
    """A package that came to a mirror (`before` is empty), went from it (`after` is empty), or changed its version."""

    name: str
    architecture: str
    before: str
    after: str


class Phase(Part):
    """A part of what was done: seconds after the beginning of all, and how many it took."""

    name: str
    start: float
    seconds: float


class SyncedMirror(Part):
    """What a sync did to a mirror. `before` and `after` are the generations that it shows; None when that is not known.

    `whole` says that all of it was gone through, `bytes` were sent.
    """

    name: str
    before: int | None
    after: int | None
    whole: bool
    seconds: float
    phases: tuple[Phase, ...]
    bytes: int
    packages: tuple[PackageChange, ...]
    fault: str


class SyncedRepository(Part):
    """What a sync did to the mirrors of a released repository; `fault` says why they are not at `generation`."""

    release: str
    codename: str
    generation: int
    started: datetime
    seconds: float
    notice: str
    fault: str
    mirrors: tuple[SyncedMirror, ...]


class Sync(Record):
    """`sync.json`: the packages that reached the mirrors."""

    repositories: tuple[SyncedRepository, ...]


class Maintained(Part):
    """A released repository: the generation that readers see, and what was done.

    `renewed` says why that generation was signed anew, `cleaned` are the numbers of former ones that went.
    """

    repository: str
    generation: int
    valid_until: datetime | None
    renewed: str
    cleaned: tuple[int, ...]


class Maintenance(Record):
    """`maintenance.json`: what was done to the released repositories, when their key expires, and what a person must do."""

    repositories: tuple[Maintained, ...]
    key_expires: datetime | None
    problems: tuple[str, ...]


class Child(Part):
    """A build that a job started, and how it ended; `directory` below the artifacts has what it left, and its log."""

    job: str
    number: int
    directory: str
    parameters: dict[str, str] = Field(description="without those of one run only: PARENT and CORRELATION")
    result: Literal["SUCCESS", "FAILURE", "ABORTED"]
    started: datetime
    seconds: float = Field(description="until its end, waiting in a queue included")


class Result(Record):
    """`result.json`: how a step ended. `fault` names who has to act when it did not pass.

    `tried_twice` says of an infrastructure fault that it came a second time: nobody tries again.
    """

    step: str
    result: Literal["SUCCESS", "FAILURE", "ABORTED"]
    fault: Literal["none", "package", "request", "infrastructure", "aborted", "bug"]
    exit: int
    reason: str
    started: datetime
    seconds: float
    children: tuple[Child, ...] = ()
    tried_twice: bool = False
