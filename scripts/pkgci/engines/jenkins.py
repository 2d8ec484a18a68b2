"""The engine that runs jobs on a Jenkins server, through its REST interface.

A request is known by its parameter CORRELATION, which is unique: by it a build is found again in the queue or among a
job's builds, whatever became of an answer, a connection or the server in between. Equal requests, which Jenkins would
merge in its queue, do not exist for the same reason. While the server does not answer, a verb that has to wait anyhow waits
for it, up to a limit; where a build is, and what there is at all, is asked once.

Source: https://www.jenkins.io/doc/book/using/remote-access-api/; what `api/json?tree=` knows is at `api/` of each page.
"""

import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import jenkins
import requests
from jenkins_jobs.constants import MAGIC_MANAGE_STRING

from pkgci import web
from pkgci.config import Config, Login
from pkgci.engines.base import BuildInfo, BuildRef, Outcome, State, Tests, Urls
from pkgci.engines.definitions import Parameter, parameter_values
from pkgci.errors import InfrastructureError, RequestError
from pkgci.text import printable

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

TEMPLATE = "Template: jobs/templates/"  # in the description of each job of this repository
SECONDS = (5, 30)  # to connect, and between two pieces of an answer
RETRY = 2.0  # seconds between attempts to reach a server that does not answer
LEAVING = 5.0  # seconds in which a build may be neither in the queue nor among the job's builds
POLLS = (0.5, 5.0)  # seconds between looks at a build, least and most; in between by how long nothing has happened
PIECE = 1 << 16
_PARAMETERS = "actions[parameters[name,value]]"
_OUTCOMES: Mapping[str, Outcome] = {"SUCCESS": "SUCCESS", "ABORTED": "ABORTED"}


class NotFoundError(RequestError):
    """The server answers, and has no such thing."""


class AwayError(InfrastructureError):
    """The server does not answer, or not as one that is ready; it may later."""


@dataclass
class _Request:
    """What was asked for and has no number yet: its parameters, its place in the queue, since when it is in no place.

    An abort makes it `unwanted`; it is `cancelled` when it has left the queue by that.
    """

    values: dict[str, str]
    item: int | None = None
    missing: float | None = None
    unwanted: bool = False
    cancelled: bool = False


@dataclass
class _Poll:
    """When a build that is waited for was first and is next looked at, and since when the server is away."""

    since: float
    due: float = 0.0
    away: float | None = None


