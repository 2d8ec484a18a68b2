"""Loading job definitions while somebody else does; tests/live/ loads them into a real server."""

import threading
from contextlib import contextmanager

import jenkins_fake
import pytest
from local_jobs import until

from pkgci import jobsupdate
from pkgci.errors import InfrastructureError

DESCRIPTION = "Template: jobs/templates/a.yaml"


class Server:
    """In the place of the engine: the pages of definitions, and what was posted."""

    url = "http://ci.invalid/"

    def __init__(self) -> None:
        self.xml: dict[str, bytes] = {}
        self.posted: list[str] = []

    def ask_json(self, path: str, _tree: str) -> dict:
        listed = [{"name": name, "description": f"{DESCRIPTION}\n{jenkins_fake.MANAGED}"} for name in self.xml]
        return {} if path else {"jobs": listed}

    def ask(self, method: str, path: str, data: bytes = b"") -> "Server":
        name = path.partition("name=")[2] or path.split("/")[1]
        if method == "POST":
            self.posted.append(path)
            self.xml[name] = data
        self.content = self.xml[name]
        return self


@pytest.fixture
def server(monkeypatch):
    made = Server()
    monkeypatch.setattr(jobsupdate, "JenkinsEngine", lambda *_: made)
    return made


@pytest.fixture
def update(server, tmp_path):
    """Return an update of the server by a job whose step is `said`."""
    config = jenkins_fake.configured(tmp_path, server.url).config

    def make(said: str) -> jobsupdate.Update:
        jobs = tmp_path / f"jobs-{said}"
        jobs.mkdir(exist_ok=True)
        (jobs / "jobs.yaml").write_text(
            f"- job: {{name: a, description: '{DESCRIPTION}', builders: [shell: {said}]}}\n"
        )
        return jobsupdate.Update(config, jobs)

    return make


def test_what_was_loaded_since_the_differences_were_shown_is_not_taken_back(server, update):
    update("one").apply()
    old = update("two")
    assert update("three").apply() == f"1 changed of 1 jobs at {server.url}"
    with pytest.raises(InfrastructureError, match="has changed since its differences were shown; start again"):
        old.apply()
    assert b"three" in server.xml["a"]
    assert server.posted == ["createItem?name=a", "job/a/config.xml"]


def test_the_job_takes_what_is_merged_when_no_other_is_loading(server, tmp_path, monkeypatch):
    config = jenkins_fake.configured(tmp_path, server.url).config
    at_once, going, taken = threading.Event(), [], []

    @contextmanager
    def definitions(_config):
        taken.append(1)
        assert at_once.wait(20)
        yield tmp_path

    class Nothing:
        differences = ()

        def __init__(self, *_: object) -> None:
            pass

        def shown(self) -> str:
            return ""

        def apply(self) -> str:
            return "nothing"

    monkeypatch.setattr(jobsupdate, "definitions", definitions)
    monkeypatch.setattr(jobsupdate, "Update", Nothing)
    for _ in range(2):
        going.append(threading.Thread(target=jobsupdate.update, args=[config, False]))
        going[-1].start()
    until(lambda: taken)
    going[1].join(0.3)
    assert len(taken) == 1
    at_once.set()
    for one in going:
        one.join()
    assert len(taken) == 2
