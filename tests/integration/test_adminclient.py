"""The client against a real listener and a real token authority: tokens, refusals, broken peers, clocks."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from clawker_cp.adminclient import AdminClient, AsyncAdminClient, ClientIdentity, RpcFailed
from clawker_cp.adminclient import client as client_module
from clawker_cp.adminclient import tokens as tokens_module
from clawker_cp.adminclient.failures import REMEDIES
from clawker_cp.adminclient.messages import admin, to_json
from clawker_cp.adminclient.tokens import TokenSource
from clawker_cp.agents.database import Database
from clawker_cp.auth.authority.endpoints import public_application
from clawker_cp.auth.authority.ledger import Ledger
from clawker_cp.auth.authority.registration import read_registration, registration
from clawker_cp.auth.authority.service import TokenAuthority
from clawker_cp.auth.scopes import admin_method_scopes
from clawker_cp.errors import DeadlineExceeded, NotFound, Unauthenticated, Unavailable
from clawker_cp.pki.certificates import new_key
from clawker_cp.pki.material import ListenerMaterial
from clawker_cp.pki.tree import SIGNING_JWK, SIGNING_KEY, AuthTree
from clawker_cp.rpc.admin import AdminServicer
from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.rpc.server import RpcServer
from clawker_cp.rpc.services import admin_service
from clawker_cp.rpc.status import REASONS
from clawker_cp.rpc.tls import TlsMaterial
from clawker_cp.runtime.asgi import Answer, Application, Request
from clawker_cp.runtime.jwk import public_jwk
from clawker_cp.runtime.listeners import HttpListener


class Firewall:
    """Answers a few verbs; `refuse` is raised instead."""

    def __init__(self) -> None:
        self.refuse: Exception | None = None
        self.stuck = False

    def list_rules(self) -> list[Any]:
        if self.refuse is not None:
            raise self.refuse
        return []

    async def status(self) -> Any:
        if self.stuck:
            await asyncio.Event().wait()


class World:
    """One auth tree, one authority, one gRPC listener."""

    def __init__(self, directory: Path) -> None:
        self.tree = AuthTree(directory / "auth")
        self.tree.ensure()
        self.directory = directory
        self.firewall = Firewall()
        self.clock_offset_s = 0.0
        self.authority_clock: Callable[[], float] = time.time
        self.token_port = self.admin_port = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[World]:
        material = ListenerMaterial(self.tree)
        database = Database(self.directory / "cp.db")
        database.open()
        ledger = Ledger(database)
        ledger.load(time.time())
        public = HttpListener("token", Application({}), [("127.0.0.1", 0)])
        public.open()
        self.token_port = public.ports[0]
        audience = f"https://127.0.0.1:{self.token_port}/oauth2/token"
        self.authority = TokenAuthority(
            new_key(), "k", ledger, issuer="https://127.0.0.1/", audience=audience, wall=lambda: self.authority_clock()
        )
        jwk = self.tree.path(SIGNING_JWK).read_bytes()
        document = orjson.dumps(registration("clawker-cli", "admin", jwk))
        self.authority.put_client(*read_registration(document, self.authority.life_of))
        public._application = public_application(self.authority, {"keys": []})
        self.auth = AuthInterceptor(self.authority, admin_method_scopes())
        self.auth.require_client_id("clawker-cli").require_common_name("clawker-cli")
        servicer = AdminServicer(
            self.firewall, None, None, None,  # type: ignore[arg-type]
            wall_ns=lambda: int((time.time() + self.clock_offset_s) * 1e9),
        )  # fmt: skip

        def tls() -> TlsMaterial:
            now = material.read()
            return TlsMaterial(now.certificate_pem, now.key_pem, now.ca_pem)

        rpc = RpcServer("admin", ["127.0.0.1:0"], tls, self.auth, [admin_service(servicer)])
        self.admin_port = (await rpc.start())[0]
        async with asyncio.TaskGroup() as group:
            group.create_task(public.run(material.server_context()))
            try:
                yield self
            finally:
                await rpc.stop(0.1)
                public.close()
        database.close()

    def identity(self) -> ClientIdentity:
        return ClientIdentity(self.tree.root)

    def client(self, identity: ClientIdentity | None = None) -> AsyncAdminClient:
        return AsyncAdminClient(identity or self.identity(), admin_port=self.admin_port, token_port=self.token_port)


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with World(tmp_path).running() as world:
        yield world


LIST = admin.FirewallListRulesRequest()


async def test_a_call_fetches_one_token_and_keeps_it(world: World) -> None:
    """Twenty calls, ten at once, one exchange."""
    async with world.client() as client:
        for _ in range(10):
            assert to_json(await client.call("FirewallListRules", LIST)) == {}
        async with asyncio.TaskGroup() as group:
            for _ in range(10):
                group.create_task(client.call("FirewallListRules", LIST))
    assert world.authority.tally.issued.total() == 1


async def test_a_token_is_renewed_half_a_minute_before_its_end(world: World) -> None:
    """Not earlier, and not when it is too late."""
    now = [0.0]
    url = f"https://127.0.0.1:{world.token_port}/oauth2/token"
    source = TokenSource(world.identity(), url=url, audience=url, monotonic=lambda: now[0])
    first = await source.token()
    now[0] = 3569.0
    assert await source.token() == first
    now[0] = 3570.0
    assert await source.token() != first
    assert first not in repr(source)


async def test_a_refused_token_is_fetched_anew_once(world: World) -> None:
    """After a revocation the call succeeds with a new token, also one that is given in the same second."""
    second = float(int(time.time()))
    world.authority_clock = lambda: second
    async with world.client() as client:
        await client.call("FirewallListRules", LIST)
        await world.authority.bar("client", "clawker-cli")
        world.auth.revoke(everything=True)
        await client.call("FirewallListRules", LIST)
        await client.call("FirewallListRules", LIST)
    assert world.authority.tally.issued.total() == 2


async def test_a_refusal_has_reason_facts_and_a_remedy(world: World) -> None:
    """What the server says arrives whole; an unknown one is passed on as it is."""
    world.firewall.refuse = NotFound("no such agent", code="AGENT_NOT_FOUND", details={"who": "x"})
    async with world.client() as client:
        with pytest.raises(RpcFailed) as refused:
            await client.call("FirewallListRules", LIST)
    error = refused.value
    assert (error.status, error.code, dict(error.details)) == ("NOT_FOUND", "AGENT_NOT_FOUND", {"who": "x"})
    assert "no such agent" in error.message and "clawkerctl agents" in str(error.hint)


async def test_a_call_has_a_deadline(world: World) -> None:
    """A server that never answers is not waited for beyond it, and the call is not repeated."""
    world.firewall.stuck = True
    async with world.client() as client:
        with pytest.raises(RpcFailed) as late:
            await client.call("FirewallStatus", admin.FirewallStatusRequest(), timeout_s=0.2)
    assert late.value.status == "DEADLINE_EXCEEDED"


async def test_nobody_there_is_said_with_what_to_do(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a dead listener nor a dead token endpoint hangs; both say which."""
    monkeypatch.setattr(tokens_module, "FIRST_LIMIT_S", 0.6)
    identity = world.identity()
    async with AsyncAdminClient(identity, admin_port=1, token_port=world.token_port) as client:
        with pytest.raises(RpcFailed) as dead:
            await client.call("FirewallListRules", LIST, timeout_s=3)
        assert dead.value.status == "UNAVAILABLE" and "clawker-cp serve" in str(dead.value.hint)
    async with AsyncAdminClient(identity, admin_port=world.admin_port, token_port=1) as client:
        with pytest.raises(Unavailable, match="token endpoint"):
            await client.call("FirewallListRules", LIST)


