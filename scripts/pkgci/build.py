"""The job `build`: takes a change from its sources to a test repository and its tests, by starting the other jobs.

It fetches and merges with git and runs no code of the change. What follows a failure is not started. Packages of changes
ahead of this one in the queue are built before, and this one against them.

Of a merged change it has published what a gate has tested; only when there is nothing of that kind it is built again.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pkgci import hold, repository, source
from pkgci.artifacts import ARTIFACTS, Build, ChangeSummary, Order, OrderedBuild, ReleaseOutcome, Repository, Run
from pkgci.change import COMPILE, NO_COMMIT, TESTS, Change, Parameters, release_name
from pkgci.formats import nothing_to_build
from pkgci.source import Sources
from pkgci.step import StepContext

log = logging.getLogger(__name__)


def build(context: StepContext, target_name: str, parameters: Parameters) -> str:
    """Run the jobs that a change goes through, in their order.

    Args:
        context: gives the configuration and starts the jobs.
        target_name: the target.
        parameters: the job's parameters.

    Returns:
        In one line what was done, or why there is nothing to build.

    Raises:
        PkgciError: what a job ended with, naming the job.
    """
    config = context.config
    # all of them: two that both build what is architecture-independent would meet in the repository
    config.targets()
    config.target(target_name)
    change = parameters.change(config)
    parameters.repositories(config)
    _describe(context, target_name, parameters, change)
    if change.commit == NO_COMMIT:
        return f"nothing to build: branch {change.branch} of {change.project} is deleted"
    sources = source.fetch(config, change)
    nothing = nothing_to_build(config, change, sources, target_name)
    if nothing:
        return f"nothing to build: {nothing}"
    assert sources is not None
    _describe(context, target_name, parameters, change, sources)
    for tree in {sources.source, sources.packaging}:
        source.refuse_unfit(config, tree, sources.entry, sources.package)

    untested = ""
    if parameters.merged:
        [looked] = context.run_together([(f"publish-{target_name}", parameters.zuul)])
        outcome = ReleaseOutcome.read(looked / "released.json")
        if outcome.result != "absent":
            return "; ".join([outcome.reason, *(f"not published with it: {line}" for line in outcome.left)])
        untested = f"NOT TESTED AS PUBLISHED: {outcome.reason}"
        log.warning("%s; it is built again", untested)
        _describe(context, target_name, parameters, change, sources, untested)
    order = _order(context, target_name, parameters, sources)
    parts = {(one.change(config).project, one.change(config).branch): one for one in parameters.queued(config)}
    released = {one: repository.of_release(config, target_name, one) for one in {one.release for one in order.builds}}
    jobs = _Jobs(target_name, parameters, [parts[one.project, one.branch] for one in order.builds], order, released)
    left = context.run_ordered(jobs.after(), jobs.job)
    made = Build.read(left["compile", jobs.own] / "build.json")
    names = ", ".join(sorted(package.name for package in made.packages if package.kind == "binary"))
    done = f"{made.package} {made.version}: {names}"
    given = testing = {**parameters.queued(config)[-1].zuul, "BUILD_KEY": made.key}
    if "publish" in parameters.steps:
        done = f"{done}: {_published(left, jobs.own)}"
        testing = {**given, "REPOSITORIES": jobs.repositories(left, jobs.own, [jobs.own, *jobs.beside])}
    again = {"AGAIN": parameters.get("AGAIN")}
    linting = {**given, "REPOSITORIES": " ".join(released[order.builds[jobs.own].release])}
    special = {"lint": linting, "systest": testing | {"DEBUG_HOLD": parameters.get("DEBUG_HOLD")}}
    asked = [(step, special.get(step, testing) | again) for step in parameters.steps if step in TESTS]
    tests = [(f"{step}-{target_name}", those) for step, those in asked]
    # a merged change is published for good; who asks for some steps only does not ask for this one
    if config.settings.released and parameters.run_tests and not parameters.get("ONLY"):
        keys = [Build.read(left["compile", number] / "build.json").key for number in range(len(order.builds))]
        claimed = [key for key, one in zip(keys, order.builds, strict=True) if one.release]
        verifying = {**parameters.zuul, "BUILD_KEYS": " ".join(claimed)}
        tests += [(f"verify-{target_name}", verifying)] if order.builds[jobs.own].release else []
    with hold.held_children(context, parameters):
        context.run_together(tests)
    return f"{done}; {untested}" if untested else done


def _order(context: StepContext, target_name: str, parameters: Parameters, sources: Sources) -> Order:
    """Return the builds of the queue, this change's own last; it comes after all others but those that need it."""
    if len(parameters.queued(context.config)) == 1:
        change = parameters.change(context.config)
        own = OrderedBuild(
            project=change.project,
            branch=change.branch,
            package=sources.package,
            release=release_name(context.config, change),
            source_tree=sources.source.id,
            packaging_tree=sources.packaging.id,
        )
        return Order(target=target_name, builds=(own,))
    [ordered] = context.run_together([(f"order-{target_name}", parameters.zuul)])
    order = Order.read(ordered / "order.json")
    last, own = len(order.builds) - 1, order.builds[-1]
    before = (number for number in range(last) if last not in order.needed(number))
    after = tuple(number for number in before if order.builds[number].release == own.release)
    return order.model_copy(update={"builds": (*order.builds[:-1], own.model_copy(update={"after": after}))})


