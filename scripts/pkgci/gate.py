"""The job `gate`: builds what a queue of approved changes touches, tries to publish it, and tests all of it together.

It only starts and watches other jobs: `order` says what is to be built and what after what, a `build` of each package and
branch makes it without tests, then `systest` has all their repositories at once, while `verify` publishes dry. What passes is
recorded, so that exactly that is published once the changes are merged.
"""

from collections.abc import Mapping
from pathlib import Path

from pkgci import hold, repository
from pkgci.artifacts import (
    ARTIFACTS,
    Build,
    ChangeSummary,
    Child,
    Gate,
    GateBuild,
    Order,
    OrderedBuild,
    Repository,
    Result,
    Run,
    Verified,
)
from pkgci.change import Parameters, local_changes
from pkgci.step import StepContext
from pkgci.text import listed


def gate(context: StepContext, target_name: str, parameters: Parameters) -> str:
    """Gate the changes of a queue; write `gate.json`.

    Args:
        context: gives the configuration and starts the jobs.
        target_name: the target.
        parameters: the job's parameters; ZUUL_CHANGES is the queue, oldest change first.

    Returns:
        In one line what passed, or why there is nothing to build.

    Raises:
        PkgciError: what a job ended with, naming the job.
    """
    config = context.config
    # what is wrong in parameters or configuration is found before anything runs
    config.targets()
    change = parameters.change(config)
    Run(
        job=context.own.job if context.own else f"gate-{target_name}",
        number=context.own.number if context.own else None,
        target=target_name,
        notice=config.target(target_name).notice,
        change=ChangeSummary(id=change.id(""), project=change.project, branch=change.branch, pipeline=change.pipeline),
        parameters={name: value for name, value in parameters.values.items() if name not in ("PARENT", "CORRELATION")},
    ).write(ARTIFACTS / "run.json")
    unrecorded = ""
    try:
        with hold.held_children(context, parameters):
            unrecorded = _run(context, target_name, parameters)
    finally:
        # so that it is known how each ended
        context.abort_children()
        made = _made(context, target_name, parameters)
        made.write(ARTIFACTS / "gate.json")
    return "; ".join(filter(None, [_verdict(made), unrecorded]))


def _run(context: StepContext, target_name: str, parameters: Parameters) -> str:
    """Run the jobs of a gate; return why what passed is not recorded, or nothing."""
    config, zuul = context.config, parameters.zuul
    [ordered] = context.run_together([(f"order-{target_name}", zuul)])
    order = Order.read(ordered / "order.json")
    parts = {(part.get("ZUUL_PROJECT"), part.get("ZUUL_BRANCH")): part.zuul for part in parameters.queued(config)}
    change = parameters.change(config)
    # the changes ahead have gates of their own
    if not any((one.project, one.branch) == (change.project, change.branch) for one in order.builds):
        return ""
    own = [parts[build.project, build.branch] for build in order.builds]

    def build(number: int, done: Mapping[int, Path]) -> tuple[str, dict[str, str]]:
        against = [done[other] for other in order.needed(number)]
        how = {"RUN_TESTS": "false", "TEST_REPOSITORY": "true", "REPOSITORIES": _urls(target_name, against)}
        return f"build-{target_name}", {**own[number], **how}

    left = context.run_ordered({number: one.after for number, one in enumerate(order.builds)}, build)
    built = [left[number] for number in range(len(order.builds))]
    together = []
    # packages of several releases are not installed together
    for release in dict.fromkeys(one.release for one in order.builds):
        numbers = [number for number, one in enumerate(order.builds) if one.release == release]
        urls = [
            _urls(target_name, [built[number] for number in numbers]),
            *repository.of_release(config, target_name, release),
        ]
        testing = {"REPOSITORIES": " ".join(urls), "DEBUG_HOLD": parameters.get("DEBUG_HOLD")}
        together.append((f"systest-{target_name}", {**own[numbers[-1]], **testing}))
    claimed = [directory for directory, one in zip(built, order.builds, strict=True) if one.release]
    verifying = {**zuul, "BUILD_KEYS": " ".join(_left(target_name, directory)[0].key for directory in claimed)}
    if config.settings.released is None or not claimed:
        context.run_together(together)
        return ""
    context.run_together([*together, (f"verify-{target_name}", verifying)])
    if change.url == local_changes(config):
        return "not recorded, since nobody merges a local change by what is tested here"
    if not parameters.approved(config) or "ZUUL_CHANGES" not in zuul:
        return f"not recorded, since this is none of the pipelines {', '.join(config.settings.gate_pipelines)}"
    tests = [f"{one.job}/{one.number}" for one in context.children if one.job == f"systest-{target_name}"]
    context.run_together([(f"verify-{target_name}", {**verifying, "SYSTEM_TESTS": " ".join(tests)})])
    return ""


