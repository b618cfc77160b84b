"""
The one process that is the outside world: servers on every test address, and a control socket.

Started by `world.World` in a network namespace of its own (`python -m clawker_cp.testing.world_server
DIRECTORY`), where it owns the test ranges. Answers control requests, one JSON line each, on
`DIRECTORY/control.sock`; writes its certificate authority to `DIRECTORY/ca.pem`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import struct
import subprocess
import sys
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncssh
import trustme

from clawker_cp.testing import world_names as names
from clawker_cp.testing.world_dns import NameServer
from clawker_cp.testing.world_http import serve_http
from clawker_cp.testing.world_packets import Sniffer

MAX_CONNECTIONS = 100_000
_IPV6_FREEBIND = 78
Record = dict[str, Any]
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Record], Awaitable[None]]


def plain(address: str) -> str:
    """
    An address without its IPv4-mapped prefix and zone.
    """
    return address.removeprefix("::ffff:").partition("%")[0]


class Log:
    """
    Every connection and datagram that servers accepted, in order. Beyond `MAX_CONNECTIONS` new ones are only counted.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.missed = 0

    def open(self, proto: str, service: str, src: tuple[Any, ...], dst: tuple[Any, ...]) -> Record:
        record: Record = {
            "proto": proto, "service": service, "src": plain(src[0]), "sport": src[1], "dst": plain(dst[0]),
            "dport": dst[1], "sni": "", "alpn": "", "bytes_in": 0, "payload": "", "requests": [], "closed": False,
        }  # fmt: skip
        if len(self.records) < MAX_CONNECTIONS:
            self.records.append(record)
        else:
            self.missed += 1
        return record


