#!/bin/sh
# In the sandbox, without network: makes the SRPM from /build/tree and rebuilds it as an unprivileged user.
# usage: rpm-build.sh SPEC NAME VERSION DIST EPOCH PROFILE,... VARY(yes|no)
# in: /build/tree (what Source0 is made of), /build/packaging/rpm (spec, other sources, patches), /deps/*.rpm,
#   /build/.rpmmacros with the conditions of the profiles, /pkgci-contents (rpm-contents.sh)
# out: /out/*.rpm, SPEC's .rpmlintrc where it has one beside it, packages (NAME VERSION ARCH FILE a line), contents/,
#   index.primary.xml, index.filelists.xml and index.other.xml (createrepo_c's), index.digests (PACKAGE DIGEST, a line a file)
# Ends with 11 when the build dependencies do not install, 12 when there is no SRPM, 13 when the build fails.
set -eu
spec=${1##*/} name=$2 version=$3 dist=$4 SOURCE_DATE_EPOCH=$5 profiles=$6 vary=$7
export SOURCE_DATE_EPOCH

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

cat >>/build/.rpmmacros <<'MACROS'
%_topdir /build/rpm
%_buildhost pkgci
%use_source_date_epoch_as_buildtime 1
%clamp_mtime_to_source_date_epoch 1
%source_date_epoch_from_changelog 0
%_build_id_links none
MACROS
mkdir -p /build/rpm/SPECS /build/rpm/SOURCES
chown -R builder:builder /build

echo "== SRPM $name $version"
cat >/build/source.sh <<'SOURCE'
set -eu
spec=$1 name=$2 version=$3 dist=$4
# the release's suffix stands where the distribution's own would: %{?dist}, at the end of Release if it is not used
{
    printf '%%global dist %s\n' "$dist"
    sed '/^[Rr]elease[[:space:]]*:/{/%{?dist}/!s/[[:space:]]*$/%{?dist}/}' "/build/packaging/rpm/$spec"
} >"/build/rpm/SPECS/$spec"
cd /build
rpmspec -P "rpm/SPECS/$spec" >parsed
awk 'tolower($1) ~ /^(source|patch)[0-9]*:$/ { print tolower($1), $2 }' parsed >named
top=$(sed -n 's/^%\(auto\)\?setup .*-n[[:space:]]*\([^[:space:]]*\).*/\2/p' parsed | head -n 1)
top=${top:-$name-$version}
while read -r tag value; do
    file=${value##*/}
    case $tag in
    source: | source0:)
        case $file in
        *.tar.gz | *.tgz) compress='gzip -9n' ;;
        *.tar.xz) compress='xz -T1 -6' ;;
        *.tar.bz2) compress='bzip2 -9' ;;
        *.tar) compress=cat ;;
        *) echo "error: $tag $file: Source0 is made from the tree: its name must end in .tar.gz, .tar.xz or .tar.bz2" >&2; exit 1 ;;
        esac
        rm -rf top && mkdir top && cp -a tree "top/$top"
        # the mode of nobody's umask, the time of the change: the same tree gives the same bits
        tar -C top --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" --mode=go=rX,u+rw \
            --format=gnu -c "$top" | $compress >"rpm/SOURCES/$file"
        ;;
    *)
        [ -f "packaging/rpm/$file" ] ||
            { echo "error: $tag $file is not in the packaging directory; put it beside the spec" >&2; exit 1; }
        cp "packaging/rpm/$file" rpm/SOURCES/
        ;;
    esac
done <named
find rpm -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
rpmbuild -bs --nodeps "rpm/SPECS/$spec"
SOURCE
calling /build "sh -eux /build/source.sh '$spec' '$name' '$version' '$dist'"
as_builder sh -eu /build/source.sh "$spec" "$name" "$version" "$dist" || exit 12
[ "$(find /build/rpm/SRPMS -name '*.src.rpm' | wc -l)" = 1 ] || { echo "error: the spec makes not one SRPM"; exit 12; }

echo "== installing the build dependencies"
if [ -d /deps ]; then
    calling / "rpm -Uv --nosignature /deps/*.rpm  # as root: pkgci shell --root"
    # Debian's own rpm wants to be asked twice
    set --
    ! rpm --help | grep -q -e --force-debian || set -- --force-debian
    rpm -Uv --nosignature "$@" /deps/*.rpm || exit 11
    rm -rf /deps
fi

echo "== build"
rm -rf /build/rpm/SPECS /build/rpm/SOURCES
processors=$(nproc)
# another day, another umask, another number of processors must not matter
if [ "$vary" = yes ]; then
    umask 002
    [ "$(date -u +%H)" -lt 12 ] && TZ=VARIED+12 || TZ=VARIED-12
    export TZ
    processors=$((processors + 1))
fi
export RPM_BUILD_NCPUS="$processors"
nocheck=
case ",$profiles," in *,nocheck,*) nocheck=' --nocheck' ;; esac
build="rpmbuild --rebuild$nocheck --nosignature $(echo /build/rpm/SRPMS/*.src.rpm)"
calling '/build/rpm/BUILD/*/' "$build"
# shellcheck disable=SC2086
as_builder $build || exit 13
# nothing that the build started touches the results any more
as_builder sh -c 'kill -KILL -1' || true

filters=/build/packaging/rpm/${spec%.spec}.rpmlintrc
[ ! -f "$filters" ] || cp "$filters" /out/
find /build/rpm/SRPMS /build/rpm/RPMS -name '*.rpm' -exec cp {} /out/ \;
cd /out
# the index says how old they are: the same build gives the same bits
touch -d "@$SOURCE_DATE_EPOCH" ./*.rpm
mkdir /index
createrepo_c --quiet --error-exit-val --no-database --simple-md-filenames --changelog-limit=10 \
    --compress-type=gz --general-compress-type=gz -o /index . ||
    { echo "error: createrepo_c cannot read what the build made: $(echo ./*.rpm)"; exit 13; }
for name in primary filelists other; do
    zcat "/index/repodata/$name.xml.gz" >"index.$name.xml"
done
: >index.digests
for file in ./*.rpm; do
    case $file in *.src.rpm) continue ;; esac
    rpm -qp --nosignature --qf '%{NAME} %|EPOCH?{%{EPOCH}:}|%{VERSION}-%{RELEASE} %{ARCH} ' "$file"
    echo "${file#./}"
    # of a package without files some rpm say (none)
    rpm -qp --nosignature --qf "[${file#./} %{FILEDIGESTS}\n]" "$file" | sed '/(none)$/d' >>index.digests
done >packages
sh -eu /pkgci-contents /out || echo "what is in the packages cannot be read"
