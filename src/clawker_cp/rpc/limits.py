"""
How long an answer may take, and how much a listener takes in (contract 5.5).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

from clawker_cp.errors import Unavailable

T = TypeVar("T")

ANSWER_S = 12.0  # the released CLI waits 15 s for everything
LONG_ANSWER_S = 180.0  # and 210 s for Init and Reload
MARGIN_S = 0.5  # left for the way back

MESSAGE_BYTES = 4 * 1024 * 1024
METADATA_BYTES = 16 * 1024
STREAMS_PER_CONNECTION = 256
CONNECTIONS = 512
HANDSHAKE_S = 5.0
WATCHERS = 32


def answer_within(context: Any, limit_s: float = ANSWER_S) -> float:
    """
    Seconds a handler may take: the caller's deadline less the way back, at most `limit_s`.
    """
    left = context.time_remaining()
    return limit_s if left is None else max(min(left - MARGIN_S, limit_s), 0.05)


async def within(context: Any, work: Awaitable[T]) -> T:
    """
    Await what a handler began, as long as it may take. Raises `Unavailable` (`STACK_UNHEALTHY`) after that: what was
    accepted goes on without its caller.
    """
    limit_s = answer_within(context)
    try:
        async with asyncio.timeout(limit_s):
            return await work
    except TimeoutError:
        raise Unavailable(
            f"accepted, but not done within {limit_s:.0f} s", code="STACK_UNHEALTHY", details={"saved": "true"},
            hint="it goes on; `clawkerctl status` says what is slow",
        ) from None  # fmt: skip


@dataclass(frozen=True, slots=True)
class ListenerLimits:
    """
    What one listener takes in. Calls at once times message size bounds what strangers can make it hold in memory.
    """

    message_bytes: int = MESSAGE_BYTES
    metadata_bytes: int = METADATA_BYTES
    streams_per_connection: int = STREAMS_PER_CONNECTION
    connections: int = CONNECTIONS
    calls: int = 1024
    handshake_s: float = HANDSHAKE_S
    idle_s: float = 600.0


# Operators, with a certificate that no agent has.
ADMIN_LIMITS = ListenerLimits()
# Agents say who they are and nothing else: every one of them may be hostile.
AGENT_LIMITS = ListenerLimits(message_bytes=64 * 1024, calls=512)


def listener_options(limits: ListenerLimits = ADMIN_LIMITS) -> list[tuple[str, int]]:
    """
    The gRPC options of a listener: message and metadata sizes, streams, connections, handshakes, keepalive.

    Compressed messages are refused: nobody sends them, and a small one can unfold to the size limit.
    """
    return [
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.max_send_message_length", MESSAGE_BYTES),
        # One limit, not a soft and a hard one, between which grpc refuses at random.
        ("grpc.max_metadata_size", limits.metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.metadata_bytes),
        ("grpc.max_concurrent_streams", limits.streams_per_connection),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.server_handshake_timeout_ms", int(limits.handshake_s * 1000)),
        ("grpc.max_connection_idle_ms", int(limits.idle_s * 1000)),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.so_reuseport", 0),
    ]
