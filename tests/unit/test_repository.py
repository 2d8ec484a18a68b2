"""What is believed of a `repository.json`, which may be another installation's."""

import pytest

from pkgci import repository, web
from pkgci.artifacts import Repository, RepositoryPackage
from pkgci.errors import RequestError

URL = "http://127.0.0.1:8470/test/run/bookworm-amd64/"
KEY = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nAAAA\n-----END PGP PUBLIC KEY BLOCK-----\n"


def described(monkeypatch: pytest.MonkeyPatch, **changed: str) -> Repository:
    """Read the record of a repository with one package, in which something is changed."""
    words = {"name": "small", "version": "1.0", "architecture": "all", "source": "small", **changed}
    package = RepositoryPackage(file="pool/small.deb", sha256="0" * 64, key="", **words)
    made = Repository(
        url=URL, format="deb", codename="bookworm", target="bookworm-amd64", packages=(package,), signing_key=KEY
    )
    monkeypatch.setattr(web, "read", lambda *_, **__: made.model_dump_json(by_alias=True).encode())
    return repository.described(f"{URL}repository.json")


@pytest.mark.parametrize("name", ["name", "version", "architecture", "source"])
def test_a_word_of_a_package_leads_to_no_other_file_and_is_no_option(monkeypatch, name):
    assert described(monkeypatch).packages[0].name == "small"
    for word in ("../../x", "-x", "x y", "x\ny", ""):
        with pytest.raises(RequestError, match="does not describe the repository that it lies in"):
            described(monkeypatch, **{name: word})
