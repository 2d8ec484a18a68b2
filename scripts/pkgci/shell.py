"""`pkgci shell`: a shell in the root of a failed build, as the build left it.

It runs in the sandbox as the build did: without network, as the same user, under the same limits, on a copy; what is
done there changes nothing of what is kept.
"""

import sys
from pathlib import Path

import click

from pkgci import failed
from pkgci.config import Config
from pkgci.engines.base import BuildRef, Engine
from pkgci.errors import InfrastructureError, RequestError
from pkgci.locks import locked
from pkgci.sandbox import interactive

SCRIPT = Path(__file__).with_suffix(".sh")
# what a person needs beyond a disk that the build has filled
MORE_DISK_MIB = 256


def shell(config: Config, engine: Engine, wanted: str, as_root: bool) -> None:
    """Run a shell in a failed build's root, on this process's terminal, until the person leaves it.

    Args:
        config: the configuration.
        engine: knows the builds of which nothing is kept.
        wanted: as of `find`.
        as_root: as the root of the sandbox, instead of the user that builds.

    Raises:
        RequestError: nothing is kept of such a build, or this is no terminal.
        InfrastructureError: the sandbox cannot be made.
    """
    directory, build = find(config, engine, wanted)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise RequestError("a shell needs a terminal: run `pkgci shell` from one")
    click.echo(f"{build}: {build.reason}")
    click.echo(f"A copy of its root for {build.target}, without network; leave it with Ctrl-D or `exit`.")
    limits = build.limits.model_copy(update={"disk_mib": build.limits.disk_mib + MORE_DISK_MIB})
    with locked(directory, shared=True) as held:
        if not held:
            raise RequestError(f"the root of {build} has just been removed; it was too old or one too many")
        status = interactive(
            directory / failed.ROOT,
            SCRIPT.read_text(),
            limits=limits,
            arguments=("root" if as_root else "builder",),
        )
    if status:
        raise InfrastructureError(f"the root of {build} cannot be opened: the sandbox ended with status {status}")


def find(config: Config, engine: Engine, wanted: str) -> tuple[Path, failed.FailedBuild]:
    """Return the kept build that a person means, with its directory.

    Args:
        config: the configuration.
        engine: as of `shell`.
        wanted: JOB/NUMBER, of it or of the build that started it; a number; the latest of a job, target or package; or
            empty for the latest of all.

    Raises:
        RequestError: there is none, or several have that number; the message names them.
    """
    kept = failed.roots(config)
    found = kept.find(wanted)
    if found is None:
        raise RequestError(f"{_why(config, engine, wanted)}; roots are kept of: {kept.listed()}")
    return found


def _why(config: Config, engine: Engine, wanted: str) -> str:
    """Return why there is no root of the build that a person named."""
    if not wanted:
        return "no failed build has left a root; `pkgci check` keeps those of its builds"
    if "/" not in wanted:
        return f"no root is kept of a build {wanted!r}"
    ref = BuildRef.parse(wanted)
    record = engine.record(ref)
    if record.alive:
        return f"{ref} has not ended yet"
    if record.state == "SUCCESS":
        return f"{ref} has passed: only a failed build leaves its root"
    if record.parameters.get("KEEP_ROOT") != "true":
        return f"{ref} was not asked to leave its root: `pkgci check` does, or the parameter KEEP_ROOT"
    return (
        f"{ref} left no root: it failed before or after the build itself, "
        f"or the root was removed (after {config.settings.failed_root_days} days, or for newer ones)"
    )
