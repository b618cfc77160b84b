"""
Bridge, network namespaces and veth pairs, through iproute2.

Everything of a sandbox carries its id in its name, so that what a killed run left behind is found
and swept. Works in whatever network namespace this process is in.
"""

from __future__ import annotations

import ipaddress
import json
import zlib
from collections.abc import Iterable

from clawker_cp.engines.host.commands import run
from clawker_cp.errors import CapacityExceeded, Conflict, Unavailable

ALIAS = "clawker agents bridge"


def gateway_of(subnet: str) -> str:
    """
    The first host address of a subnet: the bridge's own.
    """
    return str(next(ipaddress.ip_network(subnet).hosts()))


def free_address(subnet: str, taken: Iterable[str]) -> str:
    """
    The lowest address of the subnet that nobody has; the gateway never.
    """
    used = {gateway_of(subnet), *taken}
    for address in ipaddress.ip_network(subnet).hosts():
        if str(address) not in used:
            return str(address)
    raise CapacityExceeded(f"{subnet} has no free address", limit="agents", hint="widen host.subnet")


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


async def ensure_bridge(bridge: str, subnet: str) -> None:
    """
    Make the agents' bridge with the gateway address, or take over our own.

    Raises `Conflict` when the name belongs to somebody else or the subnet is in use.
    """
    links = json.loads(await run("ip", "-j", "-d", "link", "show") or "[]")
    known = next((link for link in links if link["ifname"] == bridge), None)
    if known is not None:
        if known.get("linkinfo", {}).get("info_kind") != "bridge" or known.get("ifalias") != ALIAS:
            raise Conflict(
                f"host.bridge: {bridge} exists and is not ours",
                hint="set host.bridge in control-plane.yaml to a free name, or remove the interface",
            )
    else:
        network = ipaddress.ip_network(subnet)
        for address in await host_addresses():
            if ipaddress.ip_address(address) in network:
                raise Conflict(
                    f"host.subnet: {subnet} holds {address} of this host", hint="choose another host.subnet"
                )
        await run("ip", "link", "add", bridge, "type", "bridge", "forward_delay", "0")
        await run("ip", "link", "set", bridge, "alias", ALIAS)
    length = ipaddress.ip_network(subnet).prefixlen
    await run("ip", "addr", "replace", f"{gateway_of(subnet)}/{length}", "dev", bridge)
    await run("ip", "link", "set", bridge, "up")


async def remove_bridge(bridge: str) -> None:
    await run("ip", "link", "del", bridge, check=False)


async def host_addresses() -> list[str]:
    """
    Every address of this host's interfaces.
    """
    links = json.loads(await run("ip", "-j", "addr", "show") or "[]")
    return [info["local"] for link in links for info in link.get("addr_info", ()) if "local" in info]


async def add_sandbox(name: str, interface: str, bridge: str, address: str, subnet: str) -> None:
    """
    Make a network namespace joined to the bridge; nothing of it remains if that fails.
    """
    length = ipaddress.ip_network(subnet).prefixlen
    gateway = gateway_of(subnet)
    mac = mac_of(address)
    try:
        await run("ip", "netns", "add", name)
        await run("ip", "link", "add", interface, "type", "veth", "peer", "name", "eth0", "address", mac, "netns", name)
        await run("ip", "link", "set", interface, "master", bridge, "up")
        # Sandboxes never see each other's frames, whatever they send (threats.md, layer B).
        await run("bridge", "link", "set", "dev", interface, "isolated", "on", "learning", "on")
        batch = [
            f"addr add {address}/{length} dev eth0",
            "link set lo up",
            "link set eth0 up",
            f"route add default via {gateway}",
        ]
        await run("ip", "-n", name, "-batch", "-", text="\n".join(batch) + "\n")
        settings = {
            "net.ipv6.conf.all.disable_ipv6": "1",
            "net.ipv6.conf.default.disable_ipv6": "1",
            "net.ipv4.ping_group_range": "1 0",
            "net.mptcp.enabled": "0",
            "net.ipv4.ip_unprivileged_port_start": "0",
        }
        for key, value in settings.items():
            await run("ip", "netns", "exec", name, "sysctl", "-qw", f"{key}={value}", check=False)
    except BaseException:
        await remove_sandbox(name, interface)
        raise


async def remove_sandbox(name: str, interface: str) -> None:
    """
    Take a namespace and its veth away; what is gone already is fine.
    """
    await run("ip", "netns", "del", name, check=False)
    await run("ip", "link", "del", interface, check=False)


async def leftovers(prefix: str, bridge: str) -> tuple[list[str], list[str]]:
    """
    Names of our network namespaces and host-side interfaces that exist now.
    """
    namespaces = [line.split()[0] for line in (await run("ip", "netns", "list")).splitlines() if line]
    try:
        links = json.loads(await run("ip", "-j", "link", "show", "type", "veth") or "[]")
    except Unavailable:
        links = []
    return (
        [name for name in namespaces if name.startswith(f"{prefix}-")],
        [link["ifname"] for link in links if link["ifname"].startswith(interface_prefix(bridge))],
    )
