"""The job `retrigger-outstanding`: has open reviews tested again that were tested before a merge which concerns them.

Those are the reviews of the merged package's projects, and of packages that build-depend on what is released of it. Zuul is
asked by a comment, at a configured rate. What Gerrit says of a review decides: one whose vote, or our last comment, is newer
than the merge is left alone, so the same merge never asks twice, and no test that was asked for asks for another. A review
that was never tested is Zuul's own affair.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from pkgci import review
from pkgci.artifacts import Part, Record, Retriggered, Retriggers
from pkgci.change import Parameters
from pkgci.config import Config
from pkgci.errors import InfrastructureError, PkgciError, RequestError
from pkgci.locks import waiting
from pkgci.merged import Branch
from pkgci.released.repository import Repository
from pkgci.review import Open

log = logging.getLogger(__name__)

RECORD = "retrigger.json"
WAIT_SECONDS = 600
# a merge whose publication for another target takes longer is not waited for
SETTLE = timedelta(hours=1)
# an event may come again; later than that it does not
KEEP = timedelta(days=30)
NAMED = 3

Branched = tuple[str, str]  # project and branch


class Event(Part):
    """A merge that was published, as a job's parameters say."""

    project: str
    branch: str
    before: str
    commit: str
    noted: datetime

    def __str__(self) -> str:
        return f"{self.project} {self.branch} {self.commit[:12]}"


class Merge(Event):
    """The last merge of a project's branch that was published, as Git and Gerrit say.

    `merged` is when, by Gerrit's clock; `asked` are the reviews that a test was asked for because of it. When no review is
    left that it concerns, it is `done`.
    """

    release: str
    merged: datetime
    asked: tuple[int, ...] = ()
    done: bool = False


class Queued(Record):
    """`queue.json`, what one run leaves to the next: the merges, and when tests were asked for in the last hour.

    `events` are those that Git or Gerrit could not be asked about yet.
    """

    events: tuple[Event, ...] = ()
    merges: tuple[Merge, ...] = ()
    asked: tuple[datetime, ...] = ()


@dataclass
class _Wanted:
    """An open review that is to be tested again, and the merges because of which."""

    change: Open
    merges: dict[Branched, Merge] = field(default_factory=dict)

    def record(self) -> Retriggered:
        names = ", ".join(map(str, [*self.merges.values()][:NAMED])) + (", ..." if len(self.merges) > NAMED else "")
        about = {"number": self.change.number, "project": self.change.project, "branch": self.change.branch}
        return Retriggered(**about, reason=f"tested before the merge of {names}")


@dataclass
class _Found:
    """What is to be done: by number, the reviews; the merges that stay open, whatever is asked for; what could not be found."""

    wanted: dict[int, _Wanted] = field(default_factory=dict)
    open: set[Branched] = field(default_factory=set)
    waiting: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass
class _Released:
    """How far a merge is published: since when, which packages build-depend on it, and whether some target is behind."""

    since: datetime
    users: set[str] = field(default_factory=set)
    behind: bool = False


class _Queue:
    """What former runs have left, and this one leaves; a dry run leaves nothing."""

    def __init__(self, path: Path, now: datetime, dry: bool) -> None:
        known = Queued.read(path) if path.exists() else Queued()
        self.path, self.now, self.dry = path, now, dry
        self.events = [one for one in known.events if one.noted > now - KEEP]
        self.merges = {(one.project, one.branch): one for one in known.merges if one.noted > now - KEEP}
        self.recent = [time for time in known.asked if time > now - timedelta(hours=1)]

    def asked(self, one: _Wanted) -> None:
        """Note that a test was asked for."""
        self.recent.append(self.now)
        for key in one.merges:
            known = self.merges[key]
            self.merges[key] = known.model_copy(update={"asked": (*known.asked, one.change.number)})
        self.write()

    def write(self) -> None:
        if not self.dry:
            known = Queued(events=tuple(self.events), merges=tuple(self.merges.values()), asked=tuple(self.recent))
            known.write(self.path)