def _left(target_name: str, directory: Path) -> tuple[Build, Repository]:
    """Return what a build of the job `build` made, from the directory with what it left."""
    children = {child.job: directory / child.directory for child in Result.read(directory / "result.json").children}
    made = Build.read(children[f"compile-{target_name}"] / "build.json")
    return made, Repository.read(children[f"publish-{target_name}"] / "repository.json")


def _urls(target_name: str, directories: list[Path]) -> str:
    """Return the repositories of builds in the form of REPOSITORIES."""
    return " ".join(f"{_left(target_name, directory)[1].url}repository.json" for directory in directories)


def _made(context: StepContext, target_name: str, parameters: Parameters) -> Gate:
    """Return what came of a gate, by its children."""
    children: dict[str, list[Child]] = {}
    for child in context.children:
        children.setdefault(child.job.removesuffix(f"-{target_name}"), []).append(child)
    ordered = [
        ARTIFACTS / child.directory / "order.json" for child in children.get("order", ()) if child.result == "SUCCESS"
    ]
    order = Order.read(ordered[0]) if ordered else Order(target=target_name, builds=())
    verified = [
        Verified.read(ARTIFACTS / child.directory / "verified.json")
        for child in children.get("verify", ())
        if child.result == "SUCCESS"
    ]
    results = [child.result for child in children.get("systest", ())]
    failed = [result for result in ("FAILURE", "ABORTED") if result in results]
    return Gate(
        target=target_name,
        changes=tuple(filter(None, parameters.get("ZUUL_CHANGES").split("^"))),
        builds=tuple(_gate_build(target_name, order, one, children.get("build", [])) for one in order.builds),
        skipped=order.skipped,
        dependants=verified[-1].dependants if verified else (),
        systest=failed[0] if failed else "SUCCESS" if results else "",
        recorded=any(one.recorded for one in verified),
    )


def _gate_build(target_name: str, order: Order, one: OrderedBuild, children: list[Child]) -> GateBuild:
    """Return what came of a build of the order."""

    def is_its(child: Child) -> bool:
        return (child.parameters.get("ZUUL_PROJECT"), child.parameters.get("ZUUL_BRANCH")) == (one.project, one.branch)

    build = GateBuild(
        project=one.project,
        branch=one.branch,
        change=one.source_tree[:8],
        package=one.package,
        release=one.release,
        after=tuple(order.builds[number].package for number in one.after),
    )
    child = next(filter(is_its, children), None)
    if child is None:
        return build
    number, patch_set = child.parameters.get("ZUUL_CHANGE"), child.parameters.get("ZUUL_PATCHSET")
    known: dict[str, object] = {"result": child.result, "directory": child.directory}
    if number:
        known["change"] = f"{number},{patch_set}"
    if child.result == "SUCCESS":
        made, published = _left(target_name, ARTIFACTS / child.directory)
        known |= {"version": made.version, "key": made.key, "origin": made.origin, "repository": published.url}
    return build.model_copy(update=known)


def _verdict(made: Gate) -> str:
    """Return in one line what passed."""
    if not any(one.result for one in made.builds):
        return f"nothing to build: {made.skipped[-1].reason}"
    said = [f"{listed(f'{one.package} {one.version}' for one in made.builds)} built and tested together"]
    if made.dependants:
        named = listed(f"{one.package} ({one.repository})" for one in made.dependants)
        said.append(f"build-depend on what changes, and are not built anew: {named}")
    return "; ".join([*said, *(["recorded for publication"] if made.recorded else [])])
