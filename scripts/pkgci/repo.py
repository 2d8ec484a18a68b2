"""`pkgci repo`: what an operator does with a released repository: its history, taking a version back, examining it."""

import sys
from collections.abc import Iterator, Sequence

import click

from pkgci.config import Config
from pkgci.errors import Exit, RequestError
from pkgci.mirrors.jobs import sync_job
from pkgci.released.audit import audit
from pkgci.released.records import ReleasedBuild, difference
from pkgci.released.repository import Repository, rollback


def open_named(config: Config, name: str) -> Repository:
    """Return the repository of the name `RELEASE/CODENAME`.

    Raises:
        RequestError: there is none.
    """
    release, slash, codename = name.partition("/")
    if not slash:
        raise RequestError(f"{name[:100]!r} is no repository; write RELEASE/CODENAME")
    return Repository(config, release, codename)


def history(repository: Repository, count: int) -> Iterator[str]:
    """Yield lines about the last `count` generations, newest first, and about what is on hold."""
    for hold in repository.holds().values():
        yield f"on hold: {hold.source}, since generation {hold.generation}: {hold.reason}"
    current = repository.current()
    newest = current.number if current else 0
    for number in range(newest, max(0, newest - count), -1):
        one = repository.generation(number)
        why = f": {one.reason}" if one.reason else ""
        yield f"{number:>6}  {one.time:%Y-%m-%d %H:%M:%S}  {one.kind}  by {one.by}{why}"
        yield from (f"        {line}" for line in _changed(one.removed, one.added))


def differences(repository: Repository, one: int, other: int) -> Iterator[str]:
    """Yield a line for each build by which generation `other` differs from `one`.

    Raises:
        RequestError: there never was such a generation.
    """
    before, after = _builds(repository, one), _builds(repository, other)
    removed = [build for key, build in before.items() if key not in after]
    yield from _changed(removed, [build for key, build in after.items() if key not in before])


def _builds(repository: Repository, number: int) -> dict[str, ReleasedBuild]:
    repository.generation(number)
    return difference(map(repository.generation, range(1, number + 1)))[0]


def _changed(removed: Sequence[ReleasedBuild], added: Sequence[ReleasedBuild]) -> Iterator[str]:
    before = {(build.source, build.target): build.version for build in removed}
    after = {(build.source, build.target): build.version for build in added}
    for source, target in sorted(before.keys() | after.keys()):
        versions = before.get((source, target), "none"), after.get((source, target), "none")
        yield f"{source} ({target}): {versions[0]} -> {versions[1]}"


@click.group("repo")
def repo() -> None:
    """Look after a released repository, named RELEASE/CODENAME."""


@repo.command("log")
@click.argument("repository")
@click.option("-n", "count", type=click.IntRange(1), default=20, show_default=True, help="So many generations.")
def _log(repository: str, count: int) -> None:
    """Show the generations of REPOSITORY, newest first, with what each changed and why, and what is on hold."""
    for line in history(open_named(Config(), repository), count):
        click.echo(line)


@repo.command("diff")
@click.argument("repository")
@click.argument("one", type=click.IntRange(1))
@click.argument("other", type=click.IntRange(1))
def _diff(repository: str, one: int, other: int) -> None:
    """Show by which builds generation OTHER of REPOSITORY differs from generation ONE."""
    for line in differences(open_named(Config(), repository), one, other):
        click.echo(line)


@repo.command("rollback")
@click.argument("repository")
@click.argument("generation", type=click.IntRange(1))
@click.argument("packages", nargs=-1)
@click.option("--reason", required=True, help="Why, for who publishes the package next: one line.")
def _rollback(repository: str, generation: int, packages: tuple[str, ...], reason: str) -> None:
    """Put source PACKAGES (all by default) back to what GENERATION had, as a new generation, and put them on hold."""
    opened = open_named(Config(), repository)
    made = rollback(opened.config, opened.release, opened.codename, generation, reason, packages)
    click.echo(f"generation {made.number} of {opened.name}")
    for line in _changed(made.removed, made.added):
        click.echo(f"  {line}; on hold")
    job = sync_job(opened.config, opened.name)
    if job:
        click.echo(f"its mirrors still have what it takes away; now: pkgci jobs run {job[0]} RELEASE={job[1]}")


@repo.command("unhold")
@click.argument("repository")
@click.argument("package")
def _unhold(repository: str, package: str) -> None:
    """Let source PACKAGE be published to REPOSITORY again."""
    hold = open_named(Config(), repository).unhold(package)
    click.echo(f"{package} was on hold since generation {hold.generation}: {hold.reason}")


@repo.command("audit")
@click.argument("repository")
@click.option("--all", "everything", is_flag=True, help="All generations that are kept, not only what readers see now.")
@click.option("--quick", is_flag=True, help="Do not ask apt or dnf whether each package can be installed.")
def _audit(repository: str, everything: bool, quick: bool) -> None:
    """Examine REPOSITORY as a reader: signatures, checksums, each package, its origin and dependencies, files that conflict.

    The exit code is 3 for any fault.
    """
    faults = 0
    for line in audit(open_named(Config(), repository), everything=everything, solve=not quick):
        faults += 1
        click.echo(line)
    click.echo(f"{faults} faults")
    sys.exit(int(Exit.INFRASTRUCTURE if faults else Exit.PASSED))