class Certificates:
    """
    A certificate authority that has a certificate ready for whatever name a client asks for.
    """

    def __init__(self) -> None:
        self._ca = trustme.CA()
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._asked: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()

    def write(self, path: Path) -> None:
        self._ca.cert_pem.write_to_path(str(path))

    def asked(self, connection: object) -> str:
        """The server name of a connection, empty without one."""
        return self._asked.get(connection, "")

    def context(self, name: str = "nameless.invalid") -> ssl.SSLContext:
        if name not in self._contexts:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._ca.issue_cert(name).configure_cert(context)
            context.set_alpn_protocols(["h2", "http/1.1"])
            context.sni_callback = self._choose
            self._contexts[name] = context
        return self._contexts[name]

    def _choose(self, connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        if name:
            self._asked[connection] = name
            connection.context = self.context(name)


class WorldServer:
    """
    All servers of the world, their log, and the control requests on them.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._log = Log()
        self._certificates = Certificates()
        self._names = NameServer(names.ZONE)
        self._sniffer = Sniffer()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Serve until told to stop; says `ready` on standard output when everything listens."""
        own_the_ranges()
        self._certificates.write(self._directory / "ca.pem")
        async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            self._sniffer.start()
            stack.callback(self._sniffer.close)
            await self._listen(stack, group)
            control = await asyncio.start_unix_server(
                self._control, str(self._directory / "control.sock"), limit=names.CONTROL_LINE_BYTES
            )
            stack.callback(control.close)
            sys.stdout.write("ready\n")
            sys.stdout.flush()
            await self._stop.wait()

    async def _listen(self, stack: contextlib.AsyncExitStack, group: asyncio.TaskGroup) -> None:
        for port in names.HTTP_PORTS:
            await self._stream(stack, port, "http", serve_http)
        for port in names.HTTPS_PORTS:
            await self._stream(stack, port, "https", serve_http, self._certificates.context())
        for port in names.TCP_ECHO_PORTS:
            await self._stream(stack, port, "echo", _echo)
        await self._stream(stack, names.DNS_PORT, "dns", self._dns_stream)
        for port in names.UDP_ECHO_PORTS:
            self._datagrams(stack, group, port, "echo")
        self._datagrams(stack, group, names.DNS_PORT, "dns")
        acceptor = await asyncssh.listen(
            sock=_listening(names.SSH_PORT), server_factory=lambda: _Ssh(self._log), process_factory=_ssh_command,
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
        )  # fmt: skip
        stack.callback(acceptor.close)

    async def _stream(
        self, stack: contextlib.AsyncExitStack, port: int, service: str, serve: Serve, tls: ssl.SSLContext | None = None
    ) -> None:
        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            record = self._log.open(
                "tcp", service, writer.get_extra_info("peername"), writer.get_extra_info("sockname")
            )
            session = writer.get_extra_info("ssl_object")
            if session is not None:
                record["sni"] = self._certificates.asked(session)
                record["alpn"] = session.selected_alpn_protocol() or ""
            try:
                await serve(reader, writer, record)
            except* (OSError, ssl.SSLError, asyncio.IncompleteReadError):
                pass  # a client that leaves early is what many tests are about
            finally:
                record["closed"] = True
                writer.close()

        server = await asyncio.start_server(accepted, sock=_listening(port), ssl=tls)
        stack.callback(server.close)

    async def _dns_stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: Record) -> None:
        while True:
            (length,) = struct.unpack("!H", await reader.readexactly(2))
            wire = await reader.readexactly(length)
            record["bytes_in"] += 2 + length
            reply = await self._names.answer(wire, "tcp", record["src"], record["dst"])
            if reply is not None:
                writer.write(struct.pack("!H", len(reply)) + reply)
                await writer.drain()

    def _datagrams(self, stack: contextlib.AsyncExitStack, group: asyncio.TaskGroup, port: int, service: str) -> None:
        server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        # Replies leave from addresses that are routed here without being assigned.
        server.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        server.bind(("::", port))
        server.setblocking(False)
        stack.callback(server.close)

        def send(data: bytes, info: bytes, peer: tuple[Any, ...]) -> None:
            # The reply leaves from the address that was asked, whichever of the range it is.
            with contextlib.suppress(OSError):
                server.sendmsg([data], [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, info[:16] + bytes(4))], 0, peer)

        async def resolve(data: bytes, info: bytes, peer: tuple[Any, ...], src: str, dst: str) -> None:
            reply = await self._names.answer(data, "udp", src, dst)
            if reply is not None:
                send(reply, info, peer)

        def readable() -> None:
            for _ in range(64):
                try:
                    data, ancillary, _flags, peer = server.recvmsg(65536, 256)
                except BlockingIOError:
                    return
                except OSError:
                    continue
                info = ancillary[0][2]
                target = plain(socket.inet_ntop(socket.AF_INET6, info[:16]))
                if service == "dns":
                    group.create_task(resolve(data, info, peer, plain(peer[0]), target), name="world-dns-answer")
                    continue
                record = self._log.open("udp", service, peer, (target, port))
                record["bytes_in"], record["payload"], record["closed"] = len(data), data.decode("latin-1"), True
                send(data, info, peer)

        asyncio.get_running_loop().add_reader(server, readable)

    async def _control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            request = json.loads(line)
            try:
                reply = {"ok": self._handle(**request)}
            except (ValueError, TypeError, KeyError) as error:
                reply = {"error": str(error)}
            writer.write(json.dumps(reply).encode() + b"\n")
            await writer.drain()
        writer.close()

    def _handle(self, op: str, **fields: Any) -> Any:
        match op:
            case "connections":
                return self._log.records
            case "packets":
                return self._sniffer.flows()
            case "queries":
                return list(self._names.queries)
            case "reset":
                self._log.records.clear()
                self._log.missed = 0
                self._sniffer.clear()
                self._names.restore()
            case "behave":
                self._names.behave(**fields)
            case "zone":
                self._names.replace(fields["name"], fields["types"])
            case "ttl":
                self._names.ttl_s = int(fields["seconds"])
            case "stop":
                self._stop.set()
            case _:
                raise ValueError(f"op: {op!r} is not known")
        return None


class _Ssh(asyncssh.SSHServer):
    """An SSH server that lets everybody in without asking."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._record: Record = {}

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._record = self._log.open("tcp", "ssh", conn.get_extra_info("peername"), conn.get_extra_info("sockname"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._record["closed"] = True

    def begin_auth(self, username: str) -> bool:
        self._record["requests"].append({"user": username})
        return False


async def _ssh_command(process: Any) -> None:
    process.stdout.write(f"world: {process.command or 'shell'}\n")
    process.exit(0)


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: Record) -> None:
    while data := await reader.read(65536):
        record["bytes_in"] += len(data)
        if len(record["payload"]) < 4096:
            record["payload"] += data[:4096].decode("latin-1")
        writer.write(data)
        await writer.drain()


def _listening(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("::", port))
    listener.listen(1024)
    listener.setblocking(False)
    return listener


def own_the_ranges() -> None:
    """
    Make every address of the test ranges local here, and everything else unreachable.
    """
    commands = ["link set lo up", "route add unreachable default metric 4278198272"]
    commands += ["route add unreachable ::/0 dev lo metric 4278198272"]
    commands += [f"route add local {network} dev lo" for network in names.RANGES_V4]
    commands += [f"route add local {network} dev lo" for network in names.RANGES_V6]
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, check=True)


if __name__ == "__main__":
    asyncio.run(WorldServer(Path(sys.argv[1])).run())
