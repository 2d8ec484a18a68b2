"""A sync: all mirrors of a released repository go to its current generation together, or none does.

What is new is sent to every mirror first, and verified there; then every mirror's pointer is switched. When a mirror
cannot be prepared none is switched; when a switch fails, all are taken back. Whoever is killed meanwhile leaves mirrors
that are whole each; the next run brings them together.

Only what has changed since the generation that a mirror shows is looked at. A mirror that is not as the last run left it,
or all of them when asked for, is gone through as a whole.

Who finds a sync at work leaves it a wish and goes: that one begins again then, so that nobody waits and nothing is lost.
A sync that is stopped begins no switch; one that it has begun comes to its end.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pkgci import artifacts
from pkgci.config import Config, Mirror
from pkgci.errors import InfrastructureError, PkgciError
from pkgci.locks import locked, read_owner, write_owner
from pkgci.mirrors.records import Kept, State
from pkgci.mirrors.remote import Remote, Seen
from pkgci.mirrors.stop import Stop
from pkgci.mirrors.tree import lay_out, lay_out_pointer
from pkgci.released.records import Generation, ReleasedBuild, difference
from pkgci.released.repository import CURRENT, Repository

log = logging.getLogger(__name__)

RECORD = "generation.json"
NEVER = datetime.fromtimestamp(0, UTC)


class Copy:
    """A mirror in a transaction: what is on it, what was done to it, and what went wrong (`fault`)."""

    def __init__(
        self, repository: Repository, name: str, mirror: Mirror, place: Path, started: float, stop: Stop
    ) -> None:
        self.repository, self.name, self.mirror, self.stop = repository, name, mirror, stop
        self.remote = Remote(name, mirror, repository.codename, place / "scratch" / name, stop)
        self._path = place / f"{name}.json"
        self.state = _state(self._path)
        self.seen: Seen | None = None
        self.shows: int | None = None
        self.started = started
        self.seconds = 0.0
        self.phases: list[artifacts.Phase] = []
        self.bytes = 0
        self.fault = ""
        self.new = False
        self.whole = False
        self.changes: tuple[dict[str, ReleasedBuild], dict[str, ReleasedBuild]] = ({}, {})

    def prepare(self, generation: Generation, whole_after: timedelta | None) -> None:
        """Send what the mirror lacks of a generation, and verify it there; `whole_after` is as of `sync`."""
        with self.phase("ask what its readers see"):
            sees = self.remote.served(f"{CURRENT}/{RECORD}")
        left = self.state.generation
        if not (self.state.settled and self._is(sees, left)):
            self._prepare(self._look(), sees, generation, whole_after)
            return
        try:
            self._prepare(Seen(f"generations/{left}", None, temporary=True), sees, generation, whole_after)
        except InfrastructureError:
            seen = self._look()
            if seen.temporary and seen.number == left:
                raise
            self._prepare(seen, sees, generation, whole_after)

    def _prepare(self, seen: Seen, sees: bytes | None, generation: Generation, whole_after: timedelta | None) -> None:
        self.seen = seen
        self.shows = since = seen.number
        number = generation.number
        if since > number:
            raise InfrastructureError(
                f"it shows generation {since}, newer than {number}; if {self.repository.name} was begun anew, remove "
                f"{self.repository.codename}/ there"
            )
        known = self.state.known(since) and self._is(sees, since)
        last = self.state.whole
        stale = last is None or (whole_after is not None and datetime.now(UTC) - last >= whole_after)
        self.whole = stale or not seen.temporary or not known
        if known and not self.state.settled:
            # where a killed run, or a pointer that could not be taken back, had led it to
            self._note(self.state.switched(since, 0, datetime.now(UTC)))
        if since == number and not self.whole:
            return
        self.changes = difference(map(self.repository.generation, range(since + 1, number + 1)))
        builds = self.changes[0]
        if self.whole:
            builds = difference(map(self.repository.generation, range(1, number + 1)))[0]
            self._adopt(seen if seen.generations is not None else self._look(), since, number)
            with self.phase("make room"):
                self.remote.make_room()
        tree = self.remote.fresh("tree")
        with self.phase("lay out"):
            files = lay_out(self.repository, generation, builds.values(), self.remote.url, tree)
        # first: whoever is killed while it is sent leaves no file that nobody knows of
        self._note(self.state.sending(number, files, datetime.now(UTC)))
        size = sum(path.lstat().st_size for path in tree.rglob("*"))
        with self.phase("send"):
            self.bytes = self.remote.send(tree, size)
        with self.phase("compare"):
            self.remote.compare(tree, size)
        with self.phase("look for it as a reader"):
            self.remote.check_served(f"generations/{number}/{RECORD}", self._log(number).read_bytes())
        if self.whole:
            self._note(self.state.model_copy(update={"whole": datetime.now(UTC)}))
        self.new = since != number
        if not self.new:
            self._note(self.state.switched(number, 0, datetime.now(UTC)))
            return
        # before anything is switched: our own disk may be full by then
        self._forth, self._back = (self.remote.fresh(name) for name in ("forth", "back"))
        lay_out_pointer(self.repository.codename, f"generations/{number}", self._forth)
        if seen.pointer is not None:
            lay_out_pointer(self.repository.codename, seen.pointer, self._back)

    def switch(self, number: int) -> None:
        """Let the mirror's readers see the generation that was prepared."""
        self._note(self.state.model_copy(update={"prepared": number}))
        self.shows = None
        with self.phase("switch"):
            self._point(self._forth, number)
        self._note_if_possible(self.state.switched(number, 0, datetime.now(UTC)))

    def take_back(self, number: int) -> None:
        """Let the mirror's readers see again what they saw before they were led to a generation, or may have been."""
        assert self.seen is not None
        self._note_if_possible(self.state.switched(self.seen.number, number, datetime.now(UTC)))
        if self.seen.pointer is None:
            self.remote.remove([CURRENT])
            self.shows = 0
        else:
            self._point(self._back, self.seen.number)

    def clean(self) -> None:
        """Remove what only generations had that no reader can still be at."""
        kept = sorted(self.state.kept, key=lambda one: one.number)
        before = datetime.now(UTC) - timedelta(days=self.mirror.keep_days)
        former = [one for one in kept if one.number != self.shows][: -self.mirror.keep_generations]
        gone = [one for one in former if one.replaced and one.replaced < before]
        if not gone:
            return
        stay = [one for one in kept if one not in gone]
        needed = {name for one in stay for name in one.files}
        # what one of them needs may not be known
        files = {name for one in gone for name in one.files} - needed if all(one.files for one in stay) else set()
        names = [f"generations/{one.number}" for one in gone] + sorted(files) + self._dead(gone, stay)
        with self.phase("clean"):
            self.remote.remove(names)
        self._note(self.state.model_copy(update={"kept": tuple(stay)}))
        log.info("%s: %s former generations removed", self.name, len(gone))

    def _dead(self, gone: Sequence[Kept], stay: Sequence[Kept]) -> list[str]:
        """Return the directories of the pool with builds that only generations have which go."""
        first = min(one.number for one in [*gone, *stay])
        last = max(one.number for one in [*gone, *stay])
        events: dict[str, list[tuple[int, bool]]] = {}
        builds: dict[str, ReleasedBuild] = {}
        for number in range(first + 1, last + 1):
            record = self.repository.generation(number)
            for build in [*record.removed, *record.added]:
                events.setdefault(build.key, []).append((number, build in record.added))
                builds[build.key] = build

        def had(one: Kept, key: str) -> bool:
            before = [there for number, there in events[key] if number <= one.number]
            # what was removed first had been there
            return before[-1] if before else not events[key][0][1]

        dead = [key for key in events if not any(had(one, key) for one in stay)]
        return [
            self.repository.directory(builds[key].source, key) for key in dead if any(had(one, key) for one in gone)
        ]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note how long a part of the work takes; it is not begun when the sync is stopped."""
        self.stop.check()
        start = time.monotonic()
        try:
            yield
        finally:
            at, took = start - self.started, time.monotonic() - start
            self.phases.append(artifacts.Phase(name=name, start=round(at, 3), seconds=round(took, 3)))

    def _look(self) -> Seen:
        with self.phase("look at it"):
            return self.remote.look()

    def _is(self, served: bytes | None, number: int) -> bool:
        """Return whether what a mirror serves is the record of one of our generations."""
        # who begins a repository anew has others of the same numbers
        return served is not None and self._log(number).exists() and served == self._log(number).read_bytes()

    def _point(self, tree: Path, number: int) -> None:
        self.remote.point(tree)
        if number:
            self.remote.check_served(f"{CURRENT}/{RECORD}", self._log(number).read_bytes())
        self.shows = number

    def _log(self, number: int) -> Path:
        return self.repository.root / "log" / f"{number}.json"

    def _adopt(self, seen: Seen, since: int, number: int) -> None:
        """Note the generations that are there and that nobody knows of here any more, and that all is to be gone through."""
        known = {one.number for one in self.state.kept}
        now = datetime.now(UTC)
        found = [
            Kept(
                number=one,
                replaced=None if one == since else now,
                files=tuple(self.repository.form.shared_files(self.repository.root / "generations" / str(one))),
            )
            for one in sorted((seen.generations or frozenset()) - known)
            if one <= number
        ]
        self._note(self.state.model_copy(update={"whole": None, "kept": (*self.state.kept, *found)}))

    def _note(self, state: State) -> None:
        state.write(self._path)
        self.state = state

    def _note_if_possible(self, state: State) -> None:
        """Note what holds in any case; when that fails the next run finds it out, as after one that was killed."""
        self.state = state
        try:
            self._note(state)
        except OSError as error:
            log.warning("%s: cannot note where it was led to: %s", self.name, error)


def sync(
    repository: Repository, whole_after: timedelta | None = None, stop: Stop | None = None
) -> list[artifacts.SyncedRepository]:
    """Bring all mirrors of a released repository to its current generation, or leave that to the sync that is at work.

    Args:
        repository: the repository.
        whole_after: a mirror that was last gone through as a whole so long ago is so again; None for none.
        stop: what may stop it.

    Returns:
        What was done, each with `fault` when it did not succeed: more than once when somebody wished for it meanwhile.

    Raises:
        OSError: our file system fails.
    """
    stop = stop or Stop()
    place = repository.config.data / "mirrors" / repository.release / repository.codename
    wishes = place / "wishes"
    wishes.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    # first: who is at work sees it before it ends, or has ended when we try
    (wishes / (str(int(whole_after.total_seconds())) if whole_after is not None else "changes")).touch()
    done: list[artifacts.SyncedRepository] = []
    while any(wishes.iterdir()) and not stop.called:
        with locked(place, wait=False) as held:
            if not held:
                break
            write_owner(place)
            # before the repository is looked at: what is published later comes with a wish of its own
            names = [path.name for path in wishes.iterdir()]
            for name in names:
                (wishes / name).unlink()
            if done:
                # with whose wish the configuration may have changed
                config = Config(repository.config.directory)
                repository = Repository(config, repository.release, repository.codename)
            ages = [timedelta(seconds=int(name)) for name in names if name.isdecimal()]
            done.append(_sync(repository, min(ages, default=None), place, stop))
            start = time.monotonic()
    if not done:
        notice = "stopped" if stop.called else f"left to the sync that is at work: {read_owner(place)}"
        log.info("%s: %s", repository.name, notice)
        done.append(_said(repository, 0, [], start, notice=notice))
    return done


def _sync(repository: Repository, whole_after: timedelta | None, place: Path, stop: Stop) -> artifacts.SyncedRepository:
    start = time.monotonic()
    shutil.rmtree(place / "scratch", ignore_errors=True)
    generation = repository.current()
    if generation is None:
        return _said(repository, 0, [], start, notice="nothing is published yet")
    mirrors = repository.config.release(repository.release).mirrors
    copies = [Copy(repository, name, one, place, start, stop) for name, one in mirrors.items() if not one.aside]
    notice = "; ".join(f"{name} is aside: {one.aside}" for name, one in mirrors.items() if one.aside)
    fault = _transact(copies, generation, whole_after, stop)
    shutil.rmtree(place / "scratch", ignore_errors=True)
    return _said(repository, generation.number, copies, start, notice=notice, fault=fault)


def _transact(copies: Sequence[Copy], generation: Generation, whole_after: timedelta | None, stop: Stop) -> str:
    """Do the steps; return why they did not succeed, or nothing."""
    _together(copies, lambda copy: copy.prepare(generation, whole_after))
    bad = [copy for copy in copies if copy.fault]
    if bad:
        said = f"no pointer was switched, since {_faults(bad)}; {_shown(copies)}"
        # who waits for another mirror for days must not run full
        return "; ".join(filter(None, [said, _clean([copy for copy in copies if not copy.fault])]))
    asked = [copy for copy in copies if copy.new]
    with stop.shielded() as held:
        if asked and not held:
            return f"no pointer was switched, since the sync was stopped; {_shown(copies)}"
        try:
            _together(asked, lambda copy: copy.switch(generation.number))
        except BaseException:
            _take_back(asked, generation.number)
            raise
        bad = [copy for copy in asked if copy.fault]
        if bad:
            why = _faults(bad)
            return f"not switched: {why}; {_take_back(asked, generation.number)}; {_shown(copies)}"
    return _clean(copies)


def _clean(copies: Sequence[Copy]) -> str:
    """Remove what is old on mirrors; return where that failed."""
    _together(copies, Copy.clean)
    return "; ".join(f"former generations stay on {copy.name}: {copy.fault}" for copy in copies if copy.fault)


def _take_back(copies: Sequence[Copy], number: int) -> str:
    """Take back each mirror's pointer to a generation, and say how that went."""
    for copy in copies:
        copy.fault = ""
    _together(copies, lambda copy: copy.take_back(number))
    said = [f"could not be taken back: {_faults([copy])}" for copy in copies if copy.fault]
    back = [copy.name for copy in copies if not copy.fault]
    said += [f"taken back: {', '.join(back)}"] if back else []
    for line in said:
        log.info("%s", line)
    return "; ".join(said)


