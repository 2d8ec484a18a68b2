"""Mirrors of released repositories: real rsync daemons, a real sshd, and what their readers see."""

from pathlib import Path

import pytest
from mirrors import Fleet, fleet
from released import built, built_rpm, put, put_rpm


@pytest.fixture
def mirrors(tmp_path: Path, gnupg):
    with fleet(tmp_path, gnupg) as made:
        yield made


def test_what_is_published_reaches_mirrors_by_an_rsync_daemon_and_by_ssh(mirrors: Fleet):
    mirrors.rsyncd("europe")
    mirrors.sshd("america")
    put(mirrors.config, built(mirrors.config, "hello", "1.0-1"), built(mirrors.config, "other", "3"))
    done = mirrors.sync()
    assert not done.fault, done
    assert mirrors.shown() == {"europe": 1, "america": 1}
    assert mirrors.faults() == []
    put(mirrors.config, built(mirrors.config, "hello", "1.0-2"))
    second = mirrors.sync()
    print(second.model_dump_json(indent=1))
    assert not second.fault
    assert mirrors.shown() == {"europe": 2, "america": 2}
    assert mirrors.faults() == []
    print(mirrors.sync())