async def test_an_authority_that_comes_up_late_is_waited_for(world: World) -> None:
    """The first token is tried every half second."""
    answers = [Answer(503), Answer(200, b"no json"), Answer(200, {"access_token": ""})]

    async def token(request: Request) -> Answer:
        return answers.pop(0) if answers else await world.authority.exchange(request.content_type, request.body, "")

    listener = HttpListener("late", Application({("/oauth2/token", "POST"): token}), [("127.0.0.1", 0)])
    listener.open()
    url = f"https://127.0.0.1:{listener.ports[0]}/oauth2/token"
    audience = f"https://127.0.0.1:{world.token_port}/oauth2/token"
    async with asyncio.TaskGroup() as group:
        group.create_task(listener.run(ListenerMaterial(world.tree).server_context()))
        assert await TokenSource(world.identity(), url=url, audience=audience).token()
        listener.close()
    assert answers == []


async def test_a_key_nobody_knows_is_refused_at_once(world: World, tmp_path: Path) -> None:
    """It is not tried for fifteen seconds, and neither assertion nor key is in the error."""
    other = tmp_path / "other"
    shutil.copytree(world.tree.root, other)
    stranger = AuthTree(tmp_path / "stranger")
    stranger.ensure()
    shutil.copy(stranger.path(SIGNING_KEY), other / SIGNING_KEY)
    async with asyncio.timeout(5), world.client(ClientIdentity(other)) as client:
        with pytest.raises(Unauthenticated, match="invalid_client"):
            await client.call("FirewallListRules", LIST)


