"""The command `pkgci`: one subcommand a job or user task, no logic.

Modules are imported by the subcommand that needs them, so that each starts fast.
"""

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import click

from pkgci.config import Config
from pkgci.errors import Exit, PkgciError
from pkgci.text import log_plainly, spelled_out


class Group(click.Group):
    """Maps expected errors to one line and their exit code. The groups among its commands are imported when asked for."""

    # each is in the module of its name
    groups = ("jobs", "mirror", "repo")

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names of the subcommands."""
        return sorted([*super().list_commands(context), *self.groups])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Return the subcommand of a name."""
        if name not in self.groups:
            return super().get_command(context, name)
        return getattr(importlib.import_module(f"pkgci.{name}"), name)

    def invoke(self, context: click.Context) -> object:
        """Run the subcommand."""
        with told():
            return super().invoke(context)


@contextmanager
def told() -> Iterator[None]:
    """Say an expected error in one line, and end this process with its exit code."""
    try:
        yield
    except PkgciError as error:
        click.echo(f"pkgci: {spelled_out(str(error))}", err=True)
        sys.exit(int(error.exit))
    except (click.exceptions.Exit, click.ClickException):
        raise
    except BrokenPipeError:
        # nobody reads on, as after `| head`, nor what is still to be written at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(int(Exit.ABORTED))
    except OSError as error:
        what = spelled_out(f"{error.filename or 'this machine'}: {error.strerror or error}")
        click.echo(f"pkgci: {what}", err=True)
        sys.exit(int(Exit.INFRASTRUCTURE))
    except (KeyboardInterrupt, click.Abort):
        click.echo("pkgci: aborted", err=True)
        sys.exit(int(Exit.ABORTED))
    except Exception:
        # a bug is nobody's package's fault
        traceback.print_exc()
        sys.exit(int(Exit.INFRASTRUCTURE))


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pkgci")
def main() -> None:
    """From a package change to tested packages in minutes.

    Exit codes: 0 passed; 1 the package is at fault; 2 the request is wrong; 3 the infrastructure is at fault; 143 aborted.
    """


def _console_log() -> None:
    """Show a person what takes long, as timestamped lines."""
    log_plainly(sys.stderr, "%(asctime)s %(message)s")


def _step(name: str, body: Callable, report: Callable | None = None) -> None:
    from pkgci import step

    sys.exit(step.run(name, body, report=report))


def _noted(record, summary: str) -> str:
    """Return what a test says at its end, also when it was not run."""
    return f"{summary}; {record.note}" if record.note else summary


@main.command()
@click.argument("target")
def build(target: str) -> None:
    """Job: take a change from its sources to a test repository and its tests."""
    from pkgci import report
    from pkgci.build import build as job
    from pkgci.change import Parameters

    def tell(artifacts: Path) -> None:
        try:
            report.write(artifacts)
        finally:
            if os.environ.get("ZUUL_NEWREV"):
                from pkgci import review

                review.tell(Config(), os.environ, artifacts)

    _step("build", lambda context: job(context, target, Parameters.read(os.environ)), tell)


@main.command("compile")
@click.argument("target")
def compile_(target: str) -> None:
    """Job: build the packages of a source tree, or take them from the store."""
    from pkgci.artifacts import ARTIFACTS
    from pkgci.change import Parameters
    from pkgci.compile import compile as job

    def body(context) -> str:
        made = job(context.config, target, Parameters.read(os.environ), ARTIFACTS, context.own)
        return f"{made.package} {made.version}: {len(made.packages)} packages ({made.origin})"

    _step("compile", body)


@main.command()
@click.argument("target")
def publish(target: str) -> None:
    """Job: publish a build to a test repository, or, after a merge, what a gate has tested to the released one."""
    from pkgci.artifacts import ARTIFACTS
    from pkgci.change import Parameters
    from pkgci.publish import go_on
    from pkgci.publish import publish as job
    from pkgci.released.merges import publish_tested

    def body(context) -> str:
        parameters = Parameters.read(os.environ)
        change = parameters.change(context.config)
        if parameters.merged and not parameters.get("BUILD_KEY"):
            said = publish_tested(context.config, target, change, ARTIFACTS).reason
        else:
            key, test = parameters.required("BUILD_KEY"), parameters.get("TEST_REPOSITORY") == "true"
            made = job(context.config, target, change, key, parameters.run_name(key), ARTIFACTS, test)
            said = f"{len(made.packages)} packages at {made.url}"
        go_on(context, parameters, ARTIFACTS)
        return said

    _step("publish", body)


