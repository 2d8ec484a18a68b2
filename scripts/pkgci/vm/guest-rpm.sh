# shellcheck shell=sh disable=SC2154  # log and work are set by guest.sh
# The guest's part of install and system tests for RPM; see guest.sh. The test repositories are in /etc/yum.repos.d.

lists() {
    : # those of an RPM distribution are in the image; Debian has none for dnf
}

state() {
    # keys of repositories are imported by the installation, and stay
    rpm -qa --qf '%{NAME} %{EPOCHNUM}:%{VERSION}-%{RELEASE}.%{ARCH}\n' | grep -v '^gpg-pubkey ' | LC_ALL=C sort
}

present() {
    rpm -q --quiet "$1"
}

version() {
    rpm -q --qf '%|EPOCH?{%{EPOCH}:}:{}|%{VERSION}-%{RELEASE}' "$1" || true
}

files() {
    # a ghost belongs to the package, but is not shipped
    rpm -q --qf '[%{FILEFLAGS:fflags} %{FILENAMES}\n]' "$1" | grep -v '^[^ ]*g[^ ]* ' | sed 's/^[^ ]* //'
}

fetch() {
    : # the installation does it: starting dnf once more takes seconds
}

spec() { # NAME VERSION ARCHITECTURE
    echo "$1-$2.$3"
}

add() { # SPEC...
    apply dnf -y install "$@" || again "$@" || {
        ! said 'Failed to download metadata' || exit 75
        return 1
    }
    scriptlets install
}

again() { # SPEC...
    said 'Status code: 404' || return 1
    echo 'The upstream has moved since the snapshot was made: its lists are loaded again, and the installation repeated.'
    apply dnf -y --refresh install "$@"
}

solvable() { # SPEC...
    apply dnf -y install --downloadonly "$@" >/dev/null
}

unsolvable() {
    said '^ Problem'
}

drop() { # NAME
    if ! apply dnf -y remove "$1"; then
        finding remove '' "$(why)"
        exit 0
    fi
    scriptlets remove
}

# A scriptlet after the fact that fails is a warning to rpm; to whoever installs the package it is not.
scriptlets() { # PHASE
    ! said 'scriptlet failed' || finding "$1" '' "$(why)"
}

# a scriptlet's failure, or what dnf could not solve, or anything
why() {
    reason "$begin" 'scriptlet failed' '(nothing provides|conflicts with) ' '^No match for argument' '^ +- ' '^Error'
}

said() { # PATTERN
    tail -n "+$begin" "$log" | grep -q -E "$1"
}

apply() { # COMMAND...
    begin=$(($(wc -l <"$log") + 1))
    "$@" 3>&-
}

