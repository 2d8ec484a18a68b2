"""What a command in a guest says, without a guest: real ones are in the integration tests."""

import errno
import io
from types import SimpleNamespace

import pytest

from pkgci.vm.remote import LostError, Remote


class Channel:
    """A session of ssh in which a command says something, and then the connection is cut."""

    def __init__(self) -> None:
        self._said = [b"one\n", b"two\n"]

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str):
        return lambda *_, **__: None

    def recv(self, _: int) -> bytes:
        if not self._said:
            raise ConnectionResetError("cut")
        return self._said.pop(0)


class Full(io.BytesIO):
    def write(self, _: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("to", "error", "kept"), [(io.BytesIO(), LostError, b"one\ntwo\n"), (Full(), OSError, b"")])
def test_what_a_command_says_is_there_as_it_comes_and_a_full_disk_is_no_lost_connection(to, error, kept):
    transport = SimpleNamespace(open_session=lambda **_: Channel())
    machine = Remote(SimpleNamespace(get_transport=lambda: transport))
    with pytest.raises(error):
        machine.run("true", timeout=10, to=to)
    assert to.getvalue() == kept
