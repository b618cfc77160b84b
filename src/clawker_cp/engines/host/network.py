"""
Bridge, network namespaces and veth pairs, through iproute2.

Everything of a sandbox carries its id in its name, so that what a killed run left behind is found
and swept. Addresses and neighbours are fixed on both sides: no ARP is needed and none is believed;
ports are isolated and learn nothing. Works in whatever network namespace this process is in.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clawker_cp.engines.host.commands import run
from clawker_cp.engines.host.namespaces import SANDBOX_SYSCTLS, in_netns, write_sysctls
from clawker_cp.errors import CapacityExceeded, Conflict, Unavailable

ALIAS = "clawker agents bridge"
NETNS_DIR = Path("/run/netns")
MTU = 1500


def gateway_of(subnet: str) -> str:
    """
    The first host address of a subnet: the bridge's own.
    """
    return str(ipaddress.ip_network(subnet).network_address + 1)


class AddressPool:
    """
    Hands out a subnet's addresses, going round, so that a freed one rests as long as possible.
    """

    def __init__(self, subnet: str) -> None:
        network = ipaddress.ip_network(subnet)
        self._subnet = subnet
        self._first = int(network.network_address) + 2
        self._last = int(network.broadcast_address) - 1
        self._next = self._first

    def skip_past(self, address: str) -> None:
        """
        Begin after an address that is in use already.
        """
        self._next = max(self._next, int(ipaddress.IPv4Address(address)) + 1)

    def take(self, taken: Iterable[str]) -> str:
        """
        The next address that nobody has; `CapacityExceeded` when there is none.
        """
        used = set(taken)
        size = self._last - self._first + 1
        for step in range(size):
            number = self._first + (self._next - self._first + step) % size
            address = str(ipaddress.IPv4Address(number))
            if address not in used:
                self._next = number + 1
                return address
        raise CapacityExceeded(f"{self._subnet} has no free address", limit="agents", hint="widen host.subnet")


def mac_of(address: str) -> str:
    """
    The locally administered MAC that belongs to a sandbox's address.
    """
    return "02:ca:" + ":".join(f"{octet:02x}" for octet in ipaddress.IPv4Address(address).packed)


def interface_prefix(bridge: str) -> str:
    """
    How the host-side interfaces of a bridge's sandboxes begin; two bridges never share it.
    """
    return f"ckw{zlib.crc32(bridge.encode()) & 0xFFF:03x}"


def namespace_path(name: str) -> Path:
    """
    The file that keeps a named network namespace.
    """
    return NETNS_DIR / name


async def ensure_bridge(bridge: str, subnet: str) -> None:
    """
    Make the agents' bridge with the gateway address, or take over our own.

    Raises `Conflict` when the name belongs to somebody else or the subnet is in use.
    """
    links = await _links()
    known = next((link for link in links if link["ifname"] == bridge), None)
    gateway, length = gateway_of(subnet), ipaddress.ip_network(subnet).prefixlen
    batch = []
    if known is not None:
        if known.get("linkinfo", {}).get("info_kind") != "bridge" or known.get("ifalias") != ALIAS:
            raise Conflict(
                f"host.bridge: {bridge} exists and is not ours",
                hint="set host.bridge in control-plane.yaml to a free name, or remove the interface",
            )
        batch += [
            f"addr del {info['local']}/{info['prefixlen']} dev {bridge}"
            for info in known.get("addr_info", ())
            if info.get("family") == "inet" and (info["local"], info["prefixlen"]) != (gateway, length)
        ]
    _check_subnet(subnet, [link for link in links if link["ifname"] != bridge])
    if known is None:
        batch += [
            f"link add name {bridge} address {mac_of(gateway)} mtu {MTU} type bridge stp_state 0 forward_delay 0",
            f"link set dev {bridge} alias {ALIAS!r}".replace("'", '"'),
        ]
    batch.append(f"link set dev {bridge} type bridge mcast_snooping 0")
    await _ip(batch)
    await asyncio.to_thread(_bridge_sysctls, bridge)
    await _ip([f"addr replace {gateway}/{length} dev {bridge}", f"link set dev {bridge} up"])


def _check_subnet(subnet: str, others: Iterable[dict[str, Any]]) -> None:
    network = ipaddress.ip_network(subnet)
    for link in others:
        for info in link.get("addr_info", ()):
            if info.get("family") != "inet":
                continue
            there = ipaddress.ip_network(f"{info['local']}/{info['prefixlen']}", strict=False)
            if there.overlaps(network):
                raise Conflict(
                    f"host.subnet: {subnet} overlaps {there} on {link['ifname']}", hint="choose another host.subnet"
                )


def _bridge_sysctls(bridge: str) -> None:
    four, six = f"net/ipv4/conf/{bridge}", f"net/ipv6/conf/{bridge}"
    write_sysctls(
        {
            f"{six}/disable_ipv6": "1",
            f"{six}/accept_ra": "0",
            f"{four}/rp_filter": "1",
            f"{four}/arp_ignore": "2",
            f"{four}/arp_announce": "2",
            f"{four}/accept_redirects": "0",
            f"{four}/send_redirects": "0",
            f"{four}/accept_source_route": "0",
            f"{four}/route_localnet": "0",
            f"{four}/proxy_arp": "0",
        }
    )


async def remove_bridge(bridge: str) -> None:
    """
    Take the bridge away; fine when it is not there.
    """
    await run("ip", "link", "del", bridge, check=False)


async def host_addresses() -> list[str]:
    """
    Every address of this host's interfaces.
    """
    return [info["local"] for link in await _links() for info in link.get("addr_info", ()) if "local" in info]


async def add_sandbox(name: str, interface: str, bridge: str, address: str, subnet: str) -> None:
    """
    Make a network namespace joined to the bridge; nothing of it remains if that fails.
    """
    gateway, mac = gateway_of(subnet), mac_of(address)
    try:
        await run("ip", "netns", "add", name)
        await asyncio.to_thread(in_netns, namespace_path(name), lambda: write_sysctls(SANDBOX_SYSCTLS))
        await _ip(
            [
                f"link add name {interface} mtu {MTU} type veth peer name eth0 address {mac} mtu {MTU} netns {name}",
                f"link set dev {interface} master {bridge}",
                # Sandboxes never see each other's frames, whatever they send (threats.md, layer B).
                f"link set dev {interface} type bridge_slave isolated on "
                "learning off flood off mcast_flood off guard on",
                f"neigh replace {address} lladdr {mac} dev {bridge} nud permanent",
            ]
        )
        await asyncio.to_thread(write_sysctls, {f"net/ipv6/conf/{interface}/disable_ipv6": "1"})
        await run("bridge", "fdb", "replace", mac, "dev", interface, "master", "static")
        await _ip([f"link set dev {interface} up"])
        # A host route only: what is not the gateway itself goes through it, siblings included.
        await _ip(
            [
                "link set lo up",
                f"addr add {address}/32 dev eth0",
                "link set eth0 up",
                f"neigh replace {gateway} lladdr {await _bridge_mac(bridge)} dev eth0 nud permanent",
                f"route add {gateway}/32 dev eth0 scope link src {address}",
                f"route add default via {gateway} dev eth0 src {address}",
            ],
            name,
        )
    except BaseException:
        await asyncio.shield(remove_sandbox(name, interface))
        raise


async def remove_sandbox(name: str, interface: str, neighbour: tuple[str, str] | None = None) -> None:
    """
    Take a namespace, its veth and its fixed `neighbour` (address, bridge) away; what is gone already is fine.
    """
    # One process for all: starting one takes longer than what it does. The neighbour comes last, for `ip` ends at
    # one that is not there whatever -force says.
    batch = [f"link del {interface}"] if interface else []
    batch += [f"netns del {name}"] if name and namespace_path(name).exists() else []
    batch += [f"neigh del {neighbour[0]} dev {neighbour[1]}"] if neighbour else []
    if batch:
        await run("ip", "-force", "-batch", "-", text="\n".join(batch) + "\n", check=False)


async def leftovers(prefix: str, bridge: str) -> tuple[list[str], list[str]]:
    """
    Names of our network namespaces and host-side interfaces that exist now.
    """
    namespaces = _namespaces()
    try:
        links = json.loads(await run("ip", "-j", "link", "show", "type", "veth") or "[]")
    except Unavailable:
        links = []
    return (
        [name for name in namespaces if name.startswith(f"{prefix}-")],
        [link["ifname"] for link in links if link["ifname"].startswith(interface_prefix(bridge))],
    )


def _namespaces() -> list[str]:
    return [path.name for path in NETNS_DIR.iterdir()] if NETNS_DIR.is_dir() else []


async def _links() -> list[dict[str, Any]]:
    links: list[dict[str, Any]] = json.loads(await run("ip", "-j", "-d", "addr", "show") or "[]")
    return [link for link in links if "ifname" in link]


async def _bridge_mac(bridge: str) -> str:
    # A bridge made by an earlier version may have another one than ours.
    return str(json.loads(await run("ip", "-j", "link", "show", "dev", bridge))[0]["address"])


async def _ip(batch: list[str], name: str = "") -> None:
    if batch:
        await run("ip", *(["-n", name] if name else []), "-batch", "-", text="\n".join(batch) + "\n")
