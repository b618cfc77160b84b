"""The decision about one call, without a network: what is read, in which order, and that surprises deny."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from clawker_cp.accel import TokenCache
from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.testing.certificates import TestCa
from clawker_cp.testing.rpc_world import ONE, SCOPES, Authority, Log, active, bearer


class Context:
    """A call of a certificate with metadata; keeps how it was aborted."""

    def __init__(self, pem: bytes, metadata: Any) -> None:
        self._facts = {"x509_pem_cert": [pem], "ssl_tls_version": [b"TLSv1.3"]}
        self._metadata = metadata
        self.aborted: tuple[str, str] | None = None

    def auth_context(self) -> Any:
        return self._facts

    def invocation_metadata(self) -> Any:
        if isinstance(self._metadata, Exception):
            raise self._metadata
        return self._metadata

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    async def abort(self, code: Any, details: str) -> None:
        self.aborted = (code.name, details)
        raise grpc.aio.AbortError


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return TestCa(tmp_path_factory.mktemp("ca")).leaf("clawker-cli").certificate_pem


async def judged(auth: AuthInterceptor, context: Context, method: str = ONE) -> tuple[str, str] | None:
    """How the call was refused, None if it passed."""
    waiting = auth.admit(context, method)
    if waiting is None:
        return None
    try:
        await waiting
    except grpc.aio.AbortError:
        return context.aborted
    return None


async def test_a_cached_call_is_judged_without_awaiting(pem: bytes) -> None:
    """The first call asks, the second has its answer when `admit` returns."""
    auth = AuthInterceptor(Authority(good=active()), SCOPES)
    assert await judged(auth, Context(pem, bearer("good"))) is None
    assert auth.admit(Context(pem, bearer("good")), ONE) is None
    numbers = auth.statistics()
    assert (numbers["passed"], numbers["asked"], numbers["denied"], numbers["hits"]) == (2, 1, 0, 1)


@pytest.mark.parametrize("metadata", [None, 5, [("authorization",)], [None], KeyError("bug"), "authorization"])
async def test_metadata_of_another_shape_denies(pem: bytes, metadata: Any) -> None:
    """Whatever reading it raises (I10)."""
    log = Log()
    auth = AuthInterceptor(Authority(good=active()), SCOPES, log=log)
    assert await judged(auth, Context(pem, metadata)) == ("UNAUTHENTICATED", "token validation failed")
    assert log.lines[0][2]["cause"].startswith("surprise: ")


async def test_a_broken_cache_denies(pem: bytes) -> None:
    """Something that is no cache at all opens nothing."""
    auth = AuthInterceptor(Authority(good=active()), SCOPES, cache=object())  # type: ignore[arg-type]
    assert await judged(auth, Context(pem, bearer("good"))) == ("UNAUTHENTICATED", "token validation failed")


async def test_what_cannot_be_a_token_is_never_asked_about(pem: bytes) -> None:
    """Nor remembered, not even as inactive."""
    authority = Authority(good=active())
    auth = AuthInterceptor(authority, SCOPES)
    for token in ("good good", "g\u00f6\u00f6d", "good\n", "good,Bearer good", "\x00"):
        assert await judged(auth, Context(pem, bearer(token))) == ("UNAUTHENTICATED", "missing bearer token")
    assert authority.asked == [] and auth.statistics()["negative"] == 0


@pytest.mark.parametrize("scope", ["", None, 0, []])
async def test_an_empty_scope_is_no_scope(pem: bytes, scope: Any) -> None:
    """Public is a word; nothing else means it."""
    auth = AuthInterceptor(Authority(good=active()), {ONE: scope})
    assert await judged(auth, Context(pem, bearer("good"))) == ("UNAUTHENTICATED", "unauthorized")
    assert auth.unmapped(frozenset({ONE})) == [ONE]


async def test_the_map_is_taken_as_it_was(pem: bytes) -> None:
    """Changing it afterwards opens nothing."""
    scopes = {ONE: "admin"}
    auth = AuthInterceptor(Authority(), scopes)
    scopes[ONE] = "public"
    assert await judged(auth, Context(pem, ())) == ("UNAUTHENTICATED", "missing bearer token")


def test_the_pins_are_fluent_and_never_empty() -> None:
    """An empty pin would let everybody pass."""
    auth = AuthInterceptor(Authority(), SCOPES)
    assert auth.require_client_id("a") is auth and auth.require_common_name("b") is auth
    for pin in (auth.require_client_id, auth.require_common_name):
        with pytest.raises(ValueError, match="must not be empty"):
            pin("")


async def test_a_given_cache_is_used(pem: bytes) -> None:
    """What one interceptor learnt is in the cache it was given."""
    cache = TokenCache()
    auth = AuthInterceptor(Authority(good=active()), SCOPES, cache=cache)
    assert await judged(auth, Context(pem, bearer("good"))) is None
    assert cache.statistics()["entries"] == 1


async def test_one_instance_is_an_interceptor(pem: bytes) -> None:
    """By itself and through `interceptors()` it is of grpc's kind."""
    auth = AuthInterceptor(Authority(), SCOPES)
    everything = [auth, auth.unary_interceptor, auth.stream_interceptor, *auth.interceptors()]
    assert all(isinstance(one, grpc.aio.ServerInterceptor) for one in everything)


async def test_refusals_are_logged_with_their_cause_and_without_the_token(pem: bytes) -> None:
    """Who, what, why; never the token or its digest (I11)."""
    log = Log()
    auth = AuthInterceptor(Authority(secret=RuntimeError("secret")), SCOPES, log=log)
    await judged(auth, Context(pem, bearer("secret")))
    ((level, event, fields),) = log.lines
    assert (level, event) == ("warning", "auth_denied")
    assert fields == {
        "method": ONE,
        "peer": "ipv4:127.0.0.1:1",
        "code": "UNAUTHENTICATED",
        "message": "token validation failed",
        "cause": "introspection failed: RuntimeError",
    }
