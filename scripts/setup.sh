#!/bin/sh
# Makes this machine ready: Debian packages of bindep.txt, a range of sub-ids for the user, the Python environment.
#
# usage: setup.sh [test|bench|host]; adds what only the tests or the benchmarks need; `host`: without the environment.
# As root or with sudo it installs what is missing. Otherwise it prints the one command for an administrator and ends with 3.
set -eu
kind=${1:-}
cd "$(dirname "$0")/.."

say() { printf '%s %s\n' "$(date +%T)" "$*"; }

wanted=$(sed -e 's/#.*//' -e "${kind:+s/\\[$kind\\]//}" -e '/\[/d' bindep.txt)
missing=
for package in $wanted; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || missing="$missing $package"
done
user=$(id -un)
commands=
# A server that the tests start by themselves, with a configuration of their own, must not run otherwise: masked before its
# package comes, it is started neither now nor at boot.
for server in openssh-server:ssh nginx-light:nginx; do
    unit=/etc/systemd/system/${server#*:}.service
    case " $missing " in
    *" ${server%:*} "*) [ -e "$unit" ] || commands="${commands:+$commands && }mkdir -p ${unit%/*} && ln -s /dev/null $unit" ;;
    esac
done
[ -z "$missing" ] ||
    commands="${commands:+$commands && }apt-get update && apt-get install -y --no-install-recommends$missing"
has_range() { awk -F: -v user="$user" -v id="$(id -u)" '($1 == user || $1 == id) && $3 >= 65536 { found = 1 } END { exit !found }' "$1" 2>/dev/null; }
if ! { has_range /etc/subuid && has_range /etc/subgid; }; then
    # the first range of 65536 ids that is above all that are given away
    first=$(cat /etc/subuid /etc/subgid 2>/dev/null |
        awk -F: 'BEGIN { next_ = 100000 } $2 + $3 > next_ { next_ = $2 + $3 } END { print next_ }')
    last=$((first + 65535))
    commands="${commands:+$commands && }usermod --add-subuids $first-$last --add-subgids $first-$last $user"
fi
if [ -n "$commands" ]; then
    if [ "$(id -u)" = 0 ]; then
        say "preparing the machine: $commands"
        DEBIAN_FRONTEND=noninteractive sh -c "$commands"
    elif command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
        say "preparing the machine: sudo sh -c '$commands'"
        sudo DEBIAN_FRONTEND=noninteractive sh -c "$commands"
    else
        printf "This machine lacks what pkgci needs. An administrator runs once:\n\n    sudo sh -c '%s'\n\n" "$commands" >&2
        exit 3
    fi
fi

[ "$kind" != host ] || exit 0
# one environment for each state of what it is made from
stamp=.venv/$(cat setup.cfg constraints.txt | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
    say "preparing the Python environment in .venv"
    rm -rf .venv
    python3.11 -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . tox
    touch "$stamp"
fi
say "the machine is ready"