@main.command()
def republish() -> None:
    """Job: publish what is merged and not released. PACKAGE in the environment names the only package to look at."""
    from pkgci.change import Parameters
    from pkgci.republish import republish as job

    _step("republish", lambda context: job(context, Parameters.read(os.environ)))


@main.command("retrigger-outstanding")
def retrigger_outstanding() -> None:
    """Job: have open reviews tested again that were tested before a merge. DRY_RUN=true in the environment only says which."""
    from pkgci.artifacts import ARTIFACTS
    from pkgci.change import EVERY, Parameters
    from pkgci.retrigger import retrigger as job
    from pkgci.retrigger import summary

    def body(context) -> str:
        return summary(job(context.config, Parameters.read(os.environ, EVERY), datetime.now(UTC), ARTIFACTS))

    _step("retrigger-outstanding", body)


@main.command("jobs-update")
@click.option(
    "--jobs", type=click.Path(path_type=Path, file_okay=False, exists=True), help="Instead of the installed ones."
)
@click.option("--dry-run", is_flag=True, help="Only show the differences.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def jobs_update(jobs: Path | None, dry_run: bool, yes: bool) -> None:
    """Load the job definitions into Jenkins. It shows the differences first, and asks.

    As a job it loads what is merged, and does not ask; DRY_RUN=true in the environment only shows the differences.
    """
    from pkgci.change import EVERY, Parameters
    from pkgci.config import ROOT
    from pkgci.jobsupdate import Update
    from pkgci.jobsupdate import update as job

    if os.environ.get("JOB_NAME"):

        def body(context) -> str:
            return job(context.config, Parameters.read(os.environ, EVERY).get("DRY_RUN") == "true")

        _step("jobs-update", body)
    found = Update(Config(), jobs or ROOT / "jobs")
    click.echo(found.shown(), nl=False)
    if found.differences and not dry_run:
        if not yes:
            click.confirm("Load this?", abort=True)
        click.echo(found.apply())


@main.command()
def unpublished() -> None:
    """Job: find the heads of branches that are not released. PACKAGE in the environment names the only one to look at."""
    from pkgci.artifacts import ARTIFACTS
    from pkgci.change import Parameters
    from pkgci.unpublished import unpublished as job

    _step("unpublished", lambda context: job(context.config, Parameters.read(os.environ).get("PACKAGE"), ARTIFACTS))


@main.command()
@click.argument("target")
def lint(target: str) -> None:
    """Job: lint the source and binary packages of a build."""
    from pkgci.artifacts import ARTIFACTS
    from pkgci.change import Parameters
    from pkgci.lint import lint as job
    from pkgci.lint import summary

    def body(context) -> str:
        parameters = Parameters.read(os.environ)
        change, key = parameters.change(context.config), parameters.required("BUILD_KEY")
        repositories = parameters.repositories(context.config)
        made = job(context.config, target, change, key, repositories, ARTIFACTS, parameters.repeat)
        return _noted(made, summary(made))

    _step("lint", body)


@main.command()
@click.argument("target")
def install(target: str) -> None:
    """Job: install, try and remove each package of a build in a plain machine."""
    from pkgci.artifacts import ARTIFACTS
    from pkgci.change import Parameters
    from pkgci.install import install as job

    def body(context) -> str:
        parameters = Parameters.read(os.environ)
        repositories = parameters.repositories(context.config)
        made = job(context.config, target, repositories, parameters.get("BUILD_KEY"), ARTIFACTS, parameters.repeat)
        upgraded = sum(bool(one.former_version and not one.notice) for one in made.packages)
        more = f", {upgraded} of them upgraded" if upgraded else ""
        return _noted(
            made, f"{sum(not one.former_version for one in made.packages)} packages installed and removed{more}"
        )

    _step("install", body)


@main.command()
@click.argument("target")
def systest(target: str) -> None:
    """Job: install the packages of a build in an environment and run scenarios."""
    from pkgci.artifacts import ARTIFACTS
    from pkgci.change import Parameters
    from pkgci.hold import held
    from pkgci.prepare import begun_where_outdated
    from pkgci.systest import summary
    from pkgci.systest import systest as job

    def body(context) -> str:
        parameters = Parameters.read(os.environ)
        with held(context, parameters), begun_where_outdated(context):
            made = job(context.config, target, parameters, ARTIFACTS, context.own)
        return _noted(made, summary(made))

    def tell(artifacts: Path) -> None:
        from pkgci import report

        report.write(artifacts)

    _step("systest", body, tell)


@main.command()
@click.argument("build_url", metavar="[BUILD_URL]", default="")
@click.option("--rebuild", is_flag=True, help="Where its snapshot is not here, make one from the configuration.")
def replicate(build_url: str, rebuild: bool) -> None:
    """Run a system test of another installation here once more, and say whether each test ends as it did there.

    BUILD_URL is the page of the build, of the one that started it, or of their artifacts. The exit code is 0 when the
    system test is reproduced, whether it passed or failed, and 1 when it is not. As a job it takes REPLICATE and
    REBUILD_SNAPSHOT from the environment.
    """
    from pkgci import engines, jobs
    from pkgci.artifacts import ARTIFACTS
    from pkgci.change import EVERY, Parameters
    from pkgci.replicate import replicate as job

    if not build_url and os.environ.get("JOB_NAME"):
        _step("replicate", lambda context: job(context, Parameters.read(os.environ, EVERY), ARTIFACTS))
    if not build_url:
        raise click.UsageError("Missing argument 'BUILD_URL'.")
    asked = {"REPLICATE": build_url, "REBUILD_SNAPSHOT": str(rebuild).lower()}
    # what is wrong is said before a build is made
    Parameters.read(asked, EVERY)
    engine = engines.current(Config())
    ref = jobs.begun(engine, jobs.run(engine, "replicate", asked))
    click.echo(str(ref))
    sys.exit(jobs.follow(engine, ref))


@main.command("mirror-sync")
@click.argument("form", metavar="FORMAT", type=click.Choice(["deb", "rpm"]))
def mirror_sync(form: str) -> None:
    """Job: bring the mirrors of released repositories to their current generations. RELEASE names one release only."""
    from pkgci.artifacts import ARTIFACTS
    from pkgci.change import EVERY, Parameters
    from pkgci.mirror import mirror_sync as job
    from pkgci.mirror import summary

    def body(context) -> str:
        parameters = Parameters.read(os.environ, EVERY)
        everything = parameters.get("EVERYTHING") == "true"
        return summary(job(context.config, form, parameters.get("RELEASE"), ARTIFACTS, everything=everything))

    _step("mirror-sync", body)


@main.command("repository-maintain")
def repository_maintain() -> None:
    """Job: sign released repositories anew where that is due, remove former generations, warn before the key expires."""
    from pkgci.artifacts import ARTIFACTS
    from pkgci.maintain import maintain as job
    from pkgci.maintain import sync_mirrors

    def body(context) -> str:
        try:
            return job(context.config, datetime.now(UTC), ARTIFACTS)
        finally:
            # what needs a person in one repository does not keep another's mirrors waiting
            sync_mirrors(context, ARTIFACTS)

    _step("repository-maintain", body)


@main.command()
@click.argument("target")
def order(target: str) -> None:
    """Job: say which builds a queue of changes asks for, and which of them come after which."""
    from pkgci.artifacts import ARTIFACTS
    from pkgci.change import Parameters
    from pkgci.order import order as job
    from pkgci.order import summary

    _step("order", lambda context: summary(job(context.config, target, Parameters.read(os.environ), ARTIFACTS)))


@main.command()
@click.argument("target")
def verify(target: str) -> None:
    """Job: try to publish builds, changing nothing, and write the record of a gate whose system tests passed."""
    from pkgci.artifacts import ARTIFACTS
    from pkgci.change import Parameters
    from pkgci.verify import summary
    from pkgci.verify import verify as job

    def body(context) -> str:
        return summary(job(context.config, target, Parameters.read(os.environ), context.engine, ARTIFACTS))

    _step("verify", body)


@main.command()
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path), default=".")
@click.option("--target", "targets", multiple=True, help="Only for this target; may be given several times.")
@click.option("--worktree", is_flag=True, help="Check uncommitted work too, not only what is committed.")
@click.option(
    "--only",
    default="",
    metavar="STEP,...",
    help="Only these steps, and what they need: compile, publish, lint, install, systest.",
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="NAME",
    help="Build with this build profile (RPM: --with NAME, and --without X for noX); may be given several times. "
    "The version then says `partial`; such a build is never released.",
)
@click.option("--nocheck", is_flag=True, help="Do not run the package's own tests: the build profile nocheck.")
@click.option(
    "--timeout",
    type=click.IntRange(1, 180),
    metavar="MINUTES",
    help="How long the build may take; by default what the configuration says of the package.",
)
@click.option(
    "--reproducible",
    is_flag=True,
    help="Build twice, on another day, with another umask and number of processors, and fail where bits differ.",
)
@click.option(
    "--again",
    is_flag=True,
    help="Run lint, install and system test also where they passed before with all the same input.",
)
def check(
    path: Path,
    targets: tuple[str, ...],
    worktree: bool,
    only: str,
    profiles: tuple[str, ...],
    nocheck: bool,
    timeout: int | None,
    reproducible: bool,
    again: bool,
) -> None:
    """Run the check pipeline for your own package: the git tree at PATH, with debian/ or rpm/*.spec.

    The change is HEAD against its upstream branch; without an upstream branch it is the whole tree. Of a build that fails
    the root is kept some days: see `pkgci shell`.
    """
    from rich.console import Console

    from pkgci import check as pipeline
    from pkgci.change import Parameters
    from pkgci.prepare import prepare as ready

    _console_log()
    config = Config()
    asked = pipeline.options(only, [*profiles, *(["nocheck"] if nocheck else [])], timeout, reproducible, again)
    steps = Parameters.read(asked).steps
    change = pipeline.prepare_change(config, path, worktree)
    chosen = pipeline.targets_of(config, change, targets)
    ready(config, chosen, steps)
    sys.exit(int(pipeline.check(config, change, chosen, asked, Console(highlight=False))))


