"""Parameters: what each may be, and that nothing else gets through."""

from pathlib import Path

import pytest

from pkgci.change import EVERY, Parameters, QueueItem, local_changes
from pkgci.config import Config
from pkgci.errors import RequestError

ID = "0123456789abcdef0123456789abcdef01234567"
GOOD = "https://good.example.org/p/"

ACCEPTED = {
    "ZUUL_PROJECT": ["hello", "group/hello", "a/b/c_d", "libstdc++", "0ad", "_x", "Hello.World"],
    "ZUUL_BRANCH": ["main", "stable/1.0", "feature/a#12", "user@host", "a=b,c", "dependabot/pip/x-1.2+3"],
    "ZUUL_CHANGE": ["1", "123456"],
    "ZUUL_PATCHSET": ["1", "12"],
    "ZUUL_CHANGES": ["p:main:refs/changes/01/1/1", "p:main:refs/changes/01/1/1^g/q:stable/1:refs/changes/02/2/3"],
    "ZUUL_PIPELINE": ["check", "gate", "periodic-daily"],
    "ZUUL_UUID": ["0123456789abcdef0123456789ABCDEF", "a-b-c"],
    "ZUUL_REF": ["refs/zuul/main/Zabc", "refs/changes/01/1/1", "refs/heads/main"],
    "ZUUL_URL": ["https://good.example.org:8080/p", "ssh://zuul@good.example.org/", "file:///srv/git/", "git://[::1]/"],
    "ZUUL_COMMIT": [ID],
    "ZUUL_REFNAME": ["main", "refs/heads/stable/1.0"],
    "ZUUL_OLDREV": [ID, "0" * 40],
    "ZUUL_NEWREV": [ID],
    "RUN_TESTS": ["true", "false"],
    "ONLY": ["lint", "compile,lint", "systest,install,publish"],
    "BUILD_PROFILES": ["nocheck", "nodoc,pkg.hello.static", "x_y,stage1,c++"],
    "BUILD_MINUTES": ["1", "90", "180"],
    "REPRODUCIBLE": ["true", "false"],
    "KEEP_ROOT": ["true", "false"],
    "AGAIN": ["true", "false"],
    "BUILD_KEY": ["f" * 64],
    "BUILD_KEYS": ["f" * 64, f"{'e' * 64} {'f' * 64}"],
    "TEST_REPOSITORY": ["true", "false"],
    "SYSTEM_TESTS": ["systest-bookworm-amd64/3", "systest-bookworm-amd64/3 systest-bookworm-amd64/4"],
    "PACKAGE": ["hello", "libstdc++6", "0ad"],
    "REPOSITORIES": [f"{GOOD}a/repository.json", f"{GOOD}a/repository.json {GOOD}b/repository.json"],
    "ENVIRONMENT": ["plain", "cluster-3"],
    "RELEASE": ["rocket-2"],
    "EVERYTHING": ["true", "false"],
    "DRY_RUN": ["true", "false"],
    "REMOVE": ["true", "false"],
    "NODE": ["systest", "built-in", "test-host.example.org"],
    "ACTION": ["open", "list", "extend", "close"],
    "BUILD": ["systest-bookworm-amd64/7", "7", "bookworm-amd64"],
    "MACHINES": ["machines", "autopkgtest-hello"],
    "AT_START": ["true", "false"],
    "PUBLIC_KEY": [f"ssh-ed25519 AAAA{'x' * 64} me@example.org", f"ssh-rsa AAAA{'+/xY' * 90}=="],
    "DEBUG_HOLD": ["2h", "24h", "90m", "1440m"],
    "SCENARIOS": ["smoke", "smoke upgrade", "smoke:ha upgrade:Bvt_2"],
    "FLAVOURS": ["depot-agent:bootstrap", "a:master,cluster b:container"],
    "SEED": ["0", "999999999"],
    "SNAPSHOTS": ["f" * 64, f"{'e' * 64} {'f' * 64}"],
    "REPLICATE": ["https://ci.example.org/job/systest-bookworm-amd64/12/", "http://[::1]:8080/jobs/a%20b/builds/1"],
    "REBUILD_SNAPSHOT": ["true", "false"],
    "SOURCE_TREE": [ID],
    "PACKAGING_TREE": [ID],
    "PARENT": ["build-bookworm-amd64/12"],
    "CORRELATION": ["0123-abc"],
}

