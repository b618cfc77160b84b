"""
HTTP and HTTPS listeners inside this process and its loop.

HTTP/1.1, bounded heads and bodies; a connection that says nothing for five seconds is closed. Certificates
are taken over by changing the SSL context that is passed in.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from typing import Any

from hypercorn.asyncio import serve
from hypercorn.config import Config

from clawker_cp.errors import Conflict
from clawker_cp.runtime.asgi import Application

HEAD_BYTES = 16 * 1024
IDLE_S = 5.0
BACKLOG = 256
CLOSE_S = 2.0


class _Tls(Config):
    """A configuration whose SSL context is ours, so that it can be given a new pair while it serves."""

    context: ssl.SSLContext | None = None

    @property
    def ssl_enabled(self) -> bool:
        return self.context is not None

    def create_ssl_context(self) -> ssl.SSLContext | None:
        return self.context


class HttpListener:
    """
    One application on some addresses. `open` binds, `run` serves until `close`.
    """

    def __init__(self, name: str, application: Application, addresses: Sequence[tuple[str, int]]) -> None:
        self._name = name
        self._application = application
        self._addresses = tuple(addresses)
        self._sockets: list[socket.socket] = []
        self._closed = asyncio.Event()

    @property
    def ports(self) -> list[int]:
        """The bound ports, in the order of the addresses."""
        return [int(sock.getsockname()[1]) for sock in self._sockets]

    def open(self) -> None:
        """
        Bind every address, or none: raises `Conflict` naming the one that cannot be had.
        """
        for host, port in self._addresses:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((host, port))
                sock.listen(BACKLOG)
            except OSError as error:
                sock.close()
                self._release()
                raise Conflict(
                    f"{self._name}: cannot listen on {host}:{port}: {error.strerror}",
                    code="PORT_TAKEN",
                    hint="stop what listens there, or choose another port in settings.yaml",
                ) from error
            sock.setblocking(False)
            self._sockets.append(sock)

    async def run(self, tls: ssl.SSLContext | None = None) -> None:
        """
        Serve until `close` or cancelled, in plain text without `tls`; requests in flight get two seconds.
        """
        config = _Tls()
        config.context = tls
        config.bind = [f"fd://{sock.detach()}" for sock in self._sockets]
        self._sockets = []
        config.h11_max_incomplete_size = HEAD_BYTES
        config.keep_alive_timeout = IDLE_S
        config.graceful_timeout = CLOSE_S
        config.ssl_handshake_timeout = IDLE_S
        config.include_server_header = False
        config.accesslog = config.errorlog = None
        application: Any = self._application
        await serve(application, config, mode="asgi", shutdown_trigger=self._closed.wait)

    def close(self) -> None:
        """
        End `run`, and give back what was bound and never served.
        """
        self._closed.set()
        self._release()

    def _release(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._sockets = []
