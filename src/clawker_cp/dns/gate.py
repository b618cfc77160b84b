"""
The servers of the gate: UDP and TCP for agents, the same for the proxy (proxy view).

They carry octets, bound what clients can make us hold and wait for forwarders and the proxy;
every decision is `judge.py`'s. Started by the composition root.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from functools import partial
from time import monotonic_ns
from typing import Any, cast

import structlog

from clawker_cp.accel import Query, parse_query
from clawker_cp.dns.addresses import IPNetwork
from clawker_cp.dns.budgets import registered_domain
from clawker_cp.dns.forwarders import Forwarders
from clawker_cp.dns.judge import Counts, Judge, Wait
from clawker_cp.dns.ports import Agents, Internal, KernelNames, Policies, Records
from clawker_cp.dns.settings import GateSettings
from clawker_cp.dns.streams import Connection, Connections
from clawker_cp.errors import ClawkerError, Conflict

log = structlog.get_logger()

CLOSE_S = 5.0
ROUNDS = 4  # waits of one question: proxy, forwarder, and once more each if policy changed meanwhile
MAX_REPLY = 65_535
Send = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class GateStatistics:
    """A snapshot for health, metrics and tests."""

    counts: Counts
    waiting: int
    connections: int
    dropped: int
    cache_entries: int
    cache_bytes: int
    forwarders_asked: int
    forwarders_failed: int
    forwarders_healthy: bool
    budgets: dict[str, int]


class Gate:
    """
    Answer DNS for agents and for the proxy.

    `policies`, `agents`, `kernel` and `records` are asked on the loop and must not block. Errors of the
    kernel or the proxy become SERVFAIL; nothing an agent sends ends a server.
    """

    def __init__(
        self,
        settings: GateSettings,
        *,
        agents: Agents,
        policies: Policies,
        kernel: KernelNames,
        records: Records,
        internal: Internal | None = None,
    ) -> None:
        self._settings = settings
        self._policies = policies
        self._forwarders = Forwarders(
            settings.forwarders, settings.zones, try_s=settings.try_s, tries=settings.tries, front=settings.front
        )
        self._judge = Judge(
            settings, agents=agents, policies=policies, kernel=kernel, records=records, internal=internal
        )
        self._connections = Connections(settings)
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: dict[str, int] = {}
        self._datagrams: list[tuple[asyncio.DatagramTransport, _Datagrams]] = []
        self._servers: list[asyncio.Server] = []
        self.dropped = 0
        self.port = 0
        self.proxy_view_port = 0

    async def start(self, group: asyncio.TaskGroup) -> None:
        """
        Bind all sockets; questions that wait are tasks of `group`.

        Raises Conflict, with nothing left bound, when an address cannot be had.
        """
        self._group = group
        # Reading the public suffix list takes tens of milliseconds once.
        await asyncio.to_thread(registered_domain, "example.com")
        settings = self._settings
        try:
            if settings.address:
                self.port = await self._serve(settings.address, settings.port, proxy=False)
            if settings.proxy_view_port:
                self.proxy_view_port = await self._serve(
                    settings.proxy_view_address, settings.proxy_view_port, proxy=True
                )
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Close all sockets and end what waits; safe to call twice."""
        for server in self._servers:
            server.close()
        for transport, _ in self._datagrams:
            transport.abort()
        self._connections.abort()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)
        # A datagram socket is closed a turn of the loop later; its port is free only then.
        for _, protocol in self._datagrams:
            async with asyncio.timeout(CLOSE_S):
                await protocol.ended.wait()
        self._servers.clear()
        self._datagrams.clear()

    def set_reserved(self, prefixes: Iterable[IPNetwork]) -> None:
        """Set what no answer may hold (R12): the agents' subnet, host interfaces, addresses of contract 1.3."""
        self._judge.set_reserved(prefixes)

    def forget(self, cgroup_id: int | None = None) -> None:
        """
        Drop what is remembered of kernel rows; None = of every agent.

        Whoever removes rows of the kernel's name cache other than by their expiry has to call it, else an
        answer within 30 s may leave without its row being written again.
        """
        self._judge.forget(cgroup_id)

    def flush_cache(self) -> None:
        """Drop all cached answers."""
        self._judge.cache.clear()

    def statistics(self) -> GateStatistics:
        """Return the present numbers."""
        return GateStatistics(
            counts=self._judge.counts,
            waiting=len(self._tasks),
            connections=len(self._connections),
            dropped=self.dropped,
            cache_entries=len(self._judge.cache),
            cache_bytes=self._judge.cache.size_bytes,
            forwarders_asked=self._forwarders.asked,
            forwarders_failed=self._forwarders.failures,
            forwarders_healthy=self._forwarders.healthy,
            budgets=self._judge.budgets.statistics(),
        )

    async def _serve(self, address: str, port: int, *, proxy: bool) -> int:
        loop = asyncio.get_running_loop()
        port = max(port, 0)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        stream = socket.socket(family, socket.SOCK_STREAM)
        datagram = socket.socket(family, socket.SOCK_DGRAM)
        try:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            stream.bind((address, port))
            port = stream.getsockname()[1]
            datagram.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._settings.receive_buffer_bytes)
            datagram.bind((address, port))
            for bound in (stream, datagram):
                bound.setblocking(False)
            transport, protocol = await loop.create_datagram_endpoint(
                lambda: _Datagrams(self, self._judge, proxy=proxy), sock=datagram
            )
            self._datagrams.append((transport, protocol))
            self._servers.append(
                await loop.create_server(
                    lambda: Connection(self._connections, partial(self.ask, proxy=proxy)),
                    sock=stream,
                    backlog=128,
                )
            )
        except OSError as error:
            stream.close()
            datagram.close()
            what = "dns.proxy_view_port" if proxy else "the DNS address"
            raise Conflict(
                f"{what}: cannot listen on {address} port {port}: {error.strerror or error}",
                hint="stop what listens there, or change the setting",
            ) from error
        return port

    def ask(self, data: bytes, client: str, send: Send, /, *, limit: int, proxy: bool) -> bool:
        """
        Answer one message through `send`, now or later; False if it gets no answer.

        Called by the connections for every message; datagrams take the shorter way in `_Datagrams`.
        """
        query = parse_query(data)
        if query is None:
            self.dropped += 1
            return False
        began_ns = monotonic_ns()
        step = self._judge.answer(query, client, began_ns, proxy, limit)
        if isinstance(step, bytes):
            send(step)
        else:
            self.wait(query, client, began_ns, step, send, limit=limit, proxy=proxy)
        return True

    def wait(
        self, query: Query, client: str, began_ns: int, step: Wait, send: Send, *, limit: int, proxy: bool
    ) -> None:
        """Answer later what cannot be answered now; at once, with SERVFAIL, if too many wait already."""
        if len(self._tasks) >= self._settings.waiting or (
            not proxy and self._waiting.get(client, 0) >= self._settings.waiting_per_agent
        ):
            send(self._judge.fail(query, client, None, began_ns, proxy=proxy, limit=limit))
        else:
            self._begin(client, self._finish(query, client, began_ns, step, send, limit=limit, proxy=proxy))

    def _begin(self, client: str, waiting: Coroutine[Any, Any, None]) -> None:
        assert self._group is not None
        task = self._group.create_task(waiting, name="dns-question")
        self._tasks.add(task)
        self._waiting[client] = self._waiting.get(client, 0) + 1

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            left = self._waiting[client] - 1
            if left:
                self._waiting[client] = left
            else:
                del self._waiting[client]

        task.add_done_callback(ended)

    async def _finish(
        self, query: Query, client: str, began_ns: int, step: Wait, send: Send, *, limit: int, proxy: bool
    ) -> None:
        """Wait for what the question needs, judge it again with what holds by then, and answer."""
        reply: bytes | None = None
        try:
            for _ in range(ROUNDS):
                answer = None
                if step.prepare is None:
                    answer = await self._forwarders.resolve(query.key, query.name)
                    if not answer.failed and answer.expires_ns > answer.received_ns:
                        self._judge.cache.put(query.key, answer)
                else:
                    async with asyncio.timeout(self._settings.prepare_s):
                        await self._policies.prepare(step.policy, query.name, step.prepare)
                judged = self._judge.answer(query, client, began_ns, proxy, limit, answer, again=True)
                if isinstance(judged, bytes):
                    reply = judged
                    break
                step = judged
        except (ClawkerError, OSError) as error:
            log.warning("dns_prepare_failed", name=query.name, client=client, why=str(error))
        except Exception:
            # The border of one question: a fault in judging one name must end neither the server nor its group.
            log.exception("dns_question_failed", client=client)
        if reply is None:
            reply = self._judge.fail(query, client, step, began_ns, proxy=proxy, limit=limit)
        send(reply)


