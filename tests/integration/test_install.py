"""The install test on tiny real packages, good and bad, in real machines."""

import json
import shutil
import subprocess
import textwrap
import threading
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trees
from packages import rpm_index

from pkgci import install as job
from pkgci import repository, server
from pkgci.artifacts import Install, InstallOutcome, Package
from pkgci.config import EMBEDDED, Config
from pkgci.errors import PackageError, RequestError
from pkgci.store import Record, Store, describe
from pkgci.vm import guest
from pkgci.vm.proxy import Proxy, Rule

KEY = "a" * 64
DEB, RPM = "bookworm-amd64", "debianrpm-amd64"


@dataclass(frozen=True)
class Deb:
    """A DEB to be: control fields beside the usual, scripts of the package, files with their content.

    `program` is the path of a program that needs a library which is nowhere.
    """

    name: str
    version: str = "1.0-1"
    fields: str = ""
    scripts: tuple[tuple[str, str], ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    program: str | None = None

    def build(self, top: Path) -> Path:
        root = top / self.name
        control = f"Package: {self.name}\nVersion: {self.version}\nArchitecture: amd64\nMaintainer: A <a@example.org>\n"
        _write(root / "DEBIAN/control", f"{control}{self.fields}Description: a test\n")
        for name, text in self.scripts:
            _write(root / "DEBIAN" / name, f"#!/bin/sh\nset -e\n{text}\n", 0o755)
        for name, content in self.files:
            _write(root / name, content, 0o755 if "bin/" in name else 0o644)
        if self.program:
            (top / "nowhere.c").write_text("int nowhere(void) { return 0; }\n")
            (top / "main.c").write_text("int nowhere(void);\nint main(void) { return nowhere(); }\n")
            _run("gcc", "-shared", "-Wl,-soname,libnowhere.so.1", "-o", "libnowhere.so", "nowhere.c", cwd=top)
            _run("gcc", "-o", root / self.program, "main.c", "-L.", "-lnowhere", cwd=top)
        result = top / f"{self.name}_{self.version}_amd64.deb"
        _run("dpkg-deb", "--root-owner-group", "-b", root, result)
        return result


def _write(path: Path, content: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(mode)


def _run(*argv: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def service(command: str) -> str:
    return f"[Service]\nExecStart={command}\n[Install]\nWantedBy=multi-user.target\n"


def started(unit: str) -> tuple[tuple[str, str], ...]:
    """What debhelper's scripts come to for a package with a service."""
    return (
        ("postinst", f"systemctl enable --quiet --now {unit} || true"),
        ("prerm", f"systemctl disable --quiet --now {unit}"),
    )


DEBS = (
    Deb(
        "fine",
        version="1:2.0+b1-1~deb12",
        fields="Depends: fine-dbgsym\nConflicts: leaning\n",
        scripts=started("fine.service"),
        files=(
            ("usr/bin/fine", "#!/bin/sh\nexit 3\n"),
            ("etc/fine.conf", "a = 1\n"),
            ("lib/systemd/system/fine.service", service("/bin/sleep infinity")),
            ("usr/share/man/man1/fine.1", "a manual page, which minimal images leave out\n"),
        ),
    ),
    Deb("fine-dbgsym", files=(("usr/share/fine/data", "data\n"),)),
    Deb("leaning", fields="Depends: hello\nConflicts: fine\n", files=(("usr/share/leaning/text", "text\n"),)),
    Deb("bad-install", scripts=(("postinst", "echo no; exit 1"),)),
    Deb("bad-remove", scripts=(("prerm", "exit 1"),)),
    Deb(
        "broken",
        scripts=(
            (
                "postinst",
                "mkdir -p /var/lib/broken; echo left >/var/lib/broken/state; echo x >>/etc/hosts; touch /var/lib/tolerated\n"
                + started("broken.service")[0][1],
            ),
            *started("broken.service")[1:],
        ),
        files=(
            ("usr/bin/crashing", "#!/bin/sh\nkill -SEGV $$\n"),
            ("usr/bin/lost", "#!/usr/bin/no-such-interpreter\n"),
            ("lib/systemd/system/broken.service", service("/usr/bin/libless")),
        ),
        program="usr/bin/libless",
    ),
    # older than the one that machines have
    Deb("lz4", version="0.1-1", files=(("usr/bin/lz4", "#!/bin/sh\nexit 0\n"),)),
)

SPECS = {
    "fine": """
        Requires: /bin/sh fine-dbgsym
        %description
        Works.
        %install
        mkdir -p %{buildroot}/usr/bin
        printf '#!/bin/sh\\nexit 3\\n' >%{buildroot}/usr/bin/fine
        %files
        %attr(755,root,root) /usr/bin/fine
        """,
    "broken": """
        %description
        Fails in its scriptlet, and leaves a file.
        %post
        echo left >/etc/broken.state
        exit 1
        %files
        """,
    "fine-dbgsym": """
        %description
        Comes and goes with what needs it.
        %files
        """,
    "stubborn": """
        %description
        Cannot be removed.
        %preun
        exit 1
        %files
        """,
    "needy": """
        Requires: libnowhere.so.1()(64bit)
        %description
        Needs what nobody has.
        %files
        """,
}


def rpm(top: Path, name: str, body: str) -> Path:
    head = f"Name: {name}\nVersion: 1.0\nRelease: 1\nSummary: A test\nLicense: MIT\nBuildArch: noarch\n"
    (top / f"{name}.spec").write_text(head + textwrap.dedent(body))
    _run("rpmbuild", "-bb", "--nodeps", "-D", f"_topdir {top}", "-D", f"_dbpath {top}/db", top / f"{name}.spec")
    return next(top.glob(f"RPMS/noarch/{name}-1.0-1.*"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """The embedded targets and this machine's images and snapshots, with repositories of the tests' own, served."""
    top = tmp_path_factory.mktemp("install")
    shutil.copytree(EMBEDDED, top / "etc")
    entry = top / "etc" / "packages" / "source.yaml"
    entry.parent.mkdir(exist_ok=True)
    entry.write_text('source: source\ninstall: {leftovers: ["/var/lib/toler*"]}\n')
    paths = {"data": str(top / "data"), "cache": str(Config(EMBEDDED).cache)}
    (top / "etc" / "config.yaml").write_text(
        json.dumps({"url": f"http://127.0.0.1:{trees.free_port()}/", "paths": paths})
    )
    snapshots = Config(EMBEDDED).data / "snapshots"
    snapshots.mkdir(parents=True, exist_ok=True)
    (top / "data").mkdir()
    (top / "data" / "snapshots").symlink_to(snapshots)
    made = Config(top / "etc")
    with server.serve(made):
        yield made


def publish(config: Config, target: str, run: str, packages: list[tuple[str, str, Path]], directory: Path) -> str:
    """Publish packages (name, version, file) as one build to a test repository; return the URL of its record."""
    form = config.target(target).format
    files = [path for _, _, path in packages]
    described = {path: describe(path) for path in files}
    if form == "deb":
        listed = directory / "index.packages"
        listed.write_text(_run("dpkg-scanpackages", "--multiversion", ".", cwd=directory))
        files.append(listed)
    else:
        files += rpm_index(directory, list(files))
    record = Record(
        key=KEY,
        algorithm=1,
        package="source",
        version="1",
        target=target,
        format=form,
        packages=tuple(
            Package(
                name=name,
                version=version,
                architecture="amd64" if form == "deb" else "noarch",
                file=path.name,
                sha256=described[path].sha256,
                kind="debug" if name.endswith("-dbgsym") else "binary",
            )
            for name, version, path in packages
        ),
        files=tuple(map(describe, files)),
    )
    with Store(config).claim(KEY, wait=0) as lease:
        entry = Store(config).deliver(lease, record, files)
    made = repository.write(config, target, run, [entry], datetime.now(UTC) + timedelta(days=1))
    shutil.rmtree(config.data / "store")
    return f"{made.url}repository.json"


@pytest.fixture(scope="module")
def debs(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, tuple[Deb, ...]], str]:
    def publish_debs(run: str, packages: tuple[Deb, ...]) -> str:
        top = tmp_path_factory.mktemp(run)
        built = [(package.name, package.version, package.build(top)) for package in packages]
        return publish(config, DEB, run, built, top)

    return publish_debs


@dataclass(frozen=True)
class Ran:
    """A finished install test of several packages."""

    error: PackageError
    artifacts: Path

    @property
    def record(self) -> Install:
        return Install.read(self.artifacts / "install.json")

    def outcome(self, package: str) -> InstallOutcome:
        return next(outcome for outcome in self.record.packages if outcome.package == package)

    def found(self, package: str) -> dict[tuple[str, str | None], str]:
        return {(finding.phase, finding.file): finding.message for finding in self.outcome(package).findings}


def run_job(config: Config, target: str, url: str, artifacts: Path, build_key: str = KEY) -> Ran:
    artifacts.mkdir(exist_ok=True)
    with pytest.raises(PackageError) as caught:
        job.install(config, target, [url], build_key, artifacts)
    return Ran(caught.value, artifacts)


@pytest.fixture(scope="module")
def deb_run(config, debs, tmp_path_factory) -> Ran:
    return run_job(config, DEB, debs("debs", DEBS), tmp_path_factory.mktemp("artifacts-deb"))


@pytest.fixture(scope="module")
def rpm_run(config, tmp_path_factory) -> Ran:
    top = tmp_path_factory.mktemp("rpms")
    built = [(name, "1.0-1", rpm(top, name, body)) for name, body in SPECS.items()]
    url = publish(config, RPM, "rpms", built, top)
    return run_job(config, RPM, url, tmp_path_factory.mktemp("artifacts-rpm"))


def test_a_good_deb_passes_with_its_service_and_its_dependency_from_the_same_repository(deb_run):
    assert deb_run.found("fine") == {}


def test_debug_packages_are_not_tested_by_themselves(deb_run):
    assert "fine-dbgsym" not in [outcome.package for outcome in deb_run.record.packages]


def test_a_deb_that_conflicts_with_another_one_and_needs_one_from_the_upstream_passes(deb_run):
    assert deb_run.found("leaning") == {}


def test_a_deb_of_a_lower_version_than_the_machine_has_is_installed(deb_run):
    assert deb_run.found("lz4") == {}
    assert "DOWNGRADED" in (deb_run.artifacts / "logs" / "lz4.log").read_text()


def test_a_deb_whose_installation_fails_is_found_with_the_reason(deb_run):
    found = deb_run.found("bad-install")
    assert list(found) == [("install", None)]
    assert "post-installation script subprocess returned error exit status 1" in found["install", None]


def test_a_deb_whose_removal_fails_is_found_with_the_reason(deb_run):
    found = deb_run.found("bad-remove")
    assert list(found) == [("remove", None)]
    assert "pre-removal script subprocess returned error exit status 1" in found["remove", None]


def test_programs_that_crash_or_cannot_start_are_found_by_name(deb_run):
    found = deb_run.found("broken")
    assert found["run", "/usr/bin/crashing"] == "dies by SIGSEGV"
    assert "status 127" in found["run", "/usr/bin/lost"]


def test_a_missing_library_is_found_with_the_loaders_message(deb_run):
    found = deb_run.found("broken")
    assert "libnowhere.so.1: cannot open shared object file" in found["run", "/usr/bin/libless"]


def test_a_service_that_does_not_start_is_found(deb_run):
    assert "does not start" in deb_run.found("broken")["service", "broken.service"]


def test_what_a_deb_leaves_or_changes_is_found_by_name_unless_its_entry_tolerates_it(deb_run):
    found = deb_run.found("broken")
    assert ("leftover", "/var/lib/tolerated") not in found
    assert "is left" in found["leftover", "/var/lib/broken/state"]
    assert "has changed" in found["leftover", "/etc/hosts"]


def test_the_records_name_each_package_and_the_first_failure_is_the_reason(deb_run):
    tested = [package.name for package in DEBS if package.name != "fine-dbgsym"]
    assert [outcome.package for outcome in deb_run.record.packages] == tested
    assert str(deb_run.error).startswith("install test of bad-install: install: ")
    suite = ET.parse(deb_run.artifacts / "junit" / "install.xml").getroot()
    assert {case.get("name") for case in suite if case.find("failure") is not None} == {
        "bad-install",
        "bad-remove",
        "broken",
    }
    assert {path.stem for path in (deb_run.artifacts / "logs").iterdir()} == set(tested)


def limit_install(monkeypatch, seconds: int) -> None:
    monkeypatch.setitem(job.STEPS, "install", replace(job.STEPS["install"], seconds=seconds))


def test_an_installation_that_hangs_is_a_finding(config, debs, tmp_path, monkeypatch):
    limit_install(monkeypatch, 25)
    url = debs("hanging", (Deb("hanging", scripts=(("postinst", "echo waiting; sleep infinity"),)),))
    ran = run_job(config, DEB, url, tmp_path / "artifacts", build_key="")
    assert "did not end within 25 s" in ran.found("hanging")["install", None]
    assert "waiting" in (ran.artifacts / "logs" / "hanging.log").read_text()


ATTACKS = (
    Deb("killing", scripts=(("postinst", "pkill -KILL sshd; sleep 1000"),)),
    Deb("halting", scripts=(("postinst", "systemctl poweroff -ff; sleep 1000"),)),
    Deb("flooding", scripts=(("postinst", "yes >/dev/ttyS0 & yes; sleep 1000"),)),
    Deb("shouting", scripts=(("postinst", "name=$(printf 'owned\\033[2J\\007'); echo \"$name\"; touch /srv/$name"),)),
    Deb("innocent", files=(("usr/bin/innocent", "#!/bin/sh\n"),)),
)


def test_scripts_that_attack_their_machine_are_findings_and_the_next_package_is_tested(
    config, debs, tmp_path, caplog, monkeypatch
):
    caplog.set_level("INFO")
    limit_install(monkeypatch, 60)
    ran = run_job(config, DEB, debs("attacks", ATTACKS), tmp_path / "artifacts")
    found = {package.name: ran.found(package.name) for package in ATTACKS}
    assert "the connection to the machine is lost" in found["killing"]["install", None]
    assert "the connection to the machine is lost" in found["halting"]["install", None]
    assert found["flooding"]
    assert found["shouting"]["leftover", "/srv/owned?[2J?"] == "is left after the removal"
    assert found["innocent"] == {}
    assert sum(path.stat().st_size for path in ran.artifacts.rglob("*")) < 20 << 20
    said = [caplog.text, *(path.read_text() for path in ran.artifacts.glob("logs/*"))]
    assert all(line.replace("\t", "").isprintable() for text in said for line in text.split("\n"))


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[tuple[str, Callable[[Deb], None]]]:
    """An upstream of one package: its URL, and what replaces the package."""
    root = tmp_path / "upstream" / "flat"
    handler = partial(SimpleHTTPRequestHandler, directory=root.parent)

    def offer(package: Deb) -> None:
        shutil.rmtree(root, ignore_errors=True)
        package.build(root)
        shutil.rmtree(root / package.name)
        (root / "Packages").write_text(_run("dpkg-scanpackages", "flat", cwd=root.parent))

    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}/", offer
        made.shutdown()
        thread.join()


def test_what_has_left_the_upstream_since_the_snapshot_is_looked_for_again(config, debs, upstream):
    url, offer = upstream
    records = repository.read(config, DEB, [debs("moving", (Deb("needy", fields="Depends: moved\n"),))])
    script = guest.script(config.target(DEB))
    offer(Deb("moved", version="1.0-1"))
    proxy = Proxy([Rule(records[0].url), Rule(url)], config.cache / "proxy")
    with guest.plain(config, DEB).restored(config, proxy) as (machine,):
        machine.run("rm -f /etc/apt/sources.list.d/*", timeout=60)
        machine.put({"/etc/apt/sources.list": f"deb [trusted=yes] {url} flat/\n".encode()})
        machine.run(script, "baseline", timeout=300)
        machine.put(guest.settings(config.target(DEB), records, repository.under_test(records, "")))
        offer(Deb("moved", version="2.0-1"))
        done = machine.run(script, "install", "needy", "1.0-1", "amd64", timeout=300)
        said = machine.run("cat /run/pkgci/log; dpkg-query -W moved", timeout=60).text()
    assert (done.status, done.text()) == (0, ""), said
    assert "The upstream has moved" in said
    assert said.endswith("moved\t2.0-1\n")


def test_repositories_of_clocks_that_are_ahead_are_used_and_so_is_the_upstream(config, debs):
    target = config.target(DEB)
    records = repository.read(config, DEB, [debs("ahead", (Deb("ahead"),))])
    settings = guest.settings(target, records, repository.under_test(records, ""))
    with guest.plain(config, DEB).restored(config, guest.proxy(config, target, records)) as (machine,):
        machine.run('date -s "2 years ago"', timeout=60)
        machine.put(settings)
        done = machine.run(guest.script(target), "install", "ahead", "1.0-1", "amd64", timeout=300)
        lists = machine.run(guest.script(target), "lists", timeout=300)
        said = machine.run("cat /run/pkgci/log", timeout=60).text()
    assert (done.status, done.text(), lists.status) == (0, "", 0), said


def test_a_good_rpm_passes_and_goes_with_its_dependency(rpm_run):
    assert rpm_run.found("fine") == {}
    assert "fine-dbgsym" in (rpm_run.artifacts / "logs" / "fine.log").read_text()


def test_an_rpm_whose_removal_fails_is_found_with_the_reason(rpm_run):
    assert "%preun(stubborn-1.0-1.noarch) scriptlet failed" in rpm_run.found("stubborn")["remove", None]


def test_an_rpm_whose_scriptlet_fails_and_that_needs_what_nobody_has_are_found(rpm_run):
    assert "%post(broken-1.0-1.noarch) scriptlet failed" in rpm_run.found("broken")["install", None]
    assert "nothing provides libnowhere.so.1()(64bit)" in rpm_run.found("needy")["install", None]


def test_the_record_carries_the_notice_of_the_target(rpm_run, config):
    assert rpm_run.record.notice == config.target(RPM).notice != ""


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:1/test/x/repository.json", "must be a repository.json below"),
        ("{url}test/../../x/repository.json", "must be a repository.json below"),
        ("{url}test/none/bookworm-amd64/repository.json", "HTTP status 404"),
        ("{url}test/debs/bookworm-amd64/InRelease", "must be a repository.json below"),
        ("file:///etc/repository.json", "must be a repository.json below"),
    ],
)
def test_a_repository_elsewhere_or_of_no_existence_is_a_wrong_request(config, tmp_path, url, reason):
    with pytest.raises(RequestError, match=reason):
        job.install(config, DEB, [url.format(url=config.settings.url)], KEY, tmp_path)


def test_a_repository_of_another_target_has_nothing_to_install(config, debs, tmp_path):
    url = debs("other", (Deb("other"),))
    with pytest.raises(RequestError, match="nothing to install"):
        job.install(config, RPM, [url], KEY, tmp_path)


def test_a_build_without_binary_packages_in_the_repositories_is_a_wrong_request(config, debs, tmp_path):
    url = debs("absent", (Deb("absent"),))
    with pytest.raises(RequestError, match="nothing to install"):
        job.install(config, DEB, [url], "b" * 64, tmp_path)
