"""The driver of Nailgun, the REST interface of Fuel 6.1 to 8.0: repositories are attributes of a cluster that it deploys.

Nailgun replaces the list of repositories as a whole, and checks the form of the first one only: so all are checked here, and
read back. The first DEB entry is the operating system's mirror. For a pin of apt it reads a repository's `Release` at
deployment, and makes none, without a word but in its log, where that cannot be read: so it is read here. It hands no keys over:
that its nodes take packages without a signature is Fuel's own setting.

Source: https://opendev.org/openstack/fuel-web, stable/6.1 to stable/8.0, nailgun/nailgun/: api/v1/, fixtures/openstack.yaml.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pkgci import web
from pkgci.config import Cluster
from pkgci.errors import InfrastructureError, RequestError
from pkgci.lazy import Lazy
from pkgci.products.base import Interface, RefusedError, Wanted
from pkgci.text import printable

deb822 = Lazy("debian.deb822")
log = logging.getLogger(__name__)

# Of Fuel's own: `auxiliary` has the highest priority of DEB entries, where the higher one wins (apt_preferences(5)), and
# plugins of RPM entries, where the lower one does (yum-priorities).
HIGHEST_DEB, LOWEST_RPM = 1150, 10
# what apt_preferences(5) takes
LARGEST = 32767
RELEASE_BYTES = 4 << 20
UNAUTHORIZED, NOT_FOUND = 401, 404


class Entry(BaseModel):
    """A repository as Nailgun has it, as far as it must be understood here."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, defer_build=True)

    type: Literal["deb", "rpm"]
    name: str
    uri: str
    suite: str | None = None
    section: str | None = None
    priority: int | None = None


def add(product: Interface, cluster: Cluster, wanted: Sequence[Wanted]) -> None:
    """Add repositories; arguments and errors are those of `pkgci.products.add_repositories`."""
    _check_pins(product, wanted)
    _log_in(product, cluster)
    before = _listed(product, cluster)
    names = {one.name for one in wanted}
    others = [raw for raw in before if raw["name"] not in names]
    understood = [Entry.model_validate(raw) for raw in others]
    for kind in sorted({one.record.format for one in wanted}):
        if kind not in {entry.type for entry in understood}:
            raise RequestError(
                f"{product.name}: cluster {cluster.cluster} has no repository of type {kind}, the operating system's own: "
                "is it another cluster, or another target?"
            )
    entries = [_entry(product, one, wanted, understood) for one in wanted]
    after = [*others, *entries]
    if before == after:
        return
    # a cluster that is deployed refuses more than this
    sent = {"editable": {"repo_setup": {"repos": {"value": after}}}}
    product.ask("PUT", _path(cluster), sent)
    found = _listed(product, cluster)
    if found != after:
        wrong = [raw["name"] for raw in after if raw not in found] or ["their order, or number,"]
        raise InfrastructureError(
            f"{product.name}: cluster {cluster.cluster}: {printable(wrong[0], 100)} is not as it should be, "
            "though nothing was refused"
        )
    for entry in entries:
        log.info("%s: %s is %s, with priority %d", product.name, entry["name"], entry["uri"], entry["priority"])


def _check_pins(product: Interface, wanted: Sequence[Wanted]) -> None:
    """Check that Nailgun can make a pin of apt for each DEB repository that holds for no other one.

    Raises:
        RequestError: a repository does not say what it is, or the same as another one.
        InfrastructureError: a repository cannot be read.
    """
    known: dict[tuple[str, str], str] = {}
    for one in wanted:
        if one.record.format != "deb":
            continue
        url = f"{one.record.url}dists/{one.record.codename}/Release"
        said = deb822.Release(web.read(url, upstream=False, largest=RELEASE_BYTES).decode(errors="replace"))
        identity = (said.get("Origin", ""), said.get("Label", ""))
        if not all(identity):
            raise RequestError(f"{product.name}: {url} has no Origin or no Label: no pin can be made for {one.name}")
        if identity in known:
            raise RequestError(
                f"{product.name}: {known[identity]} and {one.name} have the same Origin and Label: the pin of one "
                "would hold for both"
            )
        known[identity] = one.name


