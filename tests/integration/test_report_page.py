"""The report in a real browser: nothing sticks out, all can be read, nothing is asked for, in any window and any light."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import reports
import trees
from browser import Browser

from pkgci import report
from pkgci.engines.base import BuildRef
from pkgci.engines.local import LocalEngine

PKGCI = Path(sys.executable).with_name("pkgci")
TARGET = "bookworm-amd64"
OPEN_ALL = "document.querySelectorAll('details').forEach(one => one.open = true)"
STICKING_OUT = """[...document.body.querySelectorAll('*')].filter(one => {
    const place = one.getBoundingClientRect();
    return place.width && (place.right > innerWidth + 1 || place.left < -1);
}).map(one => one.outerHTML.slice(0, 100))"""
# Web Content Accessibility Guidelines 2.1, 1.4.3: 4.5 to 1 for text
HARD_TO_READ = """(() => {
    const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = colour => {
        const [red, green, blue] = numbers(colour).map(one => one / 255)
            .map(one => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const behind = one => {
        const colour = getComputedStyle(one).backgroundColor;
        return numbers(colour)[3] === 0 ? behind(one.parentElement) : colour;
    };
    const found = [];
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const one = texts.currentNode.parentElement;
        if (!texts.currentNode.data.trim() || !one.getClientRects().length) continue;
        const [low, high] = [light(getComputedStyle(one).color), light(behind(one))].sort((a, b) => a - b);
        if ((high + 0.05) / (low + 0.05) < 4.5) found.push(one.outerHTML.slice(0, 100));
    }
    return found;
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


def examine(browser: Browser, page: Path) -> None:
    """Look at a page as its readers do."""
    for width in (1400, 390):
        for dark in (False, True):
            browser.open(page, width, dark)
            for _ in ("as it opens", "with all details"):
                assert browser.ask("document.documentElement.scrollWidth") <= width
                assert browser.ask(STICKING_OUT) == []
                assert browser.ask(HARD_TO_READ) == []
                browser.ask(OPEN_ALL)
            assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
            assert browser.refused == []


@pytest.mark.parametrize("make", reports.RUNS)
def test_a_page_fits_its_window_and_can_be_read(browser: Browser, make, tmp_path: Path):
    examine(browser, report.write(make(tmp_path)))


def test_a_page_is_of_use_where_the_server_forbids_its_style(browser: Browser, tmp_path: Path):
    browser.open(report.write(reports.failed_install(tmp_path)), 1400, dark=False)
    with browser.without_style():
        assert browser.ask("document.body.innerText").startswith("Failed hello for bookworm-amd64\n\ninstall-")
        drawn = browser.ask("[...document.querySelectorAll('.bar .ran')].map(one => one.getBoundingClientRect().width)")
        assert len(drawn) == 5
        assert all(width > 0 for width in drawn)


def test_the_page_of_a_real_run(browser: Browser, tmp_path: Path):
    configuration = trees.config(tmp_path)
    rules = f"{trees.RULES}\noverride_dh_auto_build:\n\tcc -c wrong.c\n"
    trees.commit(tmp_path / "small", trees.deb() | {"debian/rules": rules, "wrong.c": "int main() { retrun 0; }\n"})
    environment = {**os.environ, "PKGCI_CONFIG": str(configuration.directory)}
    done = subprocess.run(
        [PKGCI, "check", "--target", TARGET, tmp_path / "small"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    page = LocalEngine(configuration).directory(BuildRef(f"build-{TARGET}", 1)) / "archive" / "artifacts" / "index.html"
    assert f"  report: {page}\n" in done.stdout
    assert "wrong.c:1:14: error: " in done.stdout
    examine(browser, page)
    assert "error: " in browser.ask("document.querySelector('.reason').innerText")
    assert "wrong.c:1:14: error: " in browser.ask("document.querySelector('mark').innerText")
    for link in browser.ask("[...document.links].map(one => one.getAttribute('href')).filter(one => one[0] !== '#')"):
        assert (page.parent / link).is_file(), link
