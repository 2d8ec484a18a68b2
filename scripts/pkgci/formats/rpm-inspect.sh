#!/bin/sh
# In the sandbox, without network: says what the spec /in/SPEC says of the package, as JSON in /out/metadata.json.
# Reading a spec executes its %(...) and %{lua:...}, hence as the unprivileged user.
# usage: rpm-inspect.sh SPEC
set -eu
spec=/in/$1
cat >/tmp/inspect.sh <<'INSPECT'
set -eu
query() { rpmspec -q --srpm --undefine dist --qf "$2" "$1"; }
query "$1" '%{NAME}\n%|EPOCH?{%{EPOCH}:}|%{VERSION}-%{RELEASE}\n%|CHANGELOGTIME?{%{CHANGELOGTIME}}:{0}|\n' >/tmp/fields
rpmspec -q --buildrequires "$1" | sort -u >/tmp/requires
INSPECT
setpriv --reuid=1000 --regid=1000 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all \
    env HOME=/build sh -eu /tmp/inspect.sh "$spec"
perl -MJSON::PP -e '
    use strict; use warnings;
    sub lines { open(my $in, "<", $_[0]) or die; chomp(my @lines = <$in>); return @lines; }
    my ($name, $version, $date) = lines("/tmp/fields");
    my @requires = grep { !/^rpmlib\(/ } lines("/tmp/requires");
    open(my $out, ">", "/out/metadata.json") or die;
    print $out JSON::PP->new->canonical->encode({
        name => $name, version => $version, date => int($date), depends => \@requires });
'
