"""Runs zuul-server of Zuul 2.6.0, which was made for Gerrit 2, with Gerrit 3: takes the same arguments. Python 2.7, ASCII.

It changes nothing in Zuul's files. What differs, and what it does about it:

- Gerrit 3 gives the numbers of changes and patch sets as JSON integers. Zuul compares them with texts, so that changes in a
  row and `Depends-On` are not recognized: here they are texts again.
- Zuul reads one event for each time that its ssh connection has something to read. Where several came at once, the others
  wait for the next: here all are read that have come.
- Zuul connects to a Gerrit whose host key it does not know: here only to one of `~/.ssh/known_hosts`.

Source: Gerrit, "stream-events" (numbers); Zuul 2.6.0, zuul/connection/gerrit.py; paramiko, BufferedFile.
"""

import json

import paramiko
import zuul.cmd.server
from zuul.connection import gerrit


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


def read_all(watcher, stream):
    """Read an event, and those that came with it."""
    read_one(watcher, stream)
    while stream._rbuffer:
        read_one(watcher, stream)


gerrit.json = Json
gerrit.GerritWatcher._read = read_all
paramiko.WarningPolicy = paramiko.RejectPolicy

if __name__ == "__main__":
    zuul.cmd.server.main()