# what must not get through any parameter
ATTACKS = [
    "../..",
    "../../etc/passwd",
    "/etc/passwd",
    "--upload-pack=x",
    "-oProxyCommand=id",
    "-x",
    "a;id",
    "a|id",
    "a&id",
    "$(id)",
    "`id`",
    "${IFS}",
    "a\nid",
    "a\0b",
    "a'b",
    'a"b',
    "a b",
    "a\\b",
    "a*",
    "ext::sh -c id",
    "ext::sh",
    "fd::0",
    "ａ",  # noqa: RUF001 - a full-width letter
    "٣",
]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "config.yaml").write_text(
        f"sources: ['{GOOD}', 'ssh://zuul@good.example.org/', 'file:///srv/git/']\n"
        "repositories: ['https://packages.example.org/released/']\n"
        f"url: http://127.0.0.1:8470/\npaths: {{state: '{tmp_path}/Zustände, neu'}}\n"
    )
    return Config(tmp_path)


def refused(do) -> str:
    with pytest.raises(RequestError) as caught:
        do()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(config: Config, **values: str):
    return Parameters.read({"ZUUL_PROJECT": "p", "ZUUL_BRANCH": "main", **values}).change(config)


def test_each_parameter_has_examples():
    assert set(ACCEPTED) == set(EVERY)


def test_what_is_a_parameter_of_the_mirrors_jobs_only_is_not_looked_at_by_others():
    assert Parameters.read({"RELEASE": "Debian GNU/Linux 12 (bookworm)"}).get("RELEASE") == ""


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ACCEPTED.items() for value in values])
def test_what_zuul_and_people_send_is_accepted(name, value):
    assert Parameters.read({name: value}, EVERY).get(name) == value


@pytest.mark.parametrize("name", EVERY)
def test_no_parameter_takes_an_attack(name):
    # names of scenarios are separated by spaces
    for attack in (attack for attack in ATTACKS if (name, attack) != ("SCENARIOS", "a b")):
        message = refused(lambda attack=attack: Parameters.read({name: attack}, EVERY))
        assert message.startswith(f"parameter {name}: {attack!r} is not allowed; ")


@pytest.mark.parametrize("name", ["ZUUL_PROJECT", "ZUUL_BRANCH", "ZUUL_REF", "PARENT"])
def test_no_name_takes_an_attack_behind_a_good_beginning(name):
    for value in [f"{good}/{attack}" for good in ACCEPTED[name] for attack in ATTACKS]:
        assert refused(lambda value=value: Parameters.read({name: value})).startswith(f"parameter {name}: ")


@pytest.mark.parametrize(
    "value",
    [
        "p",
        "p:main",
        "p:main:refs/changes/01/1/1^",
        "^p:main:refs/changes/01/1/1",
        "p:main:refs/changes/01/1/1 q:main:refs/changes/01/1/1",
        "p:main:HEAD",
        "p:main:../x",
        "../p:main:refs/changes/01/1/1",
        "p:-x:refs/changes/01/1/1",
        "p:main:refs/a.lock^q:main:refs/b",
    ],
)
def test_a_queue_of_another_form_is_refused(value):
    assert refused(lambda: Parameters.read({"ZUUL_CHANGES": value})).startswith("parameter ZUUL_CHANGES: ")


@pytest.mark.parametrize(
    "branch", ["a..b", "a.lock", "a.lock/b", "a.", "a./b", ".a", "a/.b", "a//b", "a/", "/a", "@{u}"]
)
def test_a_branch_that_git_would_not_take_is_refused(branch):
    assert refused(lambda: Parameters.read({"ZUUL_BRANCH": branch})).startswith("parameter ZUUL_BRANCH: ")


@pytest.mark.parametrize("project", ["a" * 101, "/".join("a" * 11)])
def test_a_project_is_no_longer_than_a_path_may_be(project):
    assert refused(lambda: Parameters.read({"ZUUL_PROJECT": project})).startswith("parameter ZUUL_PROJECT: ")


def test_a_long_value_is_not_repeated_whole():
    assert len(refused(lambda: Parameters.read({"ZUUL_UUID": "a" * 100_000}))) < 300


