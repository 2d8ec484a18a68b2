#!/bin/sh
# In the sandbox, without network: says what the spec /in/SPEC says of the package, as JSON in /out/metadata.json.
# Reading a spec executes its %(...) and %{lua:...}, hence as the unprivileged user.
# usage: rpm-inspect.sh SPEC
set -eu
spec=/in/$1
as_builder() {
    setpriv --reuid=1000 --regid=1000 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all \
        env HOME=/build "$@"
}

# what it says goes to files of root's, in a directory that the spec's commands cannot reach
mkdir -m 700 /said
as_builder rpmspec -q --srpm --undefine dist \
    --qf '%{NAME}\n%|EPOCH?{%{EPOCH}:}|%{VERSION}-%{RELEASE}\n%|CHANGELOGTIME?{%{CHANGELOGTIME}}:{0}|\n' "$spec" >/said/fields
as_builder rpmspec -q --buildrequires "$spec" >/said/requires
as_builder rpmspec -q --provides --undefine dist "$spec" >/said/provides
as_builder sh -c 'kill -KILL -1' || true
sort -u -o /said/requires /said/requires
perl -MJSON::PP -e '
    use strict; use warnings;
    sub lines { open(my $in, "<", $_[0]) or die; chomp(my @lines = <$in>); return @lines; }
    my ($name, $version, $date) = lines("/said/fields");
    my @requires = grep { !/^rpmlib\(/ } lines("/said/requires");
    # the names alone; a rich dependency, (this or that), has several
    my (%needs, %offers);
    foreach (map { /^\(/ ? grep { !/^(and|or|if|else|unless|with|without|[<>=]+)$/ } split : /(\S+)/ } @requires) {
        s/^\(+//;
        s/\)$// while tr/)// > tr/(//;
        $needs{$_} = 1;
    }
    $offers{$_} = 1 foreach map { /(\S+)/ } lines("/said/provides");
    open(my $out, ">", "/out/metadata.json") or die;
    print $out JSON::PP->new->canonical->encode({
        name => $name, version => $version, date => int($date), depends => \@requires,
        needs => [sort keys %needs], offers => [sort keys %offers] });
'
