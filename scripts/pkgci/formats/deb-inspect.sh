#!/bin/sh
# In the sandbox: says what debian/ in /in says of the package, as JSON in /out/metadata.json.
# Only dpkg's own parsers run; no network.
# usage: deb-inspect.sh any|all PROFILE,...
set -eu
cd /in
perl -MDpkg::Changelog::Parse -MDpkg::Control::Info -MDpkg::Deps -MJSON::PP -e '
    use strict; use warnings;
    my $entry = changelog_parse() or die "debian/changelog: no entry\n";
    defined $entry->{$_} or die "debian/changelog: its first entry has no $_\n" for qw(Source Version Date Timestamp);
    my ($part, $profiles) = @ARGV;
    my $control = Dpkg::Control::Info->new("debian/control");
    my $source = $control->get_source() or die "debian/control: no source stanza\n";
    $source->{Source} or die "debian/control: no Source field\n";
    $source->{Source} eq $entry->{Source}
        or die "debian/control names the source $source->{Source}, debian/changelog $entry->{Source}\n";
    my @fields = grep { defined $source->{$_} } qw(Build-Depends Build-Depends-Arch Build-Depends-Indep
        Build-Conflicts Build-Conflicts-Arch Build-Conflicts-Indep);
    # what another package of the same queue may offer; apt says later what is wrong with a field
    my @parts = ("Build-Depends", "Build-Depends-Arch", $part eq "all" ? "Build-Depends-Indep" : ());
    my $needed = deps_parse(join(", ", grep { defined } map { $source->{$_} } @parts),
        build_dep => 1, reduce_arch => 1, reduce_restrictions => 1, build_profiles => [split(/,/, $profiles)]);
    my (%needs, %offers);
    deps_iterate($needed, sub { $needs{$_[0]->{package}} = 1 }) if defined $needed;
    foreach my $package ($control->get_packages()) {
        $offers{$_} = 1 foreach grep { !/\$/ } map { /(\S+)/ ? $1 : () } $package->{Package}, split(/,/, $package->{Provides} // "");
    }
    open(my $out, ">", "/out/metadata.json") or die;
    print $out JSON::PP->new->canonical->encode({
        name => "$entry->{Source}", version => "$entry->{Version}", date => int($entry->{Timestamp}),
        depends => [map { my $value = $source->{$_}; $value =~ s/\s+/ /g; "$_: $value" } @fields],
        needs => [sort keys %needs], offers => [sort keys %offers],
    });
' -- "$@"
