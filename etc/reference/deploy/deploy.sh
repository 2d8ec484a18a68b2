# shellcheck shell=sh
# Deploys the product on its master, whose image has its packages: from here on it serves the network.
mkdir -p /var/log/depot
depot-configure eth1
systemctl enable --now depot depot-dhcp depot-web
