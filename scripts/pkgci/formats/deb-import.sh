#!/bin/sh
# In the sandbox, without network: unpacks the source package /in/*.dsc, patches applied, as /out/tree.tar; its name and
# version go to /out/name.
set -eu
cd /tmp
dpkg-source --no-check -x /in/*.dsc tree
rm -rf tree/.pc tree/.git
cd tree
echo "$(dpkg-parsechangelog -S Source) $(dpkg-parsechangelog -S Version)" >/out/name
tar --format=gnu --hard-dereference --sort=name -cf /out/tree.tar .
