"""The launcher that runs Zuul 2.6.0 with Gerrit 3 and today's git, in Zuul's own Python 2.7; tests/live/ has the whole."""

import json
import subprocess
import textwrap

import trees
from zuul2_server import PYTHON, environment, installed

from pkgci.config import ROOT


def run(body: str) -> object:
    """Return what a body of Python 2.7 prints as JSON, with the launcher imported and Zuul's connection as `gerrit`."""
    place = installed()
    lines = f"import sys; sys.path.insert(0, {str(ROOT / 'zuul')!r})\nimport json, zuul2\n"
    program = f"{lines}from zuul.connection import gerrit\n{textwrap.dedent(body)}"
    words = [place / PYTHON, "-W", "ignore", "-c", program]
    done = subprocess.run(words, env=environment(place), check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_numbers_of_changes_and_patch_sets_are_texts_as_with_gerrit_2():
    event = {"change": {"number": 12, "size": 3}, "patchSet": {"number": 2}, "dependsOn": [{"number": "11"}]}
    texts = {"change": {"number": "12", "size": 3}, "patchSet": {"number": "2"}, "dependsOn": [{"number": "11"}]}
    assert run(f"print(json.dumps(gerrit.json.loads({json.dumps(event)!r})))") == texts


def test_all_events_that_came_at_once_are_read():
    body = """
        from paramiko.file import BufferedFile

        class Stream(BufferedFile):
            def __init__(self, data):
                super(Stream, self).__init__()
                self.data = data
                self._set_mode("r")

            def _read(self, size):
                data, self.data = self.data[:size], self.data[size:]
                return data

        class Connection(object):
            events = []
            addEvent = events.append

        watcher = gerrit.GerritWatcher(Connection, "zuul", "localhost")
        watcher._read(Stream(b'{"type": "a"}\\n{"type": "b"}\\n{"type": "c"}\\n'))
        print(json.dumps([event["type"] for event in Connection.events]))
    """
    assert run(body) == ["a", "b", "c"]


def test_a_gerrit_with_an_unknown_host_key_is_refused():
    assert run("print(json.dumps(gerrit.paramiko.WarningPolicy.__name__))") == "RejectPolicy"


def test_the_merger_fetches_what_has_moved_again_and_again(tmp_path):
    origin = tmp_path / "origin"
    trees.commit(origin, {"text": "1"})
    body = f"""
        import subprocess
        from zuul.merger.merger import Repo

        repo, heads = Repo({str(origin)!r}, {str(tmp_path / "copy")!r}, "zuul@example.org", "Zuul"), []
        for number in range(3):
            repo.reset()
            heads.append(repo.getBranchHead("main").hexsha)
            subprocess.check_call(["git", "-C", {str(origin)!r}, "commit", "-q", "--allow-empty", "-m", str(number)])
        print(json.dumps(heads))
    """
    trees.git(origin, "config", "user.email", "t@localhost")
    trees.git(origin, "config", "user.name", "T")
    heads = run(body)
    assert heads == trees.git(origin, "rev-list", "--reverse", "main").splitlines()[:3]


def test_it_says_how_it_is_called():
    place = installed()
    words = [place / PYTHON, "-W", "ignore", ROOT / "zuul/zuul2.py", "scheduler"]
    done = subprocess.run(words, env=environment(place), check=False, capture_output=True, text=True)
    assert (done.returncode, "server|merger" in done.stderr) == (1, True)
