#!/bin/sh
# In the sandbox, with the network: makes a root of an RPM distribution out of nothing, with the dnf of the sandbox's root.
#
# usage: roots.sh PLATFORM USER PACKAGE...
# PLATFORM: what the distribution's modules are for, as in PLATFORM_ID=platform:... of its os-release; USER: may be empty
# in: /etc/yum.repos.d/upstream.repo with the files that it names: the distribution's repositories and keys
# out: /out/root.tar; it has these repositories and keys, and no other
set -eu
platform=$1 user=$2
shift 2

# the kernel's package would make an initrd for a machine like this one; ours is made when there is a disk to boot from
export KERNEL_INSTALL_BYPASS=1
# for the packages' scripts; rpm itself must leave alone what is mounted, and may not change
mkdir -p /target/dev /target/proc /etc/rpm
mount --rbind /dev /target/dev
mount --rbind /proc /target/proc
echo '%_netsharedpath /dev:/proc' >/etc/rpm/macros.pkgci
dnf -y --installroot=/target --releasever=1 --setopt=reposdir=/etc/yum.repos.d \
    --setopt=module_platform_id="platform:$platform" --setopt=install_weak_deps=False --setopt=tsflags=nodocs \
    install -- "$@"
[ -z "$user" ] || chroot /target useradd -u 1000 -m -d /build "$user"
umount -l /target/dev /target/proc

rm -rf /target/etc/yum.repos.d
mkdir -p /target/etc/pki
cp -a /etc/yum.repos.d /target/etc/
cp -a /etc/pki/pkgci /target/etc/pki/
find /target/var/cache /target/var/log ! -type d -delete
# removed as they are packed: both together would take the memory twice
tar -C /target --numeric-owner --sort=name --remove-files -cf /out/root.tar .
