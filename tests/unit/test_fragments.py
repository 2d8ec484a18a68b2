"""What the sandbox of a build says of RPM packages: taken as createrepo_c would read them, or refused in one line."""

import re
from pathlib import Path

import packages
import pytest

from pkgci.artifacts import Package
from pkgci.errors import InfrastructureError, PackageError
from pkgci.formats import fragments

NAME = "hello-1-1.noarch.rpm"
LISTED = Package(name="hello", version="1-1", architecture="noarch", file=NAME, sha256="0" * 64)
ENTITIES = '<!DOCTYPE metadata [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>\n<metadata>'


@pytest.fixture
def place(tmp_path: Path) -> Path:
    packages.rpm_index(tmp_path, [packages.rpm(tmp_path, "hello", "1", files={"/etc/hello": b"", "/opt/ünï": b"x"})])
    return tmp_path


def edit(place: Path, name: str, former: str, latter: str) -> None:
    """Replace the first occurrence of a text in a file."""
    path = place / f"index.{name}"
    text = path.read_text()
    assert former in text
    path.write_text(text.replace(former, latter, 1))


def test_a_package_is_as_it_was_read(place):
    (package,) = fragments.read(place, "hello", [LISTED]).values()
    assert (package.name, package.version, package.release, package.arch) == ("hello", "1", "1", "noarch")
    assert [path[1:3] for path in package.files] == [("/etc/", "hello"), ("/opt/", "ünï")]
    assert re.fullmatch("e3b0c442[0-9a-f]{56}", package.files[0][3])
    assert package.requires == []


@pytest.mark.parametrize(
    ("name", "former", "latter", "said"),
    [
        ("primary.xml", f'href="{NAME}"', f'href="../{NAME}"', f"is about '../{NAME}', not once about each package"),
        ("primary.xml", f'href="{NAME}"', 'href="/etc/passwd"', "is about '/etc/passwd', not once"),
        ("primary.xml", "<name>hello</name>", "<name>bash</name>", "is bash 1-1 noarch, not what its build lists"),
        ("primary.xml", 'rel="1"', 'rel="2"', "is hello 1-2 noarch, not what its build lists"),
        ("primary.xml", "<name>hello</name>", "", "has None in the place of a name, version, release"),
        ("primary.xml", "<name>hello</name>", "<name>../hello</name>", "has '../hello' in the place of a name"),
        ("primary.xml", "<version epoch", "<version what", "does not say 'epoch' of a package"),
        ("primary.xml", "<metadata>", ENTITIES, "has a DOCTYPE"),
        ("primary.xml", "what hello is", "&b;", "is no XML: undefined entity"),
        ("primary.xml", "what hello is", "<name>bash</name>", "has the element name, which createrepo_c does not"),
        ("primary.xml", "what hello is", "<<", "is no XML"),
        ("primary.xml", "what hello is", "a&#x85;b", "has control characters in summary"),
        ("primary.xml", "what hello is", "two\nlines", "has control characters in summary"),
        ("primary.xml", 'installed="', 'installed="1e', "has '1e1' in the place of a number"),
        ("primary.xml", "<format>", f"<format>{'<format>' * 1000}", "has the element format"),
        ("primary.xml", "</package>", "</package><package/>", "has None in the place of a name"),
        ("filelists.xml", 'name="hello"', 'name="bash"', "is not about the packages of the build, once about each"),
        ("filelists.xml", "/etc/hello", "/etc/../hello", "has the path /etc/../hello, which no package can have"),
        ("filelists.xml", "/etc/hello", "hello", "has the path hello, which no package can have"),
        ("filelists.xml", "/etc/hello", "/etc/\n", "has control characters in file"),
        ("filelists.xml", "<file>", "<file>/etc/shadow</file><file>", "and index.digests do not have the same files"),
        ("filelists.xml", "<file>", f"{'<file/>' * 500_001}<file>", "has more than 500000 elements"),
        ("digests", "e3b0", "../e3b0", "which is no digest of a file"),
        ("other.xml", "<package", "<package/><package", "is not about the packages of the build, once about each"),
        ("other.xml", "</package>", f"<changelog>{'x' * (2 << 20)}</changelog></package>", "has more than 1 MiB in"),
        ("other.xml", "</package>", f"{'<changelog/>' * (2 << 20)}</package>", "index.other.xml has more than 16 MiB"),
    ],
    ids=lambda value: value[:40],
)
def test_what_is_not_as_createrepo_c_writes_it_or_not_of_the_build_is_refused(place, name, former, latter, said):
    edit(place, name, former, latter)
    with pytest.raises(PackageError, match=re.escape(said)) as raised:
        fragments.read(place, "hello", [LISTED])
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 500


def test_a_build_without_them_has_to_be_repeated(place):
    (place / "index.other.xml").unlink()
    with pytest.raises(InfrastructureError, match=r"index.other.xml is missing: .* build it again"):
        fragments.read(place, "hello", [LISTED])


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ([], "is about 'hello-1-1.noarch.rpm', not once about each package of the build"),
        ([LISTED, LISTED.model_copy(update={"file": "more.rpm"})], "says nothing about more.rpm"),
    ],
)
def test_they_are_about_the_packages_of_the_build_and_no_others(place, listed, said):
    with pytest.raises(PackageError, match=said):
        fragments.read(place, "hello", listed)
