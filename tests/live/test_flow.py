"""From a push to its vote, its gate and its publication, with all servers real."""

import sys
from pathlib import Path

import pytest
import trees
from clients import Apt, dnf, run
from processes import with_marker
from stack import DEB, RPM, Stack

from pkgci import web
from pkgci.artifacts import Gate, Result
from pkgci.engines.base import BuildRef
from pkgci.server import serve

LIB, APP = "quick-lib", "quick-app"


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    projects = {name: trees.deb(name) for name in (LIB, APP, "quick-other")}
    # a dnf that knows one repository has no shell to offer
    projects["full"] = trees.deb("full") | trees.rpm("full", more="AutoReq: no\n")
    files = trees.deb("quick-pair")
    projects["quick-pair-packaging"] = {name: files[name] for name in files if name.startswith("debian/")}
    projects["quick-pair"] = {name: files[name] for name in files.keys() - projects["quick-pair-packaging"].keys()}
    pairs = {"quick-pair": ("quick-pair", "quick-pair-packaging")}
    with Stack(tmp_path_factory.mktemp("live"), projects, pairs) as made:
        yield made


def rules(*script: str, step: str = "override_dh_auto_build") -> dict[str, str]:
    """Return the rules of a package that runs a script before it is built."""
    lines = "".join(f"\t{line}\n" for line in script)
    return {"debian/rules": f"{trees.RULES}\n{step}:\n{lines}"}


def text(url: str) -> str:
    return web.read(url, upstream=False, largest=1 << 24).decode()


def offered(stack: Stack, place: Path, name: str, repository: Path) -> list[str]:
    """Return the files that users get who install a package from a released repository, by apt or dnf itself."""
    with serve(stack.config):
        if (repository / "pkgci.repo").exists():
            got = place / "got"
            words = ("install", "--downloadonly", f"--downloaddir={got}", name)
            dnf(place, (repository / "pkgci.repo").read_text(), *words)
        else:
            got = place / "cache" / "archives"
            apt = Apt(place, (repository / "pkgci.sources").read_text())
            apt("update")
            apt("-y", "--download-only", "install", name)
    return sorted(path.name for path in got.iterdir() if path.suffix in (".deb", ".rpm"))


def published(stack: Stack, name: str, number: int, target: str = DEB) -> str:
    """Wait until a merged change is published; return its version, which is that of its gate, and was not built again."""
    result = stack.published(name, target)
    assert [child.job for child in result.children] == [f"publish-{target}"], result.reason
    *_, last = stack.of_change(f"gate-{target}", number)
    gated = {one.project: one.version for one in Gate.read(stack.archived(last, "gate.json")).builds}
    version = gated[f"packages/{name}"]
    # what was tested together is published together, by the first one
    said = (f"{name} {version} at", f"{name} {version} of this merge is released already")
    assert any(words in result.reason for words in said), result.reason
    return version


def queued(stack: Stack, build: BuildRef) -> list[str]:
    """Return the packages' projects in the queue that a build was started with."""
    changes = stack.engine.record(build).parameters["ZUUL_CHANGES"].split("^")
    return [item.partition(":")[0].removeprefix("packages/") for item in changes]


@pytest.fixture
def jenkins(stack):
    """The stack, where Zuul's jobs run on the server of Jenkins' line."""
    stack.use("jenkins")
    yield stack
    stack.use("local")


def test_a_change_goes_all_the_way_from_its_push_to_the_mirrors(jenkins, tmp_path):
    stack = jenkins
    number = stack.push("full", {"README": "one\n"})
    assert stack.voted(number) == 1, stack.said(number)
    said = [line.strip() for line in stack.said(number).splitlines()]
    (trying,) = (line for line in said if line.startswith(f"build-{DEB}: to try it: "))
    assert "sudo apt-get install full=1.0+pkg1.2~t" in trying
    (links,) = (line.split() for line in said if line.startswith(f"build-{DEB}: report: "))
    assert "full_1.0+pkg1.2~t" in text(links[2])
    assert "SUCCESS" in text(links[4])
    found = {one["job_name"]: one for one in stack.zuul.builds(change=number)}
    assert {name: one["result"] for name, one in found.items()} == {
        f"build-{DEB}": "SUCCESS",
        f"build-{RPM}": "SUCCESS",
    }
    assert {one["name"] for one in found[f"build-{DEB}"]["artifacts"]} == {"Log", "Report", "Test repository"}
    (build,) = stack.of_change(f"build-{DEB}", number)
    children = [child.job for child in Result.read(stack.archived(build, "result.json")).children]
    assert {f"{step}-{DEB}" for step in ("compile", "publish", "lint", "install", "systest")} <= set(children)

    stack.gerrit.approve(number)
    stack.merged(number)
    for target, form in ((DEB, "full_{}_all.deb"), (RPM, "full-{}.noarch.rpm")):
        file = form.format(published(stack, "full", number, target))
        for where in (stack.released(target), stack.mirrored(target)):
            assert offered(stack, tmp_path / where.parent.name / target, "full", where) == [file]


