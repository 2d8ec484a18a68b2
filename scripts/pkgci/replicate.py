"""The job `replicate`: a system test of another installation once more, here, and whether it ends in the same way.

All that it needs is fetched over HTTP: the record of the test, the manifests of its snapshots, and its test repositories,
which are copied, so that they may expire there. What comes from there is data: scenarios and environments are those of the
configuration here, and the snapshot is one of this installation; by what they differ is said. The test itself is the job
`systest`, with the same parameters.

What is fetched is believed as far as the URL is, which a person gives: a repository elsewhere than on that host has to be
below a configured prefix.
"""

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urlsplit

from pydantic import ValidationError

from pkgci import copied, flavours, repetition, repository, web
from pkgci.artifacts import Record, ReplicatedTest, Replication, Repository, Result, Systest
from pkgci.change import RULES, Parameters, check_repository_url
from pkgci.config import Config
from pkgci.errors import PackageError, RequestError
from pkgci.server import serve
from pkgci.step import StepContext
from pkgci.text import printable
from pkgci.vm.snapshot import Manifest

log = logging.getLogger(__name__)

# where a build's artifacts are below what a person calls its URL: themselves, the archive, Jenkins' page, the local engine's
PLACES = ("", "artifacts/", "artifact/artifacts/", "archive/artifacts/")
PAGES = re.compile(r"/(index\.html|result\.json|systest\.json)$")
RESULT, SYSTEST = "result.json", "systest.json"
RECORD_BYTES = 16 << 20
DIRECTORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*", re.ASCII)
# of one run, or of the host that it ran on
THEIRS = ("PARENT", "CORRELATION", "NODE", "DEBUG_HOLD")

Read = TypeVar("Read", bound=Record)


@dataclass(frozen=True)
class _Original:
    """The system test that is replicated: where its artifacts are, its record, the manifests of its snapshots by sha256."""

    place: str
    record: Systest
    manifests: Mapping[str, Manifest]


def replicate(context: StepContext, parameters: Parameters, artifacts: Path) -> str:
    """Run a system test of another installation once more, and compare test by test how it ended.

    Args:
        context: starts the system test.
        parameters: REPLICATE, the URL of the build, and REBUILD_SNAPSHOT.
        artifacts: takes `replicate.json`.

    Returns:
        That it is reproduced, in one line: each test ended as it did there, whether it passed or failed.

    Raises:
        PackageError: a test ended in another way.
        RequestError: the URL leads to no system test that can be replicated; its snapshot is not here, and
            REBUILD_SNAPSHOT is not true.
        InfrastructureError: something cannot be read, or the test could not be run.
    """
    original = _original(parameters.required("REPLICATE"))
    job = f"systest-{original.record.target}"
    with serve(context.config):
        given = _given(context.config, original, parameters.get("REBUILD_SNAPSHOT"))
        [error] = context.run_each([(job, given)], 1)
    if error is not None and not isinstance(error, PackageError):
        raise error
    record = Systest.read(artifacts / job / SYSTEST)
    made = compare(original.place, original.record, original.manifests, record, artifacts / job)
    made.write(artifacts / "replicate.json")
    return _judged(made)


def compare(url: str, there: Systest, manifests: Mapping[str, Manifest], here: Systest, directory: Path) -> Replication:
    """Return how two runs of a system test differ; test by test it is logged.

    Args:
        url: where the artifacts of the first one are.
        there: its record.
        manifests: those of its snapshots, by sha256.
        here: the record of the second one.
        directory: its artifacts.
    """
    own = {one.sha256: Manifest.read(directory / one.manifest) for one in here.snapshots}
    differences = tuple(printable(line, 500) for line in repetition.differences(there, here, manifests, own))
    ends = [{(one.scenario, one.test): one.result for one in record.outcomes} for record in (there, here)]
    tests = tuple(
        ReplicatedTest(scenario=key[0], test=key[1], there=ends[0].get(key, ""), here=ends[1].get(key, ""))
        for key in dict.fromkeys([*ends[0], *ends[1]])
    )
    made = Replication(url=url, target=here.target, environment=here.environment, differences=differences, tests=tests)
    for line in differences:
        log.info("differs: %s", line)
    for test in tests:
        log.info("%s: %s", "same" if test.there == test.here else "DIFFERENT", _said(test))
    return made


def _judged(made: Replication) -> str:
    """Return that a system test is reproduced.

    Raises:
        PackageError: it is not.
    """
    apart = f"; {len(made.differences)} differences in what it ran on" if made.differences else ""
    if made.different:
        more = f" (and {len(made.different) - 1} more)" if made.different[1:] else ""
        raise PackageError(f"not reproduced: {_said(made.different[0])}{more}{apart}")
    failed = sum(test.here == "failed" for test in made.tests)
    return f"reproduced: {len(made.tests)} tests ended as they did there, {failed} of them failed{apart}"


