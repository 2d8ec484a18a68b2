#!/bin/sh
# In the sandbox, with the network: downloads what the lines of /in/requires need beyond the root to /out/rpms.
# usage: rpm-resolve.sh; /in/pkgci.repo names the repositories.
set -eu
mkdir -p /out/rpms /tmp/repos
cp /in/pkgci.repo /tmp/repos/
set --
while read -r requirement; do
    rpm -q --quiet --whatprovides -- "$requirement" 2>/dev/null || set -- "$@" "$requirement"
done </in/requires
[ $# -eq 0 ] ||
    dnf -y -q --setopt=reposdir=/tmp/repos --setopt=pluginpath=/nonexistent --setopt=install_weak_deps=False \
        --setopt=cachedir=/tmp/dnf --setopt=module_platform_id=platform:pkgci --releasever=1 \
        install --downloadonly --downloaddir=/out/rpms -- "$@"
