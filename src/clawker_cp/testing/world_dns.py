"""
The name server of the test world: answers from a table, counts, and misbehaves when told to.

It answers on every address of the world, over UDP and TCP; `behave` makes one address or one name
dead, slow or lying. Owned by `world_server`, driven through its control socket.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

from clawker_cp.testing.world_names import Zone

MAX_QUERIES = 100_000
_MAX_CNAMES = 8
_DEFAULT_TTL_S = 60
_SOA = "ns.example.com. hostmaster.example.com. 1 3600 600 86400 30"
KINDS = ("normal", "dead", "nxdomain", "servfail", "refused", "garbage", "truncate", "empty")


class NameServer:
    """
    A table of names and the ways in which it can fail.
    """

    def __init__(self, zone: Zone) -> None:
        self._first = zone
        self.zone: Zone = {}
        self.ttl_s = _DEFAULT_TTL_S
        self.queries: deque[dict[str, Any]] = deque(maxlen=MAX_QUERIES)
        self._modes: dict[str, dict[str, Any]] = {}
        self.restore()

    def restore(self) -> None:
        """Forget queries, changes and misbehaviour."""
        self.zone = {name.lower(): dict(types) for name, types in self._first.items()}
        self.ttl_s = _DEFAULT_TTL_S
        self.queries.clear()
        self._modes.clear()

    def behave(self, subject: str, kind: str, delay_ms: int) -> None:
        """
        Let an address of ours or a name (or "*", all of them) answer in one of `KINDS`, after a delay.
        """
        if kind not in KINDS:
            raise ValueError(f"kind: {kind!r} is none of {', '.join(KINDS)}")
        self._modes[subject.lower().rstrip(".")] = {"kind": kind, "delay_s": delay_ms / 1000}

    def replace(self, name: str, types: dict[str, list[str]]) -> None:
        """
        Set all records of one name. Raises `ValueError` for data that is none.
        """
        for kind, data in types.items():
            try:
                dns.rrset.from_text(name, self.ttl_s, "IN", kind, *data)
            except dns.exception.DNSException as error:
                raise ValueError(f"{name} {kind} {data}: {error}") from error
        self.zone[name.lower().rstrip(".")] = types

    async def answer(self, wire: bytes, transport: str, src: str, dst: str) -> bytes | None:
        """
        The reply to one message, or None for silence.
        """
        try:
            query = dns.message.from_wire(wire)
        except dns.exception.DNSException:
            self.queries.append({"name": "", "type": "unparsable", "transport": transport, "src": src, "dst": dst})
            return None
        if not query.question:
            return None
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True)
        self.queries.append(
            {
                "name": name,
                "type": dns.rdatatype.to_text(question.rdtype),
                "transport": transport,
                "src": src,
                "dst": dst,
                "options": [int(option.otype) for option in query.options],
            }
        )
        mode = self._modes.get(name.lower()) or self._modes.get(dst) or self._modes.get("*")
        kind = mode["kind"] if mode else "normal"
        if mode and mode["delay_s"]:
            await asyncio.sleep(mode["delay_s"])
        if kind == "dead":
            return None
        if kind == "garbage":
            return wire[:2] + b"\xff" * 9
        reply = dns.message.make_response(query, recursion_available=True)
        if kind in {"nxdomain", "servfail", "refused"}:
            reply.set_rcode(dns.rcode.from_text(kind))
        elif kind == "truncate" and transport == "udp":
            reply.flags |= dns.flags.TC
        elif kind != "empty":
            self._fill(reply, name, question.rdtype)
        limit = 65535 if transport == "tcp" else max(512, query.payload)
        try:
            return reply.to_wire(max_size=limit)
        except dns.exception.TooBig:
            short = dns.message.make_response(query, recursion_available=True)
            short.flags |= dns.flags.TC
            return short.to_wire()

    def _fill(self, reply: dns.message.Message, name: str, rdtype: dns.rdatatype.RdataType) -> None:
        kind = dns.rdatatype.to_text(rdtype)
        for _ in range(_MAX_CNAMES):
            types = self._find(name)
            if types is None:
                reply.set_rcode(dns.rcode.NXDOMAIN)
                break
            owner = dns.name.from_text(name)
            if kind in types:
                reply.answer.append(dns.rrset.from_text(owner, self.ttl_s, "IN", kind, *types[kind]))
                return
            if "CNAME" not in types:
                break
            reply.answer.append(dns.rrset.from_text(owner, self.ttl_s, "IN", "CNAME", types["CNAME"][0]))
            name = types["CNAME"][0].rstrip(".")
        apex = dns.name.from_text(".".join(name.split(".")[-2:]))
        reply.authority.append(dns.rrset.from_text(apex, 30, "IN", "SOA", _SOA))

    def _find(self, name: str) -> dict[str, list[str]] | None:
        name = name.lower()
        if name in self.zone:
            return self.zone[name]
        parent = name
        while "." in parent:
            parent = parent.partition(".")[2]
            if f"*.{parent}" in self.zone:
                return self.zone[f"*.{parent}"]
        return {} if any(other.endswith(f".{name}") for other in self.zone) else None
