"""`pkgci check` and `pkgci gate`: the pipelines for a maintainer's own trees, by the same jobs, on this machine.

A change becomes a commit in a repository of the state directory; the tree itself is only read.
"""

import logging
import os
import re
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pkgci import failed, report, runs, source
from pkgci.change import BRANCH, PROJECT, STEPS, local_changes
from pkgci.command import run
from pkgci.config import EMBEDDED, PROFILE, Config, PackageEntry
from pkgci.engines.base import BuildInfo, BuildRef
from pkgci.engines.local import LocalEngine
from pkgci.errors import Exit, InfrastructureError, RequestError
from pkgci.formats import FORMATS
from pkgci.jobs import exit_of
from pkgci.source import Tree, git
from pkgci.text import spelled_out

log = logging.getLogger(__name__)

POLL = 0.3
SILENCE = 30  # seconds after which a plain log says what still runs
COLOURS = {"SUCCESS": "green", "FAILURE": "red", "ABORTED": "yellow", "running": "cyan"}


@dataclass(frozen=True)
class LocalChange:
    """A maintainer's change as the jobs take it: the parameters that name it, and the tree for people."""

    parameters: dict[str, str]
    tree: Tree
    package: str


@dataclass(frozen=True)
class Row:
    """One job of a run, for people; `about` is its project, where a run has several."""

    ref: BuildRef
    state: str
    seconds: float
    about: str


def prepare_change(config: Config, path: Path, worktree: bool) -> LocalChange:
    """Make a commit of what is to be checked, in a repository of the state directory.

    Args:
        config: the configuration.
        path: a directory in a git working tree.
        worktree: include uncommitted work, also files that git does not track yet.

    Raises:
        RequestError: it is no git tree, a shallow clone, or holds no change against its upstream branch.
        PackageError: it does not merge with its upstream branch, or holds what no source tree may.
    """
    if not path.is_dir():
        raise RequestError(f"there is no directory {path}")
    top = _ask(path, "rev-parse", "--show-toplevel")
    if top is None:
        raise RequestError(f"{path} is not in a git working tree; `git init` it, or `pkgci import` a source package")
    tree = Path(top)
    if _ask(tree, "rev-parse", "--is-shallow-repository") == "true":
        raise RequestError(
            f"{tree} is a shallow clone; a version is counted from the whole history: `git fetch --unshallow`"
        )
    if _ask(tree, "rev-parse", "--verify", "-q", "HEAD") is None:
        raise RequestError(f"{tree} has no commit yet; commit something first")
    if _ask(tree, "rev-parse", "--show-object-format") != "sha1":
        raise RequestError(f"{tree} names its objects by another hash than SHA-1, which the jobs do not take")
    project = _project(config, tree)
    own = _ask(tree, "symbolic-ref", "--short", "-q", "HEAD")
    branch = own or "main"
    upstream = _ask(tree, "rev-parse", "--symbolic-full-name", "-q", "@{upstream}")
    if upstream:
        branch = re.sub(r"^refs/(heads|remotes/[^/]+)/", "", upstream)
    elif own and (gone := _ask(tree, "for-each-ref", "--format=%(upstream)", f"refs/heads/{own}")):
        log.info("%s: the upstream branch %s is not there (any more): the change is the whole tree", tree, gone)
    if not re.fullmatch(BRANCH, branch):
        raise RequestError(f"{tree}: branch {branch!r} has a name that the jobs do not take; rename it")
    repository = source.init(config.state / "changes" / f"{project}.git")
    commit = _take(repository, tree, "HEAD")
    if worktree:
        commit = _commit_worktree(repository, tree, commit)
    base = ""
    if upstream:
        base = _take(repository, tree, upstream)
        if git(repository, "merge-base", "--is-ancestor", commit, base, check=False).returncode == 0:
            raise RequestError(
                f"{tree}: nothing to check: HEAD has nothing that its upstream {upstream} has not; "
                "commit a change, or check uncommitted work with --worktree"
            )
        commit = source.merge(repository, base, commit, f"HEAD into {branch} of {project}")
    refs = f"{source.LOCAL_REFS}{commit}-{base[:12] or 'new'}"
    if base:
        git(repository, "update-ref", f"{refs}/base", base)
    git(repository, "update-ref", f"{refs}/change", commit)
    made = source.tree(repository, project, commit)
    parameters = {"ZUUL_PROJECT": project, "ZUUL_BRANCH": branch, "ZUUL_PIPELINE": "check"}
    parameters["ZUUL_REF"] = f"{refs}/change"
    parameters |= {"ZUUL_URL": local_changes(config), "ZUUL_UUID": uuid.uuid4().hex}
    known = config.package_of(project)
    package = known or PurePosixPath(project).name.lower()
    # the jobs refuse it too; here it costs a moment, and no preparation
    source.refuse_unfit(config, made, config.package(known) if known else PackageEntry(source=project), package)
    return LocalChange(parameters, made, package)


