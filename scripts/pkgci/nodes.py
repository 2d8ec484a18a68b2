"""The nodes that jobs concern which take one: whether a build is on the one that was asked for, and a build on each.

On a server, the parameter NODE itself leads a build to its node. It is a label: a node's own one, its name, or, as it is by
default, that of all nodes which run system tests.
"""

import logging
import os
import socket
import time
from collections.abc import Mapping

from pkgci.artifacts import ARTIFACTS, Result
from pkgci.change import Parameters
from pkgci.engines.base import BuildInfo, BuildRef, Engine
from pkgci.errors import InfrastructureError, PkgciError, RequestError
from pkgci.step import StepContext

log = logging.getLogger(__name__)

LABEL = "systest"
# builds before one's own that are looked at: the one before leaves its work to an older one itself
BEFORE = 5
# between two looks at what waits in the queue
LOOK_SECONDS = 60


def here() -> str:
    """Return the name of the node that this is, for the parameter NODE."""
    return os.environ.get("NODE_NAME") or socket.gethostname()


def check(parameters: Parameters) -> None:
    """Check that a build is on the node that NODE names; nobody moves it from here.

    Raises:
        RequestError: it is not.
    """
    wanted = parameters.get("NODE")
    if wanted not in ("", LABEL, here()):
        raise RequestError(f"parameter NODE: this is {here()}, not {wanted}; nothing is done here")


def on_each(context: StepContext, job: str, given: Mapping[str, str]) -> str:
    """Run a job on each node of system tests, all at once, whatever becomes of the others.

    Args:
        context: starts the builds.
        job: the job's name.
        given: its parameters, without NODE.

    Returns:
        In one line what was done; or that a build before this one is still at it: a timer must not fill the queue.

    Raises:
        PkgciError: what the first that failed ended with.
        InfrastructureError: a node is away, or there is none.
    """
    former = _under_way(context)
    if former:
        return f"left to {former}, which has not ended"
    nodes = context.engine.nodes(LABEL)
    if not nodes:
        raise InfrastructureError(f"no node has the label {LABEL}")
    there = [node for node, online in sorted(nodes.items()) if online]
    ended: dict[str, PkgciError | None] = dict.fromkeys(nodes)
    ended |= {
        node: InfrastructureError(f"{node} is away; {job} was not started there") for node in nodes.keys() - there
    }
    jobs = [(job, {**given, "NODE": node}) for node in there]
    ended |= zip(there, context.run_each(jobs, len(there), _Lost(context.engine)), strict=True)
    said = {
        child.parameters["NODE"]: Result.read(ARTIFACTS / child.directory / "result.json").reason
        for child in context.children
        if ended[child.parameters["NODE"]] is None
    }
    for node in sorted(nodes):
        log.info("%s: %s", node, ended[node] or said[node])
    failed = [ended[node] for node in sorted(nodes) if ended[node]]
    if failed:
        raise type(failed[0])(f"{job} failed on {len(failed)} of {len(nodes)} nodes; first: {failed[0]}")
    return f"{job} passed on {', '.join(sorted(nodes))}"


class _Lost:
    """Says of a build in the queue that its node has gone away: as long as it waited, all that come after it would wait too."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._due: dict[BuildRef, float] = {}

    def __call__(self, ref: BuildRef, given: Mapping[str, str]) -> str:
        now = time.monotonic()
        if now < self._due.setdefault(ref, now + LOOK_SECONDS):
            return ""
        self._due[ref] = now + LOOK_SECONDS
        if self._engine.state(ref) != "queued" or self._engine.nodes(LABEL).get(given["NODE"]):
            return ""
        return f"{given['NODE']} went away before {ref} began"


def _under_way(context: StepContext) -> BuildRef | None:
    """Return a build of this very job, before this one and with the same parameters, that has not ended."""
    if context.own is None:
        return None
    wanted = _asked(context.engine.record(context.own))
    before = [ref for ref in context.engine.builds(context.own.job) if ref.number < context.own.number][-BEFORE:]
    records = [(ref, context.engine.record(ref)) for ref in before]
    return next((ref for ref, record in records if record.alive and _asked(record) == wanted), None)


def _asked(record: BuildInfo) -> dict[str, str]:
    return {name: value for name, value in record.parameters.items() if name not in ("PARENT", "CORRELATION")}