@main.command()
@click.argument("what", nargs=-1, metavar="[PATH]...")
@click.option("--target", "targets", multiple=True, help="Only for this target; may be given several times.")
@click.option("--worktree", is_flag=True, help="Gate uncommitted work too, not only what is committed.")
def gate(what: tuple[str, ...], targets: tuple[str, ...], worktree: bool) -> None:
    """Run the gate pipeline for changes of several packages of your own, the git trees at PATHs, as if merged in that order.

    Each is built without tests, against those that it build-depends on; then all are tested together. The job itself is
    `pkgci gate TARGET`.
    """
    perhaps = len(what) == 1 and not targets and not Path(what[0]).is_dir()
    # an engine starts it for a target only; a person may have misspelt a path
    if perhaps and ("PKGCI_ENGINE" in os.environ or what[0] in Config().names("targets")):
        from pkgci import report
        from pkgci.change import Parameters
        from pkgci.gate import gate as job

        _step("gate", lambda context: job(context, what[0], Parameters.read(os.environ)), report.write)
    from rich.console import Console

    from pkgci import check as pipeline
    from pkgci.prepare import prepare as ready

    _console_log()
    config = Config()
    changes = [pipeline.prepare_change(config, Path(path), worktree) for path in what or (".",)]
    chosen = pipeline.gate_targets(config, changes, targets)
    pipeline.queue(changes)
    ready(config, chosen, ("compile", "systest"))
    sys.exit(int(pipeline.gate(config, changes, chosen, Console(highlight=False))))


