#!/bin/sh
# In the sandbox, with the network: downloads what the lines of /in/requires need beyond the root to /out/rpms.
# usage: rpm-resolve.sh; /in/pkgci.repo names the repositories beside those that the root has, its distribution's own.
set -eu
mkdir -p /out/rpms /etc/yum.repos.d
cp /in/pkgci.repo /etc/yum.repos.d/
# without it, dnf complains; a distribution with modules says its own
platform=$(sed -n 's/^PLATFORM_ID="\?\([^"]*\)"\?$/\1/p' /etc/os-release)
set --
while read -r requirement; do
    rpm -q --quiet --whatprovides -- "$requirement" 2>/dev/null || set -- "$@" "$requirement"
done </in/requires
[ $# -eq 0 ] ||
    dnf -y -q --setopt=pluginpath=/nonexistent --setopt=install_weak_deps=False --releasever=1 \
        --setopt=module_platform_id="${platform:-platform:pkgci}" install --downloadonly --downloaddir=/out/rpms -- "$@"
