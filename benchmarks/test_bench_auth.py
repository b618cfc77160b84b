"""
What authentication costs: token cache, scopes, the decision about one call, and whole calls over mTLS.

The first part is measured by pytest-benchmark, each next to its plain twin and, where one exists, to what one would use
without it. `test_bench_rpc_unary` prints a table (`-s`): server, client and HTTPS authority are processes of their own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import cachetools
import pytest
import structlog

from clawker_cp._fast.scopes import has_scope as fast_scope
from clawker_cp._fast.tokencache import TokenCache as Fast
from clawker_cp._pure.scopes import has_scope as plain_scope
from clawker_cp._pure.tokencache import TokenCache as Plain
from clawker_cp.accel import Granted
from clawker_cp.auth.authorizer import Authorizer, Pending
from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.testing.authority_world import HydraWorld
from clawker_cp.testing.certificates import TestCa
from clawker_cp.testing.peers import peer
from clawker_cp.testing.rpc_world import Authority, active

HERE = Path(__file__).parent
SECONDS = float(os.environ.get("BENCH_SECONDS", "3"))
CERTIFICATE = b"\x01" * 32
# As long as an access token of the authority.
TOKEN = "eyJ" + "aZ0-_" * 140
GRANT = Granted("clawker-cli", "admin", 4_000_000_000)
KINDS = pytest.mark.parametrize("kind", [Fast, Plain], ids=["fast", "plain"])
EVERY_CACHE = pytest.mark.parametrize("kind", ["fast", "plain", "cachetools"])


class Cachetools:
    """What one would use: a TTLCache. It neither re-checks the token's own end nor knows inactive ones."""

    def __init__(self) -> None:
        self._held: cachetools.TTLCache[bytes, Granted] = cachetools.TTLCache(4096, 10.0)

    def lookup(self, key: bytes, _wall: float, _monotonic: float) -> Granted | bool:
        """The grant, or True for "ask"."""
        return self._held.get(key, True)

    def store(self, key: bytes, _digest: bytes, granted: Granted, *_: Any) -> None:
        """Keep a grant."""
        self._held[key] = granted


def made(kind: str) -> Any:
    """An empty cache."""
    return {"fast": Fast, "plain": Plain, "cachetools": Cachetools}[kind]()


def filled(kind: str, count: int = 4096) -> tuple[Any, list[bytes]]:
    """A cache with `count` grants, and their keys in random order."""
    cache = made(kind)
    keys = [sha256(b"%d" % number).digest() for number in range(count)]
    for key in keys:
        cache.store(key, key, GRANT, 0.0, 0.0, 10.0, 0)
    random.Random(1).shuffle(keys)
    return cache, keys


@pytest.mark.benchmark(group="token_cache hit, 1000 keys")
@EVERY_CACHE
def test_bench_cache_hit(benchmark: Any, kind: str) -> None:
    """Look up a thousand keys that are there."""
    cache, keys = filled(kind)
    lookup, asked = cache.lookup, keys[:1000]
    assert all(lookup(key, 1.0, 1.0) is GRANT for key in asked)
    benchmark(lambda: [lookup(key, 1.0, 1.0) for key in asked])


@pytest.mark.benchmark(group="token_cache miss, 1000 keys")
@EVERY_CACHE
def test_bench_cache_miss(benchmark: Any, kind: str) -> None:
    """Look up a thousand keys that are not there."""
    cache, _ = filled(kind)
    asked = [sha256(b"x%d" % number).digest() for number in range(1000)]
    lookup = cache.lookup
    assert all(lookup(key, 1.0, 1.0) is True for key in asked)
    benchmark(lambda: [lookup(key, 1.0, 1.0) for key in asked])


