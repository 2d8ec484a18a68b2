"""What lintian and rpmlint say, read: good words, hostile words, and none."""

import json

import pytest

from pkgci.errors import InfrastructureError
from pkgci.formats import lintian, rpmlint

RPMLINT = """\
============================ rpmlint session starts ============================
rpmlint: 2.4.0
configuration:
    /usr/lib/python3/dist-packages/rpmlint/configdefaults.toml
checks: 26, packages: 2

lib.foo.x86_64: E: no-binary
lib.foo.x86_64: W: unstripped-binary-or-object /usr/bin/foo
foo.spec:12: W: macro-in-comment %{name}
foo.src: E: spelling-error (Badness: 10) ('mutliple', 'multiple')
foo.src: I: enchant-dictionary-not-found en_US
 2 packages and 0 specfiles checked; 2 errors, 2 warnings, 11 badness; has taken 0.1 s
"""


def hint(tag: str, visibility: str, **more: object) -> dict:
    return {"tag": tag, "note": "", "visibility": visibility, "experimental": False, **more}


def lintian_says(source: list[dict], binary: list[dict]) -> bytes:
    files = [{"path": "./foo_1.dsc", "hints": source}, {"path": "./foo_1_all.deb", "hints": binary}]
    return json.dumps({"groups": [{"group_id": "foo", "input_files": files}], "lintian_version": "2"}).encode()


def read_lintian(source: list[dict], binary: list[dict]):
    return lintian.read(lintian_says(source, binary), "lintian 2", "foo", {"foo_1_all.deb": "foo-bin"})


def test_lintians_hints_are_findings_with_package_file_and_line():
    pointer = {"item": {"name": "debian/rules", "index": "foo"}, "line_position": 3}
    found = read_lintian([hint("one", "error", note="why", pointer=pointer)], [hint("two", "info")])
    assert [finding.model_dump(exclude_none=True, exclude={"known"}) for finding in found.findings] == [
        {
            "package": "foo",
            "source": True,
            "severity": "error",
            "tag": "one",
            "message": "why",
            "file": "debian/rules:3",
        },
        {"package": "foo-bin", "source": False, "severity": "info", "tag": "two", "message": ""},
    ]


def test_what_lintian_itself_does_not_call_wrong_is_no_finding():
    hints = [hint("a", "pedantic"), hint("b", "classification"), hint("c", "error", experimental=True)]
    hints.append(hint("d", "error", masks=[{"screen": "s", "excuse": "e"}]))
    found = read_lintian(hints, [])
    assert (found.findings, found.overridden) == ((), 0)


def test_what_the_package_overrides_is_counted_only():
    overridden = {"override": {"justification": None}}
    found = read_lintian(
        [], [hint("a", "error", **overridden), hint("a", "warning"), hint("p", "pedantic", **overridden)]
    )
    assert ([finding.severity for finding in found.findings], found.overridden) == (["warning"], 1)


def test_what_a_terminal_would_obey_does_not_leave_lintians_words():
    pointer = {"item": {"name": "usr/\x1b]0;x\x07\n\u202ered", "index": "foo"}, "line_position": 0}
    found = read_lintian([], [hint("a", "error", note="\x1b[31m\r\n" + "long" * 1000, pointer=pointer)])
    (finding,) = found.findings
    assert finding.file == "usr/?]0;x???red"
    assert finding.message.startswith("?[31m??long")
    assert len(finding.message) == 1000


@pytest.mark.parametrize(
    "said", [b"", b"[]", b'{"groups": 1}', b'{"groups": [{}]}', b"\xff", lintian_says([], [])[:-3]]
)
def test_other_words_of_lintian_are_an_error(said: bytes):
    with pytest.raises(InfrastructureError, match="what lintian 2 says cannot be read"):
        lintian.read(said, "lintian 2", "foo", {})


def test_lintian_must_speak_of_every_package():
    with pytest.raises(InfrastructureError, match=r"says nothing of bar_1_all\.deb"):
        lintian.read(lintian_says([], []), "lintian 2", "foo", {"foo_1_all.deb": "foo", "bar_1_all.deb": "bar"})
    with pytest.raises(InfrastructureError, match="says nothing of foo"):
        lintian.read(b'{"groups": []}', "lintian 2", "foo", {})


def test_rpmlints_lines_are_findings_with_package_file_and_line():
    found = rpmlint.read(RPMLINT.encode(), None, "rpmlint 2", "foo")
    assert [
        (finding.package, finding.source, finding.severity, finding.tag, finding.message, finding.file)
        for finding in found.findings
    ] == [
        ("lib.foo", False, "error", "no-binary", "", None),
        ("lib.foo", False, "warning", "unstripped-binary-or-object", "/usr/bin/foo", "/usr/bin/foo"),
        ("foo", True, "warning", "macro-in-comment", "%{name}", "foo.spec:12"),
        ("foo", True, "error", "spelling-error", "('mutliple', 'multiple')", None),
        ("foo", True, "info", "enchant-dictionary-not-found", "en_US", None),
    ]
    assert found.overridden == 0


def test_what_the_packages_filters_silence_is_counted_only():
    quiet = RPMLINT.replace("lib.foo.x86_64: E: no-binary\n", "").replace("2 errors", "1 errors")
    found = rpmlint.read(quiet.encode(), RPMLINT.encode(), "rpmlint 2", "foo")
    assert (len(found.findings), found.overridden) == (4, 1)


def test_a_name_with_line_breaks_adds_findings_and_hides_none():
    forged = "\nx.src: W: forged\n 9 packages and 0 specfiles checked; 0 errors, 0 warnings, 0 badness;\n\x1b[31m"
    said = RPMLINT.replace("/usr/bin/foo", f"/usr/bin/{forged}/foo")
    found = rpmlint.read(said.encode(), None, "rpmlint 2", "foo")
    assert len(found.findings) == 6
    assert {"no-binary", "spelling-error", "forged"} < {finding.tag for finding in found.findings}
    assert all(finding.message.isprintable() for finding in found.findings)


@pytest.mark.parametrize(
    "said",
    ["", "nothing", RPMLINT.replace("lib.foo.x86_64: E:", "lib.foo.x86_64 - E:"), RPMLINT.replace(" errors", "")],
)
def test_other_words_of_rpmlint_are_an_error(said: str):
    with pytest.raises(InfrastructureError, match="what rpmlint 2 says cannot be read"):
        rpmlint.read(said.encode(), None, "rpmlint 2", "foo")
