#!/bin/sh
# In the sandbox, on its terminal: a shell in the root of a failed build, as and where the build was, with its variables.
# usage: shell.sh builder|root
# in: /pkgci/environment, /pkgci/directory, /pkgci/command of the step that failed, as the build's script left them
set -u
# shellcheck source=/dev/null
. /pkgci/environment
cd "$(cat /pkgci/directory)" 2>/dev/null || cd /build || exit 1
echo "It failed at: $(cat /pkgci/command)"
if [ "$1" = root ]; then
    bash -i
else
    setpriv --reuid=1000 --regid=1000 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all \
        env HOME=/build USER=builder LOGNAME=builder bash -i
fi
exit 0
