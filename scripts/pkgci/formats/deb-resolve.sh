#!/bin/sh
# In the sandbox, with the network: asks apt which packages the control file /in/debian/control needs, as the lines
# `'URI' FILE SIZE SHA256:DIGEST` in /out/uris and names to remove in /out/remove. Package lists go to /out/lists.
# usage: deb-resolve.sh PROFILE,... update|known (whether all lists are in /in/lists)
set -eu
rm -f /etc/apt/sources.list /etc/apt/sources.list.d/*
cp /in/sources.list /etc/apt/sources.list
# as of now, so that only what has changed since is read again
[ ! -d /in/lists ] || cp /in/lists/* /var/lib/apt/lists/
if [ "$2" = update ]; then
    apt-get -q update -o APT::Update::Error-Mode=any
    if [ ! -d /in/lists ]; then
        mkdir /out/lists
        find /var/lib/apt/lists -maxdepth 1 -type f ! -name lock -exec cp {} /out/lists/ \;
    fi
fi
LC_ALL=C apt-get -y --allow-downgrades -o Acquire::ForceHash=SHA256 --print-uris --build-profiles="$1" build-dep /in >/out/plan ||
    { status=$?; cat /out/plan; exit "$status"; }
sed -n "/^'/p" /out/plan >/out/uris
sed -n '/^The following packages will be REMOVED:/,/^[^ ]/{/^  /p}' /out/plan | tr -d '*' >/out/remove
