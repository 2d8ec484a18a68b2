"""External commands: what is said when they are missing, fail or hang, and that they die with their starter."""

import logging
import os
import signal
import subprocess
import sys

import pytest
from local_jobs import alive, pid_in, until

from pkgci.command import run
from pkgci.errors import InfrastructureError


def test_a_command_is_an_argv_list_that_no_shell_reads():
    assert run(["printf", "%s|", "a b", "$(id)", "; true", "*"]).stdout == b"a b|$(id)|; true|*|"


def test_input_reaches_the_command():
    assert run(["cat"], input=b"\0\xff").stdout == b"\0\xff"


def test_standard_input_is_empty_unless_it_is_given():
    assert run(["cat"]).stdout == b""


def test_variables_are_added_and_taken_away(monkeypatch):
    monkeypatch.setenv("GONE", "1")
    monkeypatch.setenv("KEPT", "2")
    script = 'echo "${GONE-none} $KEPT $NEW"'
    assert run(["sh", "-c", script], env={"GONE": None, "NEW": "3"}).stdout == b"none 2 3\n"


@pytest.mark.parametrize("to_file", [False, True])
def test_a_missing_tool_is_named_with_who_helps(to_file, tmp_path):
    with (tmp_path / "log").open("wb") as output, pytest.raises(InfrastructureError) as caught:
        run(["no-such-tool", "--flag"], check=False, output=output if to_file else None)
    assert str(caught.value) == "cannot run no-such-tool: not installed; see `pkgci doctor`"


def test_a_tool_that_itself_ends_with_127_is_not_called_missing():
    with pytest.raises(InfrastructureError, match="sh -c 'exit 127': status 127: it said nothing"):
        run(["sh", "-c", "exit 127"])


def test_a_failure_gives_command_status_and_last_line_of_stderr():
    script = "echo out; echo first >&2; echo last >&2; exit 5"
    with pytest.raises(InfrastructureError, match=r"^sh -c .*: status 5: last$"):
        run(["sh", "-c", script])


def test_a_failure_that_is_expected_is_returned():
    assert run(["sh", "-c", "exit 5"], check=False).returncode == 5


def test_a_command_that_hangs_is_killed_at_its_timeout(tmp_path):
    pid_file = tmp_path / "pid"
    with pytest.raises(InfrastructureError, match="no end after 1 s"):
        run(["sh", "-c", f"echo $$ >{pid_file}; exec sleep 1000"], timeout=0.6)
    assert not alive(pid_in(pid_file))


def test_output_goes_to_the_file_that_takes_it_in_order(tmp_path):
    with (tmp_path / "log").open("wb") as output:
        done = run(["sh", "-c", "echo one; echo two >&2; echo three"], output=output)
    assert (tmp_path / "log").read_text() == "one\ntwo\nthree\n"
    assert done.stdout is None


def test_the_command_line_is_logged_as_a_person_would_type_it(caplog):
    caplog.set_level(logging.INFO, "pkgci")
    run(["echo", "a b"])
    run(["echo", "unseen"], quiet=True)
    assert caplog.messages == ["+ echo 'a b'"]


def test_a_child_dies_with_a_starter_that_is_killed(tmp_path):
    pid_file = tmp_path / "pid"
    script = f"echo $$ >{pid_file}; exec sleep 1000"
    code = "import sys; from pkgci.command import run; run(['sh', '-c', sys.argv[1]])"
    starter = subprocess.Popen([sys.executable, "-c", code, script])
    try:
        child = pid_in(pid_file)
        assert alive(child)
    finally:
        os.kill(starter.pid, signal.SIGKILL)
        starter.wait()
    until(lambda: not alive(child))
