#!/bin/sh
# In the sandbox: says what debian/ in /in says of the package, as JSON in /out/metadata.json.
# Only dpkg's own parsers run; no network.
set -eu
cd /in
perl -MDpkg::Changelog::Parse -MDpkg::Control::Info -MJSON::PP -e '
    use strict; use warnings;
    my $entry = changelog_parse() or die "debian/changelog: no entry\n";
    defined $entry->{$_} or die "debian/changelog: its first entry has no $_\n" for qw(Source Version Date Timestamp);
    my $source = Dpkg::Control::Info->new("debian/control")->get_source() or die "debian/control: no source stanza\n";
    $source->{Source} or die "debian/control: no Source field\n";
    $source->{Source} eq $entry->{Source}
        or die "debian/control names the source $source->{Source}, debian/changelog $entry->{Source}\n";
    my @fields = grep { defined $source->{$_} } qw(Build-Depends Build-Depends-Arch Build-Depends-Indep
        Build-Conflicts Build-Conflicts-Arch Build-Conflicts-Indep);
    open(my $out, ">", "/out/metadata.json") or die;
    print $out JSON::PP->new->canonical->encode({
        name => "$entry->{Source}", version => "$entry->{Version}", date => int($entry->{Timestamp}),
        depends => [map { my $value = $source->{$_}; $value =~ s/\s+/ /g; "$_: $value" } @fields],
    });
'
