# shellcheck shell=sh
# What image.sh does with a root of Debian. In the root already: apt's lists, and /pkgci-host-provides.
# shellcheck disable=SC2034  # for image.sh
ssh=ssh

prepare() { # FORMAT [PACKAGE...]
    format=$1
    shift
    export DEBIAN_FRONTEND=noninteractive
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod 755 /usr/sbin/policy-rc.d
    [ "$#" = 0 ] || apt-get -q -y --no-install-recommends install "$@"
    [ "$format" != rpm ] || sh /pkgci-host-provides
    apt-get clean
    rm /usr/sbin/policy-rc.d

    # What mmdebstrap was told for its own run: without man pages, packages under test would miss files.
    rm -f /etc/dpkg/dpkg.cfg.d/99mmdebstrap /etc/apt/apt.conf.d/99mmdebstrap
    echo force-unsafe-io >/etc/dpkg/dpkg.cfg.d/pkgci
    # no translations, no diffs of indexes, no preconfiguration, which nobody would answer: all that costs time; dates are
    # not compared: the clock of a machine may go on from when that was frozen, or be behind that of a repository
    cat >/etc/apt/apt.conf.d/90pkgci <<'X'
Acquire::Languages "none";
Acquire::PDiffs "false";
Acquire::Check-Date "false";
Acquire::Check-Valid-Until "false";
Acquire::http::Proxy "http://10.0.2.100:3128";
APT::Install-Recommends "false";
#clear DPkg::Pre-Install-Pkgs;
X
    # An https mirror is asked for by http: the proxy on the host, which may see what the guest fetches, speaks https to it.
    sed -i 's,\(\] \)https://,\1http://,' /etc/apt/sources.list
    # building the cache here takes a second, in the guest a dozen
    apt-cache gencaches
}

boot() {
    cp /boot/vmlinuz-* /out/kernel
    cp /boot/initrd.img-* /out/initrd
}
