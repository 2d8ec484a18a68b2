# shellcheck shell=sh disable=SC2154  # log and work are set by install-guest.sh
# The guest's part of the install test for RPM; see install-guest.sh. The test repositories are in /etc/yum.repos.d.

lists() {
    : # the upstream of a target on Debian's own tools has none for dnf
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

add() { # NAME VERSION ARCHITECTURE
    if ! apply dnf -y install "$1-$2.$3"; then
        ! tail -n "+$begin" "$log" | grep -q 'Failed to download metadata' || exit 75
        finding install '' "$(why)"
        exit 0
    fi
    scriptlets install
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
    ! tail -n "+$begin" "$log" | grep -q 'scriptlet failed' || finding "$1" '' "$(why)"
}

# a scriptlet's failure, or what dnf could not solve, or anything
why() {
    reason "$begin" 'scriptlet failed' '(nothing provides|conflicts with) ' '^No match for argument' '^ +- ' '^Error'
}

apply() { # COMMAND...
    begin=$(($(wc -l <"$log") + 1))
    "$@" 3>&-
}

