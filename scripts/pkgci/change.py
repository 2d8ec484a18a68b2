"""Zuul's and our own job parameters, read from the environment into models.

All of them are untrusted. Each is held against a pattern before anything uses it; an error names the parameter and the
rule. The names are Zuul 2's (https://docs.opendev.org zuul 2.6 "Launchers"); what current Zuul's job variables say is
mapped to them by its playbook.
"""

import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from pkgci.config import EMBEDDED, FLAVOURS, GROUP, NAME, PACKAGE, PROFILE, Config, Release
from pkgci.errors import RequestError

# a project becomes a path of files, so its length has a limit; a branch has what people give theirs, without shell's characters
PROJECT = r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9._+-]{0,99}){0,9}"
BRANCH = r"[A-Za-z0-9_][A-Za-z0-9._+,=@#-]*(/[A-Za-z0-9_][A-Za-z0-9._+,=@#-]*)*"
REF = f"refs/{BRANCH}"
OBJECT = r"[0-9a-f]{40}"
# what a branch was before it was made, and is after it was removed
NO_COMMIT = "0" * 40
ITEM = f"{PROJECT}:{BRANCH}:{REF}"
STEPS = ("compile", "publish", "lint", "install", "systest")
# what a step cannot run without
NEEDS = {"publish": "compile", "lint": "compile", "install": "publish", "systest": "publish"}
TESTS = ("lint", "install", "systest")
# how to build: what `build` hands on to `compile`, as the macro compile-parameters of jobs/ has them
COMPILE = ("BUILD_PROFILES", "BUILD_MINUTES", "REPRODUCIBLE", "KEEP_ROOT")
# what says which branch has moved, and how
MOVED = ("ZUUL_PROJECT", "ZUUL_REFNAME", "ZUUL_OLDREV", "ZUUL_NEWREV")

# Gerrit's own name of a patch set
PATCH_SET = re.compile(r"refs/changes/[0-9]{2}/([0-9]{1,10})/([0-9]{1,6})", re.ASCII)
KEY = r"[0-9a-f]{64}"
# by itself, or a group of it
SCENARIO = f"{NAME}(:{GROUP})?"
# of a package
FLAVOUR = f"{PACKAGE}:({'|'.join(FLAVOURS)})(,({'|'.join(FLAVOURS)}))*"
JOB = r"[a-z0-9][a-z0-9.+-]*/[0-9]+"

