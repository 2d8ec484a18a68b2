#!/bin/sh
# In the sandbox, without network: what lintian says of the source package /in/*.dsc and the packages /in/*.deb, as JSON
# in /out/findings; its name and version in /out/tool. As an unprivileged user: it reads hostile files.
set -eu
dpkg-query -W -f 'lintian ${Version}\n' lintian >/out/tool
cd /in
# orig-tarball-missing-upstream-signature: the orig tarball is made from the tree, so upstream has never signed it
setpriv --reuid=1000 --regid=1000 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all \
    env HOME=/tmp lintian --no-cfg --no-user-dirs --fail-on none --display-info --show-overrides --exp-output format=json \
    --suppress-tags orig-tarball-missing-upstream-signature -- ./*.dsc ./*.deb >/out/findings
