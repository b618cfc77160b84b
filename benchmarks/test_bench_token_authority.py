"""
What a token costs at the authority: an exchange (ES256 assertion for token) and an introspection.

The embedded authority and, where it was built, the real Hydra behind our front: the same client, the same requests,
the authority on the other core. `token_hit` in test_bench_auth.py is what the cache makes of an introspection.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_bench_rpc_unary import running

from clawker_cp.auth.authority.service import ASSERTION_TYPE
from clawker_cp.auth.introspect import HydraIntrospector
from clawker_cp.testing.peers import peer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
FORM = {"grant_type": "client_credentials", "client_assertion_type": ASSERTION_TYPE, "scope": "admin"}
EXCHANGES, QUESTIONS = 300, 600


async def timed(work: Callable[[str], Awaitable[object]], inputs: list[str]) -> tuple[float, float]:
    """Do one after the other; returns how many a second, and the p50 in milliseconds."""
    took = []
    for one in inputs:
        began = time.perf_counter()
        await work(one)
        took.append(time.perf_counter() - began)
    return len(took) / sum(took), 1000 * statistics.median(took)


async def measure(addresses: dict[str, str], directory: Path, share: float) -> dict[str, tuple[float, float]]:
    """Exchanges and introspections of one authority, one at a time."""
    tokens, assertions = ((directory / name).read_text().split() for name in ("tokens", "assertions"))
    tls = ssl.create_default_context(cafile=addresses["ca"])
    asked = HydraIntrospector(addresses["introspect"], tls)

    async def ask(token: str) -> None:
        assert (await asked.introspect(token, "admin")).active

    async with httpx.AsyncClient(verify=tls, trust_env=False, timeout=10) as http:

        async def exchange(assertion: str) -> None:
            answer = await http.post(addresses["exchange"], data={**FORM, "client_assertion": assertion})
            assert answer.status_code == 200, answer.text

        await exchange(assertions.pop())
        await ask(tokens[0])
        questions = (tokens * 8)[: max(1, int(QUESTIONS * share))]
        found = {"token_exchange": await timed(exchange, assertions[: max(1, int(EXCHANGES * share))])}
        found["introspection"] = await timed(ask, questions)
    await asked.aclose()
    return found


def test_bench_token_authority(benchmark: Any, tmp_path: Path) -> None:
    """Calls a second and p50 of each authority, and their ratio."""
    share = 1.0 if benchmark.enabled else 0.02
    results: dict[str, dict[str, tuple[float, float]]] = {}

    def both() -> None:
        for kind in ("embedded", *(["hydra"] if peer("hydra") else [])):
            (tmp_path / kind).mkdir(exist_ok=True)
            with running("1", "authority_server.py", kind, str(tmp_path / kind)) as said:
                results[kind] = asyncio.run(measure(json.loads(said), tmp_path / kind, share))

    benchmark.group = "token_authority"
    benchmark.pedantic(both, rounds=1)
    print()
    for kind, found in results.items():
        for name, (per_second, p50) in found.items():
            ratio = per_second / results["embedded"][name][0]
            print(f"{name:<16}{kind:<10}{per_second:8.0f}/s  p50 {p50:6.2f} ms  {ratio:5.2f} x the rate of ours")
