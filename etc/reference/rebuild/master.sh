# shellcheck shell=sh
# Rebuilds the master's image with packages under test. usage: DIRECTORY; it is to be laid over a root, see docs/operator.
cp -r "$1/." /
# all that is on the machine is in the image
rm -r "$1"
exec sh /pkgci-install