@main.command()
@click.argument("build", default="")
@click.option("--root", is_flag=True, help="As the root of the sandbox, instead of the user that builds.")
def shell(build: str, root: bool) -> None:
    """Open a shell in the root of a failed local build, as the build left it.

    BUILD is JOB/NUMBER, a number, or a job, target or package, of which it is the latest; without it the latest of all. The
    shell is where the build was, with its variables, as its user and without network, and works on a copy.
    """
    from pkgci import engines
    from pkgci.shell import shell as session

    config = Config()
    session(config, engines.current(config), build, root)


@main.command()
@click.argument("build", default="")
@click.option("--machines", "name", default="machines", help="Which set of them: `machines`, or autopkgtest-SOURCE.")
@click.option("--at-start", is_flag=True, help="As they were before the packages were installed.")
def debug(build: str, name: str, at_start: bool) -> None:
    """Restore the machines of a system test as it left them, and say how to log in; they end with this command.

    BUILD is JOB/NUMBER, of the system test or of the build that started it, a number, or a job or target, of which it is the
    latest; without it the latest of all. What is done in the machines changes nothing of what is kept.
    """
    from pkgci.debug import debug as session

    _console_log()
    session(Config(), build, name, at_start)


@main.command("snapshot-prepare")
@click.argument("environment")
def snapshot_prepare(environment: str) -> None:
    """Job: make the snapshots of an environment, for all targets that use it, where they are missing, unfit or too old."""
    from pkgci import nodes
    from pkgci.change import EVERY, Parameters
    from pkgci.systest import prepare_environment

    def body(context) -> str:
        nodes.check(Parameters.read(os.environ, EVERY))
        return prepare_environment(context.config, environment)

    _step("snapshot-prepare", body)


