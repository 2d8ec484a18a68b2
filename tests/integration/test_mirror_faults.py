"""Mirrors when a sync is killed, the network cut, a mirror broken: each is whole for a reader, and the next run succeeds."""

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest
from clients import run
from injected import killed_at, with_own_disk
from mirrors import Fleet, fleet
from released import built, put
from servers import Line
from trees import free_port

from pkgci.artifacts import Sync
from pkgci.mirrors import remote, transaction
from pkgci.mirrors.records import State


@pytest.fixture
def mirrors(tmp_path: Path, gnupg):
    with fleet(tmp_path, gnupg) as made:
        yield made


@pytest.fixture
def two(mirrors: Fleet) -> Fleet:
    """Two mirrors at generation 1, with a second one published."""
    mirrors.rsyncd("europe")
    mirrors.rsyncd("america")
    put(mirrors.config, built(mirrors.config, "hello", "1"), built(mirrors.config, "other", "1"))
    mirrors.synced()
    put(mirrors.config, built(mirrors.config, "hello", "2"))
    return mirrors


def killed_everywhere(fleet: Fleet, work: Callable[[], object], every: int) -> tuple[int, set[tuple[int, ...]]]:
    """Kill `work`, a sync to generation 2, at every so many-th of its fault points.

    After each the mirrors are whole for a reader, the next run succeeds, and nothing is left over. Returns how many points
    there are, and what was seen of the mirrors' generations.
    """
    saved, points, seen = fleet.place / "saved", None, set()
    places = [fleet.config.data / "mirrors", fleet.place / "mirrors"]
    for place in places:
        shutil.copytree(place, saved / place.parent.name, symlinks=True)
    for number in count(1, every):
        for place in places:
            shutil.rmtree(place)
            shutil.copytree(saved / place.parent.name, place, symlinks=True)
        points = killed_at(number, work)
        fleet.idle()
        assert fleet.faults() == [], number
        shown = fleet.shown()
        assert set(shown.values()) <= {1, 2}, number
        seen.add(tuple(shown.values()))
        assert fleet.synced().generation == 2, number
        left = [path for files in fleet.files().values() for path in files if "/." in path.replace("/.new", "", 1)]
        assert left == [], number
        if points is not None:
            return points, seen
    raise AssertionError


# all points in soak
SOAK = "PKGCI_KILLS" in os.environ


def test_a_sync_is_killed_at_its_fault_points(two: Fleet):
    points, seen = killed_everywhere(two, two.sync, 1 if SOAK else 9)
    assert points > 200
    assert seen >= {(1, 1), (2, 2)}


def test_taking_back_is_killed_at_its_fault_points(two: Fleet, monkeypatch):
    def fail(self: remote.Remote, path: str, _content: bytes) -> None:
        if path.startswith("current/") and self.name == "america" and os.getpid() != parent:
            raise remote.InfrastructureError("not seen")

    parent = os.getpid()
    monkeypatch.setattr(remote.Remote, "check_served", fail)
    points, seen = killed_everywhere(two, two.sync, 1 if SOAK else 13)
    assert points > 200
    assert seen >= {(1, 1)}


@pytest.fixture
def line(two: Fleet) -> Iterator[Line]:
    """The line to america, with what a sync says over it in `usual`."""
    made = Line(two.rsyncds["america"].port)
    two.add("america", rsync=f"rsync://127.0.0.1:{made.port}/released/")
    two.synced()
    made.usual = list(made.lengths)
    yield made
    made.end()


def versions(fleet: Fleet) -> Iterator[None]:
    """Publish one more version each time."""
    for number in count(3):
        put(fleet.config, built(fleet.config, "hello", str(number)))
        yield


