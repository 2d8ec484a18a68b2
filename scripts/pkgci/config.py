"""The configuration directory: `config.yaml`, `targets/`, `releases/`, `packages/`, one entry a file.

Everything is validated, and an error names the file and the line. A step reads only what it needs: an entry is read when
it is asked for, and the package of a project is found through a cached index, so that ten thousand packages cost a step
nothing.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pkgci.disk import replacing
from pkgci.errors import RequestError

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "etc" / "embedded"

# how many machines an environment may have
NODES = 9
# how many networks one of them may be in
NETWORKS = 16
# how many disks one of them may have beside the first one: each is a slot of its PCI bus, too
DISKS = 4
# what QEMU's user-mode network has between a machine and the host
HOST_SUBNET = "10.0.2.0/24"

NAME = r"[a-z0-9][a-z0-9+.-]*"
# what packages are called: an RPM may have capitals and underscores
PACKAGE = r"[A-Za-z0-9][A-Za-z0-9+._-]*"
# of a build: Debian's registered ones (nodoc, pkg.hello.static), or the condition of a spec
PROFILE = r"[a-z0-9][a-z0-9_+.-]{0,63}"
# of tests: whatever an existing suite calls its own
GROUP = r"[A-Za-z0-9][A-Za-z0-9_+.-]{0,99}"
Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$", max_length=100)]
PackageName = Annotated[str, StringConstraints(pattern=f"^{PACKAGE}$", max_length=100)]
# RFC 1123, 2.1
HostName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=63)]
Project = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)*$")]


def _url(url: str) -> str:
    try:
        if urlsplit(url).port == 0:
            raise ValueError("port 0 is none")
    except ValueError as error:
        raise ValueError(f"{url!r} is no URL: {error}") from None
    return url


def _below(path: str) -> str:
    if not path or "\0" in path or {"", ".", ".."} & set(path.removesuffix("/").split("/")):
        raise ValueError("must be a relative path, without '.' and '..'")
    return path


def _subnet(text: str) -> str:
    network = IPv4Network(text)
    if network.num_addresses < NODES + 2:
        raise ValueError(f"{text} has too few addresses; /24 is usual")
    return text


def _address(text: str) -> str:
    return str(IPv4Address(text))


def _polled(place: str) -> str:
    if place.startswith(("http://", "https://")):
        return _url(place)
    return place if Path(place).is_absolute() and "\0" not in place else _below(place)


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return pattern


def _absolute(path: str) -> str:
    expanded = os.path.expanduser(os.path.expandvars(path))
    if not expanded.startswith("/") or "\0" in expanded:
        raise ValueError(f"{path!r} is no absolute path")
    return expanded


def _ed25519(line: str) -> str:
    # RFC 8709, 4: the same 19 bytes before the 32 of each key; a comment may follow
    if not re.fullmatch(r"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI[A-Za-z0-9+/]{43}( [ -~]*)?", line):
        raise ValueError("must be the line of the host's own /etc/ssh/ssh_host_ed25519_key.pub: `ssh-ed25519 AAAA...`")
    return line


def _public_key(path: str, info: ValidationInfo) -> str:
    """Return the text of the public key that the file `path`, below the configuration directory, holds."""
    try:
        text = Path(info.context, path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ValueError(f"cannot read {path} in the configuration directory: {reason}") from None
    if "-----BEGIN PGP PUBLIC KEY BLOCK-----" not in text:
        raise ValueError(f"{path} is no public key; it must be ASCII-armoured (gpg --armor --export)")
    return text


def _no_other(scenario: str) -> str:
    # what a system test itself does, and its other logs
    if scenario in ("apt", "autopkgtest", "console", "dnf", "install", "journal", "product", *FLAVOURS):
        raise ValueError(f"{scenario!r} has a meaning of its own; name the scenario otherwise")
    return scenario


def _long_enough(days: int) -> int:
    # renewed at half of it, by a job that may fail for some days until a person mends it
    if days and days < 14:
        raise ValueError("must be 14 at least, or 0: then apt takes an index of any age")
    return days


Prefix = Annotated[str, StringConstraints(pattern=r"^(https?|ssh|git|file)://.*/$"), AfterValidator(_url)]
ScenarioName = Annotated[Name, AfterValidator(_no_other)]
RelativePath = Annotated[str, AfterValidator(_below)]
PublicKey = Annotated[RelativePath, AfterValidator(_public_key)]
AbsolutePath = Annotated[str, AfterValidator(_absolute)]
HostKey = Annotated[str, AfterValidator(_ed25519)]
Pattern = Annotated[str, AfterValidator(_compiles)]
# what a package is part of in the product, in the order in which a run applies them
Flavour = Literal["master", "bootstrap", "container", "cluster"]
FLAVOURS = get_args(Flavour)


class Section(BaseModel):
    """A part of the configuration: unknown keys and wrong types are errors."""

    # what a step does not read is not prepared
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)


class Limits(Section):
    """What the sandbox allows one build: wall time, processes, disk of its root, memory."""

    # the jobs' own limits, in jobs/templates/, are above what this allows
    seconds: int = Field(3600, ge=1, le=10800)
    processes: int = Field(4096, ge=16)
    disk_mib: int = Field(8192, ge=64)
    memory_mib: int = Field(4096, ge=64)


class Executors(Section):
    """Builds that the local engine runs at once, by label."""

    gate: int = Field(4, ge=1)
    control: int = Field(8, ge=1)
    build: int = Field(2, ge=1)
    repository: int = Field(4, ge=1)
    systest: int = Field(2, ge=1)

    def of(self, label: str) -> int | None:
        """Return the number for a label, None for one that does not exist."""
        return getattr(self, label) if label in type(self).model_fields else None


class Account(Section):
    """Where to log in by ssh."""

    host: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9.:-]*$", max_length=253)]
    port: int = Field(22, ge=1, le=65535)
    user: Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_-]*$")]
    host_key: HostKey
    identity: AbsolutePath = Field(description="the file of the private key, ed25519, that `user` lets in")


class BuildHost(Account):
    """A machine on which `compile` runs what is not trusted, by ssh; see `pkgci build-host`."""


class Released(Section):
    """How released repositories are signed and kept; without it there are none."""

    gnupg_home: AbsolutePath = Field(description="GNUPGHOME of the agent that holds the key")
    key: Annotated[str, StringConstraints(pattern=r"^[0-9A-F]{40}$")] = Field(description="its fingerprint")
    wait_seconds: int = Field(600, ge=0, description="how long a publication waits for another one's lock")
    sibling_seconds: int = Field(
        60, ge=0, description="how long one waits for the other changes of its gate run to be merged"
    )
    keep_hours: int = Field(72, ge=72, description="a former generation is kept so long after it was replaced")
    keep_generations: int = Field(10, ge=1, description="so many former ones are kept in any case")
    valid_days: Annotated[int, AfterValidator(_long_enough)] = Field(
        0, description="apt refuses an index that is older; 0: it never does"
    )


class Retrigger(Section):
    """How open reviews are tested again after what they were tested against has moved; without it they are not."""

    comment: Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9 _-]*$", max_length=60)] = Field(
        "recheck", description="what starts Zuul's check; the reason follows on the same line"
    )
    per_hour: int = Field(
        20, ge=1, description="so many reviews at most; the others wait, those touched last come first"
    )


class Review(Section):
    """The review system's REST interface: for comments on changes, and to ask for projects, changes and their files."""

    url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s@]+/$"), AfterValidator(_url)] = Field(
        description="`a/changes/` is below it"
    )
    user: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._@-]+$")]
    password_file: AbsolutePath = Field(
        description="a file of one line, readable by the jobs of the label `control`; `repository` for `retrigger`"
    )
    retrigger: Retrigger | None = None


