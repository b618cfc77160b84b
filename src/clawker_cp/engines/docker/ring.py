"""
The host ring around a bridge that Docker made (threats.md, layer B): the verbs of `HostRing`.

Ports have random names and are not only agents': containers of ours that serve them are bridged too.
What a port may do follows from its pin alone; the rules are in `ring_rules`, beside Docker's own, which
can only refuse more. The tables survive us and whatever Docker makes anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import structlog

from clawker_cp.engines.base import AgentNetwork
from clawker_cp.engines.docker.ring_rules import Pin, Rules
from clawker_cp.engines.host.commands import host_netns, in_host, run
from clawker_cp.engines.host.direct import DirectPaths, bare, source_of
from clawker_cp.engines.host.ring import DEFAULT_GROUP
from clawker_cp.engines.host.tables import PREFIX
from clawker_cp.errors import Unavailable, Unsupported

log = structlog.get_logger()


class _Pinned(NamedTuple):
    pin: Pin
    infrastructure: bool


class DockerRing(DirectPaths):
    """
    Owns three nftables tables named after the bridge. Each change is one transaction.

    `inbound` is firewall.inbound. `host_pid` is a process of the host's network namespace. A port without
    a pin reaches nothing that has one, nor the host; `close_unpinned` closes it altogether.
    """

    def __init__(
        self,
        network: AgentNetwork,
        *,
        inbound: str = "host",
        group: int = DEFAULT_GROUP,
        extra_tuples: Sequence[tuple[str, int]] = (),
        host_pid: int = 1,
    ) -> None:
        super().__init__(f"{PREFIX}{network.bridge}", ("inet", "bridge"))
        self._bridge = network.bridge
        self._group = group
        self._host_pid = host_pid
        self._made = Rules(self._table, network, inbound, group, extra_tuples)
        self._pinned: dict[str, _Pinned] = {}  # by interface

    @property
    def group(self) -> int:
        """The NFLOG group that drops are reported to."""
        return self._group

    async def install(self, living: Sequence[Pin], infrastructure: Sequence[Pin] = ()) -> None:
        """
        Replace the rules atomically, with the ports that live now; all others are closed.

        What an agent was admitted to stays if its very port was pinned before. Raises `Unsupported` when
        the bridge is not in the network namespace that we take for the host's.
        """
        self._where = in_host(self._host_pid)
        wanted = [_Pinned(pin, infrastructure=False) for pin in living]
        wanted += [_Pinned(pin, infrastructure=True) for pin in infrastructure]
        async with self._lock:
            pinned = {item.pin.interface: item for item in wanted}
            script = self._made.script() + "".join(self._made.give(item.pin, item.infrastructure) for item in wanted)
            script += self._made.close(await self._ports() - pinned.keys())
            await self._settle_bridge()
            try:
                await self._nft(script + await self._stale(living))
            except Unavailable as error:
                # Sets of another version cannot be reshaped in place. Deleting and making is one
                # transaction: there is no moment without a ring.
                log.warning("engines_ring_remade", error=str(error))
                fresh = "".join(f"add table {table}\ndelete table {table}\n" for table in self._made.tables)
                await self._nft(fresh + script)
            self._forget_all()
            self._pinned = pinned

    def script(self, living: Sequence[Pin] = (), infrastructure: Sequence[Pin] = ()) -> str:
        """
        The transaction that `install` applies, for a check without applying it.
        """
        pins = [(pin, False) for pin in living] + [(pin, True) for pin in infrastructure]
        return self._made.script() + "".join(self._made.give(*item) for item in pins)

    async def remove(self) -> None:
        """
        Take the tables away; fine when they are not there.
        """
        async with self._lock:
            self._pinned.clear()
            self._forget_all()
            for table in self._made.tables:
                await run(*in_host(self._host_pid), "nft", "delete", "table", *table.split(), check=False)

    async def pin(self, interface: str, address: str, *, mac: str, infrastructure: bool = False) -> None:
        """
        Let a port send with exactly this MAC and address, as an agent or as one of ours that serves them.

        Whoever had the port or the address before loses them, with everything it was admitted to.
        """
        item = _Pinned(Pin(interface, address, mac.lower()), infrastructure)
        async with self._lock:
            before = [
                other
                for other in self._pinned.values()
                if other != item and (other.pin.interface == interface or other.pin.address == address)
            ]
            text = "".join(self._take(other) for other in before)
            lost = {other.pin.address for other in before}
            if self._pinned.get(interface) != item:
                lost.add(address)  # admit after this, not before
                text += await self._close_paths(lost)
            await self._nft(text + self._made.give(item.pin, infrastructure))
            for other in before:
                self._pinned.pop(other.pin.interface, None)
            self._forget(lost)
            self._pinned[interface] = item

    async def unpin(self, interface: str, address: str) -> None:
        """
        Take back everything a port was given; what is gone already is fine.

        An address that another port has by now keeps what that one was given.
        """
        async with self._lock:
            item = self._pinned.get(interface)
            text = ""
            if item is not None and item.pin.address == address:
                text = self._take(item)
            left = any(other.pin.address == address and other is not item for other in self._pinned.values())
            if not left:
                text += await self._close_paths({address})
            if text:
                await self._nft(text)
            self._forget(() if left else {address})
            if item is not None and item.pin.address == address:
                del self._pinned[interface]

    async def close_unpinned(self) -> frozenset[str]:
        """
        Close every port of the bridge that has no pin now, for frames of any kind; returns those.

        Called when a port appears (`ports.PortWatch`). Without it such a port reaches other ports
        without a pin, as long as neither its frames' addresses are the agents' nor its kernel judges them.
        """
        async with self._lock:
            unpinned = await self._ports() - self._pinned.keys()
            await self._nft(self._made.flush_closed() + self._made.close(unpinned))
            return frozenset(unpinned)

    def owner_of(self, address: str) -> str:
        """
        The interface that an address is pinned to, "" for none; the port of a drop seen behind the bridge.
        """
        return next((item.pin.interface for item in self._pinned.values() if item.pin.address == address), "")

    def _take(self, item: _Pinned) -> str:
        # A MAC is kept for as long as any port has it.
        shared = any(other is not item and other.pin.mac == item.pin.mac for other in self._pinned.values())
        return self._made.take(item.pin, item.infrastructure, keep_mac=shared)

    async def _close_paths(self, addresses: Iterable[str]) -> str:
        gone = frozenset(addresses)
        return await self._withdrawn(gone) + "".join(self._end(address) for address in sorted(gone))

    async def _stale(self, living: Sequence[Pin]) -> str:
        try:
            known = {tuple(bare(item)["concat"]) for item in await self._elements("agent_pins", self._frames)}
            everywhere = {source_of(item) for item in await self._elements("everywhere")}
            admitted = set[str]().union(*(await self._present()).values())
        except Unavailable:  # no ring yet, or one of another shape: nothing is kept
            return ""
        kept = {pin.address for pin in living if (pin.interface, pin.mac.lower(), pin.address) in known}
        return await self._withdrawn(admitted - kept) + "".join(map(self._end, everywhere - kept))

    async def _settle_bridge(self) -> None:
        # Frames that a bridge takes for itself (LLDP) pass none of its hooks, and it learns from them: a port
        # could draw another's traffic. The pins keep that traffic from it, this keeps it coming to its owner.
        option = ("type", "bridge", "no_linklocal_learn", "1")
        try:
            await run(*self._where, "ip", "link", "set", "dev", self._bridge, *option)
        except Unavailable as error:
            log.warning("engines_ring_bridge_learns", bridge=self._bridge, error=str(error))

    async def _ports(self) -> set[str]:
        where = in_host(self._host_pid)
        try:
            listed = await run(*where, "ip", "-j", "link", "show", "master", self._bridge)
        except Unavailable as error:
            there = host_netns(self._host_pid)
            raise Unsupported(
                f"{self._bridge} is not in the network namespace {there or 'of this process'}: {error}",
                feature="host_ring",
                needs="pid: host for the control plane's container",
                hint="start it with clawkerctl up, or with --pid=host",
            ) from error
        return {link["ifname"] for link in json.loads(listed or "[]") if "ifname" in link}