@main.command("snapshot-clean")
@click.option("--yes", is_flag=True, help="Really remove; otherwise it only says what it would.")
def snapshot_clean(yes: bool) -> None:
    """Job: remove machines of system tests that are older than `run_days`, and snapshots that nothing needs any more."""
    from pkgci import nodes
    from pkgci.change import EVERY, Parameters
    from pkgci.runs import clean

    def body(context) -> str:
        parameters = Parameters.read(os.environ, EVERY)
        nodes.check(parameters)
        remove = yes or parameters.get("REMOVE") == "true"
        return clean(context.config, remove, datetime.now(UTC))

    _step("snapshot-clean", body)


@main.command("host-prepare")
def host_prepare() -> None:
    """Job: make this host ready for system tests; what only an administrator may do is said."""
    from pkgci import nodes
    from pkgci.change import EVERY, Parameters
    from pkgci.host import prepare as job

    def body(context) -> str:
        nodes.check(Parameters.read(os.environ, EVERY))
        return job(context.config)

    _step("host-prepare", body)


@main.command("debug-session")
def debug_session() -> None:
    """Job: the machines of a kept system test, for somebody who logs in from elsewhere: open, list, extend, close."""
    from pkgci.change import EVERY, Parameters
    from pkgci.debugsession import debug_session as job

    _step("debug-session", lambda context: job(context, Parameters.read(os.environ, EVERY)))


@main.command("on-each")
@click.argument("job")
def on_each(job: str) -> None:
    """Job: run JOB, which takes NODE, on each node of system tests."""
    from pkgci.change import COMMON, Parameters
    from pkgci.nodes import on_each as run_on_each

    def body(context) -> str:
        return run_on_each(context, job, Parameters.read(os.environ, {"REMOVE": COMMON["REMOVE"]}).values)

    _step("on-each", body)


@main.command("import")
@click.argument("package", type=click.Path(path_type=Path))
@click.argument("directory", type=click.Path(path_type=Path), required=False)
def import_(package: Path, directory: Path | None) -> None:
    """Make a git tree of fully unpacked source from a .dsc or .src.rpm file."""
    from pkgci.importer import import_package

    _console_log()
    click.echo(import_package(Config(), package, directory))


