"""The store: entries are whole or absent, verified when read, and made by exactly one process at a time."""

import hashlib
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from pkgci import locks, store
from pkgci.config import Config
from pkgci.errors import InfrastructureError, PackageError, RequestError
from pkgci.store import Entry, Lease, Record, Store, describe

KEY = hashlib.sha256(b"one").hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    directory = tmp_path / "etc"
    directory.mkdir()
    (directory / "config.yaml").write_text(f"paths: {{data: {tmp_path / 'data'}}}\n")
    return Config(directory)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    path = tmp_path / "built" / "hello_1_amd64.deb"
    path.parent.mkdir()
    path.write_bytes(b"a package" * 1000)
    return path


def record(*files: Path, key: str = KEY) -> Record:
    return Record(
        key=key,
        algorithm=1,
        package="hello",
        version="1",
        target="bookworm-amd64",
        format="deb",
        packages=(),
        files=tuple(map(describe, files)),
    )


def make(store: Store, built: Path, key: str = KEY) -> Entry:
    with store.claim(key, wait=0) as lease:
        assert isinstance(lease, Lease)
        return store.deliver(lease, record(built, key=key), [built])


def leftovers(store: Store) -> list[Path]:
    return list((store.directory / "new").iterdir())


def test_an_entry_is_found_with_its_record_and_files(config, built):
    assert Store(config).lookup(KEY) is None
    made = make(Store(config), built)
    found = Store(config).lookup(KEY)
    assert found == made
    assert (found.directory / built.name).read_bytes() == built.read_bytes()
    assert (found.directory / built.name).stat().st_mode & 0o777 == 0o444
    assert leftovers(Store(config)) == []


def test_a_claim_of_what_exists_is_the_entry(config, built):
    made = make(Store(config), built)
    with Store(config).claim(KEY, wait=0) as claimed:
        assert claimed == made


def test_an_entry_with_a_flipped_byte_is_logged_not_used_and_made_again(config, built, caplog):
    damaged = make(Store(config), built).directory / built.name
    damaged.chmod(0o644)
    content = bytearray(damaged.read_bytes())
    content[100] ^= 1
    damaged.write_bytes(content)
    assert Store(config).lookup(KEY) is None
    assert f"{built.name} has another checksum" in caplog.text
    made = make(Store(config), built)
    assert Store(config).lookup(KEY) == made


def test_an_entry_that_lacks_a_file_is_not_used(config, built):
    (make(Store(config), built).directory / built.name).unlink()
    assert Store(config).lookup(KEY) is None


def test_files_that_are_not_as_recorded_are_not_delivered(config, built):
    store = Store(config)
    with store.claim(KEY, wait=0) as lease:
        described = record(built)
        built.write_bytes(b"something else")
        with pytest.raises(InfrastructureError, match=rf"not as in its record: {built.name}"):
            store.deliver(lease, described, [built])
    assert store.lookup(KEY) is None


@pytest.mark.parametrize("name", ["entry.json", ".hidden", "a b", "-option", "a\nb", "x" * 256])
def test_a_file_with_an_unsafe_name_is_the_packages_fault(tmp_path, name):
    with pytest.raises(PackageError, match="refused"):
        describe(tmp_path / name)


@pytest.mark.parametrize("key", ["", "../" + KEY[3:], KEY.upper(), KEY[1:], KEY + "\n"])
def test_what_is_no_key_is_refused(config, key):
    with pytest.raises(RequestError, match="no key of a build"):
        Store(config).lookup(key)


def _build(config: Config, built: Path, barrier, results) -> None:
    store = Store(config)
    barrier.wait()
    with store.claim(KEY, wait=30) as claimed:
        if isinstance(claimed, Lease):
            store.deliver(claimed, record(built), [built])
            results.put("built")
        else:
            results.put("taken")


