"""
Which implementation of the hot paths runs: compiled, or the plain twins when asked for.

A failed import stops the program: a silent slow path would hide a broken build. Only
CLAWKER_CP_NO_EXTENSIONS=1 selects the twins; the map bridge has none and is imported where used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING or os.environ.get("CLAWKER_CP_NO_EXTENSIONS") == "1":
    from clawker_cp._pure.bearer import presented_token
    from clawker_cp._pure.dnswire import Query, build_reply, parse_query
    from clawker_cp._pure.events import decode_events as _decode
    from clawker_cp._pure.names import NameMatcher
    from clawker_cp._pure.scopes import has_scope, scope_words
    from clawker_cp._pure.tokencache import TokenCache

    IMPLEMENTATION = "pure"
else:
    try:
        from clawker_cp._fast.bearer import presented_token
        from clawker_cp._fast.dnswire import Query, build_reply, parse_query
        from clawker_cp._fast.events import decode_events as _decode
        from clawker_cp._fast.names import NameMatcher
        from clawker_cp._fast.scopes import has_scope, scope_words
        from clawker_cp._fast.tokencache import TokenCache
    except ImportError as error:
        raise ImportError(
            "the compiled modules of clawker_cp are missing or broken: build them with `pip install -e .`, "
            "or set CLAWKER_CP_NO_EXTENSIONS=1 to run the slower plain ones"
        ) from error

    IMPLEMENTATION = "fast"


class KernelEvent(NamedTuple):
    """One decision of the kernel; fields and units of `struct clawker_event`."""

    ktime_ns: int
    cgroup_id: int
    sequence: int
    cookie: int
    addr: bytes
    identity: int
    policy: int
    rule: int
    uid: int
    pid: int
    port: int
    proxy_port: int
    verdict: int
    reason: int
    hook: int
    family: int
    protocol: int
    type: int
    flags: int


class Granted(NamedTuple):
    """An active token as the cache keeps it: whose, for what, until when (Unix seconds)."""

    client_id: str
    scope: str
    exp: int


def decode_events(buffer: bytes) -> list[KernelEvent]:
    """
    Decode ring buffer records, in order.
    """
    return cast("list[KernelEvent]", _decode(buffer, KernelEvent))


def libbpf_version() -> str:
    """
    Version of the libbpf this process runs on.
    """
    from clawker_cp._fast.bpfmap import libbpf_version as version

    return version()


__all__ = [
    "IMPLEMENTATION",
    "Granted",
    "KernelEvent",
    "NameMatcher",
    "Query",
    "TokenCache",
    "build_reply",
    "decode_events",
    "has_scope",
    "libbpf_version",
    "parse_query",
    "presented_token",
    "scope_words",
]
