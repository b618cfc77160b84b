"""The listeners of one server, as far as no client is needed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from clawker_cp.agents.database import Database
from clawker_cp.config import CliPorts, CliSettings, Directories, OauthSettings, Settings
from clawker_cp.pki.tree import AuthTree
from clawker_cp.runtime.startup import CPStartupOrchestrator
from clawker_cp.telemetry.metrics import Metrics
from clawker_cp.testing.authority_world import free_ports
from clawker_cp.wiring import control_surface
from clawker_cp.wiring.control_surface import ControlSurface
from clawker_cp.wiring.placement import Placement


@pytest.fixture
def surface(tmp_path: Path) -> ControlSurface:
    admin, agents, health, public, own, metrics = free_ports(6)
    ports = CliPorts(
        admin_port=admin, agent_port=agents, health_port=health, hydra_public_port=public, hydra_admin_port=own
    )
    settings = msgspec.structs.replace(
        Settings(),
        cli=CliSettings(control_plane=ports),
        metrics_port=metrics,
        oauth=OauthSettings(implementation="embedded"),
    )
    directories = Directories(*(tmp_path / name for name in ("config", "data", "state", "cache")))
    return ControlSurface(
        settings, directories, AuthTree(tmp_path / "auth"), Database(tmp_path / "cp.db"), CPStartupOrchestrator(),
        Metrics(), listen=Placement().listeners("127.0.0.1"),
    )  # fmt: skip


async def ends() -> None:
    """A listener that returns."""


async def fails() -> None:
    """A listener that breaks."""
    raise OSError("gone")


async def test_a_listener_that_ends_by_itself_is_lost(surface: ControlSurface) -> None:
    """However it ends, and it is named with the cause."""
    await surface._follow("admin", ends())
    assert "the admin listener is lost: it ended" in str(await surface.wait_lost())
    await surface._follow("health", fails())
    assert "the health listener is lost: OSError: gone" in str(await surface.wait_lost())


async def test_a_listener_that_was_closed_is_not_lost(surface: ControlSurface, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing again is fine, and what ends afterwards was meant to."""
    await surface.close()
    await surface.close()
    await surface._follow("agents", ends())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await surface.wait_lost()


async def test_a_socket_that_refuses_twice_is_lost(surface: ControlSurface, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once may be a moment; nobody tells us when the kernel gave a socket up."""
    monkeypatch.setattr(control_surface, "LOOK_EVERY_S", 0.01)
    async with asyncio.timeout(5):
        assert "refuses connections" in str(await surface.wait_lost())
