#!/bin/sh
# In the sandbox, without network: makes the source package from /build/tree and builds it as an unprivileged user.
# usage: deb-build.sh NAME VERSION CODENAME any|all EPOCH MESSAGE PROFILE,... VARY(yes|no) [PACKAGE-TO-REMOVE...]
# in: /build/tree, /deps/*.deb, /pkgci-contents (deb-contents.sh)
# out: /out/*.dsc, tarballs, *.deb, *.changes, *.buildinfo, index.packages, contents/
# Ends with 11 when the build dependencies do not install, 12 when there is no source package, 13 when the build fails.
set -eu
# a second after the package's own entry of the changelog, to which one is added: their dates have to grow
name=$1 version=$2 codename=$3 part=$4 SOURCE_DATE_EPOCH=$(($5 + 1)) message=$6 profiles=$7 vary=$8
shift 8
export SOURCE_DATE_EPOCH DEBIAN_FRONTEND=noninteractive

as_builder() {
    setpriv --reuid=1000 --regid=1000 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all \
        env HOME=/build USER=builder LOGNAME=builder "$@"
}

# what runs next, for `pkgci shell`: where, by which command, with which variables
calling() {
    mkdir -p /pkgci
    printf '%s\n' "$1" >/pkgci/directory
    printf '%s\n' "$2" >/pkgci/command
    export -p >/pkgci/environment
}

echo "== installing the build dependencies"
if [ -d /deps ]; then
    calling / "apt-get install /deps/*.deb  # as root: pkgci shell --root"
    for package do set -- "$@" "$package-"; shift; done
    apt-get -q -y --allow-downgrades -o APT::Sandbox::User=root -o Acquire::Languages=none -o APT::Install-Recommends=false \
        -o DPkg::Options::=--force-unsafe-io install /deps/*.deb "$@" || exit 11
    rm -rf /deps
fi

echo "== source package $name $version"
cd /build
# a file without a history of its own is as old as the change
find tree -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
chown -R builder:builder /build
cat >/build/source.sh <<'SOURCE'
set -eu
name=$1 version=$2 codename=$3 message=$4
cd /build/tree
rm -rf .pc
# in the name of who wrote the entry before: the change adds nothing to it
by=$(dpkg-parsechangelog -S Maintainer)
{
    printf '%s (%s) %s; urgency=medium\n\n  * %s\n\n' "$name" "$version" "$codename" "$message"
    printf ' -- %s  %s\n\n' "$by" "$(LC_ALL=C date -u -R -d "@$SOURCE_DATE_EPOCH")"
    cat debian/changelog
} >../changelog
mv ../changelog debian/changelog
upstream=${version#*:}
format='3.0 (native)'
case $upstream in
*-*)
    upstream=${upstream%-*} format='3.0 (quilt)'
    cp -a ../tree ../orig
    cd ../orig
    if [ -s debian/patches/series ]; then
        # git may hold the tree with the patches applied or not; the orig tarball is without them
        sed 's/[[:space:]]*#.*//; s/[[:space:]].*//; /^$/d' debian/patches/series | tac >../patches
        last=$(head -n 1 ../patches)
        if [ -n "$last" ] && patch -R -p1 -s -f -F0 --dry-run <"debian/patches/$last" >/dev/null 2>&1; then
            while read -r patch; do
                patch -R -p1 -s -f -F0 -E --no-backup-if-mismatch <"debian/patches/$patch"
            done <../patches
        fi
    fi
    rm -rf debian
    cd ..
    mv orig "$name-$upstream"
    tar --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" --mode=go=rX,u+rw \
        --format=gnu -c "$name-$upstream" | xz -T1 -6 >"${name}_$upstream.orig.tar.xz"
    rm -rf "$name-$upstream"
    ;;
esac
cd /build
dpkg-source --format="$format" -b tree
dpkg-source -x "${name}_${version#*:}.dsc" "$name-$upstream"
SOURCE
calling /build "sh -eux /build/source.sh '$name' '$version' '$codename' '$message'"
as_builder sh -eu /build/source.sh "$name" "$version" "$codename" "$message" || exit 12

echo "== build"
upstream=${version#*:}
cd "/build/$name-${upstream%-*}"
case $part in all) part=-b ;; any) part=-B ;; esac
processors=$(nproc)
# another day, another umask, another number of processors must not matter
if [ "$vary" = yes ]; then
    umask 002
    [ "$(date -u +%H)" -lt 12 ] && TZ=VARIED+12 || TZ=VARIED-12
    export TZ
    processors=$((processors + 1))
fi
DEB_BUILD_OPTIONS="parallel=$processors"
# Debian Policy 4.9.1: these profiles go together with the options of the same names
case ",$profiles," in *,nocheck,*) DEB_BUILD_OPTIONS="$DEB_BUILD_OPTIONS nocheck" ;; esac
case ",$profiles," in *,nodoc,*) DEB_BUILD_OPTIONS="$DEB_BUILD_OPTIONS nodoc" ;; esac
DEB_BUILD_PROFILES=$(echo "$profiles" | tr , ' ')
export DEB_BUILD_OPTIONS DEB_BUILD_PROFILES
build="dpkg-buildpackage -us -uc $part -rfakeroot"
calling "$PWD" "$build"
# shellcheck disable=SC2086
as_builder $build || exit 13
# nothing that the build started touches the results any more
as_builder sh -c 'kill -KILL -1' || true

cd /build
find . -maxdepth 1 -type f \( -name '*.deb' -o -name '*.dsc' -o -name '*.tar.*' -o -name '*.changes' \
    -o -name '*.buildinfo' \) -exec cp {} /out/ \;
cd /out
dpkg-scanpackages -m . >index.packages
sh -eu /pkgci-contents /out || echo "what is in the packages cannot be read"
