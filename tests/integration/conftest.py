"""The order of these tests."""

import pytest

# by far the longest one: beside it all others find room
FIRST = "test_reference"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest file begin first, and leave the others in their order."""
    items.sort(key=lambda item: item.path.stem != FIRST)
