"""
One rule more, in a running Envoy: from plan to acknowledged, next to the other ways of getting there.

Needs root (a network namespace of its own) and the real Envoy. Connections lost must be 0.
Run: python -m pytest benchmarks/test_bench_rule_apply.py --benchmark-only
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from clawker_cp.firewall.envoy.files import replace_file
from clawker_cp.firewall.rules import Rule
from clawker_cp.testing.plan_world import rule
from clawker_cp.testing.proxy_world import OUTSIDE, ProxyWorld, proxy_world, read_response, run_in_namespace

pytestmark = [pytest.mark.root, pytest.mark.envoy, pytest.mark.slow]

ROUNDS = 9


def _rules(count: int) -> list[Rule]:
    return [rule(f"https://host{number:04}.example.com") for number in range(count)]


async def _add_one(world: ProxyWorld, rules: list[Rule], number: int) -> float:
    began = time.perf_counter()
    await world.apply(*rules, rule(f"https://added{number}.example.com"))
    return time.perf_counter() - began


async def _restart(world: ProxyWorld, rules: list[Rule], number: int) -> float:
    plan = world.compile([*rules, rule(f"https://added{number}.example.com")]).plan
    began = time.perf_counter()
    await world.stack.stop()
    await world.stack.start(plan)
    return time.perf_counter() - began


async def _replace_listener(world: ProxyWorld, rules: list[Rule], number: int) -> float:
    """Write the listener again with another connection buffer, as a layout with rules in it would."""
    path = world.options.directory / "lds.json"
    document = orjson.loads(path.read_bytes())
    version = str(int(document["version_info"]) + 1_000_000 + number)
    document["version_info"] = version
    for listener in document["resources"]:
        listener["per_connection_buffer_limit_bytes"] += number + 1
    began = time.perf_counter()
    replace_file(path, orjson.dumps(document), 0o640)
    while True:
        found = await world.stack.admin.statistics("lds.version_text|total_listeners_warming")
        if found.get("listener_manager.lds.version_text") == version:
            break
        await asyncio.sleep(0.002)
    # The old listener's connections are gone when its drain time is over.
    return time.perf_counter() - began


WAYS = {"rule": _add_one, "restart": _restart, "listener": _replace_listener}


@pytest.mark.parametrize("count", [10, 1000])
@pytest.mark.parametrize("way", list(WAYS))
def test_bench_rule_apply(benchmark: Any, tmp_path: Path, way: str, count: int) -> None:
    """Accepted to acknowledged; `lost` is how many of 20 open connections did not survive."""
    times: list[float] = []
    lost = 0

    async def main() -> None:
        nonlocal lost
        rules = _rules(count)
        async with proxy_world(tmp_path, *rules) as world:
            world.view.zone["host0000.example.com"] = OUTSIDE
            await world.outside.http(443, "host0000.example.com")
            connections = [await world.connect("host0000.example.com") for _ in range(20)]
            rounds = ROUNDS if way == "rule" else 3
            for number in range(rounds):
                times.append(await WAYS[way](world, rules, number))
            await asyncio.sleep(1.5)  # what is drained goes within the drain time
            for reader, writer in connections:
                try:
                    writer.write(b"GET / HTTP/1.1\r\nHost: host0000.example.com\r\n\r\n")
                    async with asyncio.timeout(5):
                        status, _, _ = await read_response(reader)
                    lost += status != 200
                except (OSError, EOFError, TimeoutError):
                    lost += 1
                writer.close()

    run_in_namespace(main)
    shutil.rmtree(tmp_path, ignore_errors=True)
    series = itertools.cycle(times)
    benchmark.pedantic(lambda: next(series), rounds=1)
    benchmark.extra_info.update(
        median_ms=round(statistics.median(times) * 1e3, 1), worst_ms=round(max(times) * 1e3, 1), lost=lost
    )
    print(
        f"{way} at {count} rules: median {statistics.median(times) * 1e3:.1f} ms, "
        f"worst {max(times) * 1e3:.1f} ms, lost {lost} of 20 connections"
    )
    if way == "rule":
        assert lost == 0
