# shellcheck shell=sh
# The worker reaches the product.
rsync rsync://controller/rocket/state /tmp/state
grep -q -x ready /tmp/state
