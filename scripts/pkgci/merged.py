"""What is merged: asked of Git, at the configured remote, now.

Neither a parameter's word nor a branch of this machine counts.
"""

import re
from functools import cached_property
from pathlib import Path

from pkgci import source
from pkgci.change import BRANCH, OBJECT
from pkgci.config import Config
from pkgci.errors import RequestError
from pkgci.source import git


class Branch:
    """A branch of a project as the remote has it now; what is asked of it later is asked of that state.

    Args:
        config: names the remote.
        project: the project.
        name: the branch's name.

    Raises:
        RequestError: the configuration names no remote, or `name` is no name of a branch.
        InfrastructureError: the remote does not answer.
    """

    def __init__(self, config: Config, project: str, name: str) -> None:
        if not config.settings.gerrit:
            raise RequestError(f"{config.directory / 'config.yaml'}: no `gerrit`; it says what is merged")
        if not re.fullmatch(BRANCH, name):
            raise RequestError(f"{name[:80]!r} is no name of a branch")
        self.project, self.name = project, name
        self._cache = source.init(config.cache / "git" / f"{project}.git")
        remote = config.settings.gerrit + project
        self.tip = source.fetch_ref(self._cache, remote, f"refs/heads/{name}", missing_ok=True)

    def has(self, commit: str) -> bool:
        """Return whether a commit is reachable from the branch.

        Raises:
            RequestError: `commit` is no full id of one.
        """
        if not re.fullmatch(OBJECT, commit):
            raise RequestError(f"{commit[:80]!r} is not a full commit id")
        return self.tip is not None and descends(self._cache, self.tip, commit)

    def later(self, one: str, other: str) -> bool:
        """Return whether commit `one` is `other`, or has it in its history."""
        return descends(self._cache, one, other)

    def commit_of(self, tree: str, count: int | None = None) -> str | None:
        """Return the newest commit of the branch with a tree, and with so many non-merge commits in its history if given.

        A tree comes back with a change that takes another one back; the count does not.
        """
        for commit in self.commits_of(tree):
            if count is None or count == int(
                git(self._cache, "rev-list", "--count", "--no-merges", commit).stdout.decode()
            ):
                return commit
        return None

    def commits_of(self, tree: str) -> list[str]:
        """Return the commits of the branch with a tree, newest first."""
        return self._commits.get(tree, [])

    @cached_property
    def _commits(self) -> dict[str, list[str]]:
        """The commits of the branch by their trees, newest first."""
        found: dict[str, list[str]] = {}
        if self.tip:
            listed = git(self._cache, "rev-list", "--no-commit-header", "--format=%H %T", self.tip)
            for line in listed.stdout.decode().splitlines():
                commit, tree = line.split()
                found.setdefault(tree, []).append(commit)
        return found


def descends(repository: Path, one: str, other: str) -> bool:
    """Return whether commit `one` is `other`, or has it in its history; a commit that is not there has not."""
    return git(repository, "merge-base", "--is-ancestor", other, one, check=False).returncode == 0
