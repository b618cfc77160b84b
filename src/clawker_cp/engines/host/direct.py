"""
What each agent may begin: its own listeners of the proxy, and destinations without the proxy, as sets of the ring.

A change is one transaction; what is admitted for a time ends by the kernel's clock, whether we live or not.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clawker_cp.engines.host.commands import run
from clawker_cp.errors import InvalidInput

PROTOCOLS = {6: "tcp", 17: "udp"}


@dataclass(frozen=True, slots=True)
class Direct:
    """Destinations an agent may reach without the proxy."""

    network: str
    l4: int
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Admitted:
    """What one agent may begin: without the proxy, and at the proxy by protocol and port."""

    direct: tuple[Direct, ...] = ()
    listeners: frozenset[tuple[int, int]] = frozenset()


_Held = dict[tuple[str, str], dict[str, list[str]]]  # table and set -> agent -> elements as nft takes them


class DirectPaths:
    """
    The sets `direct`, `listeners`, `everywhere` and `reserved` of the ring in `table`, which its own rules look up.

    `listeners` is in each of the `families`. A frame that root makes itself passes no socket hook, so that what
    keeps it from another policy's listener, or a service of the host among their ports, is this set alone.
    """

    def __init__(self, table: str, families: Sequence[str] = ("inet",)) -> None:
        self._table = table
        self._listening = tuple(f"{family} {table}" for family in families)
        self._where: tuple[str, ...] = ()  # what goes before every command: a namespace to enter
        self._admitted: dict[str, Admitted] = {}
        self._held: _Held | None = None
        self._lock = asyncio.Lock()

    async def admit(self, address: str, direct: Sequence[Direct], listeners: Iterable[tuple[int, int]] = ()) -> None:
        """
        Let an agent begin exactly this: these destinations directly, these listeners (protocol, port) of the proxy.

        Connections that were begun at another listener go on. IPv6 destinations are left out: not routed (R7).
        """
        await self.admit_each({address: Admitted(tuple(direct), frozenset(listeners))})

    async def admit_each(self, wanted: Mapping[str, Admitted]) -> None:
        """
        As `admit`, for several agents in one transaction.
        """
        async with self._lock:
            changed = {address: _routed(one) for address, one in wanted.items()}
            changed = {address: one for address, one in changed.items() if self._admitted.get(address) != one}
            if not changed:
                return
            text, held = "", await self._present()
            come = {
                (table, name): {
                    address: [f"{address} . {item}" for item in _parts(one, name)] for address, one in changed.items()
                }
                for table, name in held
            }
            for (table, name), elements in come.items():
                text += _said(
                    "delete", table, name, (item for one in changed for item in held[table, name].get(one, ()))
                )
                text += _said("add", table, name, (item for items in elements.values() for item in items))
            if text:
                await self._nft(text)
            for place, elements in come.items():
                held[place] |= elements
            self._admitted |= changed

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
        await self._change(self._end(address))

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
            await self._nft(text + "\n")

    async def _nft(self, text: str) -> None:
        try:
            await run(*self._where, "nft", "-f", "-", text=text)
        except BaseException:
            # Whether it was applied is not known: what it may have opened must not pass for what was there before.
            self._forget_all()
            raise

    async def _elements(self, name: str, table: str = "") -> list[Any]:
        where = (table or self._inet).split()
        listed = json.loads(await run(*self._where, "nft", "-j", "list", "set", *where, name))
        return [element for item in listed["nftables"] if "set" in item for element in item["set"].get("elem", ())]

    async def _present(self) -> _Held:
        """What `listeners` and `direct` hold, by agent: read once, then known from what was changed since."""
        if self._held is None:
            held: _Held = {}
            for table, name in (*((table, "listeners") for table in self._listening), (self._inet, "direct")):
                found = held[table, name] = {}
                for item in await self._elements(name, table):
                    found.setdefault(source_of(item), []).append(text_of(item))
            self._held = held
        return self._held

    async def _withdrawn(self, addresses: Iterable[str]) -> str:
        """
        The text that closes everything that agents were admitted to by `admit`, whoever admitted it; say `_forget`
        once it is applied.
        """
        gone = sorted(frozenset(addresses))
        held = await self._present()
        return "".join(
            _said("delete", table, name, (item for address in gone for item in elements.get(address, ())))
            for (table, name), elements in held.items()
        )

    def _end(self, address: str) -> str:
        # Adding first: an element whose time ended meanwhile is fine.
        where = f"element {self._inet} everywhere {{ {address} }}"
        return f"add {where}\ndelete {where}\n"

    def _forget(self, addresses: Iterable[str]) -> None:
        """Nothing is admitted for these any more."""
        for address in addresses:
            self._admitted.pop(address, None)
            for elements in (self._held or {}).values():
                elements.pop(address, None)

    def _forget_all(self) -> None:
        """What is admitted is not known any more."""
        self._admitted.clear()
        self._held = None


def _said(verb: str, table: str, name: str, elements: Iterable[str]) -> str:
    items = ", ".join(elements)
    return f"{verb} element {table} {name} {{ {items} }}\n" if items else ""


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


def _routed(admitted: Admitted) -> Admitted:
    four = (item for item in admitted.direct if ipaddress.ip_network(item.network).version == 4)
    return Admitted(tuple(dict.fromkeys(four)), admitted.listeners)


def _parts(admitted: Admitted, name: str) -> list[str]:
    """What goes behind the agent's address in one of the sets."""
    if name == "direct":
        return [f"{item.network} . {_ports(item.l4, item.low, item.high)}" for item in disjoint(admitted.direct)]
    spans = ((l4, span) for l4 in PROTOCOLS for span in _union((p, p) for kind, p in admitted.listeners if kind == l4))
    return [_ports(l4, low, high) for l4, (low, high) in spans]


def _ports(l4: int, low: int, high: int) -> str:
    return f"{PROTOCOLS[l4]} . {low}" + (f"-{high}" if high != low else "")


def bare(element: Any) -> Any:
    """
    An element as nft lists it, without what it wraps one with a timeout in.
    """
    return element["elem"]["val"] if isinstance(element, Mapping) and "elem" in element else element


def source_of(element: Any) -> str:
    """
    The agent of an element: the first part of its key.
    """
    value = bare(element)
    return str(value["concat"][0]) if isinstance(value, Mapping) and "concat" in value else str(value)


def text_of(element: Any) -> str:
    """
    The key as nft takes it.
    """
    value = bare(element)
    if isinstance(value, Mapping):
        if "concat" in value:
            return " . ".join(text_of(part) for part in value["concat"])
        if "prefix" in value:
            return f"{value['prefix']['addr']}/{value['prefix']['len']}"
        if "range" in value:
            return f"{value['range'][0]}-{value['range'][1]}"
    return str(value)