class _Datagrams(asyncio.DatagramProtocol):
    """
    Answer datagrams; while the socket cannot take more, replies are dropped and counted.

    `datagram_received` is the hottest Python in the program: nothing is created in it that an answer
    from the cache does not need.
    """

    def __init__(self, gate: Gate, judge: Judge, *, proxy: bool) -> None:
        self._gate = gate
        self._answer = judge.answer
        self._proxy = proxy
        self._full = False
        self.ended = asyncio.Event()
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.DatagramTransport", transport)
        self._sendto = self._transport.sendto

    def connection_lost(self, exc: Exception | None) -> None:
        """Send nothing any more."""
        self.ended.set()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answer one datagram."""
        query = parse_query(data)
        if query is None:
            self._gate.dropped += 1
            return
        began_ns = monotonic_ns()
        step = self._answer(query, addr[0], began_ns, self._proxy, query.size)
        if type(step) is not bytes:
            self._gate.wait(
                query,
                addr[0],
                began_ns,
                cast(Wait, step),
                lambda reply: self._send(reply, addr),
                limit=query.size,
                proxy=self._proxy,
            )
        elif self._full:
            self._gate.dropped += 1
        else:
            self._sendto(step, addr)

    def _send(self, reply: bytes, addr: tuple[str, int]) -> None:
        if self._full or self.ended.is_set():
            self._gate.dropped += 1
        else:
            self._sendto(reply, addr)

    def pause_writing(self) -> None:
        """Drop replies from now on: a client asks again, memory does not come back."""
        self._full = True

    def resume_writing(self) -> None:
        """Send again."""
        self._full = False

    def error_received(self, exc: Exception) -> None:
        """Ignore what clients that went away cause."""
