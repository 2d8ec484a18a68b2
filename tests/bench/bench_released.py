"""What a publication to a released repository costs beside reprepro, aptly, apt-ftparchive and createrepo_c.

One package goes into many, signed, on disk with fsync. The packages are synthetic and valid, with lists of files as real
ones have. Ours is measured as the call that the job makes, peers as the commands that an operator would run.
"""

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import inf
from pathlib import Path
from unittest import mock

import packages
import yaml
from table import Row, timed
from trees import free_port

from pkgci.config import Config
from pkgci.released.records import Commit, Origin, Publication
from pkgci.released.repository import Repository, publish, try_to_publish

SIZES = tuple(int(size) for size in os.environ.get("PKGCI_BENCH_PACKAGES", "1000 10000").split())
ORIGIN = Origin(branch="main", commits=(Commit(project="many", commit="c" * 40, tree=packages.TREE),))
WORDS = (
    "share",
    "lib",
    "doc",
    "python3",
    "plugins",
    "locale",
    "include",
    "examples",
    "data",
    "modules",
    "man",
    "icons",
)


def rows(runs: int) -> Iterator[Row]:
    """Measure both formats at each size, and how ours grows."""
    for form, peers in (("deb", DEB_PEERS), ("rpm", RPM_PEERS)):
        took: dict[int, list[float]] = {}
        for size in SIZES:
            with tempfile.TemporaryDirectory(prefix="pkgci-b-") as scratch, key(Path(scratch)) as (home, fingerprint):
                bench = Bench(Path(scratch), form, size, home, fingerprint)
                took[size] = [bench.ours(number) for number in range(max(3, 3 * runs))]
                for peer, (prepare, do, ratio) in peers.items():
                    place = Path(scratch) / peer.split()[0]
                    place.mkdir()
                    prepare(bench, place)
                    theirs = [peer_time(bench, place, do, number) for number in range(runs)]
                    # what is small is shown only
                    yield Row(
                        f"one {form.upper()} into {size}", peer, took[size], theirs, ratio if size >= 10_000 else inf
                    )
        if len(SIZES) > 1:
            few, many = took[SIZES[0]], took[SIZES[-1]]
            yield Row(f"one {form.upper()} into {SIZES[-1]}", f"ours into {SIZES[0]}", many, few, ratio=3)


@contextmanager
def key(scratch: Path) -> Iterator[tuple[Path, str]]:
    """Make a signing key in a home of GnuPG whose path is short; yield both."""
    home = Path(tempfile.mkdtemp(prefix="pkgci-k-", dir="/tmp"))
    gpg = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--passphrase", ""]
    subprocess.run([*gpg, "--quick-generate-key", "Bench <b@example.org>", "rsa3072", "sign", "never"], check=True)
    listed = subprocess.run([*gpg, "--with-colons", "--list-keys"], check=True, capture_output=True, text=True).stdout
    public = subprocess.run([*gpg, "--armor", "--export"], check=True, capture_output=True).stdout
    (scratch / "key.asc").write_bytes(public)
    try:
        yield home, next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr:"))
    finally:
        subprocess.run(["gpgconf", "--homedir", home, "--kill", "gpg-agent"], check=False)
        shutil.rmtree(home)