RULES = {
    "ZUUL_PROJECT": PROJECT,
    "ZUUL_BRANCH": BRANCH,
    "ZUUL_CHANGE": r"[0-9]{1,10}",
    "ZUUL_PATCHSET": r"[0-9]{1,6}",
    "ZUUL_CHANGES": rf"{ITEM}(\^{ITEM})*",
    "ZUUL_PIPELINE": r"[A-Za-z0-9][A-Za-z0-9_-]*",
    "ZUUL_UUID": r"[A-Za-z0-9][A-Za-z0-9-]{0,63}",
    "ZUUL_REF": REF,
    "ZUUL_URL": r"(https?|ssh|git|file)://[A-Za-z0-9/._~:@%+\[\]-]+",
    "ZUUL_COMMIT": OBJECT,
    "ZUUL_REFNAME": BRANCH,
    "ZUUL_OLDREV": OBJECT,
    "ZUUL_NEWREV": OBJECT,
    "RUN_TESTS": r"true|false",
    "AGAIN": r"true|false",
    "ONLY": f"({'|'.join(STEPS)})(,({'|'.join(STEPS)}))*",
    "BUILD_PROFILES": f"{PROFILE}(,{PROFILE}){{0,19}}",
    "BUILD_MINUTES": r"[1-9][0-9]?|1[0-7][0-9]|180",
    "REPRODUCIBLE": r"true|false",
    "KEEP_ROOT": r"true|false",
    "BUILD_KEY": KEY,
    "BUILD_KEYS": f"{KEY}( {KEY})*",
    "TEST_REPOSITORY": r"true|false",
    "SYSTEM_TESTS": f"{JOB}( {JOB})*",
    "PACKAGE": NAME,
    "REPOSITORIES": r"https?://[A-Za-z0-9/._~:%+\[\]-]+( https?://[A-Za-z0-9/._~:%+\[\]-]+)*",
    "SOURCE_TREE": OBJECT,
    "PACKAGING_TREE": OBJECT,
    "ENVIRONMENT": NAME,
    # 24 hours at most
    "DEBUG_HOLD": r"([1-9]|1[0-9]|2[0-4])h|([1-9][0-9]{0,2}|1[0-3][0-9]{2}|14[0-3][0-9]|1440)m",
    "SCENARIOS": f"{SCENARIO}( {SCENARIO})*",
    "FLAVOURS": f"{FLAVOUR}( {FLAVOUR})*",
    "SEED": r"[0-9]{1,9}",
    "SNAPSHOTS": f"{KEY}( {KEY})?",
    "REBUILD_SNAPSHOT": r"true|false",
    "PARENT": JOB,
    "CORRELATION": r"[A-Za-z0-9][A-Za-z0-9-]{0,63}",
}
# of the jobs only that ask for them: in the environment of any other, words as common as these are somebody else's
COMMON = {
    "RELEASE": NAME,
    "EVERYTHING": r"true|false",
    "DRY_RUN": r"true|false",
    "REMOVE": r"true|false",
    "NODE": r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}",
    "ACTION": r"open|list|extend|close",
    "BUILD": rf"{NAME}(/[0-9]{{1,9}})?",
    "MACHINES": NAME,
    "AT_START": r"true|false",
    # authorized_keys(5), without options; some types of keys are not for programs of today
    "PUBLIC_KEY": r"(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(256|384|521)) [A-Za-z0-9+/]{40,3000}={0,2}( [A-Za-z0-9@._-]{1,100})?",
    # not BUILD_URL: both engines give each build its own by that name
    "REPLICATE": r"https?://[A-Za-z0-9/._~:%+,\[\]-]+",
}
EVERY = RULES | COMMON


@dataclass(frozen=True)
class QueueItem:
    """One change of a queue: `project:branch:ref` of ZUUL_CHANGES."""

    project: str
    branch: str
    ref: str

    @property
    def patch_set(self) -> tuple[str, str]:
        """The change's number and patch set, by Gerrit's own name of the ref; empty for another one."""
        named = PATCH_SET.fullmatch(self.ref)
        return (named[1], named[2]) if named else ("", "")


@dataclass(frozen=True)
class Change:
    """The change that a job is about, and those ahead of it.

    `queue` holds the changes that the state under test consists of beside the branch, oldest first, this one last.
    `url` is where they are fetched from (the project's name is appended); `commit` is known after a merge, or when Zuul
    says it. A local change has neither number nor queue: `url` leads to a repository of the state directory.
    """

    project: str
    branch: str
    pipeline: str = ""
    number: str = ""
    patchset: str = ""
    ref: str = ""
    url: str = ""
    commit: str = ""
    queue: tuple[QueueItem, ...] = ()

    def id(self, tree: str) -> str:
        """Return `NUMBER,PATCHSET`, or the short form of the tree id for a change without a number."""
        return f"{self.number},{self.patchset}" if self.number else tree[:8]


