"""Environments of several machines: made once, deployed, frozen together, restored together, apart from other runs."""

import logging
import shutil
import time
from collections.abc import Iterator

import pytest
import trees

from pkgci.config import Config
from pkgci.errors import InfrastructureError
from pkgci.vm import guest
from pkgci.vm.machine import Machine
from pkgci.vm.proxy import Proxy
from pkgci.vm.snapshot import BASE, Snapshot, keep

TARGET = "bookworm-amd64"
LAB = """
networks:
  admin: {subnet: 192.168.77.0/24}
  data: {subnet: 192.168.78.0/24}
nodes:
  master: {networks: [admin], memory_mib: 256}
  one: {networks: [admin, data], memory_mib: 256}
  two: {networks: [data], memory_mib: 256, disks: [64, 32]}
deploy:
  - {node: master, script: lab/master/deploy.sh}
  - {node: one, script: lab/one.sh}
health:
  - {node: one, script: lab/health/health.sh, seconds: 120}
clock: frozen
scenarios: {any: lab/any.py}
"""
# a connection that each byte of is one second's: it goes on in a restored set
MASTER = """
cp ticks.pl /usr/local/bin/ticks
systemd-run -q --unit=ticks perl /usr/local/bin/ticks
echo deployed
"""
TICKS = """
use IO::Socket::INET;
my $server = IO::Socket::INET->new(LocalPort => 7007, Listen => 5, ReuseAddr => 1) or die $!;
while (my $client = $server->accept) { next if fork; while (1) { print $client "tick\\n"; $client->flush; sleep 1 } }
"""
ONE = """
cat >/usr/local/bin/count <<'X'
use IO::Socket::INET;
my $from;
# on a busy host the other one may not listen yet
sleep 1 until $from = IO::Socket::INET->new(PeerAddr => "master:7007");
open(my $to, ">", "/run/ticks") or die $!; $to->autoflush;
print $to $_ while <$from>;
X
systemd-run -q --unit=count perl /usr/local/bin/count
"""
HEALTH = """
for try in $(seq 60); do
    [ ! -s /run/ticks ] || exit 0
    sleep 1
done
exit 1
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """A configuration with the environment `lab`, and snapshots of its own."""
    place = tmp_path_factory.mktemp("sets")
    made = trees.config(place)
    (made.data / "snapshots").unlink()
    lab = made.directory / "lab"
    (lab / "master").mkdir(parents=True)
    (lab / "health").mkdir()
    (made.directory / "environments").mkdir(exist_ok=True)
    (made.directory / "environments" / "lab.yaml").write_text(LAB)
    for name, text in (
        ("master/deploy.sh", MASTER),
        ("master/ticks.pl", TICKS),
        ("one.sh", ONE),
        ("health/health.sh", HEALTH),
    ):
        (lab / name).write_text(text)
    return made


@pytest.fixture(scope="module")
def snapshot(config: Config) -> Snapshot:
    return guest.environment(config, "lab", TARGET)


@pytest.fixture(scope="module")
def lab(config: Config, snapshot: Snapshot) -> Iterator[dict[str, Machine]]:
    """The machines of a restored set."""
    with snapshot.restored(config, Proxy((), config.cache / "proxy")) as machines:
        yield dict(zip(("master", "one", "two"), machines, strict=True))


def said(machine: Machine, script: str) -> str:
    done = machine.run(f"exec 2>&1\n{script}", timeout=120)
    assert done.status == 0, done.text()
    return done.text()


def test_each_machine_has_its_name_and_reaches_the_others_of_its_networks(lab):
    assert [said(machine, "hostname; cat /etc/hostname") for machine in lab.values()] == [
        f"{name}\n{name}\n" for name in lab
    ]
    addresses = "ip -4 -o address show scope global | awk '{print $2, $4}' | grep -v '^eth0 '"
    assert [said(machine, f"{addresses}").splitlines() for machine in lab.values()] == [
        ["eth1 192.168.77.1/24"],
        ["eth1 192.168.77.2/24", "eth2 192.168.78.1/24"],
        ["eth1 192.168.78.2/24"],
    ]
    ssh = 'exec 3<>"/dev/tcp/$1/22" && head -c 7 <&3'
    for machine, other in (("master", "one"), ("one", "master"), ("one", "two"), ("two", "one")):
        reached = "192.168.78.1" if machine == "two" else other
        assert said(lab[machine], f"timeout 20 bash -c '{ssh}' bash {reached}") == "SSH-2.0"


def test_a_machine_reaches_nothing_of_a_network_that_it_is_not_in(lab):
    done = lab["master"].run("timeout 5 bash -c 'exec 3<>/dev/tcp/192.168.78.2/22'", timeout=60)
    assert done.status != 0


def test_a_connection_between_machines_goes_on_in_the_restored_set(lab):
    before = int(said(lab["one"], "wc -l </run/ticks"))
    assert before > 0
    end = time.monotonic() + 30
    while int(said(lab["one"], "wc -l </run/ticks")) < before + 2:
        assert time.monotonic() < end, "the connection does not go on"
        time.sleep(0.2)
    assert said(lab["one"], "systemctl is-active count") == "active\n"


def test_with_a_frozen_clock_their_time_goes_on_from_that_of_their_freezing_also_when_they_restart_or_were_kept(
    config, snapshot, tmp_path
):
    frozen, begun = snapshot.manifest.created.timestamp(), time.time()
    # the second one is what a restarted machine begins at
    ask = "date +%s.%N; cat /sys/class/rtc/rtc0/since_epoch"
    with snapshot.restored(config, Proxy((), config.cache / "proxy")) as machines:
        times = said(machines[1], ask).split()
        keep(snapshot, machines, tmp_path / "kept")
    kept = Snapshot(tmp_path / "kept" / BASE)
    with kept.restored(config, Proxy((), config.cache / "proxy"), as_kept=True) as (_, one, _):
        times += said(one, ask).split()
    ran = time.time() - begun
    # the set was tried meanwhile
    assert begun - frozen > 3, "the host's time cannot be told from the machines'"
    assert [frozen - 60 < float(one) < frozen + ran + 1 for one in times] == [True] * 4, (times, frozen, ran)


def test_further_disks_are_empty_at_first_and_kept_as_they_were_left(config, snapshot, tmp_path):
    read = "head -c 4 /dev/vdc | tr '\\0' -"
    with snapshot.restored(config, Proxy((), config.cache / "proxy")) as machines:
        two = machines[2]
        assert said(two, "cat /sys/block/vd[b-z]/size").split() == ["131072", "65536"]
        assert said(two, read) == "----"
        said(two, "printf kept >/dev/vdc; sync /dev/vdc")
        keep(snapshot, machines, tmp_path / "kept")
    kept = Snapshot(tmp_path / "kept" / BASE)
    with kept.restored(config, Proxy((), config.cache / "proxy"), as_kept=True) as (_, _, two):
        assert said(two, read) == "kept"


def test_two_runs_of_one_snapshot_know_nothing_of_each_other(config, snapshot, lab):
    with snapshot.restored(config, Proxy((), config.cache / "proxy")) as (master, one, _):
        said(master, "echo theirs >/run/mine")
        assert said(one, "cat /run/mine 2>/dev/null || echo nothing") == "nothing\n"
        # the same addresses in both: each run's machines reach their own
        said(lab["master"], "systemctl stop ticks")
        ask = "timeout 20 bash -c 'exec 3<>/dev/tcp/master/7007 && head -n 1 <&3' || echo nobody"
        assert said(one, ask) == "tick\n"
        assert "nobody" in said(lab["one"], ask)


def test_a_machine_that_restarts_has_its_name_and_addresses_again(lab):
    two = lab["two"]
    boot = said(two, "cat /proc/sys/kernel/random/boot_id")
    two.run("systemctl reboot || true", timeout=60)
    end = time.monotonic() + 240
    while True:
        try:
            two.connect(120)
            if said(two, "cat /proc/sys/kernel/random/boot_id") != boot:
                break
        except InfrastructureError:
            pass
        assert time.monotonic() < end, "it does not come back"
        time.sleep(0.5)
    assert said(two, "hostname") == "two\n"
    ssh = 'exec 3<>"/dev/tcp/$1/22" && head -c 7 <&3'
    assert said(lab["one"], f"timeout 60 bash -c '{ssh}' bash 192.168.78.2") == "SSH-2.0"


def test_what_is_in_each_machine_is_in_the_manifest(snapshot):
    nodes = snapshot.manifest.nodes
    assert [node.name for node in nodes] == ["master", "one", "two"]
    assert all(any(line.startswith("systemd ") for line in node.packages) for node in nodes)


def test_a_set_that_is_not_healthy_leaves_the_former_one_in_use(config, snapshot, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    other = tmp_path / "etc"
    shutil.copytree(config.directory, other)
    (other / "environments" / "lab.yaml").write_text(
        "nodes: {alone: {memory_mib: 256}}\n"
        "health: [{node: alone, script: lab/health/health.sh}]\n"
        "scenarios: {any: lab/any.py}\n"
    )
    (other / "lab" / "health" / "health.sh").write_text("echo it is not well\nexit 1\n")
    with pytest.raises(InfrastructureError, match=r"health\.sh on alone: it is not well"):
        guest.environment(Config(other), "lab", TARGET)
    place = config.data / "snapshots" / f"lab@{TARGET}"
    assert (place / "latest").resolve() == snapshot.directory
    assert not list(place.glob(".new-*"))
    assert not list((config.cache / "runs").glob("*/alone"))