def targets_of(config: Config, change: LocalChange, wanted: Sequence[str]) -> list[str]:
    """Return the targets to check: those wanted, or all of the release that the tree's packaging serves.

    Raises:
        RequestError: there are none.
    """
    served = _served(config, change)
    for name in wanted:
        config.target(name)
        if name not in served:
            raise RequestError(
                f"{change.tree.project} has nothing to build for {name}; it serves: {', '.join(served) or 'none'}"
            )
    if not served:
        needs = " or ".join(sorted({FORMATS[config.target(name).format].PACKAGING for name in _known(config, change)}))
        raise RequestError(f"{change.tree.project} has nothing to build: no {needs}")
    return list(dict.fromkeys(wanted)) or served


def gate_targets(config: Config, changes: Sequence[LocalChange], wanted: Sequence[str]) -> list[str]:
    """Return the targets to gate changes for: of those wanted, or of all, those that a tree has something to build for.

    Raises:
        RequestError: there are none.
    """
    for name in wanted:
        config.target(name)
    found = dict.fromkeys(name for change in changes for name in _served(config, change))
    chosen = [name for name in found if not wanted or name in wanted]
    if not chosen:
        raise RequestError(f"nothing to build in {', '.join(change.tree.project for change in changes)}")
    return chosen


def _known(config: Config, change: LocalChange) -> list[str]:
    """Return the targets of a change's release."""
    release = config.release_of(change.parameters["ZUUL_BRANCH"])
    default = Config(EMBEDDED).release("default").targets
    return list(release[1].targets) if release else [name for name in default if name in config.names("targets")]


def _served(config: Config, change: LocalChange) -> list[str]:
    """Return the targets of a change's release that its tree has packaging for."""
    entry = config.package_of(change.parameters["ZUUL_PROJECT"])
    pair = entry is not None and config.package(entry).packaging is not None
    return [
        name
        for name in _known(config, change)
        if pair or FORMATS[config.target(name).format].packaged(change.tree, change.package)
    ]


def options(
    only: str = "",
    profiles: Sequence[str] = (),
    minutes: int | None = None,
    reproducible: bool = False,
    again: bool = False,
) -> dict[str, str]:
    """Return the parameters for what a maintainer asks of a check beyond the change and its targets.

    Args:
        only: names of steps, joined by commas; empty for all.
        profiles: build profiles besides the package's own.
        minutes: the build's time limit; None for the configuration's.
        reproducible: build twice and compare.
        again: run tests also where they passed before with the same input.

    Raises:
        RequestError: there is no such step, or a profile cannot have that name.
    """
    steps = [step.strip() for step in only.split(",")] if only else []
    for step in steps:
        if step not in STEPS:
            raise RequestError(f"--only: there is no step {step!r}; the steps are: {', '.join(STEPS)}")
    for profile in profiles:
        if not re.fullmatch(PROFILE, profile, re.ASCII):
            raise RequestError(f"--profile: {profile!r} is no name of a build profile; it must match {PROFILE}")
    # a failed build's root is of use on a maintainer's machine
    given = {"KEEP_ROOT": "true", "ONLY": ",".join(steps), "BUILD_PROFILES": ",".join(dict.fromkeys(profiles))}
    given |= {"BUILD_MINUTES": str(minutes or ""), "REPRODUCIBLE": "true" if reproducible else "false"}
    given |= {"AGAIN": "true"} if again else {}
    return {name: value for name, value in given.items() if value}


