"""The command line itself: what is said, and with which exit code it ends, where no step does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from pkgci.cli import main, told
from pkgci.config import EMBEDDED, ROOT
from pkgci.errors import RequestError


def command(*words: str, **variables: str) -> subprocess.Popen:
    program = [sys.executable, "-m", *words] if words[0].startswith("pkgci.") else [sys.executable, "-c", PKGCI, *words]
    pipe = subprocess.PIPE
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PKGCI_", "XDG_"))}
    return subprocess.Popen(program, env={**environment, **variables}, stdout=pipe, stderr=pipe, text=True)


PKGCI = "import sys; from pkgci.cli import main; sys.argv[0] = 'pkgci'; main()"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (RequestError("no such\nthing"), 2, "pkgci: no such\\nthing\n"),
        (PermissionError(13, "Permission denied", "/x"), 3, "pkgci: /x: Permission denied\n"),
        (KeyboardInterrupt(), 143, "pkgci: aborted\n"),
    ],
)
def test_what_is_expected_is_one_line_and_an_exit_code(capsys, error, status, said):
    with pytest.raises(SystemExit) as ended, told():
        raise error
    assert (ended.value.code, capsys.readouterr().err) == (status, said)


def test_the_demonstration_says_in_one_line_why_it_cannot_run():
    _, said = (ended := command("pkgci.demo", HOME="/proc/1")).communicate()
    assert (ended.returncode, said) == (3, "pkgci: /proc/1/.cache: No such file or directory\n")


def test_who_reads_no_further_is_told_nothing(tmp_path: Path):
    listing = command("jobs", "list", HOME=str(tmp_path))
    listing.stdout.close()
    assert listing.wait() == 143
    assert listing.stderr.read() == ""


@pytest.mark.parametrize("word", ["src/typo", "typo"])
def test_a_path_that_is_misspelt_is_not_taken_for_a_target(tmp_path: Path, word: str):
    gate = command("gate", word, HOME=str(tmp_path), PKGCI_CONFIG=str(EMBEDDED))
    assert gate.communicate() == ("", f"pkgci: there is no directory {word}\n")
    assert gate.returncode == 2


def documented() -> list[str]:
    """Return the command lines of README and docs, without what comes before `pkgci`."""
    pages = (ROOT / "README.rst", *(ROOT / "docs").rglob("*.rst"))
    lines = [
        re.findall(r"(?:``|\$ |bin/)pkgci ([a-z].*?)(?:``|  |$)", page.read_text(), re.MULTILINE) for page in pages
    ]
    return sorted({line for found in lines for line in found})


@pytest.mark.parametrize("line", documented())
def test_a_command_of_the_documentation_is_there(line: str):
    words = re.match(r"[a-z-]+(?: [\w.,=/~-]+)*", line)[0].split()
    command = main
    while isinstance(command, click.Group):
        name = words.pop(0)
        command = command.get_command(click.Context(command), name)
        assert command, f"there is no {name}"
    options = {name for option in command.params for name in option.opts}
    assert {word for word in words if re.match("--?[a-z]", word)} <= options
