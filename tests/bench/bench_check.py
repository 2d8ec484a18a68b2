"""What a check of hello costs, for each target, beside the bare tools that it comes down to, by hand, one after the other.

Those are dpkg-buildpackage or rpmbuild, of source and binary packages, in a prepared root; lintian or rpmlint;
dpkg-scanpackages or createrepo_c; and apt or dnf, installing and removing the package in a machine that is up. Nothing
around them counts: neither the making of the root and the machine, nor ways in and out of them. The check is of a new
change each time, with roots and snapshots at hand.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import trees
import yaml
from hello import changed
from table import Row

from pkgci.artifacts import Build, Repository
from pkgci.config import Config
from pkgci.engines.base import BuildRef
from pkgci.engines.local import LocalEngine
from pkgci.roots import Root, build_root, tools_root
from pkgci.sandbox import Files, execute
from pkgci.server import serve
from pkgci.store import Store
from pkgci.vm import guest

TARGETS = ("bookworm-amd64", "debianrpm-amd64")
STEPS = "compile,publish,lint,install"
BUILD = {
    "deb": "dpkg-source -x *.dsc tree; cd tree; dpkg-buildpackage -us -uc",
    "rpm": "rpmbuild -ra *.src.rpm",
}
LINT = {"deb": "lintian --allow-root --fail-on none *.dsc *.deb", "rpm": "rpmlint --permissive *.rpm"}
INDEX = {
    "deb": "dpkg-scanpackages -m . >Packages; dpkg-scansources . >Sources; gzip -k Packages Sources",
    "rpm": f"{shlex.quote(str(Path(sys.executable).with_name('createrepo_c')))} -q .",
}
INSTALL = {
    "deb": "only='-o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts=/etc/apt/pkgci.d'\n"
    "apt-get -q update $only -o APT::Get::List-Cleanup=false; apt-get -q -y install hello $only; apt-get -q -y purge hello",
    "rpm": "dnf -q -y install hello; dnf -q -y remove hello",
}
CLOCK = 'start=$(date +%s%N)\n{}\necho $(($(date +%s%N) - start)) >"${{1:-/dev/stdout}}"\n'


def rows(runs: int) -> Iterator[Row]:
    """Measure; each run checks a new change for one target after the other, and runs the tools on what came of it, by hand.

    Then it checks one for all targets at once, as `pkgci check` does by default; and one by all steps, twice.
    """
    checks: dict[str, list[float]] = {name: [] for name in TARGETS}
    tools: dict[str, list[float]] = {name: [] for name in TARGETS}
    at_once, first, again = [], [], []
    for _ in range(runs):
        for target in TARGETS:
            with tempfile.TemporaryDirectory() as scratch:
                place = Path(scratch)
                configuration = trees.config(place)
                checks[target].append(_check(configuration, [target], changed(place)))
                parts = _bare(configuration, target, place)
                tools[target].append(sum(parts.values()))
                said = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items())
                print(f"{target}: check {checks[target][-1]:.1f} s; by hand: {said}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            at_once.append(_check(trees.config(place), TARGETS, changed(place)))
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            configuration, tree = trees.config(place), changed(place)
            for seconds in (first, again):
                seconds.append(_check(configuration, TARGETS, tree, only=""))
    for target in TARGETS:
        yield Row(f"check of hello for {target}", "its bare tools", checks[target], tools[target], ratio=1.3)
    together = [sum(each) for each in zip(*tools.values(), strict=True)]
    yield Row("check of hello for both at once", "the bare tools of both", at_once, together, ratio=1.3)
    yield Row("the whole check of hello for both, again", "the first one", again, first, ratio=0.25)


def _check(configuration: Config, targets: Sequence[str], tree: Path, only: str = STEPS) -> float:
    """Return the seconds of a check."""
    command = [Path(sys.executable).with_name("pkgci"), "check", f"--only={only}", tree]
    command += [f"--target={target}" for target in targets]
    environment = {**os.environ, "PKGCI_CONFIG": str(configuration.directory)}
    start = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the check does not pass: {done.stdout[-2000:]}{done.stderr[-500:]}")
    return time.monotonic() - start


def _bare(configuration: Config, target: str, place: Path) -> dict[str, float]:
    """Return the seconds of each tool by its own."""
    top = LocalEngine(configuration).directory(BuildRef(f"build-{target}", 1)) / "archive" / "artifacts"
    entry = Store(configuration).lookup(Build.read(top / f"compile-{target}" / "build.json").key)
    assert entry is not None
    form = configuration.target(target).format
    files = [entry.directory / file.name for file in entry.record.files]
    sources = [path for path in files if path.name.endswith((".dsc", ".src.rpm")) or ".tar." in path.name]
    packages = [path for path in files if path.suffix in (".deb", ".rpm", ".dsc") or ".tar." in path.name]
    index = place / "index"
    index.mkdir()
    for path in packages:
        os.link(path, index / path.name)
    return {
        "build": _in_root(configuration, _complete_root(configuration, target), BUILD[form], sources),
        "lint": _in_root(configuration, tools_root(configuration, target), LINT[form], packages),
        "index": _seconds(
            subprocess.run(["sh", "-euc", CLOCK.format(INDEX[form])], cwd=index, check=True, stdout=-1).stdout
        ),
        "install": _in_machine(configuration, target, top / f"publish-{target}" / "repository.json", INSTALL[form]),
    }


def _complete_root(configuration: Config, target: str) -> Root:
    """Return a build root with the build dependencies of hello in it."""
    path = configuration.directory / "targets" / f"{target}.yaml"
    described = yaml.safe_load(path.read_text())
    described["root"] = {"packages": ["gettext", "help2man", "texinfo"]}
    path.write_text(yaml.safe_dump(described))
    return build_root(Config(configuration.directory), target)


def _in_root(configuration: Config, root: Root, command: str, given: list[Path]) -> float:
    """Return the seconds of a command in a root, in a directory with the given files."""
    files = Files()
    for path in given:
        files.add_file(f"/work/{path.name}", path)
    script = CLOCK.format(f"cd /work; export HOME=/root\n{command}").replace("${1:-/dev/stdout}", "/out/nanoseconds")
    with tempfile.TemporaryDirectory() as output, tempfile.TemporaryFile() as said:
        limits = configuration.settings.limits
        done = execute(root.path, script, files=files, output=Path(output), limits=limits, log_to=said)
        if done.status:
            said.seek(0)
            raise SystemExit(f"{command}: {said.read().decode()[-2000:]}")
        return _seconds(Path(output, "nanoseconds").read_bytes())


def _in_machine(configuration: Config, target: str, record: Path, command: str) -> float:
    """Return the seconds of a command in a restored machine that may use a repository."""
    repository = Repository.read(record)
    described = configuration.target(target)
    with serve(configuration):
        proxy = guest.proxy(configuration, described, [repository])
        with guest.plain(configuration, target).restored(configuration, proxy) as (machine,):
            machine.put(guest.settings(described, [repository], repository.packages))
            environment = "export DEBIAN_FRONTEND=noninteractive HOME=/root\nexec 3>&1 >/dev/null 2>&1\n"
            script = environment + CLOCK.format(command).replace('"${1:-/dev/stdout}"', "&3")
            done = machine.run(script, timeout=900)
            if done.status:
                raise SystemExit(f"{command}: status {done.status} in the machine")
            return _seconds(done.output)


def _seconds(nanoseconds: bytes) -> float:
    return int(nanoseconds) / 1e9
