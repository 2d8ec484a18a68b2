"""What both formats share: the line of a log that says why something failed."""

from pathlib import Path

import pytest

from pkgci.formats.base import last_words

DRIVERS = """make[1]: *** [Makefile:10: all] Error 1
dh_auto_build: error: make -j2 returned exit code 2
make: *** [debian/rules:4: binary] Error 2
dpkg-buildpackage: error: debian/rules binary subprocess returned exit status 2
"""
LINKER = "ld: x.o: undefined reference to y"


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("cc x.c\nx.c:3:1: error: first\nx.c:9:1: error: second\n" + DRIVERS, "x.c:3:1: error: first"),
        ("ld: x.o: undefined reference to y\ncollect2: error: ld returned 1 exit status\n" + DRIVERS, LINKER),
        (
            "dh_install: error: missing files, aborting\n" + DRIVERS.splitlines()[-1],
            "dh_install: error: missing files, aborting",
        ),
        ("make: *** No rule to make target 'all'.  Stop.\n", "make: *** No rule to make target 'all'.  Stop."),
        (
            "error: File not found: /x\nerror: Bad exit status from /var/tmp/rpm (%install)\n",
            "error: File not found: /x",
        ),
        (
            "error: Failed build dependencies:\n\tfoo is needed by x\n",
            "error: Failed build dependencies: foo is needed by x",
        ),
        (
            "dpkg-deb: error: no\ndh_builddeb: error: Aborting due to earlier error\nsemop(2): an error: x\n",
            "dpkg-deb: error: no",
        ),
        ("E: first\nE: Unable to correct problems\n", "E: Unable to correct problems"),
        (DRIVERS, "make[1]: *** [Makefile:10: all] Error 1"),
        ("just this\n", "just this"),
        ("", "status 7"),
    ],
)
def test_the_line_that_says_why_is_the_one_of_who_failed_not_of_who_passes_it_on(log: str, said: str, tmp_path: Path):
    path = tmp_path / "log"
    path.write_text(log)
    assert last_words(path, 0, "status 7") == said
