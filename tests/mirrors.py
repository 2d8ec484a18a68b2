"""Mirrors on loopback with a configuration that names them, and what their readers see, for tests."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml
from released import configure
from servers import Rsyncd, Sshd, nginx
from trees import free_port

from pkgci.artifacts import Sync, SyncedRepository
from pkgci.config import ROOT, Config
from pkgci.errors import InfrastructureError
from pkgci.mirror import mirror_sync
from pkgci.mirrors.records import State
from pkgci.mirrors.transaction import sync
from pkgci.released.repository import CURRENT, Repository

EXAMPLE = ROOT / "etc" / "example" / "mirror"


class Fleet:
    """A release with DEB and RPM repositories, and its mirrors; all of their trees are served by one nginx."""

    def __init__(self, place: Path, gnupg: tuple[str, str]) -> None:
        self.place = place
        self.config = configure(place, gnupg, top={"serve": False})
        self.port = free_port()
        self.settings: dict[str, dict] = {}
        self.rsyncds: dict[str, Rsyncd] = {}
        self.sshds: list[Sshd] = []

    def tree(self, name: str) -> Path:
        """Return the directory of a mirror."""
        return self.place / "mirrors" / name

    def rsyncd(self, name: str, more: Mapping[str, str] | None = None, **settings: object) -> Rsyncd:
        """Add a mirror by an rsync daemon."""
        self.rsyncds[name] = Rsyncd(self.place / f"rsyncd-{name}", self.tree(name), more)
        self.add(name, rsync=self.rsyncds[name].url, **settings)
        return self.rsyncds[name]

    def sshd(self, name: str, **settings: object) -> Sshd:
        """Add a mirror by rsync over ssh, whose account is confined to its directory by rrsync."""
        directory = self.place / f"sshd-{name}"
        directory.mkdir()
        self.tree(name).mkdir(parents=True)
        line = example("authorized_keys", self.tree(name)).splitlines()[-1]
        self.sshds.append(Sshd(directory, line.split('"')[1]))
        self.add(name, ssh=self.sshds[-1].account(), path="/", **settings)
        return self.sshds[-1]

    def add(self, name: str, **settings: object) -> None:
        """Name a mirror in the configuration, with these settings."""
        url = f"http://127.0.0.1:{self.port}/{name}/"
        self.settings[name] = {"url": url, **self.settings.get(name, {}), **settings}
        self.configured()

    def configured(self) -> None:
        """Write the configuration, and read it."""
        path = self.config.directory / "releases" / "rocket.yaml"
        known = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({**known, "mirrors": self.settings}))
        self.config = Config(self.config.directory)

    def sync(self, codename: str = "bookworm", *, whole: bool = False) -> SyncedRepository:
        """Sync a repository; return what was done."""
        return sync(Repository(self.config, "rocket", codename), timedelta(0) if whole else None)[-1]

    def synced(self, codename: str = "bookworm", *, whole: bool = False) -> SyncedRepository:
        """Sync a repository, which succeeds: all mirrors show its generation, whole."""
        done = self.sync(codename, whole=whole)
        assert not done.fault
        assert set(self.shown(codename).values()) == {done.generation}
        assert self.faults(codename) == []
        for name in self.settings:
            known = State.read(self.config.data / "mirrors" / "rocket" / codename / f"{name}.json")
            assert (known.generation, known.settled) == (done.generation, True)
            assert [one.number for one in known.kept if one.replaced is None] == [done.generation]
        return done

    def failed(self, codename: str = "bookworm", *, whole: bool = False) -> str:
        """Sync a repository, which fails; return why, in one line. All mirrors are whole, and each one's generation is said."""
        done = self.sync(codename, whole=whole)
        assert self.faults(codename) == []
        assert done.fault
        assert "\n" not in done.fault
        for name, number in self.shown(codename).items():
            assert re.search(f"their generations:.* {name} ({number}|unknown)(,|$)", done.fault), (done.fault, number)
        return done.fault

    def job(self, form: str = "deb", release: str = "") -> Sync:
        """Run the job's own function."""
        return mirror_sync(self.config, form, release, self.place / "artifacts")

    def state(self, name: str) -> Path:
        """Return the file with what is known of a mirror."""
        return self.config.data / "mirrors/rocket/bookworm" / f"{name}.json"

    def age(self, name: str) -> None:
        """Let four days pass: what was left on a mirror was so then."""
        known, long_ago = State.read(self.state(name)), datetime.now(UTC) - timedelta(days=4)
        kept = [one.model_copy(update={"replaced": one.replaced and long_ago}) for one in known.kept]
        known.model_copy(update={"kept": tuple(kept)}).write(self.state(name))

    def generations(self, name: str) -> list[int]:
        """Return the generations that a mirror has something of."""
        return sorted(int(path.name) for path in (self.tree(name) / "bookworm/generations").iterdir())

    def unnamed(self, name: str) -> set[str]:
        """Return the index files on a mirror that none of its generations names; those that it lacks with them."""
        tree, form = self.tree(name) / "bookworm", Repository(self.config, "rocket", "bookworm").form
        named = {one for number in self.generations(name) for one in form.shared_files(tree / f"generations/{number}")}
        return named ^ {path.relative_to(tree).as_posix() for path in (tree / "by-hash/SHA256").iterdir()}

    def idle(self) -> None:
        """Wait until no daemon serves anybody."""
        for one in self.rsyncds.values():
            one.idle()

    def shown(self, codename: str = "bookworm") -> dict[str, int]:
        """Return the generation that each mirror's pointer leads to, 0 without one."""
        links = {name: self.tree(name) / codename / CURRENT for name in self.settings}
        return {name: int(link.readlink().name) if link.is_symlink() else 0 for name, link in links.items()}

    def faults(self, codename: str = "bookworm") -> list[str]:
        """Return what a reader finds wrong on any mirror, in any of the generations that it had been led to."""
        return [fault for name in self.settings for fault in self.faults_of(self.tree(name), codename)]

    def faults_of(self, tree: Path, codename: str = "bookworm") -> list[str]:
        """Return what a reader of a tree finds wrong."""
        repository = Repository(self.config, "rocket", codename)
        place = tree / codename
        if not (place / CURRENT).is_symlink():
            return []
        found = []
        try:
            for one in repository.form.read((place / CURRENT).resolve(), repository.key):
                path = place / one.path
                content = path.read_bytes() if path.is_file() else b""
                if (len(content), hashlib.sha256(content).hexdigest()) != (one.size, one.sha256):
                    found.append(f"{path} is not what the index says")
        except (InfrastructureError, OSError) as error:
            found.append(str(error))
        return found

    def files(self, codename: str = "bookworm") -> dict[str, list[str]]:
        """Return all that is on each mirror."""
        return {
            name: sorted(str(path.relative_to(self.tree(name))) for path in (self.tree(name) / codename).rglob("*"))
            for name in self.settings
        }

    def end(self) -> None:
        """End all servers."""
        for one in self.rsyncds.values():
            one.end()
        for one in self.sshds:
            one.end()


def example(name: str, tree: Path) -> str:
    """Return the example of a mirror's file, for another directory."""
    return (EXAMPLE / name).read_text().replace("/srv/mirror", str(tree))


@contextmanager
def fleet(place: Path, gnupg: tuple[str, str]) -> Iterator[Fleet]:
    """Serve mirrors that are still to be added."""
    made = Fleet(place, gnupg)
    (place / "mirrors").mkdir(exist_ok=True)
    served = example("nginx.conf", place / "mirrors").replace("listen 80;", f"listen 127.0.0.1:{made.port};")
    with nginx(place / "nginx", made.port, served):
        try:
            yield made
        finally:
            made.end()