def _log_in(product: Interface, cluster: Cluster) -> None:
    """Have all further requests sent as the user.

    Raises:
        RequestError: Keystone does not know the user, or has another password.
        InfrastructureError: it is no Nailgun, or hands out no token.
    """
    version = product.ask("GET", "/api/version")
    if not isinstance(version, dict) or "auth_required" not in version:
        raise InfrastructureError(f"{product.name}: what answers there is no Nailgun: it does not say `auth_required`")
    if version["auth_required"] is False:
        return
    assert cluster.password_file is not None
    account = {"username": cluster.user, "password": web.password(cluster.password_file)}
    path = "/keystone/v2.0/tokens"
    try:
        said = product.ask("POST", path, {"auth": {"tenantName": cluster.tenant, "passwordCredentials": account}})
    except RefusedError as error:
        # what it says may repeat the password
        about = f"{product.name}: POST {path}: HTTP status {error.status}"
        if error.status == UNAUTHORIZED:
            raise RequestError(
                f"{about}: user {cluster.user}, tenant {cluster.tenant}: is the password in {cluster.password_file} right?"
            ) from None
        raise InfrastructureError(about) from None
    try:
        token = said["access"]["token"]["id"]
    except (KeyError, TypeError):
        token = None
    if not isinstance(token, str) or not re.fullmatch(r"[!-~]+", token):
        raise InfrastructureError(f"{product.name}: POST {path}: the answer has no token")
    product.headers["X-Auth-Token"] = token


def _path(cluster: Cluster) -> str:
    return f"/api/clusters/{cluster.cluster}/attributes/"


def _listed(product: Interface, cluster: Cluster) -> list[dict[str, Any]]:
    """Return the list of repositories of the cluster, as it is: it is sent back with all that others wrote there.

    Raises:
        RequestError: there is no such cluster.
        InfrastructureError: it is no such list.
    """
    try:
        said = product.ask("GET", _path(cluster))
    except RefusedError as error:
        if error.status == NOT_FOUND:
            raise RequestError(f"{product.name}: there is no cluster {cluster.cluster}") from error
        raise
    try:
        listed = said["editable"]["repo_setup"]["repos"]["value"]
    except (KeyError, TypeError):
        listed = None
    about = f"{product.name}: GET {_path(cluster)}"
    if not isinstance(listed, list):
        raise InfrastructureError(f"{about}: there is no list editable.repo_setup.repos.value")
    for number, raw in enumerate(listed):
        try:
            Entry.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, (number, *first["loc"])))
            raise InfrastructureError(f"{about}: entry {where} of the repositories: {first['msg']}") from error
    return listed


def _entry(product: Interface, one: Wanted, wanted: Sequence[Wanted], others: Sequence[Entry]) -> dict[str, Any]:
    """Return the entry of a repository, with a priority before all others of its type.

    Raises:
        InfrastructureError: another one has a priority that leaves no room.
    """
    own = [other.level for other in wanted if other.record.format == one.record.format]
    taken = [entry.priority for entry in others if entry.type == one.record.format and entry.priority is not None]
    entry = {"type": one.record.format, "name": one.name, "uri": one.record.url}
    if one.record.format == "deb":
        entry |= {"suite": one.record.codename, "section": one.record.component}
        priority = max([HIGHEST_DEB, *taken]) + 1 + max(own) - one.level
        fits = priority <= LARGEST
    else:
        priority = 1 + one.level
        fits = priority < min([LOWEST_RPM, *taken])
    if not fits:
        raise InfrastructureError(
            f"{product.name}: {one.name} cannot come before the others: one of type {one.record.format} has the priority "
            f"{max(taken) if one.record.format == 'deb' else min(taken)}"
        )
    return {**entry, "priority": priority}
