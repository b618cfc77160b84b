"""Hydra's signing key is made once, and what was revoked here stays revoked although Hydra calls it active."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from clawker_cp.agents.database import Database
from clawker_cp.auth.authority.ledger import Ledger
from clawker_cp.auth.hydra import KEY, BarList, ensure_access_token_key
from clawker_cp.errors import Unavailable
from clawker_cp.runtime.asgi import Answer, Application, Request
from clawker_cp.runtime.listeners import HttpListener
from clawker_cp.testing.certificates import TestCa

PLACE = "/admin/keys/hydra.jwt.access-token"
NOW = 1_000_000


async def test_the_key_is_made_where_there_is_none(tmp_path: Path) -> None:
    """Asked for first, made once, and a refusal names the status and not the answer."""
    ca, status = TestCa(tmp_path), [201]
    made: list[Any] = []

    async def get(_: Request) -> Answer:
        return Answer(200, {"keys": made}) if made else Answer(404, {"error": "Not Found"})

    async def post(request: Request) -> Answer:
        if status[0] == 201:
            made.append(request.body)
        return Answer(status[0], {"d": "a private number"})

    def shown() -> list[Any]:
        return [bytes(one) for one in made]

    listener = HttpListener("hydra", Application({(PLACE, "GET"): get, (PLACE, "POST"): post}), [("127.0.0.1", 0)])
    listener.open()
    base, tls = f"https://127.0.0.1:{listener.ports[0]}/", ca.client_context()
    async with asyncio.TaskGroup() as group:
        group.create_task(listener.run(ca.server_context()))
        status[0] = 500
        with pytest.raises(Unavailable, match="500") as caught:
            await ensure_access_token_key(base, tls)
        assert "private" not in str(caught.value)
        status[0] = 201
        await ensure_access_token_key(base, tls)
        assert b'"ES256"' in shown()[0] and KEY["use"] == "sig"
        made[:] = [{"kid": "at1"}]
        await ensure_access_token_key(base, tls)
        assert made == [{"kid": "at1"}]
        listener.close()
    with pytest.raises(Unavailable, match="ConnectError"):
        await ensure_access_token_key(base, tls)


async def test_what_was_revoked_is_barred_and_outlives_the_process(tmp_path: Path) -> None:
    """One token by its digest; a client's and all tokens issued until then, and no later ones."""
    for kind, id_, other in (("digest", bytes(32).hex(), False), ("client", "clawker-cli", True), ("all", "", True)):
        database = Database(tmp_path / f"{kind}.db")
        database.open()
        ledger = Ledger(database)
        slept: list[float] = []

        async def sleep(seconds: float, into: list[float] = slept) -> None:
            into.append(seconds)

        bars = BarList(ledger, wall=lambda: NOW + 0.25, sleep=sleep)
        assert not bars.barred(bytes(32), "clawker-cli", NOW + 3600)
        await bars.bar(kind, id_)
        assert slept == ([0.75] if other else [])  # what is issued after the answer has a later second
        again = Ledger(database)
        again.load(NOW)
        for one in (bars, BarList(again)):
            assert one.barred(bytes(32), "clawker-cli", NOW + 3600)
            assert one.barred(b"x" * 32, "clawker-cli", NOW + 3600) is other
            assert not one.barred(b"x" * 32, "clawker-cli", NOW + 3601)
            assert one.barred(b"x" * 32, "clawker-agent", NOW + 3600) is (kind == "all")
        database.close()