class Bench:
    """A released repository of `size` packages, and the same packages as files in `pool`."""

    def __init__(self, scratch: Path, form: str, size: int, home: Path, fingerprint: str) -> None:
        self.form, self.home, self.fingerprint = form, home, fingerprint
        self.codename = {"deb": "bookworm", "rpm": "debianrpm"}[form]
        self.pool, self.scratch = scratch / "pool", scratch
        self.pool.mkdir()
        etc = scratch / "etc"
        for kind in ("targets", "releases"):
            (etc / kind).mkdir(parents=True)
        settings = {
            "url": f"http://127.0.0.1:{free_port()}/",
            "paths": {"data": str(scratch / "data"), "cache": str(scratch / "cache")},
            "released": {"gnupg_home": str(home), "key": fingerprint},
        }
        (etc / "config.yaml").write_text(yaml.safe_dump(settings))
        target = {"format": form, "codename": self.codename, "architecture": "amd64", "tag": "t"}
        (etc / f"targets/{self.codename}-amd64.yaml").write_text(
            yaml.safe_dump({**target, "upstream": {"machine": True}})
        )
        (etc / "releases/many.yaml").write_text(f"branches: [main]\ntargets: [{self.codename}-amd64]\n")
        self.config = Config(etc)
        # what makes the repository is not measured
        unsigned = mock.patch("pkgci.released.rpm._signed", lambda path, *_: path)
        with mock.patch("os.fsync"), mock.patch.object(Repository, "question", return_value=None), unsigned:
            self.publish([self.build(self.pool, number, "1") for number in range(size)])

    def build(self, place: Path, number: int, version: str) -> Publication:
        """Make a package in `place` and put it into the store."""
        name = f"{WORDS[number % len(WORDS)]}-{number * 7919 % 100_003}-tool"
        chosen = random.Random(number)
        count = chosen.randint(5, 80)
        paths = {f"/usr/{'/'.join(chosen.choices(WORDS, k=3))}/{name}/{file}.{version}" for file in range(count)}
        files = dict.fromkeys(sorted(paths), b"")
        if self.form == "deb":
            path = packages.deb(
                place, name, version, files=files, fields={"Depends": "libc6 (>= 2.36)", "Homepage": name}
            )
            entry = packages.deliver_debs(self.config, self.scratch / "source", name, version, [path])
        else:
            path = packages.rpm(place, name, version, files=files)
            entry = packages.deliver_rpms(self.config, name, f"{version}-1", [path])
        return Publication(entry.record.key, ORIGIN)

    def publish(self, publications: list[Publication]) -> None:
        """Publish as the job does."""
        publish(self.config, "many", self.codename, publications)

    def ours(self, number: int) -> float:
        """Publish the next version of a package; return the seconds."""
        with tempfile.TemporaryDirectory() as scratch:
            publication = self.build(Path(scratch), number * 31, "2")
        # as the gate does before the merge: peers do not look at dependencies
        try_to_publish(self.config, "many", self.codename, [publication])
        # nobody waits for what was written before, as with peers
        subprocess.run(["sync", "-f", self.scratch], check=True)
        return timed(lambda: self.publish([publication]))

    def next(self, place: Path, number: int) -> Path:
        """Return a file with the next version of a package, as a peer takes it."""
        with tempfile.TemporaryDirectory() as scratch:
            self.build(Path(scratch), number * 37 + 1, "3")
            (path,) = (path for path in Path(scratch).iterdir() if path.suffix in (".deb", ".rpm"))
            return Path(shutil.copy(path, place))

    def run(self, *argv: str | Path, cwd: Path | None = None, output: Path | None = None) -> None:
        """Run a peer's command with the key."""
        environment = {**os.environ, "GNUPGHOME": str(self.home), "HOME": str(cwd or self.scratch)}
        with open(output or os.devnull, "wb") as stream:
            subprocess.run(argv, check=True, env=environment, cwd=cwd, stdout=stream, stderr=subprocess.PIPE)


def peer_time(bench: Bench, place: Path, do: Callable[[Bench, Path, Path], None], number: int) -> float:
    """Return the seconds that a peer takes for one package, until it is on the disk."""
    (place / "new").mkdir(exist_ok=True)
    path = bench.next(place / "new", number)

    def work() -> None:
        do(bench, place, path)
        # not all peers do; who does has nothing left for it
        subprocess.run(["sync", "-f", place], check=True)

    subprocess.run(["sync", "-f", place], check=True)
    return timed(work)


def reprepro_prepare(bench: Bench, place: Path) -> None:
    """Fill a repository of reprepro."""
    (place / "conf").mkdir()
    (place / "conf/distributions").write_text(
        f"Codename: bookworm\nComponents: main\nArchitectures: amd64\nSignWith: {bench.fingerprint}\n"
        "DebIndices: Packages Release . .gz\n"
    )
    debs = sorted(bench.pool.glob("*.deb"))
    bench.run("reprepro", "-b", place, "-P", "optional", "-S", "misc", "includedeb", "bookworm", *debs)


