# shellcheck shell=sh
# The guest's part of install and system tests: what both formats share. Run as root in a restored machine, after
# guest-deb.sh or guest-rpm.sh, which define what differs:
#
#   lists               load the upstream's package lists, before the machine is frozen
#   present NAME        succeed if any version of the package is installed
#   fetch               load the lists of the test repositories
#   spec NAME VERSION ARCHITECTURE   print what names exactly that package to `add` and `solvable`
#   add SPEC...         install exactly those
#   unsolvable          succeed if `add` failed since they cannot be together, or lack what they need
#   solvable SPEC...    succeed if they can be installed together; only ask
#   why                 print the reason for which the last of these failed, as the tool says it
#   version NAME        print the installed version
#   files NAME          print the package's files, one a line
#   drop NAME           remove the package, with its configuration and what came with it; report findings of phase remove
#   state               print the installed packages
#
# usage: sh -euc SCRIPT sh baseline | install NAME VERSION ARCHITECTURE | try NAME | remove NAME
#        | together [NAME VERSION ARCHITECTURE]... | replace [NAME VERSION ARCHITECTURE]...
# stdout: findings, one a line, `PHASE<TAB>FILE<TAB>MESSAGE`; all that a person may want to read goes to $log.
# Status 75: the test repositories cannot be read, which is not the package's fault.
# The package under test can do as it likes here: whoever reads this output trusts none of it.
work=/run/pkgci
log=$work/log
export LC_ALL=C.UTF-8 HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p $work
# findings on a descriptor of their own, which nothing that is started here inherits
exec 3>&1 >>$log 2>&1 </dev/null
cd /

finding() { # PHASE FILE MESSAGE
    printf '%s\t%s\t%s\n' "$1" "$2" "$3" >&3
}

# The line of the log, from line FIRST on, that says best why a tool failed: it matches the first pattern that any matches.
reason() { # FIRST PATTERN...
    first=$1
    shift
    for pattern in "$@"; do
        found=$(tail -n "+$first" $log | grep -a -E "$pattern" | tail -n 1 | tr '\t' ' ' | cut -c 1-300)
        [ -z "$found" ] || break
    done
    echo "${found:-no reason was given}"
}

# What may differ after a removal, by Debian Policy or because it is nobody's. More by a package's entry (`leftovers`).
tolerated() {
    sed 's/ *#.*//; /^$/d' <<'X'
/proc # no files
/sys
/dev
/run
/tmp # cleaned by the system
/var/tmp
/var/cache
/var/log # kept for whoever looks for the reason
/etc/passwd # system users stay: their ids, taken again, would own what they left
/etc/passwd-
/etc/group
/etc/group-
/etc/shadow
/etc/shadow-
/etc/gshadow
/etc/gshadow-
/etc/subuid
/etc/subuid-
/etc/subgid
/etc/subgid-
/etc/.pwd.lock
/var/lib/apt # the state of the tools that install
/var/lib/dpkg
/var/lib/ucf
/var/lib/dnf
/var/lib/rpm
/usr/lib/sysimage
/var/lib/pam
/var/lib/dbus # the state of what runs meanwhile
/var/lib/private
/var/lib/systemd
/etc/ld.so.cache # made again by triggers
/usr/share/info/dir
/usr/share/mime
/usr/share/applications/mimeinfo.cache
/usr/share/glib-2.0/schemas/gschemas.compiled
/usr/share/icons/hicolor/icon-theme.cache
/etc/apt # what this test writes
/etc/pki
/etc/yum.repos.d
X
}

# All other files as they are now.
tree() {
    set --
    for path in $(tolerated); do
        set -- "$@" -path "$path" -o
    done
    # __pycache__ is compiled by whoever runs a Python program first; the directories of languages belong to a distribution's
    # own package (`filesystem`), which a minimal machine may lack
    LC_ALL=C find / -xdev \( "$@" -name __pycache__ \) -prune -o ! -type d -printf '%p\t%y %m %U:%G %s %l\n' \
        -o ! -path '/usr/share/locale/*' ! -path '/usr/share/man/*' -printf '%p\t%y %m %U:%G\n' | LC_ALL=C sort
}

baseline() {
    lists >&3 2>&3
    state >$work/packages
    tree >$work/files
}

install() { # NAME VERSION ARCHITECTURE
    fetch || exit 75
    present "$1" && touch $work/present
    add "$(spec "$@")" || failed
    exactly "$@"
}

failed() {
    finding install '' "$(why)"
    exit 0
}

exactly() { # NAME VERSION ARCHITECTURE
    found=$(version "$1")
    [ "$found" = "$2" ] || finding version '' "version ${found:-none} is installed instead of $1 $2"
}

