"""What runs a job: `local` (embedded) or `jenkins`, by the verbs of `base.py`."""

import os

from pkgci.config import Config
from pkgci.engines.base import Engine
from pkgci.engines.local import LocalEngine
from pkgci.errors import RequestError


def current(config: Config) -> Engine:
    """Return the engine that the environment's `PKGCI_ENGINE` names, `local` without it.

    Raises:
        RequestError: there is no such engine.
    """
    name = os.environ.get("PKGCI_ENGINE") or "local"
    if name != "local":
        raise RequestError(f"PKGCI_ENGINE: the engine {name!r} is not available yet; there is: local")
    return LocalEngine(config)
