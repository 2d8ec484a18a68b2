#!/bin/sh
# Asks by ssh what stdin says; the answer is on stdout. What is said meanwhile goes to the log that Zuul shows live.
#
# usage: ask.sh HOST PORT USER HOST_KEY LOG
# The key is the executor's own (private_key_file), from its agent; its account there can run `pkgci zuul` and nothing else.
set -eu
host=$1 port=$2 user=$3 host_key=$4 log=$5
known=$(mktemp)
trap 'rm -f "$known"' EXIT
printf 'engine %s\n' "$host_key" >"$known"
ssh -o BatchMode=yes -o StrictHostKeyChecking=yes -o HostKeyAlias=engine -o UserKnownHostsFile="$known" \
    -o GlobalKnownHostsFile=/dev/null -o LogLevel=ERROR -o ServerAliveInterval=20 \
    -p "$port" -- "$user@$host" 2>>"$log"
