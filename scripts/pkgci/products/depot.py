"""The driver of the reference product: `GET /repositories`, and `PUT /repositories/NAME` for each.

The higher priority wins, as of a pin of apt. The product tells its nodes by itself.
"""

import logging
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from pkgci.config import Cluster
from pkgci.errors import InfrastructureError
from pkgci.products.base import Interface, Wanted
from pkgci.text import printable

log = logging.getLogger(__name__)

PATH = "/repositories"
# apt_preferences(5): above 1000 a version is taken though a higher one is installed
LEAST = 1000


class Entry(BaseModel):
    """A repository as the product has it; it may say more of those of others."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, defer_build=True)

    name: str
    type: Literal["deb", "rpm"]
    uri: str
    suite: str | None = None
    component: str | None = None
    priority: int
    key: str | None = None


def add(product: Interface, _: Cluster, wanted: Sequence[Wanted]) -> None:
    """Add repositories; arguments and errors are those of `pkgci.products.add_repositories`."""
    before = _listed(product)
    names = {one.name for one in wanted}
    others = [entry for entry in before.values() if entry.name not in names]
    above = max([LEAST, *(entry.priority for entry in others)])
    levels = 1 + max(one.level for one in wanted)
    entries = [
        Entry(
            name=one.name,
            type=one.record.format,
            uri=one.record.url,
            suite=one.record.codename,
            component=one.record.component,
            priority=above + levels - one.level,
            key=one.record.signing_key,
        )
        for one in wanted
    ]
    for entry in entries:
        if before.get(entry.name) != entry:
            product.ask("PUT", f"{PATH}/{entry.name}", entry.model_dump(exclude={"name"}))
            log.info("%s: %s is %s, with priority %d", product.name, entry.name, entry.uri, entry.priority)
    after = _listed(product)
    for entry in (*entries, *others):
        if after.get(entry.name) != entry:
            raise InfrastructureError(
                f"{product.name}: {printable(entry.name, 100)} is not as it should be, though nothing was refused"
            )


def _listed(product: Interface) -> dict[str, Entry]:
    """Return the repositories that the product has, by name."""
    said = product.ask("GET", PATH)
    try:
        return {entry.name: entry for entry in TypeAdapter(list[Entry]).validate_python(said)}
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the answer"
        raise InfrastructureError(
            f"{product.name}: GET {PATH}: no list of repositories: {where}: {first['msg']}"
        ) from error
