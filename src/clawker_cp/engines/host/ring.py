"""
The host ring: nftables rules around the agents' bridge that deny by default (threats.md, layer B).

Bridge family: source MAC, address and ARP sender pinned per veth, every other EtherType and every
tagged frame dropped. Inet family: from the bridge only the gate, the proxy bands and the agent-side
ports; nothing is forwarded but what an address rule, a bypass or learning admits, with the kernel
keeping the time. It judges by interface and address alone and relies on no other layer.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from clawker_cp.engines.host.commands import run
from clawker_cp.engines.host.network import interface_prefix, mac_of
from clawker_cp.errors import InvalidInput, Unavailable

log = structlog.get_logger()

TCP_PORTS = "53, 4444, 7080, 7444, 10000-10999, 12000-22999"
UDP_PORTS = "53, 10000, 11001-11999, 12000-13001, 23000-31999"
PROTOCOLS = {6: "tcp", 17: "udp"}
IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
DEFAULT_GROUP = 18374  # NFLOG group of our drops


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

    The tables and what they admit survive us; `install` replaces the rules without a gap and keeps
    the elements of agents that live.
    """

    def __init__(
        self,
        bridge: str,
        subnet: str,
        gateway: str,
        *,
        group: int = DEFAULT_GROUP,
        extra_tuples: Sequence[tuple[str, int]] = (),
    ) -> None:
        self._bridge = bridge
        self._subnet = subnet
        self._gateway = gateway
        self._group = group
        self._extra = tuple(extra_tuples)
        self._table = f"clawker_{bridge}"
        self._direct: dict[str, tuple[Direct, ...]] = {}
        self._lock = asyncio.Lock()

    @property
    def group(self) -> int:
        """The NFLOG group that drops are reported to."""
        return self._group

    async def install(self, sandboxes: Sequence[tuple[str, str]], *, forwarded_before: bool | None = None) -> None:
        """
        Replace the rules atomically; `sandboxes` are (interface, address) that live already.

        A host that did not forward before (`forwarded_before`, None = as it is now) goes on not
        forwarding for anybody but agents.
        """
        if forwarded_before is None:
            forwarded_before = forwarding()
        script = self._rules(sandboxes, forwarded_before=forwarded_before)
        fresh = "".join(f"add table {table}\ndelete table {table}\n" for table in (self._inet, self._frames))
        async with self._lock:
            try:
                await run("nft", "-f", "-", text=script)
            except Unavailable as error:
                # Sets of another version cannot be reshaped in place. Deleting and making is one
                # transaction: there is no moment without a ring.
                log.warning("engines_ring_remade", error=str(error))
                await run("nft", "-f", "-", text=fresh + script)
                self._direct.clear()
            living = {address for _interface, address in sandboxes}
            for name in ("direct", "everywhere"):
                gone = [item for item in await self._elements(name) if _source(item) not in living]
                if gone:
                    await run("nft", "-f", "-", text=self._delete(name, gone))
        if not forwarding():
            set_forwarding(on=True)

    def script(self, sandboxes: Sequence[tuple[str, str]]) -> str:
        """
        The transaction that `install` applies, for a check without applying it.
        """
        return self._rules(sandboxes, forwarded_before=True)

    async def remove(self) -> None:
        """
        Take both tables away; fine when they are not there.
        """
        for table in (self._inet, self._frames):
            await run("nft", "delete", "table", *table.split(), check=False)

    async def pin(self, interface: str, address: str) -> None:
        """
        Let a sandbox's veth send with its own MAC and address, and nothing else.
        """
        await self._change(f"add element {self._frames} pins {{ {_pin(interface, address)} }}")

    async def unpin(self, interface: str, address: str) -> None:
        """
        Take back everything a sandbox was given; what is gone already is fine.
        """
        self._direct.pop(address, None)
        pin = f"element {self._frames} pins {{ {_pin(interface, address)} }}"
        async with self._lock:
            text = f"add {pin}\ndelete {pin}\n"
            for name in ("direct", "everywhere"):
                text += self._delete(name, [item for item in await self._elements(name) if _source(item) == address])
            await run("nft", "-f", "-", text=text)

    async def admit(self, address: str, direct: Sequence[Direct]) -> None:
        """
        Let an agent reach exactly these destinations directly; earlier ones are closed.

        IPv6 destinations are left out: they are not routed (R7).
        """
        wanted = tuple(dict.fromkeys(item for item in direct if ipaddress.ip_network(item.network).version == 4))
        if self._direct.get(address) == wanted:
            return
        async with self._lock:
            old = [item for item in await self._elements("direct") if _source(item) == address]
            text = self._delete("direct", old)
            elements = [_admitted(address, item) for item in disjoint(wanted)]
            if elements:
                text += f"add element {self._inet} direct {{ {', '.join(elements)} }}\n"
            if text:
                await run("nft", "-f", "-", text=text)
            self._direct[address] = wanted

    async def admit_all(self, address: str, seconds: float | None) -> None:
        """
        Let an agent reach everything directly, for `seconds` by the kernel's clock (None: until unpinned).

        Reserved destinations, the host and other agents stay closed (R12).
        """
        timeout = f" timeout {max(1, round(seconds * 1000))}ms" if seconds is not None else ""
        table = f"{self._inet} everywhere"
        await self._change(
            f"add element {table} {{ {address} }}\n"
            f"delete element {table} {{ {address} }}\n"
            f"add element {table} {{ {address}{timeout} }}"
        )

    async def end_all(self, address: str) -> None:
        """
        End `admit_all` before its time; not admitted is fine.
        """
        table = f"{self._inet} everywhere"
        await self._change(f"add element {table} {{ {address} }}\ndelete element {table} {{ {address} }}")

    async def reserve(self, networks: Iterable[str]) -> None:
        """
        Replace the destinations that nothing admits, whatever a rule says (R12).
        """
        four = [network for network in networks if ipaddress.ip_network(network).version == 4]
        text = f"flush set {self._inet} reserved"
        if four:
            text += f"\nadd element {self._inet} reserved {{ {', '.join(four)} }}"
        await self._change(text)

    @property
    def _inet(self) -> str:
        return f"inet {self._table}"

    @property
    def _frames(self) -> str:
        return f"bridge {self._table}"

    async def _change(self, text: str) -> None:
        async with self._lock:
            await run("nft", "-f", "-", text=text + "\n")

    async def _elements(self, name: str) -> list[Any]:
        listed = json.loads(await run("nft", "-j", "list", "set", *self._inet.split(), name))
        return [element for item in listed["nftables"] if "set" in item for element in item["set"].get("elem", ())]

    def _delete(self, name: str, elements: Sequence[Any]) -> str:
        if not elements:
            return ""
        return f"delete element {self._inet} {name} {{ {', '.join(_text(item) for item in elements)} }}\n"

    def _refused(self, reason: str, what: str = "") -> str:
        # What is one agent's noise must not hide another's: the budget of records is per interface.
        return (
            f"{what} update @noise {{ iifname limit rate 20/second burst 40 packets }} "
            f'log prefix "{reason}" group {self._group} snaplen 128\n    {what} counter drop'
        )

    def _rules(self, sandboxes: Sequence[tuple[str, str]], *, forwarded_before: bool) -> str:
        frames, inet, bridge, gateway, subnet = self._frames, self._inet, self._bridge, self._gateway, self._subnet
        agents = f'iifname "{interface_prefix(bridge)}*"'
        pins = ", ".join(_pin(interface, address) for interface, address in sandboxes)
        extra = "\n    ".join(f"ip daddr {address} tcp dport {port} accept" for address, port in self._extra)
        sender = "iifname . arp saddr ether . arp saddr ip @pins iifname . ether saddr . arp saddr ip @pins"
        others = "" if forwarded_before else f'iifname != "{bridge}" oifname != "{bridge}" drop'
        chains = {frames: ("frames", "between", "agent"), inet: ("refuse", "input", "forward", "source")}
        return f"""
add table {frames}
add table {inet}
add set {frames} pins {{ type ifname . ether_addr . ipv4_addr; }}
add set {frames} noise {{ type ifname; flags dynamic,timeout; timeout 1m; size 8192; }}
add set {inet} noise {{ type ifname; flags dynamic,timeout; timeout 1m; size 8192; }}
add set {inet} direct {{ type ipv4_addr . ipv4_addr . inet_proto . inet_service; flags interval; }}
add set {inet} everywhere {{ type ipv4_addr; flags timeout; }}
add set {inet} reserved {{ type ipv4_addr; flags interval; auto-merge; }}
add chain {frames} agent
add chain {frames} frames {{ type filter hook prerouting priority -300; policy accept; }}
add chain {frames} between {{ type filter hook forward priority -300; policy accept; }}
add chain {inet} refuse
add chain {inet} input {{ type filter hook input priority -10; policy accept; }}
add chain {inet} forward {{ type filter hook forward priority -10; policy accept; }}
add chain {inet} source {{ type nat hook postrouting priority 100; policy accept; }}
{chr(10).join(f"flush chain {table} {chain}" for table, names in chains.items() for chain in names)}
flush set {frames} pins
{f"add element {frames} pins {{ {pins} }}" if pins else ""}
table {frames} {{
  chain agent {{
    ether type ip iifname . ether saddr . ip saddr @pins accept
    ether type arp arp htype 1 arp ptype 0x0800 arp plen 4 {sender} accept
    {self._refused("ipv6_unrouted", "ether type ip6")}
    {self._refused("malformed", "ether type { ip, arp }")}
    {self._refused("protocol")}
  }}
  chain frames {{
    {agents} jump agent
  }}
  chain between {{
    {agents} counter drop
    {agents.replace("iifname", "oifname")} counter drop
  }}
}}
table {inet} {{
  chain refuse {{
    {self._refused("no_route")}
  }}
  chain input {{
    {agents} iifname != "{bridge}" drop
    iifname != "{bridge}" accept
    ip frag-off & 0x3fff != 0 jump refuse
    ip saddr {subnet} ip daddr {gateway} tcp dport {{ {TCP_PORTS} }} accept
    ip saddr {subnet} ip daddr {gateway} udp dport {{ {UDP_PORTS} }} accept
    {extra}
    ct state established ct direction reply accept
    jump refuse
  }}
  chain forward {{
    {others}
    iifname "{bridge}" oifname "{bridge}" jump refuse
    oifname "{bridge}" ct state established,related ct direction reply accept
    oifname "{bridge}" counter drop
    iifname != "{bridge}" accept
    ip daddr {subnet} jump refuse
    ip daddr @reserved jump refuse
    fib daddr type != unicast jump refuse
    ip saddr . ip daddr . ip protocol . th dport @direct accept
    ip saddr @everywhere meta l4proto {{ tcp, udp }} accept
    jump refuse
  }}
  chain source {{
    ip saddr {subnet} ip daddr != {subnet} oifname != "{bridge}" masquerade
  }}
}}
"""


