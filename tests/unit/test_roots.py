"""Which prepared roots are used. Real ones are made in the integration tests."""

import json
import os
import shlex
import signal
import time
from pathlib import Path

import pytest

from pkgci import roots
from pkgci.config import Config
from pkgci.roots import Root, _existing, _prepared

DAY = 86400


@pytest.mark.parametrize(("days", "used"), [(-8, False), (-6, True), (6, True), (8, False)])
def test_a_root_from_long_ago_or_of_a_clock_that_was_far_ahead_is_made_anew(tmp_path: Path, days: int, used: bool):
    made = {"target": "some", "sha256": "0" * 64, "made": time.time() + days * DAY}
    (tmp_path / "root.json").write_text(json.dumps(made))
    expected = Root(tmp_path / "root.tar", "0" * 64) if used else None
    assert _existing(tmp_path, Config()) == expected


def test_a_root_whose_record_was_cut_short_by_a_crash_of_the_machine_is_made_anew(tmp_path: Path):
    (tmp_path / "root.json").touch()
    assert _existing(tmp_path, Config()) is None


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "config.yaml").write_text(f"paths: {{cache: {tmp_path / 'cache'}}}\n")
    return Config(tmp_path)


def make(new: Path) -> None:
    (new / "root.tar").write_text("content")
    (new / "log").write_text("what a tool said")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_process_left_of_a_root_goes_with_the_next(config: Config, number: int):
    def killed(new: Path) -> None:
        make(new)
        os.kill(os.getpid(), number)

    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            _prepared(config, "some", "key", killed)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == number
    root = _prepared(config, "some", "key", make)
    assert root.path.read_text() == "content"
    assert _prepared(config, "some", "key", killed) == root
    places = root.path.parents[1]
    assert sorted(path.name for path in places.iterdir()) == ["key", "key.lock"]
    assert sorted(path.name for path in (places / "key").iterdir()) == ["root.json", "root.tar"]


def test_a_root_that_cannot_be_made_leaves_nothing(config: Config):
    def fail(new: Path) -> None:
        make(new)
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        _prepared(config, "some", "key", fail)
    assert [path.name for path in (config.cache / "roots").iterdir()] == ["key.lock"]


def test_this_program_may_lie_in_a_directory_with_spaces(monkeypatch):
    monkeypatch.setattr(roots, "HOST_PROVIDES", Path("/a b/host-provides.sh"))
    hooks = roots._build_command(Config().target("debianrpm-amd64"))
    (hook,) = (word.removeprefix("--customize-hook=") for word in hooks if "host-provides" in word and "upload" in word)
    assert shlex.split(hook) == ["upload", "/a b/host-provides.sh", "/root/host-provides.sh"]
