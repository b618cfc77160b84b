"""CoreDNS as a container: kept running, said when it is not, gone when we are."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import structlog

from clawker_cp.errors import Unavailable
from clawker_cp.wiring.coredns_container import CoreDnsContainer


class Container:
    """An engine's container with a health port of its own, as far as this part sees it; `refuse` starts fail."""

    def __init__(self, refuse: int = 0) -> None:
        self.refuse = refuse
        self.starts = self.stops = 0
        self.ended = asyncio.Event()
        self.server: asyncio.Server | None = None

    async def listen(self) -> str:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nOK")
            await writer.drain()
            writer.close()

        self.server = await asyncio.start_server(answer, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/health"

    async def start(self, digest: str) -> bool:
        self.starts += 1
        if self.starts <= self.refuse:
            raise Unavailable("the engine is away")
        self.ended.clear()
        return False

    async def wait(self) -> None:
        await self.ended.wait()

    async def stop(self) -> None:
        self.stops += 1


async def test_it_comes_back_and_leaves_with_us(tmp_path: Path) -> None:
    """A start that fails and an end are told and undone with a pause; cancelling removes the container."""
    container = Container(refuse=1)
    url = await container.listen()
    corefile = tmp_path / "coredns" / "Corefile"
    part = CoreDnsContainer(container, corefile, ".:53 {}\n", url)
    with structlog.testing.capture_logs() as lines:
        running = asyncio.ensure_future(part.run())
        async with asyncio.timeout(20):
            while not part.running:
                await asyncio.sleep(0.01)
            container.ended.set()
            while part.restarts < 2 or not part.running:
                await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert container.server is not None
    container.server.close()

    causes = [line["cause"] for line in lines if line["event"] == "coredns_unavailable"]
    assert causes == ["the engine is away", "the container ended"]
    assert (container.starts, container.stops, part.running) == (3, 1, False)
    assert corefile.read_text() == ".:53 {}\n"
