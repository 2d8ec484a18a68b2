"""The job `debug-session`: the machines of a kept system test, for somebody who logs in by ssh and has no shell on their host.

A session is a build that lasts: its machines are processes of it, and end with it however that ends. Others see it by a
directory `sessions/RUN/` of the host's state, which the session holds locked, and say there what becomes of it.
"""

import logging
import re
import shlex
import shutil
import socket
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pkgci import nodes, runs
from pkgci.change import Parameters
from pkgci.config import Config
from pkgci.engines.base import BuildRef
from pkgci.errors import InfrastructureError, PkgciError, RequestError
from pkgci.kept import RECORD, Kept, KeptBuild
from pkgci.lazy import Lazy
from pkgci.locks import locked
from pkgci.step import StepContext
from pkgci.vm.machine import Machine
from pkgci.vm.remote import GuestError

exceptions = Lazy("cryptography.exceptions")
serialization = Lazy("cryptography.hazmat.primitives.serialization")
log = logging.getLogger(__name__)

LOOPBACK, ANY = "127.0.0.1", "0.0.0.0"  # noqa: S104 - nobody listens there unless `debug_address` says so
LONGEST = timedelta(hours=24)
POLL = 0.5  # seconds between looks at what others say of a session
CLOSE_SECONDS = 60
LOGIN_SECONDS = 10
# what today's distributions ask for (RequiredRSASize of sshd_config(5) is 1024 at least)
RSA_BITS = 2048
AUTHORIZE = 'umask 77; mkdir -p /root/.ssh; printf "%s\\n" "$1" >>/root/.ssh/authorized_keys'


class Session(KeptBuild):
    """A session, by the system test that it is about; `ended` is when it will end by itself."""

    opened: datetime
    keys: tuple[str, ...]
    logins: tuple[str, ...] = ()

    def described(self) -> str:
        """Return it for a list of several."""
        return f"{self} until {self.ended:%Y-%m-%d %H:%M} UTC"


def debug_session(context: StepContext, parameters: Parameters) -> str:
    """Run the job.

    Args:
        context: gives the configuration, and the engine that is asked where a system test ran.
        parameters: NODE, ACTION and, by that, BUILD, MACHINES, AT_START, PUBLIC_KEY, DEBUG_HOLD.

    Returns:
        In one line what was done.

    Raises:
        RequestError: a parameter is wrong, or there is no such session, or nothing is kept of such a test.
        InfrastructureError: the machines cannot be restored, or too many sessions run.
    """
    nodes.check(parameters)
    _check_key(parameters.get("PUBLIC_KEY"))
    action = parameters.get("ACTION") or "list"
    if action == "open":
        return _open(context, parameters)
    if action == "list":
        return _list(context.config)
    return _extend(context.config, parameters) if action == "extend" else _close(context.config, parameters)


def _check_key(line: str) -> None:
    if not line:
        return
    try:
        bits = getattr(serialization.load_ssh_public_key(line.encode()), "key_size", RSA_BITS)
    except (ValueError, NotImplementedError, exceptions.UnsupportedAlgorithm) as error:
        raise RequestError(f"parameter PUBLIC_KEY: {line[:60]!r}... is no ssh public key: {error}") from error
    if line.startswith("ssh-rsa ") and bits < RSA_BITS:
        raise RequestError(f"parameter PUBLIC_KEY: an RSA key of {bits} bits; sshd takes it from {RSA_BITS} bits on")


def _sessions(config: Config) -> Kept[Session]:
    return Kept(config.state / "sessions", Session, days=0)


def _running(config: Config) -> list[tuple[Path, Session]]:
    """Return the sessions that run, each with its directory; what killed ones left is removed."""
    found = []
    for directory, session in _sessions(config).all():
        with locked(directory, wait=False) as dead:
            if dead:
                shutil.rmtree(directory, ignore_errors=True)
            else:
                found.append((directory, session))
    return found


def _find(config: Config, wanted: str) -> tuple[Path, Session]:
    # one whose time is over is about to end
    running = [(place, session) for place, session in _running(config) if session.ended > datetime.now(UTC)]
    for directory, session in running:
        if wanted in session.names():
            return directory, session
    known = ", ".join(session.described() for _, session in running) or "none"
    raise RequestError(f"no session of {wanted or 'any system test'} runs on {nodes.here()}; there are: {known}")


def _open(context: StepContext, parameters: Parameters) -> str:
    config, now = context.config, datetime.now(UTC)
    found = runs.runs(config).find(parameters.get("BUILD"))
    if found is None:
        raise RequestError(_nowhere(context, parameters.get("BUILD")))
    directory, run = found
    name = parameters.get("MACHINES") or (runs.MACHINES if runs.MACHINES in run.sets else next(iter(run.sets)))
    about = run.model_dump(include=set(KeptBuild.model_fields) - {"ended"})
    key = parameters.get("PUBLIC_KEY")
    session = Session(**about, ended=now + _duration(parameters), opened=now, keys=(key,) if key else ())
    sessions = _sessions(config)
    # its lock goes with it, under the name that it gets
    with sessions.room(now) as room:
        with locked(sessions.place):
            _check_running(config, run)
            sessions.keep(room, session, now)
        place = sessions.place / f"{run.job}-{run.number}"
        try:
            with runs.restored(config, directory, run, name, parameters.get("AT_START") == "true") as machines:
                return _last(config, place, machines)
        finally:
            with locked(sessions.place):
                shutil.rmtree(place, ignore_errors=True)


