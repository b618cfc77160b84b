"""
What the gate asks of the rest, as protocols, and the record it makes of every question.

The composition root passes objects that fit; the gate imports no other domain package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec


class AgentView(Protocol):
    """
    One running agent as the gate sees it; read at every question, so it may change at any time.

    `key` is the scope key ("agent:p/a"); `bypassed` is whether a bypass holds now.
    """

    @property
    def cgroup_id(self) -> int: ...
    @property
    def key(self) -> str: ...
    @property
    def policy(self) -> int: ...
    @property
    def bypassed(self) -> bool: ...
    @property
    def quarantined(self) -> bool: ...


class Agents(Protocol):
    """Running agents by their address."""

    def by_address(self, address: str, /) -> AgentView | None:
        """Return the one agent that has the address, None if there is none (contract 9.9)."""
        ...


class Verdict(Protocol):
    """What a policy says of a name; fields of `NameVerdict` in the compiled policy."""

    @property
    def allowed(self) -> bool: ...
    @property
    def reason(self) -> str: ...
    @property
    def rule_id(self) -> str: ...
    @property
    def identity(self) -> int: ...
    @property
    def allow_private(self) -> bool: ...
    @property
    def zone(self) -> str: ...
    @property
    def concrete(self) -> bool: ...
    @property
    def san(self) -> str: ...


class Policies(Protocol):
    """The compiled policies in force."""

    def decide(self, policy: int, name: str, /) -> Verdict:
        """Judge a lower-case name for a policy number; never blocks, never raises."""
        ...

    async def prepare(self, policy: int, name: str, verdict: Verdict, /) -> object:
        """
        Return when the proxy serves a name whose verdict has `concrete` or `san` set.

        Raises ClawkerError if it cannot; the gate then answers SERVFAIL.
        """
        ...

    def for_proxy(self, name: str, /) -> Verdict | None:
        """Return a verdict that allows the name, of any policy that is applied or being applied."""
        ...


class NameRow(NamedTuple):
    """One address of an answer for the kernel; `addr` is 16 octets, IPv4 mapped into IPv6."""

    addr: bytes
    identity: int
    expires_ns: int


class KernelNames(Protocol):
    """The kernel's name cache."""

    def update_dns(self, cgroup_id: int, rows: Sequence[NameRow], /) -> None:
        """Write the rows; raises ClawkerError or OSError and then the answer must not leave (I7)."""
        ...


class Internal(Protocol):
    """Addresses of our own containers by name (`dns.internal_names`)."""

    def address_of(self, name: str, /) -> str | None:
        """Return the address on the agents' network, None if it does not run."""
        ...


class DnsRecord(msgspec.Struct, frozen=True, gc=False):
    """
    One question and what became of it.

    `verdict` is `allowed`, `denied`, `bypassed` or `failed`; `reason` one of contract 2.4. `zone`
    is the wildcard base or the forwarder zone, "." otherwise. `answers` are addresses as 4 or
    16 octets. `cgroup_id` 0: no agent asked (unknown client, proxy view: `key` says which).
    """

    started_hex: str
    number: int
    time_ns: int
    client: str
    cgroup_id: int
    key: str
    policy: int
    name: str
    qtype: int
    rcode: int
    verdict: str
    reason: str
    rule_id: str
    zone: str
    answers: tuple[bytes, ...]
    answer_count: int
    duration_ns: int
    cached: bool

    @property
    def event_id(self) -> str:
        """The id that `explain` takes (contract 2.4)."""
        return f"d-{self.started_hex}-{self.number}"


class Records(Protocol):
    """Where records go; must not block and bounds itself."""

    def dns(self, record: DnsRecord, /) -> None:
        """Take one record."""
        ...
