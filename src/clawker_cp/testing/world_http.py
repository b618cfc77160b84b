"""
The HTTP servers of the test world: HTTP/1.1, HTTP/2 and WebSocket, plain or over TLS.

Any path echoes the request as JSON; a few paths do something else (`answer`). What was received is
noted in the connection's record, so that a test can prove what did and what did not arrive.
Owned by `world_server`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h11
from websockets.frames import Frame, Opcode
from websockets.http11 import Request as Handshake
from websockets.protocol import State
from websockets.server import ServerProtocol

GIB = 1 << 30
_CHUNK = bytes(128 * 1024)
_MAX_HEAD_BYTES = 64 * 1024
_TICK_S = 0.1


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it arrived; `target` is the raw path."""

    method: str
    target: str
    authority: str
    headers: list[tuple[str, str]]
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back; `length` None means unknown beforehand."""

    status: int
    headers: list[tuple[str, str]]
    body: AsyncIterator[bytes]
    length: int | None


async def _once(data: bytes) -> AsyncIterator[bytes]:
    if data:
        yield data


async def _zeros(count: int) -> AsyncIterator[bytes]:
    while count > 0:
        yield _CHUNK[: min(count, len(_CHUNK))]
        count -= len(_CHUNK)


async def _ticks() -> AsyncIterator[bytes]:
    while True:
        yield b"tick\n"
        await asyncio.sleep(_TICK_S)


def answer(request: Request, record: dict[str, Any], version: str) -> Answer:
    """
    Decide what a request gets.

    `/big[/N]` N zero bytes, 1 GiB by default; `/ticks` one line each 0.1 s for ever; `/status/N` that
    status; `/redirect?to=URL` a redirect; anything else the request as JSON.
    """
    parts = urlsplit(request.target)
    words = parts.path.strip("/").split("/")
    if words[0] == "big":
        count = int(words[1]) if len(words) > 1 else GIB
        return Answer(200, [("content-type", "application/octet-stream")], _zeros(count), count)
    if words[0] == "ticks":
        return Answer(200, [("content-type", "text/plain")], _ticks(), None)
    headers = [("content-type", "application/json")]
    status = int(words[1]) if words[0] == "status" and len(words) > 1 else 200
    if words[0] == "redirect":
        status = 302
        headers.append(("location", parse_qs(parts.query).get("to", ["/"])[0]))
    shown = {
        "method": request.method,
        "target": request.target,
        "host": request.authority,
        "headers": request.headers,
        "body_bytes": len(request.body),
        "body": request.body[:4096].decode("latin-1"),
        "version": version,
        "sni": record["sni"],
        "address": record["dst"],
        "port": record["dport"],
    }
    text = json.dumps(shown).encode() + b"\n"
    return Answer(status, headers, _once(text), len(text))


def _note(record: dict[str, Any], request: Request) -> None:
    record["requests"].append(
        {
            "method": request.method,
            "target": request.target,
            "host": request.authority,
            "headers": request.headers,
            "body_bytes": len(request.body),
        }
    )


async def serve_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: dict[str, Any]) -> None:
    """
    Speak HTTP on one accepted connection until either side ends it.
    """
    if record["alpn"] == "h2":
        await _Http2(reader, writer, record).run()
        return
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _MAX_HEAD_BYTES:
        data = await reader.read(65536)
        if not data:
            return
        _received(record, data)
        if not head and data.startswith(b"PRI * HTTP/2"):
            await _Http2(reader, writer, record, data).run()
            return
        head += data
    # An origin that knows no WebSockets answers such a request like any other.
    if b"upgrade: websocket" in head.lower() and b" /status/" not in head.partition(b"\r\n")[0]:
        await _websocket(reader, writer, record, head)
    else:
        await _http1(reader, writer, record, head)


def _received(record: dict[str, Any], data: bytes) -> None:
    record["bytes_in"] += len(data)
    if len(record["payload"]) < 4096:
        record["payload"] += data[:4096].decode("latin-1")


async def _http1(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: dict[str, Any], first: bytes
) -> None:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(first)

    async def event() -> Any:
        while (found := connection.next_event()) is h11.NEED_DATA:
            if connection.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
                writer.write(connection.send(go_on) or b"")
            data = await reader.read(65536)
            _received(record, data)
            connection.receive_data(data)
        return found

    while True:
        start = await event()
        if not isinstance(start, h11.Request):
            return
        body = bytearray()
        while isinstance(part := await event(), h11.Data):
            body += part.data
        headers = [(key.decode("latin-1"), value.decode("latin-1")) for key, value in start.headers]
        authority = next((value for key, value in headers if key == "host"), "")
        request = Request(start.method.decode(), start.target.decode("latin-1"), authority, headers, bytes(body))
        _note(record, request)
        reply = answer(request, record, "1." + start.http_version.decode()[-1])
        fields = list(reply.headers)
        if reply.length is not None:
            fields.append(("content-length", str(reply.length)))
        writer.write(connection.send(h11.Response(status_code=reply.status, headers=fields)) or b"")
        if request.method != "HEAD":
            async for chunk in reply.body:
                writer.write(connection.send(h11.Data(data=chunk)) or b"")
                await writer.drain()
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()
        if connection.our_state is h11.MUST_CLOSE:
            return
        connection.start_next_cycle()


async def _websocket(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: dict[str, Any], first: bytes
) -> None:
    protocol = ServerProtocol()
    data = first
    while data:
        protocol.receive_data(data)
        for event in protocol.events_received():
            if isinstance(event, Handshake):
                record["requests"].append({"method": "GET", "target": event.path, "websocket": True})
                protocol.send_response(protocol.accept(event))
            elif isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                protocol.send_text(bytes(event.data), event.fin)
            elif isinstance(event, Frame) and event.opcode is Opcode.BINARY:
                protocol.send_binary(bytes(event.data), event.fin)
        for piece in protocol.data_to_send():
            if piece:
                writer.write(piece)
        await writer.drain()
        if protocol.state is State.CLOSED or protocol.close_expected():
            return
        data = await reader.read(65536)
        _received(record, data)


class _Http2:
    """One HTTP/2 connection: each stream is answered by a task of the connection's own group."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: dict[str, Any], first: bytes = b""
    ) -> None:
        self._reader, self._writer, self._record, self._first = reader, writer, record, first
        config = h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        self._h2 = h2.connection.H2Connection(config)
        self._open: dict[int, tuple[list[tuple[str, str]], bytearray]] = {}
        self._window = asyncio.Event()
        self._answers: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        self._h2.initiate_connection()
        async with asyncio.TaskGroup() as group:
            data = self._first
            self._flush()
            while True:
                if data:
                    for event in self._h2.receive_data(data):
                        self._on(event, group)
                    self._flush()
                data = await self._reader.read(65536)
                _received(self._record, data)
                if not data:
                    break
            for task in self._answers:
                task.cancel()

    def _on(self, event: Any, group: asyncio.TaskGroup) -> None:
        if isinstance(event, h2.events.RequestReceived):
            self._open[event.stream_id] = ([(str(k), str(v)) for k, v in event.headers], bytearray())
        elif isinstance(event, h2.events.DataReceived):
            if event.stream_id in self._open:
                self._open[event.stream_id][1].extend(event.data)
            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded) and event.stream_id in self._open:
            headers, body = self._open.pop(event.stream_id)
            task = group.create_task(self._answer(event.stream_id, headers, bytes(body)), name="world-h2-answer")
            self._answers.add(task)
            task.add_done_callback(self._answers.discard)
        elif isinstance(event, h2.events.WindowUpdated | h2.events.RemoteSettingsChanged | h2.events.StreamReset):
            self._window.set()

    async def _answer(self, stream: int, headers: list[tuple[str, str]], body: bytes) -> None:
        pseudo = dict(item for item in headers if item[0].startswith(":"))
        request = Request(
            pseudo[":method"], pseudo.get(":path", ""), pseudo.get(":authority", ""),
            [item for item in headers if not item[0].startswith(":")], body,
        )  # fmt: skip
        _note(self._record, request)
        reply = answer(request, self._record, "2")
        fields = [(":status", str(reply.status)), *reply.headers]
        if reply.length is not None:
            fields.append(("content-length", str(reply.length)))
        try:
            self._h2.send_headers(stream, fields, end_stream=request.method == "HEAD")
            self._flush()
            if request.method != "HEAD":
                async for chunk in reply.body:
                    await self._send(stream, chunk)
                self._h2.end_stream(stream)
                self._flush()
        except h2.exceptions.ProtocolError:
            return  # the peer reset the stream or left

    async def _send(self, stream: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            room = min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size, len(view))
            if room <= 0:
                self._window.clear()
                await self._window.wait()
                continue
            self._h2.send_data(stream, view[:room].tobytes())
            view = view[room:]
            self._flush()
            await self._writer.drain()

    def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data:
            self._writer.write(data)