def _check_running(config: Config, run: runs.KeptRun) -> None:
    running = _running(config)
    if str(run) in [str(session) for _, session in running]:
        raise RequestError(f"a session of {run} runs already; `list` says how to log in, `extend` lets another key in")
    if len(running) >= config.settings.debug_sessions:
        raise InfrastructureError(
            f"{len(running)} sessions run on {nodes.here()} ({', '.join(one.described() for _, one in running)}), and "
            "debug_sessions in config.yaml allows no more; close one, or wait"
        )


def _nowhere(context: StepContext, wanted: str) -> str:
    """Return that nothing is kept here of a system test, and where to ask, for an error."""
    listed = runs.runs(context.config).listed()
    said = f"no machines are kept of {wanted or 'any system test'} on {nodes.here()}; they are kept of: {listed}"
    if wanted.startswith("systest-") and "/" in wanted:
        try:
            node = context.engine.record(BuildRef.parse(wanted)).node
        except PkgciError:
            return said
        if node not in ("", nodes.here()):
            return f"{said}; {wanted} ran on {node}: start this with NODE={node}"
    return said


def _last(config: Config, place: Path, machines: Mapping[str, Machine]) -> str:
    """Let a session's machines run until its time is over, or somebody closes it; let in whose keys come meanwhile."""
    logins = tuple(_login(config, node, machine) for node, machine in machines.items())
    with locked(place.parent):
        session = Session.read(place / RECORD).model_copy(update={"logins": logins})
        session.write(place / RECORD)
    log.info("the machines of %s:", session)
    for line in session.logins:
        log.info("  %s", line)
    if not session.keys:
        log.info("no key is let in yet; ACTION=extend with PUBLIC_KEY lets one in")
    let_in: set[str] = set()
    until = None
    while session.ended > datetime.now(UTC):
        for key in session.keys:
            if key not in let_in:
                let_in.add(key)
                _let_in(machines, key)
        if session.ended != until:
            until = session.ended
            log.info("they run until %s UTC", f"{until:%Y-%m-%d %H:%M}")
        time.sleep(POLL)
        session = Session.read(place / RECORD)
    return f"the session of {session} is over"


def _let_in(machines: Mapping[str, Machine], key: str) -> None:
    for node, machine in machines.items():
        try:
            machine.connect(LOGIN_SECONDS)
            done = machine.run(AUTHORIZE, key, timeout=LOGIN_SECONDS)
            why = done.text().strip() if done.status else ""
        except GuestError as error:
            why = str(error)
        if why:
            log.warning("%s does not take the key: %s", node, why)
        else:
            log.info("%s lets in %s", node, " ".join(key.split()[::2]))


def _login(config: Config, node: str, machine: Machine) -> str:
    """Return the command that logs in to a machine from anywhere; it knows the machine's key, and forwards nothing to it."""
    address, host = config.settings.debug_address, socket.gethostname()
    if address == LOOPBACK:
        port, where, jump = machine.port(), LOOPBACK, ["-J", host]
    else:
        port, where, jump = machine.listen(address), host if address == ANY else address, []
    key = " ".join(machine.access.host_key.split()[:2])
    words = [
        "ssh",
        *jump,
        "-p",
        str(port),
        "-a",
        "-x",
        "-o",
        "ClearAllForwardings=yes",
        "-o",
        "StrictHostKeyChecking=yes",
    ]
    words += ["-o", "UserKnownHostsFile=none", "-o", f"KnownHostsCommand=/bin/echo [{where}]:{port} {key}"]
    return f"{node}: {shlex.join([*words, f'root@{where}'])}"


def _list(config: Config) -> str:
    with locked(_sessions(config).place):
        running = _running(config)
    for _, session in running:
        log.info("%s:", session.described())
        for line in session.logins:
            log.info("  %s", line)
    listed = ", ".join(session.described() for _, session in running) or "none"
    return f"sessions on {nodes.here()}: {listed}; machines are kept of: {runs.runs(config).listed()}"


def _extend(config: Config, parameters: Parameters) -> str:
    with locked(_sessions(config).place):
        directory, session = _find(config, parameters.get("BUILD"))
        until = min(datetime.now(UTC) + _duration(parameters), session.opened + LONGEST)
        keys = dict.fromkeys((*session.keys, *filter(None, [parameters.get("PUBLIC_KEY")])))
        session = session.model_copy(update={"ended": max(until, session.ended), "keys": tuple(keys)})
        session.write(directory / RECORD)
    for line in session.logins:
        log.info("  %s", line)
    return f"the session of {session.described()}"


def _close(config: Config, parameters: Parameters) -> str:
    with locked(_sessions(config).place):
        directory, found = _find(config, parameters.get("BUILD"))
        found.model_copy(update={"ended": datetime.now(UTC)}).write(directory / RECORD)
    end = time.monotonic() + CLOSE_SECONDS
    while directory in [place for place, _ in _running(config)]:
        if time.monotonic() > end:
            raise InfrastructureError(f"the session of {found} does not end; abort its build")
        time.sleep(POLL / 5)
    return f"the session of {found} is closed"


def _duration(parameters: Parameters) -> timedelta:
    number, unit = re.fullmatch(r"([0-9]+)([hm])", parameters.get("DEBUG_HOLD") or "2h").groups()
    return timedelta(hours=int(number)) if unit == "h" else timedelta(minutes=int(number))
