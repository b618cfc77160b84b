"""
Whole calls over mTLS: without interceptors, with a cached token, and with a question to the authority for every call.

The authority is the embedded one and, where it was built (`make peers`), the real Hydra. The server has one core;
client and authority share the other. Wanted: cached at least 6 times the calls a second, and at most a fifth of the
p50, of the same server asking Hydra each time. `BENCH_SECONDS` is how long each figure is measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from clawker_cp.testing.certificates import TestCa
from clawker_cp.testing.peers import peer

HERE = Path(__file__).parent
SECONDS = float(os.environ.get("BENCH_SECONDS", "2"))
REPEATS = int(os.environ.get("BENCH_REPEATS", "1"))
IN_FLIGHT = (1, 16, 64)
CACHED_S = "10"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
Figures = dict[str, float]


def command(core: str, program: str, *arguments: str) -> list[str]:
    """A benchmark's program, on a core."""
    return ["taskset", "-c", core, sys.executable, str(HERE / program), *arguments]


@contextmanager
def running(core: str, program: str, *arguments: str) -> Iterator[str]:
    """Run a part until the block ends; gives the line it says when it is ready."""
    with subprocess.Popen(
        command(core, program, *arguments),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None and process.stdin is not None
            yield process.stdout.readline().strip()
            process.stdin.close()
            process.wait(30)
        finally:
            process.kill()


def measured(directory: Path, port: str, tokens: Path, rpc: str, in_flight: int, seconds: float) -> Figures:
    """One client's figures."""
    arguments = ("client", str(directory), port, str(tokens), rpc, str(in_flight), str(seconds))
    done = subprocess.run(
        command("1", "rpc_parts.py", *arguments), capture_output=True, text=True, check=True, timeout=seconds + 60
    )
    figures: Figures = json.loads(done.stdout)
    return figures


def test_bench_rpc_unary(benchmark: Any, tmp_path: Path) -> None:
    """ListAgents and FirewallStatus at 1, 16 and 64 calls in flight; medians of BENCH_REPEATS."""
    ca = TestCa(tmp_path)
    ca.server()
    ca.leaf("clawker-cli")
    seconds, flights = (SECONDS, IN_FLIGHT) if benchmark.enabled else (0.2, (16,))
    kinds = ["embedded", *(["hydra"] if benchmark.enabled and peer("hydra") else [])]
    series: dict[tuple[str, str, int], list[Figures]] = {}

    def all_of_it() -> None:
        with ExitStack() as stack:
            said = {}
            for kind in kinds:
                (tmp_path / kind).mkdir(exist_ok=True)
                said[kind] = stack.enter_context(running("1", "authority_server.py", kind, str(tmp_path / kind)))
                (tmp_path / kind / "one").write_text((tmp_path / kind / "tokens").read_text().split()[0])
            modes = {"no interceptors": ("none", "embedded", "one")}
            for kind in kinds:
                modes[f"{kind}, cached"] = (CACHED_S, kind, "one")
                modes[f"{kind}, asked each time"] = ("0", kind, "tokens")
            for mode, (ttl, kind, tokens) in modes.items():
                with running("0", "rpc_parts.py", "server", str(tmp_path), ttl, said[kind]) as port:
                    for rpc in ("ListAgents", "FirewallStatus"):
                        for in_flight in flights:
                            found = measured(tmp_path, port, tmp_path / kind / tokens, rpc, in_flight, seconds)
                            series.setdefault((rpc, mode, in_flight), []).append(found)

    benchmark.group = "rpc_unary"
    for _ in range(REPEATS - 1 if benchmark.enabled else 0):
        all_of_it()
    benchmark.pedantic(all_of_it, rounds=1)
    results = {
        key: {name: statistics.median(one[name] for one in found) for name in found[0]} for key, found in series.items()
    }
    print(f"\n{'':42}{'in flight':>10}{'calls/s':>10}{'p50 ms':>9}{'p99 ms':>9}{'of bare':>9}")
    for (rpc, mode, in_flight), result in results.items():
        ratio = result["per_second"] / results[rpc, "no interceptors", in_flight]["per_second"]
        print(
            f"{rpc + ': ' + mode:42}{in_flight:>10}{result['per_second']:>10.0f}{result['p50_ms']:>9.2f}"
            f"{result['p99_ms']:>9.2f}{ratio:>9.2f}"
        )
    for kind in kinds:
        for in_flight in flights:
            often = results["ListAgents", f"{kind}, cached", in_flight]
            seldom = results["ListAgents", f"{kind}, asked each time", in_flight]
            more, sooner = often["per_second"] / seldom["per_second"], seldom["p50_ms"] / often["p50_ms"]
            print(
                f"cached over {kind} asked each time, {in_flight} in flight: {more:.1f} x the calls, p50 1/{sooner:.1f}"
            )
            assert more > 1
