"""
Published ports: 127.0.0.1:HOST_PORT of the host to a TCP port of a sandbox (ruling R33).

A forwarder in this process: reachable from the host itself only, and its connections come from
the gateway address, which is the one the kernel side admits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from clawker_cp.engines.base import Publish
from clawker_cp.errors import Conflict

CHUNK_BYTES = 65536
CONNECT_LIMIT_S = 5.0


class Publisher:
    """
    Owns the listening sockets of all sandboxes.
    """

    def __init__(self) -> None:
        self._servers: dict[str, list[asyncio.Server]] = {}

    async def publish(self, sandbox_id: str, address: str, ports: Sequence[Publish]) -> tuple[Publish, ...]:
        """
        Listen for each port; returns them with the chosen host ports. `Conflict` names a busy one.
        """
        made = []
        for item in ports:
            try:
                server = await asyncio.start_server(_forwarder(address, item.port), "127.0.0.1", item.host_port)
            except OSError as error:
                await self.withdraw(sandbox_id)
                raise Conflict(f"--publish: 127.0.0.1:{item.host_port} cannot be had: {error.strerror}") from error
            self._servers.setdefault(sandbox_id, []).append(server)
            made.append(Publish(server.sockets[0].getsockname()[1], item.port))
        return tuple(made)

    async def withdraw(self, sandbox_id: str) -> None:
        """
        Stop listening for a sandbox.
        """
        for server in self._servers.pop(sandbox_id, ()):
            server.close()

    async def aclose(self) -> None:
        for sandbox_id in list(self._servers):
            await self.withdraw(sandbox_id)


def _forwarder(address: str, port: int):  # type: ignore[no-untyped-def]
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(CONNECT_LIMIT_S):
                inner_reader, inner_writer = await asyncio.open_connection(address, port)
        except (OSError, TimeoutError):
            writer.close()
            return
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_copy(reader, inner_writer), name="publish-in")
                group.create_task(_copy(inner_reader, writer), name="publish-out")
        finally:
            inner_writer.close()
            writer.close()

    return serve


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except OSError:
        return
