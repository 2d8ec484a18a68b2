"""DEBUG_HOLD: machines of system tests that failed run on for a while, in a session of the job `debug-session`.

They are kept in any case; the session only restores them. So whoever waits for the test's result does not wait for it. Who
started the test starts the session: the account of a host that runs system tests may start nothing.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pkgci import nodes
from pkgci.change import Parameters
from pkgci.engines.base import BuildRef
from pkgci.errors import InfrastructureError, PackageError, PkgciError
from pkgci.step import StepContext

log = logging.getLogger(__name__)


@contextmanager
def held_children(context: StepContext, parameters: Parameters) -> Iterator[None]:
    """Let machines run on of the system tests among a step's children that failed, if DEBUG_HOLD says so."""
    try:
        yield
    except (PackageError, InfrastructureError):
        for child in context.children:
            if child.job.startswith("systest-") and child.result == "FAILURE":
                _hold(context, parameters, BuildRef(child.job, child.number))
        raise


@contextmanager
def held(context: StepContext, parameters: Parameters) -> Iterator[None]:
    """Do so for this step, a system test, if a person started it."""
    try:
        yield
    except (PackageError, InfrastructureError):
        if context.own and not parameters.get("PARENT"):
            _hold(context, parameters, context.own, nodes.here())
        raise


def _hold(context: StepContext, parameters: Parameters, test: BuildRef, node: str = "") -> None:
    wanted = parameters.get("DEBUG_HOLD")
    if not wanted:
        return
    try:
        given = {"NODE": node or context.engine.record(test).node, "BUILD": str(test), "DEBUG_HOLD": wanted}
        session = context.launch("debug-session", {**given, "ACTION": "open"})
    except PkgciError as error:
        log.warning("the machines of %s do not run on: %s", test, error)
        return
    log.info("%s failed, that is its result; its machines run on for %s in %s", test, wanted, session)
    log.info("its log says how to log in; a key of yours is let in by")
    log.info("  pkgci jobs run debug-session NODE=%s ACTION=extend BUILD=%s PUBLIC_KEY='...'", given["NODE"], test)