@pytest.mark.benchmark(group="token_cache store when full, 1000 keys")
@EVERY_CACHE
def test_bench_cache_eviction(benchmark: Any, kind: str) -> None:
    """Store a thousand new grants in a full cache: one goes for each."""
    numbers = iter(range(10**9))

    def prepare() -> tuple[tuple[Any, list[bytes]], dict[str, Any]]:
        cache, _ = filled(kind)
        return (cache, [sha256(b"n%d" % next(numbers)).digest() for _ in range(1000)]), {}

    def store(cache: Any, keys: list[bytes]) -> None:
        for key in keys:
            cache.store(key, key, GRANT, 1.0, 1.0, 10.0, 0)

    benchmark.pedantic(store, setup=prepare, rounds=20)


@pytest.mark.benchmark(group="scope_match, 1000 questions")
@pytest.mark.parametrize("count", [1, 10, 100])
@pytest.mark.parametrize("match", [fast_scope, plain_scope], ids=["fast", "plain"])
def test_bench_scope_match(benchmark: Any, match: Callable[[str, str], bool], count: int) -> None:
    """Find the last of `count` scopes."""
    text = " ".join([*(f"agent:other:scope-{number}" for number in range(count - 1)), "admin"])
    assert match(text, "admin")
    assert not match(text, "adm")
    benchmark(lambda: [match(text, "admin") for _ in range(1000)])


class Call:
    """A call's facts at hand, so that what is measured is ours: reading them from grpc costs 2.3 us more."""

    def __init__(self, pem: bytes) -> None:
        self._facts = {"x509_pem_cert": [pem], "ssl_tls_version": [b"TLSv1.3"]}
        self._metadata = (("user-agent", "grpc-go/1.80"), ("authorization", f"Bearer {TOKEN}"))

    def auth_context(self) -> Any:
        """As grpc has it."""
        return self._facts

    def invocation_metadata(self) -> Any:
        """As grpc has it."""
        return self._metadata


