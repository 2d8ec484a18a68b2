# shellcheck shell=sh
# Rebuilds the master's image with packages under test. usage: DIRECTORY; it is to be laid over a root, see docs/operator.
cp -r "$1/." /
exec sh /pkgci-install