class Login(Section):
    """An account of Jenkins."""

    user: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._@-]+$")]
    token_file: AbsolutePath = Field(description="a file of one line: the account's API token")


class Definitions(Section):
    """Where the job definitions that the job `jobs-update` loads are merged."""

    project: Project
    branch: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._/+-]*$")] = "main"


class Jenkins(Login):
    """The server of the engine `jenkins`, and the account that starts and watches builds there."""

    url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s@?#]+/$"), AfterValidator(_url)] = Field(
        description="`job/NAME/` is below it"
    )
    patience_seconds: int = Field(900, ge=0, description="how long one waits for a server that does not answer")
    loader: Login | None = Field(None, description="who loads job definitions; without it the same account")
    definitions: Definitions | None = Field(None, description="without it jobs-update loads those that are installed")


class Zuul(Section):
    """What `pkgci zuul-tenants` says of current Zuul's tenant."""

    tenant: Name = Field("packages", description="its name")
    connection: Name = Field("gerrit", description="the name of Gerrit's connection in zuul.conf")
    project: Project = Field(description="this repository, as Gerrit names it")


class PathsSection(Section):
    """Where things are kept; by default the XDG places of the user."""

    cache: AbsolutePath | None = None
    state: AbsolutePath | None = None
    data: AbsolutePath | None = None


