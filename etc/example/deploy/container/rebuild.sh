# shellcheck shell=sh
# Rebuilds the container's image with packages under test in it, and the package that carries it. usage: DIRECTORY
root=$(mktemp -d)
container=$(podman create rocket)
podman export "$container" | tar -x -C "$root" -f -
podman rm "$container"
cp -r "$1/." "$root"
# what packages' scripts expect of any root
mount --rbind --make-rslave /dev "$root/dev"
mount -t proc proc "$root/proc"
chroot "$root" sh /pkgci-install
umount -R -l "$root/dev" "$root/proc"
rocket-image build "$root"
dpkg -i rocket-image_*.deb
systemctl restart rocket
