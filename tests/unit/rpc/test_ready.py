"""Before the control plane is ready only its boot methods are served."""

from __future__ import annotations

from pathlib import Path

from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.rpc.interceptors.ready import BOOT_METHODS, STARTING
from clawker_cp.testing.rpc_world import (
    CHAT,
    MANY,
    ONE,
    SCOPES,
    SUM,
    Authority,
    Kinds,
    RpcWorld,
    active,
    bearer,
    outcome,
)


async def test_the_gate_opens_when_ready(tmp_path: Path) -> None:
    """Until then every kind of call is refused before its token is looked at; readiness counts from the next call."""
    ready = False
    authority, kinds = Authority(good=active()), Kinds()
    world = RpcWorld(tmp_path)
    auth = AuthInterceptor(authority, SCOPES)
    async with world.serving(auth, kinds, is_ready=lambda: ready) as (_server, channel):
        for method in (ONE, MANY, SUM, CHAT, "/not/served"):
            assert await outcome(channel, method, bearer("good")) == ("FAILED_PRECONDITION", STARTING)
        assert kinds.reached == [] and authority.asked == []
        ready = True
        assert await outcome(channel, ONE, bearer("good")) == ("OK", "")


async def test_boot_methods_pass_the_gate_but_not_the_rest(tmp_path: Path) -> None:
    """They are authenticated like any other call."""
    from clawker_cp.rpc.interceptors.ready import ReadyGate

    world = RpcWorld(tmp_path)
    auth = AuthInterceptor(Authority(good=active()), SCOPES)
    async with world.serving(auth, identity=[ReadyGate(lambda: False, frozenset({ONE}))]) as (_server, channel):
        assert await outcome(channel, ONE) == ("UNAUTHENTICATED", "missing bearer token")
        assert await outcome(channel, ONE, bearer("good")) == ("OK", "")
        assert await outcome(channel, MANY, bearer("good")) == ("FAILED_PRECONDITION", STARTING)


def test_boot_methods_are_the_contracts() -> None:
    """The clock, the alarm and the state, and nothing that changes anything."""
    assert {
        "/clawker.admin.v1.AdminService/GetSystemTime",
        "/clawker.admin.v1.AdminService/WatchSOS",
        "/clawker.control.v1.ControlService/GetStatus",
    } == BOOT_METHODS