def check(
    config: Config, change: LocalChange, targets: Sequence[str], asked: Mapping[str, str], console: Console
) -> Exit:
    """Run the check pipeline for a change and show it; return how it ended.

    Args:
        config: the configuration.
        change: what `prepare_change` made.
        targets: the targets to build for.
        asked: what `options` returned.
        console: where progress and summary go: a live table on a terminal, plain lines elsewhere.
    """
    tree = change.tree
    _say(console, f"checking {tree.project} {tree.id[:8]} ({tree.subject}) for {', '.join(targets)}")
    given = {**change.parameters, **asked}
    return _run(config, {name: (f"build-{name}", given) for name in targets}, f"{tree.project} {tree.id[:8]}", console)


def queue(changes: Sequence[LocalChange]) -> dict[str, str]:
    """Return the parameters of a queue of changes of several projects, of which the last is the one that is gated.

    Raises:
        RequestError: a project comes twice.
    """
    projects = [change.parameters["ZUUL_PROJECT"] for change in changes]
    twice = [project for project in projects if projects.count(project) > 1]
    if twice:
        raise RequestError(f"two trees are of the project {twice[0]}; name one")
    items = ("{ZUUL_PROJECT}:{ZUUL_BRANCH}:{ZUUL_REF}".format(**change.parameters) for change in changes)
    # what is built so is in the namespace of what nobody has approved, and never released
    return {**changes[-1].parameters, "ZUUL_PIPELINE": "local", "ZUUL_CHANGES": "^".join(items)}


def gate(config: Config, changes: Sequence[LocalChange], targets: Sequence[str], console: Console) -> Exit:
    """Run the gate pipeline for changes of several projects, in their order, and show it; return how it ended.

    Args:
        config: the configuration.
        changes: what `prepare_change` made.
        targets: the targets to build for.
        console: as of `check`.
    """
    names = ", ".join(f"{change.tree.project} {change.tree.id[:8]}" for change in changes)
    _say(console, f"gating {names} for {', '.join(targets)}")
    given = queue(changes)
    return _run(config, {name: (f"gate-{name}", given) for name in targets}, names, console)


def _run(config: Config, jobs: Mapping[str, tuple[str, Mapping[str, str]]], what: str, console: Console) -> Exit:
    """Run a job with all that it starts for each target, and show it; return how the worst ended."""
    engine = LocalEngine(config)
    started = time.monotonic()
    refs = {name: engine.start(job, given) for name, (job, given) in jobs.items()}
    # a terminal that is closed, or a polite kill, ends the jobs as Ctrl-C does
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        _show(engine, refs, console)
    except KeyboardInterrupt:
        console.print("stopping; the jobs that run are aborted")
        for ref in refs.values():
            engine.abort(ref)
        for ref in refs.values():
            engine.wait(ref)
    exits = [_summary(config, engine, name, ref, console) for name, ref in refs.items()]
    worst = max(exits, key=[Exit.PASSED, Exit.PACKAGE, Exit.REQUEST, Exit.INFRASTRUCTURE, Exit.ABORTED].index)
    verdict = {Exit.PASSED: "[green]passed[/]", Exit.ABORTED: "[yellow]aborted[/]"}.get(worst, "[red]failed[/]")
    console.print(f"{what}: {verdict} after {time.monotonic() - started:.0f} s")
    return worst


