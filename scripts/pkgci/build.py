"""The job `build`: takes a change from its sources to a test repository and its tests, by starting the other jobs.

It fetches and merges with git and runs no code of the change. What follows a failure is not started.

Of a merged change it has published what a gate has tested; only when there is nothing of that kind it is built again.
"""

import logging
from types import ModuleType

from pkgci import source
from pkgci.artifacts import ARTIFACTS, Build, ChangeSummary, ReleaseOutcome, Repository, Run
from pkgci.change import COMPILE, TESTS, Change, Parameters
from pkgci.config import Config, Target
from pkgci.formats import FORMATS
from pkgci.source import Sources
from pkgci.step import StepContext

log = logging.getLogger(__name__)

NO_COMMIT = "0" * 40


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
    target = config.target(target_name)
    change = parameters.change(config)
    parameters.repositories(config)
    _describe(context, target_name, parameters, change)
    if change.commit == NO_COMMIT:
        return f"nothing to build: branch {change.branch} of {change.project} is deleted"
    sources = source.fetch(config, change)
    nothing = _nothing_to_build(config, change, sources, target_name, target)
    if nothing:
        return f"nothing to build: {nothing}"
    assert sources is not None
    _describe(context, target_name, parameters, change, sources)
    for tree in {sources.source, sources.packaging}:
        source.refuse_unfit(config, tree, sources.entry, sources.package)

    given = {name: value for name, value in parameters.values.items() if name.startswith("ZUUL_")}
    untested = ""
    if parameters.merged:
        [looked] = context.run_together([(f"publish-{target_name}", given)])
        outcome = ReleaseOutcome.read(looked / "released.json")
        if outcome.result != "absent":
            return "; ".join([outcome.reason, *(f"not published with it: {line}" for line in outcome.left)])
        untested = f"NOT TESTED AS PUBLISHED: {outcome.reason}"
        log.warning("%s; it is built again", untested)
        _describe(context, target_name, parameters, change, sources, untested)
    repositories = parameters.get("REPOSITORIES")
    trees = {"SOURCE_TREE": sources.source.id, "PACKAGING_TREE": sources.packaging.id}
    run_tests = "true" if parameters.run_tests else "false"
    how = {name: parameters.get(name) for name in COMPILE}
    compiling = {**given, **trees, **how, "REPOSITORIES": repositories, "RUN_TESTS": run_tests}
    [compiled] = context.run_together([(f"compile-{target_name}", compiling)])
    made = Build.read(compiled / "build.json")
    given["BUILD_KEY"] = made.key
    names = ", ".join(sorted(package.name for package in made.packages if package.kind == "binary"))
    done = f"{made.package} {made.version}: {names}"
    testing = given
    if "publish" in parameters.steps:
        [published] = context.run_together([(f"publish-{target_name}", given)])
        repository = Repository.read(published / "repository.json")
        done = f"{done}: {repository.url}"
        testing = {**given, "REPOSITORIES": " ".join([f"{repository.url}repository.json", *repositories.split()])}
    tests = [(step, given if step == "lint" else testing) for step in parameters.steps if step in TESTS]
    context.run_together([(f"{step}-{target_name}", those) for step, those in tests])
    return f"{done}; {untested}" if untested else done


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


def _nothing_to_build(
    config: Config, change: Change, sources: Sources | None, target_name: str, target: Target
) -> str | None:
    """Return why the change has nothing to build for this target, in one line, or None."""
    if sources is None:
        return f"no release claims branch {change.branch}"
    release = config.release_of(change.branch)
    if release and target_name not in release[1].targets:
        return f"release {release[0]} is not built for {target_name}"
    format: ModuleType = FORMATS[target.format]
    if not format.packaged(sources.packaging, sources.package):
        return f"{sources.packaging.project} has no packaging for {target_name} ({format.PACKAGING})"
    return None
