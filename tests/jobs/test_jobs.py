"""What every rendered job must have. A test collects what is wrong in all jobs and reports it at once."""

import re
import shutil
import subprocess
from pathlib import Path

import yaml

from pkgci.config import EMBEDDED, ROOT, Config
from pkgci.engines.definitions import parse

STARTED_BY = {"PARENT", "CORRELATION"}
CHANGE = {
    *("ZUUL_PROJECT", "ZUUL_BRANCH", "ZUUL_CHANGE", "ZUUL_PATCHSET", "ZUUL_CHANGES", "ZUUL_PIPELINE", "ZUUL_UUID"),
    *("ZUUL_REF", "ZUUL_URL", "ZUUL_COMMIT", "ZUUL_REFNAME", "ZUUL_OLDREV", "ZUUL_NEWREV"),
}
COMPILE = {"BUILD_PROFILES", "BUILD_MINUTES", "REPRODUCIBLE", "KEEP_ROOT"}
PARAMETERS = {
    "build": STARTED_BY
    | CHANGE
    | COMPILE
    | {"RUN_TESTS", "REPOSITORIES", "ONLY", "AGAIN", "TEST_REPOSITORY", "DEBUG_HOLD"},
    "compile": STARTED_BY | CHANGE | COMPILE | {"SOURCE_TREE", "PACKAGING_TREE", "REPOSITORIES", "RUN_TESTS"},
    "gate": STARTED_BY | CHANGE | {"DEBUG_HOLD"},
    "order": STARTED_BY | CHANGE,
    "publish": STARTED_BY | CHANGE | {"BUILD_KEY", "TEST_REPOSITORY"},
    "verify": STARTED_BY | CHANGE | {"BUILD_KEYS", "SYSTEM_TESTS"},
    "lint": STARTED_BY | CHANGE | {"REPOSITORIES", "BUILD_KEY", "AGAIN"},
    "install": STARTED_BY | CHANGE | {"REPOSITORIES", "BUILD_KEY", "AGAIN"},
    "systest": STARTED_BY
    | CHANGE
    | {
        "REPOSITORIES",
        "BUILD_KEY",
        "ENVIRONMENT",
        "SCENARIOS",
        "AGAIN",
        "FLAVOURS",
        "SEED",
        "SNAPSHOTS",
        "REBUILD_SNAPSHOT",
        "DEBUG_HOLD",
    },
    "replicate": STARTED_BY | {"REPLICATE", "REBUILD_SNAPSHOT"},
    "repository-maintain": STARTED_BY,
    "mirror-sync": STARTED_BY | {"RELEASE", "EVERYTHING"},
    "republish": STARTED_BY | {"PACKAGE", "ZUUL_PIPELINE"},
    "jobs-update": STARTED_BY | {"DRY_RUN"},
    "retrigger-outstanding": STARTED_BY | {"ZUUL_PROJECT", "ZUUL_REFNAME", "ZUUL_OLDREV", "ZUUL_NEWREV", "DRY_RUN"},
    "unpublished": STARTED_BY | {"PACKAGE"},
    "snapshot-clean": STARTED_BY | {"NODE", "REMOVE"},
    "snapshot-clean-all": STARTED_BY | {"REMOVE"},
    "snapshot-prepare": STARTED_BY | {"NODE"},
    "snapshot-prepare-all": STARTED_BY,
    "host-prepare": STARTED_BY | {"NODE"},
    "host-prepare-all": STARTED_BY,
    "debug-session-all": STARTED_BY,
    "debug-session": STARTED_BY | {"NODE", "ACTION", "BUILD", "MACHINES", "AT_START", "PUBLIC_KEY", "DEBUG_HOLD"},
}
# made once, not for each target
ONCE = {"jobs-update", "repository-maintain", "republish", "retrigger-outstanding", "snapshot-clean", "unpublished"}
ONCE |= {"debug-session", "debug-session-all", "host-prepare", "host-prepare-all", "replicate", "snapshot-clean-all"}
# run another job on each node
EACH = ("debug-session-all", "host-prepare-all", "snapshot-clean-all", "snapshot-prepare-all")
# made for each format
SYNCS = {"mirror-sync-deb", "mirror-sync-rpm"}
# made for each environment
PREPARATIONS = {"snapshot-prepare-default", "snapshot-prepare-default-all"}
LABELS = {"build": "control", "compile": "build", "lint": "build", "publish": "repository"}
LABELS |= {"install": "systest", "systest": "systest", "gate": "gate", "order": "build", "verify": "repository"}
LABELS |= {
    "mirror-sync": "repository",
    "repository-maintain": "repository",
    "replicate": "repository",
    "republish": "gate",
    "jobs-update": "gate",
    "retrigger-outstanding": "repository",
    "unpublished": "repository",
    "snapshot-clean": "systest",
    "snapshot-prepare": "systest",
    "host-prepare": "systest",
    "debug-session": "systest",
}
LABELS |= dict.fromkeys(EACH, "gate")
MINUTES = {"build": "900", "compile": "600", "publish": "30", "lint": "60", "install": "60", "systest": "120"}
MINUTES |= {"gate": "1440", "order": "60", "verify": "60", "mirror-sync": "600"}
MINUTES |= {
    "jobs-update": "30",
    "repository-maintain": "60",
    "replicate": "300",
    "republish": "900",
    "retrigger-outstanding": "60",
    "unpublished": "120",
    "snapshot-clean": "60",
    "snapshot-prepare": "240",
    "host-prepare": "240",
    "debug-session": "1500",
}
MINUTES |= dict.fromkeys(EACH, "900")