def _together(copies: Iterable[Copy], step: Callable[[Copy], None]) -> None:
    """Do a step for all mirrors at once, to the end, whatever happens to one of them."""

    def one(copy: Copy) -> None:
        try:
            step(copy)
        except (PkgciError, OSError) as error:
            copy.fault = str(error)
        copy.seconds = time.monotonic() - copy.started

    copies = list(copies)
    if not copies:
        return
    with ThreadPoolExecutor(max_workers=len(copies)) as pool:
        list(pool.map(one, copies))


def _state(path: Path) -> State:
    """Return what is known of a mirror; what cannot be read is not known, and costs going through it as a whole."""
    try:
        return State.read(path) if path.exists() else State()
    except InfrastructureError as error:
        log.warning("%s", error)
        return State()


def _said(
    repository: Repository, number: int, copies: Iterable[Copy], start: float, *, notice: str, fault: str = ""
) -> artifacts.SyncedRepository:
    return artifacts.SyncedRepository(
        release=repository.release,
        codename=repository.codename,
        generation=number,
        started=datetime.now(UTC) - timedelta(seconds=time.monotonic() - start),
        seconds=round(time.monotonic() - start, 3),
        notice=notice,
        fault=fault,
        mirrors=tuple(
            artifacts.SyncedMirror(
                name=copy.name,
                before=copy.seen.number if copy.seen else None,
                after=copy.shows,
                whole=copy.whole,
                seconds=round(copy.seconds, 3),
                phases=tuple(copy.phases),
                bytes=copy.bytes,
                packages=_changed(*copy.changes) if copy.new and copy.shows == number else (),
                fault=copy.fault,
            )
            for copy in copies
        ),
    )


def _changed(
    added: Mapping[str, ReleasedBuild], removed: Mapping[str, ReleasedBuild]
) -> tuple[artifacts.PackageChange, ...]:
    """Return the packages by which two generations differ."""
    before, after = (
        {(one.name, one.architecture): one.version for build in builds.values() for one in build.packages}
        for builds in (removed, added)
    )
    return tuple(
        artifacts.PackageChange(
            name=name, architecture=architecture, before=before.get(one, ""), after=after.get(one, "")
        )
        for one in sorted(before.keys() | after.keys())
        for name, architecture in [one]
        if before.get(one) != after.get(one)
    )


def _faults(copies: Iterable[Copy]) -> str:
    return "; ".join(f"{copy.name}: {copy.fault}" for copy in copies)


def _shown(copies: Iterable[Copy]) -> str:
    shown = ", ".join(f"{copy.name} {'unknown' if copy.shows is None else copy.shows}" for copy in copies)
    return f"their generations: {shown}"
