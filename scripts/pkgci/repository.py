"""Test repositories: one directory for each run and target, `repositories/test/RUN/TARGET/`, written whole; read by URL.

Its packages are hard links to the store's files. `repository.json` at its root says what it is; the lines that a user
needs to try it lie beside that.
"""

import os
import re
import shutil
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from pkgci import web
from pkgci.artifacts import Repository, RepositoryPackage
from pkgci.change import check_repository_url
from pkgci.config import Config
from pkgci.errors import InfrastructureError, RequestError
from pkgci.formats import apt, repomd
from pkgci.formats.base import WORD
from pkgci.keys import SigningKey
from pkgci.locks import locked
from pkgci.server import serve
from pkgci.store import Entry
from pkgci.upstream import index_digest

INDEXES = {"deb": apt, "rpm": repomd}
RECORD = "repository.json"
RECORD_BYTES = 64 << 20
KEY = re.compile(r"-----BEGIN (PGP PUBLIC KEY BLOCK-----)\n([ -~]+\n)*\n[\w+/=\n]+-----END \1\n?", re.ASCII)


def write(config: Config, target_name: str, run: str, entries: Sequence[Entry], expires: datetime) -> Repository:
    """Write the test repository of a run for a target; one that exists is replaced.

    Args:
        config: says where repositories are, and by what URL they are reached.
        target_name: the target that all `entries` were built for.
        run: the run's name, a part of the URL.
        entries: builds from the store.
        expires: when `pkgci clean` may remove it.

    Returns:
        What `repository.json` holds.

    Raises:
        RequestError: `run` is no such name, or two builds have a file of the same name.
        PackageError: a package cannot be indexed.
        InfrastructureError: the repository cannot be written or verified.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", run):
        raise RequestError(f"run {run[:80]!r}: a name has letters, digits, '.', '_', '-', up to 100 of them")
    target = config.target(target_name)
    form, key = INDEXES[target.format], SigningKey(config)

    def fill(new: Path, url: str) -> Repository:
        paths = _fill_pool(new, entries, form.pool)
        form.write_index(new, entries, paths, target, f"pkgci-test-{run}", key)
        return Repository(
            url=url,
            format=target.format,
            codename=target.codename,
            target=target_name,
            packages=tuple(
                RepositoryPackage(
                    **{**package.model_dump(), "file": paths[package.file]},
                    source=entry.record.package,
                    key=entry.record.key,
                )
                for entry in entries
                for package in entry.record.packages
            ),
            signing_key=key.export_public(),
            expires=expires.astimezone(UTC),
        )

    return make(config, run, target_name, fill)


def directory(config: Config, run: str, target_name: str) -> Path:
    """Return where the test repository of a run for a target is, or would be."""
    return config.data / "repositories" / "test" / run / target_name


def make(config: Config, run: str, target_name: str, fill: Callable[[Path, str], Repository]) -> Repository:
    """Make a test repository whole, or not at all; one that exists is replaced.

    Args:
        config: says where repositories are, and by what URL they are reached.
        run: the run's name.
        target_name: the target.
        fill: puts everything but `repository.json`, and what users need to try it, into a new directory, from that and the
            URL that it will have; returns the record.

    Returns:
        What `repository.json` holds.

    Raises:
        InfrastructureError: the repository cannot be written.
    """
    final = directory(config, run, target_name)
    try:
        while True:
            with suppress(FileExistsError):
                final.parent.mkdir(parents=True)
            # `clean` removes what is not locked; when it was faster, the directory is made again
            with locked(final.parent) as held:
                if held:
                    return _make(final, f"{config.settings.url}test/{run}/{target_name}/", fill)
    except OSError as error:
        raise InfrastructureError(f"cannot write {final}: {error}") from error


def read(config: Config, target_name: str, urls: Sequence[str]) -> tuple[Repository, ...]:
    """Read the `repository.json` files at `urls`, and return those of the target's format and codename.

    Raises:
        RequestError: a URL is not below a configured prefix, or leads to no such file.
        InfrastructureError: one cannot be read.
    """
    target = config.target(target_name)
    found = []
    for url in urls:
        check_repository_url(url, config)
        made = described(url)
        if (made.format, made.codename) == (target.format, target.codename):
            found.append(made)
    return tuple(found)


def described(url: str) -> Repository:
    """Read the `repository.json` file at a URL that is allowed.

    Raises:
        RequestError: it does not exist, or describes another repository than the one that it lies in.
        InfrastructureError: it cannot be read.
    """
    try:
        made = Repository.model_validate_json(web.read(url, upstream=False, largest=RECORD_BYTES))
    except web.NotFoundError as error:
        raise RequestError(f"REPOSITORIES: {error}; it may have expired") from error
    except ValidationError as error:
        raise RequestError(f"REPOSITORIES: {url} is no repository.json: {error.errors()[0]['msg']}") from error
    words = [made.codename, made.component]
    for package in made.packages:
        words += [package.name, package.source, package.version, package.architecture]
    if url != made.url + RECORD or not all(map(WORD.fullmatch, words)) or not KEY.fullmatch(made.signing_key):
        raise RequestError(f"REPOSITORIES: {url} does not describe the repository that it lies in")
    return made


def of_release(config: Config, target_name: str, release: str) -> list[str]:
    """Return the URL of the `repository.json` of a release's own repository; nothing as long as nothing is published there.

    Raises:
        InfrastructureError: it cannot be read.
    """
    if config.settings.released is None or not release:
        return []
    url = f"{config.settings.url}{release}/{config.target(target_name).codename}/{RECORD}"
    with serve(config):
        try:
            web.read(url, upstream=False, largest=RECORD_BYTES)
        except web.NotFoundError:
            return []
    return [url]


def under_test(records: Sequence[Repository], build_key: str) -> list[RepositoryPackage]:
    """Return the packages to install from repositories: those of kind `binary` of a build; of all, if `build_key` is empty.

    Raises:
        RequestError: there are none.
    """
    packages = [package for record in records for package in record.packages]
    tested = [package for package in packages if package.kind == "binary" and build_key in ("", package.key)]
    if not tested:
        raise RequestError(
            f"nothing to install: no binary package of build {build_key or '(any)'} in {len(records)} repositories"
        )
    return tested


def decisive(records: Sequence[Repository], tested: Sequence[RepositoryPackage]) -> list:
    """Return what decides a test of packages from repositories, as of JSON, wherever the repositories lie.

    Of those with packages under test it is all packages, of others the index as it is now.

    Raises:
        InfrastructureError: an index cannot be read.
    """
    found = []
    for record in records:
        offered = record.model_dump(mode="json", exclude={"url", "expires"})
        own = any(package in tested for package in record.packages)
        pointer = INDEXES[record.format].POINTER.format(codename=record.codename)
        found.append([offered, own or index_digest([f"{record.url}{pointer}"], upstream=False)])
    return [found, [package.model_dump(mode="json") for package in tested]]


def expired(config: Config, now: datetime) -> Iterator[Path]:
    """Yield the directories of test repositories that expired before `now`, or that a killed run left unfinished."""
    for directory in sorted((config.data / "repositories" / "test").glob("*/*")):
        if directory.name.startswith("."):
            yield directory
            continue
        until = Repository.read(directory / RECORD).expires
        if until and until < now:
            yield directory


def referenced(config: Config, without: Container[Path] = ()) -> set[str]:
    """Return the keys of all store entries that repositories refer to, but those in the directories `without`."""
    records = (config.data / "repositories").glob(f"test/*/*/{RECORD}")
    kept = (path for path in records if path.parent not in without)
    return {package.key for path in kept for package in Repository.read(path).packages}


def remove(directory: Path) -> bool:
    """Remove a test repository, unless it is being written; return whether it is gone."""
    with locked(directory.parent, wait=False) as held:
        if not held:
            return False
        gone = directory.with_name(f".{directory.name.lstrip('.')}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        directory.rename(gone)
        shutil.rmtree(gone)
        if not any(directory.parent.iterdir()):
            directory.parent.rmdir()
    return True


def _make(final: Path, url: str, fill: Callable[[Path, str], Repository]) -> Repository:
    target_name = final.name
    for leftover in final.parent.glob(f".{target_name}.*"):
        shutil.rmtree(leftover)
    new, old = (final.with_name(f".{target_name}.{state}") for state in ("new", "gone"))
    new.mkdir(parents=True)
    record = fill(new, url)
    INDEXES[record.format].write_client(new, url, record.codename, record.signing_key)
    record.write(new / RECORD)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    return record


def _fill_pool(root: Path, entries: Sequence[Entry], pool: Callable[[Entry], list[str]]) -> dict[str, str]:
    """Link the files of all builds into the repository; return the path below its root by file name."""
    paths: dict[str, str] = {}
    for entry in entries:
        directory = f"pool/{entry.record.package}"
        (root / directory).mkdir(parents=True, exist_ok=True)
        for name in pool(entry):
            if name in paths:
                raise RequestError(
                    f"{name} is in {paths[name].rpartition('/')[0]} and in {directory}: two builds make it"
                )
            paths[name] = f"{directory}/{name}"
            os.link(entry.directory / name, root / paths[name])
    return paths