class Settings(Section):
    """`config.yaml`: what holds for all releases."""

    url: Annotated[str, StringConstraints(pattern=r"^http://[^/]+/$"), AfterValidator(_url)] = "http://127.0.0.1:8470/"
    serve: bool = Field(True, description="steps that need the repositories serve them by themselves, on loopback")
    sources: tuple[Prefix, ...] = Field((), description="prefixes that ZUUL_URL may have")
    repositories: tuple[Prefix, ...] = Field((), description="prefixes that REPOSITORIES may have besides `url`")
    gerrit: Prefix | None = Field(
        None, description="the remote that says what is merged; the project's name is appended"
    )
    gate_pipelines: tuple[str, ...] = Field(("gate",), description="pipelines whose changes somebody has approved")
    executors: Executors = Executors()
    test_repository_days: int = Field(14, ge=1)
    store_days: int = Field(30, ge=1, description="unreferenced store entries younger than this are kept")
    root_days: int = Field(
        7, ge=1, description="build roots and snapshots older than this are made anew, tests repeated"
    )
    failed_root_days: int = Field(3, ge=1, description="roots of failed builds are kept so long for `pkgci shell`")
    failed_roots_mib: int = Field(8192, ge=1, description="all of them together; the oldest go first")
    run_days: int = Field(20, ge=1, description="machines of system tests are kept so long for `pkgci debug`")
    keep_runs: Literal["all", "failed", "none"] = Field("all", description="of which system tests machines are kept")
    debug_address: Annotated[str, AfterValidator(_address)] = Field(
        "127.0.0.1", description="where machines of a debug-session are reached: an IPv4 address of their host"
    )
    debug_sessions: int = Field(1, ge=1, description="so many run at once on a host; each takes an executor of systest")
    limits: Limits = Limits()
    build_hosts: dict[Name, BuildHost] = {}
    released: Released | None = None
    metrics: AbsolutePath | None = Field(None, description="the file for node_exporter's textfile collector, *.prom")
    review: Review | None = None
    jenkins: Jenkins | None = None
    builds: Annotated[str, StringConstraints(pattern=r"^https?://[^\s@]+/$"), AfterValidator(_url)] | None = Field(
        None, description="where a web server shows `jobs/` of the local engine's state"
    )
    zuul: Zuul | None = None
    paths: PathsSection = PathsSection()


class Upstream(Section):
    """Where the operating system's packages come from.

    `machine` takes the mirror from this machine's own apt configuration; `repositories` names them: for the base
    `debian` lines as `URI SUITE COMPONENT...`, for `rpm` base URLs. The rest of an RPM distribution: `keys`, of which one
    signed each package (files given, their texts here), and whether one signed each repository's index as well.
    """

    machine: bool = False
    repositories: tuple[str, ...] = ()
    suites: tuple[str, ...] = ()
    keys: tuple[PublicKey, ...] = ()
    index_signed: bool = Field(True, description="each repository has a repomd.xml.asc; not all distributions do")


class RootSection(Section):
    """A prepared root: the packages in it beyond the minimum."""

    packages: tuple[str, ...] = ()


class MachineSection(Section):
    """The plain machine of the install test: packages beyond the minimum, memory in MiB."""

    packages: tuple[str, ...] = ()
    memory_mib: int = Field(512, ge=128)


class Target(Section):
    """`targets/NAME.yaml`: what a package is built for."""

    format: Literal["deb", "rpm"]
    codename: Name
    architecture: Literal["amd64"]
    independent: bool = Field(True, description="builds what is architecture-independent, and the source")
    tag: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9]*$")] = Field(description="in versions, e.g. deb12")
    base: Literal["debian", "rpm"] = Field("debian", description="what its roots and machines are made of")
    base_codename: Name | None = Field(
        None, description="the base's own codename where it is not the target's; for `rpm` as PLATFORM_ID has it"
    )
    build_host: Name | None = Field(None, description="one of `build_hosts`; without it compile builds where it runs")
    notice: str = Field("", description="what a person must know about packages of this target")
    upstream: Upstream
    root: RootSection = RootSection()
    machine: MachineSection = MachineSection()

    @field_validator("upstream")
    @classmethod
    def _fits_the_base(cls, upstream: Upstream, info: ValidationInfo) -> Upstream:
        if info.data.get("base") != "rpm":
            if upstream.keys:
                raise ValueError("`keys` are for the base `rpm`; Debian's come with its archive keyring")
            if upstream.machine == bool(upstream.repositories):
                raise ValueError("the base `debian` takes either `machine: true` or `repositories`")
            for line in upstream.repositories:
                if not re.fullmatch(r"https?://[!-~]+( [!-~]+){2,}", line):
                    raise ValueError(
                        f"{line!r} is no line of a repository; it must be `http(s)://HOST/PATH SUITE COMPONENT...`"
                    )
                _url(line.split()[0])
            return upstream
        if info.data.get("format") == "deb":
            raise ValueError("the base `rpm` is for the format `rpm` only")
        if upstream.machine or upstream.suites or not upstream.repositories:
            raise ValueError("the base `rpm` takes `repositories`, its base URLs, and neither `machine` nor `suites`")
        for url in upstream.repositories:
            if not re.fullmatch(r"https?://[A-Za-z0-9._~:/%+-]+", url):
                raise ValueError(f"{url!r} is no base URL; it must be http(s)://HOST/PATH, without variables")
            _url(url)
        if not upstream.keys:
            raise ValueError(
                "the base `rpm` needs `keys`, the files of the public keys that its packages are signed with"
            )
        return upstream


class LintSection(Section):
    """What the lint tools' findings come to: the least severity that fails the job."""

    fails: Literal["error", "warning", "info", "never"] = "error"


