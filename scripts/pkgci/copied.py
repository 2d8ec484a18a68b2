"""Copies of test repositories of other installations: the same files under a URL of our own, for as long as ours are kept.

Who made it has signed it: the signature is checked by the key that its `repository.json` names, everything else by the
checksums of the signed index, and the index stays as it is, so that a machine sees the same under either URL.
"""

import hashlib
import logging
import re
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from pkgci import repository, web
from pkgci.artifacts import File, Repository
from pkgci.config import Config
from pkgci.errors import InfrastructureError, RequestError
from pkgci.locks import locked
from pkgci.store import FILE_NAME
from pkgci.text import printable

log = logging.getLogger(__name__)

SIGNED_BYTES = 16 << 20
# of one repository: an index is for the packages of one change
INDEX_BYTES = 256 << 20
BYTES = 16 << 30
FILES = 20_000
# where a repository of ours has files of its own
PLACES = ("dists", "pool", "repodata")


def copy(config: Config, target_name: str, url: str, expires: datetime) -> Repository:
    """Copy the test repository of another installation; where it is gone by now, the copy that was made before is used.

    Args:
        config: says where repositories are.
        target_name: the target that it is tested for.
        url: that of its `repository.json`, which we may read.
        expires: when `pkgci clean` may remove the copy.

    Returns:
        The copy's record; that of a released repository, or of one for other targets, is as it was: it is not copied.

    Raises:
        RequestError: there is none and no copy, or it is none of ours.
        InfrastructureError: it cannot be read, is not as its index says, or there is no space for it.
    """
    target = config.target(target_name)
    run = f"copy-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    try:
        record = repository.described(url)
        if record.released or (record.format, record.codename) != (target.format, target.codename):
            return record
        return repository.make(config, run, target_name, lambda new, own: _fill(record, new, own, target_name, expires))
    except (RequestError, InfrastructureError) as error:
        place = repository.directory(config, run, target_name)
        with locked(place.parent) as held:
            if not held or not (place / repository.RECORD).exists():
                raise
            log.info("%s; the copy that was made before is used", error)
            kept = Repository.read(place / repository.RECORD).model_copy(update={"expires": expires.astimezone(UTC)})
            kept.write(place / repository.RECORD)
            return kept


def _fill(record: Repository, new: Path, own: str, target_name: str, expires: datetime) -> Repository:
    """Fetch all files of a repository into the directory `new`, and return the record of the copy, whose URL is `own`."""
    form = repository.INDEXES[record.format]
    try:
        for name in form.SIGNED:
            path = new / name.format(codename=record.codename)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(web.read(record.url + str(path.relative_to(new)), upstream=False, largest=SIGNED_BYTES))
        _fetch(record, form.indexes(new, record.codename, record.signing_key), new, INDEX_BYTES)
        offered = list(form.pooled(new, record.codename))
    except (KeyError, ValueError, TypeError) as error:
        reason = printable(f"{type(error).__name__}: {error}", 200)
        raise InfrastructureError(f"{record.url} is no repository that can be read: {reason}") from error
    known = {(file.name, file.sha256) for file in offered}
    for package in record.packages:
        if (package.file, package.sha256) not in known:
            raise InfrastructureError(f"{record.url}: its index does not have {package.file} as its record does")
    _fetch(record, offered, new, BYTES)
    log.info("copied %s: %d files", record.url, len(known))
    return record.model_copy(update={"url": own, "target": target_name, "expires": expires.astimezone(UTC)})


def _fetch(record: Repository, files: Iterable[File], new: Path, largest: int) -> None:
    """Fetch files of a repository to the same paths below `new`, `largest` bytes of them at most."""
    seen: dict[str, File] = {}
    total = 0
    for file in files:
        parts = file.name.split("/")
        if parts[0] not in PLACES or not all(re.fullmatch(FILE_NAME, part) for part in parts) or file.size < 0:
            raise InfrastructureError(f"{record.url}: its index names a file {file.name[:200]!r}")
        if seen.setdefault(file.name, file) != file:
            raise InfrastructureError(f"{record.url}: its index names {file.name} twice")
        total += file.size
        if total > largest or len(seen) > FILES:
            raise InfrastructureError(f"{record.url} is larger than what is copied: {largest >> 20} MiB, {FILES} files")
    free = shutil.disk_usage(new).free
    if free < total:
        raise InfrastructureError(f"no space for a copy of {record.url}: {free >> 20} MiB free, {total >> 20} needed")
    for file in seen.values():
        path = new / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        web.fetch(f"{record.url}{quote(file.name)}", path, size=file.size, sha256=file.sha256)
