#!/bin/sh
# In the sandbox, without network: unpacks the source package /in/*.src.rpm as its own %prep does, patches applied, as
# /out/tree.tar with the spec and the other sources in rpm/; its name and version go to /out/name.
set -eu
chown -R builder:builder /build
cat >/tmp/import.sh <<'IMPORT'
set -eu
cd /build
rpm -i --nosignature --nodeps -D '_topdir /build/rpm' /in/*.src.rpm
spec=$(ls rpm/SPECS)
rpmspec -q --srpm --undefine dist --qf '%{NAME} %{VERSION}-%{RELEASE}\n' "rpm/SPECS/$spec" >name
rpmbuild -bp --nodeps -D '_topdir /build/rpm' "rpm/SPECS/$spec"
cd rpm/BUILD
set -- *
[ $# = 1 ] && [ -d "$1" ] || { echo "error: %prep of $spec leaves not one directory but: $*" >&2; exit 1; }
mv "$1" /build/tree
cd /build
rpmspec -P "rpm/SPECS/$spec" | awk 'tolower($1) ~ /^source0?:$/ { n = split($2, part, "/"); print part[n] }' >source0
rm -rf tree/rpm tree/.git && mkdir tree/rpm
# the tree has the patches already
sed '/^[Pp]atch[0-9]*[[:space:]]*:/d; /^%patch/d; /^%autopatch/d' "rpm/SPECS/$spec" >"tree/rpm/$spec"
for file in rpm/SOURCES/*; do
    case ${file##*/} in
    "$(cat source0)" | *.patch | *.diff) ;;
    *) cp "$file" tree/rpm/ ;;
    esac
done
IMPORT
setpriv --reuid=1000 --regid=1000 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all \
    env HOME=/build sh -eu /tmp/import.sh
cp /build/name /out/name
tar -C /build/tree --format=gnu --hard-dereference --sort=name -cf /out/tree.tar .
