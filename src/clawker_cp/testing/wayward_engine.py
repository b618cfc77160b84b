"""
A peer that speaks as much of the Docker engine's API as a bad day needs: silent, slow, cut short, or wrong.

What a healthy daemon does is tested with a real one (`docker_world`); this plays what cannot be asked of it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Behaviour = Callable[["Request"], None]
PAUSE_S = 0.02


class Request:
    """One request: its method and path, and the means to answer it badly."""

    def __init__(self, engine: WaywardEngine, connection: socket.socket, method: str, path: str) -> None:
        self.engine = engine
        self.connection = connection
        self.method = method
        self.path = path

    def answer(self, status: int, body: Any) -> None:
        """A whole answer; JSON unless it is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        self.connection.sendall(head.encode() + data)

    def begin_chunks(self) -> None:
        """The head of an answer without an end."""
        head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        self.connection.sendall(head.encode())

    def chunk(self, data: bytes) -> None:
        self.connection.sendall(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def end_chunks(self) -> None:
        self.connection.sendall(b"0\r\n\r\n")

    def wait_gone(self) -> None:
        """Return when the client has closed the connection, or the engine ends."""
        with contextlib.suppress(OSError):
            self.connection.recv(1)
        self.engine.gone.set()


def silent(request: Request) -> None:
    """Take the request and never answer."""
    request.wait_gone()


def trickle(request: Request) -> None:
    """Answer a byte at a time, for ever: no single read takes long."""
    request.begin_chunks()
    with contextlib.suppress(OSError):
        while not request.engine.ending.wait(PAUSE_S):
            request.chunk(b" ")
    request.engine.gone.set()


def cut_short(request: Request) -> None:
    """Promise more than is sent, and close."""
    request.connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"Id":')
    request.connection.shutdown(socket.SHUT_RDWR)


def said(status: int, body: Any) -> Behaviour:
    """Answer with a status and a body."""
    return lambda request: request.answer(status, body)


class WaywardEngine:
    """
    Listens on `path`. `behaviours` maps the end of a request's path (without query) to what happens; `/version`
    answers unless it is mapped. `requests` is what came in; `gone` is set when a client left one unanswered.
    """

    def __init__(self, path: Path, api_version: str = "1.41") -> None:
        self.path = path
        self.endpoint = f"unix://{path}"
        self.behaviours: dict[str, Behaviour] = {"/version": said(200, {"ApiVersion": api_version})}
        self.requests: list[str] = []
        self.gone = threading.Event()
        self.ending = threading.Event()
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def __enter__(self) -> Self:
        self._listener.bind(str(self.path))
        self._listener.listen(64)
        self._spawn(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ending.set()
        for sock in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(10)
        self.path.unlink(missing_ok=True)

    @property
    def open_connections(self) -> int:
        """Connections that were accepted so far."""
        return len(self._connections)

    def _spawn(self, action: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=action, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                self._spawn(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as lines:
            while line := lines.readline():
                method, target, _ = line.decode().split(" ", 2)
                length = 0
                while (header := lines.readline()) not in {b"\r\n", b""}:
                    name, _, value = header.decode().partition(":")
                    if name.lower() == "content-length":
                        length = int(value)
                lines.read(length)
                path = target.partition("?")[0]
                self.requests.append(f"{method} {target}")
                behaviour = next((act for end, act in self.behaviours.items() if path.endswith(end)), said(404, {}))
                behaviour(Request(self, connection, method, path))
