"""What the front passes on, what it keeps to itself, how often it asks; Hydra is a server that obeys the test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from clawker_cp.auth import front as module
from clawker_cp.auth.front import HydraFront
from clawker_cp.runtime.asgi import Answer, Application, Request
from clawker_cp.runtime.listeners import HttpListener
from clawker_cp.testing.certificates import TestCa

LOCKED = Answer(500, {"error": "error", "debug": "database is locked (5)"})
GOOD = Answer(200, {"access_token": "t"}, {"X-Own": "kept back"})


class Upstream:
    """Answers one after the other from `answers`, then `GOOD`; remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.asked: list[Request] = []
        self.at_once = self.most_at_once = 0

    async def __call__(self, request: Request) -> Answer:
        self.asked.append(request)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        return self.answers.pop(0) if self.answers else GOOD


@asynccontextmanager
async def fronted(
    tmp_path: Path, upstream: Upstream, *, rate: int = 0
) -> AsyncIterator[tuple[HydraFront, httpx.AsyncClient]]:
    ca = TestCa(tmp_path)
    hydra = HttpListener(
        "hydra",
        Application({("/oauth2/token", "POST"): upstream, ("/health/alive", "GET"): upstream}),
        [("127.0.0.1", 0)],
    )
    hydra.open()
    front = HydraFront(f"https://127.0.0.1:{hydra.ports[0]}", ca.client_context(), exchanges_per_s=rate)
    front.ready = True
    listener = HttpListener("front", front.application(), [("127.0.0.1", 0)])
    listener.open()
    base = f"https://127.0.0.1:{listener.ports[0]}"
    async with asyncio.TaskGroup() as group:
        group.create_task(hydra.run(ca.server_context()))
        group.create_task(listener.run(ca.server_context()))
        async with httpx.AsyncClient(verify=ca.client_context(), base_url=base, trust_env=False) as client:
            try:
                yield front, client
            finally:
                await front.aclose()
                hydra.close()
                listener.close()


async def test_a_request_is_passed_on_as_it_is(tmp_path: Path) -> None:
    """Body and content type arrive, status and body come back, and only the headers that OAuth2 has."""
    upstream = Upstream()
    async with fronted(tmp_path, upstream) as (_, client):
        answer = await client.post(
            "/oauth2/token", data={"grant_type": "x"}, headers={"authorization": "Bearer secret"}
        )
    (asked,) = upstream.asked
    assert (asked.body, asked.content_type) == (b"grant_type=x", "application/x-www-form-urlencoded")
    assert (answer.status_code, answer.json()) == (200, {"access_token": "t"})
    assert "x-own" not in answer.headers and answer.headers["cache-control"] == "no-store"


async def test_a_locked_database_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice at most; another failure is not, and the third lock is passed on."""
    monkeypatch.setattr(module, "JITTER_S", (0.0, 0.0))
    upstream = Upstream()
    async with fronted(tmp_path, upstream) as (front, client):
        upstream.answers = [LOCKED, LOCKED]
        assert (await client.post("/oauth2/token", content=b"x")).status_code == 200
        assert (front.repeated, len(upstream.asked)) == (2, 3)
        upstream.answers = [LOCKED, LOCKED, LOCKED]
        answer = await client.post("/oauth2/token", content=b"x")
        assert answer.status_code == 500 and json.loads(answer.content)["error"] == "error"
        upstream.answers = [Answer(500, {"error": "error"})]
        assert (await client.post("/oauth2/token", content=b"x")).status_code == 500
        assert len(upstream.asked) == 7


async def test_exchanges_go_one_at_a_time(tmp_path: Path) -> None:
    """However many come at once."""
    upstream = Upstream()
    async with fronted(tmp_path, upstream) as (_, client):
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(client.post("/oauth2/token", content=b"x")) for _ in range(20)]
        assert all(call.result().status_code == 200 for call in calls)
    assert (len(upstream.asked), upstream.most_at_once) == (20, 1)


async def test_what_is_not_offered_never_reaches_hydra(tmp_path: Path) -> None:
    """Other places are 404, other methods 405, giants 413, too many 429: all without a question."""
    upstream = Upstream()
    async with fronted(tmp_path, upstream, rate=1) as (_, client):
        for path in ("/oauth2/auth", "/admin/clients", "/oauth2/token/../../admin/clients"):
            assert (await client.post(path)).status_code == 404
        assert (await client.get("/oauth2/token")).status_code == 405
        assert (await client.post("/oauth2/token", content=b"x" * 20_000)).status_code == 413
        assert not upstream.asked
        statuses = [(await client.post("/oauth2/token", content=b"x")).status_code for _ in range(210)]
        assert 429 in statuses and len(upstream.asked) == statuses.count(200)
        assert (await client.get("/health/alive")).status_code == 200


async def test_a_hydra_that_is_not_ready_or_gone_is_a_503(tmp_path: Path) -> None:
    """With a time to wait, and what went wrong only in the log."""
    ca = TestCa(tmp_path)
    front = HydraFront("https://127.0.0.1:1", ca.client_context(), exchanges_per_s=0)
    for ready, said in ((False, "starting"), (True, "does not answer")):
        front.ready = ready
        answer = await front._answer(Request("POST", "/oauth2/token", {}, "x", b"", "127.0.0.1"))
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert isinstance(answer.body, dict) and answer.body["error"] == "temporarily_unavailable"
        assert said in answer.body["error_description"]
    for _ in range(2):  # closed already, it has nothing to close
        await front.aclose()
