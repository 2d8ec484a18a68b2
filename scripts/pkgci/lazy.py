"""Libraries that take long to import, imported when something of them is used first: what does not need one is not kept
waiting for it. An annotation with such a library's names is written in quotes.
"""

import importlib


class Lazy:
    """A module by its name; its attributes are the module's."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> object:
        return getattr(importlib.import_module(self._name), attribute)