class Mirror(Section):
    """Where a release's repositories are copied to: a module of an rsync daemon (`rsync`), or rsync over ssh (`ssh`, `path`).

    Below the place that is named, and below `url`, lies a directory for each codename.
    """

    url: Annotated[str, StringConstraints(pattern=r"^https?://[A-Za-z0-9._~:/%+-]+/$")] = Field(
        description="where its readers find it"
    )
    rsync: (
        Annotated[
            str,
            StringConstraints(
                pattern=r"^rsync://([A-Za-z0-9_][A-Za-z0-9._-]*@)?[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]{1,5})?"
                r"(/[A-Za-z0-9_][A-Za-z0-9._+-]*)+/$"
            ),
        ]
        | None
    ) = None
    password: AbsolutePath | None = Field(None, description="a file with the daemon's password for us")
    ssh: Account | None = None
    path: Annotated[str, StringConstraints(pattern=r"^/([A-Za-z0-9_][A-Za-z0-9._+-]*/)*$")] | None = None
    keep_days: int = Field(3, ge=3, description="a former generation is kept so long after it was replaced there")
    keep_generations: int = Field(10, ge=1, description="so many former ones are kept in any case")
    aside: str = Field("", max_length=200, description="why it is left out for now; it catches up afterwards")

    @property
    def place(self) -> str:
        """Where it is: two mirrors at one place would write over each other."""
        if self.ssh is None:
            return str(self.rsync)
        return f"{self.ssh.user}@{self.ssh.host}:{self.ssh.port} {self.ssh.identity} {self.path}"

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.rsync is None) == (self.ssh is None):
            raise ValueError("it needs either `rsync`, or `ssh` and `path`")
        if (self.ssh is None) != (self.path is None):
            raise ValueError("`path` says where `ssh` leads to: give both or none")
        if self.password and not self.rsync:
            raise ValueError("`password` is for `rsync`; by ssh `identity` lets us in")
        return self


class Release(Section):
    """`releases/NAME.yaml`: a product release."""

    branches: tuple[Pattern, ...] = Field(description="regular expressions that a whole branch name matches")
    targets: tuple[Name, ...]
    vendor: Annotated[str, StringConstraints(pattern=r"^[g-z][a-z]*$")] = Field(
        "pkg", description="in versions; sorts above `el` and `fc` of RPM distributions"
    )
    ordinal: int = Field(1, ge=1, description="in versions; grows from release to release")
    lint: LintSection = LintSection()
    environment: Name = Field("default", description="what its system tests run on")
    environments: dict[Name, Name] = Field({}, description="the same by target, where it is another one")
    flavours: dict[PackageName, Annotated[tuple[Flavour, ...], Field(min_length=1)]] = Field(
        {}, description="of each package, in which ways it gets into the product; `cluster` of those not named"
    )
    mirrors: dict[Name, Mirror] = Field({}, description="what is released is copied there")


class Network(Section):
    """A network that machines of an environment share, and nobody else; its IPv4 addresses are given in their order."""

    subnet: Annotated[str, AfterValidator(_subnet)] = Field(description="as 192.168.77.0/24")


def _not_beside_all(script: str) -> str:
    if "/" not in script:
        raise ValueError("must be in a directory of its own: what lies beside it is copied to the machine")
    return script


ScriptPath = Annotated[RelativePath, AfterValidator(_not_beside_all)]


class Node(Section):
    """A machine of an environment: the target's plain machine, with more packages, and memory in MiB if not the same.

    One that boots from the network has an empty disk, and is started when the product is deployed. What it boots has to let in
    whom the machine that serves it lets in, by the same host key, at the first interface, 10.0.2.15/24.
    """

    packages: tuple[str, ...] = ()
    build: ScriptPath | None = Field(
        None, description="a script that is run, as root, where its disk is made, in a copy of the directory it lies in"
    )
    boot: HostName | None = Field(
        None, description="boot from the first of its networks, by what this machine serves there"
    )
    memory_mib: int | None = Field(None, ge=128)
    disks: tuple[Annotated[int, Field(ge=1, le=1 << 20)], ...] = Field(
        (), max_length=DISKS, description="further ones, empty, /dev/vdb and so on: their sizes in MiB"
    )
    # each is a slot of its PCI bus
    networks: tuple[Name, ...] = Field(
        (), max_length=NETWORKS, description="those of the environment that it is in: eth1, eth2, ..."
    )
    role: Name | None = Field(None, description="what it is for: `master`, for example")

    @model_validator(mode="after")
    def _made_or_booted(self) -> Self:
        if self.boot and (self.packages or self.build):
            raise ValueError(
                "what boots from the network (`boot`) has neither `packages` nor `build`: its disk is empty"
            )
        return self


class Script(Section):
    """A shell script that is run on a machine by ssh, as root, in a copy of the directory that it lies in."""

    node: HostName
    script: ScriptPath
    seconds: int = Field(600, ge=1, description="what it may take")


