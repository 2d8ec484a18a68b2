"""What a mirror is to have of a generation, laid out as a directory of hard links, to be sent as it is.

A file that names the repository's URL names the mirror's there. The directory holds on to what is sent, also when the
released repository removes it meanwhile.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from pkgci.errors import InfrastructureError
from pkgci.formats import apt, repomd
from pkgci.released.records import Generation, ReleasedBuild
from pkgci.released.repository import CURRENT, Repository

MIRROR_LIST = "mirrorlist"
# what names the repository's URL; whatever else is at the root is there as it is
NAMING = frozenset((apt.CLIENT, repomd.CLIENT, "README", "repository.json", MIRROR_LIST))


def lay_out(
    repository: Repository, generation: Generation, builds: Iterable[ReleasedBuild], url: str, tree: Path
) -> tuple[str, ...]:
    """Lay out a generation of a repository without its pointer.

    Args:
        repository: the released repository.
        generation: one of its generations that are kept.
        builds: those of its builds that the mirror does not have yet.
        url: where the mirror's readers find the repository.
        tree: an empty directory, which gets one of the codename's name.

    Returns:
        The metadata files that the generation shares with others, by their paths.

    Raises:
        InfrastructureError: the released repository does not have what it must.
    """
    root, place = repository.root, tree / repository.codename
    own = root / "generations" / str(generation.number)
    try:
        place.mkdir(parents=True)
        for build in builds:
            _link_all(root, place, repository.directory(build.source, build.key))
        _link_all(root, place, f"generations/{generation.number}")
        shared = repository.form.shared_files(own)
        for name in shared:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(root / name, place / name)
        for name, leads in repository.form.links.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).symlink_to(leads)
        public = [path for path in root.iterdir() if path.is_file() and not path.is_symlink() and path.name[0] != "."]
        for path in [*public, own / MIRROR_LIST]:
            if path.name not in NAMING:
                os.link(path, place / path.name)
            elif path.exists():
                _readdress(path, place / path.relative_to(root), repository.url, url)
    except OSError as error:
        raise InfrastructureError(
            f"repository {repository.name}, generation {generation.number}: cannot lay out {error.filename}: "
            f"{error.strerror}; try again, or see `pkgci repo audit {repository.name}`"
        ) from error
    return tuple(shared)


def lay_out_pointer(codename: str, leads: str, tree: Path) -> None:
    """Lay out a pointer that leads to `leads`."""
    (tree / codename).mkdir(parents=True)
    (tree / codename / CURRENT).symlink_to(leads)


def _link_all(root: Path, place: Path, directory: str) -> None:
    for parent, folders, files in os.walk(root / directory, onerror=_raise):
        there = place / Path(parent).relative_to(root)
        there.mkdir(parents=True)
        for name in [*files, *folders]:
            path = Path(parent, name)
            if path.is_symlink():
                (there / name).symlink_to(path.readlink())
            elif name in files:
                os.link(path, there / name)


def _raise(error: OSError) -> None:
    raise error


def _readdress(path: Path, new: Path, url: str, mirror_url: str) -> None:
    """Copy a file with the mirror's URL in place of the repository's; its time stays."""
    new.unlink(missing_ok=True)
    new.write_bytes(path.read_bytes().replace(url.encode(), mirror_url.encode()))
    stamp = path.stat().st_mtime_ns
    os.utime(new, ns=(stamp, stamp))
