"""
Which proxied connections live, by agent address and source port: what a rule change may have to cut.

Fed from the proxy's access log, whose records name the connection when something begins on it. A
source port that is used again is overwritten by the newer connection's record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LIMIT_PER_AGENT = 16384
_BEGINS = frozenset({"DownstreamStart", "TcpUpstreamConnected", "DownstreamTunnelSuccessfullyEstablished"})


@dataclass(frozen=True, slots=True)
class Live:
    """What a connection last carried, and the proxy port it came in on."""

    host: str
    port: int
    tls: bool
    listener: int


class Connections:
    """
    The last host of every connection. Beyond the limit of an agent the oldest is forgotten.
    """

    def __init__(self) -> None:
        self._live: dict[str, dict[int, Live]] = {}

    def see(self, remote: str, live: Live) -> None:
        """
        Take the beginning of something; `remote` is "address:port" of the agent's side.
        """
        address, _separator, source = remote.rpartition(":")
        if not source.isdecimal() or not live.host:
            return
        known = self._live.setdefault(address, {})
        known.pop(int(source), None)  # the newest stands last
        known[int(source)] = live
        if len(known) > LIMIT_PER_AGENT:
            del known[next(iter(known))]

    def of(self, address: str) -> Mapping[int, Live]:
        """
        Source port -> what it carries, of one agent.
        """
        return dict(self._live.get(address, {}))

    def forget(self, address: str) -> None:
        """
        Drop everything of an agent that is gone.
        """
        self._live.pop(address, None)

    @staticmethod
    def begins(line: Mapping[str, Any]) -> bool:
        """
        Whether a line of the access log is about a beginning rather than an end.
        """
        return str(line.get("record") or "") in _BEGINS
