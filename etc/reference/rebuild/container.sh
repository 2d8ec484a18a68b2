# shellcheck shell=sh
# Rebuilds the container's image with packages under test in it, installs the package that carries it, and restarts its service.
# usage: DIRECTORY; it is to be laid over a root.
depot-image web "$1"
exec systemctl restart depot-web
