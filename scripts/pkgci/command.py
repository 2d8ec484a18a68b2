"""The one helper through which external commands are run.

An argv list, never a shell; the command line and its output go to the job's log, so that a person can repeat it by hand.
Commands started here die with the process that started them (`PR_SET_PDEATHSIG`), also when that one is killed.
"""

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

from pkgci.errors import InfrastructureError

log = logging.getLogger(__name__)


def supervised(argv: Sequence[str | Path]) -> list[str]:
    """Return `argv` prefixed so that the command is killed when the thread that starts it ends, however it ends."""
    return ["setpriv", "--pdeathsig", "KILL", "--", *map(str, argv)]


def run(
    argv: Sequence[str | Path],
    *,
    input: bytes | IO[bytes] | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    timeout: float | None = None,
    check: bool = True,
    output: IO[bytes] | None = None,
    quiet: bool = False,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end.

    Args:
        argv: the command and its arguments; never passed through a shell.
        input: bytes, or an open file, for its standard input, which is empty otherwise.
        cwd: its working directory.
        env: variables added to this process's environment; None takes one away.
        timeout: seconds until it is killed.
        check: raise when it ends with another status than 0.
        output: an open binary file that takes stdout and stderr; without it both are captured.
        quiet: do not write the command line to the log.

    Returns:
        The completed process, with stdout and stderr as bytes (empty when `output` took them).

    Raises:
        InfrastructureError: the tool is missing, ran out of time, or (with `check`) failed.
    """
    words = [str(word) for word in argv]
    environment = {name: value for name, value in {**os.environ, **(env or {})}.items() if value is not None}
    given = {"input": input} if isinstance(input, bytes) else {"stdin": input or subprocess.DEVNULL}
    if not quiet:
        log.info("+ %s", shlex.join(words))
    try:
        done = subprocess.run(
            supervised(words),
            **given,
            stdout=output or subprocess.PIPE,
            stderr=subprocess.STDOUT if output else subprocess.PIPE,
            cwd=cwd,
            env=environment,
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError as error:
        raise InfrastructureError(f"cannot run {words[0]}: {error.filename} is missing; see `pkgci doctor`") from error
    except subprocess.TimeoutExpired as error:
        raise InfrastructureError(f"{shlex.join(words)[:200]}: no end after {timeout:.0f} s") from error
    if done.returncode == 127 and shutil.which(words[0], path=environment.get("PATH")) is None:
        raise InfrastructureError(f"cannot run {words[0]}: not installed; see `pkgci doctor`")
    if check and done.returncode:
        said = (done.stderr or done.stdout or b"").decode(errors="replace").strip().splitlines()
        reason = said[-1] if said else "it said nothing"
        raise InfrastructureError(f"{shlex.join(words)[:200]}: status {done.returncode}: {reason}")
    return done


@cache
def program_digest(program: str) -> str:
    """Return the sha256 of a program's file. It says which version that is; the program itself would take up to 0.1 s.

    Raises:
        InfrastructureError: it is not installed.
    """
    path = shutil.which(program)
    if path is None:
        raise InfrastructureError(f"cannot run {program}: not installed; see `pkgci doctor`")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read(argv: Sequence[str | Path], *, env: Mapping[str, str | None], largest: int) -> bytes | None:
    """Return what a command says, or None when that is more than `largest` bytes: it is ended then.

    Args:
        argv: the command and its arguments.
        env: as of `run`.
        largest: bytes.

    Raises:
        InfrastructureError: it failed.
    """
    variables = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    with subprocess.Popen(supervised(argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=variables) as process:
        assert process.stdout is not None
        said = process.stdout.read(largest + 1)
        if len(said) > largest:
            process.kill()
            return None
    if process.returncode:
        raise InfrastructureError(f"{shlex.join(map(str, argv))[:200]}: status {process.returncode}")
    return said


@contextmanager
def streamed(argv: Sequence[str | Path], *, env: Mapping[str, str | None], input: bytes) -> Iterator[IO[bytes]]:
    """Yield what a command says as a stream; the command is ended with the `with`.

    Whoever reads the stream has to know where its end is: the command's status is not looked at.

    Args:
        argv: the command and its arguments.
        env: as of `run`.
        input: bytes for its standard input.
    """
    variables = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    with tempfile.TemporaryFile() as asked:
        asked.write(input)
        asked.seek(0)
        with subprocess.Popen(supervised(argv), stdin=asked, stdout=subprocess.PIPE, env=variables) as process:
            assert process.stdout is not None
            try:
                yield process.stdout
            finally:
                process.kill()
