"""TLS 1.2 is refused in the handshake, and nobody inherits how."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from h2.connection import H2Connection
from h2.events import ResponseReceived, TrailersReceived

import clawker_cp.rpc
from clawker_cp.rpc.transport import SUITES_VARIABLE, grpc
from clawker_cp.testing.rpc_world import ONE, RpcWorld

# In a process of its own: grpc reads its cipher suites once per process, and other tests import grpc first.
CHILD = """
import asyncio, os, sys
from pathlib import Path
{first}
from clawker_cp.rpc.services import admin_service
from clawker_cp.rpc import transport
from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.rpc.server import RpcServer
from clawker_cp.rpc.tls import TlsMaterial
from clawker_cp.testing.rpc_world import SCOPES, Authority, Kinds

certificate, key, ca = (Path(path).read_bytes() for path in sys.argv[1:4])

async def main():
    server = RpcServer(
        "child", ["127.0.0.1:0"], lambda: TlsMaterial(certificate, key, ca), AuthInterceptor(Authority(), SCOPES),
        [Kinds().register],
    )
    (port,) = await server.start()
    print(port, transport.TLS_1_3_ONLY, os.environ.get(transport.SUITES_VARIABLE), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)

asyncio.run(main())
"""


@asynccontextmanager
async def serving(
    world: RpcWorld, stderr: Path, *, before: str | None = None, first: str = ""
) -> AsyncIterator[tuple[int, str, str]]:
    """A server in a child: its port, whether it refuses TLS 1.2, and what its environment says of suites."""
    environment = {key: value for key, value in os.environ.items() if key != SUITES_VARIABLE}
    if before is not None:
        environment[SUITES_VARIABLE] = before
    with stderr.open("wb") as said:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CHILD.format(first=first), str(world.server.certificate), str(world.server.key),
            str(world.ca.certificate),
            env=environment, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=said,
        )  # fmt: skip
    try:
        assert child.stdout is not None
        async with asyncio.timeout(30):
            port, only, variable = (await child.stdout.readline()).decode().split()
        yield int(port), only, variable
    finally:
        assert child.stdin is not None
        child.stdin.close()
        async with asyncio.timeout(30):
            await child.wait()


async def handshake(port: int, world: RpcWorld, version: ssl.TLSVersion) -> str:
    """The version agreed on with a client that offers one version and a good certificate, or what went wrong."""
    context = world.ca.client_context()
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(world.cli.certificate, world.cli.key)
    try:
        async with asyncio.timeout(10):
            _, writer = await asyncio.open_connection("localhost", port, ssl=context)
    except (ssl.SSLError, ConnectionError):
        return "refused"
    agreed: str = writer.get_extra_info("ssl_object").version()
    writer.close()
    return agreed


async def grpc_status(port: int, world: RpcWorld) -> tuple[str, str]:
    """Status and message of a call over TLS 1.2, spoken by hand: grpc's own client always takes the newest version."""
    context = world.ca.client_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(world.cli.certificate, world.cli.key)
    reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
    connection = H2Connection()
    connection.initiate_connection()
    head = {":method": "POST", ":scheme": "https", ":path": ONE, ":authority": "localhost"}
    rest = {"content-type": "application/grpc", "te": "trailers", "authorization": "Bearer good"}
    connection.send_headers(1, list({**head, **rest}.items()))
    connection.send_data(1, bytes(5), end_stream=True)
    said: dict[str, str] = {}
    async with asyncio.timeout(10):
        while "grpc-status" not in said:
            writer.write(connection.data_to_send())
            for event in connection.receive_data(await reader.read(65536)):
                if isinstance(event, ResponseReceived | TrailersReceived):
                    said |= {_text(key): _text(value) for key, value in event.headers or ()}
    writer.close()
    return said["grpc-status"], said["grpc-message"]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


@pytest.mark.slow
@pytest.mark.parametrize(("late", "before"), [(False, None), (False, "HIGH"), (True, None)])
async def test_tls_1_2_is_refused_in_the_handshake(tmp_path: Path, before: str | None, late: bool) -> None:
    """A client that offers nothing newer gets no connection; where grpc came first, its calls are refused."""
    world = RpcWorld(tmp_path)
    first = "import grpc" if late else ""
    async with serving(world, tmp_path / "stderr", before=before, first=first) as (port, only, variable):
        assert (only, variable) == (str(not late), str(before))
        assert await handshake(port, world, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        if late:
            expected = (str(grpc.StatusCode.UNAUTHENTICATED.value[0]), "TLS 1.3 with a client certificate required")
            assert await grpc_status(port, world) == expected
        else:
            assert await handshake(port, world, ssl.TLSVersion.TLSv1_2) == "refused"


@pytest.mark.slow
async def test_handshakes_that_fail_fill_no_disk(tmp_path: Path) -> None:
    """Whatever strangers send to the port before they have proved anything leaves no line on stderr."""
    world = RpcWorld(tmp_path)
    async with serving(world, tmp_path / "stderr") as (port, _only, _variable):
        for data in (b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\xff\xff", bytes(64)):
            reader, writer = await asyncio.open_connection("localhost", port)
            writer.write(data)
            writer.write_eof()
            async with asyncio.timeout(20):
                await reader.read()
            writer.close()
        assert await handshake(port, world, ssl.TLSVersion.TLSv1_2) == "refused"

    assert (tmp_path / "stderr").read_text() == ""


def test_everything_in_rpc_takes_grpc_from_here() -> None:
    """An import elsewhere could be the first, and then TLS 1.2 would be taken."""
    package = Path(clawker_cp.rpc.__path__[0])
    direct = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"^\s*(import grpc|from grpc)\b", path.read_text(), re.MULTILINE)
    }
    assert direct == {"transport.py"}


def test_the_server_program_loads_grpc_through_here() -> None:
    """Nothing it imports did so before."""
    code = "import clawker_cp.cli.serve, clawker_cp.rpc.server, clawker_cp.rpc.services\n"
    code += "from clawker_cp.rpc.transport import TLS_1_3_ONLY\nprint(TLS_1_3_ONLY)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout == "True\n"