class Scenario(Section):
    """Tests of an environment: a file or directory of pytest (`path`, or just that text), or a suite of another kind.

    That one is a command, which is run in the configuration directory, without a shell, once for each of its groups. It and
    the variables of `environment` are templates, see `mapping.py`.
    """

    path: RelativePath | None = None
    # not strict: what has been through `_short` is no JSON any more, and has lists
    command: tuple[str, ...] = Field((), strict=False)
    groups: tuple[Annotated[str, StringConstraints(pattern=f"^{GROUP}$")], ...] = Field(
        (), strict=False, description="of a command; tests of pytest say by a marker in which they are"
    )
    environment: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = {}
    seconds: int | None = Field(None, ge=1, description="what it may take, if not `scenario_seconds`")
    test_seconds: int = Field(600, ge=1, description="what each test of pytest may take, if it does not say otherwise")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: object) -> object:
        return {"path": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.path is None) == (not self.command):
            raise ValueError("it needs either `path` or `command`")
        if self.path and (self.groups or self.environment):
            raise ValueError("`groups` and `environment` are for `command`")
        return self


def _chosen(node: str | None, nodes: Mapping[str, Node]) -> str:
    """Return the name of the node that is meant: the only one of the role `master`, if none is named.

    Raises:
        ValueError: there is no such node.
    """
    if node is not None:
        if node not in nodes:
            raise ValueError(f"there is no node {node!r}")
        return node
    masters = [name for name, one in nodes.items() if one.role == "master"]
    if len(masters) != 1:
        raise ValueError(f"it needs `node`: {len(masters) or 'no'} nodes have the role `master`")
    return masters[0]


class Cluster(Section):
    """How the flavour `cluster` adds repositories to the product: its driver, see `pkgci.products`, and where its REST is.

    `plain` uses none: apt or dnf of each node is told. `depot` is the reference product; `nailgun` is Fuel, 6.1 to 8.0.
    """

    driver: Literal["plain", "depot", "nailgun"] = "plain"
    node: HostName | None = Field(
        None, description="where the interface is; by default the machine of the role `master`"
    )
    port: int = Field(8000, ge=1, le=65535, description="of that node's loopback")
    cluster: int = Field(1, ge=1, description="the number that Nailgun has for it")
    user: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._@-]+$")] | None = Field(
        None, description="Nailgun's, of Keystone"
    )
    password_file: AbsolutePath | None = Field(
        None, description="a file of one line, readable by the jobs of the label `systest`"
    )
    tenant: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._@-]+$")] = "admin"

    @model_validator(mode="after")
    def _of_the_driver(self) -> Self:
        login = {"cluster", "user", "password_file", "tenant"}
        not_taken = {"plain": {"node", "port"} | login, "depot": login, "nailgun": set()}[self.driver]
        wrong = sorted(not_taken & self.model_fields_set)
        if wrong:
            raise ValueError(f"the driver `{self.driver}` takes no `{wrong[0]}`")
        if self.driver == "nailgun" and (self.user is None or self.password_file is None):
            raise ValueError("the driver `nailgun` needs `user` and `password_file`")
        return self

    def at(self, nodes: Mapping[str, Node]) -> str | None:
        """Return the name of the node where the interface is, None when the driver uses none.

        Raises:
            ValueError: there is no such node.
        """
        return None if self.driver == "plain" else _chosen(self.node, nodes)


class Rebuilt(Section):
    """How an image of the product is rebuilt with packages under test in it: a script on a machine, see `Script`.

    It is given a directory that is laid over a root, and whose /pkgci-install, run there, installs the packages in it.
    """

    rebuild: ScriptPath
    node: HostName | None = Field(None, description="where it is run; by default the machine of the role `master`")
    seconds: int = Field(900, ge=1, description="what it may take")

    def at(self, nodes: Mapping[str, Node]) -> str:
        """Return the name of the node where it is run.

        Raises:
            ValueError: there is no such node.
        """
        return _chosen(self.node, nodes)


class Carried(Rebuilt):
    """The same, of an image that a package carries: the script rebuilds and installs that one, too."""

    carrier: PackageName = Field(description="that package's name")


class Flavours(Section):
    """The ways in which packages become part of the product that an environment knows."""

    master: Rebuilt | None = Field(None, description="the image of the machine `node`, which is deployed anew")
    bootstrap: Carried | None = Field(None, description="what machines boot from the network, by `node`")
    container: Carried | None = Field(None, description="what is run in a container on `node`")
    cluster: Cluster = Field(Cluster(), description="the test repositories are added to the product")

    def known(self) -> list[str]:
        """Return the names of those that it knows, in the order in which they are applied."""
        return [name for name in FLAVOURS if getattr(self, name)]


