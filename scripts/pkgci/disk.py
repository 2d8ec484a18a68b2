"""Files that are there as a whole or not at all, what has to be on the disk before something else counts on it, and space."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO


def fsync(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_all(paths: Iterable[Path]) -> None:
    """Do so for several files and directories at once: the file system writes its journal for all of them together."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(fsync, paths))


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new file, which becomes `path` when what is done meanwhile succeeds; otherwise nothing is left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as new:
        try:
            yield new
            new.flush()
            Path(new.name).replace(path)
        except BaseException:
            Path(new.name).unlink(missing_ok=True)
            raise


def links(path: Path) -> list[os.stat_result]:
    """Return what is known of a file, or of all files below a directory: what `freed` needs, also once they are gone."""
    if not path.is_dir():
        return [path.lstat()]
    found = []
    for parent, _, files in os.walk(path):
        for name in files:
            with suppress(FileNotFoundError):
                found.append(Path(parent, name).lstat())
    return found


def freed(gone: Iterable[Iterable[os.stat_result]]) -> int:
    """Return the bytes of the disk that the removal of files frees: of those whose last link is among the ones removed.

    Args:
        gone: what `links` says of each that is removed, or would be.
    """
    left: dict[tuple[int, int], int] = {}
    total = 0
    for stat in (stat for files in gone for stat in files):
        key = stat.st_dev, stat.st_ino
        left[key] = left.get(key, stat.st_nlink) - 1
        if left[key] == 0:
            total += stat.st_blocks * 512
    return total
