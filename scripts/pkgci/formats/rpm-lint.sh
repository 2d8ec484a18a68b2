#!/bin/sh
# In the sandbox, without network: what rpmlint says of the packages /in/packages/*.rpm, in /out/findings; its name and
# version in /out/tool. With /in/rpmlintrc, the package's own filters, also what it says without them, in /out/unfiltered.
# As an unprivileged user: it reads hostile files. /in/config has our configuration.
set -eu

# its statuses from 64 to 66 say that there are errors
check() {
    status=0
    setpriv --reuid=1000 --regid=1000 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all \
        env HOME=/tmp rpmlint --config /in/config --ignore-unused-rpmlintrc "$@" /in/packages/*.rpm || status=$?
    case $status in 64 | 65 | 66) status=0 ;; esac
    return "$status"
}

echo "rpmlint $(rpmlint --version)" >/out/tool
if [ -f /in/rpmlintrc ]; then
    check --rpmlintrc /in/rpmlintrc >/out/findings
    check >/out/unfiltered
else
    check >/out/findings
fi
