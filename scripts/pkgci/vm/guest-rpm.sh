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
    # as the machine was frozen: asking rpm takes as long as reading the whole list
    cut -d ' ' -f 1 "$work/packages" | grep -q -x -F -e "$1"
}

version() {
    # with the files: each start of rpm counts
    rpm -q --qf '%|EPOCH?{%{EPOCH}:}:{}|%{VERSION}-%{RELEASE}\n[%{FILEFLAGS:fflags} %{FILENAMES}\n]' "$1" \
        >"$work/query.$1" || return 0
    head -n 1 "$work/query.$1"
}

files() {
    # a ghost belongs to the package, but is not shipped
    sed '1d; /^[^ ]*g[^ ]* /d; s/^[^ ]* //' "$work/query.$1"
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
    # By rpm, which runs the scriptlets and removes the files: dnf's start takes seconds. What came with it goes, too.
    state >"$work/packages.with"
    # shellcheck disable=SC2016  # awk's own
    come='NR == FNR { known[$1]; next } !($1 in known) { sub(/^[0-9]+:/, "", $2); print $1 "-" $2 }'
    # shellcheck disable=SC2046  # names and versions have no spaces
    if ! apply rpm -e $(awk "$come" "$work/packages" "$work/packages.with"); then
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
    reason "$begin" 'scriptlet failed' '(nothing provides|conflicts with) ' '^No match for argument' '^ +- ' \
        ' is needed by ' '^(Error|error:)'
}

said() { # PATTERN
    tail -n "+$begin" "$log" | grep -q -E "$1"
}

apply() { # COMMAND...
    begin=$(($(wc -l <"$log") + 1))
    "$@" 3>&-
}