@dataclass(frozen=True)
class Parameters:
    """The validated parameters of one build, by name, and what is read from them."""

    values: Mapping[str, str]

    @classmethod
    def read(cls, environment: Mapping[str, str], rules: Mapping[str, str] = RULES) -> "Parameters":
        """Read and validate all known parameters; empty ones count as not given.

        Args:
            environment: has them by their names.
            rules: the parameters of the job, each with a regular expression for the whole value.

        Raises:
            RequestError: a value breaks its rule.
        """
        values = {}
        moved = bool(environment.get("ZUUL_NEWREV", "").strip())
        for name, rule in rules.items():
            value = environment.get(name, "").strip()
            # Zuul 2 says of a branch that has moved the same again by these names, not by the rule
            if not value or (moved and name in ("ZUUL_REF", "ZUUL_COMMIT")):
                continue
            if not re.fullmatch(rule, value, re.ASCII):
                raise RequestError(f"parameter {name}: {value[:120]!r} is not allowed; it must match {rule}")
            # git-check-ref-format(1) refuses these too; the characters are bounded by the rules
            if re.search(r"\.\.|\.(lock)?([/:^]|$)", value):
                raise RequestError(
                    f"parameter {name}: {value[:120]!r} is not allowed; no '..', and no part that ends in '.' or '.lock'"
                )
            values[name] = value
        if moved and "ZUUL_CHANGES" in values:
            raise RequestError("parameter ZUUL_CHANGES: not with ZUUL_NEWREV; a branch that has moved has no queue")
        return cls(values)

    def get(self, name: str) -> str:
        """Return the value of a parameter, empty when it was not given."""
        return self.values.get(name, "")

    def required(self, name: str) -> str:
        """Return the value of a parameter that this job cannot do without.

        Raises:
            RequestError: it was not given.
        """
        if name not in self.values:
            raise RequestError(f"parameter {name}: missing; this job needs it")
        return self.values[name]

    @property
    def run_tests(self) -> bool:
        """Whether lint, install and system test follow the publication: before the merge only."""
        return self.get("RUN_TESTS") != "false" and not self.merged

    @property
    def merged(self) -> bool:
        """Whether they are about a branch that has moved. That it has is asked of Git by who relies on it."""
        return "ZUUL_NEWREV" in self.values

    def approved(self, config: Config) -> bool:
        """Return whether what is built may be released once it is merged: somebody approved the change, or it is merged."""
        return self.merged or self.get("ZUUL_PIPELINE") in config.settings.gate_pipelines

    @property
    def repeat(self) -> bool:
        """Whether a test is run though it passed before with the same input: what a person starts by hand is."""
        return self.get("AGAIN") == "true" or not self.get("PARENT")

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps of a build, in their order: all, or those of ONLY with what they need; no tests if RUN_TESTS is false."""
        wanted = set(self.get("ONLY").split(",") if self.get("ONLY") else STEPS)
        for step in reversed(STEPS):
            if step in wanted and step in NEEDS:
                wanted.add(NEEDS[step])
        return tuple(step for step in STEPS if step in wanted and (self.run_tests or step not in TESTS))

    @property
    def zuul(self) -> dict[str, str]:
        """Those of Zuul, which say what the change is."""
        return {name: value for name, value in self.values.items() if name.startswith("ZUUL_")}

    @property
    def profiles(self) -> tuple[str, ...]:
        """The build profiles of BUILD_PROFILES."""
        return tuple(filter(None, self.get("BUILD_PROFILES").split(",")))

    def run_name(self, key: str) -> str:
        """Return the name of the run in a test repository's URL: project, change or build, and what makes it unique."""
        project = self.required("ZUUL_PROJECT").rpartition("/")[2].lower()
        number = "-".join(filter(None, [self.get("ZUUL_CHANGE"), self.get("ZUUL_PATCHSET")]))
        return f"{project}-{number or key[:8]}-{(self.get('CORRELATION') or uuid.uuid4().hex)[:8].lower()}"

    def repositories(self, config: Config) -> tuple[str, ...]:
        """Return the URLs of the `repository.json` files in REPOSITORIES.

        Raises:
            RequestError: one is not below a configured prefix.
        """
        urls = tuple(self.get("REPOSITORIES").split())
        for url in urls:
            check_repository_url(url, config)
        return urls

    def queued(self, config: Config) -> tuple["Parameters", ...]:
        """Return the parameters of a build of each package and branch that the queue touches, in its last state there.

        They are in the order of the queue: this change's own is the last. The queue of each is its own part of it, so that
        it builds nothing else.

        Raises:
            RequestError: as of `change`.
        """
        change = self.change(config)
        if not change.queue:
            return (self,)
        parts: dict[tuple[str, str], list[QueueItem]] = {}
        for item in change.queue:
            unit = config.package_of(item.project) or item.project, item.branch
            # a package is where its last change is
            parts[unit] = [*parts.pop(unit, []), item]
        *others, own = parts.values()
        local = change.url == local_changes(config)
        return (
            *(self._other(part, local) for part in others),
            Parameters({**self.values, "ZUUL_CHANGES": _joined(own)}),
        )

    def _other(self, part: Sequence[QueueItem], local: bool) -> "Parameters":
        """Return the parameters of a build of another part of the queue than this change's."""
        last = part[-1]
        about = ("ZUUL_CHANGE", "ZUUL_PATCHSET", "ZUUL_REF", "ZUUL_COMMIT")
        values = {name: value for name, value in self.values.items() if name not in about}
        values |= {"ZUUL_PROJECT": last.project, "ZUUL_BRANCH": last.branch, "ZUUL_CHANGES": _joined(part)}
        if local:
            values["ZUUL_REF"] = last.ref
        else:
            number, patch_set = last.patch_set
            values |= {"ZUUL_CHANGE": number, "ZUUL_PATCHSET": patch_set}
        return Parameters({name: value for name, value in values.items() if value})

    def change(self, config: Config) -> Change:
        """Return the change that the parameters name.

        Raises:
            RequestError: they name none, or one from a place that is not configured.
        """
        project = self.required("ZUUL_PROJECT")
        branch = self.get("ZUUL_BRANCH") or self.get("ZUUL_REFNAME").removeprefix("refs/heads/")
        if not branch:
            raise RequestError("parameter ZUUL_BRANCH: missing; this job needs it (or ZUUL_REFNAME after a merge)")
        url = self.get("ZUUL_URL")
        if url:
            check_url(url, config)
        items = (item.split(":", 2) for item in self.get("ZUUL_CHANGES").split("^") if item)
        queue = tuple(QueueItem(*item) for item in items)
        if queue and (queue[-1].project, queue[-1].branch) != (project, branch):
            raise RequestError(f"parameter ZUUL_CHANGES: its last change is not one of {project}, branch {branch}")
        return Change(
            project=project,
            branch=branch,
            pipeline=self.get("ZUUL_PIPELINE"),
            number=self.get("ZUUL_CHANGE"),
            patchset=self.get("ZUUL_PATCHSET") or ("0" if self.get("ZUUL_CHANGE") else ""),
            ref=self.get("ZUUL_REF"),
            url=f"{url.rstrip('/')}/" if url else config.settings.gerrit or "",
            commit=self.get("ZUUL_NEWREV") or self.get("ZUUL_COMMIT"),
            queue=queue,
        )