class JenkinsEngine:
    """The verbs of `base.Engine`, on a server. Objects may be shared by threads.

    Args:
        config: says where the server is, and who asks.
        login: another account than the one that starts and watches builds.

    Raises:
        RequestError: the configuration names no server, or the file with the account's token cannot be read; (any verb) a
            job or build that does not exist.
        InfrastructureError: (any verb) the server does not answer, or refuses the account.
    """

    # a server is asked less often than files are
    watch = 10.0

    def __init__(self, config: Config, login: Login | None = None) -> None:
        settings = config.settings.jenkins
        if settings is None:
            raise RequestError(
                f"{config.directory / 'config.yaml'}: no `jenkins`, which the engine needs that PKGCI_ENGINE names"
            )
        self.config = config
        login = login or settings
        try:
            self._token = Path(login.token_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"cannot read the token of {login.user} in {login.token_file}: {error}") from error
        self.url = settings.url
        self._user = login.user
        self.patience = settings.patience_seconds
        self._clients = threading.local()
        self._known: dict[str, tuple[Parameter, ...]] = {}
        self._requests: dict[str, _Request] = {}
        self._numbers: dict[str, int] = {}
        self._polls: dict[BuildRef, _Poll] = {}

    def jobs(self) -> list[str]:
        """See `base.Engine`. Those that this repository defines: a server may have others."""
        listed = self.ask_json("", "jobs[name,description]").get("jobs") or []
        return sorted(one["name"] for one in listed if managed(one.get("description")))

    def nodes(self, label: str) -> dict[str, bool]:
        """See `base.Engine`. By their own labels, as the parameter NODE takes them."""
        listed = self._patiently(lambda: self.ask_json(f"label/{quote(label)}", "nodes[nodeName]")).get("nodes") or []
        said = self._patiently(lambda: self.ask_json("computer", "computer[displayName,offline]"))
        away = {one["displayName"] for one in said.get("computer") or () if one["offline"]}
        return {_node(one["nodeName"]): one["nodeName"] not in away for one in listed}

    def start(self, job: str, parameters: Mapping[str, str]) -> BuildRef:
        """See `base.Engine`. It is in the queue when this returns."""
        known = self._parameters(job)
        if not any(parameter.name == "CORRELATION" for parameter in known):
            raise RequestError(f"job {job} has no parameter CORRELATION: it is none of this repository's jobs")
        correlation = parameters.get("CORRELATION") or uuid.uuid4().hex
        values = parameter_values(job, known, {**parameters, "CORRELATION": correlation})
        ref = BuildRef(job, 0, correlation)
        self._requests[correlation] = _Request(values)
        self._patiently(lambda: self._submit(ref))
        return ref

    def numbered(self, ref: BuildRef) -> BuildRef:
        """See `base.Engine`."""
        if not ref.number:
            self._in_queue(ref)
        return ref if ref.number else BuildRef(ref.job, number) if (number := self._numbers.get(ref.request)) else ref

    def wait(self, ref: BuildRef, timeout: float | None = None) -> Outcome | None:
        """See `base.Engine`. The server is asked seldom: short waits in a row cost it nothing."""
        until = None if timeout is None else time.monotonic() + timeout
        poll = self._polls.setdefault(ref, _Poll(time.monotonic()))
        while True:
            now = time.monotonic()
            if now >= poll.due:
                state = self._look(ref, poll)
                if state not in ("queued", "running"):
                    self._polls.pop(ref, None)
                    return state
            if until is not None and time.monotonic() >= until:
                return None
            time.sleep(max(0.0, min(poll.due, poll.due if until is None else until) - time.monotonic()))

    def state(self, ref: BuildRef) -> State:
        """See `base.Engine`."""
        if not ref.number:
            where = self._in_queue(ref)
            if where != "running":
                return where
            ref = BuildRef(ref.job, self._numbers[ref.request])
        return _state(self.ask_json(_path(ref), "building,result"))

    def log(self, ref: BuildRef, follow: bool = False) -> Iterator[bytes]:
        """See `base.Engine`. What was yielded is never yielded again, however often the connection breaks."""
        # a server ends each line by two characters, whatever the build said
        held = b""
        for piece in self._log(ref, follow):
            said = held + piece
            held = b"\r" if said.endswith(b"\r") else b""
            if said := said.removesuffix(held).replace(b"\r\n", b"\n"):
                yield said
        if held:
            yield held

    def _log(self, ref: BuildRef, follow: bool) -> Iterator[bytes]:
        """Yield the log as the server gives it."""
        build = self._patiently(lambda: self.numbered(ref))
        since = time.monotonic()
        while follow and not build.number and self._patiently(lambda: self.state(ref)) in ("queued", "running"):
            time.sleep(_pause(since))
            build = self._patiently(lambda: self.numbered(ref))
        # it may have begun and ended between the two questions
        build = self._patiently(lambda: self.numbered(ref))
        if not build.number:
            return
        # where the next answer begins, and how much of it was yielded before it broke off
        begin = yielded = 0
        lost: float | None = None
        since, known = time.monotonic(), False
        while True:
            try:
                ended = self._patiently(lambda: self.state(build)) not in ("queued", "running")
            except NotFoundError as error:
                if not known:
                    raise
                raise self._gone(build) from error
            known = True
            try:
                with self.ask("GET", f"{_path(build)}/logText/progressiveText?start={begin}", stream=True) as answer:
                    size, more = int(answer.headers["X-Text-Size"]), "X-More-Data" in answer.headers
                    # what a server that was killed had not written is gone: it would begin once more from the start
                    passed = 0
                    for piece in answer.iter_content(PIECE) if size >= begin else ():
                        fresh = piece[max(0, yielded - passed) :]
                        passed += len(piece)
                        yielded += len(fresh)
                        if fresh:
                            yield fresh
            except (AwayError, NotFoundError, requests.RequestException, KeyError, ValueError) as error:
                # a server that is starting has nothing: the next look at the build tells
                lost = lost or time.monotonic()
                if time.monotonic() - lost > self.patience:
                    raise InfrastructureError(f"the log of {build}: {_reason(error)}") from error
                time.sleep(RETRY)
                continue
            grown, begin, yielded, lost = size > begin, size, 0, None
            if not more or not (grown or follow or ended):
                return
            if grown:
                since = time.monotonic()
            else:
                time.sleep(_pause(since))

    def artifacts(self, ref: BuildRef, destination: Path) -> None:
        """See `base.Engine`. Their paths are what a build chose, and lead nowhere else."""
        build = self._patiently(lambda: self.numbered(ref))
        if not build.number:
            return
        listed = self._patiently(lambda: self.ask_json(_path(build), "artifacts[relativePath]")).get("artifacts") or []
        for one in listed:
            path = _below(build, one["relativePath"])
            self._patiently(lambda path=path: self._fetch(build, path, destination / path))

    def abort(self, ref: BuildRef) -> None:
        """See `base.Engine`. What the build has started, and what that has started, is asked to stop as well."""
        if self.state(ref) not in ("queued", "running"):
            return
        # a copy: other threads wait for other builds
        for poll in list(self._polls.values()):
            # it is about to end
            poll.since, poll.due = time.monotonic(), 0.0
        ref = self._taken_out(self.numbered(ref))
        if ref.number:
            # those that are queued would begin in its place
            for child in self._children(ref):
                if not child.number:
                    self.abort(child)
            self._post(f"{_path(ref)}/stop")
            for child in self._children(ref):
                self.abort(child)

    def builds(self, job: str) -> list[BuildRef]:
        """See `base.Engine`. The newest hundred: a server reads each from its disk."""
        listed = self.ask_json(_job(job), "builds[number]").get("builds") or []
        return [BuildRef(job, number) for number in sorted(one["number"] for one in listed)]

    def find(self, job: str, correlation: str) -> BuildRef | None:
        """See `base.Engine`. In the queue, among the newest hundred builds, or running."""
        ref = BuildRef(job, 0, correlation)
        if self._patiently(lambda: self._found(ref)):
            return ref
        running = self._patiently(lambda: list(self._executed()))
        return next(
            (one for one, values in running if one.job == job and values.get("CORRELATION") == correlation), None
        )

    def urls(self, ref: BuildRef) -> Urls:
        """See `base.Engine`. Of what is still queued, the job's."""
        build = self._patiently(lambda: self.numbered(ref))
        place = f"{self.url}{_path(build) if build.number else _job(ref.job)}"
        return Urls(build=f"{place}/", log=f"{place}/consoleText", archive=f"{place}/artifact/")

    def describe(self, ref: BuildRef, description: str) -> None:
        """See `base.Engine`. What is still queued has none."""
        build = self._patiently(lambda: self.numbered(ref))
        if build.number:
            given = {"description": description}
            self._patiently(lambda: self.ask("POST", f"{_path(build)}/submitDescription", data=given))

    def record(self, ref: BuildRef) -> BuildInfo:
        """See `base.Engine`. A server says when a build began, and not since when it was queued."""
        build = self.numbered(ref)
        if not build.number:
            request = self._requests.get(ref.request)
            values = request.values if request else {"CORRELATION": ref.request}
            queued = datetime.now(UTC)
            return BuildInfo(job=ref.job, number=0, state=self.state(ref), parameters=values, queued=queued)
        counts = "totalCount,failCount,skipCount"
        tree = f"building,result,timestamp,duration,description,builtOn,actions[parameters[name,value],{counts}]"
        said = self.ask_json(_path(build), tree)
        state, began = _state(said), datetime.fromtimestamp(said["timestamp"] / 1000, UTC)
        tests = next((one for one in said["actions"] if one and "totalCount" in one), None)
        return BuildInfo(
            job=build.job,
            number=build.number,
            state=state,
            parameters=_parameters_of(said),
            queued=began,
            started=began,
            ended=None if state == "running" else began + timedelta(milliseconds=said["duration"]),
            tests=tests and Tests(total=tests["totalCount"], failed=tests["failCount"], skipped=tests["skipCount"]),
            description=printable(said.get("description") or "", 200),
            node=_node(said.get("builtOn") or ""),
        )

    def ask_json(self, path: str, tree: str) -> dict[str, Any]:
        """Return what the server says of a page in JSON.

        Args:
            path: of the page, below the server's URL, without a slash at its end.
            tree: what of it, as of `api/json?tree=`.

        Raises:
            NotFoundError: there is no such page, and the server is ready otherwise.
            InfrastructureError: as any verb.
        """
        where = f"{path}/api/json" if path else "api/json"
        try:
            return self._json(where, tree)
        except NotFoundError:
            # a server that is starting, or a proxy before it, may say so of anything
            if path and "nodeDescription" in self._json("api/json", "nodeDescription"):
                return self._json(where, tree)
            raise

    def ask(
        self, method: str, path: str, *, data: Mapping[str, str] | bytes | None = None, stream: bool | None = None
    ) -> requests.Response:
        """Return the answer to a request.

        Args:
            method: of HTTP.
            path: below the server's URL.
            data: fields of a form, or XML.
            stream: whether the answer's content is read by the caller.

        Raises:
            NotFoundError: the server says that there is nothing.
            AwayError: it does not answer, or is not ready.
            InfrastructureError: it refuses.
        """
        headers = {"Content-Type": "text/xml; charset=utf-8"} if isinstance(data, bytes) else None
        about, client = f"{self.url}{path.partition('?')[0]}", self.client()
        former = client.crumb
        try:
            answer = client.jenkins_request(
                requests.Request(method, self.url + path, headers, data=data), stream=stream
            )
        except jenkins.NotFoundException as error:
            raise NotFoundError(f"there is nothing at {about}") from error
        except (jenkins.JenkinsException, requests.RequestException) as error:
            status = _status(error)
            # a server that was restarted wants to hand out another one, and refuses the former
            client.crumb = None
            if former and status == requests.codes.forbidden:
                return self.ask(method, path, data=data, stream=stream)
            if status is None or status > requests.codes.server_error:
                raise AwayError(f"{about}: {_reason(error)}") from error
            why = f": is the account {self._user} right, and may it do this?" if status in (401, 403) else ""
            raise InfrastructureError(f"{about}: HTTP status {status}{why}") from error
        if method == "GET" and answer.is_redirect:
            raise InfrastructureError(
                f"{about}: redirects to {printable(answer.headers['Location'], 200)}: name that URL"
            )
        return answer

    def client(self) -> jenkins.Jenkins:
        """Return a client of the server, for this thread."""
        if not hasattr(self._clients, "client"):
            made = jenkins.Jenkins(self.url, self._user, self._token, timeout=SECONDS)
            # python-jenkins has no other way to these. A redirect leads to a page for persons, by the server's public name
            session = made._session
            session.get_redirect_target = lambda _: None
            session.trust_env = urlsplit(self.url).hostname not in web.LOOPBACK
            self._clients.client = made
        return self._clients.client

    def _parameters(self, job: str) -> tuple[Parameter, ...]:
        """Return the parameters that a job has on the server."""
        if job not in self._known:
            tree = "property[parameterDefinitions[name,type,defaultParameterValue[value]]]"
            said = self._patiently(lambda: self.ask_json(_job(job), tree))
            listed = [
                one for part in said.get("property") or () if part for one in part.get("parameterDefinitions", ())
            ]
            self._known[job] = tuple(
                Parameter(
                    one["name"],
                    _text((one.get("defaultParameterValue") or {}).get("value", "")),
                    "Boolean" in one["type"],
                )
                for one in listed
            )
        return self._known[job]

    def _submit(self, ref: BuildRef) -> None:
        """Put a request into the queue, unless it is there or has been already."""
        request = self._requests[ref.request]
        try:
            # a server resolves $NAME in a parameter by the build's other variables, secrets among them
            given = {name: value.replace("$", "$$") for name, value in request.values.items()}
            answer = self.ask("POST", f"{_job(ref.job)}/buildWithParameters", data=given)
        except AwayError:
            # the answer is lost; the request may be not
            if self._patiently(lambda: self._found(ref)):
                return
            raise
        except NotFoundError as error:
            # a server that is starting says so of anything, and later no more
            self.ask_json(_job(ref.job), "name")
            raise AwayError(str(error)) from error
        item = re.search(r"/queue/item/([0-9]+)/?$", answer.headers.get("Location", ""))
        request.item = int(item[1]) if item else None

    def _in_queue(self, ref: BuildRef) -> State:
        """Return where a request is: `queued`, `running` (it has a number) or `ABORTED` (taken out of the queue)."""
        if ref.request in self._numbers:
            return "running"
        request = self._requests.setdefault(ref.request, _Request({}))
        if request.cancelled:
            return "ABORTED"
        if request.item is not None:
            try:
                said = self.ask_json(f"queue/item/{request.item}", f"cancelled,executable[number],{_PARAMETERS}")
            except NotFoundError:
                said = {}
            if _parameters_of(said).get("CORRELATION") != ref.request:
                # long gone, or the server numbers its queue anew since it was restarted: it may be another's by now
                request.item = None
            else:
                if executable := said.get("executable"):
                    self._begun(ref.request, executable["number"])
                    return "running"
                request.cancelled = bool(said.get("cancelled"))
                return "ABORTED" if request.cancelled else "queued"
        if self._found(ref):
            request.missing = None
            return "running" if ref.request in self._numbers else "queued"
        request.missing = request.missing or time.monotonic()
        if time.monotonic() - request.missing > LEAVING:
            if request.unwanted:
                request.cancelled = True
                return "ABORTED"
            if not request.values:
                raise NotFoundError(f"{self.url} knows nothing of {ref}")
            log.warning("%s lost %s from its queue; it is asked again", self.url, ref)
            request.missing = None
            self._submit(ref)
        return "queued"

    def _found(self, ref: BuildRef) -> bool:
        """Look for a request by its correlation: first in the queue, then, where it would be next, among the builds."""
        for item in self._queue():
            if item["task"].get("name") == ref.job and _parameters_of(item).get("CORRELATION") == ref.request:
                self._requests.setdefault(ref.request, _Request({})).item = item["id"]
                return True
        for build in self.ask_json(_job(ref.job), f"builds[number,{_PARAMETERS}]").get("builds") or ():
            if _parameters_of(build).get("CORRELATION") == ref.request:
                self._begun(ref.request, build["number"])
                return True
        return False

    def _begun(self, request: str, number: int) -> None:
        """Note the number of a build; what was asked for is the server's affair now."""
        self._numbers[request] = number
        self._requests.pop(request, None)

    def _queue(self) -> list[dict[str, Any]]:
        return self.ask_json("queue", f"items[id,task[name],{_PARAMETERS}]").get("items") or []

    def _taken_out(self, ref: BuildRef) -> BuildRef:
        """Take a build out of the queue; return it with its number, if it has one: it may begin in this very moment."""
        until = time.monotonic() + LEAVING
        while not ref.number and (request := self._requests.get(ref.request)) and not request.cancelled:
            request.unwanted = True
            if request.item is not None:
                self._post(f"queue/cancelItem?id={request.item}")
            ref = self.numbered(ref)
            if time.monotonic() > until:
                # one that the server has forgotten: nobody asks for it again
                break
            if not (ref.number or request.cancelled):
                time.sleep(POLLS[0])
        return ref

    def _children(self, parent: BuildRef) -> Iterator[BuildRef]:
        """Yield the builds that a build has started and that have not ended."""
        for item in self._queue():
            values = _parameters_of(item)
            if values.get("PARENT") == str(parent):
                correlation = values["CORRELATION"]
                self._requests.setdefault(correlation, _Request({})).item = item["id"]
                yield BuildRef(item["task"]["name"], 0, correlation)
        for ref, values in self._executed():
            if values.get("PARENT") == str(parent):
                yield ref

    def _executed(self) -> Iterator[tuple[BuildRef, dict[str, str]]]:
        """Yield the builds that run, with their parameters."""
        said = self.ask_json("computer", f"computer[executors[currentExecutable[number,url,{_PARAMETERS}]]]")
        for computer in said.get("computer") or ():
            for executor in computer.get("executors") or ():
                build = executor.get("currentExecutable")
                job = re.search(r"/job/([^/]+)/[0-9]+/$", build.get("url", "")) if build else None
                if job:
                    yield BuildRef(unquote(job[1]), build["number"]), _parameters_of(build)

    def _look(self, ref: BuildRef, poll: _Poll) -> State | None:
        """Return where a build that is waited for is, None while the server is away, and say when to look again."""
        state = None
        try:
            state = self.state(ref)
            poll.away = None
        except AwayError as error:
            if poll.away is None:
                poll.away = time.monotonic()
                log.warning("%s; trying again for up to %d s", error, self.patience)
            if time.monotonic() - poll.away > self.patience:
                raise
        except NotFoundError as error:
            raise self._gone(ref) from error
        poll.due = time.monotonic() + _pause(poll.since)
        return state or "running"

    def _gone(self, ref: BuildRef) -> InfrastructureError:
        return InfrastructureError(f"{self.url} no longer knows {ref}: was it restarted?")

    def _fetch(self, ref: BuildRef, path: PurePosixPath, file: Path) -> None:
        """Copy one artifact to `file`."""
        try:
            with self.ask("GET", f"{_path(ref)}/artifact/{quote(str(path))}", stream=True) as answer:
                try:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with file.open("wb") as stream:
                        for piece in answer.iter_content(PIECE):
                            stream.write(piece)
                except requests.RequestException:
                    raise
                except OSError as error:
                    raise InfrastructureError(f"cannot write an artifact of {ref}: {file}: {error.strerror}") from error
        except NotFoundError as error:
            raise InfrastructureError(f"{self.url}: the artifact {path} of {ref} is not there") from error
        except requests.RequestException as error:
            raise AwayError(f"{self.url}: the artifact {path} of {ref}: {_reason(error)}") from error

    def _patiently(self, act: Callable[[], Answer]) -> Answer:
        """Do what needs the server, again for as long as it does not answer, up to the limit."""
        until = None
        while True:
            try:
                return act()
            except AwayError as error:
                if until is None:
                    until = time.monotonic() + self.patience
                    log.warning("%s; trying again for up to %d s", error, self.patience)
                if time.monotonic() > until:
                    raise
                time.sleep(RETRY)

    def _json(self, path: str, tree: str) -> dict[str, Any]:
        answer = self.ask("GET", f"{path}?tree={quote(tree, safe='[],')}")
        try:
            said = answer.json()
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise AwayError(f"{self.url}{path}: the answer is not Jenkins' JSON")
        return said

    def _post(self, path: str) -> None:
        """Ask for something that may be done already."""
        with suppress(NotFoundError):
            self.ask("POST", path)


