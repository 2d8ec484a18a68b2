# The guest's part of the install test for DEB; see install-guest.sh. The test repositories' sources are in /etc/apt/pkgci.d,
# their preferences in /etc/apt/preferences.d/pkgci.
export DEBIAN_FRONTEND=noninteractive
# The test repositories alone: what needs nothing else is installed without reading the upstream's lists, which are large.
# A cache for these few would replace the one of all.
few='-o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts=/etc/apt/pkgci.d
    -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache='
all='-o Dir::Etc::sourceparts=/etc/apt/pkgci.d'

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

add() { # NAME VERSION ARCHITECTURE
    sources=$few
    # shellcheck disable=SC2086
    apt-get -q -s $few --allow-downgrades install "$1=$2" || sources=$all
    apply add_once "$1=$2" && return
    if tail -n "+$begin" $log | grep -q ' 404 '; then
        echo 'The upstream has moved since the snapshot was made: its lists are loaded again, and the installation repeated.'
        apt-get -q update --error-on=any
        sources=$all
        apply add_once "$1=$2" && return
    fi
    finding install '' "$(reason "$begin" "$complaints")"
    exit 0
}

add_once() {
    # shellcheck disable=SC2086
    apt-get -q -y $sources -o Dpkg::Use-Pty=false -o DPkg::Options::=--force-confnew --allow-downgrades install "$1" 3>&-
}

drop() { # NAME
    # no source is needed: what is removed is installed
    apply purge "$1" && return
    finding remove '' "$(reason "$begin" "$complaints")"
    exit 0
}

purge() {
    # shellcheck disable=SC2086
    apt-get -q -y $few -o Dir::Etc::sourceparts=/dev/null -o Dpkg::Use-Pty=false --autoremove purge "$1" 3>&-
}

# what says most: dpkg's reason, then what apt could not solve or fetch
complaints='^ (installed|new|old) .* (script|subprocess) |^dpkg: error|^ .* : (Depends|PreDepends|Conflicts|Breaks):|^E: '

apply() { # COMMAND...
    begin=$(($(wc -l <$log) + 1))
    "$@"
}

