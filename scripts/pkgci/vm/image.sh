# shellcheck shell=sh disable=SC2154  # ssh is set by the other script
# Turns a plain root into the disk of a machine that boots fast, also where it is emulated. Runs in the sandbox, as root of a
# throw-away copy of the root; leaves /out/disk (a raw ext4 file system), /out/kernel and /out/initrd. Comes after
# image-debian.sh or image-rpm.sh, which define what differs by the root's base:
#
#   prepare FORMAT [PACKAGE...]    add packages, and load what their manager knows of the upstream
#   boot                           leave the kernel and the initrd in /out
#   ssh                            the name of the ssh server's service
#
# usage: sh -eu SCRIPT FORMAT DISK_MIB BUILD [PACKAGE...]
# In the root already: /etc/ssh and /root/.ssh with their keys, and what the other script says; where BUILD is not empty,
# /pkgci-build.tar with a script of that name, which is run when all else is done.
format=$1 disk_mib=$2 build=$3
shift 3

prepare "$format" "$@"
if [ "$format" = rpm ]; then
    cat >/etc/dnf/dnf.conf <<'X'
[main]
best=True
clean_requirements_on_remove=True
gpgcheck=True
install_weak_deps=False
metadata_expire=0
proxy=http://10.0.2.100:3128
X
    # without it, dnf complains; a distribution with modules says its own
    grep -q '^PLATFORM_ID=' /etc/os-release || echo module_platform_id=platform:pkgci >>/etc/dnf/dnf.conf
fi

echo pkgci >/etc/hostname
printf '127.0.0.1 localhost pkgci\n' >/etc/hosts
: >/etc/resolv.conf
echo '/dev/vda / ext4 defaults,noatime,noinit_itable 0 0' >/etc/fstab
systemd-machine-id-setup
# by hand: which program manages networks differs between distributions, and each takes longer than this
cat >/etc/systemd/system/pkgci-network.service <<'X'
[Unit]
Description=The machine's network
BindsTo=sys-subsystem-net-devices-eth0.device
After=sys-subsystem-net-devices-eth0.device
Wants=network.target
Before=network.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=ip link set eth0 up
ExecStart=ip address add 10.0.2.15/24 dev eth0
ExecStart=ip route add default via 10.0.2.2
[Install]
WantedBy=multi-user.target
X
# few and cheap algorithms: an emulated machine feels each of them. The first file that says something counts.
mkdir -p /etc/ssh/sshd_config.d
cat >/etc/ssh/sshd_config.d/00-pkgci.conf <<'X'
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
systemctl enable pkgci-network "$ssh"
# timers fire when the clock jumps after a restore; the others cost seconds of boot and serve nobody here
systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer dnf-makecache.timer logrotate.timer \
    sshd-keygen@rsa.service sshd-keygen@ecdsa.service sshd-keygen@ed25519.service \
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

if [ -n "$build" ]; then
    mkdir /pkgci-build
    (cd /pkgci-build && tar -xf /pkgci-build.tar && exec sh -eu "./$build")
    rm -r /pkgci-build /pkgci-build.tar
fi

# /out gets a file system of its own, so that the bind mount, which takes no mounts along, has only the root's files
mount -t tmpfs out /out
boot
chmod 644 /out/kernel /out/initrd
rm -rf /vmlinuz* /initrd.img* /pkgci-script /pkgci-host-provides
find /boot /tmp -mindepth 1 -delete
find /var/log -type f -delete
mount --bind / /mnt
# no journal: nobody survives a crash here. Tables are left unwritten: the file is sparse, its holes are zeros.
mke2fs -q -F -t ext4 -m 0 -O ^has_journal -E lazy_itable_init=1,root_owner=0:0 -d /mnt /out/disk "${disk_mib}m"
