"""
How long an answer may take, and how much a listener takes in (contract 5.5).
"""

from __future__ import annotations

from typing import Any

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


def listener_options() -> list[tuple[str, int]]:
    """
    The gRPC options of a listener: message and metadata sizes, streams, keepalive, handshakes.
    """
    return [
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_send_message_length", MESSAGE_BYTES),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES),
        ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION),
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_S * 1000)),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.so_reuseport", 0),
    ]