def test_a_broken_package_is_refused_with_the_reason_and_mended_by_a_new_patch_set_or_a_recheck(stack):
    # what a package says is no template of the playbook's
    broken = {"main.c": "#error {{ 6 * 7 }}\nint main(void)\n{\n    return\n}\n", **rules("gcc -o main main.c")}
    number = stack.push(LIB, broken, "Break it")
    assert stack.voted(number) == -1
    reason = f"{LIB}: the build failed: main.c:1:2: error: #error {{{{ 6 * 7 }}}}"
    assert [line for line in stack.said(number).splitlines() if line.endswith(reason)] != [], stack.said(number)
    found = stack.gerrit.ask("get", f"changes/{number}/revisions/current/robotcomments")
    first, second = found["main.c"]
    assert (first["line"], first["message"]) == (1, f"error: #error {{{{ 6 * 7 }}}} [build-{DEB}]")
    assert second["line"] == 5
    assert "expected expression" in second["message"]

    asked = len(stack.gerrit.messages(number, "zuul"))
    stack.gerrit.review(number, "recheck the weather has changed")
    stack.wait(lambda: len(stack.gerrit.messages(number, "zuul")) > asked, "it is tested again")
    assert len(stack.of_change(f"build-{DEB}", number)) == 2
    stack.gerrit.amend(stack.tree(LIB), {"main.c": "int main(void)\n{\n    return 0;\n}\n"}, f"packages/{LIB}")
    assert stack.voted(number) == 1, stack.said(number)


def test_a_new_patch_set_ends_all_that_runs_for_the_old_one(stack, tmp_path):
    marker = f"sleep 98{hash(str(tmp_path)) % 10000:04}"
    number = stack.push(LIB, rules(marker), "Take long")
    stack.wait(lambda: with_marker(marker.replace(" ", "\0")), "it is being built")
    (build,) = stack.of_change(f"build-{DEB}", number)
    stack.gerrit.amend(stack.tree(LIB), {"debian/rules": trees.RULES}, f"packages/{LIB}")
    stack.wait(lambda: not with_marker(marker.replace(" ", "\0")), "nothing of it runs any more", 60)
    assert stack.engine.wait(build, 30) == "ABORTED"
    assert stack.voted(number) == 1, stack.said(number)


def test_approved_changes_are_gated_together_and_one_that_fails_is_thrown_out(stack, tmp_path):
    # what a check builds has a version of its own
    only_checked = rules("dpkg-parsechangelog -S Version | grep -q '~t'", step="override_dh_install")
    bad = stack.push("quick-other", only_checked, "Fail in the gate")
    lib = stack.push(LIB, {"README": "two\n"}, "Improve the library")
    app = stack.push(APP, {"README": "two\n"}, "Improve the application")
    for number in (bad, lib, app):
        assert stack.voted(number) == 1, stack.said(number)
    for number in (bad, lib, app):
        stack.approve(number)
    stack.merged(lib, app)
    assert not stack.gerrit.merged(bad)
    assert stack.gerrit.votes(bad, "Verified") == {"zuul": -2}
    first, *_, last = stack.of_change(f"gate-{DEB}", app)
    assert queued(stack, first) == ["quick-other", LIB, APP]
    assert queued(stack, last) == [LIB, APP]
    gate = Gate.read(stack.archived(last, "gate.json"))
    assert [build.package for build in gate.builds] == [LIB, APP]
    assert (gate.systest, gate.recorded) == ("SUCCESS", True)
    children = Result.read(stack.archived(last, "result.json")).children
    (together,) = (child.parameters["REPOSITORIES"] for child in children if child.job == f"systest-{DEB}")
    assert len([url for url in together.split() if "/test/" in url]) == len(gate.builds)
    for name, number in ((LIB, lib), (APP, app)):
        # the very files that the gate has tested
        file = f"{name}_{published(stack, name, number)}_all.deb"
        assert offered(stack, tmp_path / name, name, stack.released()) == [file]


def test_a_change_is_built_against_the_one_that_it_depends_on(stack):
    lib = stack.push(
        LIB, {"feature": "1\n", f"debian/{LIB}.install": f"{LIB} usr/bin\nfeature usr/share/{LIB}\n"}, "Feature"
    )
    control = trees.CONTROL.format(name=APP, depends=f", {LIB}")
    needs = {"debian/control": control, **rules(f"cat /usr/share/{LIB}/feature")}
    app = stack.push(APP, needs, f"Use the feature\n\nDepends-On: {stack.gerrit.url}c/packages/{LIB}/+/{lib}")
    assert stack.voted(app) == 1, stack.said(app)
    (build,) = stack.of_change(f"build-{DEB}", app)
    assert queued(stack, build) == [LIB, APP]
    # approved alone it waits for the other one
    stack.gerrit.approve(app)
    assert stack.voted(lib) == 1
    stack.gerrit.approve(lib)
    stack.merged(lib, app)
    for name, number in ((LIB, lib), (APP, app)):
        published(stack, name, number)


