#!/bin/sh
# Turns a plain Debian root into the disk of a machine that boots fast, also where it is emulated. Runs in the sandbox,
# as root of a throw-away copy of the root; leaves /out/disk (a raw ext4 file system), /out/kernel and /out/initrd.
#
# usage: image.sh FORMAT DISK_MIB [PACKAGE...]
# In the root already: /etc/ssh and /root/.ssh with their keys, /pkgci-host-provides.
set -eu
format=$1 disk_mib=$2
shift 2

export DEBIAN_FRONTEND=noninteractive
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
[ "$#" = 0 ] || apt-get -q -y install "$@"
[ "$format" != rpm ] || sh /pkgci-host-provides
apt-get clean
rm /usr/sbin/policy-rc.d

# What mmdebstrap was told for its own run: without man pages, packages under test would miss files.
rm -f /etc/dpkg/dpkg.cfg.d/99mmdebstrap /etc/apt/apt.conf.d/99mmdebstrap
echo force-unsafe-io >/etc/dpkg/dpkg.cfg.d/pkgci
# no translations, no diffs of indexes, no preconfiguration, which nobody would answer: all that costs time
cat >/etc/apt/apt.conf.d/90pkgci <<'X'
Acquire::Languages "none";
Acquire::PDiffs "false";
Acquire::Check-Valid-Until "false";
Acquire::http::Proxy "http://10.0.2.100:3128";
APT::Install-Recommends "false";
#clear DPkg::Pre-Install-Pkgs;
X
# An https mirror is asked for by http: the proxy on the host, which may see what the guest fetches, speaks https to it.
sed -i 's,\(\] \)https://,\1http://,' /etc/apt/sources.list
if [ "$format" = rpm ]; then
    cat >/etc/dnf/dnf.conf <<'X'
[main]
best=True
clean_requirements_on_remove=True
gpgcheck=True
install_weak_deps=False
metadata_expire=0
module_platform_id=platform:pkgci
proxy=http://10.0.2.100:3128
X
fi
# building the cache here takes a second, in the guest a dozen
apt-cache gencaches

echo pkgci >/etc/hostname
printf '127.0.0.1 localhost pkgci\n' >/etc/hosts
: >/etc/resolv.conf
echo '/dev/vda / ext4 defaults,noatime,noinit_itable 0 0' >/etc/fstab
systemd-machine-id-setup
cat >/etc/systemd/network/10-pkgci.network <<'X'
[Match]
Name=eth0
[Link]
RequiredForOnline=no
[Network]
Address=10.0.2.15/24
Gateway=10.0.2.2
IPv6AcceptRA=no
LinkLocalAddressing=no
X
# few and cheap algorithms: an emulated machine feels each of them
cat >/etc/ssh/sshd_config.d/pkgci.conf <<'X'
UseDNS no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
HostKey /etc/ssh/ssh_host_ed25519_key
KexAlgorithms curve25519-sha256,curve25519-sha256@libssh.org
Ciphers aes128-ctr,aes128-gcm@openssh.com
MaxSessions 20
LoginGraceTime 0
X
find /etc/ssh -name 'ssh_host_*' ! -name 'ssh_host_ed25519_key*' -delete
systemctl enable systemd-networkd ssh
# timers fire when the clock jumps after a restore; the others cost seconds of boot and serve nobody here
systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer dnf-makecache.timer logrotate.timer \
    man-db.timer e2scrub_all.timer fstrim.timer systemd-tmpfiles-clean.timer \
    getty.target systemd-networkd-wait-online.service systemd-timesyncd.service systemd-pstore.service \
    modprobe@drm.service modprobe@loop.service modprobe@efi_pstore.service modprobe@fuse.service modprobe@dm_mod.service \
    systemd-random-seed.service e2scrub_reap.service systemd-update-utmp.service systemd-journal-flush.service \
    kmod-static-nodes.service dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount \
    sys-fs-fuse-connections.mount sys-kernel-config.mount

# generators run at each daemon-reload: those stay that concern what a package ships
mkdir -p /etc/systemd/system-generators
for generator in bless-boot cryptsetup debug getty gpt-auto hibernate-resume integritysetup rc-local run system-update \
    veritysetup; do
    ln -s /dev/null "/etc/systemd/system-generators/systemd-$generator-generator"
done

# /out gets a file system of its own, so that the bind mount, which takes no mounts along, has only the root's files
mount -t tmpfs out /out
cp /boot/vmlinuz-* /out/kernel
cp /boot/initrd.img-* /out/initrd
chmod 644 /out/kernel /out/initrd
rm -rf /vmlinuz* /initrd.img* /pkgci-script /pkgci-host-provides
find /boot /tmp -mindepth 1 -delete
find /var/log -type f -delete
mount --bind / /mnt
# no journal: nobody survives a crash here. Tables are left unwritten: the file is sparse, its holes are zeros.
mke2fs -q -F -t ext4 -m 0 -O ^has_journal -E lazy_itable_init=1,root_owner=0:0 -d /mnt /out/disk "${disk_mib}m"
