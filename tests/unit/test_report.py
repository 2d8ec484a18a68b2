"""The report of a run: what it says, that nothing in it is obeyed, that its links lead somewhere, and that it stays small."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import reports
from reports import RUNS, TARGET, URL, RunOf, contents, difference

from pkgci import report
from pkgci.artifacts import (
    ChangeSummary,
    FileDifference,
    Finding,
    Install,
    LintFinding,
    PackagedFile,
    Result,
    Systest,
)
from pkgci.formats import apt

VOID = {"meta", "link", "br", "rect"}
HOSTILE = "<script>alert(1)</script>\"'&amp;\x1b[31mred\x1b]0;title\x07\u202egnp.exe\r\n\x00{{ view }}"


class Page(HTMLParser):
    """A page as a browser reads it: its elements, and whether each is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def values(self, name: str) -> list[str]:
        return [given[name] or "" for _, given in self.tags if name in given]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(artifacts: Path) -> tuple[Page, str]:
    text = report.write(artifacts).read_text()
    return Page(text), text


@pytest.mark.parametrize("make", RUNS)
def test_every_link_leads_to_a_file_of_the_run_or_a_part_of_the_page(make, tmp_path: Path):
    page, _ = read(make(tmp_path))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for link in page.values("href"):
        if link.startswith("#"):
            assert link[1:] in ids
        elif not link.startswith(("http://127.0.0.1", "data:image/svg+xml,")):
            assert (tmp_path / unquote(link)).is_file(), link


@pytest.mark.parametrize("make", RUNS)
def test_the_page_needs_nothing_and_allows_nothing_but_its_own_style(make, tmp_path: Path):
    page, text = read(make(tmp_path))
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "form", "base"}
    assert not page.values("src")
    assert not page.values("style")
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = next(given["content"] for _, given in page.tags if given.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'; ")
    assert len(text) < 40_000


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            reports.passed,
            "Passed hello for bookworm-amd64 2 packages built; lint: 1 warning, 1 info; 1 overridden; install",
        ),
        (
            reports.failed_build,
            "Failed hello for bookworm-amd64 compile-bookworm-amd64/12: hello: the build failed: src/hello",
        ),
        (
            reports.failed_lint,
            "Failed hello for bookworm-amd64 lint-bookworm-amd64/12: lint of hello: error: possibly-insecure",
        ),
        (
            reports.failed_install,
            "Failed hello for bookworm-amd64 install-bookworm-amd64/12: install test of hello: leftover",
        ),
        (
            reports.failed_gate,
            "Failed 2 changes for bookworm-amd64 build-bookworm-amd64/12: compile-bookworm-amd64/12: hello: the build failed",
        ),
        (reports.aborted, "Aborted hello for bookworm-amd64 stopped by SIGTERM It was stopped before its end"),
        (reports.refused, "Failed parameter ZUUL_PROJECT: '../../etc' is not allowed; it must match"),
    ],
)
def test_the_verdict_and_its_reason_come_first(make, said: str, tmp_path: Path):
    page, text = read(make(tmp_path))
    assert page.text.startswith(said.split(maxsplit=1)[0])
    assert said in page.text
    heading = re.search(r"<h1>(.*?)</h1>", text, re.DOTALL)[1]
    assert said.startswith(Page(heading).text)


def test_a_gate_says_what_became_of_each_build_and_why_one_failed(tmp_path: Path):
    page, _ = read(reports.failed_gate(tmp_path))
    for said in (
        "1 of 2 packages built, 1 of them taken from the store",
        f"greet 4712,1 tools/greet, main passed {reports.VERSION} from the store libgreet test repository",
        "hello 4711,2 tools/hello, main failed",
        "build-depend on what changes, and are not built anew: farewell (rocket/bookworm)",
        "docs, branch main: nothing to build: no package has this project",
        # of the job that the build started
        "src/hello.c:62:3: error: expected ';' before 'return'",
    ):
        assert said in page.text
    assert f"build-{TARGET}/index.html" in page.values("href")
    lines = report.brief(report.read(tmp_path))
    assert "builds: 1 of 2 packages built, 1 of them taken from the store" in lines
    assert f"  greet: {reports.VERSION} from the store, against libgreet" in lines
    assert "  hello: failed" in lines
    assert any(">" in line and "expected ';'" in line for line in lines)


