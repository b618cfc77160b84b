"""
Destinations that agents reach without the proxy: elements of the ring's sets, the same for every ring.

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


class DirectPaths:
    """
    The sets `direct`, `everywhere` and `reserved` of the ring in `table`; the ring's own rules look them up.
    """

    def __init__(self, table: str) -> None:
        self._table = table
        self._where: tuple[str, ...] = ()  # what goes before every command: a namespace to enter
        self._direct: dict[str, tuple[Direct, ...]] = {}
        self._lock = asyncio.Lock()

    async def admit(self, address: str, direct: Sequence[Direct]) -> None:
        """
        Let an agent reach exactly these destinations directly; earlier ones are closed.

        IPv6 destinations are left out: they are not routed (R7).
        """
        wanted = tuple(dict.fromkeys(item for item in direct if ipaddress.ip_network(item.network).version == 4))
        if self._direct.get(address) == wanted:
            return
        async with self._lock:
            old = [item for item in await self._elements("direct") if source_of(item) == address]
            text = self._delete("direct", old)
            elements = [_admitted(address, item) for item in disjoint(wanted)]
            if elements:
                text += f"add element {self._inet} direct {{ {', '.join(elements)} }}\n"
            if text:
                await self._nft(text)
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
            await self._nft(text + "\n")

    async def _nft(self, text: str) -> None:
        await run(*self._where, "nft", "-f", "-", text=text)

    async def _elements(self, name: str, table: str = "") -> list[Any]:
        where = (table or self._inet).split()
        listed = json.loads(await run(*self._where, "nft", "-j", "list", "set", *where, name))
        return [element for item in listed["nftables"] if "set" in item for element in item["set"].get("elem", ())]

    def _delete(self, name: str, elements: Sequence[Any]) -> str:
        if not elements:
            return ""
        return f"delete element {self._inet} {name} {{ {', '.join(text_of(item) for item in elements)} }}\n"


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


def _admitted(address: str, item: Direct) -> str:
    ports = str(item.low) if item.low == item.high else f"{item.low}-{item.high}"
    return f"{address} . {item.network} . {PROTOCOLS[item.l4]} . {ports}"


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
