"""The job `republish`: publishes what is merged and not released, as a merge event would have.

It only starts and watches other jobs. What is on hold stays so, and is named.
"""

import logging

from pkgci.artifacts import Unpublished
from pkgci.change import Parameters
from pkgci.errors import InfrastructureError
from pkgci.step import StepContext

log = logging.getLogger(__name__)

AT_ONCE = 4


def republish(context: StepContext, parameters: Parameters) -> str:
    """Find what is not published, and have it published.

    Args:
        context: starts the jobs.
        parameters: the job's parameters: PACKAGE, ZUUL_PIPELINE.

    Returns:
        In one line what was done.

    Raises:
        PkgciError: what the comparison ended with; or the first publication that failed, after all the others.
        InfrastructureError: a package could not be compared; what was found of the others is published.
    """
    [compared] = context.run_together([("unpublished", {"PACKAGE": parameters.get("PACKAGE")})])
    found = Unpublished.read(compared / "unpublished.json")
    held = [f"{one.package} of {one.repository} is on hold: {one.hold}" for one in found.missing if one.hold]
    wanted = [one for one in found.missing if not one.hold]
    jobs = [
        (
            f"build-{one.target}",
            {
                "ZUUL_PROJECT": one.project,
                "ZUUL_REFNAME": one.branch,
                "ZUUL_NEWREV": one.commit,
                "ZUUL_PIPELINE": parameters.get("ZUUL_PIPELINE"),
            },
        )
        for one in wanted
    ]
    failed = [error for error in context.run_each(jobs, AT_ONCE) if error]
    for line in (*map(str, failed), *found.problems, *held):
        log.warning("%s", line)
    done = f"{len(wanted) - len(failed)} of {len(wanted)} missing builds published"
    notes = "; ".join([done, *held])
    if failed:
        raise type(failed[0])(f"{notes}; first failure: {failed[0]}")
    if found.problems:
        raise InfrastructureError(f"{notes}; {found.problems[0]}")
    return notes
