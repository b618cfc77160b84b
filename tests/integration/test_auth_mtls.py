"""Who passes a listener over real mTLS, and what everybody else is told (contract 5.1)."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from clawker_cp.errors import Unavailable
from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.testing.rpc_world import (
    CHAT,
    MANY,
    ONE,
    SCOPES,
    SUM,
    Authority,
    Kinds,
    Log,
    RpcWorld,
    active,
    bearer,
    call,
    outcome,
)

UNAUTHENTICATED, DENIED = "UNAUTHENTICATED", "PERMISSION_DENIED"
EVERY_KIND = pytest.mark.parametrize("method", [ONE, MANY, SUM, CHAT])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> RpcWorld:
    return RpcWorld(tmp_path_factory.mktemp("mtls"))


def made(authority: Authority, **options: Any) -> AuthInterceptor:
    return AuthInterceptor(authority, options.pop("scopes", SCOPES), **options)


@EVERY_KIND
async def test_a_good_token_reaches_the_handler(world: RpcWorld, method: str) -> None:
    """Of all four kinds, and is asked about once."""
    authority, kinds = Authority(good=active()), Kinds()
    async with world.serving(made(authority), kinds) as (_server, channel):
        first = await call(channel, method, bearer("good"))
        assert await call(channel, method, bearer("good")) == first
    expected = {ONE: ["x"], MANY: ["x"] * 3, SUM: ["xx"], CHAT: ["x"] * 2}
    assert first == expected[method] and authority.asked == ["good"] and len(kinds.reached) == 2


REFUSALS: list[tuple[str, Any, tuple[str, str]]] = [
    ("no header", (), (UNAUTHENTICATED, "missing bearer token")),
    ("two headers", (*bearer("good"), *bearer("good")), (UNAUTHENTICATED, "missing bearer token")),
    ("wrong scheme", (("authorization", "Basic Z29vZA=="),), (UNAUTHENTICATED, "missing bearer token")),
    ("wrong case", (("authorization", "bearer good"),), (UNAUTHENTICATED, "missing bearer token")),
    ("binary", (("authorization-bin", b"Bearer good"),), (UNAUTHENTICATED, "missing bearer token")),
    ("blanks", (("authorization", "Bearer good good"),), (UNAUTHENTICATED, "missing bearer token")),
    ("too long", bearer("x" * 8193), (UNAUTHENTICATED, "missing bearer token")),
    ("inactive", bearer("nobody"), (UNAUTHENTICATED, "token inactive or invalid")),
    ("expired", bearer("late"), (UNAUTHENTICATED, "token inactive or invalid")),
    ("broken", bearer("broken"), (UNAUTHENTICATED, "token validation failed")),
    ("surprise", bearer("surprise"), (UNAUTHENTICATED, "token validation failed")),
    ("other scope", bearer("weak"), (DENIED, 'token missing required scope "admin"')),
    ("prefix of the scope", bearer("near"), (DENIED, 'token missing required scope "admin"')),
    ("other client", bearer("other"), (DENIED, 'token missing required scope "admin"')),
]


@EVERY_KIND
async def test_everybody_else_is_told_what_the_contract_says(world: RpcWorld, method: str) -> None:
    """Code and message are exact, and no handler of any kind is reached."""
    authority = Authority(
        good=active(),
        late=active(life_s=-1),
        broken=Unavailable("down"),
        surprise=RuntimeError("token surprise"),
        weak=active("agent:self:register"),
        near=active("administrator admin:read Admin"),
        other=active(client_id="clawker-agent"),
    )
    kinds, log = Kinds(), Log()
    auth = made(authority, log=log).require_client_id("clawker-cli")
    async with world.serving(auth, kinds) as (_server, channel):
        got = {name: await outcome(channel, method, metadata) for name, metadata, _ in REFUSALS}
    assert got == {name: expected for name, _, expected in REFUSALS}
    assert kinds.reached == []
    assert set(log.events()) == {"auth_denied"} and len(log.lines) == len(REFUSALS)
    assert "good" not in repr(log.lines) and "token surprise" not in repr(log.lines)


async def test_a_method_without_a_scope_is_refused(world: RpcWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is served or not, absent or mapped to nothing, and before its token is looked at."""
    authority, kinds = Authority(good=active()), Kinds()
    auth = made(authority, scopes={ONE: "", SUM: "admin"})
    served = [kinds.register]
    monkeypatch.setattr(auth, "unmapped", lambda _methods: [])  # the server would not start
    async with world.serving(auth, services=served) as (_server, channel):
        for method in (ONE, MANY, CHAT, "/nobody.serves/This", "/x", "/clawker.test.Kinds/one"):
            assert await outcome(channel, method, bearer("good")) == (UNAUTHENTICATED, "unauthorized")
        assert await outcome(channel, SUM, bearer("good")) == ("OK", "")
    assert authority.asked == ["good"] and kinds.reached == ["Sum"]


