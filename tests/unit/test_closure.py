"""Which packages a publication can concern, and what is said of them: of texts as the index has them."""

import os
import subprocess
from pathlib import Path

import pytest
import trees

from pkgci.errors import InfrastructureError
from pkgci.released import closure


def primary(name: str, version: str, arch: str = "noarch", requires: str = "") -> bytes:
    needs = f'<rpm:requires><rpm:entry name="{requires}"/></rpm:requires>' if requires else ""
    return (
        f'<package type="rpm"><name>{name}</name><arch>{arch}</arch><version epoch="0" ver="{version}" rel="1"/>'
        f'<format><rpm:provides><rpm:entry name="{name}"/></rpm:provides>{needs}</format></package>'
    ).encode()


def filelist(name: str, *paths: str) -> bytes:
    return f'<package name="{name}">{"".join(f"<file>{path}</file>" for path in paths)}</package>'.encode()


def state(*texts: bytes, files: tuple[bytes, ...] = ()) -> dict[str, list[bytes]]:
    return {"primary": list(texts), "filelists": list(files), "other": []}


def concerned(before: closure.State, after: closure.State) -> list[tuple[str, str | None]]:
    """The packages that a case is about, each with what it was before."""
    asked = closure.case("rpm", before, after)
    return [(one.exact, other and other.exact) for one, other in asked.concerned] if asked else []


def test_an_rpm_package_is_held_against_the_former_one_and_not_against_its_source_package():
    before = state(primary("hello", "1"), primary("hello", "1", "src", "gcc"))
    after = state(primary("hello", "2", requires="other"), primary("hello", "2", "src", "gcc"))
    assert concerned(before, after) == [("hello-0:2-1.noarch", "hello-0:1-1.noarch")]


def test_a_package_that_needs_a_file_which_goes_is_asked_about():
    app, shell = primary("app", "1", requires="(/usr/share/lib/a or x)"), primary("shell", "1", requires="/bin/sh")
    before = state(primary("lib", "1"), app, shell, files=(filelist("lib", "/usr/share/lib/a", "/usr/share/lib/b"),))
    after = state(primary("lib", "2"), app, shell, files=(filelist("lib", "/usr/share/lib/b"),))
    assert concerned(before, after) == [("app-0:1-1.noarch", "app-0:1-1.noarch")]
    moved = state(*after["primary"], files=(*after["filelists"], filelist("new", "/usr/share/lib/a")))
    assert concerned(before, moved) == []


@pytest.mark.parametrize(
    ("needs", "names"),
    [
        ("foo", {"foo"}),
        ("(foo or bar)", {"foo", "bar"}),
        ("(foo >= 1 with foo &lt; 2)", {"foo"}),
        ("((pkgconfig(x) >= 1.0) and (a if b else c))", {"pkgconfig(x)", "a", "b", "c"}),
        ("(foo without bar)", {"foo"}),
        ("((foo without (bar or baz)) and qux)", {"foo", "qux"}),
    ],
)
def test_what_nobody_provides_is_taken_as_given_also_in_rich_dependencies(needs, names):
    given = closure._given([state(primary("app", "1", requires=needs))])
    assert {name for name, *_ in given.provides} == names
    there = state(primary("app", "1", requires="(/a/b or c)"), files=(filelist("app", "/a/b"),))
    assert {name for name, *_ in closure._given([there]).provides} == {"c"}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"The following packages have unmet dependencies:\n app : Depends: lib\nE: Unable to", "app : Depends: lib"),
        (b"E: Write error - write (28: No space left on device)\n", None),
        (b"", None),
    ],
)
def test_only_what_apt_says_of_dependencies_counts_as_unmet(tmp_path: Path, monkeypatch, said, why):
    config, cache = trees.config(tmp_path), tmp_path / "closure"
    cache.mkdir()
    os.utime(cache, (0, 0))
    packet = closure.Packet("app", "app=1", frozenset({"lib"}), frozenset({"app"}))

    def run(argv, **_):
        return subprocess.CompletedProcess(argv, 0 if "update" in argv else 100, said, b"")

    monkeypatch.setattr(closure, "run", run)
    with closure._apt(0, [{}], config.target("bookworm-amd64"), cache) as apt:
        # `pkgci clean` sees that it is in use
        assert cache.stat().st_mtime > 0
        if why:
            assert apt.unmet(packet) == why
        else:
            with pytest.raises(InfrastructureError, match="apt cannot say whether app=1 can be installed: "):
                apt.unmet(packet)
