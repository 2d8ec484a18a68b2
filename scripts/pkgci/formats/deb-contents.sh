#!/bin/sh
# In the sandbox: says what is in the packages of a directory, for formats/contents.py. Of what is too much, the beginning.
# usage: deb-contents.sh DIRECTORY
# out: /out/contents/PACKAGE/ with what its control archive holds, files (as tar lists them), count (how many those are)
set -eu
export LC_ALL=C.UTF-8 TZ=UTC
for package in "$1"/*.deb; do
    [ -f "$package" ] || continue
    to=/out/contents/${package##*/}
    control=$(mktemp -d)
    mkdir -p "$to"
    dpkg-deb -e "$package" "$control/all"
    for name in control conffiles config postinst postrm preinst prerm triggers; do
        # a package's own link, device or pipe is not followed
        if [ -f "$control/all/$name" ] && [ ! -L "$control/all/$name" ]; then
            head -c 65537 "$control/all/$name" >"$to/$name"
        fi
    done
    rm -rf "$control"
    dpkg-deb --fsys-tarfile "$package" | tar -tv --quoting-style=c --numeric-owner |
        awk -v count="$to/count" 'NR <= 50000 { print substr($0, 1, 10000) } END { print NR > count }' >"$to/files"
done
