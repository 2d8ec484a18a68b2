#!/bin/sh
# In the sandbox, on its terminal: a shell in the root of a failed build, as and where the build was, with its variables.
# usage: shell.sh builder|root
# in: /pkgci/environment, /pkgci/directory, /pkgci/command of the step that failed, as the build's script left them
set -u
# shellcheck source=/dev/null
. /pkgci/environment
# it may be a pattern, of a directory that a build makes before it fails
for place in $(cat /pkgci/directory) /build; do
    cd "$place" 2>/dev/null && break
done
echo "It failed at: $(cat /pkgci/command)"
if [ "$1" = root ]; then
    bash -i || true
else
    setpriv --reuid=1000 --regid=1000 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all \
        env HOME=/build USER=builder LOGNAME=builder bash -i || true
fi
