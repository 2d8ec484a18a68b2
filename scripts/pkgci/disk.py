"""What has to be on the disk, not only in memory, before something else may count on it."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


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