def test_unknown_variables_and_empty_parameters_count_as_not_given():
    assert Parameters.read({"ZUUL_BRANCH": " ", "HOME": "/x"}).values == {}


def test_a_parameter_that_is_needed_is_named():
    assert (
        refused(lambda: Parameters.read({}).required("BUILD_KEY")) == "parameter BUILD_KEY: missing; this job needs it"
    )


@pytest.mark.parametrize(("value", "tests"), [("", True), ("true", True), ("false", False)])
def test_tests_run_unless_they_are_switched_off(value, tests):
    assert Parameters.read({"RUN_TESTS": value}).run_tests is tests


def test_a_change_of_a_queue_has_all_before_it_in_order(config):
    made = change(
        config,
        ZUUL_PIPELINE="gate",
        ZUUL_CHANGE="2",
        ZUUL_PATCHSET="3",
        ZUUL_CHANGES="g/q:stable/1:refs/changes/01/1/1^p:main:refs/changes/02/2/3",
        ZUUL_REF="refs/zuul/main/Z1",
        ZUUL_URL=GOOD,
        ZUUL_COMMIT=ID,
    )
    assert made.queue == (
        QueueItem("g/q", "stable/1", "refs/changes/01/1/1"),
        QueueItem("p", "main", "refs/changes/02/2/3"),
    )
    assert (made.project, made.branch, made.pipeline) == ("p", "main", "gate")
    assert (made.ref, made.url, made.commit) == ("refs/zuul/main/Z1", GOOD, ID)


@pytest.mark.parametrize("last", ["q:main:refs/changes/01/1/1", "p:other:refs/changes/01/1/1"])
def test_the_last_change_of_a_queue_is_the_one_itself(config, last):
    message = refused(lambda: change(config, ZUUL_CHANGES=f"p:main:refs/changes/02/2/1^{last}"))
    assert message == "parameter ZUUL_CHANGES: its last change is not one of p, branch main"


def test_a_change_is_named_by_number_and_patch_set(config):
    assert change(config, ZUUL_CHANGE="12", ZUUL_PATCHSET="3").id(ID) == "12,3"


def test_a_change_without_a_number_is_named_by_its_tree(config):
    assert change(config).id(ID) == "01234567"


@pytest.mark.parametrize("refname", ["stable/1.0", "refs/heads/stable/1.0"])
def test_after_a_merge_branch_and_commit_come_from_the_update_of_the_ref(config, refname):
    update = {"ZUUL_REFNAME": refname, "ZUUL_OLDREV": "0" * 40, "ZUUL_NEWREV": ID, "ZUUL_PIPELINE": "post"}
    made = Parameters.read({"ZUUL_PROJECT": "p", **update}).change(config)
    assert (made.branch, made.commit, made.number, made.pipeline) == ("stable/1.0", ID, "", "post")


def test_what_zuul_2_says_again_of_a_branch_that_has_moved_is_left_out(config):
    # the branch's plain name, which is no ref
    values = {"ZUUL_REFNAME": "main", "ZUUL_NEWREV": ID, "ZUUL_REF": "main", "ZUUL_COMMIT": ID}
    made = Parameters.read({"ZUUL_PROJECT": "p", **values})
    assert (made.change(config).commit, made.change(config).ref, made.merged, made.run_tests) == (ID, "", True, False)


def test_a_branch_that_has_moved_has_no_queue():
    queue = {"ZUUL_CHANGES": "p:main:refs/changes/01/1/1", "ZUUL_NEWREV": ID}
    message = refused(lambda: Parameters.read({"ZUUL_PROJECT": "p", **queue}))
    assert message == "parameter ZUUL_CHANGES: not with ZUUL_NEWREV; a branch that has moved has no queue"


@pytest.mark.parametrize(
    ("values", "approved"),
    [
        ({"ZUUL_PIPELINE": "check"}, False),
        ({"ZUUL_PIPELINE": "check", "RUN_TESTS": "false"}, False),
        ({}, False),
        ({"ZUUL_PIPELINE": "gate"}, True),
        ({"ZUUL_PIPELINE": "periodic", "ZUUL_NEWREV": ID}, True),
    ],
)
def test_only_what_is_gated_or_merged_is_approved(config, values, approved):
    assert Parameters.read(values).approved(config) is approved


