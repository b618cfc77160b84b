"""
The Docker engine over a test's own daemon, and its events as somebody follows them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from clawker_cp.config import NetworkSettings
from clawker_cp.engines.docker.engine import DockerEngine
from clawker_cp.engines.docker.network import ensure_network
from clawker_cp.engines.docker_client import DockerClient
from clawker_cp.engines.dockerevents import DockerEvent, DockerEventFeeder
from clawker_cp.testing.docker_world import DockerWorld

LIMIT_S = 30


async def engine_of(world: DockerWorld, **options: Any) -> DockerEngine:
    return DockerEngine(
        world.client, await ensure_network(world.client, NetworkSettings(), own_container_id=None), **options
    )


class Followed:
    """What a feeder published, and waiting for a part of it."""

    def __init__(self, client: DockerClient, engine: DockerEngine | None) -> None:
        self.seen: list[DockerEvent] = []
        self.changes: list[str] = []
        self._engine = engine
        self._news = asyncio.Event()
        self.feeder = DockerEventFeeder(client, self._take, changed=self.changes.append)

    def _take(self, event: DockerEvent) -> None:
        self.seen.append(event)
        if self._engine is not None:
            self._engine.take_event(event)
        self._news.set()

    async def until(self, wanted: Callable[[DockerEvent], bool]) -> DockerEvent:
        async with asyncio.timeout(LIMIT_S):
            while True:
                for event in self.seen:
                    if wanted(event):
                        return event
                self._news.clear()
                await self._news.wait()

    async def action(self, action: str, number: str) -> DockerEvent:
        return await self.until(lambda event: event.action == action and event.container_id == number)

    def actions(self, number: str) -> list[str]:
        return [event.action for event in self.seen if event.kind == "container" and event.id == number]


@asynccontextmanager
async def followed(world: DockerWorld, engine: DockerEngine | None = None) -> AsyncIterator[Followed]:
    following = Followed(world.client, engine)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(following.feeder.run())
        try:
            async with asyncio.timeout(LIMIT_S):
                await following.feeder.following.wait()
            yield following
        finally:
            task.cancel()