async def test_another_ca_does_not_connect(world: World, tmp_path: Path) -> None:
    """A client of another tree trusts neither port, is told so at once, and is not asked whether the server runs."""
    stranger = AuthTree(tmp_path / "stranger")
    stranger.ensure()
    async with asyncio.timeout(5), world.client(ClientIdentity(stranger.root)) as client:
        with pytest.raises(RpcFailed) as channel:
            await client.call("GetSystemTime", admin.GetSystemTimeRequest(), timeout_s=3)
        with pytest.raises(Unavailable, match=r"ca\.pem does not cover") as endpoint:
            await client.call("FirewallListRules", LIST)

    assert (channel.value.status, endpoint.value.code) == ("UNAVAILABLE", "SERVER_UNTRUSTED")
    assert all("clawkerctl auth status" in str(error.value.hint) for error in (channel, endpoint))


async def test_a_clock_that_is_behind_is_waited_for_and_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it is behind, then at once; a clock ahead is fine."""
    monkeypatch.setattr(client_module, "CLOCK_EVERY_S", 0.01)
    async with world.client() as client:
        world.clock_offset_s = 100.0
        await client.wait_clock()
        world.clock_offset_s = -100.0
        with pytest.raises(DeadlineExceeded, match=r"100 s behind|99 s behind"):
            await client.wait_clock(limit_s=0.1)
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(client.wait_clock(limit_s=10))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            world.clock_offset_s = 0.0


@pytest.mark.parametrize(("offset_s", "said"), [(-3600.0, r"ahead of the control"), (3600.0, "behind the control")])
async def test_a_refusal_for_the_clock_says_so(world: World, offset_s: float, said: str) -> None:
    """By how much and in which direction; with equal clocks the hint is the key."""
    world.authority_clock = lambda: time.time() + offset_s
    async with world.client() as client:
        with pytest.raises(Unauthenticated) as refused:
            await client.call("FirewallListRules", LIST)
        assert refused.value.hint is not None and "signing.key" in refused.value.hint
        world.clock_offset_s = offset_s
        with pytest.raises(Unauthenticated) as refused:
            await client.call("FirewallListRules", LIST)
    assert refused.value.hint is not None and said in refused.value.hint
    assert "3600 s" in refused.value.hint or "3599 s" in refused.value.hint


async def test_every_reason_has_a_remedy() -> None:
    """Whatever the server refuses with, a person is told what to do; so is who is refused without a reason."""
    assert set(REMEDIES) == set(REASONS) - {"CP_NOT_RUNNING"}
    for status in ("UNAUTHENTICATED", "PERMISSION_DENIED", "UNAVAILABLE"):
        assert "?" in (RpcFailed(status, "no").hint or "")
    assert RpcFailed("INTERNAL", "no").hint is None


async def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """Before anything is dialled, with what makes it."""
    with pytest.raises(Unavailable, match=r"ca\.pem cannot be read") as missing:
        async with AsyncAdminClient(ClientIdentity(tmp_path)):
            pass
    assert "auth init" in str(missing.value.hint)
    (tmp_path / "cli").mkdir()
    (tmp_path / SIGNING_KEY).write_bytes(b"garbage")
    with pytest.raises(Unavailable, match="is no P-256 key"):
        ClientIdentity(tmp_path).assertion("x")


async def test_programs_without_a_loop_call_too(world: World) -> None:
    """The synchronous client in a thread of its own; using it closed is an error that says so."""

    def work() -> Any:
        identity = world.identity()
        with AdminClient(identity, admin_port=world.admin_port, token_port=world.token_port) as client:
            client.wait_clock()
            return client.call("FirewallListRules", LIST)

    assert to_json(await asyncio.to_thread(work)) == {}
    with pytest.raises(RpcFailed, match="not open"):
        AdminClient(world.identity()).call("FirewallListRules", LIST)


def test_public_keys_are_what_the_tree_says(tmp_path: Path) -> None:
    """The assertion's key and the tree's JWK are one pair."""
    tree = AuthTree(tmp_path / "auth")
    tree.ensure()
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(tree.path(SIGNING_KEY).read_bytes(), None)
    assert orjson.loads(tree.path(SIGNING_JWK).read_bytes()) == public_jwk(key.public_key())  # type: ignore[arg-type]
