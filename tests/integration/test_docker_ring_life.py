"""The ring around a bridge over time: rules that are replaced, pins that move, ports and bridges that come and go."""

from __future__ import annotations

import pytest

from clawker_cp.engines.base import AgentNetwork
from clawker_cp.engines.docker.ports import PortWatch, find_port
from clawker_cp.engines.docker.ring import DockerRing
from clawker_cp.engines.docker.ring_rules import Pin
from clawker_cp.engines.host.direct import Direct
from clawker_cp.errors import NotFound, Unavailable, Unsupported
from clawker_cp.testing.bridge_world import (
    AS_CONTAINER,
    BRIDGE,
    CP,
    GATEWAY,
    HOST,
    SUBNET,
    WORLD,
    Yard,
    frame,
    hold,
    listening,
    six,
    take,
    udp,
)
from clawker_cp.testing.sandbox_world import tcp_server, until

pytestmark = [pytest.mark.root, pytest.mark.slow]


async def test_replaced_rules_keep_what_living_agents_were_admitted_to(contained: Yard) -> None:
    """A restart keeps the paths of the same ports only: an address that another container has now starts closed."""
    box, other, ours = await contained.agent(5), await contained.agent(6), await contained.ours(202)
    for each in (box, other):
        await contained.ring.admit(each.address, [Direct("198.51.100.0/24", 6, 5432, 5432)])
        await contained.ring.admit_all(each.address, None)
    successor = await contained.known(7)
    again = DockerRing(contained.network, host_pid=contained.host.pid)
    await again.install([box.pin, Pin(successor.interface, other.address, successor.mac)], [ours.pin])

    with tcp_server(WORLD, 5432, contained.world):
        assert box.connect(WORLD, 5432) == HOST
        contained.readdress(successor, other.address)
        assert successor.connect(WORLD, 5432) == "TimeoutError"
        assert other.connect(WORLD, 5432) in {"TimeoutError", "OSError"}


async def test_pin_moves_with_the_address_and_an_old_end_takes_nothing(contained: Yard) -> None:
    """Pinning an address anew closes its old port and paths; unpinning the old port late leaves the new one alone."""
    old, ours = await contained.agent(5), await contained.ours(202)
    await contained.ring.admit_all(old.address, None)
    new = await contained.known(6)
    contained.readdress(new, old.address)
    await contained.ring.admit(old.address, [], [(6, 10000)])
    await contained.ring.pin(new.interface, old.address, mac=new.mac)
    await contained.ring.unpin(old.interface, old.address)

    with tcp_server("0.0.0.0", 10000, ours.netns), tcp_server(WORLD, 80, contained.world):
        assert new.connect(CP, 10000) == "TimeoutError"
        await contained.ring.admit(old.address, [], [(6, 10000)])  # what is the newcomer's own, also when it is equal
        assert new.connect(CP, 10000) == old.address
        assert new.connect(WORLD, 80) == "TimeoutError"
        assert old.connect(CP, 10000) in {"TimeoutError", "OSError"}
        assert contained.ring.owner_of(old.address) == new.interface
        await contained.ring.unpin(new.interface, old.address)
        await contained.ring.unpin(new.interface, old.address)
        assert new.connect(CP, 10000) in {"TimeoutError", "OSError"}


async def test_ring_of_another_shape_is_replaced_without_a_gap(contained: Yard) -> None:
    """Sets that cannot be reshaped are made anew in one transaction, and living ports keep their pins."""
    box, ours = await contained.agent(5), await contained.ours(202)
    contained.sh("nft", "delete", "table", "inet", f"clawker_{BRIDGE}")
    contained.sh("nft", "add", "table", "inet", f"clawker_{BRIDGE}")
    contained.sh("nft", "add", "set", "inet", f"clawker_{BRIDGE}", "everywhere", "{ type ether_addr; }")
    await contained.ring.install([box.pin], [ours.pin])
    with tcp_server("0.0.0.0", 4444, ours.netns):
        assert box.connect(CP, 4444) == box.address