# All packages of a system test. Those that exclude each other cannot be there at once: the first ones are taken, and a
# finding of phase `apart` names each other one, which is installable by itself.
together() { # [NAME VERSION ARCHITECTURE]...
    fetch || exit 75
    : >$work/together
    specs=
    while [ $# -gt 0 ]; do
        echo "$1 $2 $3" >>$work/together
        specs="$specs $(spec "$1" "$2" "$3")"
        shift 3
    done
    # shellcheck disable=SC2086  # names and versions have no spaces
    if ! add $specs; then
        if unsolvable; then
            some $specs
            add $specs || failed
        else
            failed
        fi
    fi
    while read -r name version architecture; do
        case " $specs " in
            *" $(spec "$name" "$version" "$architecture") "*) exactly "$name" "$version" "$architecture" ;;
            *) finding apart "$name" 'left out, since it excludes others of the packages under test' ;;
        esac
    done <$work/together
}

# Those of the packages that are in the machine already, in whatever version, are installed at the given one.
replace() { # [NAME VERSION ARCHITECTURE]...
    fetch || exit 75
    specs=
    while [ $# -gt 0 ]; do
        ! present "$1" || specs="$specs $(spec "$1" "$2" "$3")"
        shift 3
    done
    # shellcheck disable=SC2086  # names and versions have no spaces
    [ -z "$specs" ] || add $specs || failed
}

# Set `specs` to those of SPEC... that can be installed together, and to one that cannot be installed at all.
some() { # SPEC...
    specs=
    for one; do
        # shellcheck disable=SC2086
        if solvable $specs "$one"; then
            specs="$specs $one"
        elif ! solvable "$one"; then
            specs=$one
            return
        fi
    done
}

try() { # NAME
    files "$1" >$work/own
    while read -r file; do
        [ -e "$file" ] || [ -L "$file" ] || finding files "$file" 'is missing after the installation'
    done <$work/own
    grep -E '^/(usr/)?s?bin/[^/]+$|^/usr/games/[^/]+$' $work/own | while read -r file; do
        [ ! -f "$file" ] || [ ! -x "$file" ] || start_program "$file"
    done
    units=$(sed -n 's,^\(/usr\)\?/lib/systemd/system/\([^/@]*\.service\)$,\2,p' $work/own)
    [ -z "$units" ] || start_services "$units"
}

start_program() { # FILE
    file=$1
    set -- setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs
    "$@" test -x "$file" || set --
    home=$(mktemp -d)
    chmod 777 "$home"
    status=0
    # a limit that is reached is fine: a daemon or a game that knows no --version runs on
    (cd "$home" && HOME=$home timeout -k 1 10 "$@" "$file" --version 3>&- >"$work/said" 2>&1) || status=$?
    head -c 4000 $work/said
    rm -rf "$home"
    if grep -a -q -E 'error while loading shared libraries|symbol lookup error' $work/said; then
        finding run "$file" "$(grep -a -m 1 -E 'error while loading|symbol lookup' $work/said | tr -cd '[:print:]' | cut -c 1-300)"
    else
        case $status in
            126) finding run "$file" 'cannot be executed (status 126)' ;;
            127) finding run "$file" 'it, or what it runs, is not found (status 127)' ;;
            132) finding run "$file" 'dies by SIGILL' ;;
            134) finding run "$file" 'dies by SIGABRT' ;;
            139) finding run "$file" 'dies by SIGSEGV' ;;
        esac
    fi
}

start_services() { # UNITS
    # shellcheck disable=SC2086  # names of units have no spaces
    ! systemctl show -p NeedDaemonReload --value $1 | grep -q yes || systemctl daemon-reload
    enabled=$(for unit in $1; do [ "$(systemctl is-enabled "$unit")" != enabled ] || echo "$unit"; done)
    for unit in $enabled; do
        timeout 60 systemctl start "$unit" 3>&- || true
    done
    # a simple service counts as started as soon as it is forked: give it the time to fail
    [ -z "$enabled" ] || sleep 1
    for unit in $enabled; do
        systemctl status --no-pager --lines 20 "$unit" || true
        [ "$(systemctl show -p Type --value "$unit")" = oneshot ] && wanted='active|inactive' || wanted=active
        now=$(systemctl show -p ActiveState --value "$unit")
        if ! echo "$now" | grep -q -x -E "$wanted"; then
            finding service "$unit" "does not start: $now, $(systemctl show -p Result --value "$unit")"
        elif [ "$(systemctl show -p NRestarts --value "$unit")" != 0 ]; then
            finding service "$unit" 'does not keep running: it was restarted'
        fi
    done
}

remove() { # NAME
    if [ -e $work/present ]; then
        echo "$1 was in the machine before: it is not removed"
        return
    fi
    drop "$1"
    state >$work/packages.now
    tree >$work/files.now
    diff $work/packages $work/packages.now | sed -n 's/^< \(.*\)/state\t\t\1 is gone/p; s/^> \(.*\)/state\t\t\1 is left/p' >&3
    LC_ALL=C join -t "$(printf '\t')" -a 1 -a 2 -e '' -o 0,1.2,2.2 $work/files $work/files.now | awk -F '\t' '
        $2 == $3 { next }
        $2 == "" { print "leftover\t" $1 "\tis left after the removal"; next }
        $3 == "" { print "leftover\t" $1 "\twas there before and is gone"; next }
        { print "leftover\t" $1 "\thas changed: was " $2 ", is " $3 }' >&3
}

"$@"