def _said(test: ReplicatedTest) -> str:
    ends = test.here if test.here == test.there else f"{test.there or 'not run'} there, {test.here or 'not run'} here"
    return printable(f"{test.scenario}: {test.test}: {ends}")


def _original(url: str) -> _Original:
    """Fetch what is known of a system test, from the URL of its build, of the one that started it, or of their artifacts.

    Raises:
        RequestError: there is none, or it did not come to a result that could be compared.
        InfrastructureError: it cannot be read.
    """
    place, result = _result(url)
    if result.step != "systest":
        started = [child.directory for child in result.children if child.job.startswith("systest-")]
        if not started or not DIRECTORY.fullmatch(started[-1]):
            raise RequestError(f"{url} is of the step {result.step}, which ran no system test")
        # of several the last one counts
        place += f"{quote(started[-1])}/"
        result = _fetched(f"{place}{RESULT}", Result)
    if result.fault not in ("none", "package"):
        raise RequestError(f"{place}: it ended without a result to compare, by fault of: {result.fault}")
    record = _fetched(f"{place}{SYSTEST}", Systest)
    if not record.snapshots:
        raise RequestError(f"{place}{SYSTEST} does not say what it ran on; its pkgci is older than `pkgci replicate`")
    manifests = {}
    for one in record.snapshots:
        content = _content(place + quote(one.manifest))
        if hashlib.sha256(content).hexdigest() != one.sha256:
            raise RequestError(f"{place}{one.manifest} is not what {SYSTEST} says: another checksum")
        manifests[one.sha256] = _parsed(content, f"{place}{one.manifest}", Manifest)
    log.info("%s: %d tests on %s", place, len(record.outcomes), record.snapshot)
    return _Original(place, record, manifests)


def _result(url: str) -> tuple[str, Result]:
    """Return where the artifacts of a build are, and how it ended."""
    base = PAGES.sub("/", url).rstrip("/") + "/"
    for place in PLACES:
        try:
            return base + place, _fetched(f"{base}{place}{RESULT}", Result)
        except web.NotFoundError:
            continue
    raise RequestError(f"there is no {RESULT} at {base}, or where engines keep it below; name the URL of a build")


def _given(config: Config, original: _Original, rebuild: str) -> dict[str, str]:
    """Return the parameters of the system test, with repositories of this installation.

    Raises:
        RequestError: one is not allowed, or the repositories do not have what was tested.
        InfrastructureError: a repository cannot be copied.
    """
    record = original.record
    asked = {
        **{name: value for name, value in record.parameters.items() if name not in THEIRS},
        "REPOSITORIES": " ".join(record.repositories),
        "ENVIRONMENT": record.environment,
        "SCENARIOS": " ".join(record.scenarios),
        "FLAVOURS": flavours.spelled(record.flavours),
        "SEED": str(record.seed),
        "SNAPSHOTS": " ".join(one.sha256 for one in record.snapshots),
    }
    # all of it is somebody else's word, before any of it is used
    given = dict(Parameters.read(asked, RULES).values)
    expires = datetime.now(UTC) + timedelta(days=config.settings.test_repository_days)
    target = config.target(record.target)
    found = [_repository(config, original, url, expires) for url in record.repositories]
    usable = [one for one in found if (one.format, one.codename) == (target.format, target.codename)]
    offered = {(one.name, one.version, one.architecture, one.sha256) for own in usable for one in own.packages}
    for one in record.packages:
        if (one.name, one.version, one.architecture, one.sha256) not in offered:
            raise RequestError(f"the repositories of {original.place} do not have {one.file} any more as it was tested")
    given["REPOSITORIES"] = " ".join(one.url + repository.RECORD for one in usable)
    return {**given, "AGAIN": "true", "REBUILD_SNAPSHOT": rebuild}


def _repository(config: Config, original: _Original, url: str, expires: datetime) -> Repository:
    """Return the record of a repository of the test: of a copy of it, but for our own and released ones."""
    if url.startswith(config.settings.url):
        return repository.described(url)
    same_host = urlsplit(url).hostname == urlsplit(original.place).hostname
    if not same_host or not url.endswith(f"/{repository.RECORD}") or "%" in url:
        check_repository_url(url, config)
    found = copied.copy(config, original.record.target, url, expires)
    if found.released:
        check_repository_url(url, config)
    return found


def _fetched(url: str, model: type[Read]) -> Read:
    return _parsed(_content(url), url, model)


def _content(url: str) -> bytes:
    return web.read(url, upstream=False, largest=RECORD_BYTES)


def _parsed(content: bytes, url: str, model: type[Read]) -> Read:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise RequestError(f"{url} is no {model.__name__} that is known here: {error.errors()[0]['msg']}") from error
