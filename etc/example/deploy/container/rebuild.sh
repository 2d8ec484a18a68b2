# shellcheck shell=sh
# Rebuilds the container's image with packages under test in it, and the package that carries it. usage: DIRECTORY
root=$(mktemp -d)
podman save rocket | tar -x -C "$root" -f -
cp -r "$1/." "$root"
chroot "$root" sh /pkgci-install
rocket-image build "$root"
dpkg -i rocket-image_*.deb
systemctl restart rocket