async def test_other_bridges_of_the_host_are_left_alone(contained: Yard) -> None:
    """Containers of another network still meet each other, with tags and strange types as well."""
    contained.sh("ip", "link", "add", "br-other", "type", "bridge", "forward_delay", "0")
    contained.sh("ip", "link", "set", "br-other", "up")
    boxes = [contained.box(30), contained.box(31)]
    for box in boxes:
        found = await find_port(box.pid, BRIDGE, host_pid=contained.host.pid)
        contained.sh("ip", "link", "set", found.interface, "master", "br-other")
        box.sh("ip", "addr", "flush", "dev", "eth0")
    with listening(boxes[0].raw, boxes[1].raw) as (out, inner):
        sent = {
            frame(boxes[0].mac, 0x0800, udp("192.0.2.7", "192.0.2.8"), target=boxes[1].mac),
            frame(boxes[0].mac, 0x88B5, bytes(50), target=boxes[1].mac),
            frame(boxes[0].mac, 0x86DD, six(59), target=boxes[1].mac),
        }
        for octets in sent:
            out.send(octets)
        seen: list[bytes] = []
        until(lambda: sent <= set(take(seen, inner)), "the frames")


async def test_port_of_a_container_is_found_from_the_hosts_side(contained: Yard) -> None:
    """The port is the one on this bridge, also of a container with two networks; a dead or foreign one is not found."""
    name = "veth-a.b_c"
    box = contained.box(5, name=name)
    contained.sh("ip", "link", "add", "br-second", "type", "bridge")
    contained.sh("ip", "link", "add", "second0", "type", "veth", "peer", "name", "eth1", "netns", str(box.pid))
    contained.sh("ip", "link", "set", "second0", "master", "br-second", "up")
    port = await find_port(box.pid, BRIDGE, host_pid=contained.host.pid)
    second = await find_port(box.pid, "br-second", host_pid=contained.host.pid)
    alone = hold("unshare", "--net")
    contained.held.append(alone)

    assert (port.interface, port.mac, second.interface) == (name, box.mac, "second0")
    with pytest.raises(NotFound, match="no port"):
        await find_port(alone.pid, BRIDGE, host_pid=contained.host.pid)
    with pytest.raises(NotFound, match="no port"):
        await find_port(contained.host.pid, BRIDGE, host_pid=contained.host.pid)
    box.process.kill()
    box.process.wait()
    with pytest.raises(NotFound, match="is gone"):
        await find_port(box.pid, BRIDGE, host_pid=contained.host.pid)


async def test_watch_that_ended_says_so(contained: Yard) -> None:
    """Who waits for ports does not wait for ever once nobody listens; a bridge that is not there is not watched."""
    watch = PortWatch(BRIDGE, host_pid=contained.host.pid)
    await watch.open()
    await watch.wait_changed()
    watch.close()
    with pytest.raises(Unavailable, match="not watched"):
        await watch.wait_changed()
    with pytest.raises(NotFound):
        await PortWatch("br-nowhere", host_pid=contained.host.pid).open()


async def test_bridge_that_is_not_there_is_said_with_what_to_do(contained: Yard) -> None:
    """Looking in a namespace without the bridge names the missing setting of the container."""
    network = AgentNetwork(id="n", subnet=SUBNET, gateway=GATEWAY, bridge="br-nowhere", **AS_CONTAINER)
    with pytest.raises(Unsupported, match="br-nowhere is not in the network namespace") as caught:
        await DockerRing(network, host_pid=contained.host.pid).install([])
    assert caught.value.hint is not None
    assert "pid" in caught.value.hint


async def test_remove_takes_every_table(contained: Yard) -> None:
    """After removal nothing of the ring is left, and removing again is fine."""
    await contained.ring.remove()
    await contained.ring.remove()
    assert "clawker_" not in contained.sh("nft", "list", "tables")
