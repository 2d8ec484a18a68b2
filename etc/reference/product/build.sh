# shellcheck shell=sh
# Makes the image of the product's master, from a root with the packages that the environment names. It is run where images of
# machines are made, which is fast, and sees nothing of what is under test.
place=/srv/depot
mkdir -p $place/repository /etc/depot

# the product's packages; those of nodes are served from here
for package in depot-agent depot-master depot-node depot-web; do
    (cd $package && dpkg-buildpackage --build=binary --no-sign --no-check-builddeps)
done
mv depot-node_*.deb $place/repository
(cd $place/repository && dpkg-scanpackages --multiversion . >Packages)

# how the master logs in to nodes: they have its host key
ssh-keygen -q -t ed25519 -N '' -C depot -f /etc/depot/identity
printf 'node-* %s\n' "$(cat /etc/ssh/ssh_host_ed25519_key.pub)" >/etc/depot/known_hosts

# what nodes boot and the container runs begins as this root, without what only the master needs
tar -C / --one-file-system --exclude=./srv --exclude='./pkgci-*' --exclude='./tmp/*' --exclude='./dev/*' --exclude=./out \
    --exclude=./etc/depot -cf - . | (mkdir $place/bootstrap && tar -C $place/bootstrap -xf -)
remove() { # ROOT PACKAGE...
    root=$1
    shift
    chroot "$root" apt-get -q -y --allow-remove-essential -o APT::AutoRemove::RecommendsImportant=false \
        -o APT::AutoRemove::SuggestsImportant=false purge --autoremove "$@"
}
remove $place/bootstrap debhelper dnsmasq-base podman python3 squashfs-tools
cat /etc/depot/identity.pub >>$place/bootstrap/root/.ssh/authorized_keys
printf '127.0.0.1 localhost\n' >$place/bootstrap/etc/hosts
: >$place/bootstrap/etc/fstab
# every machine that boots gets an identity of its own
: >$place/bootstrap/etc/machine-id
cp -a $place/bootstrap $place/web
remove $place/web busybox-static dbus initramfs-tools iproute2 'linux-image-*' openssh-server systemd udev
for into in bootstrap:depot-agent web:depot-web; do
    root=$place/${into%:*}
    cp "${into#*:}"_*.deb "$root/tmp/own.deb"
    chroot "$root" dpkg -i /tmp/own.deb
    rm "$root/tmp/own.deb"
done

dpkg -i depot-master_*.deb
remove / debhelper
depot-image bootstrap
depot-image web
