"""How packages under test get into a product: their flavours, and what images of the product are rebuilt with.

A release says of each package what it is part of: the image of the product's master, what its nodes boot, a container, or what
is installed on the nodes (`cluster`). An environment says how each of these is done there.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence

from pkgci.artifacts import Repository, RepositoryPackage
from pkgci.config import FLAVOURS, Config, Environment, Flavour, Rebuilt, Target
from pkgci.errors import RequestError
from pkgci.text import listed
from pkgci.vm import guest

# of a package that no release says anything of
DEFAULT: tuple[Flavour, ...] = ("cluster",)
# what a rebuilt root runs, and that its repositories could not be read
INSTALL, UNREADABLE = "/pkgci-install", 75
# Installs packages in the root that it is run in, and leaves nothing else of itself there.
INSTALLER = """status=0
sh -eu /pkgci-guest together {words} >/pkgci-found || status=$?
cat /run/pkgci/log
found=$(cut -f 3 /pkgci-found)
rm -rf /run/pkgci /pkgci-found {files}
[ "$status" = 0 ] || exit "$status"
[ -z "$found" ] || {{ echo "$found"; exit 1; }}
"""


def assigned(
    config: Config, name: str, environment: Environment, branch: str, wanted: Sequence[str], sources: Iterable[str]
) -> dict[str, tuple[Flavour, ...]]:
    """Return the flavours of each source package, in the order in which they are applied.

    Args:
        config: the configuration.
        name: the environment's.
        environment: the environment.
        branch: decides the release, which says it; may be empty.
        wanted: `PACKAGE:FLAVOUR,...` of packages under test of which it is said otherwise.
        sources: the source packages under test.

    Raises:
        RequestError: the environment does not know one of them, or has no script for it, or something is said of a package
            that is not under test.
    """
    # as for the environment: a release may claim what has no branch
    release, asked = config.release_of(branch), dict(map(_parsed, wanted))
    said = {**(release[1].flavours if release else {}), **asked}
    found = {source: said.get(source, DEFAULT) for source in sources}
    strange = [source for source in asked if source not in found]
    if strange:
        raise RequestError(f"parameter FLAVOURS: {strange[0]} is not under test, but: {listed(found)}")
    home, known = config.environment(name)[0], environment.flavours.known()
    for source, flavours in found.items():
        for flavour in flavours:
            if flavour not in known:
                where = f"parameter FLAVOURS or release {release[0]}" if release else "parameter FLAVOURS"
                raise RequestError(
                    f"{source} is of the flavour {flavour} ({where}), which environment {name} does not know; it knows: "
                    f"{', '.join(known)}"
                )
            how = getattr(environment.flavours, flavour)
            # seen now, and not when a product has been deployed
            if isinstance(how, Rebuilt) and not (home / how.rebuild).is_file():
                raise RequestError(
                    f"{home}/environments/{name}.yaml: flavour {flavour}: {home / how.rebuild} does not exist"
                )
    return {source: tuple(one for one in FLAVOURS if one in flavours) for source, flavours in found.items()}


def _parsed(word: str) -> tuple[str, tuple[Flavour, ...]]:
    source, _, flavours = word.rpartition(":")
    return source, tuple(flavours.split(","))  # type: ignore[return-value]  # held against the rule of FLAVOURS


def spelled(flavours: Mapping[str, Sequence[str]]) -> str:
    """Return what the parameter FLAVOURS has to be for the same flavours."""
    return " ".join(f"{source}:{','.join(own)}" for source, own in flavours.items())


def overlay(target: Target, records: Sequence[Repository], packages: Sequence[RepositoryPackage]) -> dict[str, bytes]:
    """Return files, by their absolute paths, to lay over the root of an image: INSTALL, run there, installs packages in it.

    Its status is 0 when they are in, UNREADABLE when the repositories cannot be read; else its last line says what is wrong.

    Args:
        target: the target.
        records: the repositories.
        packages: what to install, at these exact versions.
    """
    words = [word for one in packages for word in (one.name, one.version, one.architecture)]
    files = {**guest.settings(target, records, packages), "/pkgci-guest": guest.script(target).encode(), INSTALL: b""}
    files[INSTALL] = INSTALLER.format(words=shlex.join(words), files=shlex.join(files)).encode()
    return files