def _rows(engine: LocalEngine, refs: dict[str, BuildRef]) -> list[Row]:
    """Return the builds of a run, each followed by those that it started, in the order of their start."""
    rows = []
    jobs = engine.jobs()
    for name, top in refs.items():
        first = engine.record(top)
        started: dict[str, list[BuildInfo]] = {}
        for job in (job for job in jobs if job.endswith(f"-{name}")):
            for ref in reversed(engine.builds(job)):
                record = engine.record(ref)
                if record.queued < first.queued:
                    break
                started.setdefault(record.parameters.get("PARENT", ""), []).append(record)

        def walk(
            record: BuildInfo, top: BuildInfo = first, started: dict[str, list[BuildInfo]] = started
        ) -> Iterator[Row]:
            ended = record.ended or datetime.now(UTC)
            seconds = (ended - record.started).total_seconds() if record.started else 0.0
            project = record.parameters.get("ZUUL_PROJECT", "")
            gated = top.job.startswith("gate-") and record.job.startswith(("build-", "compile-", "publish-"))
            about = project if gated or project != top.parameters.get("ZUUL_PROJECT", "") else ""
            yield Row(BuildRef(record.job, record.number), record.state, seconds, about)
            for child in sorted(started.get(f"{record.job}/{record.number}", ()), key=lambda one: one.queued):
                yield from walk(child)

        rows += walk(first)
    return rows