def managed(description: str | None) -> bool:
    """Whether a job's description is one that this repository's templates and Jenkins Job Builder write."""
    text = (description or "").rstrip()
    return text.endswith(MAGIC_MANAGE_STRING.strip()) and any(line.startswith(TEMPLATE) for line in text.splitlines())


def _node(name: str) -> str:
    """Return the own label of a node; the server itself has a name for it only."""
    return name or "built-in"


def _job(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name):
        raise RequestError(f"there is no job {name!r}; `pkgci jobs list` shows all")
    return f"job/{quote(name)}"


def _path(ref: BuildRef) -> str:
    return f"{_job(ref.job)}/{ref.number}"


def _pause(since: float) -> float:
    """Return the seconds until a build is looked at again that one waits for since then."""
    return min(max((time.monotonic() - since) / 20, POLLS[0]), POLLS[1])


def _state(said: Mapping[str, Any]) -> State:
    """Return where a build is; one whose result a restart of the server has lost has failed."""
    return "running" if said.get("building") else _OUTCOMES.get(said.get("result") or "", "FAILURE")


def _text(value: object) -> str:
    """Return a parameter's value as a step sees it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parameters_of(said: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters in what the server says of a build or a queue's item."""
    actions = [action for action in said.get("actions") or () if action]
    parameters = [one for action in actions for one in action.get("parameters") or ()]
    return {one["name"]: _text(one.get("value", "")).replace("$$", "$") for one in parameters}


def _below(ref: BuildRef, path: str) -> PurePosixPath:
    """Return an artifact's path, below whatever it is put."""
    if not path.isprintable() or {"", ".", ".."} & set(path.split("/")):
        raise InfrastructureError(f"{ref}: {printable(path, 200)!r} is no path of an artifact")
    return PurePosixPath(path)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of python-jenkins stands for."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, requests.HTTPError) and inner.response is not None:
            return inner.response.status_code
        inner = inner.__context__
    return None


def _reason(error: BaseException) -> str:
    status = _status(error)
    return (
        f"HTTP status {status}"
        if status
        else str(error)
        if isinstance(error, InfrastructureError)
        else web.reason(error)
    )