def test_all_that_a_run_has_is_there(tmp_path: Path):
    page, _ = read(reports.passed(tmp_path))
    for said in (
        "Greet in the language of the reader",
        "4711,2",
        "fetch 0.1 s · root 2.1 s",
        "libc6 (>= 2.34)",
        "update-alternatives --install /usr/bin/greet greet",
        "/usr/bin/hallo → hello",
        "against 2.10+pkg1.2-3+deb12",
        "- libc6 (>= 2.31) + libc6 (>= 2.34)",
        "hardening-no-fortify-functions",
        "from snapshot bookworm-amd64/20261123T073048-bef61e",
        "greets in French no locale",
        "until 7 December 2026",
        "pkgci jobs run compile-bookworm-amd64 --rerun 12",
        "pkgci jobs run install-bookworm-amd64 ZUUL_PROJECT=tools/hello ZUUL_BRANCH=main",
        "ZUUL_CHANGES=tools/hello:main:refs/changes",
    ):
        assert said in page.text, said


def test_a_test_that_was_not_repeated_is_said_to_be_that(tmp_path: Path):
    artifacts = reports.passed(tmp_path)
    path = artifacts / f"install-{TARGET}" / "install.json"
    Install.read(path).model_copy(update={"passed_before": reports.BEGUN}).write(path)
    said = "passed on 2026-11-23 07:22 UTC with the same packages, machine, tools and repositories; not repeated"
    assert f"It {said}." in read(artifacts)[0].text
    assert f"install test: 1 package passed; {said}" in report.brief(report.read(artifacts))


def test_the_lines_for_apt_are_those_that_the_repository_holds(tmp_path: Path):
    page, _ = read(reports.passed(tmp_path))
    assert "".join(apt.client(URL, "bookworm", reports.KEY).split()) in "".join(page.text.split())
    assert f"sudo curl -fsSo /etc/apt/sources.list.d/pkgci.sources {URL}pkgci.sources" in page.text
    assert f"sudo apt-get install hello={reports.VERSION}" in page.text


# the log


def failing(directory: Path, log: str, reason: str) -> report.View:
    run = RunOf(directory).begin()
    run.job("compile", 0, 9, "FAILURE", reason, log)
    return report.read(run.end("FAILURE", f"compile-{TARGET}/12: {reason}"))


def test_the_log_is_shown_around_the_line_that_says_why(tmp_path: Path):
    view = report.read(reports.failed_build(tmp_path))
    (excerpt,) = view.excerpts
    assert excerpt.link == f"compile-{TARGET}/console.log"
    assert [line.number for line in excerpt.lines if line.marked] == [8]
    number = next(line.number for line in excerpt.lines if line.marked)
    assert "expected ';'" in (tmp_path / excerpt.link).read_text().splitlines()[number - 1]
    assert excerpt.lines[6].text == "src/hello.c: In function 'main':"


def test_without_such_a_line_the_end_of_the_log_is_shown_but_not_what_every_log_ends_with(tmp_path: Path):
    view = failing(
        tmp_path, "one\ntwo\ncompile FAILURE (fault: bug): x\nThe step ended with status 3\n", "no such words"
    )
    assert [line.text for line in view.excerpts[0].lines] == ["one", "two"]
    assert not any(line.marked for line in view.excerpts[0].lines)


def test_a_huge_log_costs_little_and_keeps_its_line_numbers(tmp_path: Path):
    log = "x" * 200 + "\n"
    view = failing(tmp_path, log * 50_000 + "ld: cannot find -lgreet\n" + log * 100, "hello: ld: cannot find -lgreet")
    assert [line.number for line in view.excerpts[0].lines if line.marked] == [50_001]


def test_a_line_that_is_long_is_cut_and_one_that_is_redrawn_hides_nothing(tmp_path: Path):
    view = failing(tmp_path, f" 10 %\r100 %\r\n\x1b[1;31mbad:\x1b[0m\t{'y' * 1000}\n", "nothing")
    assert [line.text for line in view.excerpts[0].lines[:2]] == [" 10 %", "100 %"]
    assert view.excerpts[0].lines[2].text.startswith("bad:    yyy")
    assert view.excerpts[0].lines[2].text.endswith(" … (708 more characters)")


def test_a_failed_install_test_shows_what_the_machine_said_and_a_failed_system_test_too(tmp_path: Path):
    view = report.read(reports.failed_install(tmp_path))
    assert [excerpt.link.partition("/")[2] for excerpt in view.excerpts] == [
        "console.log",
        "logs/hello.log",
        "console.log",
        "logs/upgrade.log",
    ]


