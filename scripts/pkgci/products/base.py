"""What the drivers of products share: the repositories to add, in order, and a REST interface that is not trusted."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pkgci import web
from pkgci.artifacts import Repository, RepositoryPackage
from pkgci.errors import InfrastructureError, RequestError
from pkgci.lazy import Lazy
from pkgci.text import printable

requests, exceptions = Lazy("requests"), Lazy("urllib3.exceptions")

SECONDS = 60
ANSWER_BYTES = 8 << 20
# what apt's and yum's files may hold without quotes; a product may check less
FORMS = {
    "name": r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}",
    "url": r"https?://[A-Za-z0-9._~:/%+-]+/",
    "codename": r"[A-Za-z0-9][A-Za-z0-9._+-]*",
    "component": r"[A-Za-z0-9][A-Za-z0-9._+-]*",
}


class RefusedError(InfrastructureError):
    """The interface answers with an HTTP status that is no success."""

    def __init__(self, about: str, status: int, said: str) -> None:
        super().__init__(f"{about}: HTTP status {status}: {said or 'without a word'}")
        self.status = status


@dataclass(frozen=True)
class Wanted:
    """A repository that the product shall have. Of two levels the lower one is preferred, from 0 without gaps."""

    name: str
    record: Repository
    level: int


def in_order(repositories: Mapping[str, Repository], tested: Sequence[RepositoryPackage]) -> list[Wanted]:
    """Return repositories in the order in which they are preferred.

    Args:
        repositories: by name.
        tested: the packages under test.

    Raises:
        RequestError: a name, a URL or another word is none that a package manager's file could hold.
    """
    for name, record in repositories.items():
        for what, form in FORMS.items():
            word = name if what == "name" else getattr(record, what)
            if not re.fullmatch(form, word):
                raise RequestError(
                    f"repository {printable(name, 100)}: {printable(word, 200)!r} is no {what} for a product's "
                    f"repository; it must match {form}"
                )
    ranks = {name: record.rank(tested) for name, record in repositories.items()}
    levels = sorted(set(ranks.values()))
    wanted = [Wanted(name, record, levels.index(ranks[name])) for name, record in repositories.items()]
    return sorted(wanted, key=lambda one: one.level)


class Interface:
    """A product's REST interface, in JSON: what runs in its machine may say anything, and at any length.

    Args:
        session: for the requests; its headers are sent with each.
        url: where it is, without a slash at the end.
        name: what a person knows it by, for errors.
    """

    def __init__(self, session: "requests.Session", url: str, name: str) -> None:
        self.headers = session.headers
        self.name = name
        self._session, self._url = session, url
        # none is followed; by `allow_redirects` requests would still read a redirect's whole content, however long
        session.get_redirect_target = lambda _: None

    def ask(self, verb: str, path: str, words: object = None) -> Any:
        """Return what is answered to a request, from its JSON.

        Args:
            verb: of HTTP.
            path: begins with a slash.
            words: sent as JSON, if not None.

        Raises:
            RefusedError: it refuses.
            InfrastructureError: it does not answer in time, or not in JSON.
        """
        about = f"{self.name}: {verb} {path}"
        try:
            with self._session.request(verb, self._url + path, json=words, timeout=SECONDS, stream=True) as answer:
                body = self._body(about, answer)
        except (requests.Timeout, exceptions.TimeoutError) as error:
            raise InfrastructureError(f"{about}: no answer within {SECONDS} s") from error
        except (requests.RequestException, exceptions.HTTPError) as error:
            raise InfrastructureError(f"{about}: no answer: {web.reason(error)}") from error
        succeeded = 200 <= answer.status_code < 300
        try:
            said = json.loads(body)
        except (ValueError, RecursionError) as error:
            if succeeded:
                raise InfrastructureError(f"{about}: the answer is no JSON") from error
            said = body.decode(errors="replace")
        if not succeeded:
            message = said.get("message", said) if isinstance(said, dict) else said
            raise RefusedError(about, answer.status_code, printable(str(message), 200))
        return said

    @staticmethod
    def _body(about: str, answer: "requests.Response") -> bytes:
        """Return what an answer holds. The time limit of requests is for each piece, and pieces may be small."""
        end, body = time.monotonic() + SECONDS, bytearray()
        while block := answer.raw.read1(1 << 16, decode_content=True):
            body += block
            if len(body) > ANSWER_BYTES:
                raise InfrastructureError(f"{about}: the answer has more than {ANSWER_BYTES >> 20} MiB")
            if time.monotonic() > end:
                raise InfrastructureError(f"{about}: the answer did not end within {SECONDS} s")
        return bytes(body)
