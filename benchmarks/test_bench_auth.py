"""
What authentication costs in this process: token cache, scopes, and the decision about one call.

Each next to its plain twin and, where one exists, to what one would use without it. What a question to the authority
costs instead is in test_bench_token_authority.py, whole calls are in test_bench_rpc_unary.py.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import cachetools
import pytest

from clawker_cp._fast.bearer import presented_token as fast_header
from clawker_cp._fast.scopes import has_scope as fast_scope
from clawker_cp._fast.tokencache import TokenCache as Fast
from clawker_cp._pure.bearer import presented_token as plain_header
from clawker_cp._pure.scopes import has_scope as plain_scope
from clawker_cp._pure.tokencache import TokenCache as Plain
from clawker_cp.accel import Granted
from clawker_cp.auth.authorizer import Authorizer, Pending
from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.testing.certificates import TestCa
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
    monkeypatch.setattr("clawker_cp.rpc.auth.presented_token", fast_header if kind is Fast else plain_header)
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