def forwarding() -> bool:
    """
    Whether this host forwards packets at all.
    """
    return IP_FORWARD.read_text().strip() == "1"


def set_forwarding(*, on: bool) -> None:
    """
    Let this host forward packets, or not.
    """
    IP_FORWARD.write_text("1" if on else "0")


def disjoint(direct: Iterable[Direct]) -> list[Direct]:
    """
    The same destinations without overlaps, which one nft set does not take.
    """
    groups: dict[tuple[Any, int], list[tuple[int, int]]] = {}
    for item in direct:
        if item.l4 not in PROTOCOLS or not 0 <= item.low <= item.high <= 65535:
            raise InvalidInput(f"direct path {item}: is not TCP or UDP with a range of ports")
        groups.setdefault((ipaddress.ip_network(item.network), item.l4), []).append((item.low, item.high))
    result: list[Direct] = []
    # Short prefixes first: a longer one inside adds only the ports that the shorter one lacks.
    for (network, l4), spans in sorted(groups.items(), key=lambda group: (group[0][0].prefixlen, group[0])):
        covered = [
            (other.low, other.high)
            for other in result
            if other.l4 == l4 and network.subnet_of(ipaddress.ip_network(other.network))
        ]
        result += [Direct(str(network), l4, low, high) for low, high in _without(_union(spans), _union(covered))]
    return result


