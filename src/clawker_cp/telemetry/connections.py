"""
Which proxied connections live, by agent address and source port: what a rule change may have to cut.

Fed from the proxy's access log, whose records name the connection when it begins and when it ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LIMIT_PER_AGENT = 16384
_BEGINS = frozenset({"DownstreamStart", "TcpUpstreamConnected", "DownstreamTunnelSuccessfullyEstablished"})


class Connections:
    """
    The last host of every live connection. Beyond the limit of an agent the oldest is forgotten.
    """

    def __init__(self) -> None:
        self._live: dict[str, dict[int, tuple[str, int, bool]]] = {}

    def see(self, remote: str, kind: str, host: str, port: int, *, tls: bool, ends: bool) -> None:
        """
        Take one record; `remote` is "address:port" of the agent's side.
        """
        address, _separator, source = remote.rpartition(":")
        if not source.isdecimal() or not host:
            return
        live = self._live.setdefault(address, {})
        if ends:
            live.pop(int(source), None)
            return
        live[int(source)] = (host, port, tls)
        if len(live) > LIMIT_PER_AGENT:
            del live[next(iter(live))]

    def of(self, address: str) -> Mapping[int, tuple[str, int, bool]]:
        """
        Source port -> (host, port, tls) of an agent's live connections.
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
