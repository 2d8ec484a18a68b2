"""What is shown of text that is hostile: nothing of it is obeyed, and nothing is hidden."""

import io
import logging

import pytest

from pkgci.text import LINE_BYTES, PlainLog, lines, listed, log_plainly


def passed_on(*blocks: bytes) -> bytes:
    """Return what a log becomes that is said in blocks."""
    shown = io.BytesIO()
    with PlainLog(shown) as log:
        for block in blocks:
            assert log.write(block) == len(block)
    return shown.getvalue()


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (b"plain\n\ttext\n", "plain\n\ttext\n"),
        ("für 日本語\n".encode(), "für 日本語\n"),
        (b"\x1b[1;31merror:\x1b[0m \x1b[38;5;1mx\x1b[K\n", "error: x\n"),
        (b"\x1b[2J\x1b[H\x1b[?1049hclear\n", "clear\n"),
        (b"\x1b]0;owned\x07title\n", "title\n"),
        (b"\x1b]8;;http://x/\x1b\\link\x1b]8;;\x1b\\\n", "link\n"),
        (b"\x1bP+q544e\x1b\\\x1b_x\x1b\\\x1b^x\x1b\\strings\n", "strings\n"),
        (b"\x1b]0;no end\nnext\n", "0;no end\nnext\n"),
        # what is left when a sequence is taken away from within another
        (b"\x1b\x1b[0m[2J\n", "?[2J\n"),
        (b"\x9b2J \xc2\x9b2J \xc2\x90\n", "?2J ?2J ?\n"),
        (b"\x07\x08\x0b\x0c\x0e\x7f\0\n", "???????\n"),
        (b"failed: bad\rpassed     \r\nnext\r\n", "failed: bad\npassed     \nnext\n"),
        ("a \u202egpj.exe \u2028\u200b\n".encode(), "a ?gpj.exe ??\n"),
        (b"\xff\xfe caf\xe9 \xc3(\n", "?? caf? ?(\n"),
        (b"no end", "no end"),
    ],
)
def test_nothing_in_a_log_is_obeyed_however_it_is_cut(said: bytes, shown: str):
    assert lines(said) == shown
    assert passed_on(said) == shown.encode()
    assert passed_on(*(said[at : at + 1] for at in range(len(said)))) == shown.encode()


def test_a_line_is_passed_on_at_its_end_and_a_very_long_one_in_pieces():
    shown = io.BytesIO()
    log = PlainLog(shown)
    log.write(b"first\nsecond")
    assert shown.getvalue() == b"first\n"
    log.write(b"x" * LINE_BYTES)
    assert len(shown.getvalue()) == len(b"first\nsecond") + LINE_BYTES
    log.close()
    assert not shown.closed


def test_a_log_gets_no_longer():
    said = bytes(range(256)) * 1000
    assert len(passed_on(said)) <= len(said)


def test_a_message_of_a_step_shows_names_and_words_that_are_hostile():
    stream = io.StringIO()
    log_plainly(stream)
    logging.getLogger("pkgci.test").info("cannot read %s:\n%s", "\x1b[2J\udcff", "tool\rsaid\x07")
    assert stream.getvalue() == "cannot read ?:\ntool\nsaid?\n"


def test_of_a_long_list_the_first_are_named():
    assert listed(["a", "b"]) == "a, b"
    assert listed(map(str, range(5)), most=3) == "0, 1, 2, 2 more"
    assert listed([]) == ""