def _table(rows: Sequence[Row]) -> Table:
    several = any(row.about for row in rows)
    table = Table(
        "job",
        *(["project"] if several else []),
        "build",
        "result",
        "time",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for row in rows:
        state = Text(row.state, style=COLOURS.get(row.state, "dim"))
        about = [Text(row.about)] if several else []
        table.add_row(row.ref.job, *about, f"#{row.ref.number}", state, f"{row.seconds:.0f} s" if row.seconds else "")
    return table


def _show(engine: LocalEngine, refs: dict[str, BuildRef], console: Console) -> None:
    """Show the builds until all have ended."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4, transient=True) as live:
            while not _ended(engine, refs):
                live.update(_table(_rows(engine, refs)))
                _pause(engine, refs)
        return
    shown: dict[BuildRef, str] = {}
    spoke = time.monotonic()
    while True:
        ended = _ended(engine, refs)
        for row in _rows(engine, refs):
            if shown.get(row.ref) != row.state:
                _say(
                    console,
                    " ".join(filter(None, [f"{row.ref.job} #{row.ref.number}", row.about, row.state]))
                    + (f" {row.seconds:.0f} s" if row.seconds > 1 else ""),
                )
                shown[row.ref] = row.state
                spoke = time.monotonic()
        if ended:
            return
        if time.monotonic() - spoke > SILENCE:
            running = ", ".join(
                str(ref) for ref, state in shown.items() if state == "running" and ref not in refs.values()
            )
            _say(console, f"still running: {running or next(iter(refs.values()))}")
            spoke = time.monotonic()
        _pause(engine, refs)


def _pause(engine: LocalEngine, refs: dict[str, BuildRef]) -> None:
    """Wait a moment, or until the first build that runs has ended."""
    alive = [ref for ref in refs.values() if engine.record(ref).alive]
    if alive:
        engine.wait(alive[0], POLL)


def _ended(engine: LocalEngine, refs: dict[str, BuildRef]) -> bool:
    return all(engine.state(ref) not in ("queued", "running") for ref in refs.values())


def _say(console: Console, line: str) -> None:
    console.print(f"{datetime.now():%H:%M:%S} {spelled_out(line)}", highlight=False, soft_wrap=True, markup=False)


def _summary(config: Config, engine: LocalEngine, target_name: str, top: BuildRef, console: Console) -> Exit:
    """Print what came of one target, and return how it ended."""
    code = exit_of(engine, top)
    rows = _rows(engine, {target_name: top})
    console.print()
    console.print(Text(target_name, style="bold"))
    console.print(_table(rows))
    lines = []
    notice = config.target(target_name).notice
    if notice:
        lines.append(f"note: {notice}")
    artifacts = engine.directory(top) / "archive" / "artifacts"
    if (artifacts / "result.json").exists():
        view = report.read(artifacts)
        lines += report.brief(view)
        if view.use:
            url = view.use.record.url
            lines.append(f"repository: {url} (while `pkgci serve` runs)")
            lines.append(f"its files: {config.data / 'repositories' / url.removeprefix(config.settings.url)}")
    lines += [
        f"a shell in its root: pkgci shell {one}" for _, one in failed.roots(config).all() if one.parent == str(top)
    ]
    lines += [f"its machines: pkgci debug {one}" for _, one in runs.runs(config).all() if one.parent == str(top)]
    lines += [f"log: {engine.directory(row.ref) / 'log'}" for row in rows if row.state == "FAILURE"]
    if (artifacts / report.PAGE).exists():
        lines.append(f"report: {artifacts / report.PAGE}")
    for line in lines:
        console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
    return code


def _ask(path: Path, *arguments: str) -> str | None:
    """Return what git says about a tree, None when it refuses."""
    done = run(["git", "-C", path, *arguments], check=False, env=source.GIT, quiet=True)
    if b"dubious ownership" in done.stderr:
        raise RequestError(
            f"{path} belongs to another user; run pkgci as its owner, or see `git help config` safe.directory"
        )
    return None if done.returncode else os.fsdecode(done.stdout).removesuffix("\n")


def _project(config: Config, tree: Path) -> str:
    """Return the project of a tree: the one of the configuration that its remote's URL ends in, or the directory's name."""
    url = _ask(tree, "remote", "get-url", "origin") or ""
    # also user@host:project, which is no URL
    parts = [part for part in re.split("[/:]", url.removesuffix("/").removesuffix(".git")) if part]
    for first in range(len(parts)):
        if config.package_of("/".join(parts[first:])):
            return "/".join(parts[first:])
    if not re.fullmatch(PROJECT, tree.name):
        raise RequestError(f"{tree}: {tree.name!r} is no name for a project; rename the directory")
    return tree.name


def _take(repository: Path, tree: Path, ref: str) -> str:
    """Fetch a ref of a working tree into a repository of ours; return its commit."""
    name = f"refs/pkgci/{uuid.uuid4().hex}"
    done = git(
        repository, "fetch", "-q", "--no-tags", "--no-write-fetch-head", "--", tree, f"+{ref}:{name}", check=False
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["git said nothing"]
        raise InfrastructureError(f"cannot read {ref} of {tree}: {said[0]}")
    commit = git(repository, "rev-parse", "--verify", f"{name}^{{commit}}").stdout.decode().strip()
    git(repository, "update-ref", "-d", name)
    return commit


def _commit_worktree(repository: Path, tree: Path, head: str) -> str:
    """Return a commit on top of `head` of what `git add -A` would take; the tree's git stays as it is.

    As with that command, the filters of the tree's own configuration of git run; its owner wrote that, no change.
    """
    with tempfile.TemporaryDirectory() as scratch:
        environment = {
            **source.GIT,
            "GIT_INDEX_FILE": os.fspath(Path(scratch, "index")),
            "GIT_OBJECT_DIRECTORY": os.fspath(repository / "objects"),
        }

        def work(*arguments: str, input: bytes | None = None) -> bytes:
            command = ["git", "-C", tree, "-c", "core.hooksPath=/dev/null", "--literal-pathspecs", *arguments]
            return run(command, env=environment, input=input, quiet=True).stdout

        work("read-tree", head)
        work("add", "-A", "--", ".")
        # what is ignored and was added all the same
        staged = (_ask(tree, "diff-index", "--cached", "--name-only", "--diff-filter=A", "-z", "HEAD") or "").split(
            "\0"
        )
        present = [name for name in filter(None, staged) if os.path.lexists(tree / name)]
        work("add", "-f", "--pathspec-from-file=-", "--pathspec-file-nul", input=os.fsencode("\0".join(present)))
        made = work("write-tree").decode().strip()
    if made == git(repository, "rev-parse", f"{head}^{{tree}}").stdout.decode().strip():
        return head
    dates = {"GIT_AUTHOR_DATE": f"{int(time.time())} +0000", "GIT_COMMITTER_DATE": f"{int(time.time())} +0000"}
    made_of = ["commit-tree", made, "-p", head, "-m", "Uncommitted work"]
    return git(repository, *made_of, env={**source.ISOLATED, **dates}).stdout.decode().strip()