def test_a_source_and_its_packaging_that_need_each_other_are_merged_together(stack):
    source = stack.push("quick-pair", {"data": "1\n"}, "Data")
    packaging = stack.push(
        "quick-pair-packaging",
        {"debian/quick-pair.install": "quick-pair usr/bin\ndata usr/share/quick-pair\n"},
        f"Install the data\n\nDepends-On: {stack.gerrit.url}c/packages/quick-pair/+/{source}",
    )
    assert stack.voted(packaging) == 1, stack.said(packaging)
    assert stack.voted(source) == 1
    stack.gerrit.approve(packaging)
    stack.gerrit.approve(source)
    stack.merged(source, packaging)
    reasons = [stack.published(name).reason for name in ("quick-pair", "quick-pair-packaging")]
    assert "quick-pair 1.0+pkg1.4-1+deb12" in " ".join(reasons)


def test_a_topic_is_tested_and_merged_at_once(stack):
    names = (LIB, "quick-other")
    numbers = [stack.push(name, {"topic": "1\n"}, "Together", topic="together") for name in names]
    for number in numbers:
        assert stack.voted(number) == 1, stack.said(number)
    for number in numbers:
        stack.gerrit.approve(number)
    stack.merged(*numbers)
    for name, number in zip(names, numbers, strict=True):
        *_, last = stack.of_change(f"gate-{DEB}", number)
        assert sorted(one.package for one in Gate.read(stack.archived(last, "gate.json")).builds) == sorted(names)
        published(stack, name, number)


def test_what_is_submitted_by_force_is_published_as_not_tested_and_that_is_said(stack, tmp_path):
    number = stack.push("quick-other", {"README": "forced\n"}, "Force it")
    stack.gerrit.submit_by_force(number)
    stack.wait(lambda: any("NOT TESTED" in one for one in stack.gerrit.messages(number, "pkgci")), "it is said")
    assert "NOT TESTED AS PUBLISHED" in stack.published("quick-other").reason
    assert offered(stack, tmp_path, "quick-other", stack.released()) != []


def test_an_infrastructure_fault_a_killed_executor_and_a_restarted_gerrit_change_nothing(stack, tmp_path):
    stack.idle()
    fault = tmp_path / "fault"
    fault.mkdir()
    # of the first one who asks
    stack.sshd.answers(f"rmdir {fault} && exit 3; exec {stack.command}")
    marker = f"sleep 5.{hash(str(tmp_path)) % 10000:04}"
    number = stack.push(LIB, {**rules(marker), "README": str(tmp_path)}, "Meet a crash")
    stack.wait(lambda: with_marker(marker.replace(" ", "\0")), "it is being built")
    stack.zuul.kill("executor")
    stack.zuul.start_part("executor")
    stack.gerrit.restart()
    assert stack.voted(number) == 1, stack.said(number)
    votes = [said for said in stack.gerrit.messages(number, "zuul") if "Verified" in said]
    assert len(votes) == 1
    again = stack.push("quick-other", {"README": "after\n"}, "After it")
    assert stack.voted(again) == 1
    ended = [stack.engine.state(ref) for ref in stack.of_change(f"build-{DEB}", number)]
    assert ended == ["ABORTED", "SUCCESS"]
    assert not fault.exists()
    results = [one["result"] for one in stack.zuul.builds(change=number)]
    # the fault, and what the executor had
    assert results.count("RETRY") >= 2
    assert results.count("SUCCESS") == 2


def test_a_job_is_started_by_hand_with_its_parameters(stack):
    given = ("ZUUL_PROJECT=packages/full", "ZUUL_BRANCH=main", "ONLY=compile")
    pkgci = Path(sys.executable).parent / "pkgci"
    done = run(pkgci, "jobs", "run", f"build-{DEB}", *given, env={"PKGCI_CONFIG": str(stack.config.directory)})
    assert f"compile-{DEB}" in done.stdout
    assert "full 1.0+pkg1." in done.stdout


def test_branches_that_a_release_claims_are_voted_on_and_no_others(stack):
    tree, project = stack.tree("quick-other"), "packages/quick-other"
    stack.push("quick-other", {"README": "as well\n"}, "On main")
    numbers = {}
    for branch in ("experimental", "stable/1"):
        trees.git(tree, "checkout", "-q", "--detach", "HEAD~")
        stack.gerrit.push_directly(tree, project, branch)
        trees.commit(tree, {"README": f"{branch}\n"}, f"On {branch}")
        numbers[branch] = stack.gerrit.push(tree, project, branch)
    assert stack.voted(numbers["stable/1"]) == 1, stack.said(numbers["stable/1"])
    assert stack.gerrit.messages(numbers["experimental"], "zuul") == []
    assert stack.of_change(f"build-{DEB}", numbers["experimental"]) == []
