"""Which reviews are tested again after a merge, in what order and how many; tests/live/ asks a real Gerrit."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import gerrit
import pytest
import trees

from pkgci import publish, review
from pkgci.artifacts import ReleaseOutcome, Retriggers
from pkgci.change import Parameters
from pkgci.config import Config
from pkgci.errors import InfrastructureError, RequestError
from pkgci.retrigger import retrigger

MERGED = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def server() -> Iterator[gerrit.Gerrit]:
    with gerrit.serving() as made:
        yield made


@pytest.fixture
def commit(tmp_path: Path) -> str:
    """What `main` of the project `hello` leads to."""
    return trees.commit(tmp_path / "remote" / "hello", {"text": "1"})


@pytest.fixture
def config(tmp_path: Path, server: gerrit.Gerrit) -> Config:
    (tmp_path / "password").write_text(gerrit.PASSWORD)
    account = {"url": server.url, "user": gerrit.USER, "password_file": f"{tmp_path}/password"}
    return trees.config(
        tmp_path,
        {"hello": {"source": "hello"}},
        review={**account, "retrigger": {"comment": "try it", "per_hour": 3}},
        gerrit=f"file://{tmp_path}/remote/",
        released={"gnupg_home": str(tmp_path), "key": "0" * 40},
        paths={name: f"{tmp_path}/{name}" for name in ("data", "cache", "state")},
    )


def stamp(minutes: float) -> str:
    """A time of Gerrit's, so long after the merge."""
    return f"{MERGED + timedelta(minutes=minutes):%Y-%m-%d %H:%M:%S}.000000000"


def change(number: int, tested: float | None, *, updated: float = 0, branch: str = "main") -> dict:
    votes = [{"_account_id": 1}, {"_account_id": 2, "value": -1, "date": stamp(tested)}] if tested is not None else []
    about = {"_number": number, "project": "hello", "branch": branch, "updated": stamp(updated)}
    return {**about, "labels": {"Verified": {"all": votes}}, "messages": [{"date": stamp(9), "tag": "another"}]}


@pytest.fixture
def run(config: Config, commit: str, tmp_path: Path) -> Callable[..., Retriggers]:
    """Run the job so many minutes after the merge, which Gerrit knows no change of."""

    def running(minutes: float = 0, *, event: bool = True, **more: str) -> Retriggers:
        moved = {"ZUUL_PROJECT": "hello", "ZUUL_REFNAME": "main", "ZUUL_NEWREV": commit} if event else {}
        now = MERGED + timedelta(minutes=minutes)
        try:
            return retrigger(config, Parameters.read({**moved, **more}), now, tmp_path)
        finally:
            assert Retriggers.read(tmp_path / "retrigger.json").dry == ("DRY_RUN" in more)

    return running


def numbers(parts) -> list[int]:
    return [one.number for one in parts]


def test_what_was_tested_before_the_merge_is_asked_for_and_nothing_else(run, server, commit):
    server.open = [change(1, -1), change(2, 1), change(3, None), change(4, -1, branch="other"), change(5, 0)]
    assert numbers(run().asked) == [1]
    ((number, said),) = server.comments
    assert (number, said["message"]) == (1, f"try it tested before the merge of hello main {commit[:12]}")
    assert (said["tag"], said["notify"]) == (review.RETEST_TAG, "NONE")


def test_those_touched_last_come_first_the_rest_waits_and_each_is_asked_for_once(run, server):
    # more than a page of Gerrit's answers
    server.open = [change(number, -60, updated=number % 4) for number in range(1, 8)]
    first = run()
    assert (numbers(first.asked), numbers(first.queued)) == ([7, 3, 6], [2, 5, 1, 4])
    assert run(30, event=False).asked == ()
    second = run(61)
    assert (numbers(second.asked), numbers(second.queued)) == ([2, 5, 1], [4])
    # one that was tested meanwhile
    server.open[3] = change(4, 100)
    assert (run(200).asked, run(300, event=False).asked) == ((), ())
    assert [number for number, _ in server.comments] == [7, 3, 6, 2, 5, 1]


