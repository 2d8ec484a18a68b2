#!/bin/sh
# Asks by ssh what stdin says; what is said meanwhile goes to the log that Zuul shows live.
#
# usage: ask.sh HOST PORT USER HOST_KEY LOG ANSWER
# The key is the executor's own (private_key_file), from its agent; its account there can run `pkgci zuul` and nothing else.
set -eu
host=$1 port=$2 user=$3 host_key=$4 log=$5 answer=$6
printf 'engine %s\n' "$host_key" >"$answer.known_hosts"
exec ssh -o BatchMode=yes -o StrictHostKeyChecking=yes -o HostKeyAlias=engine -o GlobalKnownHostsFile=/dev/null \
    -o UserKnownHostsFile="$answer.known_hosts" -o LogLevel=ERROR -o ServerAliveInterval=20 \
    -p "$port" -- "$user@$host" >"$answer" 2>>"$log"
