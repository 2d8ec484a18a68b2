"""What both package formats do, by the same verbs: see `base.py`."""

from types import ModuleType

from pkgci.change import Change
from pkgci.config import Config
from pkgci.formats import deb, rpm
from pkgci.source import Sources

FORMATS: dict[str, ModuleType] = {"deb": deb, "rpm": rpm}


def nothing_to_build(config: Config, change: Change, sources: Sources | None, target_name: str) -> str:
    """Return why a change has nothing to build for a target, in one line; nothing when it has.

    Args:
        config: the configuration.
        change: the change.
        sources: what `source.fetch` returned.
        target_name: the target.
    """
    if sources is None:
        return f"no release claims branch {change.branch}"
    release = config.release_of(change.branch)
    if release and target_name not in release[1].targets:
        return f"release {release[0]} is not built for {target_name}"
    format: ModuleType = FORMATS[config.target(target_name).format]
    if not format.packaged(sources.packaging, sources.package):
        return f"{sources.packaging.project} has no packaging for {target_name} ({format.PACKAGING})"
    return ""