def step(job):
    if job in PREPARATIONS:
        return "snapshot-prepare-all" if job.endswith("-all") else "snapshot-prepare"
    return job if job in ONCE else "mirror-sync" if job in SYNCS else job.partition("-")[0]


def command(job):
    """Return the words of a job's shell step."""
    if job.endswith("-all"):
        return f"pkgci on-each {job.removesuffix('-all')}"
    target = job.removeprefix(step(job)).replace("-", " ", 1)
    return f"pkgci {step(job)}{target}"


def differences(jobs, expected, actual):
    """Return `JOB: ACTUAL instead of EXPECTED` for each job where the two functions disagree."""
    found = {name: (actual(xml), expected(name)) for name, xml in jobs.items()}
    return [f"{name}: {is_!r} instead of {should!r}" for name, (is_, should) in found.items() if is_ != should]


def test_exactly_the_expected_jobs_are_rendered(jobs):
    assert sorted(jobs) == Path(__file__).with_name("expected.txt").read_text().split()


def test_the_targets_are_those_of_the_configuration(jobs):
    each = {name.partition("-")[2] for name in jobs.keys() - ONCE - SYNCS - PREPARATIONS}
    assert each == set(Config(EMBEDDED).names("targets"))


def test_the_environments_are_those_of_the_configuration(jobs):
    prepared = {name for name in jobs if name.startswith("snapshot-prepare-")}
    names = Config(EMBEDDED).names("environments")
    assert {f"snapshot-prepare-{name}{each}" for name in names for each in ("", "-all")} == prepared == PREPARATIONS


def test_every_target_has_every_step(jobs):
    targets = Config(EMBEDDED).names("targets")
    steps = PARAMETERS.keys() - ONCE - {"mirror-sync", "snapshot-prepare", "snapshot-prepare-all"}
    assert jobs.keys() - ONCE - SYNCS - PREPARATIONS == {f"{name}-{target}" for name in steps for target in targets}


def test_the_targets_file_is_one_project_entry_of_data_only():
    (entry,) = yaml.safe_load((ROOT / "jobs" / "targets.yaml").read_text())
    assert {key: type(value) for key, value in entry["project"].items()} == {"name": str, "target": list, "jobs": list}


def test_each_template_is_a_file_of_its_own():
    for path in (ROOT / "jobs" / "templates").iterdir():
        (entry,) = yaml.safe_load(path.read_text())
        names = {"mirror-sync": "mirror-sync-{format}", "snapshot-prepare": "snapshot-prepare-{environment}"}
        names |= {"snapshot-prepare-all": "snapshot-prepare-{environment}-all", **{name: name for name in ONCE}}
        assert entry["job-template"]["name"] == names.get(path.stem, f"{path.stem}-{{target}}")


def test_every_description_names_its_template(jobs):
    missing = [
        name
        for name, xml in jobs.items()
        if f"Template: jobs/templates/{step(name)}.yaml" not in xml.findtext("description", "").splitlines()
    ]
    assert missing == []


def test_every_job_has_its_timeout_in_absolute_minutes(jobs):
    path = "buildWrappers/hudson.plugins.build__timeout.BuildTimeoutWrapper/strategy/timeoutMinutes"
    assert differences(jobs, lambda name: MINUTES[step(name)], lambda xml: xml.findtext(path)) == []


def test_every_job_discards_builds_by_days(jobs):
    path = "properties/jenkins.model.BuildDiscarderProperty/strategy/daysToKeep"
    assert differences(jobs, lambda _: "30", lambda xml: xml.findtext(path)) == []


def test_every_build_is_described_by_what_its_step_says_it_is_about(jobs):
    place = "publishers/hudson.plugins.descriptionsetter.DescriptionSetterPublisher"
    said = {(xml.findtext(f"{place}/regexp"), xml.findtext(f"{place}/description")) for xml in jobs.values()}
    assert said == {("^About: (.*)$", "\\1")}


