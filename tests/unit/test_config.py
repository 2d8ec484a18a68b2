"""The configuration: defaults, errors with file, line and rule, paths, and the index of ten thousand packages."""

import os
from pathlib import Path

import pytest

from pkgci import config as module
from pkgci.build import build
from pkgci.change import Parameters
from pkgci.config import EMBEDDED, ROOT, Config, Limits
from pkgci.errors import RequestError
from pkgci.mirrors.standing import mirrored
from pkgci.step import StepContext

TARGET = """\
format: deb
codename: bookworm
architecture: amd64
tag: deb12
upstream:
  machine: true
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An empty configuration whose cache is its own."""
    place = tmp_path / "etc"
    for kind in ("targets", "releases", "packages"):
        (place / kind).mkdir(parents=True)
    (place / "config.yaml").write_text(f"paths: {{cache: {tmp_path}/cache}}\n")
    return place


def refused(do) -> str:
    with pytest.raises(RequestError) as caught:
        do()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def settings_refused(directory: Path, text: str | bytes) -> str:
    """Return what is said of a `config.yaml`, without the directory."""
    (directory / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return refused(lambda: Config(directory).settings).removeprefix(f"{directory}/")


def test_the_embedded_default_is_whole():
    config = Config(EMBEDDED)
    assert config.settings.serve
    assert [target.format for target in config.targets().values()] == ["deb", "rpm"]
    assert config.release_of("any/branch") == ("default", config.release("default"))
    assert config.package_of("any/project") is None


def test_an_empty_file_means_all_defaults(directory):
    (directory / "config.yaml").write_text("# nothing\n")
    settings = Config(directory).settings
    assert settings.url == "http://127.0.0.1:8470/"
    assert settings.sources == ()
    assert settings.gerrit is None
    assert settings.limits == Limits(seconds=3600, processes=4096, disk_mib=8192, memory_mib=4096)
    assert {label: settings.executors.of(label) for label in ("gate", "control", "build")} == {
        "gate": 4,
        "control": 8,
        "build": 2,
    }
    assert settings.executors.of("nowhere") is None


def test_the_variable_names_the_directory(directory, monkeypatch):
    monkeypatch.setenv("PKGCI_CONFIG", str(directory))
    assert Config().directory == directory
    monkeypatch.delenv("PKGCI_CONFIG")
    assert Config().directory == EMBEDDED


def test_a_missing_directory_is_named_with_the_variable(tmp_path):
    message = refused(lambda: Config(tmp_path / "none"))
    assert message == f"configuration directory {tmp_path}/none does not exist; set PKGCI_CONFIG"


def test_a_missing_file_is_named(directory):
    (directory / "config.yaml").unlink()
    assert (
        refused(lambda: Config(directory).settings)
        == f"{directory}/config.yaml: cannot read: No such file or directory"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("store_days: 30\nstroe_days: 3\n", "config.yaml:2: stroe_days: unknown key"),
        ("limits:\n  seconds: 60\n  second: 3\n", "config.yaml:3: limits.second: unknown key"),
        (
            "limits:\n\n  seconds: '60'\n",
            "config.yaml:3: limits.seconds: Input should be a valid integer",
        ),
        ("url: http://[::1/\n", "config.yaml:1: url: Value error, 'http://[::1/' is no URL: Invalid IPv6 URL"),
        (
            "url: http://127.0.0.1:70000/\n",
            "config.yaml:1: url: Value error, 'http://127.0.0.1:70000/' is no URL: Port",
        ),
        ("url: http://127.0.0.1:0/\n", "config.yaml:1: url: Value error, 'http://127.0.0.1:0/' is no URL: port 0"),
        ("gerrit: ssh://review:port/\n", "config.yaml:1: gerrit: Value error, 'ssh://review:port/' is no URL: Port"),
        ("repositories:\n- http://[/\n", "config.yaml:2: repositories.0: Value error, 'http://[/' is no URL: Invalid"),
        ("serve: " + "[" * 5000, "config.yaml: nested too deeply"),
        ("serve: 1\n", "config.yaml:1: serve: Input should be a valid boolean"),
        ("store_days: true\n", "config.yaml:1: store_days: Input should be a valid integer"),
        ("store_days: 0\n", "config.yaml:1: store_days: Input should be greater than or equal to 1"),
        ("store_days:\n", "config.yaml:1: store_days: Input should be a valid integer"),
        ("store_days: .inf\n", "config.yaml: not valid YAML: Out of range float values are not JSON compliant"),
        (
            "sources:\n- https://good.example.org/\n- https://bad.example.org\n",
            "config.yaml:3: sources.1: String should match pattern",
        ),
        ("sources: https://good.example.org/\n", "config.yaml:1: sources: Input should be a valid array"),
        ("sources:\n- [https://good.example.org/]\n", "config.yaml:2: sources.0: Input should be a valid string"),
        ("gerrit: ext::sh -c id/\n", "config.yaml:1: gerrit: String should match pattern"),
        ("executors:\n  build: 0\n", "config.yaml:2: executors.build: Input should be greater than or equal to 1"),
        ("executors:\n  build: 2\n  tests: 3\n", "config.yaml:3: executors.tests: unknown key"),
        ("- store_days: 30\n", "config.yaml:1: the file: Input should be an object"),
        ("store_days: 30\nlimits: {seconds: 1\n", "config.yaml:3: not valid YAML: expected ',' or '}'"),
        (
            "store_days: 30\nserve: true\nstore_days: 31\n",
            "config.yaml:3: not valid YAML: key 'store_days' given twice",
        ),
        (
            "limits:\n  seconds: 1\n  seconds: 2\n",
            "config.yaml:3: not valid YAML: key 'seconds' given twice",
        ),
        ("serve: true\n? [a, b]\n: c\n", "config.yaml:2: not valid YAML: a key must be a plain word"),
        ("serve: true\n--- \nserve: false\n", "config.yaml:2: not valid YAML: but found another document"),
        ("serve: !!python/object/apply:os.getcwd []\n", "config.yaml:1: not valid YAML: could not determine a constr"),
        ("serve: &a [*a]\n", "config.yaml: not valid YAML: Circular reference"),
        ("serve: 2024-99-99\n", "config.yaml: not valid YAML: month must be in 1..12"),
        ("serve: \0\n", "config.yaml: not valid YAML: unacceptable character #x0000"),
        ("url: ü\n".encode("latin-1"), "config.yaml: not UTF-8 text"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_file_line_and_rule(directory, text, message):
    assert settings_refused(directory, text).startswith(message)


def test_an_expression_that_is_none_is_said_with_its_line(directory):
    (directory / "releases" / "r.yaml").write_text("targets: []\nbranches:\n- main\n- 'stable/('\n")
    message = refused(lambda: Config(directory).release("r"))
    assert message.startswith(f"{directory}/releases/r.yaml:4: branches.1: ")
    assert "'stable/(' is not a regular expression" in message


@pytest.mark.parametrize("path", ["../other", "tests/../..", "/etc", ".", "./tests", "a//b", ""])
def test_an_allowed_path_stays_in_the_tree(directory, path):
    (directory / "packages" / "p.yaml").write_text(f"source: p\nallow:\n- tests\n- '{path}'\n")
    message = refused(lambda: Config(directory).package("p"))
    assert message.startswith(f"{directory}/packages/p.yaml:4: allow.1: ")
    assert message.endswith("must be a relative path, without '.' and '..'")


@pytest.mark.parametrize("project", ["../p", "-p", "a//b", "/p", "p/", "a b", "p;id"])
def test_a_package_is_built_from_a_project_with_a_plain_name(directory, project):
    (directory / "packages" / "p.yaml").write_text(f"source: '{project}'\n")
    assert f"{directory}/packages/p.yaml:1: source: " in refused(lambda: Config(directory).package("p"))


def test_an_unknown_target_lists_the_known(directory):
    for name in ("bookworm-amd64", "trixie-amd64"):
        (directory / "targets" / f"{name}.yaml").write_text(TARGET)
    message = refused(lambda: Config(directory).target("bookwurm-amd64"))
    assert message == f"unknown target 'bookwurm-amd64'; {directory}/targets has: bookworm-amd64, trixie-amd64"


def test_exactly_one_target_of_a_codename_builds_what_is_architecture_independent(directory):
    for name, independent in (("one", "true"), ("two", "false")):
        (directory / "targets" / f"{name}.yaml").write_text(f"{TARGET}independent: {independent}\n")
    assert list(Config(directory).targets()) == ["one", "two"]
    (directory / "targets" / "two.yaml").write_text(TARGET)
    rule = "`independent: true`; exactly one builds what is architecture-independent, and the source"
    several = refused(Config(directory).targets)
    assert several == f"{directory}/targets: codename bookworm: one and two with {rule}"
    for name in ("one", "two"):
        (directory / "targets" / f"{name}.yaml").write_text(f"{TARGET}independent: false\n")
    assert refused(Config(directory).targets) == f"{directory}/targets: codename bookworm: no target with {rule}"


RPM = """\
format: rpm
codename: el9
architecture: amd64
tag: el9
base: rpm
upstream:
  repositories:
  - http://mirror.example.org/el9
  keys:
  - keys/el9.asc
"""


@pytest.fixture
def keys(directory: Path) -> Path:
    """The configuration's directory of keys, with one that is none."""
    place = directory / "keys"
    place.mkdir()
    (place / "el9.asc").write_text("-----BEGIN PGP PUBLIC KEY BLOCK-----\n")
    (place / "bad.asc").write_text("nonsense\n")
    (place / "binary.asc").write_bytes(b"\x99\x01")
    return place


def test_a_target_of_an_rpm_distribution_holds_the_texts_of_its_keys(directory, keys):
    (directory / "targets" / "t.yaml").write_text(RPM)
    upstream = Config(directory).target("t").upstream
    assert upstream.keys == ((keys / "el9.asc").read_text(),)
    assert upstream.index_signed


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("keys/el9.asc", "keys/none.asc", "10: upstream.keys.0: Value error, cannot read keys/none.asc in the conf"),
        ("keys/el9.asc", "keys/binary.asc", "10: upstream.keys.0: Value error, cannot read keys/binary.asc in the"),
        ("keys/el9.asc", "keys/bad.asc", "10: upstream.keys.0: Value error, keys/bad.asc is no public key; it must be"),
        ("keys/el9.asc", "../el9.asc", "10: upstream.keys.0: Value error, must be a relative path"),
        ("  keys:\n  - keys/el9.asc\n", "", "6: upstream: Value error, the base `rpm` needs `keys`, the files of"),
        (
            "  repositories:\n  - http://mirror.example.org/el9\n",
            "",
            "6: upstream: Value error, the base `rpm` takes `",
        ),
        (
            "  keys:",
            "  machine: true\n  keys:",
            "6: upstream: Value error, the base `rpm` takes `repositories`, its base",
        ),
        (
            "org/el9",
            "org/$releasever/",
            "6: upstream: Value error, 'http://mirror.example.org/$releasever/' is no base",
        ),
        (
            "http:",
            "file:",
            "6: upstream: Value error, 'file://mirror.example.org/el9' is no base URL; it must be http(s)",
        ),
        ("rpm\n", "deb\n", "6: upstream: Value error, the base `rpm` is for the format `rpm` only"),
        ("base: rpm", "base: debian", "6: upstream: Value error, `keys` are for the base `rpm`; Debian's come with"),
    ],
)
def test_what_is_wrong_in_a_target_of_an_rpm_distribution_is_said_with_its_line(directory, keys, old, new, message):
    assert keys.is_dir()
    (directory / "targets" / "t.yaml").write_text(RPM.replace(old, new, 1))
    said = refused(lambda: Config(directory).target("t"))
    assert said.startswith(f"{directory}/targets/t.yaml:{message}")


@pytest.mark.parametrize(
    ("upstream", "said"),
    [
        ("{}", "takes either `machine: true` or `repositories`"),
        ("{machine: true, repositories: ['http://h/debian bookworm main']}", "takes either `machine: true` or"),
        ("{repositories: [http://h/debian]}", "'http://h/debian' is no line of a repository; it must be `http(s)://"),
        ("{repositories: ['http://h/debian bookworm']}", "is no line of a repository"),
        ("{repositories: ['http://h/debian bookworm main\tx']}", "is no line of a repository"),
        ("{repositories: ['deb http://h/debian bookworm main']}", "is no line of a repository"),
        ("{repositories: ['http://[h/debian bookworm main']}", "is no URL: Invalid IPv6 URL"),
    ],
)
def test_what_is_wrong_in_the_upstream_of_a_target_of_debian_is_said_with_its_line(directory, upstream, said):
    (directory / "targets" / "t.yaml").write_text(TARGET.replace("\n  machine: true", f" {upstream}"))
    message = refused(lambda: Config(directory).target("t"))
    assert message.startswith(f"{directory}/targets/t.yaml:5: upstream: Value error, ")
    assert said in message


def test_a_link_to_no_entry_is_named(directory):
    (directory / "packages" / "gone.yaml").symlink_to("nowhere")
    assert refused(lambda: Config(directory).package_of("a")).startswith(f"{directory}/packages/gone.yaml: cannot read")


def test_a_user_without_a_home_is_told_what_to_set(directory, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path("~none").expanduser())
    assert "set HOME or XDG_DATA_HOME, or paths.data in config.yaml" in refused(lambda: Config(directory).data)


def test_the_example_of_a_configuration_is_valid():
    config = Config(ROOT / "etc" / "example")
    assert config.settings.url
    assert {config.target(name).base for name in config.names("targets")} == {"debian", "rpm"}


def test_nothing_is_built_where_two_targets_build_what_is_architecture_independent(directory, monkeypatch):
    for name in ("one", "two"):
        (directory / "targets" / f"{name}.yaml").write_text(TARGET)
    monkeypatch.setenv("PKGCI_CONFIG", str(directory))
    assert "one and two with" in refused(lambda: build(StepContext(), "one", Parameters.read({})))


@pytest.mark.parametrize("name", ["../config", "a/b", "", ".x", "-x", "A", "a\n"])
def test_a_name_of_an_entry_leads_to_no_other_file(directory, name):
    assert "is not allowed; it must match" in refused(lambda: Config(directory).target(name))


def test_a_branch_belongs_to_the_release_that_matches_all_of_it(directory):
    (directory / "releases" / "one.yaml").write_text("targets: []\nbranches: ['main', 'stable/1\\..*']\n")
    config = Config(directory)
    assert config.release_of("main") == ("one", config.release("one"))
    assert config.release_of("stable/1.2") is not None
    assert config.release_of("mainline") is None
    assert config.release_of("stable/10") is None


def test_both_projects_of_a_pair_lead_to_its_package(directory):
    (directory / "packages" / "hello.yaml").write_text("source: up/hello\npackaging: packaging/hello\n")
    config = Config(directory)
    assert [config.package_of(name) for name in ("up/hello", "packaging/hello", "hello")] == ["hello", "hello", None]


def test_a_project_belongs_to_one_package(directory):
    (directory / "packages" / "one.yaml").write_text("source: shared\n")
    (directory / "packages" / "two.yaml").write_text("source: two\npackaging: shared\n")
    message = refused(lambda: Config(directory).package_of("two"))
    assert message.startswith(f"{directory}/packages/two.yaml: project shared already belongs to package one")


def reads(monkeypatch) -> list[Path]:
    """Return the list to which the name of each file that is read from now on is added."""
    seen, load = [], module._load

    def counted(path, model):
        seen.append(path)
        return load(path, model)

    monkeypatch.setattr(module, "_load", counted)
    return seen


def test_ten_thousand_packages_are_read_once_and_then_the_one_that_is_asked_for(directory, monkeypatch):
    for number in range(10_000):
        (directory / "packages" / f"p{number}.yaml").write_text(f"source: group/p{number}\n")
    seen = reads(monkeypatch)
    Config(directory).package_of("group/p1")
    assert len(seen) == 10_001
    seen.clear()
    config = Config(directory)
    # not even looked at: ten thousand files take a while
    monkeypatch.setattr(module.os, "scandir", None)
    name = config.package_of("group/p9999")
    assert config.package(name).source == "group/p9999"
    assert seen == [directory / "config.yaml", directory / "packages" / "p9999.yaml"]


def test_the_index_follows_new_edited_and_removed_entries(directory):
    entry = directory / "packages" / "p.yaml"
    assert Config(directory).package_of("old") is None
    entry.write_text("source: old\n")
    assert Config(directory).package_of("old") == "p"
    entry.write_text("source: new\n")
    os.utime(entry, ns=(1, 1))
    assert Config(directory).package_of("old") is None
    assert Config(directory).package_of("new") == "p"
    entry.unlink()
    assert Config(directory).package_of("new") is None


def test_an_entry_that_is_edited_in_its_place_is_noticed(directory):
    one, two = (directory / "packages" / f"{name}.yaml" for name in ("one", "two"))
    one.write_text("source: first\n")
    two.write_text("source: other\n")
    assert Config(directory).package_of("first") == "one"
    before = (directory / "packages").stat().st_mtime_ns
    one.write_text("source: other\n")
    two.write_text("source: first\n")
    assert (directory / "packages").stat().st_mtime_ns == before
    assert [Config(directory).package_of(name) for name in ("first", "other")] == ["two", "one"]


def test_only_what_has_changed_is_read_again(directory, monkeypatch):
    for number in range(10):
        (directory / "packages" / f"p{number}.yaml").write_text(f"source: group/p{number}\n")
    Config(directory).package_of("group/p1")
    (directory / "packages" / "p5.yaml").write_text("source: elsewhere\n")
    seen = reads(monkeypatch)
    assert Config(directory).package_of("elsewhere") == "p5"
    assert seen == [directory / "config.yaml", directory / "packages" / "p5.yaml"]


def test_an_index_cut_short_by_a_crash_is_made_again(directory):
    (directory / "packages" / "p.yaml").write_text("source: p\n")
    assert Config(directory).package_of("p") == "p"
    for cached in (Config(directory).cache / "projects").iterdir():
        cached.write_text("")
    assert Config(directory).package_of("p") == "p"


def test_an_editors_lock_is_no_entry(directory):
    (directory / "packages" / "p.yaml").write_text("source: p\n")
    (directory / "packages" / ".#p.yaml").symlink_to("somebody@host.1234")
    config = Config(directory)
    assert config.names("packages") == ["p"]
    assert config.package_of("p") == "p"


def test_places_are_those_of_xdg(directory, monkeypatch):
    (directory / "config.yaml").write_text("")
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    monkeypatch.setenv("XDG_STATE_HOME", "relative, which XDG says to ignore")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    config = Config(directory)
    places = [config.cache, config.state, config.data]
    assert places == [
        Path("/var/cache/pkgci"),
        Path("/home/somebody/.local/state/pkgci"),
        Path("/home/somebody/.local/share/pkgci"),
    ]


def test_places_may_be_configured_with_variables(directory, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("DISK", "/srv/disk")
    (directory / "config.yaml").write_text("paths: {cache: ~/c, state: /var/s, data: $DISK/d}\n")
    config = Config(directory)
    assert [config.cache, config.state, config.data] == [Path("/home/somebody/c"), Path("/var/s"), Path("/srv/disk/d")]


@pytest.mark.parametrize("place", ["cache", "$NOT_SET/cache", "~nobody-has-this-name/cache"])
def test_a_place_that_depends_on_where_one_stands_is_refused(directory, place):
    (directory / "config.yaml").write_text(f"paths: {{cache: {place}}}\n")
    message = refused(lambda: Config(directory).cache)
    assert message == f"{directory}/config.yaml:1: paths.cache: Value error, {place!r} is no absolute path"


def test_a_packages_limits_stand_over_those_of_the_configuration(directory):
    (directory / "config.yaml").write_text("limits: {seconds: 100, disk_mib: 500}\n")
    (directory / "packages" / "a.yaml").write_text("source: a\nlimits: {seconds: 200}\n")
    (directory / "packages" / "b.yaml").write_text("source: b\n")
    config = Config(directory)
    assert config.limits(config.package("a")) == Limits(seconds=200, disk_mib=500)
    assert config.limits(config.package("b")) == Limits(seconds=100, disk_mib=500)


URL = "url: http://m.example.org/"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{{{URL}}}", "mirrors.m: Value error, it needs either `rsync`, or `ssh` and `path`"),
        (f"{{{URL}, rsync: rsync://m/r/, path: /}}", "mirrors.m: Value error, `path` says where `ssh` leads to"),
        (f"{{{URL}, rsync: rsync://m/}}", "mirrors.m.rsync: String should match pattern"),
        (f"{{{URL}, rsync: rsync://m/../r/}}", "mirrors.m.rsync: String should match pattern"),
        (f"{{{URL}, rsync: '--rsh=sh://m/r/'}}", "mirrors.m.rsync: String should match pattern"),
        (
            f"{{{URL}, rsync: rsync://m/r/, keep_days: 2}}",
            "mirrors.m.keep_days: Input should be greater than or equal to 3",
        ),
        ("{url: 'http://m.example.org', rsync: rsync://m/r/}", "mirrors.m.url: String should match pattern"),
    ],
)
def test_a_mirror_is_reached_in_one_way(directory, text, message):
    (directory / "releases" / "r.yaml").write_text(f"branches: [main]\ntargets: []\nmirrors:\n  m: {text}\n")
    assert refused(lambda: Config(directory).release("r")).startswith(f"{directory}/releases/r.yaml:4: {message}")


def test_two_mirrors_at_one_place_are_refused(directory):
    (directory / "config.yaml").write_text(f"released: {{gnupg_home: /nowhere, key: {'A' * 40}}}\n")
    for name in ("one", "two"):
        (directory / "releases" / f"{name}.yaml").write_text(
            f"branches: [{name}]\ntargets: []\nmirrors:\n  m: {{{URL}, rsync: rsync://m/r/}}\n"
        )
    message = refused(lambda: mirrored(Config(directory), "two"))
    expected = "mirrors.m: m of release one is at the same place; each needs one of its own"
    assert message == f"{directory}/releases/two.yaml:4: {expected}"
