"""What a build changes against former versions, where that is decided without any package."""

import time
from types import SimpleNamespace

from pkgci.former import SCRIPT_LINES, _scripts


def sides(former: str, now: str) -> dict[str, str]:
    return _scripts(*(SimpleNamespace(scripts={"postinst": text}, version=text[:1]) for text in (former, now)))


def test_scripts_that_are_not_the_same_are_compared():
    assert sides("a\nb", "a\nc")["postinst"].splitlines()[3:] == [" a", "-b", "+c"]
    assert sides("a", "a") == {}


def test_a_very_long_script_is_not_compared():
    # the worst case: hardly a line that comes once
    texts = ["\n".join(str(number * step % 149) for number in range(20000)) for step in (1, 7)]
    started = time.monotonic()
    assert sides(*texts) == {"postinst": f"[not compared: more than {SCRIPT_LINES} lines]"}
    assert time.monotonic() - started < 5
