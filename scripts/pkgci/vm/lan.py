"""Networks that machines share: hubs made of QEMU's own parts, joined by Unix sockets, which nobody else can open.

The first machine of a network has the hub, and a socket for each other one. So it has to be started first, and its end
cuts the network; no process and no port of the host is needed for it.
"""

from collections.abc import Mapping, Sequence


def address(network: int, machine: int) -> str:
    """Return the MAC address of an interface: locally administered (IEEE 802, 8.4), the same in each restored set.

    Args:
        network: the network's number in the environment, from 0.
        machine: the machine's, from 0.
    """
    return f"52:54:00:01:{network:02x}:{machine + 1:02x}"


def backends(networks: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the arguments of QEMU that join machines, by the machine's name.

    Args:
        networks: of each machine its networks, one an interface; machines are started in this order, each in a
            directory of its own, and all of these directories are in one.
    """
    hubs: dict[str, tuple[int, str]] = {}
    made: dict[str, list[str]] = {machine: [] for machine in networks}
    for place, (machine, own) in enumerate(networks.items()):
        for number, network in enumerate(own):
            if network not in hubs:
                hubs[network] = len(hubs), machine
                made[machine] += ["-netdev", f"hubport,id=lan{number},hubid={hubs[network][0]}"]
                continue
            hub, first = hubs[network]
            link = f"link{hub}-{place}"
            # hidden: what is not is a machine's directory
            socket = f"addr.type=unix,addr.path=../.{link}"
            made[first] += ["-netdev", f"stream,id={link},server=on,{socket}"]
            made[first] += ["-netdev", f"hubport,id=hub-{link},hubid={hub},netdev={link}"]
            made[machine] += ["-netdev", f"stream,id=lan{number},server=off,{socket}"]
    return made