def _joined(items: Sequence[QueueItem]) -> str:
    return "^".join(f"{item.project}:{item.branch}:{item.ref}" for item in items)


def local_changes(config: Config) -> str:
    """Return the URL below which the repositories of local changes lie; only the local engine accepts it."""
    return f"file://{quote(os.fsencode(config.state))}/changes/"


def release_of(config: Config, change: Change) -> Release:
    """Return the release that claims the change's branch; a local change without one is under the embedded default.

    Raises:
        RequestError: no release claims the branch.
    """
    found = config.release_of(change.branch)
    if found:
        return found[1]
    if change.url == local_changes(config):
        return Config(EMBEDDED).release("default")
    raise RequestError(f"no release claims branch {change.branch}; `build` would have said so")


def release_name(config: Config, change: Change) -> str:
    """Return the name of the release to whose repositories a change's package belongs; empty where it belongs to none."""
    found = config.release_of(change.branch) if config.package_of(change.project) else None
    return found[0] if found else ""


def check_url(url: str, config: Config) -> None:
    """Refuse a ZUUL_URL that is not below a configured prefix.

    Raises:
        RequestError: it is not.
    """
    place = f"{url.rstrip('/')}/"
    if place == local_changes(config):
        return
    allowed = (*config.settings.sources, *filter(None, [config.settings.gerrit]))
    # whoever serves it decodes %2e%2e/
    if "%" in place or not place.startswith(allowed):
        raise RequestError(
            f"parameter ZUUL_URL: {url!r} is not allowed; config.yaml's `sources` are: {' '.join(allowed) or 'none'}"
        )


def check_repository_url(url: str, config: Config) -> None:
    """Refuse a URL in REPOSITORIES that is not that of a `repository.json` below a configured prefix.

    Raises:
        RequestError: it is not.
    """
    allowed = (config.settings.url, *config.settings.repositories)
    if not url.startswith(allowed) or not url.endswith("/repository.json") or "%" in url or ".." in url:
        raise RequestError(
            f"parameter REPOSITORIES: {url[:300]} is not allowed; it must be a repository.json below {' or '.join(allowed)}"
        )
