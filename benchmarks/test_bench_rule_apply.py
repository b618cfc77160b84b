"""
One rule added, changed or removed in a running Envoy: from accepted to acknowledged, connections lost (must be 0).

Peers: restarting the same Envoy with the same configuration, and replacing its listener whole. Needs root (a network
namespace of its own) and the real Envoy. What a caller of the server waits, kernel and disk included, is in
test_bench_cold_start.py.
"""

from __future__ import annotations

import asyncio
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

pytestmark = [pytest.mark.root, pytest.mark.envoy, pytest.mark.slow, pytest.mark.timeout(600)]

ROUNDS = {"add": 30, "change": 30, "remove": 30, "restart": 5, "listener": 5}
COUNTS = (10, 100, 1000)
CHANGES = ("add", "change", "remove")


def _rules(count: int) -> list[Rule]:
    return [rule(f"https://host{number:04}.example.com") for number in range(count)]


async def _add_one(world: ProxyWorld, rules: list[Rule], number: int) -> float:
    return await _applied(world, *rules, rule(f"https://added{number}.example.com"))


async def _change_one(world: ProxyWorld, rules: list[Rule], number: int) -> float:
    """A rule of the middle gets another path."""
    changed = list(rules)
    changed[len(rules) // 2] = rule(f"https://host{len(rules) // 2:04}.example.com/v{number}")
    return await _applied(world, *changed)


async def _remove_one(world: ProxyWorld, rules: list[Rule], number: int) -> float:
    await world.apply(*rules, rule(f"https://added{number}.example.com"))
    return await _applied(world, *rules)


async def _applied(world: ProxyWorld, *rules: Rule) -> float:
    began = time.perf_counter()
    await world.apply(*rules)
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


WAYS = {
    "add": _add_one,
    "change": _change_one,
    "remove": _remove_one,
    "restart": _restart,
    "listener": _replace_listener,
}


@pytest.mark.parametrize("count", COUNTS)
def test_bench_rule_apply(benchmark: Any, tmp_path: Path, count: int) -> None:
    """Every way in one run; `lost` is how many of 20 open connections did not survive it."""
    found: dict[str, tuple[list[float], int]] = {}

    async def one(way: str, directory: Path) -> tuple[list[float], int]:
        rules = _rules(count)
        async with proxy_world(directory, *rules) as world:
            world.view.zone["host0000.example.com"] = OUTSIDE
            await world.outside.http(443, "host0000.example.com")
            connections = [await world.connect("host0000.example.com") for _ in range(20)]
            rounds = ROUNDS[way] if benchmark.enabled else 1
            took = [await WAYS[way](world, rules, number) for number in range(rounds)]
            await asyncio.sleep(1.5)  # what is drained goes within the drain time
            return took, await _lost(connections)

    async def main() -> None:
        for way in WAYS if benchmark.enabled or count == COUNTS[0] else CHANGES[:1]:
            directory = tmp_path / way
            directory.mkdir()
            found[way] = await one(way, directory)
            shutil.rmtree(directory, ignore_errors=True)

    benchmark.group = "rule_apply"
    benchmark.pedantic(lambda: run_in_namespace(main), rounds=1)
    base = statistics.median(found["add"][0])
    print()
    for way, (took, lost) in found.items():
        middle = statistics.median(took)
        print(
            f"{count:>5} rules, {way:<9} p50 {middle * 1e3:7.1f} ms, p99 {_p99(took) * 1e3:7.1f} ms, "
            f"{middle / base:6.1f} x adding one, lost {lost:>2} of 20 connections"
        )
    assert [found[way][1] for way in CHANGES if way in found] == [0] * len(found.keys() & set(CHANGES))


def _p99(took: list[float]) -> float:
    return sorted(took)[len(took) * 99 // 100]


async def _lost(connections: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> int:
    """How many connections no longer answer."""
    lost = 0
    for reader, writer in connections:
        try:
            writer.write(b"GET / HTTP/1.1\r\nHost: host0000.example.com\r\n\r\n")
            async with asyncio.timeout(5):
                status, _, _ = await read_response(reader)
            lost += status != 200
        except (OSError, EOFError, TimeoutError):
            lost += 1
        writer.close()
    return lost
