"""
Published ports: 127.0.0.1:HOST_PORT of the host to a TCP port of a sandbox (ruling R33).

A forwarder in this process: reachable from the host itself only, and its connections come from
the gateway address, which is the one the kernel side admits.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

import structlog

from clawker_cp.engines.base import Publish
from clawker_cp.errors import Conflict

log = structlog.get_logger()

CHUNK_BYTES = 65536
CONNECT_LIMIT_S = 5.0
CONNECTIONS_LIMIT = 512  # per port; further ones are closed at once


class Publisher:
    """
    Owns the listening sockets of all sandboxes, and closes connections with them.
    """

    def __init__(self, gateway: str) -> None:
        self._gateway = gateway
        self._ports: dict[str, list[_Port]] = {}

    async def publish(self, sandbox_id: str, address: str, ports: Sequence[Publish]) -> tuple[Publish, ...]:
        """
        Listen for each port; returns them with the chosen host ports. `Conflict` names a busy one.
        """
        made = []
        for item in ports:
            port = _Port(self._gateway, address, item.port)
            try:
                chosen = await port.open(item.host_port)
            except OSError as error:
                await self.withdraw(sandbox_id)
                words = os.strerror(error.errno) if error.errno else str(error)
                raise Conflict(f"--publish: 127.0.0.1:{item.host_port} cannot be had: {words}") from error
            self._ports.setdefault(sandbox_id, []).append(port)
            made.append(Publish(chosen, item.port))
        return tuple(made)

    async def withdraw(self, sandbox_id: str) -> None:
        """
        Stop listening for a sandbox and close what it has open.
        """
        for port in self._ports.pop(sandbox_id, ()):
            await port.close()

    async def aclose(self) -> None:
        """
        Stop listening for all.
        """
        for sandbox_id in list(self._ports):
            await self.withdraw(sandbox_id)


class _Port:
    """One listening socket and the connections that came through it."""

    def __init__(self, gateway: str, address: str, port: int) -> None:
        self._gateway = gateway
        self._address = address
        self._port = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._closed = False

    async def open(self, host_port: int) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", host_port)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        self._closed = True
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        # One that still dials has no inner writer to abort: it would open after the withdrawal.
        for task in self._serving:
            task.cancel()
        if self._serving:
            await asyncio.wait(list(self._serving), timeout=CONNECT_LIMIT_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if self._closed or task is None or len(self._writers) >= 2 * CONNECTIONS_LIMIT:
            writer.transport.abort()
            return
        self._serving.add(task)
        try:
            await self._forward(reader, writer)
        except asyncio.CancelledError:
            # The stream server of Python 3.11 reports a cancelled handler as a failure.
            if not self._closed:
                raise
        finally:
            self._serving.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        inner: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(CONNECT_LIMIT_S):
                inner_reader, inner = await asyncio.open_connection(
                    self._address, self._port, local_addr=(self._gateway, 0)
                )
            self._writers.add(inner)
            async with asyncio.TaskGroup() as group:
                group.create_task(_copy(reader, inner), name="publish-in")
                group.create_task(_copy(inner_reader, writer), name="publish-out")
        except (OSError, TimeoutError) as error:
            log.info("engines_publish_refused", address=self._address, port=self._port, error=str(error))
        finally:
            for end in (writer, inner):
                if end is not None:
                    self._writers.discard(end)
                    end.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except OSError:
        return
