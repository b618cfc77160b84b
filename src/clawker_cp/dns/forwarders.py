"""
Resolve a question through forwarders: zones, failover, single flight. Knows no agents and no policy.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import dns.exception
import structlog

from clawker_cp.accel import NameMatcher
from clawker_cp.dns.exchange import Forwarder, exchange
from clawker_cp.dns.resolved import NOERROR, NXDOMAIN, SERVFAIL, Resolved, read_answer
from clawker_cp.errors import Unavailable

log = structlog.get_logger()

RESTED_S = 10.0  # how long a forwarder that failed is asked last


class Forwarders:
    """
    The resolvers behind the gate; questions being asked are shared, nothing is kept afterwards.

    `front` knows the zones too and is asked before their own servers, but not while it is down (contract 8.7).
    """

    def __init__(
        self,
        forwarders: Sequence[str],
        zones: Mapping[str, Sequence[str]],
        *,
        try_s: float,
        tries: int,
        front: str = "",
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._default = tuple(Forwarder.parse(text) for text in forwarders)
        self._zones = [(zone.strip(".").lower(), tuple(map(Forwarder.parse, own))) for zone, own in zones.items()]
        self._matcher = NameMatcher({}, {zone: number for number, (zone, _) in enumerate(self._zones)})
        self._front = Forwarder.parse(front) if front else None
        self._try_s = try_s
        self._tries = tries
        self._clock_ns = clock_ns
        self._asking: dict[bytes, asyncio.Future[Resolved]] = {}
        self._failed_ns: dict[Forwarder, int] = {}
        self.asked = 0
        self.failures = 0

    @property
    def healthy(self) -> bool:
        """False while every default forwarder has failed and none has answered since."""
        return not self._default or any(forwarder not in self._failed_ns for forwarder in self._default)

    @property
    def pending(self) -> int:
        """How many different questions are being asked."""
        return len(self._asking)

    async def resolve(self, key: bytes, name: str) -> Resolved:
        """
        Return the answer to the question `key` (name and type in wire form), asked once for all who wait.

        Never raises for what forwarders do: `failed` is set when none gave an answer.
        """
        flight = self._asking.get(key)
        if flight is not None:
            return await asyncio.shield(flight)
        flight = self._asking[key] = asyncio.get_running_loop().create_future()
        try:
            answer = await self._ask(key, name)
        except BaseException:
            # Whoever waits with us would otherwise wait for ever.
            flight.cancel()
            raise
        else:
            flight.set_result(answer)
            return answer
        finally:
            del self._asking[key]

    async def _ask(self, key: bytes, name: str) -> Resolved:
        number = self._matcher.match(name)
        zone, servers = self._zones[number] if number >= 0 else (".", self._default)
        question = key + b"\0\1"
        order = sorted(servers, key=self._rank)
        turns = [order[attempt % len(order)] for attempt in range(self._tries if order else 0)]
        if self._front is not None and not self._rank(self._front):
            turns.insert(0, self._front)
        for forwarder in turns:
            self.asked += 1
            try:
                message = await exchange(forwarder, question, self._try_s)
                answer = read_answer(message, question, now_ns=self._clock_ns(), zone=zone, own_zone=number >= 0)
            except (Unavailable, dns.exception.DNSException, ValueError) as error:
                self._fail(forwarder, str(error))
                continue
            if answer.rcode in (NOERROR, NXDOMAIN):
                if self._failed_ns.pop(forwarder, None) is not None:
                    log.info("dns_forwarder_recovered", forwarder=forwarder.host)
                return answer
            # One broken name says nothing about the forwarder, but another one may know better.
            self.failures += 1
        return Resolved(question, SERVFAIL, (), received_ns=self._clock_ns(), life_s=0, zone=zone, failed=True)

    def _rank(self, forwarder: Forwarder) -> bool:
        failed_ns = self._failed_ns.get(forwarder)
        return failed_ns is not None and self._clock_ns() - failed_ns < RESTED_S * 1e9

    def _fail(self, forwarder: Forwarder, why: str) -> None:
        self.failures += 1
        if forwarder not in self._failed_ns:
            log.warning("dns_forwarder_failed", forwarder=forwarder.host, port=forwarder.port, why=why)
        self._failed_ns[forwarder] = self._clock_ns()