@main.command()
@click.argument("targets", nargs=-1)
def prepare(targets: tuple[str, ...]) -> None:
    """Make the build roots and machine snapshots of TARGETS (all by default) ahead."""
    from pkgci.prepare import prepare as ready

    _console_log()
    config = Config()
    ready(config, targets or config.names("targets"))


@main.command()
@click.option("--host", is_flag=True, help="What system tests need on this host, and what takes its disk.")
def doctor(host: bool) -> None:
    """Say what this machine lacks, and the command that mends it."""
    if host:
        from pkgci.host import examine, usage
    else:
        from pkgci.doctor import examine

    config = Config()
    findings = list(examine(config))
    for finding in findings:
        click.echo(finding.line())
    if host:
        click.echo(usage(config), nl=False)
    sys.exit(int(Exit.PASSED if all(finding.good for finding in findings) else Exit.INFRASTRUCTURE))


@main.command("build-host")
def build_host() -> None:
    """Answer an agent that came by ssh: the forced command of a build host's account, not for persons."""
    from pkgci.buildhost import serve as answer

    answer(Config(), sys.stdin.fileno(), sys.stdout.fileno())


@main.command("gearman-worker")
@click.option(
    "--server", default="127.0.0.1", show_default=True, help="The host of the Gearman server that Zuul 2 uses."
)
@click.option("--port", type=click.IntRange(1, 65535), default=4730, show_default=True)
@click.option(
    "--at-once",
    type=click.IntRange(1, 500),
    default=20,
    show_default=True,
    help="Builds that are started at once; the rest waits at the server, in Zuul's order.",
)
def gearman_worker(server: str, port: int, at_once: int) -> None:
    """Run jobs for Zuul 2 until SIGTERM; then finish those that run, and take no more."""
    from pkgci import engines
    from pkgci.config import ROOT
    from pkgci.engines.definitions import read_all, render
    from pkgci.engines.gearman import Worker

    _console_log()
    config = Config()
    definitions = read_all(render(ROOT / "jobs", config.cache / "jobs"))
    worker = Worker(config, engines.current(config), definitions, server, port, at_once)

    def finish(*_: object) -> None:
        worker.stopping = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, finish)
    worker.run()


@main.command()
def zuul() -> None:
    """Answer a playbook of Zuul: the forced command of the executor's key, not for persons."""
    from pkgci import engines
    from pkgci.zuul import answer

    config = Config()
    answer(config, engines.current(config), sys.stdin.buffer, sys.stdout.buffer, sys.stderr.buffer)


@main.command("zuul-tenants")
def zuul_tenants() -> None:
    """Write the configuration of Zuul's tenant: this repository, and the projects of packages that Gerrit has."""
    from pkgci.zuul import tenants

    click.echo(tenants(Config()), nl=False)


@main.command()
@click.argument("change")
def where(change: str) -> None:
    """Say where CHANGE is on its way: builds, released repositories, mirrors; and why it waits.

    CHANGE is NUMBER, NUMBER,PATCHSET, or the first digits of a source tree's id (as a local change is named) or of the
    commit that it was merged by.
    """
    from pkgci import engines
    from pkgci.where import where as ask

    config = Config()
    for line in ask(config, engines.current(config), change):
        click.echo(line)


@main.command()
def serve() -> None:
    """Serve the repositories on loopback until interrupted."""
    from pkgci.server import serve as serving

    config = Config()
    with serving(config):
        click.echo(f"serving {config.data / 'repositories'} at {config.settings.url}; Ctrl-C ends it")
        for lines in sorted((config.data / "repositories").glob("test/*/*/pkgci.*")):
            click.echo(f"  to use with {'apt' if lines.suffix == '.sources' else 'dnf'}: {lines}")
        try:
            signal.pause()
        except KeyboardInterrupt:
            return


@main.command()
@click.option("--yes", is_flag=True, help="Really remove; without it only say what would be removed.")
def clean(yes: bool) -> None:
    """Remove expired test repositories and roots of failed builds, builds that nothing refers to, and unused cache."""
    from pkgci.clean import clean as cleaning

    for line in cleaning(Config(), remove=yes, now=datetime.now(UTC)).lines():
        click.echo(line)