def test_a_change_needs_a_branch(config):
    message = refused(lambda: Parameters.read({"ZUUL_PROJECT": "p"}).change(config))
    assert message.startswith("parameter ZUUL_BRANCH: missing")


@pytest.mark.parametrize(
    "url",
    [GOOD, GOOD.rstrip("/"), f"{GOOD}deeper", "ssh://zuul@good.example.org", "file:///srv/git/team/"],
)
def test_sources_come_from_below_a_configured_prefix(config, url):
    assert change(config, ZUUL_URL=url).url == f"{url.rstrip('/')}/"


@pytest.mark.parametrize(
    "url",
    [
        "https://good.example.org/",
        "https://good.example.org/pp",
        "https://good.example.org.evil/p/",
        "https://good.example.org@evil/p/",
        "https://good.example.org%2fp@evil/p/",
        "https://user@good.example.org/p/",
        "http://good.example.org/p/",
        "https://good.example.org:8443/p/",
        "https://GOOD.example.org/p/",
        f"{GOOD}%2e%2e/secret/",
        f"{GOOD}%2E%2E/",
        f"{GOOD}%00",
        "ssh://root@good.example.org/",
        "ssh://-oProxyCommand/",
        "ssh://zuul@good.example.org:22/",
        "https://[/",
        "file:///srv/git-secret/",
        "file:///etc/",
        "file:///",
        "file:///srv/git/%2e%2e/",
        "git://good.example.org/p/",
    ],
)
def test_sources_come_from_nowhere_else(config, url):
    message = refused(lambda: change(config, ZUUL_URL=url))
    assert message.startswith(f"parameter ZUUL_URL: {url!r} is not allowed; config.yaml's `sources` are: {GOOD} ")


def test_the_users_own_local_changes_are_accepted_wherever_they_lie(config):
    assert change(config, ZUUL_URL=local_changes(config)).url == local_changes(config)
    assert refused(lambda: change(config, ZUUL_URL=f"{local_changes(config)}%2e%2e/"))


def test_without_a_url_sources_come_from_gerrit(config, tmp_path):
    assert change(config).url == ""
    (tmp_path / "config.yaml").write_text("gerrit: ssh://ci@gerrit.example.org:29418/\n")
    assert change(Config(tmp_path)).url == "ssh://ci@gerrit.example.org:29418/"


def test_repositories_come_from_ours_and_from_configured_prefixes(config):
    urls = (
        "http://127.0.0.1:8470/test/run/t/repository.json",
        "https://packages.example.org/released/1/bookworm/repository.json",
    )
    assert Parameters.read({"REPOSITORIES": " ".join(urls)}).repositories(config) == urls


@pytest.mark.parametrize(
    "url",
    [
        "https://packages.example.org/other/repository.json",
        "https://packages.example.org/releasedx/repository.json",
        "https://packages.example.org.evil/released/repository.json",
        "https://packages.example.org/released/%2e%2e/secret/repository.json",
        "https://packages.example.org/released/Packages",
        "https://packages.example.org/released/xrepository.json",
        "http://127.0.0.1:84700/repository.json",
        "http://127.0.0.1:8471/repository.json",
        "http://127.0.0.1:22/repository.json",
        "http://127.0.0.1:8470:x/repository.json",
        "http://[/repository.json",
        GOOD + "repository.json",
    ],
)
def test_repositories_come_from_nowhere_else(config, url):
    good = "http://127.0.0.1:8470/test/run/t/repository.json"
    message = refused(lambda: Parameters.read({"REPOSITORIES": f"{good} {url}"}).repositories(config))
    assert message.startswith(f"parameter REPOSITORIES: {url} is not allowed; it must be a repository.json below ")


def test_a_run_is_named_by_project_change_and_request():
    values = {"ZUUL_PROJECT": "group/Hello", "ZUUL_CHANGE": "12", "ZUUL_PATCHSET": "3", "CORRELATION": "ABCDEF0123"}
    assert Parameters.read(values).run_name("f" * 64) == "hello-12-3-abcdef01"


