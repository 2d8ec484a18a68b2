# shellcheck shell=sh disable=SC2154  # log and work are set by guest.sh
# The guest's part of install and system tests for DEB; see guest.sh. The test repositories' sources are in
# /etc/apt/sources.list.d and, alone, in /etc/apt/pkgci.d, their preferences in /etc/apt/preferences.d/pkgci.
export DEBIAN_FRONTEND=noninteractive
# The test repositories alone: what needs nothing else is installed without reading the upstream's lists, which are large.
# A cache for these few would replace the one of all.
few='-o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts=/etc/apt/pkgci.d
    -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache='

lists() {
    apt-get -q update --error-on=any
    apt-cache gencaches
}

state() {
    dpkg-query -W -f '${Package}:${Architecture} ${Version} ${db:Status-Abbrev}\n' | LC_ALL=C sort
}

present() {
    dpkg-query -W -f '${db:Status-Abbrev}' "$1" 2>/dev/null | grep -q '^i'
}

version() {
    dpkg-query -W -f '${Version}' "$1" || true
}

files() {
    dpkg-query -L "$1"
}

fetch() {
    # shellcheck disable=SC2086  # options
    apt-get -q update --error-on=any -o APT::Get::List-Cleanup=false $few
}

spec() { # NAME VERSION ARCHITECTURE
    echo "$1=$2"
}

add() { # SPEC...
    sources=$few
    attempt install "$@" && return
    if unsolvable; then
        echo 'The test repositories do not have all that it needs: the upstream is asked, too.'
        sources=
        attempt install "$@" && return
    fi
    if said ' 404 '; then
        echo 'The upstream has moved since the snapshot was made: its lists are loaded again, and the installation repeated.'
        apt-get -q update --error-on=any
        attempt install "$@" && return
    fi
    return 1
}

solvable() { # SPEC...
    sources=
    attempt --simulate install "$@" >/dev/null
}

unsolvable() {
    said 'unmet dependencies|no installation candidate|Unable to (locate|correct|satisfy)'
}

attempt() { # APT-ARGUMENT...
    begin=$(($(wc -l <"$log") + 1))
    # shellcheck disable=SC2086
    apt-get -q -y $sources -o Dpkg::Use-Pty=false -o DPkg::Options::=--force-confnew --allow-downgrades "$@" 3>&-
}

said() { # PATTERN
    tail -n "+$begin" "$log" | grep -q -E "$1"
}

drop() { # NAME
    begin=$(($(wc -l <"$log") + 1))
    # no source is needed: what is removed is installed
    # shellcheck disable=SC2086
    apt-get -q -y $few -o Dir::Etc::sourceparts=/dev/null -o Dpkg::Use-Pty=false --autoremove purge "$1" 3>&- && return
    finding remove '' "$(why)"
    exit 0
}

# dpkg's reason, or what apt could not solve, or anything
why() {
    reason "$begin" '^ (installed|new|old) .* (script|subprocess) ' '^dpkg: error' \
        '^ .* : (Depends|PreDepends|Conflicts|Breaks):' '^E: '
}