def test_what_is_released_is_told_apart_from_what_is_new(tmp_path: Path):
    run = RunOf(tmp_path).begin()
    run.compiled()
    run.compared(difference(released=True))
    known = LintFinding(package="hello", severity="error", tag="old-error", message="since ever", known=True)
    run.linted([LintFinding(package="hello", severity="warning", tag="new-warning", message=""), known])
    run.installed()
    path = tmp_path / f"install-{TARGET}" / "install.json"
    tested = Install.read(path)
    upgrade = tested.packages[0].model_copy(update={"former_version": "2.9-1", "notice": "not tried: it breaks"})
    tested.model_copy(update={"packages": (*tested.packages, upgrade)}).write(path)
    page, _ = read(run.end())
    assert "Lint 1 warning; 1 known from the released package; 1 overridden" in page.text
    assert page.text.index("new-warning") < page.text.index("they do not fail the job") < page.text.index("old-error")
    assert "Against what is released" in page.text
    assert "upgrade from the released 2.9-1 not tried: it breaks skipped" in page.text
    said = "\n".join(report.brief(report.read(tmp_path)))
    assert "old-error" not in said
    assert "lint: 1 warning; 1 known from the released package" in said
    assert "install test: 1 package passed\n" in f"{said}\n"
    assert "; against the released " in said


# what is hostile, huge, missing or broken


def test_nothing_that_a_package_says_is_obeyed(tmp_path: Path):
    run = RunOf(tmp_path).begin(ChangeSummary(id="1,1", project="p", branch="b", pipeline="check", subject=HOSTILE))
    inside = contents(
        "hello",
        relations={"Depends": (HOSTILE,)},
        scripts={"postinst": HOSTILE},
        files=(PackagedFile(path=f"/{HOSTILE}", mode="lrwxrwxrwx", size=0, target=HOSTILE),),
    )
    run.compiled({"hello": inside})
    run.compared(difference(scripts={"postinst": f"+{HOSTILE}"}))
    run.linted([LintFinding(package="hello", severity="error", tag=HOSTILE, message=HOSTILE, file=HOSTILE)])
    run.installed([Finding(package="hello", phase="run", message=HOSTILE, file=HOSTILE)])
    (tmp_path / f"install-{TARGET}" / "logs" / "hello.log").write_bytes(HOSTILE.encode(errors="replace") * 3)
    page, text = read(run.end("FAILURE", HOSTILE))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("<script>alert(1)</script>") >= 10
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", text)
    assert "\\u202egnp.exe" in page.text
    assert "{{ view }}" in page.text
    for line in report.brief(report.read(tmp_path)):
        assert line.isprintable()


def test_of_long_lists_the_first_are_shown_and_how_many_there_are_more(tmp_path: Path):
    run = RunOf(tmp_path).begin()
    files = tuple(PackagedFile(path=f"/usr/share/{number}", mode="-rw-r--r--", size=1) for number in range(600))
    changed = tuple(FileDifference(former=None, now=file) for file in files)
    many = {
        f"hello{number}": contents(f"hello{number}", file=f"hello{number}.deb", files=files) for number in range(80)
    }
    many["hello0"] = contents(
        "hello0",
        file="hello0.deb",
        files=files,
        more_files=7000,
        relations={"Depends": tuple(f"library{number}" for number in range(500))},
        scripts={"postinst": "true\n" * 9000},
    )
    run.compiled(many)
    run.compared(difference(name="hello0", files=changed))
    finding = LintFinding(package="hello", severity="info", tag="tag", message="message")
    run.linted([finding] * 999)
    run.installed([Finding(package="hello", phase="leftover", message="stays", file=f"/{n}") for n in range(400)])
    for number in range(300):
        (tmp_path / f"compile-{TARGET}" / "logs" / f"{number}.log").touch()
    page, text = read(run.end())
    for more in (
        "and 7400 more files",
        "and 440 more",
        "and 8880 more lines",
        "and 20 more packages",
        "and 899 more findings",
        "and 300 more findings",
        "and 400 more files",
        "and 115 more files",
    ):
        assert more in page.text, more
    assert len(text) < 1_500_000
    assert len(report.brief(report.read(tmp_path))) < 30


def test_records_that_are_missing_or_broken_take_nothing_else_along(tmp_path: Path):
    reports.passed(tmp_path)
    (tmp_path / "run.json").unlink()
    (tmp_path / f"install-{TARGET}" / "install.json").write_text("{")
    (tmp_path / f"lint-{TARGET}" / "lint.json").write_text('{"schema": 2}')
    (tmp_path / f"compile-{TARGET}" / "contents.json").unlink()
    (tmp_path / f"systest-{TARGET}" / "result.json").unlink()
    page, _ = read(tmp_path)
    assert "Passed" in page.text
    assert "install-bookworm-amd64/install.json cannot be read" in page.text
    assert "greets in French" in page.text
    assert "Install test" not in page.text


def test_no_link_leads_out_of_the_artifacts(tmp_path: Path):
    artifacts = tmp_path / "artifacts"
    reports.passed(artifacts)
    (tmp_path / "secret").write_text("key")
    (artifacts / f"install-{TARGET}" / "logs" / "link.log").symlink_to(tmp_path / "secret")
    page, _ = read(artifacts)
    assert not any("secret" in link or "link.log" in link for link in page.values("href"))


