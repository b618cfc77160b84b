"""
The addresses that agents were told, as the kernel has them: rows of `dns_cache` with their mirror and quota.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from clawker_cp._fast import bpfmap, layout
from clawker_cp.ebpf.config import NameRowLike, unmapped
from clawker_cp.errors import CapacityExceeded

NAMES_PER_AGENT = 4096
NAMES_PER_ADDRESS = 4
FROM_DNS = 2  # a row's source
FIRST_OF_NAMES = 256  # smaller identities stand for no single name

_Rows = dict[bytes, tuple[tuple[int, ...], int]]  # address -> (identities, expires_ns)


class LearntNames:
    """Writes one map; the mirror counts for that map only. `routed` gives the identities that lead anywhere."""

    def __init__(self, cache: bpfmap.BpfMap, routed: Callable[[], Collection[int]]) -> None:
        self._cache = cache
        self._routed = routed
        self._agents: dict[int, _Rows] = {}

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._agents.values())

    def adopt(self) -> None:
        """
        Take what the map holds already into the mirror.
        """
        for key, value in self._cache.items():
            cgroup_id, addr, identities, expires, _source = layout.unpack_name(key, value)
            self._agents.setdefault(cgroup_id, {})[addr] = (identities, expires)

    def update(self, cgroup_id: int, told: Sequence[NameRowLike]) -> None:
        """
        All rows or none, within the quotas of an agent and of an address; beyond them `CapacityExceeded`.
        """
        rows = self._agents.setdefault(cgroup_id, {})
        now = time.monotonic_ns()
        changes: _Rows = {}
        for row in told:
            known, expires = changes.get(row.addr) or rows.get(row.addr) or ((), 0)
            if expires and expires < now:
                known, expires = (), 0
            if len(known) >= NAMES_PER_ADDRESS and row.identity not in known:
                # A name that left the rules and came back has another number: the old one leads nowhere.
                routed = self._routed()
                known = tuple(i for i in known if i < FIRST_OF_NAMES or i in routed)
            if row.identity in known:
                identities = (row.identity, *(i for i in known if i != row.identity))
            elif len(known) >= NAMES_PER_ADDRESS:
                raise CapacityExceeded(f"more than four names share {unmapped(row.addr)}", limit="names")
            else:
                identities = (row.identity, *known)
            changes[row.addr] = (identities, max(expires, row.expires_ns))
        if len(rows.keys() | changes.keys()) > NAMES_PER_AGENT:
            self._collect(rows, cgroup_id, now)
            if len(rows.keys() | changes.keys()) > NAMES_PER_AGENT:
                raise CapacityExceeded("the agent knows too many addresses at once", limit="names")
        for addr, (identities, expires) in changes.items():
            if rows.get(addr) == (identities, expires):
                continue
            key, value = layout.pack_name(cgroup_id, addr, identities, expires, FROM_DNS)
            try:
                self._cache.put(key, value)
            except OSError as error:
                raise CapacityExceeded(f"the name cache refused a row: {error.strerror}", limit="names") from error
            rows[addr] = (identities, expires)

    def forget(self, cgroup_id: int) -> None:
        """
        Remove every row of an agent.
        """
        for addr in self._agents.pop(cgroup_id, {}):
            self._remove(cgroup_id, addr)

    def collect(self) -> int:
        """
        Remove the rows whose time is over; returns how many.
        """
        now = time.monotonic_ns()
        return sum(self._collect(rows, cgroup_id, now) for cgroup_id, rows in list(self._agents.items()))

    def _collect(self, rows: _Rows, cgroup_id: int, now_ns: int) -> int:
        expired = [addr for addr, (_ids, expires) in rows.items() if expires < now_ns]
        for addr in expired:
            del rows[addr]
            self._remove(cgroup_id, addr)
        return len(expired)

    def _remove(self, cgroup_id: int, addr: bytes) -> None:
        self._cache.delete(layout.pack_name(cgroup_id, addr, (), 0, FROM_DNS)[0])
