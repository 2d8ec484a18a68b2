#!/bin/sh
# In the sandbox, without network: runs the tests of a DEB source package in the machine whose ssh server is behind
# descriptor 5 of this process.
# usage: autopkgtest.sh HOST_KEY UPSTREAM
# With UPSTREAM `none`, apt in the machine sees the test repositories alone, unless a test may call it.
# in: /in/*.dsc and the files that it names, /root/identity; out: /out/summary
# Ends with autopkgtest's status.
set -eu
mkdir -p /root/.ssh /root/bin
echo "guest $1" >/root/.ssh/known_hosts
# autopkgtest's own options take any host key: what comes first counts
cat >/root/bin/ssh <<SSH
#!/bin/sh
exec /usr/bin/ssh -o StrictHostKeyChecking=yes -o UserKnownHostsFile=/root/.ssh/known_hosts \\
    -o ProxyCommand='socat - UNIX-CONNECT:/proc/$$/fd/5' "\$@"
SSH
chmod 755 /root/bin/ssh
PATH=/root/bin:$PATH
dpkg-source --no-check -x /in/*.dsc /root/tree
sources=
if [ "$2" = none ] && ! grep -r -q -w apt /root/tree/debian/tests; then
    sources='Dir::Etc::sourcelist "/dev/null"; Dir::Etc::sourceparts "/etc/apt/pkgci.d";'
fi
# what needs no root does not get it
echo "$sources" |
    ssh -i /root/identity root@guest 'cat >/etc/apt/apt.conf.d/95pkgci && useradd -m -s /bin/bash tester'
# What counts as a built tree is used as it is; for any other the machine would install dpkg-dev, which nobody asked for.
grep -q build-needed /root/tree/debian/tests/control || touch /root/tree/debian/files
status=0
# the machine may be emulated: all limits of time are long
autopkgtest --no-built-binaries --summary-file=/out/summary --timeout-factor=4 --user=tester --needs-internet=skip \
    /root/tree -- \
    ssh --hostname=guest --login=root --identity=/root/identity \
    --capability=isolation-container --capability=isolation-machine || status=$?
exit "$status"