def test_a_run_without_a_number_is_named_by_its_build_and_never_twice_the_same():
    parameters = Parameters.read({"ZUUL_PROJECT": "hello"})
    one, other = parameters.run_name("f" * 64), parameters.run_name("f" * 64)
    assert one.startswith("hello-ffffffff-")
    assert one != other


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, "compile publish lint install systest"),
        ({"RUN_TESTS": "false"}, "compile publish"),
        ({"ONLY": "compile"}, "compile"),
        ({"ONLY": "lint"}, "compile lint"),
        ({"ONLY": "install"}, "compile publish install"),
        ({"ONLY": "systest,lint"}, "compile publish lint systest"),
        ({"ONLY": "lint", "RUN_TESTS": "false"}, "compile"),
    ],
)
def test_the_steps_are_those_asked_for_and_what_they_need(given, steps):
    assert " ".join(Parameters.read(given).steps) == steps


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ONLY", "compile,"),
        ("ONLY", "compile lint"),
        ("ONLY", "build"),
        ("BUILD_PROFILES", "NoCheck"),
        ("BUILD_PROFILES", "!nocheck"),
        ("BUILD_PROFILES", "-P"),
        ("BUILD_PROFILES", "a,,b"),
        ("BUILD_PROFILES", ",".join(["a"] * 21)),
        ("BUILD_MINUTES", "0"),
        ("BUILD_MINUTES", "181"),
        ("REPRODUCIBLE", "yes"),
    ],
)
def test_what_a_build_may_be_asked_for_is_bounded(name, value):
    assert refused(lambda: Parameters.read({name: value})).startswith(f"parameter {name}: ")


QUEUE = (
    "lib:main:refs/changes/01/1/1^app:main:refs/changes/02/2/1^lib:main:refs/changes/03/3/4^lib:old:refs/changes/05/5/1"
)


def queued(config: Config, **values: str) -> list[tuple[str, str, str, str]]:
    about = ("ZUUL_PROJECT", "ZUUL_BRANCH", "ZUUL_CHANGE", "ZUUL_CHANGES")
    parts = Parameters.read(values).queued(config)
    return [tuple(part.get(name) for name in about) for part in parts]


def test_a_queue_asks_for_a_build_of_each_package_and_branch_in_its_last_state(config):
    own = {"ZUUL_PROJECT": "app", "ZUUL_BRANCH": "main", "ZUUL_CHANGE": "9", "ZUUL_REF": "refs/zuul/main/Z1"}
    queue = f"{QUEUE}^app:main:refs/changes/09/9/1"
    assert queued(config, **own, ZUUL_CHANGES=queue) == [
        ("lib", "main", "3", "lib:main:refs/changes/01/1/1^lib:main:refs/changes/03/3/4"),
        ("lib", "old", "5", "lib:old:refs/changes/05/5/1"),
        ("app", "main", "9", "app:main:refs/changes/02/2/1^app:main:refs/changes/09/9/1"),
    ]
    # what Zuul has prepared is this change's
    prepared = [part.get("ZUUL_REF") for part in Parameters.read({**own, "ZUUL_CHANGES": queue}).queued(config)]
    assert prepared == ["", "", "refs/zuul/main/Z1"]


def test_the_projects_of_a_pair_are_one_build_of_a_queue(config, tmp_path):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "pair.yaml").write_text("source: app\npackaging: app-packaging\n")
    queue = "app:main:refs/changes/01/1/1^lib:main:refs/changes/02/2/1^app-packaging:main:refs/changes/03/3/1"
    own = {"ZUUL_PROJECT": "app-packaging", "ZUUL_BRANCH": "main", "ZUUL_CHANGE": "3"}
    assert [part[0] for part in queued(config, **own, ZUUL_CHANGES=queue)] == ["lib", "app-packaging"]


def test_local_changes_of_a_queue_are_their_refs(config):
    own = {"ZUUL_PROJECT": "app", "ZUUL_BRANCH": "main", "ZUUL_REF": "refs/changes/b/change"}
    queue = "lib:main:refs/changes/a/change^app:main:refs/changes/b/change"
    parts = Parameters.read({**own, "ZUUL_CHANGES": queue, "ZUUL_URL": local_changes(config)}).queued(config)
    assert [(part.get("ZUUL_PROJECT"), part.get("ZUUL_REF")) for part in parts] == [
        ("lib", "refs/changes/a/change"),
        ("app", "refs/changes/b/change"),
    ]


def test_a_change_without_a_queue_is_one_build(config):
    assert queued(config, ZUUL_PROJECT="p", ZUUL_BRANCH="main") == [("p", "main", "", "")]
