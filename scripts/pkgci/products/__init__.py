"""Products that repositories are added to through their own interface, for the flavour `cluster`: a driver for each.

A driver is a module with one verb, `add`: `depot.py` for the reference product, `nailgun.py` for Fuel. `plain` is none:
there apt or dnf of each node is told, see `pkgci.vm.guest`. What the product then does with its nodes is not done here.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from pkgci import web
from pkgci.artifacts import Repository, RepositoryPackage
from pkgci.config import Cluster
from pkgci.products import depot, nailgun
from pkgci.products.base import Interface, in_order

DRIVERS = {"depot": depot.add, "nailgun": nailgun.add}


def add_repositories(
    cluster: Cluster,
    reach: Callable[[int], AbstractContextManager[int]],
    repositories: Mapping[str, Repository],
    tested: Sequence[RepositoryPackage],
) -> None:
    """Add repositories to a product, before all that it has: those under test first, released ones last.

    What others have added stays. When all are there already, nothing is changed. Nothing is done for the driver `plain`.

    Args:
        cluster: the driver, and what it is told.
        reach: yields, while its context lasts, the port of this host's loopback that leads to a port of the product's
            machine; `Remote.forward` of that machine.
        repositories: by the names that the product shall have for them.
        tested: the packages under test.

    Raises:
        RequestError: the configuration is wrong (the password, the cluster), or a repository is none for this product.
        InfrastructureError: the product does not answer, refuses, or has something else afterwards.
    """
    if cluster.driver == "plain" or not repositories:
        return
    wanted = in_order(repositories, tested)
    with reach(cluster.port) as port:
        url = f"http://127.0.0.1:{port}"
        with web.session(url, upstream=False) as session:
            DRIVERS[cluster.driver](Interface(session, url, f"{cluster.driver}, port {cluster.port}"), cluster, wanted)