class _Reviews:
    """The open reviews of projects, asked for once a run."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._found: dict[str, list[Open]] = {}

    def of(self, projects: Sequence[str]) -> Iterator[Open]:
        """Yield those of some projects."""
        new: dict[str, list[Open]] = {name: [] for name in projects if name not in self._found}
        for change in review.open_changes(self.config, [*new]):
            new[change.project].append(change)
        self._found |= new
        for name in projects:
            yield from self._found[name]


def retrigger(config: Config, parameters: Parameters, now: datetime, artifacts: Path) -> Retriggers:
    """Ask for tests of the reviews that are due, as many as the rate allows; leave the rest to the next run.

    Args:
        config: the configuration.
        parameters: the job's parameters: the branch that has moved, if any; DRY_RUN.
        now: the time.
        artifacts: an existing directory, which takes `retrigger.json`.

    Returns:
        What is in `retrigger.json`.

    Raises:
        RequestError: it is not configured, or the commit is not merged.
        InfrastructureError: the review system or the remote fails, or a merge could not be looked at; the others were.
    """
    settings = config.settings.review
    if settings is None or settings.retrigger is None or config.settings.released is None:
        raise RequestError(
            f"{config.directory / 'config.yaml'}: `released`, and `review` with `retrigger`, are needed; they say what "
            "users build against, and how reviews are tested again"
        )
    # Gerrit's times are whole seconds
    now, dry = now.replace(microsecond=0), parameters.get("DRY_RUN") == "true"
    place = config.data / "retrigger"
    place.mkdir(parents=True, exist_ok=True)
    with waiting(place, "the queue of retriggers", seconds=WAIT_SECONDS, on_wait=log.info):
        queue = _Queue(place / "queue.json", now, dry)
        unknown = _take(config, queue, parameters, now)
        found = _look(config, queue.merges, now)
        # the reviews that people work on come first
        due = sorted(found.wanted.values(), key=lambda one: (one.change.updated, one.change.number), reverse=True)
        room = max(0, settings.retrigger.per_hour - len(queue.recent))
        left, asked, problems = due[room:], [], [*unknown, *found.problems]
        for one in due[:room]:
            about = one.record()
            try:
                if not dry:
                    review.ask_for_test(config, about.number, f"{settings.retrigger.comment} {about.reason}")
            except PkgciError as error:
                problems.append(f"change {about.number} of {about.project}: {error}")
                left.append(one)
                continue
            queue.asked(one)
            asked.append(about)
            log.info(
                "%s %s of %s: %s", "would ask for" if dry else "asked for", about.number, about.project, about.reason
            )
        undone = {key for one in left for key in one.merges} | found.open
        queue.merges |= {
            key: merge.model_copy(update={"done": True}) for key, merge in queue.merges.items() if key not in undone
        }
        queue.write()
    made = Retriggers(
        dry=dry,
        asked=tuple(asked),
        queued=tuple(one.record() for one in left),
        waiting=tuple(found.waiting),
        problems=tuple(problems),
    )
    made.write(artifacts / RECORD)
    for line in problems:
        log.warning("%s", line)
    if problems:
        raise InfrastructureError(f"{summary(made)}; {problems[0]}")
    return made


def summary(made: Retriggers) -> str:
    """Return in one line what was done."""
    done = "would be tested again" if made.dry else "are tested again"
    names = f"; not published for all targets yet: {', '.join(made.waiting)}" if made.waiting else ""
    return f"{len(made.asked)} reviews {done}, {len(made.queued)} wait{names}"


def _take(config: Config, queue: _Queue, parameters: Parameters, now: datetime) -> list[str]:
    """Note the merge that the parameters name, and those that could not be noted before; return what is still in the way.

    Raises:
        RequestError: the commit is not merged, or no release claims the branch.
    """
    own = None
    if parameters.merged:
        change = parameters.change(config)
        about = {"project": change.project, "branch": change.branch, "commit": change.commit}
        own = Event(**about, before=parameters.get("ZUUL_OLDREV"), noted=now)
        queue.events.append(own)
    problems = []
    for event in list(queue.events):
        try:
            _note(config, event, queue.merges)
        except InfrastructureError as error:
            problems.append(f"{event}: {error}")
            continue
        except RequestError as error:
            if event is own:
                raise
            log.warning("%s", error)
        queue.events.remove(event)
    queue.write()
    return problems


def _note(config: Config, event: Event, merges: dict[Branched, Merge]) -> None:
    """Note a merge, unless it or a later one is known.

    Raises:
        RequestError: as of `_take`.
        InfrastructureError: the remote or the review system does not answer.
    """
    branch, key = Branch(config, event.project, event.branch), (event.project, event.branch)
    claimed = config.release_of(event.branch)
    if claimed is None or not branch.has(event.commit):
        why = "is not merged into it" if claimed else "is not of a release: none claims it"
        raise RequestError(f"{event.branch} of {event.project}: {event.commit[:12]} {why}")
    if key in merges and branch.later(merges[key].commit, event.commit):
        if merges[key].commit == event.commit:
            # it may be a publication for another target
            merges[key] = merges[key].model_copy(update={"done": False})
        return
    moved = {"ZUUL_PROJECT": event.project, "ZUUL_OLDREV": event.before, "ZUUL_NEWREV": event.commit}
    # a push past all review has no change
    merged = review.submitted(config, event.project, review.commits(config, Parameters(moved))) or event.noted
    merges[key] = Merge(**event.model_dump(), release=claimed[0], merged=merged)


def _look(config: Config, merges: dict[Branched, Merge], now: datetime) -> _Found:
    """Find the reviews that are due. What fails for one merge keeps no other back."""
    found, reviews = _Found(), _Reviews(config)
    for key, merge in merges.items():
        if merge.done:
            continue
        try:
            released = _released(config, merge)
            if released.behind and now - merge.noted < SETTLE:
                found.open.add(key)
                found.waiting.append(f"{merge.project} {merge.branch}")
                continue
            for change in _outdated(config, merge, released, reviews):
                found.wanted.setdefault(change.number, _Wanted(change)).merges[key] = merge
        except PkgciError as error:
            found.open.add(key)
            found.problems.append(f"{merge}: {error}")
    return found


def _released(config: Config, merge: Merge) -> _Released:
    """Return how far a merge is published: its package, for all targets of its release."""
    branch, package = Branch(config, merge.project, merge.branch), config.package_of(merge.project) or ""
    found = _Released(merge.merged)
    for codename in sorted({config.target(name).codename for name in config.release(merge.release).targets}):
        repository = Repository(config, merge.release, codename)
        if repository.current() is None:
            continue
        with repository.opened():
            found.users |= set(repository.dependants_of(package))
            for key, _, _ in repository.index.live_of(package):
                time = repository.generation(repository.index.since(key)).time.replace(microsecond=0)
                origin = repository.origin(key, package)
                commits = origin.commits if origin and origin.branch == merge.branch else ()
                for one in (one for one in commits if one.project == merge.project):
                    if branch.later(one.commit, merge.commit):
                        found.since = max(found.since, time)
                    else:
                        found.behind = True
    return found


def _outdated(config: Config, merge: Merge, released: _Released, reviews: _Reviews) -> Iterator[Open]:
    """Yield the open reviews that a merge concerns and that were tested before it, but those that a test was asked for."""
    package, known = config.package_of(merge.project), set(config.names("packages"))
    own = config.package(package).projects if package else (merge.project,)
    users = [project for name in sorted(released.users & known) for project in config.package(name).projects]
    for change in reviews.of([*own, *users]):
        if change.project in own:
            concerned, since = change.branch == merge.branch, merge.merged
        else:
            claimed = config.release_of(change.branch)
            # what it is built against are the released packages
            concerned, since = claimed is not None and claimed[0] == merge.release, released.since
        tested, asked = change.tested, change.asked
        outdated = tested is not None and tested < since and (asked is None or asked < since)
        if concerned and outdated and change.number not in merge.asked:
            yield change
