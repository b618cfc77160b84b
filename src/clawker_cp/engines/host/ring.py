"""
The host ring: nftables rules around the agents' bridge that deny by default (threats.md, layer B).

Bridge family: source MAC, address and ARP sender pinned per veth, every other EtherType dropped.
Inet family: from the bridge only the gate, the proxy bands and the agent-side ports; nothing is
forwarded but what an address rule, a bypass or learning admits, with the kernel keeping the time.
Neither relies on the socket hooks.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from clawker_cp.engines.host.commands import run
from clawker_cp.engines.host.network import interface_prefix, mac_of
from clawker_cp.errors import ClawkerError

log = structlog.get_logger()

TCP_PORTS = "53, 4444, 7080, 7444, 10000-10999, 12000-22999"
UDP_PORTS = "53, 10000, 11001-12999, 23000-31999"
PROTOCOLS = {6: "tcp", 17: "udp"}


@dataclass(frozen=True, slots=True)
class Direct:
    """Destinations an agent may reach without the proxy."""

    network: str
    l4: int
    low: int
    high: int


class HostRing:
    """
    Owns two nftables tables named after the bridge. Each change is one transaction.
    """

    def __init__(self, bridge: str, subnet: str, gateway: str) -> None:
        self._bridge = bridge
        self._subnet = subnet
        self._gateway = gateway
        self._table = f"clawker_{bridge}"
        self._direct: dict[str, tuple[Direct, ...]] = {}
        self._lock = asyncio.Lock()

    async def install(self, sandboxes: Sequence[tuple[str, str]]) -> None:
        """
        Replace both tables atomically; `sandboxes` are (interface, address) that live already.
        """
        async with self._lock:
            await run("nft", "-f", "-", text=self._rules(sandboxes))
        for path, value in (("/proc/sys/net/ipv4/ip_forward", "1"),):
            if Path(path).read_text().strip() != value:
                Path(path).write_text(value)

    async def remove(self) -> None:
        """
        Take both tables away; fine when they are not there.
        """
        for family in ("bridge", "inet"):
            await run("nft", "delete", "table", family, self._table, check=False)

    async def pin(self, interface: str, address: str) -> None:
        """
        Let a sandbox's veth send with its own MAC and address, and nothing else.
        """
        element = f"{{ {interface} . {mac_of(address)} . {address} }}"
        await self._change(f"add element bridge {self._table} pins {element}")

    async def unpin(self, interface: str, address: str) -> None:
        """
        Take back everything a sandbox was given.
        """
        self._direct.pop(address, None)
        element = f"{{ {interface} . {mac_of(address)} . {address} }}"
        for command in (
            f"delete element bridge {self._table} pins {element}",
            f"delete element inet {self._table} everywhere {{ {address} }}",
        ):
            try:
                await self._change(command)
            except ClawkerError as error:
                log.debug("engines_ring_unpin", error=str(error))
        await self._write_direct()

    async def admit(self, address: str, direct: Sequence[Direct]) -> None:
        """
        Let an agent reach exactly these destinations directly; earlier ones are closed.
        """
        if self._direct.get(address, ()) == tuple(direct):
            return
        self._direct[address] = tuple(direct)
        await self._write_direct()

    async def admit_all(self, address: str, seconds: int | None) -> None:
        """
        Let an agent reach everything directly, for `seconds` by the kernel's clock (None: until unpinned).
        """
        timeout = f" timeout {seconds}s" if seconds is not None else ""
        table = f"inet {self._table} everywhere"
        await self._change(
            f"add element {table} {{ {address} }}\n"
            f"delete element {table} {{ {address} }}\n"
            f"add element {table} {{ {address}{timeout} }}"
        )

    async def _write_direct(self) -> None:
        rows = sorted(
            {
                (address, item)
                for address, items in self._direct.items()
                for item in items
                if ipaddress.ip_network(item.network).version == 4
            },
            key=repr,
        )
        rules = [f"flush chain inet {self._table} direct"]
        rules += [
            f"add rule inet {self._table} direct ip saddr {address} ip daddr {item.network} "
            f"{PROTOCOLS[item.l4]} dport {item.low}-{item.high} accept"
            for address, item in rows
        ]
        await self._change("\n".join(rules))

    async def _change(self, text: str) -> None:
        async with self._lock:
            await run("nft", "-f", "-", text=text + "\n")

    def _rules(self, sandboxes: Sequence[tuple[str, str]]) -> str:
        pins = ", ".join(f"{interface} . {mac_of(address)} . {address}" for interface, address in sandboxes)
        elements = f"elements = {{ {pins} }}" if pins else ""
        name, bridge, gateway = self._table, self._bridge, self._gateway
        agents = f'iifname "{interface_prefix(bridge)}*"'
        return f"""
table bridge {name}
delete table bridge {name}
table bridge {name} {{
  set pins {{ type ifname . ether_addr . ipv4_addr; {elements} }}
  chain from_agents {{
    type filter hook prerouting priority -300; policy accept;
    {agents} ether type ip iifname . ether saddr . ip saddr @pins accept
    {agents} ether type arp arp htype 1 arp ptype 0x0800 arp plen 4 iifname . arp saddr ether . arp saddr ip @pins accept
    {agents} counter drop
  }}
}}
table inet {name}
delete table inet {name}
table inet {name} {{
  set everywhere {{ type ipv4_addr; flags timeout; }}
  chain direct {{ }}
  chain input {{
    type filter hook input priority -10; policy accept;
    iifname != "{bridge}" accept
    ct state established,related accept
    ip saddr {self._subnet} ip daddr {gateway} tcp dport {{ {TCP_PORTS} }} accept
    ip saddr {self._subnet} ip daddr {gateway} udp dport {{ {UDP_PORTS} }} accept
    counter drop
  }}
  chain forward {{
    type filter hook forward priority -10; policy accept;
    iifname "{bridge}" oifname "{bridge}" drop
    iifname "{bridge}" ct state established,related accept
    iifname "{bridge}" ip saddr @everywhere accept
    iifname "{bridge}" jump direct
    iifname "{bridge}" counter drop
    oifname "{bridge}" ct state established,related accept
    oifname "{bridge}" counter drop
  }}
  chain source {{
    type nat hook postrouting priority 100; policy accept;
    ip saddr {self._subnet} oifname != "{bridge}" masquerade
  }}
}}
"""