class Environment(Section):
    """`environments/NAME.yaml`: what a system test runs on, and its scenarios.

    Paths are relative to the configuration directory.
    """

    targets: tuple[Name, ...] = Field((), description="the targets that it is made for; all, if none is named")
    networks: dict[Name, Network] = {}
    nodes: dict[HostName, Node] = Field(min_length=1, max_length=NODES)
    deploy: tuple[Script, ...] = Field((), description="what makes the product of the machines, in order")
    health: tuple[Script, ...] = Field(
        (), description="what must succeed before they are frozen, and when they were restored"
    )
    flavours: Flavours = Field(Flavours(), description="without it `cluster` only, by the machines' package manager")
    clock: Literal["host", "frozen"] = Field(
        "host", description="the time that restored machines have: the host's, or they go on at that of their freezing"
    )
    poll: tuple[Annotated[str, AfterValidator(_polled)], ...] = Field(
        (), description="files, by URL or path, of which another content makes them prepared anew: an ISO, an image"
    )
    scenarios: dict[ScenarioName, Scenario] = Field(min_length=1)
    scenario_seconds: int = Field(1800, ge=1, description="what one scenario may take")
    logs: tuple[Annotated[str, StringConstraints(pattern=r"^/\S+$", max_length=200)], ...] = Field(
        (), description="the product's logs on each node, by shell patterns of absolute paths"
    )

    def addresses(self) -> dict[str, dict[str, str]]:
        """Return of each node its addresses by network: `192.168.77.1/24` for the first one of a network, and so on."""
        hosts = {name: IPv4Network(network.subnet).hosts() for name, network in self.networks.items()}
        length = {name: IPv4Network(network.subnet).prefixlen for name, network in self.networks.items()}
        return {
            node: {network: f"{next(hosts[network])}/{length[network]}" for network in one.networks}
            for node, one in self.nodes.items()
        }

    @field_validator("networks")
    @classmethod
    def _apart(cls, networks: dict[str, Network]) -> dict[str, Network]:
        taken = {"the machines' way to the host": IPv4Network(HOST_SUBNET)}
        for name, network in networks.items():
            own = IPv4Network(network.subnet)
            for other, theirs in taken.items():
                if own.overlaps(theirs):
                    raise ValueError(f"{name}: {own} overlaps {theirs}, {other}")
            taken[f"network {name}"] = own
        return networks

    @field_validator("nodes")
    @classmethod
    def _in_networks(cls, nodes: dict[str, Node], info: ValidationInfo) -> dict[str, Node]:
        networks = info.data.get("networks", {})
        for name, node in nodes.items():
            for network in node.networks:
                if network not in networks:
                    raise ValueError(f"{name}: there is no network {network!r}")
                if node.networks.count(network) > 1:
                    raise ValueError(f"{name}: network {network!r} is given twice")
            if node.boot is None:
                continue
            server = nodes.get(node.boot)
            if server is None or server.boot:
                raise ValueError(
                    f"{name}: `boot` must name another node, with a disk of its own: {node.boot!r} is none"
                )
            if not set(node.networks[:1]) & set(server.networks):
                raise ValueError(f"{name}: its first network must be one of {node.boot}'s, which it boots from")
            if list(nodes).index(node.boot) > list(nodes).index(name):
                raise ValueError(f"{name}: {node.boot}, which it boots from, must stand above it")
        return nodes

    @field_validator("scenarios")
    @classmethod
    def _told(cls, scenarios: dict[str, Scenario], info: ValidationInfo) -> dict[str, Scenario]:
        # what is wrong in a template shall not come up when the machines run
        if "nodes" not in info.data or not any(one.command for one in scenarios.values()):
            return scenarios
        from pkgci.mapping import fill, sample

        known = sample(info.data["nodes"])
        for name, scenario in scenarios.items():
            for text in (*scenario.command, *scenario.environment.values()):
                try:
                    fill(text, known)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        return scenarios

    @field_validator("deploy", "health")
    @classmethod
    def _on_nodes(cls, scripts: tuple[Script, ...], info: ValidationInfo) -> tuple[Script, ...]:
        nodes = info.data.get("nodes", {})
        for script in scripts:
            if nodes and script.node not in nodes:
                raise ValueError(f"there is no node {script.node!r}")
        return scripts

    @field_validator("flavours")
    @classmethod
    def _has_their_nodes(cls, flavours: Flavours, info: ValidationInfo) -> Flavours:
        nodes = info.data.get("nodes", {})
        for name in flavours.known() if nodes else ():
            try:
                node = getattr(flavours, name).at(nodes)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if node and nodes[node].boot:
                raise ValueError(f"{name}: {node} boots from the network")
            if name == "bootstrap" and not any(one.boot == node for one in nodes.values()):
                raise ValueError(f"{name}: no node has `boot: {node}`")
        return flavours

    @field_validator("deploy")
    @classmethod
    def _before_others_boot(cls, scripts: tuple[Script, ...], info: ValidationInfo) -> tuple[Script, ...]:
        nodes = info.data.get("nodes", {})
        for script in scripts:
            if nodes and nodes[script.node].boot:
                raise ValueError(f"{script.node} boots from the network, when all of these have run")
        return scripts


class Leftovers(Section):
    """What the install test tolerates of this package: shell patterns of absolute paths that may stay after removal."""

    leftovers: tuple[Annotated[str, StringConstraints(pattern=r"^/")], ...] = ()


