#!/bin/sh
# Makes a Debian root usable by rpm and dnf: an rpm database, and in it one package without files, `host-provides`, that
# offers as RPM capabilities what the root's Debian packages bring (libraries with symbol versions, pkg-config modules,
# commands, package names). So BuildRequires and Requires are really checked, and what is missing is really refused.
#
# usage: host-provides.sh; run as root inside the root, once all its Debian packages are in. Needs rpmbuild and rpm there.
# Running it again replaces what it made before.
set -eu
export LC_ALL=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Debian's rpm keeps its database in the caller's home: dpkg is in charge there. Here rpm is.
mkdir -p /etc/rpm /var/lib/rpm
touch /etc/rpm/macros
sed -i '/^%_dbpath /d' /etc/rpm/macros
echo '%_dbpath /var/lib/rpm' >>/etc/rpm/macros

# what the package `filesystem` of an RPM distribution owns and Debian's base-files does not: no package has to remove it
mkdir -p /usr/share/licenses /usr/share/appdata /usr/share/metainfo

libraries() {
    # what the loader finds, and nothing private; Debian's libraries are not executable, which elfdeps takes for a sign
    ldconfig -p | sed -n 's/.* => //p' | xargs -r readlink -f | sort -u | /usr/lib/rpm/elfdeps --provides --assume-exec
    echo 'rtld(GNU_HASH)'
}

modules() {
    find -L /usr/lib/pkgconfig /usr/share/pkgconfig /usr/lib/*/pkgconfig -name '*.pc' 2>/dev/null | while read -r file; do
        version=$(sed -n 's/^Version: *//p' "$file" | head -n 1 | tr - '~')
        case $version in
            '' | *[!A-Za-z0-9.~+_^]*) echo "pkgconfig($(basename "$file" .pc))" ;;
            *) echo "pkgconfig($(basename "$file" .pc)) = $version" ;;
        esac
    done
}

python_abi() {
    for python in /usr/bin/python3.*[0-9]; do
        [ ! -x "$python" ] || echo "python(abi) = ${python#/usr/bin/python}"
    done
}

commands() {
    find -L /bin /sbin /usr/bin /usr/sbin -maxdepth 1 -type f -perm -1 | grep -v '[^A-Za-z0-9/._+-]'
}

# Debian's names, and beside them those that RPM distributions use for the same
packages() {
    # shellcheck disable=SC2016  # the fields are dpkg-query's
    dpkg-query -W -f '${db:Status-Status} ${Package} ${Version}\n' | awk '
        BEGIN {
            other["g++"] = "gcc-c++"; other["xz-utils"] = "xz"; other["pkgconf"] = "pkgconf-pkg-config"
            other["libc6-dev"] = "glibc-devel"; other["libc6"] = "glibc"; other["zlib1g-dev"] = "zlib-devel"
            other["libssl-dev"] = "openssl-devel"; other["libncurses-dev"] = "ncurses-devel"
            other["passwd"] = "shadow-utils"; other["procps"] = "procps-ng"
        }
        $1 == "installed" {
            name = $2; version = $3
            sub(/^[0-9]+:/, "", version); sub(/-[^-]*$/, "", version)
            gsub(/[^A-Za-z0-9.]+/, ".", version); sub(/\.$/, "", version)
            print name " = " version
            if (name in other) print other[name] " = " version
            else if (sub(/-dev$/, "-devel", name)) {
                print name " = " version
                if (sub(/^lib/, "", name)) print name " = " version
            }
        }'
}

{
    cat <<'SPEC'
Name: host-provides
Version: 1
Release: 1
Summary: What the Debian base of this root offers
License: CC0-1.0
AutoReqProv: no
SPEC
    { libraries; modules; python_abi; commands; packages; } | sort -u | sed 's/^/Provides: /'
    printf '\n%%description\n%%summary.\n%%files\n'
} >"$work/host-provides.spec"

rpmbuild -bb --quiet --nodeps -D "_topdir $work" -D '_buildhost localhost' "$work/host-provides.spec"
rpm -U --replacepkgs --nosignature --force-debian "$work"/RPMS/*/host-provides-1-1.*.rpm
