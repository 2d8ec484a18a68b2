"""Mirrors of released repositories: real rsync daemons, a real sshd, and what their readers see."""

from pathlib import Path

import pytest
from mirrors import Fleet, fleet
from released import built, put


@pytest.fixture
def mirrors(tmp_path: Path, gnupg):
    with fleet(tmp_path, gnupg) as made:
        yield made


def test_what_is_published_reaches_mirrors_by_an_rsync_daemon_and_by_ssh(mirrors: Fleet):
    mirrors.rsyncd("europe")
    mirrors.sshd("america")
    put(mirrors.config, built(mirrors.config, "hello", "1.0-1"), built(mirrors.config, "other", "3"))
    first = mirrors.synced()
    assert {(one.name, one.before, one.after, one.whole) for one in first.mirrors} == {
        ("europe", 0, 1, True),
        ("america", 0, 1, True),
    }
    put(mirrors.config, built(mirrors.config, "hello", "1.0-2"))
    second = mirrors.synced()
    for one in second.mirrors:
        assert (one.before, one.after, one.whole) == (1, 2, False)
        assert [change.model_dump() for change in one.packages] == [
            {"name": "hello", "architecture": "all", "before": "1.0-1", "after": "1.0-2"}
        ]
        assert one.bytes > 1000
    assert [one.bytes for one in mirrors.synced().mirrors] == [0, 0]
    index = next((mirrors.tree("europe") / "bookworm/current/dists/bookworm/main/binary-amd64").glob("*.gz"))
    assert index.stat().st_nlink == 2, "an index file is a hard link to what all generations share"