def test_the_logs_of_a_system_test_are_listed_with_their_first_errors_also_without_its_record(tmp_path: Path):
    place = reports.passed(tmp_path) / f"systest-{TARGET}"
    (place / "systest.json").unlink()
    for name in ("one", "two"):
        (place / "logs" / name).mkdir(parents=True)
    stamp = "2026-11-24T03:00:00.123Z "
    errors = [f"{stamp}Error: {number} {HOSTILE}" for number in range(5)]
    (place / "logs" / "one" / "product.log").write_text("\n".join([f"{stamp}all is terror", "starting", *errors]))
    (place / "logs" / "two" / "console.log").write_text("[    0.0] Linux\n")
    page, text = read(tmp_path)
    logs = page.text.partition("Logs of the system test")[2].partition("Repeat by hand")[0]
    product = logs.partition("one/product.log")[2].partition("two/console.log")[0]
    assert re.findall(r"\d+ Error: (\d)", product) == ["0", "1", "2"]
    assert " 3 Error: 0 <script>" in product
    assert "terror" not in logs
    assert stamp not in product
    assert "Linux" not in logs
    assert "<script>" not in text


def test_a_system_test_by_itself_has_a_page_with_its_tests_and_logs_also_after_an_abort(tmp_path: Path):
    place = reports.passed(tmp_path) / f"systest-{TARGET}"
    (place / "logs").mkdir(exist_ok=True)
    (place / "logs" / "journal.log").write_text("kernel panic\n")
    page, text = read(place)
    assert f"system test for {TARGET}" in page.text
    assert "journal.log 13 B 1 kernel panic" in page.text
    assert Systest.read(place / "systest.json").outcomes[0].test in page.text
    assert {link for link in page.values("href") if not link.startswith(("#", "data:"))} >= {"logs/journal.log"}
    (place / "systest.json").unlink()
    result = Result.read(place / "result.json")
    result.model_copy(update={"result": "ABORTED", "fault": "aborted", "exit": 143}).write(place / "result.json")
    page, text = read(place)
    assert page.text.startswith("Aborted: systest")
    assert "1 kernel panic" in page.text
    assert "<script>" not in text


def test_what_is_searched_of_many_long_logs_has_a_limit(tmp_path: Path, monkeypatch):
    place = reports.passed(tmp_path) / f"systest-{TARGET}"
    (place / "logs").mkdir(exist_ok=True)
    for path in (place / "logs").iterdir():
        path.unlink()
    for number in range(3):
        (place / "logs" / f"{number}.log").write_text("error\n")
    monkeypatch.setattr(report.view, "SEARCHED_IN_ALL", 12)
    logs = report.view.read(tmp_path).systest_logs
    assert [len(one.errors) for one in logs] == [1, 1, 0]


def test_that_a_system_test_was_run_once_again_is_said(tmp_path: Path):
    path = reports.passed(tmp_path) / f"systest-{TARGET}" / "systest.json"
    reason = "QEMU was killed, or has crashed: QEMU was killed"
    Systest.read(path).model_copy(update={"retried": reason}).write(path)
    page, _ = read(tmp_path)
    assert f"since an infrastructure fault ended the first attempt: {reason}" in page.text
    assert "at the second attempt" in report.read(tmp_path).outcome


def test_a_run_with_nothing_to_build_says_so(tmp_path: Path):
    reason = "nothing to build: hello has no packaging for bookworm-amd64 (debian/control)"
    page, _ = read(RunOf(tmp_path).begin().end(reason=reason))
    assert f"Nothing to build hello for {TARGET} {reason}" in page.text


# in brief


def test_in_brief_a_failed_build_shows_why_with_its_lines(tmp_path: Path):
    said = report.brief(report.read(reports.failed_build(tmp_path)))
    assert said[0].startswith("reason: compile-bookworm-amd64/12: hello: the build failed: src/hello.c:62:3: error")
    assert [line for line in said if line.startswith("  >")] == [
        "  >     8  src/hello.c:62:3: error: expected ';' before 'return'"
    ]
    assert len(said) < 12


def test_in_brief_findings_are_shown_instead_of_lines_that_repeat_them(tmp_path: Path):
    said = report.brief(report.read(reports.failed_install(tmp_path)))
    assert "install test: 1 of 1 package failed" in said
    assert "  hello: leftover: /etc/left-behind: is still there after the removal" in said
    assert "system test: 1 passed, 1 failed, 1 skipped" in said
    assert not any(line.startswith("  >") for line in said)
