"""Readiness is said once, and /healthz says only what was asked just now."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import orjson
import pytest
from msgspec.structs import replace

from clawker_cp.config import Settings
from clawker_cp.runtime.health import Component, Health
from clawker_cp.runtime.startup import CPStartupOrchestrator, tls_answers
from clawker_cp.testing.certificates import TestCa
from clawker_cp.testing.clock import FakeClock


class Endpoint:
    """A TLS server on loopback."""

    def __init__(self, ca: TestCa) -> None:
        self._ca = ca

    async def __aenter__(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._ca.server_context())
        return int(self._server.sockets[0].getsockname()[1])

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()


@pytest.fixture
def ca(tmp_path: Path) -> TestCa:
    return TestCa(tmp_path)


async def test_before_ready_nothing_is_asked() -> None:
    """The body is exactly that of the contract, whatever the probes would say."""
    startup = CPStartupOrchestrator()
    assert not startup.is_ready
    assert await startup.healthz_handler() == (503, b'{"status":"not_ready"}')


async def test_probes_decide_in_their_order(ca: TestCa) -> None:
    """The first that fails is named: the token endpoints by a TLS dial, then what was added."""
    clock = FakeClock()
    startup = CPStartupOrchestrator(clock=clock)
    answers = {"grpc-admin": True}

    async def grpc() -> bool:
        return answers["grpc-admin"]

    async with Endpoint(ca) as public, Endpoint(ca) as admin:
        ports = replace(Settings().cli.control_plane, hydra_public_port=public, hydra_admin_port=admin)
        settings = replace(Settings(), cli=replace(Settings().cli, control_plane=ports))
        startup.set_service_probes(settings, ca.client_context(), [("grpc-admin", grpc)])
        startup.set_ready()
        assert startup.is_ready
        assert await startup.healthz_handler() == (200, b'{"status":"healthy"}')
        answers["grpc-admin"] = False
        assert (await startup.healthz_handler())[0] == 200  # kept for two seconds
        await clock.advance(2.0)
        assert await startup.healthz_handler() == (503, b'{"status":"unhealthy","failed_probe":"grpc-admin"}')
    await clock.advance(2.0)
    assert await startup.healthz_handler() == (503, b'{"status":"unhealthy","failed_probe":"hydra-public"}')


async def test_verbose_adds_the_components_last() -> None:
    """Their state is the last key, and the status before it is the same."""
    startup = CPStartupOrchestrator(components=lambda: [Component("dns", health=Health.DEGRADED, detail="slow")])
    status, body = await startup.healthz_handler(verbose=True)
    said = orjson.loads(body)
    assert status == 503 and list(said) == ["status", "components"]
    assert said["components"]["dns"]["health"] == "HEALTH_DEGRADED"


async def test_everybody_hears_how_the_start_ended() -> None:
    """Those who wait and those who come later; a failure after ready is none of the start."""
    failed = CPStartupOrchestrator()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(failed.wait_outcome())
        await asyncio.sleep(0)
        failed.set_failed("port 53 is taken")
    assert waiting.result() == await failed.wait_outcome() == "port 53 is taken"
    failed.set_ready()
    assert not failed.is_ready
    ready = CPStartupOrchestrator()
    ready.set_ready()
    ready.set_failed("later")
    assert ready.is_ready and await ready.wait_outcome() == ""


async def test_a_stranger_at_the_port_is_no_answer(ca: TestCa, tmp_path: Path) -> None:
    """Plain TCP, a server of another CA, and nobody at all are all "no"."""
    (tmp_path / "other").mkdir()
    async with Endpoint(TestCa(tmp_path / "other")) as port:
        assert not await tls_answers("127.0.0.1", port, ca.client_context())
    assert not await tls_answers("127.0.0.1", port, ca.client_context())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    async with Endpoint(ca) as port:
        assert not await tls_answers("127.0.0.1", port, context)