@pytest.mark.parametrize("kind", ["cut", "garbage"])
def test_the_line_is_cut_or_says_garbage_at_every_step(two: Fleet, line: Line, kind: str):
    assert len(line.usual) >= 3
    publish = versions(two)
    for connection, length in enumerate(line.usual):
        for at in {0, length // 2, length - 1}:
            next(publish)
            line.restart((kind, connection, at))
            before = two.shown()
            done = two.sync()
            two.idle()
            assert two.faults() == []
            if done.fault:
                assert "america" in done.fault
                shown = two.shown()
                assert shown == before or str(shown["america"]) in done.fault, (connection, at)
            line.restart()
            two.synced()


def test_a_mirror_that_falls_silent_is_given_up(two: Fleet, line: Line, monkeypatch):
    monkeypatch.setattr(remote, "SECONDS", 5)
    next(versions(two))
    line.restart(("silent", 1, line.usual[1] // 2))
    assert re.search("america: cannot (send to|compare) it: ", two.failed())
    line.restart()
    two.synced()


def test_what_answers_on_the_port_is_no_rsync_daemon(two: Fleet):
    def answer(server: socket.socket, said: bytes, times: int) -> None:
        with suppress(OSError):
            while True:
                client, _ = server.accept()
                with suppress(OSError):
                    for _ in range(times):
                        client.sendall(said)
                client.close()

    before = two.settings["america"]["rsync"]
    for said, times in [
        (b"", 0),
        (os.urandom(4096), 100),
        (b"@RSYNCD: 31.0\n" + os.urandom(999), 1),
        (b"\x1b[2J\n", 9),
    ]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            threading.Thread(target=answer, args=(server, said, times), daemon=True).start()
            two.add("america", rsync=f"rsync://127.0.0.1:{server.getsockname()[1]}/released/")
            fault = two.failed()
            assert fault.isprintable()
            assert "america: cannot look at it" in fault
            server.shutdown(socket.SHUT_RDWR)
    assert two.shown() == {"europe": 1, "america": 1}
    two.add("america", rsync=before)
    two.synced()


def test_another_host_key_than_the_configured_one_is_refused(mirrors: Fleet):
    mirrors.rsyncd("europe")
    sshd = mirrors.sshd("america")
    put(mirrors.config, built(mirrors.config, "hello", "1"))
    other = (sshd.directory / "other.pub").read_text().strip()
    mirrors.add("america", ssh=sshd.account(host_key=other))
    assert "america: cannot look at it: " in (fault := mirrors.failed())
    assert "HOST IDENTIFICATION HAS CHANGED" in fault
    assert mirrors.shown() == {"europe": 0, "america": 0}
    mirrors.add("america", ssh=sshd.account())
    mirrors.synced()


@contextmanager
def inside(place: Path, gnupg: tuple[str, str]) -> Iterator[Fleet]:
    """Two mirrors at generation 1 in a process with a disk of its own for one of them, or for both."""
    with fleet(place, gnupg) as made:
        made.rsyncd("europe")
        made.rsyncd("america")
        put(made.config, built(made.config, "hello", "1"))
        made.synced()
        yield made


WHICH = {"of one mirror": "mirrors/america", "of both": "mirrors"}


@pytest.mark.parametrize("which", WHICH)
def test_a_full_disk_leaves_both_where_they_are(tmp_path, gnupg, which: str):
    disk = tmp_path / WHICH[which]

    def work() -> None:
        with inside(tmp_path, gnupg) as two:
            publish, outcomes = versions(two), set()
            for blocks in (0, 1, 4, 16, 64) if which == "of both" else (0, 1, 2, 4, 8, 16, 64):
                next(publish)
                free = os.statvfs(disk).f_bavail * 4096
                (disk / "ballast").write_bytes(b"x" * max(0, free - blocks * 4096))
                before = two.shown()
                done = two.sync()
                assert two.faults() == []
                outcomes.add(bool(done.fault))
                if done.fault:
                    assert "No space left" in done.fault
                    assert two.shown() == before
                (disk / "ballast").unlink()
                two.synced()
            assert outcomes == {False, True}

    with_own_disk(disk, "4m", work)


@pytest.mark.parametrize("which", WHICH)
def test_a_read_only_file_system_leaves_both_where_they_are(tmp_path, gnupg, which: str):
    disk = tmp_path / WHICH[which]

    def work() -> None:
        with inside(tmp_path, gnupg) as two:
            next(versions(two))
            run("mount", "-o", "remount,ro", disk)
            fault = two.failed()
            assert "america: cannot send to it: " in fault
            assert ("europe: cannot send to it: " in fault) == (which == "of both")
            assert "Read-only file system" in fault
            assert set(two.shown().values()) == {1}
            run("mount", "-o", "remount,rw", disk)
            two.synced()

    with_own_disk(disk, "4m", work)


@pytest.mark.parametrize("refusing", [["america"], ["america", "europe"]])
def test_permission_denied_leaves_both_where_they_are_and_deletes_nothing(two: Fleet, refusing: list[str]):
    before = two.files()
    for name in refusing:
        two.rsyncds[name].end()
        two.rsyncds[name].start({"uid": "nobody", "gid": "nogroup"} if os.getuid() == 0 else {"read only": "yes"})
    fault = two.failed()
    assert [name for name in two.settings if f"{name}: cannot send to it: " in fault] == sorted(refusing, reverse=True)
    assert two.files()["america"] == before["america"]
    # not even to be read: nothing is known of its pointer, which is not taken for none
    for name in refusing:
        two.tree(name).chmod(0o700 if os.getuid() == 0 else 0)
    done = two.sync()
    for name in refusing:
        two.tree(name).chmod(0o755)
        assert f"{name}: cannot look at it: " in done.fault
        assert f"{name} unknown" in done.fault
    assert two.files()["america"] == before["america"]
    for name in refusing:
        two.rsyncds[name].end()
        two.rsyncds[name].start()
    two.synced()


def lead_nowhere(tree: Path) -> None:
    (tree / "current").unlink()
    (tree / "current").symlink_to("generations/77/../nowhere")


CHANGES = {
    "the pointer is removed": lambda tree: (tree / "current").unlink(),
    "the pointer leads nowhere": lead_nowhere,
    "everything is removed": shutil.rmtree,
    "what rsync writes to is removed": lambda tree: (tree / ".new").rmdir(),
    "what its readers are led to is removed": lambda tree: shutil.rmtree(tree / "generations/2"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_mirror_that_was_changed_by_hand_is_gone_through_as_a_whole(two: Fleet, change: str):
    two.synced()
    CHANGES[change](two.tree("america") / "bookworm")
    next(versions(two))
    done = two.synced()
    assert {one.name: one.whole for one in done.mirrors} == {"europe": False, "america": True}


def test_what_readers_are_led_to_is_looked_for_also_when_nothing_is_new(two: Fleet, monkeypatch):
    two.synced()
    shutil.rmtree(two.tree("america") / "bookworm/generations/2")
    done = two.synced()
    assert {one.name: one.whole for one in done.mirrors} == {"europe": False, "america": True}
    # it has to be gone through until that came to its end
    shutil.rmtree(two.tree("america") / "bookworm/generations/2")
    with monkeypatch.context() as patch:
        patch.setattr(transaction, "lay_out", lambda *_: (_ for _ in ()).throw(OSError("no")))
        assert "america: no" in two.sync().fault
    two.synced()
    monkeypatch.setattr(remote, "SEEN_SECONDS", 0.3)
    two.add("america", url=f"http://127.0.0.1:{free_port()}/")
    assert "america: its web server does not answer: " in two.failed()


def test_a_repository_that_was_begun_anew_reaches_mirrors_that_show_the_same_number(two: Fleet):
    two.synced()
    for place in ("repositories", "released"):
        shutil.rmtree(two.config.data / place)
    for name in ("another", "third"):
        put(two.config, built(two.config, name, "1"))
    two.synced()
    log = two.config.data / "repositories/rocket/bookworm/log/2.json"
    for name in two.settings:
        assert (two.tree(name) / "bookworm/current/generation.json").read_bytes() == log.read_bytes()


def test_what_readers_have_left_only_now_stays_though_it_was_sent_long_ago(two: Fleet):
    for name in two.settings:
        two.add(name, keep_generations=1)
    child = os.fork()
    if not child:
        point = transaction.Copy._point

        def point_of_europe(self: transaction.Copy, *words) -> None:
            if self.name == "america":
                threading.Event().wait()
            point(self, *words)
            os.kill(os.getpid(), signal.SIGKILL)

        transaction.Copy._point = point_of_europe
        two.sync()
        os._exit(1)
    os.waitpid(child, 0)
    assert two.shown() == {"europe": 2, "america": 1}
    publish, away = versions(two), two.rsyncds["america"]
    next(publish)
    away.end()
    two.failed()
    for name in two.settings:
        two.age(name)
    away.start()
    next(publish)
    two.synced()
    # 3 was never shown
    assert two.generations("europe") == [2, 3, 4]
    two.age("europe")
    two.synced()
    next(publish)
    two.synced()
    assert two.generations("europe") == [4, 5]


def test_who_waits_for_another_mirror_does_not_run_full(two: Fleet):
    two.rsyncds["america"].end()
    two.add("europe", keep_generations=1)
    publish = versions(two)
    for _ in range(2):
        two.failed()
        next(publish)
    two.age("europe")
    two.failed()
    assert two.generations("europe") == [1, 4]
    assert two.unnamed("europe") == set()


def test_what_is_known_of_a_mirror_is_lost_and_nothing_is_left_over(two: Fleet):
    two.add("europe", keep_generations=1)
    two.synced()
    two.state("europe").unlink()
    publish = versions(two)
    next(publish)
    two.synced()
    two.age("europe")
    next(publish)
    two.synced()
    assert two.generations("europe") == [3, 4]
    assert two.unnamed("europe") == set()


def test_our_own_disk_is_full_once_pointers_move(two: Fleet, monkeypatch):
    point, write, lay_out = transaction.Copy._point, State.write, transaction.lay_out_pointer
    full = threading.Event()

    def no_space(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def point_and_fill(self: transaction.Copy, *words) -> None:
        full.set()
        point(self, *words)

    monkeypatch.setattr(transaction.Copy, "_point", point_and_fill)
    monkeypatch.setattr(State, "write", lambda *words: no_space() if full.is_set() else write(*words))
    monkeypatch.setattr(transaction, "lay_out_pointer", lambda *words: no_space() if full.is_set() else lay_out(*words))
    with monkeypatch.context() as patch:
        check = remote.Remote.check_served

        def unseen(self: remote.Remote, path: str, content: bytes) -> None:
            if (self.name, path) == ("america", "current/generation.json") and b'"number": 2,' in content:
                raise remote.InfrastructureError("not seen")
            check(self, path, content)

        patch.setattr(remote.Remote, "check_served", unseen)
        assert "not switched: america: not seen; taken back: america, europe; " in two.failed()
    assert two.shown() == {"europe": 1, "america": 1}
    full.clear()
    # that a good switch cannot be noted is no reason to undo it
    done = two.sync()
    assert (done.fault, two.shown()) == ("", {"europe": 2, "america": 2})
    full.clear()
    monkeypatch.undo()
    two.synced()


def stopped(two: Fleet, ready: Callable[[], bool]) -> Sync:
    """Start the job, end it by SIGTERM once it is ready, and return what it left."""
    workspace = two.place / "workspace"
    workspace.mkdir()
    environment = {**os.environ, "PKGCI_CONFIG": str(two.config.directory), "RELEASE": "rocket"}
    words = [sys.executable, "-c", "from pkgci.cli import main; main()", "mirror-sync", "deb"]
    with subprocess.Popen(words, cwd=workspace, env=environment, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 30
        while not ready():
            assert process.poll() is None, process.stdout.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.terminate()
        said = process.stdout.read().decode()
    assert process.returncode == 143, said
    assert two.faults() == []
    done = Sync.read(workspace / "artifacts/sync.json")
    assert {one.name: one.after for one in done.repositories[0].mirrors} == two.shown()
    return done


def test_a_sync_that_is_stopped_while_it_sends_ends_at_once_and_switches_nothing(two: Fleet, line: Line):
    next(versions(two))
    line.restart(("silent", 0, 100))
    (done,) = stopped(two, lambda: bool(line.lengths and line.lengths[0])).repositories
    assert "no pointer was switched, since america: stopped" in done.fault
    assert done.seconds < 8
    assert set(two.shown().values()) == {2}
    line.restart()
    two.idle()
    two.synced()


def test_a_sync_that_is_stopped_between_two_switches_brings_them_to_their_end(two: Fleet, line: Line):
    next(versions(two))
    line.delay = 0.1
    line.restart()
    (done,) = stopped(two, lambda: two.shown() == {"europe": 3, "america": 2}).repositories
    assert (done.fault, two.shown()) == ("", {"europe": 3, "america": 3})


def test_the_line_by_ssh_is_cut_at_every_step(two: Fleet):
    sshd = two.sshd("asia")
    line = Line(sshd.port)
    two.add("asia", ssh=sshd.account(port=line.port))
    two.synced()
    publish = versions(two)
    next(publish)
    line.restart()
    two.synced()
    for connection, length in enumerate(list(line.lengths)):
        next(publish)
        line.restart(("cut", connection, length // 2))
        done = two.sync()
        assert two.faults() == []
        assert "asia" in done.fault or set(two.shown().values()) == {done.generation}
    line.restart()
    two.synced()
    line.end()


def test_the_line_to_a_web_server_is_cut_at_every_step(two: Fleet):
    line = Line(two.port)
    two.add("america", url=f"http://127.0.0.1:{line.port}/america/")
    two.synced()
    publish = versions(two)
    assert len(line.lengths) >= 3
    for connection, length in enumerate(list(line.lengths)):
        next(publish)
        line.restart(("cut", connection, length // 2))
        # it is asked again
        two.synced()
    line.end()


def test_what_was_damaged_in_the_pool_by_hand_is_mended_when_all_is_gone_through(two: Fleet):
    two.synced()
    tree = two.tree("america") / "bookworm"
    first, second = sorted((tree / "pool").glob("*/*/*.deb"))[-2:]
    stat = first.stat()
    first.write_bytes(b"x" * stat.st_size)
    os.utime(first, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second.unlink()
    next(iter((tree / "by-hash/SHA256").iterdir())).unlink()
    assert two.faults()
    two.synced(whole=True)


def test_something_else_in_the_place_of_the_pointer_is_left_alone(two: Fleet):
    pointer = two.tree("america") / "bookworm/current"
    pointer.unlink()
    pointer.mkdir()
    (pointer / "precious").touch()
    done = two.sync()
    assert "america: bookworm/current is no symbolic link there; remove what is in its place" in done.fault
    assert (pointer / "precious").exists()
    assert two.tree("europe").joinpath("bookworm/current").readlink() == Path("generations/1")
    shutil.rmtree(pointer)
    two.synced()


def test_a_web_server_that_does_not_serve_what_rsync_writes_is_found_before_any_switch(two: Fleet, monkeypatch):
    monkeypatch.setattr(remote, "SEEN_SECONDS", 0.3)
    url = two.settings["america"]["url"]
    two.add("america", url=url.replace("america", "elsewhere"))
    assert "america: its readers do not see generations/2/generation.json" in two.failed()
    assert set(two.shown().values()) == {1}
    two.add("america", url=url)
    two.synced()


def test_links_that_a_daemon_munges_are_found_and_every_pointer_is_taken_back(two: Fleet, monkeypatch):
    monkeypatch.setattr(remote, "SEEN_SECONDS", 0.3)
    rsyncd = two.rsyncds["america"]
    rsyncd.end()
    rsyncd.start({"munge symlinks": "yes"})
    done = two.sync()
    assert "america" in done.fault
    assert two.shown()["europe"] == 1
    rsyncd.end()
    rsyncd.start()
    two.synced()


def test_an_undo_that_fails_is_named_and_the_others_run(two: Fleet, monkeypatch):
    switch, back = transaction.Copy.switch, transaction.Copy.take_back

    def broken(self: transaction.Copy, number: int) -> None:
        switch(self, number)
        if self.name == "america":
            raise remote.InfrastructureError("the switch failed")

    def cut(self: transaction.Copy, number: int) -> None:
        if self.name == "america":
            raise remote.InfrastructureError("the line is dead")
        back(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(transaction.Copy, "switch", broken)
        patch.setattr(transaction.Copy, "take_back", cut)
        fault = two.failed()
    assert "not switched: america: the switch failed" in fault
    assert "could not be taken back: america: the line is dead; taken back: europe" in fault
    assert two.shown() == {"europe": 1, "america": 2}
    done = two.synced()
    assert {one.name: (one.before, one.whole) for one in done.mirrors} == {"europe": (1, False), "america": (2, False)}
