"""What runs a job: `local` (embedded) or `jenkins`, by the verbs of `base.py`."""

import os

from pkgci.config import Config
from pkgci.engines.base import Engine
from pkgci.engines.local import LocalEngine
from pkgci.errors import RequestError


def current(config: Config) -> Engine:
    """Return the engine that the environment's `PKGCI_ENGINE` names, `local` without it.

    Raises:
        RequestError: there is no such engine, or the configuration lacks what it needs.
    """
    name = os.environ.get("PKGCI_ENGINE") or "local"
    if name == "local":
        return LocalEngine(config)
    if name == "jenkins":
        from pkgci.engines.jenkins import JenkinsEngine

        return JenkinsEngine(config)
    raise RequestError(f"PKGCI_ENGINE: there is no engine {name!r}; there are: jenkins, local")