@pytest.mark.benchmark(group="token_hit, interceptor to handler, 100 calls")
@pytest.mark.parametrize("scopes", [1, 10, 100])
@KINDS
def test_bench_admit(benchmark: Any, kind: Any, scopes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything between the interceptor and the handler for a cached token: pin, header, cache, client, scope."""
    monkeypatch.setattr("clawker_cp.auth.authorizer.has_scope", fast_scope if kind is Fast else plain_scope)
    text = " ".join([*(f"agent:other:scope-{number}" for number in range(scopes - 1)), "admin"])
    authority = Authority(**{TOKEN: active(text)})
    # Longer than the benchmark runs; the checks at every hit are the same.
    auth = AuthInterceptor(authority, {"/a.B/C": "admin"}, cache=kind(), ttl_s=3000.0)
    auth.require_client_id("clawker-cli").require_common_name("clawker-cli")
    call = Call(TestCa(tmp_path).leaf("clawker-cli").certificate_pem)

    async def first() -> None:
        waiting = auth.admit(call, "/a.B/C")
        assert waiting is not None
        await waiting

    with asyncio.Runner() as runner:
        runner.run(first())
    admit = auth.admit
    assert admit(call, "/a.B/C") is None
    benchmark(lambda: [admit(call, "/a.B/C") for _ in range(100)])


@pytest.mark.benchmark(group="token_miss, 100 callers of one token")
def test_bench_single_flight(benchmark: Any) -> None:
    """A hundred callers of one token that nobody knows: one question, a hundred answers."""
    authority = Authority(**{TOKEN: active()})

    async def flight() -> None:
        one = Authorizer(authority)

        async def caller() -> None:
            decided = one.decide(TOKEN, CERTIFICATE, "admin")
            assert isinstance(decided, Pending)
            assert await one.ask(decided, TOKEN, CERTIFICATE, "admin") is None

        async with asyncio.TaskGroup() as group:
            for _ in range(100):
                group.create_task(caller())

    authority.asked.clear()
    with asyncio.Runner() as runner:
        benchmark(lambda: runner.run(flight()))


# Whole calls. Each part is this file run as a program.


@contextmanager
def program(*arguments: str, core: str) -> Iterator[str]:
    """Run a part on a core until its standard input ends; gives the line it says when it is ready."""
    environment = dict(os.environ, PYTHONPATH=str(HERE.parent / "src"))
    command = ["taskset", "-c", core, sys.executable, __file__, *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdin is not None
            yield process.stdout.readline().strip()
            process.stdin.close()
            process.wait(10)
        finally:
            process.kill()


# A question for every call asks an endpoint that does as little as one can, or the real Hydra.
MODES = ("bare", "cached", "uncached", "hydra, cached", "hydra, uncached")
HYDRA_TOKENS = 200  # more than are ever in flight: callers of one token would share a question


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_bench_rpc_unary(tmp_path: Path) -> None:
    """ListAgents of ten agents: no interceptors, a cached token, and a question to the authority for every call."""
    ca = TestCa(tmp_path)
    ca.server()
    ca.leaf("clawker-cli")
    results: dict[tuple[str, int], dict[str, float]] = {}
    with ExitStack() as authorities:
        url = authorities.enter_context(program("authority", str(tmp_path), core="1"))
        hydra = authorities.enter_context(program("hydra", str(tmp_path), core="1")) if peer("hydra") else ""
        for mode in MODES if hydra else MODES[:3]:
            asked = hydra if mode.startswith("hydra") else url
            with program("server", str(tmp_path), mode, asked, core="0") as port:
                for in_flight in (1, 16, 64):
                    command = ["taskset", "-c", "1", sys.executable, __file__, "client", str(tmp_path), port, mode]
                    said = subprocess.run(
                        [*command, str(in_flight), str(SECONDS)],
                        capture_output=True,
                        text=True,
                        check=True,
                        timeout=60,
                        env=dict(os.environ, PYTHONPATH=str(HERE.parent / "src")),
                    ).stdout
                    results[mode, in_flight] = json.loads(said)
    print(
        f"\n{'ListAgents over mTLS':24}{'in flight':>10}{'calls/s':>10}{'p50 ms':>9}{'p99 ms':>9}{'ratio to bare':>15}"
    )
    for (mode, in_flight), result in results.items():
        ratio = result["per_second"] / results["bare", in_flight]["per_second"]
        print(
            f"{mode:24}{in_flight:>10}{result['per_second']:>10.0f}{result['p50_ms']:>9.2f}{result['p99_ms']:>9.2f}"
            f"{ratio:>15.2f}"
        )
    for cached, uncached in (("cached", "uncached"), ("hydra, cached", "hydra, uncached")):
        for in_flight in (1, 16, 64) if (cached, 1) in results else ():
            often, seldom = results[cached, in_flight], results[uncached, in_flight]
            more, sooner = often["per_second"] / seldom["per_second"], seldom["p50_ms"] / often["p50_ms"]
            print(f"{cached} over {uncached} at {in_flight}: {more:.1f} times the calls, p50 a {sooner:.1f}th")
            assert more > 1


async def run_hydra(directory: Path) -> None:
    """The real Hydra, with tokens for the clients in a file."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    own = directory / "hydra"
    own.mkdir()
    world = HydraWorld(own, TestCa(own), binary=peer("hydra") or Path())
    async with world.running():
        tokens = [await world.token() for _ in range(HYDRA_TOKENS)]
        (directory / "tokens").write_text("\n".join(tokens))
        print(f"{world.admin}/admin/oauth2/introspect", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def run_authority(directory: Path) -> None:
    """An HTTPS introspection endpoint that does as little as one can."""
    import ssl

    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    tls.load_cert_chain(directory / "server.pem", directory / "server.key")
    answer = {"active": True, "client_id": "clawker-cli", "scope": "admin", "sub": "clawker-cli"}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
                body = json.dumps({**answer, "exp": int(time.time()) + 3600}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    print(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/admin/oauth2/introspect", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def run_server(directory: Path, mode: str, url: str) -> None:
    """AdminService with ten agents behind the interceptors, or without."""
    import ssl

    from clawker_cp._proto.clawker.admin.v1 import admin_pb2
    from clawker_cp.auth.introspect import HydraIntrospector
    from clawker_cp.auth.scopes import admin_method_scopes
    from clawker_cp.rpc.limits import listener_options
    from clawker_cp.rpc.server import RpcServer
    from clawker_cp.rpc.services import admin_service
    from clawker_cp.rpc.tls import TlsMaterial, server_credentials
    from clawker_cp.rpc.transport import grpc

    agents = [
        admin_pb2.Agent(agent_name=f"agent-{n}", container_id="f" * 64, cert_thumbprint="e" * 64, project="p")
        for n in range(10)
    ]

    class Servicer:
        async def ListAgents(self, request: Any, context: Any) -> Any:  # noqa: N802 - the RPC's name
            return admin_pb2.ListAgentsResult(agents=agents)

        def __getattr__(self, name: str) -> Any:
            return self.ListAgents

    def material() -> TlsMaterial:
        files = ("server.pem", "server.key", "ca.pem")
        return TlsMaterial(*((directory / name).read_bytes() for name in files))

    tls = ssl.create_default_context(cafile=directory / ("hydra/ca.pem" if mode.startswith("hydra") else "ca.pem"))
    ttl_s = 0.0 if mode.endswith("uncached") else 10.0
    auth = AuthInterceptor(HydraIntrospector(url, tls), admin_method_scopes(), ttl_s=ttl_s)
    auth.require_client_id("clawker-cli").require_common_name("clawker-cli")
    services = [admin_service(Servicer())]
    if mode == "bare":
        server = grpc.aio.server(options=listener_options())
        services[0](server)
        port = server.add_secure_port("127.0.0.1:0", server_credentials(material))
        await server.start()
    else:
        listener = RpcServer("bench", ["127.0.0.1:0"], material, auth, services, is_ready=lambda: True)
        (port,) = await listener.start()
    print(port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def run_client(directory: Path, port: str, mode: str, in_flight: int, seconds: float) -> None:
    """
    Keep `in_flight` calls going and say how many were answered, and how fast.

    Uncached, every call has a token of its own: callers of one token would share a question.
    """
    from clawker_cp._proto.clawker.admin.v1 import admin_pb2
    from clawker_cp.rpc.transport import grpc

    files = ("ca.pem", "clawker-cli.key", "clawker-cli.pem")
    credentials = grpc.ssl_channel_credentials(*((directory / name).read_bytes() for name in files))
    took: list[float] = []
    minted = (directory / "tokens").read_text().split() if mode.startswith("hydra") else []

    def token_of(number: int) -> str:
        if mode == "uncached":
            return f"{TOKEN}{number}-{os.getpid()}"
        if mode == "hydra, uncached":
            return minted[number % len(minted)]
        return minted[0] if minted else TOKEN

    async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
        call = channel.unary_unary(
            "/clawker.admin.v1.AdminService/ListAgents",
            request_serializer=admin_pb2.ListAgentsRequest.SerializeToString,
            response_deserializer=admin_pb2.ListAgentsResult.FromString,
        )
        numbers = itertools.count()

        async def caller(end: float) -> None:
            while time.perf_counter() < end:
                begun = time.perf_counter()
                bearer = f"Bearer {token_of(next(numbers))}"
                await call(admin_pb2.ListAgentsRequest(), metadata=(("authorization", bearer),))
                took.append(time.perf_counter() - begun)

        await caller(time.perf_counter() + 0.3)
        took.clear()
        begun = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(caller(begun + seconds))
        elapsed = time.perf_counter() - begun
    took.sort()
    per_second = len(took) / elapsed
    print(
        json.dumps(
            {
                "per_second": per_second,
                "p50_ms": 1000 * took[len(took) // 2],
                "p99_ms": 1000 * took[len(took) * 99 // 100],
            }
        )
    )


if __name__ == "__main__":
    import uvloop

    part, where, *rest = sys.argv[1:]
    if part == "authority":
        uvloop.run(run_authority(Path(where)))
    elif part == "hydra":
        uvloop.run(run_hydra(Path(where)))
    elif part == "server":
        uvloop.run(run_server(Path(where), *rest))
    else:
        uvloop.run(run_client(Path(where), rest[0], rest[1], int(rest[2]), float(rest[3])))
