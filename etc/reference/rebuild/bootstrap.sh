# shellcheck shell=sh
# Rebuilds what the nodes boot, with packages under test in it, and installs the package that carries it.
# usage: DIRECTORY; it is to be laid over a root.
exec depot-image bootstrap "$1"
