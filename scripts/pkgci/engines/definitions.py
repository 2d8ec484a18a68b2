"""What a job is, for the local engine: `jobs/` rendered by Jenkins Job Builder, and the XML read strictly.

Only what the templates of this repository use is known. Any other element, value or attribute is an error that names it:
an engine that ignored, say, a wrapper would run another job than Jenkins does.
"""

import hashlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from pkgci.command import run
from pkgci.errors import InfrastructureError, RequestError

_PARAMETERS = "properties/hudson.model.ParametersDefinitionProperty/parameterDefinitions"
_STRING = f"{_PARAMETERS}/hudson.model.StringParameterDefinition"
_BOOLEAN = f"{_PARAMETERS}/hudson.model.BooleanParameterDefinition"
_NODE = f"{_PARAMETERS}/org.jvnet.jenkins.plugins.nodelabelparameter.LabelParameterDefinition"
_DISCARDER = "properties/jenkins.model.BuildDiscarderProperty/strategy"
_SHELL = "builders/hudson.tasks.Shell"
_ARCHIVE = "publishers/hudson.tasks.ArtifactArchiver"
_JUNIT = "publishers/hudson.tasks.junit.JUnitResultArchiver"
_TIMEOUT = "buildWrappers/hudson.plugins.build__timeout.BuildTimeoutWrapper"
_DESCRIPTION = "publishers/hudson.plugins.descriptionsetter.DescriptionSetterPublisher"
_TIMER = "triggers/hudson.triggers.TimerTrigger/spec"
_TIMESTAMPS = "buildWrappers/hudson.plugins.timestamper.TimestamperBuildWrapper"

