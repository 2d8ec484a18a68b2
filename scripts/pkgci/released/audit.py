"""What is wrong with a released repository: from the signature of each generation down to each file and its origin."""

import hashlib
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pkgci.errors import PkgciError
from pkgci.released.base import Offered
from pkgci.released.records import Provenance
from pkgci.released.repository import CURRENT, PROVENANCE, Repository


def audit(repository: Repository, *, everything: bool = False) -> Iterator[str]:
    """Yield what is wrong, a line each, as a reader finds it: nothing is written, no lock is taken.

    Args:
        repository: the repository.
        everything: all generations that are kept, not only the one that readers see now.
    """
    current = repository.current()
    if current and current.valid_until and current.valid_until < datetime.now(UTC):
        yield f"generation {current.number} has expired: the job repository-maintain did not renew it"
    examined: dict[Offered, list[str]] = {}
    for generation in sorted(repository.root.glob("generations/[0-9]*" if everything else CURRENT)):
        try:
            offered = list(repository.form.read(generation, repository.key))
        except (PkgciError, OSError, ValueError, KeyError) as error:
            yield f"{generation}: {error}"
            continue
        for one in dict.fromkeys(offered):
            if one not in examined:
                examined[one] = list(_file(repository, one))
                yield from examined[one]


def _file(repository: Repository, offered: Offered) -> Iterator[str]:
    path = repository.root / offered.path
    try:
        if not stat.S_ISREG(path.lstat().st_mode) or path.parent.resolve() != path.parent:
            yield f"{offered.path}: it is, or is reached by, a symbolic link"
            return
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if (path.stat().st_size, digest) != (offered.size, offered.sha256):
            yield f"{offered.path}: it is not the file that the index names"
        repository.form.examine_package(path, repository.key)
        yield from _origin(path, digest)
    except (PkgciError, OSError) as error:
        yield f"{offered.path}: {error}"


def _origin(path: Path, digest: str) -> Iterator[str]:
    try:
        said = Provenance.read(path.parent / PROVENANCE)
    except PkgciError:
        yield f"{path.name}: without an origin: no {PROVENANCE} beside it that can be read"
        return
    if not any(one.get("name") == path.name and one.get("digest") == {"sha256": digest} for one in said.subject):
        yield f"{path.name}: without an origin: {PROVENANCE} beside it is about other files"