def reprepro(bench: Bench, place: Path, path: Path) -> None:
    """Publish by reprepro."""
    bench.run("reprepro", "-b", place, "includedeb", "bookworm", path)


def aptly_prepare(bench: Bench, place: Path) -> None:
    """Fill and publish a repository of aptly."""
    (place / ".aptly.conf").write_text(f'{{"rootDir": "{place}/root", "gpgProvider": "gpg"}}')
    aptly = ["aptly", f"-config={place}/.aptly.conf"]
    bench.run(*aptly, "repo", "create", "-distribution=bookworm", "-component=main", "many", cwd=place)
    bench.run(*aptly, "repo", "add", "many", bench.pool, cwd=place)
    sign = [
        f"-gpg-key={bench.fingerprint}",
        "-batch",
        "-skip-contents",
        "-skip-bz2",
        "-acquire-by-hash",
        "-architectures=amd64",
    ]
    bench.run(*aptly, "publish", "repo", *sign, "many", cwd=place)


def aptly(bench: Bench, place: Path, path: Path) -> None:
    """Publish by aptly."""
    command = ["aptly", f"-config={place}/.aptly.conf"]
    bench.run(*command, "repo", "add", "many", path, cwd=place)
    sign = [f"-gpg-key={bench.fingerprint}", "-batch", "-skip-contents", "-skip-bz2"]
    bench.run(*command, "publish", "update", *sign, "bookworm", cwd=place)


def ftparchive_prepare(bench: Bench, place: Path) -> None:
    """Fill apt-ftparchive's cache."""
    (place / "pool").mkdir()
    for path in bench.pool.glob("*.deb"):
        os.link(path, place / "pool" / path.name)
    _ftparchive(bench, place)


def ftparchive(bench: Bench, place: Path, path: Path) -> None:
    """Publish by apt-ftparchive and gpg."""
    shutil.copy(path, place / "pool")
    _ftparchive(bench, place)


def _ftparchive(bench: Bench, place: Path) -> None:
    dist = place / "dists"
    dist.mkdir(exist_ok=True)
    bench.run("apt-ftparchive", "--db", "cache.db", "packages", "pool", cwd=place, output=dist / "Packages")
    bench.run("gzip", "-9nkf", dist / "Packages")
    bench.run("apt-ftparchive", "release", "dists", cwd=place, output=place / "Release")
    bench.run("gpg", "--batch", "--yes", "--clearsign", "-o", dist / "InRelease", place / "Release")
    bench.run("gpg", "--batch", "--yes", "--armor", "--detach-sign", "-o", dist / "Release.gpg", place / "Release")


def createrepo_prepare(bench: Bench, place: Path) -> None:
    """Fill a repository of createrepo_c."""
    (place / "pool").mkdir()
    for path in bench.pool.glob("*.rpm"):
        os.link(path, place / "pool" / path.name)
    bench.run("createrepo_c", "--no-database", "--compress-type=gz", place)


def createrepo(bench: Bench, place: Path, path: Path) -> None:
    """Publish by rpmsign, createrepo_c and gpg."""
    new = Path(shutil.copy(path, place / "pool"))
    definitions = ["--define", f"_gpg_name {bench.fingerprint}", "--define", "__gpg /usr/bin/gpg"]
    bench.run("rpmsign", *definitions, "--addsign", new)
    bench.run("createrepo_c", "--update", "--no-database", "--compress-type=gz", "--skip-stat", place)
    bench.run("gpg", "--batch", "--yes", "--armor", "--detach-sign", place / "repodata/repomd.xml")


Peer = tuple[Callable[[Bench, Path], None], Callable[[Bench, Path, Path], None], float]
DEB_PEERS: Mapping[str, Peer] = {
    "reprepro includedeb": (reprepro_prepare, reprepro, 1 / 2),
    "aptly repo add, publish update": (aptly_prepare, aptly, 1 / 8),
    "apt-ftparchive --db, gpg": (ftparchive_prepare, ftparchive, 1 / 2),
}
RPM_PEERS: Mapping[str, Peer] = {"createrepo_c --update, gpg": (createrepo_prepare, createrepo, 1 / 5)}
