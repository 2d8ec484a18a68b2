"""`make demo`: GNU hello through the check pipeline, for all targets of the embedded default.

Its source comes from the Debian mirror that this machine uses. Each run makes a new change, so that it really compiles.
`make demo-product` checks a package of the reference product instead, in that product: see etc/reference/.
"""

import logging
import shutil
import sys
import tempfile
import time
import uuid
from pathlib import Path

from rich.console import Console

from pkgci import check
from pkgci.cli import told
from pkgci.command import run
from pkgci.config import ROOT, Config
from pkgci.errors import InfrastructureError
from pkgci.importer import import_package
from pkgci.prepare import prepare
from pkgci.text import log_plainly
from pkgci.upstream import apt_configuration, apt_sources

log = logging.getLogger(__name__)

SPEC = ROOT / "examples" / "hello.spec"
IDENTITY = ["-c", "user.name=A Reviewer", "-c", "user.email=reviewer@localhost"]


def main() -> int:
    """Run the demonstration and return its exit code."""
    log_plainly(sys.stdout, "%(asctime)s %(message)s")
    started = time.monotonic()
    config = Config()
    targets = config.names("targets")
    prepare(config, targets)
    if sys.argv[1:] == ["product"]:
        tree, changed, comment = _product(config), "depot-node", "# %s"
    else:
        tree, changed, comment = hello(config), "src/hello.c", "/* %s */"
    _change(tree, changed, comment)
    change = check.prepare_change(config, tree, worktree=False)
    console = Console(highlight=False)
    code = check.check(config, change, check.targets_of(config, change, ()), check.options(), console)
    console.print(f"in all {time.monotonic() - started:.0f} s; next: `pkgci check PATH` on your own package")
    return int(code)


def hello(config: Config) -> Path:
    """Return the tree of GNU hello, which is imported when it is not there; its branch is `main`.

    Raises:
        InfrastructureError: the mirror has no source of it.
    """
    tree = config.cache / "demo" / "hello"
    if not tree.exists():
        _import(config, tree)
    return tree


def _import(config: Config, tree: Path) -> None:
    """Make the tree of GNU hello: the distribution's source package, and our spec beside it."""
    target = config.target("bookworm-amd64")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for folder in ("lists/partial", "cache/archives/partial"):
            (place / folder).mkdir(parents=True)
        lines = [source.line().replace("deb ", "deb-src ", 1) for source in apt_sources(target)]
        (place / "sources.list").write_text("\n".join([*lines, ""]))
        own = {"Dir::Etc::sourcelist": "sources.list", "Dir::State::lists": "lists", "Dir::Cache": "cache"}
        settings = [f'{name} "{place / path}";' for name, path in own.items()]
        settings += [
            'Dir::Etc::sourceparts "/dev/null";',
            'Dir::Etc::parts "/dev/null";',
            'Dir::State::status "/dev/null";',
        ]
        (place / "apt.conf").write_text("\n".join([apt_configuration(), *settings, ""]))
        environment = {"APT_CONFIG": str(place / "apt.conf")}
        log.info("downloading the source of GNU hello from this machine's Debian mirror")
        run(["apt-get", "-q", "update"], env=environment, quiet=True)
        run(["apt-get", "-q", "source", "--download-only", "hello"], env=environment, cwd=place, quiet=True)
        packages = list(place.glob("*.dsc"))
        if len(packages) != 1:
            raise InfrastructureError("the mirror has no source of hello; does its index have a `deb-src`?")
        log.info("pkgci import %s", packages[0].name)
        with tempfile.TemporaryDirectory(dir=_parent(tree)) as new:
            made = import_package(config, packages[0], Path(new, "hello"))
            (made / "rpm").mkdir()
            (made / "rpm" / "hello.spec").write_text(SPEC.read_text())
            _git(made, "add", "rpm")
            _git(made, "commit", "-q", "-m", "Package it as RPM too")
            made.rename(tree)


def _parent(tree: Path) -> Path:
    tree.parent.mkdir(parents=True, exist_ok=True)
    return tree.parent


def _product(config: Config) -> Path:
    """Return the tree of a package of the reference product, which PKGCI_CONFIG must name; its branch is `main`."""
    tree = config.cache / "demo" / "depot-node"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(config.directory / "product" / tree.name, tree)
    _git(tree, "init", "-q", "-b", "main")
    _git(tree, "add", ".")
    _git(tree, "commit", "-q", "-m", "The service of a node")
    return tree


def _change(tree: Path, changed: str, comment: str) -> None:
    """Commit a change of one file on a branch of its own, as a reviewer would push it: a comment at its end."""
    _git(tree, "checkout", "-q", "-B", "change", "main")
    _git(tree, "branch", "-q", "--set-upstream-to=main")
    source = tree / changed
    source.write_text(f"{source.read_text()}{comment % f'Change {uuid.uuid4()} of the demonstration.'}\n")
    _git(tree, "commit", "-q", "-a", "-m", f"Say in {source.name} which change this is")


def _git(tree: Path, *arguments: str) -> None:
    run(["git", "-C", tree, *IDENTITY, *arguments], quiet=True)


if __name__ == "__main__":
    with told():
        sys.exit(main())
