"""What a build host answers to what is no request. Real ones, by ssh, are in the integration tests."""

import os

import pytest

from pkgci.buildhost import SIZE, _Agent
from pkgci.errors import InfrastructureError


@pytest.mark.parametrize("content", [b"no JSON", b"{}", b"\xff"])
def test_a_request_of_another_form_is_another_protocol(content: bytes):
    (stdin, to_host), (from_host, stdout) = os.pipe(), os.pipe()
    try:
        os.write(to_host, SIZE.pack(len(content)) + content)
        with pytest.raises(InfrastructureError, match="a request of another form: the agent has another protocol"):
            _Agent(stdin, stdout).request()
    finally:
        for descriptor in (stdin, to_host, from_host, stdout):
            os.close(descriptor)
