#!/bin/sh
# Takes on one repository of a mirror, by plain rsync: a further mirror that pkgci knows nothing of. Run it by a timer.
#
# usage: take-on.sh SOURCE DIRECTORY URL
#   SOURCE     the repository on a mirror, for rsync: rsync://mirror.example.org/released/bookworm
#   DIRECTORY  where it is served from: /srv/mirror/bookworm
#   URL        where its readers find that: http://further.example.org/bookworm
#
# Contents first, the pointer last. What the pointer named before any content was fetched is there as a whole then, since a
# mirror keeps it for three days at least. Lines for apt and dnf that name this mirror are yours to hand out.
set -eu

source=${1%/} directory=$2 url=${3%/}
contents() {
    rsync -rtlH --exclude=/current --exclude='/.*' --exclude=mirrorlist --exclude='/pkgci.*' "$@" "$source/" ./
}

mkdir -p "$directory/.next"
cd "$directory"
rsync -l "$source/current" .next/
contents
mv -T .next/current current
printf '%s/%s/\n' "$url" "$(readlink current)" > .next/mirrorlist
mv .next/mirrorlist mirrorlist
contents --delete
