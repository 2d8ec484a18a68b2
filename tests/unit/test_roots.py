"""Which prepared roots are used. Real ones are made in the integration tests."""

import json
import time
from pathlib import Path

import pytest

from pkgci.config import Config
from pkgci.roots import Root, _existing

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