def _union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _without(spans: Iterable[tuple[int, int]], holes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    left = list(spans)
    for low, high in holes:
        pieces = [piece for start, end in left for piece in ((start, min(end, low - 1)), (max(start, high + 1), end))]
        left = [piece for piece in pieces if piece[0] <= piece[1]]
    return left


def _pin(interface: str, address: str) -> str:
    return f'"{interface}" . {mac_of(address)} . {address}'


def _admitted(address: str, item: Direct) -> str:
    ports = str(item.low) if item.low == item.high else f"{item.low}-{item.high}"
    return f"{address} . {item.network} . {PROTOCOLS[item.l4]} . {ports}"


def _bare(element: Any) -> Any:
    # Elements with a timeout are wrapped.
    return element["elem"]["val"] if isinstance(element, Mapping) and "elem" in element else element


def _source(element: Any) -> str:
    bare = _bare(element)
    return str(bare["concat"][0]) if isinstance(bare, Mapping) and "concat" in bare else str(bare)


def _text(element: Any) -> str:
    bare = _bare(element)
    if isinstance(bare, Mapping):
        if "concat" in bare:
            return " . ".join(_text(part) for part in bare["concat"])
        if "prefix" in bare:
            return f"{bare['prefix']['addr']}/{bare['prefix']['len']}"
        if "range" in bare:
            return f"{bare['range'][0]}-{bare['range'][1]}"
    return str(bare)