def test_one_that_another_run_asked_for_and_could_not_note_is_left_alone(run, server):
    server.open = [change(1, -9), change(2, -9)]
    for one, minutes in zip(server.open, (1, -5), strict=True):
        one["messages"] = [{"date": stamp(minutes), "tag": review.RETEST_TAG}]
    assert numbers(run().asked) == [2]


def test_a_dry_run_says_what_would_be_done_and_leaves_nothing(run, server):
    server.open = [change(1, -1)]
    assert numbers(run(DRY_RUN="true").asked) == [1]
    assert server.comments == []
    assert numbers(run(5).asked) == [1]


def test_one_that_cannot_be_asked_for_keeps_no_other_back(run, server, monkeypatch, tmp_path):
    server.open = [change(1, -1), change(2, -1)]
    monkeypatch.setattr(server, "_numbers", lambda: {1})
    with pytest.raises(
        InfrastructureError, match=r"1 reviews are tested again, 1 wait; change 2 of hello: .*status 404"
    ):
        run()
    made = Retriggers.read(tmp_path / "retrigger.json")
    assert (numbers(made.asked), numbers(made.queued)) == ([1], [2])
    monkeypatch.undo()
    assert numbers(run(1, event=False).asked) == [2]


def test_a_merge_is_not_forgotten_while_the_review_system_or_the_remote_does_not_answer(run, server, config, tmp_path):
    server.open = [change(1, -1)]
    password, remote = Path(config.settings.review.password_file), tmp_path / "remote"
    password.write_text("wrong")
    with pytest.raises(InfrastructureError, match=r"0 reviews are tested again, 0 wait; hello main .*HTTP status 401"):
        run()
    remote.rename(tmp_path / "away")
    with pytest.raises(InfrastructureError, match=rf"hello main .*: cannot fetch .*{remote}/hello"):
        run(10, event=False)
    (tmp_path / "away").rename(remote)
    password.write_text(gerrit.PASSWORD)
    assert numbers(run(20, event=False).asked) == [1]


def test_what_is_not_configured_or_not_merged_is_refused(config, tmp_path, commit):
    parameters = Parameters.read({"ZUUL_PROJECT": "hello", "ZUUL_REFNAME": "main", "ZUUL_NEWREV": "1" * 40})
    with pytest.raises(RequestError, match="main of hello: 111111111111 is not merged into it"):
        retrigger(config, parameters, MERGED, tmp_path)
    (config.directory / "releases" / "default.yaml").write_text("branches: [stable]\ntargets: [bookworm-amd64]\n")
    parameters, config = Parameters.read({**parameters.values, "ZUUL_NEWREV": commit}), Config(config.directory)
    with pytest.raises(RequestError, match=r"main of hello: [0-9a-f]{12} is not of a release: none claims it"):
        retrigger(config, parameters, MERGED, tmp_path)
    with pytest.raises(RequestError, match="`review` with `retrigger`, are needed"):
        retrigger(trees.config(tmp_path / "other"), Parameters.read({}), MERGED, tmp_path)


class Context:
    """What `publish` starts jobs with."""

    def __init__(self, config: Config) -> None:
        self.config, self.launched = config, []

    def launch(self, job: str, parameters: dict[str, str]) -> None:
        self.launched.append((job, parameters))


@pytest.mark.parametrize(("result", "started"), [("published", 1), ("unchanged", 1), ("absent", 0)])
def test_a_publication_of_a_merge_starts_it_for_that_merge(config, tmp_path, commit, result, started):
    moved = {"ZUUL_PROJECT": "hello", "ZUUL_REFNAME": "main", "ZUUL_NEWREV": commit}
    ReleaseOutcome(repository="default/bookworm", result=result, reason="").write(tmp_path / "released.json")
    context = Context(config)
    publish.go_on(context, "bookworm-amd64", Parameters.read({**moved, "ZUUL_PIPELINE": "post"}), tmp_path)
    assert context.launched == [("retrigger-outstanding", moved)] * started
    publish.go_on(context, "bookworm-amd64", Parameters.read({"ZUUL_PROJECT": "hello"}), tmp_path)
    assert len(context.launched) == started