def test_of_several_processes_at_once_one_builds_and_the_others_take(config, built):
    barrier, results = FORK.Barrier(5), FORK.Queue()
    processes = [FORK.Process(target=_build, args=(config, built, barrier, results)) for _ in range(5)]
    for process in processes:
        process.start()
    outcomes = sorted(results.get(timeout=30) for _ in processes)
    for process in processes:
        process.join(30)
    assert outcomes == ["built"] + ["taken"] * 4
    assert leftovers(Store(config)) == []


def _hold(config: Config, held) -> None:
    with Store(config).claim(KEY, wait=0) as lease:
        (lease.directory / "half").mkdir()
        held.set()
        signal.pause()


@pytest.fixture
def owner(config):
    """A process that holds the lease of KEY."""
    held = FORK.Event()
    process = FORK.Process(target=_hold, args=(config, held))
    process.start()
    assert held.wait(30)
    yield process
    process.kill()
    process.join()


def test_waiting_ends_with_a_line_that_names_the_owner(config, owner):
    said = []
    with (
        pytest.raises(InfrastructureError, match=rf"still being built by process {owner.pid} on "),
        Store(config).claim(KEY, wait=0, on_wait=said.append),
    ):
        pass
    assert len(said) == 1
    assert f"{KEY[:12]} is being built by process {owner.pid} on " in said[0]


def test_a_lease_is_taken_over_when_its_owner_is_killed(config, built, owner):
    results = Store(config)
    with results.claim(KEY, wait=30, on_wait=lambda _: owner.kill()) as lease:
        assert isinstance(lease, Lease)
        assert [path.name for path in lease.directory.iterdir()] == [locks.OWNER]
        entry = results.deliver(lease, record(built), [built])
    assert results.lookup(KEY) == entry


def test_the_claim_of_another_key_does_not_wait(config, built, owner):
    assert owner.is_alive()
    assert make(Store(config), built, OTHER).record.key == OTHER


def test_what_a_killed_process_left_is_removed_by_the_claim_of_another_key(config, built, owner):
    owner.kill()
    owner.join()
    make(Store(config), built, OTHER)
    assert leftovers(Store(config)) == []


def _deliver_and_die(config: Config, built: Path, step: int) -> None:
    calls = []

    def dying(call):
        def wrapped(*arguments):
            calls.append(call)
            if len(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)

        return wrapped

    os.fsync, os.rename, store.shutil.copyfile = dying(os.fsync), dying(os.rename), dying(store.shutil.copyfile)
    make(Store(config), built)


def test_killed_at_any_step_of_a_delivery_there_is_a_whole_entry_or_none(config, built):
    for step in range(1, 20):
        process = FORK.Process(target=_deliver_and_die, args=(config, built, step))
        process.start()
        process.join(30)
        if process.exitcode == 0:
            break
        store = Store(config)
        assert process.exitcode == -signal.SIGKILL
        present = (store.directory / KEY[:2] / KEY).exists()
        assert (store.lookup(KEY) is not None) == present
        with store.claim(KEY, wait=0) as claimed:
            entry = claimed if isinstance(claimed, Entry) else store.deliver(claimed, record(built), [built])
        store.sweep()
        assert leftovers(store) == []
        assert store.remove(entry.record.key, before=float("inf"))
    assert step > 6


def test_an_entry_is_removed_only_when_unreferenced_and_old(config, built):
    store = Store(config)
    make(store, built)
    old = store.lookup(KEY).directory
    os.utime(old, (1000, 1000))
    assert list(store.unreferenced(set(), before=2000)) == [KEY]
    assert list(store.unreferenced({KEY}, before=2000)) == []
    assert list(store.unreferenced(set(), before=1000)) == []
    assert store.lookup(KEY)  # a use
    assert not store.remove(KEY, before=2000)
    os.utime(old, (1000, 1000))
    assert store.remove(KEY, before=2000)
    assert store.lookup(KEY) is None


def test_an_entry_that_is_being_read_is_not_removed(config, built):
    entry = make(Store(config), built)
    with store.locked(entry.directory, shared=True):
        assert not Store(config).remove(KEY, before=float("inf"))
