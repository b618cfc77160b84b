"""
Server and client of test_bench_rpc_unary.py, each a process on a core of its own.

`python rpc_parts.py server DIRECTORY TTL ADDRESSES` serves AdminService and prints its port; TTL "none" is without
interceptors, 0 asks the authority for every call. `python rpc_parts.py client DIRECTORY PORT TOKENS RPC IN_FLIGHT
SECONDS` calls and prints a JSON line. ADDRESSES and TOKENS are what authority_server.py said and wrote.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
import sys
import time
from pathlib import Path
from typing import Any

import uvloop
from google.protobuf.message import Message

from clawker_cp._proto.clawker.admin.v1 import admin_pb2
from clawker_cp.auth.introspect import HydraIntrospector
from clawker_cp.auth.scopes import admin_method_scopes
from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.rpc.limits import listener_options
from clawker_cp.rpc.server import RpcServer
from clawker_cp.rpc.services import admin_service
from clawker_cp.rpc.tls import TlsMaterial, server_credentials
from clawker_cp.rpc.transport import grpc

RPCS: dict[str, tuple[type[Message], type[Message]]] = {
    "ListAgents": (admin_pb2.ListAgentsRequest, admin_pb2.ListAgentsResult),
    "FirewallStatus": (admin_pb2.FirewallStatusRequest, admin_pb2.FirewallStatusResult),
}
AGENTS = [
    admin_pb2.Agent(agent_name=f"agent-{n}", container_id="f" * 64, cert_thumbprint="e" * 64, project="p")
    for n in range(10)
]


class Servicer:
    """Ten agents, and a stack that runs; what is measured is the way to here and back."""

    async def ListAgents(self, request: Any, context: Any) -> Any:  # noqa: N802 - the RPC's name
        """Ten agents."""
        return admin_pb2.ListAgentsResult(agents=AGENTS)

    async def FirewallStatus(self, request: Any, context: Any) -> Any:  # noqa: N802 - the RPC's name
        """A status."""
        return admin_pb2.FirewallStatusResult()

    def __getattr__(self, name: str) -> Any:
        return self.ListAgents


async def serve(directory: Path, ttl: str, addresses: dict[str, str]) -> None:
    """Serve until standard input ends."""

    def material() -> TlsMaterial:
        files = ("server.pem", "server.key", "ca.pem")
        return TlsMaterial(*((directory / name).read_bytes() for name in files))

    services = [admin_service(Servicer())]
    if ttl == "none":
        server = grpc.aio.server(options=listener_options())
        services[0](server)
        port = server.add_secure_port("127.0.0.1:0", server_credentials(material))
        await server.start()
    else:
        introspector = HydraIntrospector(addresses["introspect"], ssl.create_default_context(cafile=addresses["ca"]))
        auth = AuthInterceptor(introspector, admin_method_scopes(), ttl_s=float(ttl))
        auth.require_client_id("clawker-cli").require_common_name("clawker-cli")
        listener = RpcServer("bench", ["127.0.0.1:0"], material, auth, services, is_ready=lambda: True)
        (port,) = await listener.start()
    print(port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def call(directory: Path, port: str, tokens: list[str], rpc: str, in_flight: int, seconds: float) -> None:
    """Keep `in_flight` calls going, with the tokens in turns, and say how many were answered, and how fast."""
    files = ("ca.pem", "clawker-cli.key", "clawker-cli.pem")
    credentials = grpc.ssl_channel_credentials(*((directory / name).read_bytes() for name in files))
    request, result = RPCS[rpc]
    bearers = itertools.cycle([(("authorization", f"Bearer {token}"),) for token in tokens])
    took: list[float] = []
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
        method = channel.unary_unary(
            f"/clawker.admin.v1.AdminService/{rpc}",
            request_serializer=request.SerializeToString,
            response_deserializer=result.FromString,
        )

        async def caller(end: float) -> None:
            while time.perf_counter() < end:
                begun = time.perf_counter()
                await method(request(), metadata=next(bearers))
                took.append(time.perf_counter() - begun)

        await caller(time.perf_counter() + 0.3)
        took.clear()
        begun = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(caller(begun + seconds))
        elapsed = time.perf_counter() - begun
    took.sort()
    found = {
        "per_second": len(took) / elapsed,
        "p50_ms": 1000 * took[len(took) // 2],
        "p99_ms": 1000 * took[len(took) * 99 // 100],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    part, where, *rest = sys.argv[1:]
    if part == "server":
        uvloop.run(serve(Path(where), rest[0], json.loads(rest[1])))
    else:
        given = Path(rest[1]).read_text().split()
        uvloop.run(call(Path(where), rest[0], given, rest[2], int(rest[3]), float(rest[4])))
