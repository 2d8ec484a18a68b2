"""Runs zuul-server or zuul-merger of Zuul 2.6.0 with Gerrit 3 and today's git: zuul2.py server|merger [ARGUMENT]...

The arguments are those of the program. It changes nothing in Zuul's files. What differs, and what it does about it:

- Gerrit 3 gives the numbers of changes and patch sets as JSON integers. Zuul compares them with texts, so that changes in a
  row and `Depends-On` are not recognized: here they are texts again.
- Zuul reads one event for each time that its ssh connection has something to read. Where several came at once, the others
  wait for the next: here all are read that have come.
- Zuul connects to a Gerrit whose host key it does not know: here only to one of `~/.ssh/known_hosts`.
- The merger leaves HEAD on a remote branch, and since 2.36 git fetches nothing into a branch that HEAD is on: every change
  after a merge would be said not to merge. Here HEAD is on a commit when it fetches.

It is a program of Python 2.7, ASCII. Source: Gerrit, "stream-events" (numbers); Zuul 2.6.0, zuul/connection/gerrit.py and
zuul/merger/merger.py; paramiko, BufferedFile.
"""

import importlib
import json
import sys

import paramiko
from zuul.connection import gerrit
from zuul.merger import merger


def with_texts(fields):
    """Return an object of Gerrit's JSON, a dict, with its number as text."""
    number = fields.get("number")
    if isinstance(number, int):
        fields["number"] = str(number)
    return fields


class Json(object):  # noqa: UP004 - Python 2.7
    """Stands for the module `json` in Zuul's connection to Gerrit, which calls `loads` only."""

    @staticmethod
    def loads(text):
        """Return the value of a JSON text from Gerrit."""
        return json.loads(text, object_hook=with_texts)


read_one = gerrit.GerritWatcher._read
update = merger.Repo.update


def read_all(watcher, stream):
    """Read an event, and those that came with it."""
    read_one(watcher, stream)
    while stream._rbuffer:
        read_one(watcher, stream)


def detach_and_update(repo):
    """Fetch what has changed in a merger's repository."""
    head = repo.createRepoObject().head
    if head.is_valid():
        head.reference = head.commit
    update(repo)


gerrit.json = Json
gerrit.GerritWatcher._read = read_all
merger.Repo.update = detach_and_update
paramiko.WarningPolicy = paramiko.RejectPolicy

if __name__ == "__main__":
    if sys.argv[1:2] not in (["server"], ["merger"]):
        sys.exit(__doc__.splitlines()[0])
    importlib.import_module("zuul.cmd." + sys.argv.pop(1)).main()