def test_every_job_has_timestamps_in_its_log(jobs):
    path = "buildWrappers/hudson.plugins.timestamper.TimestamperBuildWrapper"
    assert differences(jobs, lambda _: 1, lambda xml: len(xml.findall(path))) == []


def test_every_job_runs_on_the_label_of_its_step_only(jobs):
    def label(xml):
        return xml.findtext("assignedNode"), xml.findtext("canRoam")

    assert differences(jobs, lambda name: (LABELS[step(name)], "false"), label) == []


def test_every_label_has_executors_in_the_local_engine(jobs):
    executors = Config(EMBEDDED).settings.executors
    assert all(executors.of(xml.findtext("assignedNode")) for xml in jobs.values())


def test_every_job_archives_all_of_artifacts_also_of_a_failed_build(jobs):
    def archive(xml):
        archiver = xml.find("publishers/hudson.tasks.ArtifactArchiver")
        return [archiver.findtext(key) for key in ("artifacts", "onlyIfSuccessful", "defaultExcludes")]

    assert differences(jobs, lambda _: ["artifacts/**", "false", "false"], archive) == []


def test_jobs_with_tests_publish_junit_results(jobs):
    path = "publishers/hudson.tasks.junit.JUnitResultArchiver/testResults"

    def expected(name):
        return "artifacts/junit/*.xml" if step(name) in ("lint", "install", "systest") else None

    assert differences(jobs, expected, lambda xml: xml.findtext(path)) == []


def test_every_job_runs_concurrently_and_without_a_quiet_period(jobs):
    def settings(xml):
        return xml.findtext("concurrentBuild"), xml.findtext("quietPeriod")

    assert differences(jobs, lambda _: ("true", "0"), settings) == []


def test_every_job_has_exactly_the_parameters_of_its_step(jobs):
    path = "properties/hudson.model.ParametersDefinitionProperty/parameterDefinitions/*/name"
    actual = {name: sorted(element.text for element in xml.findall(path)) for name, xml in jobs.items()}
    assert actual == {name: sorted(PARAMETERS[step(name)]) for name in jobs}


def test_every_parameter_is_described_and_only_few_are_set_by_default(jobs):
    path = "properties/hudson.model.ParametersDefinitionProperty/parameterDefinitions/*"
    for job, xml in jobs.items():
        for parameter in xml.findall(path):
            assert parameter.findtext("description")
            booleans = dict.fromkeys(
                (
                    "REPRODUCIBLE",
                    "KEEP_ROOT",
                    "AGAIN",
                    "TEST_REPOSITORY",
                    "EVERYTHING",
                    "DRY_RUN",
                    "REMOVE",
                    "AT_START",
                    "REBUILD_SNAPSHOT",
                ),
                "false",
            )
            defaults = booleans | {"RUN_TESTS": "true", "NODE": "systest"}
            if job == "debug-session":
                defaults |= {"ACTION": "list", "DEBUG_HOLD": "2h"}
            assert parameter.findtext("defaultValue") == defaults.get(parameter.findtext("name"), "")


def test_a_job_that_concerns_a_node_runs_where_its_parameter_says(jobs):
    path = "properties/hudson.model.ParametersDefinitionProperty/parameterDefinitions/*[name='NODE']"
    kinds = {name: xml.find(path).tag for name, xml in jobs.items() if xml.find(path) is not None}
    assert set(kinds) == {"debug-session", "host-prepare", "snapshot-clean", "snapshot-prepare-default"}
    assert set(kinds.values()) == {"org.jvnet.jenkins.plugins.nodelabelparameter.LabelParameterDefinition"}


def test_every_shell_step_is_one_line_that_becomes_the_step(jobs):
    for name, xml in jobs.items():
        (shell,) = xml.findall(".//hudson.tasks.Shell")
        assert shell.findtext("command") == f"exec {command(name)}"


def test_every_shell_step_passes_shellcheck(jobs):
    assert shutil.which("shellcheck"), "shellcheck is missing; bindep.txt lists it"
    for name, xml in jobs.items():
        for shell in xml.findall(".//hudson.tasks.Shell"):
            checked = subprocess.run(
                ["shellcheck", "--shell=sh", "-"],
                input=shell.findtext("command"),
                capture_output=True,
                text=True,
                check=False,
            )
            assert checked.returncode == 0, f"{name}: {checked.stdout}"


def test_no_brace_is_left_unexpanded(jobs):
    left = [
        f"{name}: {element.tag}: {element.text}"
        for name, xml in jobs.items()
        for element in xml.iter()
        if re.search(r"[{}]", element.text or "")
    ]
    assert left == []


def test_the_local_engine_knows_every_element(jobs):
    for name, xml in jobs.items():
        assert parse(name, xml).label == LABELS[step(name)]