class PackageEntry(Section):
    """`packages/NAME.yaml`: one source package. `packaging` is the packaging project of a pair."""

    source: Project
    packaging: Project | None = None
    allow: tuple[RelativePath, ...] = Field((), description="paths that may hold packages or tarballs (test data)")
    rebuild: int = Field(0, ge=0, description="raise it to build the same tree again under a higher version")
    profiles: tuple[Annotated[str, StringConstraints(pattern=f"^{PROFILE}$")], ...] = Field(
        (), description="build profiles that every build of this package has; `nocheck` runs no tests"
    )
    limits: Limits | None = Field(None, description="what is not given is as in config.yaml")
    install: Leftovers = Leftovers()

    @property
    def projects(self) -> tuple[str, ...]:
        """The source project, then the packaging project of a pair."""
        return (self.source,) if self.packaging is None else (self.source, self.packaging)


Entry = TypeVar("Entry", bound=Section)


class Config:
    """One configuration directory.

    Args:
        directory: the directory; `PKGCI_CONFIG` or the embedded default otherwise.

    Raises:
        RequestError: (from any member) a file is missing or wrong; the message names file, line and rule.
    """

    def __init__(self, directory: Path | None = None) -> None:
        named = os.environ.get("PKGCI_CONFIG")
        self.directory = (directory or (Path(named) if named else EMBEDDED)).absolute()
        if not self.directory.is_dir():
            raise RequestError(f"configuration directory {self.directory} does not exist; set PKGCI_CONFIG")
        self._read: dict[Path, Any] = {}

    @property
    def embedded(self) -> bool:
        """Whether this is the embedded default, which accepts projects without an entry."""
        return self.directory == EMBEDDED

    @cached_property
    def settings(self) -> Settings:
        """`config.yaml`."""
        return _load(self.directory / "config.yaml", Settings)

    @property
    def cache(self) -> Path:
        """Roots, images, snapshots' sources, git repositories: all that can be made again."""
        return self._place("cache", "XDG_CACHE_HOME", ".cache")

    @property
    def state(self) -> Path:
        """The local engine's builds, and local changes."""
        return self._place("state", "XDG_STATE_HOME", ".local/state")

    @property
    def data(self) -> Path:
        """Store, repositories, keys: on one file system."""
        return self._place("data", "XDG_DATA_HOME", ".local/share")

    def _place(self, kind: str, variable: str, default: str) -> Path:
        configured = getattr(self.settings.paths, kind)
        if configured:
            return Path(configured)
        xdg = os.environ.get(variable, "")
        try:
            return (Path(xdg) if xdg.startswith("/") else Path.home() / default) / "pkgci"
        except RuntimeError as error:
            raise RequestError(
                f"this user has no home for {kind} files; set HOME or {variable}, or paths.{kind} in config.yaml"
            ) from error

    def target(self, name: str) -> Target:
        """Return the target NAME."""
        return self._entry("targets", name, Target)

    def targets(self) -> dict[str, Target]:
        """Return all targets by name. Of those of a codename exactly one has `independent: true`."""
        found = {name: self.target(name) for name in self.names("targets")}
        for codename in sorted({target.codename for target in found.values()}):
            names = [name for name, one in found.items() if one.codename == codename and one.independent]
            if len(names) != 1:
                raise RequestError(
                    f"{self.directory / 'targets'}: codename {codename}: {' and '.join(names) or 'no target'} with "
                    "`independent: true`; exactly one builds what is architecture-independent, and the source"
                )
        return found

    def release(self, name: str) -> Release:
        """Return the release NAME."""
        return self._entry("releases", name, Release)

    def package(self, name: str) -> PackageEntry:
        """Return the entry of the source package NAME."""
        return self._entry("packages", name, PackageEntry)

    def limits(self, entry: PackageEntry) -> Limits:
        """Return what the sandbox allows builds of a package: its own limits over those of `config.yaml`."""
        own = entry.limits.model_dump(exclude_unset=True) if entry.limits else {}
        return self.settings.limits.model_copy(update=own)

    def build_host(self, target: str) -> str | None:
        """Return the name of the build host of a target, which `settings.build_hosts` has; None when it has none.

        Raises:
            RequestError: there is no build host of that name.
        """
        name = self.target(target).build_host
        if name is not None and name not in self.settings.build_hosts:
            known = ", ".join(sorted(self.settings.build_hosts)) or "none"
            place = self.place_of(f"targets/{target}.yaml", "build_host")
            raise RequestError(f"{place}: no {name!r} in build_hosts of {self.directory / 'config.yaml'}: {known}")
        return name

    def place_of(self, file: str, *key: str) -> str:
        """Return where a key stands in a file of this configuration, for an error: `FILE:LINE: KEY`."""
        path = self.directory / file
        return f"{path}:{_line(path.read_text(), key)}: {'.'.join(key)}"

    def environment(self, name: str) -> tuple[Path, Environment]:
        """Return the environment NAME, and the directory that its scenarios' paths begin at.

        Every configuration has the embedded `default`, unless it has one of its own.
        """
        own = self.embedded or name != "default" or (self.directory / "environments" / f"{name}.yaml").exists()
        config = self if own else Config(EMBEDDED)
        return config.directory, config._entry("environments", name, Environment)

    def names(self, kind: Literal["targets", "releases", "packages", "environments"]) -> list[str]:
        """Return the names of all entries of a kind, sorted. Hidden files are an editor's own."""
        found = (path for path in (self.directory / kind).glob("*.yaml") if not path.name.startswith("."))
        return sorted(path.stem for path in found)

    def release_of(self, branch: str) -> tuple[str, Release] | None:
        """Return the release that claims `branch`, with its name, or None."""
        for name in self.names("releases"):
            release = self.release(name)
            if any(re.fullmatch(pattern, branch) for pattern in release.branches):
                return name, release
        return None

    def package_of(self, project: str) -> str | None:
        """Return the name of the package that is built from `project`, or None."""
        name = self._named_before(project)
        return self._projects.get(project) if name is None else name

    def _named_before(self, project: str) -> str | None:
        """Return the package that the index names for a project, if its file, which is read now, still does.

        None as well when files came or went since: one of them may claim the project too.
        """
        folder, index = self.directory / "packages", self._index
        try:
            with index.open() as stream:
                changed, projects = json.loads(stream.readline())
            name = projects[project] if changed == folder.stat().st_mtime_ns else None
        except (OSError, ValueError, KeyError):
            return None
        known = name is not None and (folder / f"{name}.yaml").is_file() and project in self.package(name).projects
        return name if known else None

    @property
    def _index(self) -> Path:
        """What the packages' files said when they were all looked at.

        The first line is the time of their directory, and the package of each project; the second one, of each file what
        tells whether it has changed, and its projects.
        """
        place = hashlib.sha256(os.fsencode(self.directory)).hexdigest()[:32]
        return self.cache / "projects" / f"{place}.json"

    @cached_property
    def _projects(self) -> dict[str, str]:
        """The package of each project, by all files: those that have changed since the index was made are read."""
        folder, index = self.directory / "packages", self._index
        changed = folder.stat().st_mtime_ns if folder.is_dir() else 0
        try:
            before = json.loads(index.read_text().splitlines()[1])
        except (OSError, ValueError, IndexError):
            # not there yet, or cut short by a crash of the machine
            before = {}
        files: dict[str, list] = {}
        projects: dict[str, str] = {}
        for name, stamp in _stamps(folder):
            known = before.get(name)
            files[name] = known if known and known[0] == stamp else [stamp, list(self.package(name).projects)]
            for project in files[name][1]:
                if project in projects:
                    raise RequestError(
                        f"{folder / name}.yaml: project {project} already belongs to package {projects[project]}; "
                        "a project belongs to one package"
                    )
                projects[project] = name
        with replacing(index) as new:
            new.write(f"{json.dumps([changed, projects])}\n{json.dumps(files)}\n".encode())
        return projects

    def _entry(self, kind: str, name: str, model: type[Entry]) -> Entry:
        """Return an entry; it is read once."""
        path = self.directory / kind / f"{name}.yaml"
        if path in self._read:
            return self._read[path]
        if not re.fullmatch(NAME, name):
            raise RequestError(f"{kind[:-1]} {name[:100]!r} of {path.parent} is not allowed; it must match {NAME}")
        if not path.is_file():
            known = ", ".join(self.names(kind)[:10]) or "none"  # type: ignore[arg-type]
            raise RequestError(f"unknown {kind[:-1]} {name!r}; {self.directory / kind} has: {known}")
        return self._read.setdefault(path, _load(path, model))


