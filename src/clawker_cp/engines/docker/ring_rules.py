"""
The nftables rules of the ring around Docker's bridge, as text; `ring.DockerRing` applies them.

Bridge family: who may send what to which port. Inet and ARP family: what comes out of the bridge. There a
packet has lost its port, so a frame that a pin passed carries a mark from the port to the first hook behind
the bridge, which takes it off again: no rule of the host ever sees it, and the kernel clears marks where a
frame leaves a container, so that none can be brought along.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from clawker_cp.engines.base import AgentNetwork
from clawker_cp.engines.host.ring import LISTENERS, LISTENS, NO_START, NOT_TOO_MANY, PROXY_TCP, SERVED_EACH

AGENT_DAEMON_PORT = 7700
CP_TCP = "4444, 7080, 7444"
PROXY_UDP = "10000, 11001-11999, 12000-13001, 23000-31999"
PASSED = "0x636b7701"  # the mark of a frame that a pin passed
FLOW_TIMEOUT = "1h"  # a connection that we began and that was silent for so long
FLOWS_LIMIT = 65536


class Pin(NamedTuple):
    """The host's side of a container's veth, its address on the agents' network and its MAC."""

    interface: str
    address: str
    mac: str


class Rules:
    """
    Text of transactions for one bridge; decides nothing about who is pinned.
    """

    def __init__(
        self, table: str, network: AgentNetwork, inbound: str, group: int, extra: Sequence[tuple[str, int]]
    ) -> None:
        self._network = network
        self._inbound = inbound
        self._group = group
        self._extra = tuple(extra)
        self.frames, self.inet, self.arp = (f"{family} {table}" for family in ("bridge", "inet", "arp"))
        self.tables = (self.inet, self.frames, self.arp)

    def give(self, pin: Pin, infrastructure: bool) -> str:
        """
        Pin a port.
        """
        return "".join(f"add element {element}\n" for element in self._elements(pin, infrastructure)) + self._both(
            f"{self.frames} closed {{ {_name(pin.interface)} }}"
        )

    def take(self, pin: Pin, infrastructure: bool, *, keep_mac: bool) -> str:
        """
        Take a pin back, also one that is gone.
        """
        elements = self._elements(pin, infrastructure)[: -1 if keep_mac else None]
        return "".join(self._both(element) for element in elements)

    def close(self, interfaces: Collection[str]) -> str:
        """
        Let nothing in or out of these ports.
        """
        names = ", ".join(_name(interface) for interface in sorted(interfaces))
        return f"add element {self.frames} closed {{ {names} }}\n" if names else ""

    def flush_closed(self) -> str:
        """
        Forget the ports that were closed by name.
        """
        return f"flush set {self.frames} closed\n"

    def _elements(self, pin: Pin, infrastructure: bool) -> list[str]:
        kind, name = "infrastructure" if infrastructure else "agent", _name(pin.interface)
        return [
            f"{self.frames} {kind}_pins {{ {name} . {pin.mac} . {pin.address} }}",
            f"{self.frames} {kind}_ports {{ {name} }}",
            f"{self.inet} {kind}_addresses {{ {pin.address} }}",
            f"{self.inet} ports {{ {name} }}",
            f"{self.frames} macs {{ {pin.mac} }}",
        ]

    def _both(self, element: str) -> str:
        # Adding first makes deleting what is not there no error.
        return f"add element {element}\ndelete element {element}\n"

    def script(self) -> str:
        """
        Make or replace every rule, with no port pinned; what agents were admitted to is kept.
        """
        return self._sets() + self._frames_table() + self._inet_table() + self._arp_table()

    def _sets(self) -> str:
        frames, inet, arp = self.frames, self.inet, self.arp
        pins = "type ifname . ether_addr . ipv4_addr;"
        noise = "flags dynamic,timeout; timeout 1m; size 8192;"
        flows = f"flags dynamic,timeout; timeout {FLOW_TIMEOUT}; size {FLOWS_LIMIT};"
        sets = {
            f"{frames} agent_pins": pins,
            f"{frames} infrastructure_pins": pins,
            f"{frames} agent_ports": "type ifname;",
            f"{frames} infrastructure_ports": "type ifname;",
            f"{frames} macs": "type ether_addr;",
            f"{frames} closed": "type ifname;",
            f"{inet} ports": "type ifname;",
            f"{inet} agent_addresses": "type ipv4_addr;",
            f"{inet} infrastructure_addresses": "type ipv4_addr;",
        }
        kept = {
            f"{frames} noise": f"type ifname; {noise}",
            f"{frames} listeners": LISTENERS,
            f"{frames} began": f"type ipv4_addr . inet_service . ipv4_addr . inet_service; {flows}",
            f"{inet} noise": f"type ipv4_addr; {noise}",
            f"{inet} direct": "type ipv4_addr . ipv4_addr . inet_proto . inet_service; flags interval;",
            f"{inet} listeners": LISTENERS,
            f"{inet} served": SERVED_EACH,
            f"{inet} everywhere": "type ipv4_addr; flags timeout;",
            f"{inet} reserved": "type ipv4_addr; flags interval; auto-merge;",
        }
        hooks = {
            f"{frames} from_agent": "",
            f"{frames} from_infrastructure": "",
            f"{frames} to_infrastructure": "",
            f"{frames} to_agent": "",
            f"{frames} stranger": "",
            f"{frames} frames": "{ type filter hook prerouting priority -300; policy accept; }",
            f"{frames} host": "{ type filter hook output priority -300; policy accept; }",
            f"{frames} between": "{ type filter hook forward priority -300; policy accept; }",
            f"{inet} refuse": "",
            f"{inet} stranger": "",
            f"{inet} bridged": "",
            f"{inet} entry": "{ type filter hook prerouting priority -310; policy accept; }",
            f"{inet} input": "{ type filter hook input priority -10; policy accept; }",
            f"{inet} forward": "{ type filter hook forward priority -10; policy accept; }",
            f"{inet} leaving": "{ type filter hook postrouting priority -10; policy accept; }",
            f"{arp} input": "{ type filter hook input priority -10; policy accept; }",
        }
        lines = [f"add table {table}" for table in self.tables]
        lines += [f"add set {name} {{ {kind} }}" for name, kind in {**sets, **kept}.items()]
        lines += [f"add chain {name} {hook}" for name, hook in hooks.items()]
        lines += [f"flush chain {name}" for name in hooks] + [f"flush set {name}" for name in sets]
        return "\n".join(lines) + "\n"

    def _bridged(self) -> list[tuple[str, str, str]]:
        # Exact tuples that agents reach by bridging: protocol, address, ports.
        net = self._network
        wanted = [
            ("tcp", net.dns, "53"),
            ("udp", net.dns, "53"),
            ("tcp", net.cp, CP_TCP),
            ("tcp", net.proxy, PROXY_TCP),
            ("udp", net.proxy, PROXY_UDP),
        ]
        return wanted + [("tcp", address, str(port)) for address, port in self._extra]

    def _lines(self, pattern: str, *, local: bool) -> str:
        # Once for each tuple: those on the gateway are the host's own, all others are bridged.
        gateway, extra = self._network.gateway, {address for address, _port in self._extra}
        return "\n    ".join(
            pattern.format(l4=l4, address=address, ports=ports, no_start=NO_START if l4 == "tcp" else "")
            for l4, address, ports in self._bridged()
            if address in extra or (address == gateway) == local
        )

    def _served(self, *, local: bool) -> str:
        # What agents may begin, and of the proxy's ports only the listeners of their own policy.
        lines = []
        for l4, address, ports in self._bridged():
            here = f"ip daddr {address} {l4} dport {{ {ports} }}"
            if address not in {one for one, _port in self._extra} and (address == self._network.gateway) != local:
                continue
            if ports == PROXY_TCP:
                lines.append(f"{here} {NO_START} accept")
            elif local and l4 == "tcp":
                lines.append(f"{here} {NOT_TOO_MANY}")
            if ports in {PROXY_TCP, PROXY_UDP}:
                lines.append(f"{here} {LISTENS} accept")
            else:
                lines.append(f"{here} accept")
        return "\n    ".join(lines)

    def _frames_table(self) -> str:
        net, subnet = self._network, self._network.subnet
        flow = "ip saddr . tcp sport . ip daddr . tcp dport"
        fragments = "ip frag-off & 0x3fff != 0"
        return f"""
table {self.frames} {{
  chain from_agent {{
    {_pinned("agent_pins")}
    {self._refused("ipv6_unrouted", "ether type ip6")}
    {self._refused("malformed", "ether type { ip, arp }")}
    {self._refused("protocol")}
  }}
  chain from_infrastructure {{
    {_pinned("infrastructure_pins")}
    {self._refused("malformed")}
  }}
  chain stranger {{
    {self._refused("not_enrolled")}
  }}
  chain frames {{
    iifname @agent_ports jump from_agent
    iifname @infrastructure_ports jump from_infrastructure
    iifname @closed jump stranger
    ether saddr @macs jump stranger
    ip saddr {subnet} jump stranger
    ip daddr {subnet} jump stranger
    arp saddr ip {subnet} jump stranger
    arp daddr ip {subnet} jump stranger
  }}
  chain to_infrastructure {{
    ether type arp arp daddr ip {{ {", ".join(sorted(net.served))} }} accept
    meta pkttype {{ broadcast, multicast }} counter drop
    {self._refused("fragment", fragments)}
    {self._served(local=False)}
    ip daddr . tcp dport . ip saddr . tcp sport @began {NO_START} accept
    {self._refused("no_route")}
  }}
  chain to_agent {{
    ether type arp accept
    # The bridge's table may be wrong about a port, the pins are not.
    oifname . ether daddr . ip daddr != @agent_pins counter drop
    {fragments} counter drop
    {self._lines("ip saddr {address} {l4} sport {{ {ports} }} {no_start} accept", local=False)}
    ip saddr {net.cp} tcp dport {AGENT_DAEMON_PORT} update @began {{ {flow} }} accept
    counter drop
  }}
  chain host {{
    oifname @agent_ports ether type ip oifname . ether daddr . ip daddr != @agent_pins counter drop
    oifname @infrastructure_ports ether type ip oifname . ether daddr . ip daddr != @infrastructure_pins counter drop
    oifname != @agent_ports oifname != @infrastructure_ports ether daddr @macs counter drop
  }}
  chain between {{
    iifname @agent_ports oifname @infrastructure_ports jump to_infrastructure
    iifname @infrastructure_ports oifname @infrastructure_ports accept
    iifname @infrastructure_ports oifname @agent_ports jump to_agent
    iifname @agent_ports meta pkttype {{ broadcast, multicast }} counter drop
    iifname @agent_ports ether type arp counter drop
    {self._refused("no_route", "iifname @agent_ports")}
    iifname @infrastructure_ports counter drop
    oifname @agent_ports counter drop
    oifname @infrastructure_ports counter drop
    oifname @closed counter drop
  }}
}}
"""

    def _inet_table(self) -> str:
        bridge, subnet, net = self._network.bridge, self._network.subnet, self._network
        reply = "ct state established ct direction reply"
        published = self._inbound == "published"
        return f"""
table {self.inet} {{
  chain refuse {{
    {self._refused("no_route", by="ip saddr")}
  }}
  chain stranger {{
    {self._refused("not_enrolled", by="ip saddr")}
  }}
  chain entry {{
    iifname @ports counter drop
    iifname != "{bridge}" accept
    meta mark != {PASSED} jump stranger
    meta mark set 0
  }}
  chain input {{
    iifname != "{bridge}" accept
    ip saddr @infrastructure_addresses accept
    ip saddr != @agent_addresses jump refuse
    ip frag-off & 0x3fff != 0 jump refuse
    {self._served(local=True)}
    {reply} accept
    jump refuse
  }}
  chain bridged {{
    ip saddr @infrastructure_addresses ip daddr @infrastructure_addresses accept
    ip saddr @infrastructure_addresses {reply} accept
    ip saddr {net.cp} tcp dport {AGENT_DAEMON_PORT} accept
    ip saddr != @agent_addresses jump refuse
    {self._served(local=False)}
    ip daddr @infrastructure_addresses {reply} accept
    jump refuse
  }}
  chain forward {{
    iifname "{bridge}" oifname "{bridge}" jump bridged
    oifname "{bridge}" ip daddr @infrastructure_addresses accept
    oifname "{bridge}" ct state established,related ct direction reply accept
    {f'oifname "{bridge}" ip daddr @agent_addresses meta l4proto tcp ct status dnat accept' if published else ""}
    oifname "{bridge}" counter drop
    iifname != "{bridge}" accept
    ip saddr @infrastructure_addresses accept
    ip saddr != @agent_addresses jump refuse
    {f"ct status dnat {reply} accept" if published else ""}
    ip daddr {subnet} jump refuse
    ip daddr @reserved jump refuse
    fib daddr type != unicast jump refuse
    ip saddr . ip daddr . ip protocol . th dport @direct accept
    ip saddr @everywhere meta l4proto {{ tcp, udp }} accept
    jump refuse
  }}
  # Not the output hook: a published port that the host dials on its own address leaves by another
  # interface there, the engine changes the destination later.
  chain leaving {{
    oifname != "{bridge}" accept
    ip daddr != @agent_addresses accept
    tcp dport {AGENT_DAEMON_PORT} accept
    {"ct state new counter drop" if self._inbound == "none" else ""}
  }}
}}
"""

    def _arp_table(self) -> str:
        return f"""
table {self.arp} {{
  chain input {{
    iifname "{self._network.bridge}" meta mark != {PASSED} counter drop
  }}
}}
"""

    def _refused(self, reason: str, what: str = "", *, by: str = "iifname") -> str:
        # What is one agent's noise must not hide another's: each has a budget of records of its own.
        return (
            f"{what} update @noise {{ {by} limit rate 20/second burst 40 packets }} "
            f'log prefix "{reason}" group {self._group} snaplen 128\n    {what} counter drop'
        )


def _pinned(pins: str) -> str:
    sender = f"iifname . arp saddr ether . arp saddr ip @{pins} iifname . ether saddr . arp saddr ip @{pins}"
    passed = f"meta mark set {PASSED} accept"
    return (
        f"ether type ip iifname . ether saddr . ip saddr @{pins} {passed}\n"
        f"    ether type arp arp htype 1 arp ptype 0x0800 arp plen 4 {sender} {passed}"
    )


def _name(interface: str) -> str:
    return f'"{interface}"'
