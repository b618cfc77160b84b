"""
Names that mean something of ours for every agent (contract 8.2), resolved here and nowhere else.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from clawker_cp.accel import NameMatcher
from clawker_cp.dns.ports import Internal
from clawker_cp.dns.settings import GateSettings

CONTROL_PLANE = "clawker-controlplane"
ENGINE_ZONE = "docker.internal"


class ReservedNames:
    """Look reserved names up; the addresses of containers are asked for at every question."""

    def __init__(self, settings: GateSettings, internal: Internal | None = None) -> None:
        self._answers: list[Callable[[], str | None]] = [lambda: None]
        names: dict[str, int] = {}

        def add(name: str, answer: Callable[[], str | None]) -> None:
            names[name] = len(self._answers)
            self._answers.append(answer)

        for name in settings.internal_names:
            add(name, lambda name=name: internal.address_of(name) if internal is not None else None)  # type: ignore[misc]
        add(CONTROL_PLANE, lambda: settings.control_plane_address)
        add(f"host.{ENGINE_ZONE}", lambda: settings.host_proxy_address)
        add(f"gateway.{ENGINE_ZONE}", lambda: settings.gateway_address)
        self._matcher = NameMatcher(names, {ENGINE_ZONE: 0})

    def find(self, name: str) -> int:
        """Return a number for `address` if the name is reserved, else -1."""
        return self._matcher.match(name)

    def address(self, number: int) -> bytes:
        """Return the address as 4 or 16 octets, b"" if the name stands for nothing at present."""
        text = self._answers[number]()
        return ipaddress.ip_address(text).packed if text else b""