async def test_a_server_with_an_unmapped_method_does_not_start(world: RpcWorld) -> None:
    """A new RPC without an entry is found before anybody calls it."""
    auth = made(Authority(), scopes={ONE: "admin", SUM: "admin", CHAT: ""})
    with pytest.raises(Exception, match=r"no scope for /clawker\.test\.Kinds/Chat, /clawker\.test\.Kinds/Many"):
        async with world.serving(auth):
            pass


async def test_a_mapped_method_nobody_serves_is_told_to_those_who_may_ask(world: RpcWorld) -> None:
    """Others hear what they would hear of any method."""
    auth = made(Authority(good=active()), scopes={**SCOPES, "/clawker.test.Kinds/Gone": "admin"})
    async with world.serving(auth) as (_server, channel):
        assert await outcome(channel, "/clawker.test.Kinds/Gone", bearer("good")) == (
            "UNIMPLEMENTED",
            "method not found",
        )
        assert await outcome(channel, "/clawker.test.Kinds/Gone") == (UNAUTHENTICATED, "missing bearer token")


async def test_public_needs_the_certificate_only(world: RpcWorld) -> None:
    """No token is asked for or looked at, but the common name still counts."""
    authority, kinds = Authority(), Kinds()
    auth = made(authority, scopes={**SCOPES, ONE: "public"}).require_common_name("clawker-cli")
    async with world.serving(auth, kinds) as (server, channel):
        assert await outcome(channel, ONE) == ("OK", "")
        assert await outcome(channel, ONE, bearer("bad")) == ("OK", "")
        async with world.channel(server.ports[0], world.agent) as agent:
            assert await outcome(agent, ONE) == (DENIED, "client certificate not accepted here")
    assert authority.asked == [] and kinds.reached == ["One", "One"]


async def test_an_agents_certificate_is_refused_where_operators_call(world: RpcWorld) -> None:
    """Even with an operator's token, and that token is not even asked about (threat 31)."""
    authority, kinds = Authority(good=active()), Kinds()
    auth = made(authority).require_common_name("clawker-cli").require_client_id("clawker-cli")
    async with world.serving(auth, kinds) as (server, channel):
        async with world.channel(server.ports[0], world.agent) as agent:
            for method in (ONE, MANY, SUM, CHAT, "/not/served"):
                assert await outcome(agent, method, bearer("good")) == (DENIED, "client certificate not accepted here")
        assert await outcome(channel, ONE, bearer("good")) == ("OK", "")
    assert kinds.reached == ["One"] and authority.asked == ["good"]


async def test_a_token_belongs_to_the_certificate_that_came_first(world: RpcWorld) -> None:
    """Another leaf, also one of the same name, is refused with it (threat 30)."""
    authority = Authority(good=active())
    async with world.serving(made(authority)) as (server, channel):
        assert await outcome(channel, ONE, bearer("good")) == ("OK", "")
        async with world.channel(server.ports[0], world.other) as thief:
            assert await outcome(thief, ONE, bearer("good")) == (DENIED, "token bound to another certificate")
        assert await outcome(channel, ONE, bearer("good")) == ("OK", "")


async def test_without_mtls_nobody_passes(world: RpcWorld) -> None:
    """A listener that by mistake has no TLS, or asks for no certificate, refuses every call, public ones too."""
    auth = made(Authority(good=active()), scopes={**SCOPES, MANY: "public"})
    kinds = Kinds()
    server = grpc.aio.server(interceptors=auth.interceptors())
    kinds.register(server)
    pair = [(world.server.key_pem, world.server.certificate_pem)]
    plain = server.add_insecure_port("127.0.0.1:0")
    half = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair))
    await server.start()
    refused = (UNAUTHENTICATED, "TLS 1.3 with a client certificate required")
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{plain}") as channel:
            for method in (ONE, MANY):
                assert await outcome(channel, method, bearer("good")) == refused
        async with world.channel(half) as channel:
            for method in (ONE, MANY):
                assert await outcome(channel, method, bearer("good")) == refused
    finally:
        await server.stop(0)
        await auth.aclose()
    assert kinds.reached == []


