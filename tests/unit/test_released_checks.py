"""What packages say of each other, by each format's own comparison, and which of them cannot be installed together."""

from types import SimpleNamespace

import pytest

from pkgci.errors import PackageError
from pkgci.released import checks
from pkgci.released.base import Packaged, Relation


@pytest.mark.parametrize(
    ("form", "operator", "wanted", "version", "holds"),
    [
        ("rpm", "<<", "0:2.0", "0:1.0-1", True),
        ("rpm", "<<", "0:1.0", "0:1.0-1", False),
        ("rpm", "<=", "0:1.0", "0:1.0-1", True),
        ("rpm", "=", "0:1.0", "0:1.0-1", True),
        ("rpm", "=", "0:1.0-2", "0:1.0-1", False),
        ("rpm", ">=", "0:1.0", "0:1.0-1", True),
        ("rpm", ">>", "0:1.0", "0:1.0-1", False),
        ("rpm", ">>", "0:1.0", "1:0.5-1", True),
        ("rpm", "", "", "0:1.0-1", True),
        ("deb", "<<", "2.0", "1.0-1", True),
        ("deb", "=", "1.0-1", "1.0-1", True),
        ("deb", ">=", "2", "1", False),
    ],
)
def test_a_relation_holds_as_the_format_has_it_also_without_a_release(form, operator, wanted, version, holds):
    repository = SimpleNamespace(format=form)
    assert checks._holds(repository, Relation("foo", operator, wanted), version) is holds


def packaged(name: str, path: str, *apart: Relation) -> Packaged:
    return Packaged(name, "1", {path: ""}, frozenset({name}), apart)


def test_two_packages_of_one_build_may_not_have_the_same_file_unless_they_are_apart():
    def conflicts(*packages: Packaged) -> None:
        record = SimpleNamespace(key="k", package="x", packages=packages)
        form = SimpleNamespace(packaged=lambda _: packages)
        index = SimpleNamespace(neighbours=lambda *_, **__: set())
        repository = SimpleNamespace(format="deb", name="rocket/bookworm", form=form, index=index)
        checks._conflicts(repository, [SimpleNamespace(record=record)], [])

    with pytest.raises(PackageError, match="foo-a 1 has the file /usr/bin/x, which foo-b 1 of rocket/bookworm has"):
        conflicts(packaged("foo-a", "/usr/bin/x"), packaged("foo-b", "/usr/bin/x"))
    conflicts(packaged("foo-a", "/usr/bin/x"), packaged("foo-b", "/usr/bin/y"))
    conflicts(packaged("foo-a", "/usr/bin/x"), packaged("foo-b", "/usr/bin/x", Relation("foo-a")))
