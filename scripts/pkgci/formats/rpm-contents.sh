#!/bin/sh
# In the sandbox: says what is in the packages of a directory, for formats/contents.py. Of what is too much, the beginning.
# usage: rpm-contents.sh DIRECTORY
# out: /out/contents/PACKAGE/ with tags (a value of the header a line, quoted as for a shell), triggers,
#      files (mode, size, path and target of a link), count (how many those are)
set -eu
export LC_ALL=C.UTF-8

# what dnf resolves by, and the scriptlets
tags='installed %{LONGSIZE}\n'
for tag in REQUIRE PROVIDE CONFLICT OBSOLETE RECOMMEND SUGGEST SUPPLEMENT ENHANCE; do
    tags="${tags}[${tag}S %{${tag}NEVRS:shescape}\n]"
done
for tag in PRETRANS PREIN POSTIN PREUN POSTUN POSTTRANS VERIFYSCRIPT; do
    program=${tag%SCRIPT}
    [ "$program" = VERIFY ] && program=VERIFYSCRIPT
    tags="${tags}%|${program}PROG?{[$tag.program %{${program}PROG:shescape}\n]}|%|$tag?{$tag %{$tag:shescape}\n}|"
done

query() {
    rpm -qp --nosignature --nodigest "$@"
}

for package in "$1"/*.rpm; do
    case $package in *.src.rpm) continue ;; esac
    [ -f "$package" ] || continue
    to=/out/contents/${package##*/}
    mkdir -p "$to"
    query --qf "$tags" "$package" | head -c 4194304 >"$to/tags"
    query --triggers --filetriggers "$package" | head -c 65537 >"$to/triggers"
    query --qf '[%{FILEMODES:perms} %{LONGFILESIZES} %{FILENAMES:shescape} %{FILELINKTOS:shescape}\n]' "$package" |
        awk -v count="$to/count" '$1 != "(none)" { if (++n <= 10000) print substr($0, 1, 10000) } END { print n + 0 > count }' \
            >"$to/files"
done
