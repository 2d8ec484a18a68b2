"""Configurations with released repositories, builds to publish in them, and what must hold of them, for tests."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import packages
import pytest
import yaml
from trees import free_port

from pkgci.config import Config
from pkgci.errors import PkgciError
from pkgci.released.audit import audit
from pkgci.released.records import Commit, Generation, Origin, Publication
from pkgci.released.repository import Repository, publish

ORIGIN = Origin(branch="main", commits=(Commit(project="tools/hello", commit="c" * 40, tree=packages.TREE),))


def configure(
    place: Path, gnupg: tuple[str, str], top: Mapping[str, object] | None = None, **released: object
) -> Config:
    """Return a configuration of one release for DEB and RPM; `top` and `released` are more keys of `config.yaml`."""
    etc = place / "etc"
    (etc / "targets").mkdir(parents=True)
    (etc / "releases").mkdir()
    settings = {
        "url": f"http://127.0.0.1:{free_port()}/",
        "paths": {"data": str(place / "data"), "cache": str(place / "cache")},
        "released": {"gnupg_home": gnupg[0], "key": gnupg[1], **released},
        **(top or {}),
    }
    (etc / "config.yaml").write_text(yaml.safe_dump(settings))
    for form, codename in (("deb", "bookworm"), ("rpm", "debianrpm")):
        (etc / "targets" / f"{codename}-amd64.yaml").write_text(
            f"format: {form}\ncodename: {codename}\narchitecture: amd64\ntag: t\nupstream: {{machine: true}}\n"
        )
    (etc / "releases" / "rocket.yaml").write_text("branches: [main]\ntargets: [bookworm-amd64, debianrpm-amd64]\n")
    return Config(etc)


def built(config: Config, name: str, version: str, tree: str = packages.TREE, **more) -> Publication:
    """Put a build of one DEB package into the store; return what publishes it."""
    with tempfile.TemporaryDirectory() as scratch:
        deb = packages.deb(Path(scratch), name, version, source=more.pop("source", ""), **more)
        entry = packages.deliver_debs(config, Path(scratch), name, version, [deb], tree=tree)
    return Publication(entry.record.key, ORIGIN)


def built_rpm(config: Config, name: str, version: str, release: str = "1", more: str = "") -> Publication:
    """Put a build of one RPM package into the store; return what publishes it."""
    with tempfile.TemporaryDirectory() as scratch:
        rpms = packages.rpmbuilt(Path(scratch), name, version, release, more)
        entry = packages.deliver_rpms(config, name, f"{version}-{release}", rpms)
    return Publication(entry.record.key, ORIGIN)


def put(config: Config, *publications: Publication) -> Generation:
    """Publish DEB packages."""
    return publish(config, "rocket", "bookworm", publications).generation


def put_rpm(config: Config, *publications: Publication) -> Generation:
    """Publish RPM packages."""
    return publish(config, "rocket", "debianrpm", publications).generation


def root(config: Config, codename: str = "bookworm") -> Path:
    """Return what readers see."""
    return config.data / "repositories" / "rocket" / codename


def faults(config: Config, codename: str = "bookworm") -> list[str]:
    """What a reader finds wrong in any generation that is kept."""
    repository = Repository(config, "rocket", codename)
    return [*audit(repository), *audit(repository, everything=True)]


def leftovers(config: Config, codename: str = "bookworm") -> list[str]:
    """What nothing refers to, in the repository and beside it."""
    places = [root(config, codename), config.data / "released" / "rocket" / codename]
    hidden = [str(path) for place in places for path in place.rglob(".*") if "/key-" not in str(path)]
    kept = {int(path.name) for path in (places[0] / "generations").iterdir()}
    known = {int(path.stem) for path in (places[0] / "log").iterdir()}
    journal = [str(path) for path in places[1].glob("journal.json")]
    pool = {path.parent for path in (places[0] / "pool").glob("*/*/entry.json")}
    empty = [str(path) for path in (places[0] / "pool").glob("*/*") if path not in pool]
    return [*(path for path in hidden if not path.endswith("/.owner")), *journal, *empty, *map(str, kept ^ known)]


def state(config: Config, codename: str = "bookworm") -> dict[str, tuple]:
    """What readers see of a repository, and when each file was changed."""
    return {
        str(path): () if path.is_dir() else (path.lstat().st_ino, path.lstat().st_mtime_ns, path.lstat().st_size)
        for path in sorted(root(config, codename).rglob("*"))
    }


def refused(config: Config, error: type[PkgciError], message: str, *publications: Publication, codename="bookworm"):
    """Publish what must be refused in one clear line, with nothing changed."""
    before = state(config, codename)
    with pytest.raises(error, match=message) as raised:
        publish(config, "rocket", codename, publications)
    assert "\n" not in str(raised.value)
    assert state(config, codename) == before