# by the path of an element without children: the text that it may have, as a regular expression
_LEAVES = {
    "actions": "",
    "description": r"(.|\n)*",
    "keepDependencies": "false",
    "blockBuildWhenDownstreamBuilding": "false",
    "blockBuildWhenUpstreamBuilding": "false",
    "concurrentBuild": "true",
    "quietPeriod": "0",
    "assignedNode": r"[a-z]+",
    "canRoam": "false",
    "scm": "",
    "properties": "",
    "publishers": "",
    "buildWrappers": "",
    f"{_DISCARDER}/daysToKeep": r"[0-9]+",
    f"{_DISCARDER}/numToKeep": "-1",
    f"{_DISCARDER}/artifactDaysToKeep": "-1",
    f"{_DISCARDER}/artifactNumToKeep": "-1",
    f"{_STRING}/name": r"[A-Z][A-Z0-9_]*",
    f"{_STRING}/description": ".*",
    f"{_STRING}/defaultValue": ".*",
    f"{_STRING}/trim": "false",
    f"{_BOOLEAN}/name": r"[A-Z][A-Z0-9_]*",
    f"{_BOOLEAN}/description": ".*",
    f"{_BOOLEAN}/defaultValue": "true|false",
    # there is one node here: whether it is the wanted one is the step's question
    f"{_NODE}/name": "NODE",
    f"{_NODE}/description": ".*",
    f"{_NODE}/defaultValue": r"[a-z]+",
    f"{_NODE}/allNodesMatchingLabel": "false",
    f"{_NODE}/triggerIfResult": "allCases",
    f"{_NODE}/nodeEligibility": "",
    f"{_SHELL}/command": r"(.|\n)+",
    f"{_ARCHIVE}/artifacts": ".+",
    f"{_ARCHIVE}/allowEmptyArchive": "true",
    f"{_ARCHIVE}/onlyIfSuccessful": "false",
    f"{_ARCHIVE}/fingerprint": "false",
    f"{_ARCHIVE}/defaultExcludes": "false",
    f"{_ARCHIVE}/caseSensitive": "true",
    f"{_ARCHIVE}/latestOnly": "false",
    f"{_ARCHIVE}/followSymlinks": "false",
    f"{_JUNIT}/testResults": ".+",
    f"{_JUNIT}/keepLongStdio": "true|false",
    f"{_JUNIT}/healthScaleFactor": "1.0",
    f"{_JUNIT}/allowEmptyResults": "true",
    f"{_JUNIT}/skipPublishingChecks": "false",
    f"{_JUNIT}/skipMarkingBuildUnstable": "false",
    f"{_JUNIT}/testDataPublishers": "",
    f"{_DESCRIPTION}/regexp": ".+",
    f"{_DESCRIPTION}/regexpForFailed": ".+",
    f"{_DESCRIPTION}/description": r"\\1",
    f"{_DESCRIPTION}/setForMatrix": "false",
    f"{_TIMEOUT}/strategy/timeoutMinutes": r"[0-9]+",
    f"{_TIMEOUT}/operationList/hudson.plugins.build__timeout.operations.FailOperation": "",
    # there is no daemon to start it: a timer of the machine may, by `pkgci jobs run`
    "triggers": "",
    _TIMER: r"[H0-9*/, -]+",
    _TIMESTAMPS: "",
}
_BRANCHES = {path.rsplit("/", depth)[0] for path in _LEAVES for depth in range(1, path.count("/") + 1)}
_ATTRIBUTES = {
    ("scm", "class", "hudson.scm.NullSCM"),
    ("triggers", "class", "vector"),
    (_DISCARDER, "class", "hudson.tasks.LogRotator"),
    (_JUNIT, "plugin", "junit"),
    (f"{_NODE}/nodeEligibility", "class", "org.jvnet.jenkins.plugins.nodelabelparameter.node.AllNodeEligibility"),
    (f"{_TIMEOUT}/strategy", "class", "hudson.plugins.build_timeout.impl.AbsoluteTimeOutStrategy"),
}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a job. The values of a `boolean` one are `true` and `false`."""

    name: str
    default: str
    boolean: bool


@dataclass(frozen=True)
class Definition:
    """A job as the local engine runs it.

    The timeout is in minutes of running, builds are kept for `days`; the first group of `about`, a regular expression, in
    the first line of the log that it is found in becomes the build's description.
    """

    name: str
    label: str
    parameters: tuple[Parameter, ...]
    commands: tuple[str, ...]
    timeout: int | None
    timestamps: bool
    archive: tuple[str, ...]
    junit: tuple[str, ...]
    days: int | None
    about: str | None


def parameter_values(job: str, known: Iterable[Parameter], given: Mapping[str, str]) -> dict[str, str]:
    """Return the values of all parameters of a job, defaults filled in.

    Raises:
        RequestError: one that is given is unknown, or its value is not what it takes.
    """
    parameters = {parameter.name: parameter for parameter in known}
    for name, value in given.items():
        if name not in parameters:
            raise RequestError(f"job {job} has no parameter {name!r}; it has: {', '.join(parameters) or 'none'}")
        if parameters[name].boolean and value not in ("true", "false"):
            raise RequestError(f"job {job}: parameter {name} is {value!r}; it is true or false")
        if re.search(r"[\0\ud800-\udfff]", value):
            raise RequestError(f"job {job}: parameter {name} is not text: {value!r}")
    return {name: given.get(name, parameter.default) for name, parameter in parameters.items()}


def render(jobs: Path, cache: Path) -> Path:
    """Render the job definitions, unless the same ones were rendered before.

    Args:
        jobs: the directory with what Jenkins Job Builder reads.
        cache: where rendered jobs are kept, by the digest of all that they are made from.

    Returns:
        A directory with one `NAME/config.xml` a job.

    Raises:
        RequestError: Jenkins Job Builder refuses them.
        InfrastructureError: they cannot be read, or the cache cannot be written.
    """
    try:
        digest = hashlib.sha256(version("jenkins-job-builder").encode())
        for path in sorted(path for path in jobs.rglob("*") if path.is_file()):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(jobs)}\0{len(content)}\0".encode() + content)
        rendered = cache / digest.hexdigest()[:32]
        if not rendered.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=".") as scratch:
                _render(jobs, Path(scratch), rendered)
    except OSError as error:
        raise InfrastructureError(f"cannot render the jobs of {jobs}: {error}") from error
    return rendered


def _render(jobs: Path, scratch: Path, rendered: Path) -> None:
    """Let the command that an operator uses render `jobs`, and move the result to `rendered` in one step."""
    settings = scratch / "jjb.ini"
    settings.touch()  # instead of the user's own
    new = scratch / "xml"
    new.mkdir()
    command = [sys.executable, "-m", "jenkins_jobs", "-l", "ERROR", "--conf", settings, "test", "-r", jobs]
    # its cache, which it keeps even for a test, is not for the user's home
    done = run([*command, "--config-xml", "-o", new], env={"XDG_CACHE_HOME": str(scratch)}, check=False, quiet=True)
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise RequestError(f"Jenkins Job Builder refuses the jobs of {jobs}: {said[-1000:]}")
    try:
        new.rename(rendered)
    except OSError:
        # another process was faster: a directory that is not empty is never replaced
        if not rendered.is_dir():
            raise
        shutil.rmtree(new)


def read(path: Path, name: str) -> Definition:
    """Read the rendered XML of the job `name` from `path`; see `parse`."""
    try:
        return parse(name, ElementTree.parse(path).getroot())  # noqa: S314 rendered from this repository, not input
    except OSError as error:
        raise InfrastructureError(f"job {name}: cannot read its definition {path}: {error.strerror}") from error


def read_all(rendered: Path) -> dict[str, Definition]:
    """Read the jobs that `render` returned, by name; see `parse`."""
    return {path.name: read(path / "config.xml", path.name) for path in sorted(rendered.iterdir())}


def parse(name: str, project: ElementTree.Element) -> Definition:
    """Read a job from its XML.

    Raises:
        RequestError: it has an element, an attribute or a value that the local engine does not know.
    """
    if project.tag != "project":
        raise RequestError(f"job {name}: the local engine runs freestyle projects, not <{project.tag}>")
    _check(name, project, "")
    days = project.findtext(f"{_DISCARDER}/daysToKeep")
    timeout = project.findtext(f"{_TIMEOUT}/strategy/timeoutMinutes")
    label = project.findtext("assignedNode")
    if label is None:
        raise RequestError(f"job {name}: no node label; the local engine counts executors by label")
    return Definition(
        name=name,
        label=label,
        parameters=tuple(
            Parameter(
                element.findtext("name", ""),
                element.findtext("defaultValue", ""),
                element.tag == "hudson.model.BooleanParameterDefinition",
            )
            for element in project.iterfind(f"{_PARAMETERS}/*")
        ),
        commands=tuple(element.text or "" for element in project.iterfind(f"{_SHELL}/command")),
        timeout=None if timeout is None else int(timeout),
        timestamps=project.find(_TIMESTAMPS) is not None,
        archive=_patterns(project, f"{_ARCHIVE}/artifacts"),
        junit=_patterns(project, f"{_JUNIT}/testResults"),
        days=None if days is None else int(days),
        about=project.findtext(f"{_DESCRIPTION}/regexp"),
    )


def _check(name: str, element: ElementTree.Element, path: str) -> None:
    """Refuse whatever is not in the tables above."""
    for key, value in element.attrib.items():
        if (path, key, value) not in _ATTRIBUTES:
            raise RequestError(f"job {name}: the local engine does not know {key}={value!r} of element {path}")
    text = element.text or ""
    if len(element):
        known = path in _BRANCHES or not path
        allowed = r"\s*"
    else:
        known = path in _LEAVES
        allowed = _LEAVES.get(path, "")
    if not known:
        raise RequestError(f"job {name}: the local engine does not know element {path}")
    if not re.fullmatch(allowed, text):
        raise RequestError(f"job {name}: the local engine does not know value {text.strip()!r} of element {path}")
    for child in element:
        _check(name, child, f"{path}/{child.tag}".lstrip("/"))


def _patterns(project: ElementTree.Element, path: str) -> tuple[str, ...]:
    """Return the comma-separated Ant patterns of all elements at `path`."""
    return tuple(
        pattern.strip() for element in project.iterfind(path) for pattern in (element.text or "").split(",") if pattern
    )
