"""
The host ring: nftables rules around the agents' bridge that deny by default (threats.md, layer B).

Bridge family: source MAC, address and ARP sender pinned per veth, every other EtherType and every
tagged frame dropped. Inet family: from the bridge only the gate, the agent's own listeners of the proxy and
the agent-side ports; nothing is forwarded but what an address rule, a bypass or learning admits, with the
kernel keeping the time. It judges by interface and address alone and relies on no other layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import structlog

from clawker_cp.engines.host.commands import run
from clawker_cp.engines.host.direct import Direct, DirectPaths, disjoint, source_of
from clawker_cp.engines.host.network import interface_prefix, mac_of
from clawker_cp.engines.host.tables import PREFIX
from clawker_cp.errors import Unavailable

__all__ = ["Direct", "HostRing", "disjoint"]

log = structlog.get_logger()

SERVED_TCP = "53, 4444, 7080, 7444"
# Connections that one agent may have to these at once: each listener takes 512 from everybody.
SERVED_EACH = "type ipv4_addr; flags dynamic; size 65535;"
NOT_TOO_MANY = "ct state new add @served { ip saddr ct count over 64 } jump refuse"
# The bands of contract 1.1 without the ports that are never allocated (ruling R4). A connection is begun
# only at a listener of the agent's own policy; one that exists goes on when the policy changes (R13).
PROXY_TCP = "10000-10999, 12000-18373, 18375-18900, 18903-22999"
NO_START = "tcp flags & (syn | ack) != syn"
LISTENERS = "type ipv4_addr . inet_proto . inet_service; flags interval;"
LISTENS = "ip saddr . ip protocol . th dport @listeners"
IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
DEFAULT_GROUP = 18374  # NFLOG group of our drops


class HostRing(DirectPaths):
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
        super().__init__(f"{PREFIX}{bridge}")
        self._bridge = bridge
        self._subnet = subnet
        self._gateway = gateway
        self._group = group
        self._extra = tuple(extra_tuples)
        self._leaving: set[tuple[str, str]] = set()  # what `unpin` was called for and has not done

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
                await self._nft(script)
            except Unavailable as error:
                # Sets of another version cannot be reshaped in place. Deleting and making is one
                # transaction: there is no moment without a ring.
                log.warning("engines_ring_remade", error=str(error))
                await self._nft(fresh + script)
            self._forget_all()
            living = {address for _interface, address in sandboxes}
            held = await self._present()
            listed = {source_of(item) for item in await self._elements("everywhere")}
            if gone := listed.union(*held.values()) - living:
                await self._nft(await self._withdrawn(gone) + "".join(map(self._end, gone)))
                self._forget(gone)
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
            await run(*self._where, "nft", "delete", "table", *table.split(), check=False)

    async def pin(self, interface: str, address: str) -> None:
        """
        Let a sandbox's veth send with its own MAC and address, and nothing else.
        """
        await self._change(f"add element {self._frames} pins {{ {_pin(interface, address)} }}")

    async def unpin(self, interface: str, address: str) -> None:
        """
        Take back everything a sandbox was given; what is gone already is fine.

        Those that wait for the same lock go in one transaction.
        """
        mine = (interface, address)
        self._leaving.add(mine)
        try:
            async with self._lock:
                if mine in self._leaving:
                    await self._take_back(sorted(self._leaving))
        finally:
            self._leaving.discard(mine)  # a failure is each caller's own to repeat

    async def _take_back(self, leaving: Sequence[tuple[str, str]]) -> None:
        addresses = {address for _interface, address in leaving}
        pins = f"element {self._frames} pins {{ {', '.join(_pin(*one) for one in leaving)} }}"
        ended = "".join(self._end(address) for address in sorted(addresses))
        await self._nft(f"add {pins}\ndelete {pins}\n{await self._withdrawn(addresses)}{ended}")
        self._forget(addresses)
        self._leaving.difference_update(leaving)

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
add set {inet} listeners {{ {LISTENERS} }}
add set {inet} served {{ {SERVED_EACH} }}
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
    ip daddr {gateway} tcp dport {{ {SERVED_TCP} }} {NOT_TOO_MANY}
    ip saddr {subnet} ip daddr {gateway} tcp dport {{ {SERVED_TCP} }} accept
    ip saddr {subnet} ip daddr {gateway} udp dport 53 accept
    ip saddr {subnet} ip daddr {gateway} tcp dport {{ {PROXY_TCP} }} {NO_START} accept
    ip daddr {gateway} {LISTENS} accept
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


def _pin(interface: str, address: str) -> str:
    return f'"{interface}" . {mac_of(address)} . {address}'
