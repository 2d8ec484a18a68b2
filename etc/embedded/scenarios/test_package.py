"""A scenario for any package: all that are built together are whole, live through a restart, and can be installed again.

What the fixtures are says `scripts/pkgci/scenario.py`.
"""

import re

FILES = {"deb": 'dpkg-query -L "$1"', "rpm": 'rpm -ql "$1"'}
VERIFY = {"deb": 'dpkg --verify "$1"', "rpm": 'rpm --verify "$1"'}
CONFIGURATION = {
    "deb": """dpkg-query -W -f '${Conffiles}\\n' "$1" | sed -n 's,^ \\(/[^ ]*\\) [0-9a-f]*$,\\1,p'""",
    "rpm": 'rpm -qc "$1"',
}
# a DEB is still there since it was installed; what must not be asked for is a decision
AGAIN = {"deb": 'dpkg -i /var/cache/apt/archives/"$1"_*.deb </dev/null', "rpm": 'dnf -y reinstall "$1"'}
DATABASE = {"deb": "dpkg --audit", "rpm": "rpm --verify --all --nofiles"}
APPEND = 'for file; do [ ! -f "$file" ] || echo >>"$file"; done; sha256sum "$@" || true'
ACTIVE = 'for unit; do [ "$(systemctl is-active "$unit")" != active ] || echo "$unit"; done'


def listed(node, script, *arguments):
    """Return the lines that a script says, which must succeed."""
    done = node.run(script, *arguments)
    assert done.status == 0, done.text()
    return done.text().splitlines()


def active_services(node, package, target):
    """Return those of a package's services that run."""
    paths = listed(
        node, f"{FILES[target.format]} | {{ grep '/lib/systemd/system/[^/@]*[.]service$' || true; }}", package.name
    )
    units = [path.rpartition("/")[2] for path in paths]
    return listed(node, ACTIVE, *units) if units else []


def test_its_files_are_as_it_ships_them(node, package, target):
    said = node.run(VERIFY[target.format], package.name).text().splitlines()
    # configuration (c) and ghosts (g) may differ
    assert [line for line in said if not re.match(r"(missing|\S{9,}) +[cg] /", line)] == []


def test_its_services_come_back_from_a_restart(node, package, target):
    units = active_services(node, package, target)
    if units:
        assert listed(node, 'systemctl restart "$@"; sleep 1', *units) == []
        assert active_services(node, package, target) == units


def test_installed_again_it_keeps_changed_configuration_and_its_services(node, package, target):
    units = active_services(node, package, target)
    files = listed(node, CONFIGURATION[target.format], package.name)
    changed = listed(node, APPEND, *files) if files else []
    again = node.run(AGAIN[target.format], package.name, timeout=600)
    assert again.status == 0, again.text()
    if files:
        assert listed(node, 'sha256sum "$@" || true', *files) == changed
    assert active_services(node, package, target) == units


def test_the_system_is_whole(node, target):
    assert node.run("systemctl --failed --plain --no-legend").text() == ""
    assert node.run(DATABASE[target.format]).text() == ""
