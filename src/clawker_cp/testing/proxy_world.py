"""
A real Envoy with a real outside, in a network namespace of the test's own.

The thread that runs a test lives in the namespace, and so do sockets, Envoy and servers that it
starts; nothing of the host's network is visible.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, cast

import dns.message
import dns.rcode
import dns.rrset
import trustme

from clawker_cp.firewall.compile import Compiled
from clawker_cp.firewall.envoy.options import EnvoyOptions, find_binary
from clawker_cp.firewall.envoy.stack import EnvoyStack, envoy_command
from clawker_cp.firewall.inspection import InspectionAuthority
from clawker_cp.firewall.rules import Rule
from clawker_cp.processes.lasting import LastingProcess
from clawker_cp.testing.plan_world import build

PROXY = "10.231.80.1"
OUTSIDE = "198.51.100.10"
RESOLVER_PORT = 9953
_CLONE_NEWNET = 0x40000000


class ProxyView(asyncio.DatagramProtocol):
    """A DNS server with a fixed zone; every other name does not exist."""

    def __init__(self, zone: dict[str, str]) -> None:
        self.zone = zone
        self.asked: list[str] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)  # uvloop's is none by inheritance

    def datagram_received(self, data: bytes, addr: Any) -> None:
        query = dns.message.from_wire(data)
        name = query.question[0].name.to_text(omit_final_dot=True).lower()
        self.asked.append(name)
        answer = dns.message.make_response(query)
        address = self.zone.get(name) or self.zone.get("*." + name.partition(".")[2])
        if address is None:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        elif query.question[0].rdtype == dns.rdatatype.A:
            answer.answer.append(dns.rrset.from_text(query.question[0].name, 60, "IN", "A", address))
        self.transport.sendto(answer.to_wire(), addr)


class Outside:
    """Servers of the outside: HTTP/1.1 with and without TLS, and an echo; they tell what they saw."""

    def __init__(self) -> None:
        self.authority = trustme.CA()
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.servers: list[asyncio.Server] = []

    def tls(self, *names: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(*names).configure_cert(context)
        return context

    async def http(self, port: int, *names: str, host: str = OUTSIDE) -> None:
        context = self.tls(*names) if names else None
        self.servers.append(await asyncio.start_server(self._answer, host, port, ssl=context))

    async def echo(self, port: int, host: str = OUTSIDE) -> None:
        self.servers.append(await asyncio.start_server(self._echo, host, port))

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, _ = head[0].split(" ")
                headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
                self.requests.append((method, path, headers))
                await reader.readexactly(int(headers.get("content-length", "0")))
                if headers.get("upgrade", "").lower() == "websocket":
                    writer.write(b"HTTP/1.1 101 Switching\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n")
                    await self._echo(reader, writer)
                    return
                body = f"{method} {path} {headers['host']}".encode()
                writer.write(b"HTTP/1.1 200 OK\r\nserver: outside\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
                await writer.drain()
        writer.close()

    async def _echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def aclose(self) -> None:
        for server in self.servers:
            server.close()


class ProxyWorld:
    """Envoy, the outside, and the means to apply rules."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.outside = Outside()
        self.view = ProxyView({})
        self.authority = InspectionAuthority(directory / "certs")
        roots = directory / "roots.pem"
        roots.write_bytes(self.outside.authority.cert_pem.bytes())
        self.options = EnvoyOptions(directory / "envoy", PROXY, roots, resolver=("127.0.0.1", RESOLVER_PORT))
        self.compiled: Compiled = build()
        self.stack = self.make_stack()

    def make_stack(self) -> EnvoyStack:
        """A driver of its own for the same files: what the next control plane would have."""
        process = LastingProcess(
            "envoy",
            envoy_command(find_binary(), self.options),
            self.directory / "envoy.pid",
            self.options.log,
        )
        return EnvoyStack(self.options, process, self.authority)

    def compile(self, rules: Iterable[Rule], **more: Any) -> Compiled:
        """Compile with sticky numbers."""
        self.compiled = build(*rules, allocations=self.compiled.allocations, **more)
        return self.compiled

    async def start(self, *rules: Rule, **more: Any) -> None:
        self.authority.open()
        loop = asyncio.get_running_loop()
        await loop.create_datagram_endpoint(lambda: self.view, ("127.0.0.1", RESOLVER_PORT))
        await self.stack.start(self.compile(rules, **more).plan)

    async def apply(self, *rules: Rule, **more: Any) -> int:
        return await self.stack.apply(self.compile(rules, **more).plan)

    def trust(self) -> ssl.SSLContext:
        """What an agent trusts: the inspection CA."""
        return ssl.create_default_context(cadata=self.authority.certificate_pem())

    async def connect(
        self, host: str, *, port: int = 10000, tls: bool = True, trust: ssl.SSLContext | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the egress listener as the kernel would: another address, the same SNI."""
        context = (trust or self.trust()) if tls else None
        return await asyncio.open_connection(PROXY, port, ssl=context, server_hostname=host if tls else None)

    async def request(
        self,
        url: str,
        *,
        method: str = "GET",
        sni: str = "",
        port: int = 10000,
        headers: Iterable[str] = (),
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one raw HTTP/1.1 request through the proxy."""
        scheme, _, rest = url.partition("://")
        authority, slash, path = rest.partition("/")
        host = authority.partition(":")[0]
        async with asyncio.timeout(15):
            reader, writer = await self.connect(sni or host, port=port, tls=scheme == "https")
            try:
                lines = [f"{method} {slash}{path} HTTP/1.1", f"Host: {authority}", *headers, "", ""]
                writer.write("\r\n".join(lines).encode())
                return await read_response(reader)
            finally:
                writer.close()

    async def aclose(self) -> None:
        await self.stack.stop()
        await self.outside.aclose()
        self.view.transport.close()
        await asyncio.sleep(0)  # transports close in the next round of the loop


async def read_response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Read status, headers and body of one HTTP/1.1 answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
    status = int(head[0].split(" ")[1])
    body = b"" if status == 101 else await reader.readexactly(int(headers.get("content-length", "0")))
    return status, headers, body


@contextlib.asynccontextmanager
async def proxy_world(directory: Path, *rules: Rule, **more: Any) -> AsyncIterator[ProxyWorld]:
    """A started world; everything it started is gone afterwards."""
    world = ProxyWorld(directory)
    try:
        await world.start(*rules, **more)
        yield world
    finally:
        await world.aclose()


def run_in_namespace(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """
    Run a coroutine in a thread that has a network namespace of its own, and raise what it raises.

    Processes and threads that it starts live in that namespace too; it ends with the last of them.
    """
    failures: list[BaseException] = []

    def body() -> None:
        try:
            _enter_namespace()
            asyncio.run(main())
        except BaseException as failure:  # noqa: BLE001  # handed over to the test's thread
            failures.append(failure)

    thread = threading.Thread(target=body, name="namespace")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def _enter_namespace() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    for arguments in (
        "link set lo up",
        f"address add {PROXY}/20 dev lo",
        "route add local 198.51.100.0/24 dev lo",
        "route add local 203.0.113.0/24 dev lo",
    ):
        subprocess.run(["ip", *arguments.split()], check=True, timeout=10)


async def refusal(world: ProxyWorld, url: str, **more: Any) -> tuple[int, str]:
    """Status and reason of a refusal; "" for an answer of the origin."""
    status, headers, body = await world.request(url, **more)
    if headers.get("server") == "outside":
        return status, ""
    return status, json.loads(body)["reason"]


async def answering(world: ProxyWorld, *names: str) -> None:
    world.view.zone.update(dict.fromkeys(names, OUTSIDE))
    await world.outside.http(443, *names)
