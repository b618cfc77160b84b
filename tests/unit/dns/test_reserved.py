"""
Names of our own.
"""

from __future__ import annotations

import pytest

from clawker_cp.dns.reserved import ReservedNames
from clawker_cp.dns.settings import GateSettings

SETTINGS = GateSettings(control_plane_address="198.51.100.2", host_proxy_address="198.51.100.3", gateway_address="")


class Containers:
    def __init__(self) -> None:
        self.running = {"prometheus": "198.51.100.77"}

    def address_of(self, name: str) -> str | None:
        return self.running.get(name)


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("clawker-controlplane", bytes((198, 51, 100, 2))),
        ("host.docker.internal", bytes((198, 51, 100, 3))),
        ("gateway.docker.internal", b""),
        ("docker.internal", b""),
        ("x.y.docker.internal", b""),
        ("prometheus", bytes((198, 51, 100, 77))),
        ("otel-collector", b""),
    ],
)
def test_reserved(name: str, address: bytes) -> None:
    """Each reserved name has its address, or none at present."""
    names = ReservedNames(SETTINGS, Containers())
    assert names.address(names.find(name)) == address


@pytest.mark.parametrize("name", ["x.clawker-controlplane", "prometheus.example", "notdocker.internal", "internal", ""])
def test_not_reserved(name: str) -> None:
    """Neighbours are ordinary names."""
    assert ReservedNames(SETTINGS).find(name) == -1


def test_containers_come_and_go() -> None:
    """The address is asked for at every question."""
    containers = Containers()
    names = ReservedNames(SETTINGS, containers)
    number = names.find("prometheus")
    containers.running.clear()
    assert names.address(number) == b""
