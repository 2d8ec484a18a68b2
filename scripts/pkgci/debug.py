"""`pkgci debug`: the machines of a system test as it left them, for a person to look around in."""

import os
import shlex
import signal
import tempfile
from contextlib import suppress
from pathlib import Path

import click

from pkgci import runs
from pkgci.config import Config
from pkgci.errors import RequestError
from pkgci.vm.machine import Machine


def debug(config: Config, wanted: str, name: str, at_start: bool) -> None:
    """Restore a set of machines of a kept run, say how to log in, and let them run until the person ends it.

    Args:
        config: the configuration.
        wanted: the run, as of `kept.Kept.find`.
        name: the set of machines.
        at_start: as they were before the packages were installed.

    Raises:
        RequestError: nothing is kept of such a run.
        InfrastructureError: its machines cannot be restored.
    """
    kept = runs.runs(config)
    found = kept.find(wanted)
    if found is None:
        raise RequestError(
            f"no machines are kept of {wanted or 'any system test'}; they are kept of: {kept.listed()} "
            f"(for {kept.days} days; `keep_runs` in config.yaml says of which tests)"
        )
    directory, run = found
    # a terminal that is closed ends it like Ctrl-C
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with (
        tempfile.TemporaryDirectory(prefix="pkgci-") as scratch,
        runs.restored(config, directory, run, name, at_start) as machines,
    ):
        when = "before it began" if at_start else f"as it left them at {run.ended:%Y-%m-%d %H:%M} UTC"
        click.echo(f"The machines of {run} in environment {run.environment}, {when}:")
        for node, machine in machines.items():
            click.echo(f"  {login(machine, Path(scratch), node)}")
        click.echo("They run until Ctrl-C, and lose what is done in them then.")
        with suppress(KeyboardInterrupt):
            signal.pause()


def login(machine: Machine, directory: Path, node: str) -> str:
    """Return the command that logs in to a machine; its file of host keys is made in `directory`."""
    port, hosts = machine.port(), directory / node
    hosts.write_text(f"[127.0.0.1]:{port} {machine.access.host_key}\n")
    # no configuration of the person's: who is root there must not get at their agent, or at ports of theirs
    words = ["ssh", "-F", "none", "-p", str(port), "-i", machine.access.identity, "-o", "IdentitiesOnly=yes"]
    words += ["-o", f"UserKnownHostsFile={hosts}", "root@127.0.0.1"]
    return shlex.join(map(os.fspath, words))