async def test_unary_and_stream_interceptors_share_the_work(world: RpcWorld) -> None:
    """Given both to a server, every kind is judged once and by the same cache."""
    authority, kinds = Authority(good=active()), Kinds()
    auth = made(authority)
    server = grpc.aio.server(interceptors=[auth.unary_interceptor, auth.stream_interceptor])
    kinds.register(server)
    credentials = grpc.ssl_server_credentials(
        [(world.server.key_pem, world.server.certificate_pem)], world.ca.certificate.read_bytes(), True
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        async with world.channel(port) as channel:
            for method in (ONE, MANY, SUM, CHAT):
                assert (await outcome(channel, method, bearer("good")))[0] == "OK"
                assert (await outcome(channel, method))[0] == UNAUTHENTICATED
    finally:
        await server.stop(0)
        await auth.aclose()
    assert authority.asked == ["good"] and len(kinds.reached) == 4
    assert auth.statistics()["passed"] == 4 and auth.statistics()["denied"] == 4


async def test_metadata_of_a_megabyte_does_not_reach_us(world: RpcWorld) -> None:
    """The connection's own limit answers, and the next call on it is served."""
    authority = Authority(good=active())
    async with world.serving(made(authority)) as (_server, channel):
        code, _ = await outcome(channel, ONE, (("x-big", "y" * 1_000_000), *bearer("good")))
        assert code == "RESOURCE_EXHAUSTED"
        code, _ = await outcome(channel, ONE, bearer("z" * 1_000_000))
        assert code == "RESOURCE_EXHAUSTED"
        assert await outcome(channel, ONE, bearer("good")) == ("OK", "")
    assert authority.asked == ["good"]


async def test_a_call_that_is_cancelled_while_its_token_is_asked_about(world: RpcWorld) -> None:
    """Leaves the other caller of that token with the one answer, and no handler reached by itself."""
    authority, kinds = Authority(good=active()), Kinds()
    authority.go.clear()
    auth = made(authority)
    async with world.serving(auth, kinds) as (_server, channel), asyncio.TaskGroup() as group:
        first, second = (group.create_task(outcome(channel, ONE, bearer("good"))) for _ in range(2))
        while auth.statistics()["waiting"] < 2:
            await asyncio.sleep(0.001)
        first.cancel()
        while auth.statistics()["waiting"] > 1:
            await asyncio.sleep(0.001)
        authority.go.set()
        assert await second == ("OK", "")
    assert authority.asked == ["good"] and kinds.reached == ["One"]


async def test_a_callers_deadline_ends_its_wait(world: RpcWorld) -> None:
    """An authority that never answers keeps nobody longer than he asked for."""
    authority = Authority(good=active())
    authority.go.clear()
    async with world.serving(made(authority)) as (_server, channel):
        assert (await outcome(channel, ONE, bearer("good"), timeout=0.1))[0] == "DEADLINE_EXCEEDED"


async def test_revoking_counts_from_the_next_call_on(world: RpcWorld) -> None:
    """What is cached is forgotten at once, by token, by client and altogether."""
    authority = Authority(good=active())
    auth = made(authority)
    async with world.serving(auth) as (_server, channel):
        assert await outcome(channel, ONE, bearer("good")) == ("OK", "")
        authority.answers.clear()
        assert await outcome(channel, ONE, bearer("good")) == ("OK", "")
        assert auth.revoke(token="good") == 1
        assert await outcome(channel, ONE, bearer("good")) == (UNAUTHENTICATED, "token inactive or invalid")


async def test_a_request_is_not_parsed_before_its_caller_is_known(world: RpcWorld) -> None:
    """Garbage from a stranger is answered as a stranger's call; from a friend, as a malformed request."""
    async with world.serving(made(Authority(good=active()))) as (_server, channel):
        for method, kind in (
            (ONE, "unary_unary"),
            (MANY, "unary_stream"),
            (SUM, "stream_unary"),
            (CHAT, "stream_stream"),
        ):
            raw = getattr(channel, kind)(method)
            garbage: Any = b"\xff\xff\xff"
            for metadata, expected in ((), "UNAUTHENTICATED"), (bearer("good"), "INVALID_ARGUMENT"):
                answer = raw(iter([garbage]) if kind.startswith("stream") else garbage, metadata=metadata, timeout=10)
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    if kind.endswith("unary"):
                        await answer
                    else:
                        [one async for one in answer]
                assert raised.value.code().name == expected, (method, raised.value.details())


async def test_a_flood_of_made_up_tokens_leaves_the_next_caller_served(world: RpcWorld) -> None:
    """A thousand bad calls later nothing but the bounded tables is left, and a good token passes."""
    authority = Authority(good=active())
    auth = made(authority, log=Log())
    async with world.serving(auth) as (_server, channel):
        for start in range(0, 1000, 100):
            async with asyncio.TaskGroup() as group:
                calls = [group.create_task(outcome(channel, ONE, bearer(f"t{start + n}"))) for n in range(100)]
            assert {one.result() for one in calls} == {(UNAUTHENTICATED, "token inactive or invalid")}
        assert await outcome(channel, ONE, bearer("good")) == ("OK", "")
    numbers = auth.statistics()
    assert numbers["asking"] == 0 and numbers["entries"] == 1 and numbers["negative"] <= 1024
    assert numbers["denied"] == 1000


async def test_a_certificate_of_another_ca_gets_no_connection(world: RpcWorld, tmp_path: Any) -> None:
    """Nor does one that may not be a client's, one that has ended, or none."""
    stranger = RpcWorld(tmp_path)
    server_only = world.ca.leaf("clawker-cli", client=False, file="server-only")
    from datetime import timedelta

    ended = world.ca.leaf("clawker-cli", life=timedelta(hours=-1), file="ended")
    kinds = Kinds()
    async with world.serving(made(Authority(good=active())), kinds) as (server, _channel):
        for pair in (stranger.cli, server_only, ended):
            async with world.channel(server.ports[0], pair) as channel:
                code, _ = await outcome(channel, ONE, bearer("good"), timeout=5)
                assert code == "UNAVAILABLE"
        bare = grpc.ssl_channel_credentials(world.ca.certificate.read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{server.ports[0]}", bare) as channel:
            assert (await outcome(channel, ONE, bearer("good"), timeout=5))[0] == "UNAVAILABLE"
    assert kinds.reached == []