def _stamps(folder: Path) -> list[tuple[str, list[int]]]:
    """Return the name of each entry of a directory, sorted, and what tells whether its file has changed."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as found:
        entries = [one for one in found if one.name.endswith(".yaml") and not one.name.startswith(".")]
        try:
            stats = [(one.name.removesuffix(".yaml"), one.stat()) for one in entries]
        except FileNotFoundError as error:
            raise RequestError(f"{error.filename}: cannot read: {error.strerror}; where does the link lead?") from error
    return sorted((name, [stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_size]) for name, stat in stats)


def _load(path: Path, model: type[Entry]) -> Entry:
    """Read one YAML file into its model, or say what is wrong in which line."""
    try:
        text = path.read_text()
        loaded = yaml.load(text, _UniqueKeyLoader)  # noqa: S506 - it is a SafeLoader
        # JSON: YAML has lists where the models have tuples; strictness about scalars stays
        document = json.dumps({} if loaded is None else loaded, default=str, allow_nan=False)
    except OSError as error:
        raise RequestError(f"{path}: cannot read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 text: {error.reason}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RequestError(f"{path}:{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        # a character that YAML does not allow, a date that no calendar has
        raise RequestError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise RequestError(f"{path}: nested too deeply") from error
    try:
        # an entry lies two levels down; its context is the configuration directory
        return model.model_validate_json(document, context=path.parents[1])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        rule = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        raise RequestError(f"{path}:{_line(text, first['loc'])}: {where}: {rule}") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _line(text: str, location: tuple[int | str, ...]) -> int:
    """Return the line, from 1, of the deepest node of `text` that `location` leads to."""
    node = yaml.compose(text, yaml.SafeLoader)
    line = 1
    for step in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(step)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            break
    return line
