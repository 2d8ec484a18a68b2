"""The errors a step ends with, and the one place where they map to exit codes.

Whoever reads an exit code or the class in `result.json` knows who has to act: the package's author, whoever made the
request, or whoever runs the machines. Anything else that escapes a step is a bug and shows its traceback, but for a full
disk, which may come up wherever something is written.
"""

import errno
from enum import IntEnum

# a disk that is full, failing or read-only
DISK = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS))


class Exit(IntEnum):
    """Exit codes of every `pkgci` command."""

    PASSED = 0
    PACKAGE = 1
    REQUEST = 2
    INFRASTRUCTURE = 3
    ABORTED = 143


class PkgciError(Exception):
    """An expected failure. Its text is one line: what was being done, to what, what went wrong, what to do."""

    exit = Exit.INFRASTRUCTURE


class PackageError(PkgciError):
    """The package is at fault: it does not merge, build, install or pass its tests."""

    exit = Exit.PACKAGE


class RequestError(PkgciError):
    """The request is wrong: a parameter, the configuration, or what was asked for does not exist."""

    exit = Exit.REQUEST


class InfrastructureError(PkgciError):
    """The machines are at fault: network, disk, a missing tool. The same request may pass later."""

    exit = Exit.INFRASTRUCTURE


class TriedTwiceError(InfrastructureError):
    """The machines are at fault, and were so when it was tried a second time: nobody else tries again."""


class Aborted(PkgciError):  # noqa: N818 - the word of Jenkins' results
    """The step was asked to stop."""

    exit = Exit.ABORTED
