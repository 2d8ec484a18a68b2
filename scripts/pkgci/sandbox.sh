#!/bin/sh
# The inside of pkgci/sandbox.py: makes the throw-away root and runs one script in it.
#
# usage: sandbox.sh DISK_MIB NETWORK(yes|no) MODE SCRIPT [ARGUMENT...]
# MODE: run; shell: on the terminal that is stdout; a number: a script that fails, or has not ended after that many
# seconds (then the status is 124), leaves a tar of the whole root on fd 5.
# stdin: a tar of files for the root; fd 3: the base tar; fd 4: takes a tar of /out at the end.
# It is process 1 of its own pid namespace and root of its own user namespace: when it ends, all that it started ends.
set -eu
disk=$1 network=$2 mode=$3
shift 3
root=/tmp
umask 022

mount --make-rprivate /
resolv=$(cat /etc/resolv.conf 2>/dev/null || true)
hosts=$(cat /etc/hosts 2>/dev/null || true)
mount -t tmpfs -o "size=${disk}m,nr_inodes=4m,mode=755" pkgci "$root"
tar -C "$root" --numeric-owner -xpf - --exclude='./dev/*' <&3
exec 3<&-
# a root that was kept is hostile: no link of its own may lead what is written here out of it
for place in etc out run tmp; do
    [ ! -L "$root/$place" ] || rm "$root/$place"
done
rm -rf "${root:?}/dev" "$root/proc" "$root/etc/hosts" "$root/etc/resolv.conf"
mkdir -p "$root/dev" "$root/etc" "$root/proc" "$root/run" "$root/tmp" "$root/out"
chmod 1777 "$root/tmp"
mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
for node in null zero full random urandom tty; do
    : >"$root/dev/$node"
    mount --bind "/dev/$node" "$root/dev/$node"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"
# shared memory counts against the same disk limit as everything else
chmod 1777 "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
ln -s /proc/self/fd/0 "$root/dev/stdin"
ln -s /proc/self/fd/1 "$root/dev/stdout"
ln -s /proc/self/fd/2 "$root/dev/stderr"
if [ "$mode" = shell ]; then
    # by this name what looks for its terminal's finds it
    : >"$root/dev/console"
    mount --bind /proc/self/fd/1 "$root/dev/console"
fi
if [ "$network" = yes ]; then
    printf '%s\n' "$resolv" >"$root/etc/resolv.conf"
    printf '%s\n' "$hosts" >"$root/etc/hosts"
else
    printf '127.0.0.1 localhost pkgci\n' >"$root/etc/hosts"
fi
hostname pkgci
# no namespaces inside this one: less of the kernel to attack
echo 0 >/proc/sys/user/max_user_namespaces
[ "$network" = yes ] || ip link set lo up
tar -C "$root" --numeric-owner --no-same-owner -xpf - || exit 97

# Nothing of the host stays visible, not even to a root that breaks out of a chroot. Both by a process that has begun
# before: the first thing that runs from the new root must not find the old one. pivot_root(2) is 155, umount2(2) 166, and
# 2 is MNT_DETACH.
cd "$root"
perl -e 'my $here = "."; syscall(155, $here, $here) == 0 && syscall(166, $here, 2) == 0 or die "pivot_root: $!\n"'
# everything from here on is the root's own; its tools come from it
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH

status=0
case $mode in
run) "$@" </dev/null 4>&- || status=$? ;;
shell) setsid -cw "$@" <&1 4>&- || status=$? ;;
*)
    timeout -k 5 "$mode" "$@" </dev/null 4>&- 5>&- || status=$?
    # what it started would change the root while it is packed
    kill -KILL -1 2>/dev/null || true
    # nobody may be there to take it; what the script ended with counts
    [ "$status" = 0 ] || tar -C / --one-file-system --numeric-owner -cSf - . >&5 2>/dev/null || true
    ;;
esac
tar -C /out --numeric-owner -cSf - . >&4
exit "$status"
