"""What both package formats do, by the same verbs: see `base.py`."""

from types import ModuleType

from pkgci.formats import deb, rpm

FORMATS: dict[str, ModuleType] = {"deb": deb, "rpm": rpm}