@dataclass(frozen=True)
class _Jobs:
    """The jobs `compile` and `publish` of a queue's builds, by their step and the position of the build.

    `parts` are the parameters that say what each build is of; `released` are the repositories of each release.
    """

    target: str
    parameters: Parameters
    parts: Sequence[Parameters]
    order: Order
    released: Mapping[str, Sequence[str]]

    @property
    def own(self) -> int:
        """The position of this change's own build."""
        return len(self.order.builds) - 1

    @property
    def beside(self) -> list[int]:
        """The positions of the other builds of its release."""
        release = self.order.builds[self.own].release
        return [number for number in range(self.own) if self.order.builds[number].release == release]

    def after(self) -> dict[tuple[str, int], list[tuple[str, int]]]:
        """Return for each job those that it comes after. Others are published to be built against."""
        found: dict[tuple[str, int], list[tuple[str, int]]] = {}
        for number, one in enumerate(self.order.builds):
            found["compile", number] = [("publish", other) for other in one.after]
            if number != self.own or "publish" in self.parameters.steps:
                found["publish", number] = [("compile", number)]
        return found

    def job(self, key: tuple[str, int], done: Mapping[tuple[str, int], Path]) -> tuple[str, dict[str, str]]:
        """Return the name of a job and its parameters."""
        step, number = key
        build, given = self.order.builds[number], self.parts[number].zuul
        if step == "publish":
            key_of = Build.read(done["compile", number] / "build.json").key
            test = self.parameters.get("TEST_REPOSITORY") if number == self.own else "true"
            return f"publish-{self.target}", {**given, "BUILD_KEY": key_of, "TEST_REPOSITORY": test}
        run_tests = "true" if self.parameters.run_tests else "false"
        trees = {"SOURCE_TREE": build.source_tree, "PACKAGING_TREE": build.packaging_tree, "RUN_TESTS": run_tests}
        how = {name: self.parameters.get(name) for name in COMPILE} if number == self.own else {}
        repositories = self.repositories(done, number, self.order.needed(number))
        return f"compile-{self.target}", {**given, **trees, **how, "REPOSITORIES": repositories}

    def repositories(self, done: Mapping[tuple[str, int], Path], number: int, numbers: Sequence[int]) -> str:
        """Return the repositories of builds, those that are given, and that of a build's release, as of REPOSITORIES."""
        made = [f"{_published(done, other)}repository.json" for other in numbers]
        beside = [*self.parameters.get("REPOSITORIES").split(), *self.released[self.order.builds[number].release]]
        return " ".join(dict.fromkeys([*made, *beside]))


def _published(done: Mapping[tuple[str, int], Path], number: int) -> str:
    """Return the URL of a build's repository."""
    return Repository.read(done["publish", number] / "repository.json").url


def _describe(
    context: StepContext,
    target_name: str,
    parameters: Parameters,
    change: Change,
    sources: Sources | None = None,
    untested: str = "",
) -> None:
    """Write `run.json`, for whoever reads the artifacts however the build ends: each time that more is known."""
    digest, subject = (sources.digest, sources.source.subject) if sources else ("", "")
    Run(
        job=context.own.job if context.own else f"build-{target_name}",
        number=context.own.number if context.own else None,
        target=target_name,
        notice=context.config.target(target_name).notice,
        change=ChangeSummary(
            id=change.id(digest),
            project=change.project,
            branch=change.branch,
            pipeline=change.pipeline,
            subject=subject,
        ),
        package=sources.package if sources else "",
        source_tree=sources.source.id if sources else "",
        packaging_tree=sources.packaging.id if sources else "",
        untested=untested,
        parameters={name: value for name, value in parameters.values.items() if name not in ("PARENT", "CORRELATION")},
    ).write(ARTIFACTS / "run.json")
