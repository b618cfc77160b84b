"""
Answers per second of the gate on one core, asked by dnsperf from another network namespace.

"Of a core" is answers a second of the server's own processor time, which is what a core to itself would give: on a
shared machine the clock also measures the neighbours.

Prints ratios to a bare UDP echo on the same loop, to the plain twins and, where installed, to CoreDNS.
Run with `-s` to see the table.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clawker_cp.testing.peers import peer

HERE = Path(__file__).parent
SECONDS = int(os.environ.get("BENCH_SECONDS", "3"))
REPEATS = int(os.environ.get("BENCH_REPEATS", "1"))
SERVER, CLIENT = "198.51.100.1", "198.51.100.2"

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(shutil.which("dnsperf") is None, reason="dnsperf is not installed (Debian: dnsperf)"),
]


@dataclass(frozen=True)
class Result:
    """What dnsperf said."""

    per_second: float
    mean_ms: float
    lost_percent: float
    per_core_second: float = 0.0


def run(*command: str) -> None:
    """Run a set-up command."""
    subprocess.run(command, check=True, timeout=20)


@pytest.fixture(scope="module")
def namespaces() -> Iterator[tuple[str, str]]:
    """Two namespaces joined by a veth pair, and nothing else in them."""
    stem = f"bd{os.getpid() % 10_000}{random.randrange(100)}"
    server, client = f"{stem}s", f"{stem}c"
    try:
        for name in (server, client):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "-n", server, "link", "add", "v0", "type", "veth", "peer", "name", "v0", "netns", client)
        for name, address in ((server, SERVER), (client, CLIENT)):
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "v0")
            run("ip", "-n", name, "link", "set", "v0", "up")
        yield server, client
    finally:
        for name in (server, client):
            subprocess.run(("ip", "netns", "del", name), check=False, timeout=20)


@contextmanager
def serving(namespace: str, what: str, loop: str, *more: str, plain: bool = False) -> Iterator[int]:
    """Run one server pinned to the first core; the resolver it asks is on the other."""
    environment = dict(os.environ, PYTHONPATH=str(HERE.parent / "src"), CLAWKER_CP_NO_EXTENSIONS="1" if plain else "")
    command = [
        "ip",
        "netns",
        "exec",
        namespace,
        "taskset",
        "-c",
        "1" if what == "resolver" else "0",
        sys.executable,
        str(HERE / "dns_server.py"),
    ]
    with subprocess.Popen(
        [*command, what, loop, SERVER, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline().strip() == "ready"
            yield process.pid  # every program on the way replaces itself with the next
            process.stdin.close()
            process.stdout.read()
            process.wait(10)
        finally:
            process.kill()


def core_seconds(pid: int) -> float:
    """What a process and its children have had of the cores."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ticks = 0
    for one in (str(pid), *children):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def ask(
    namespace: str, names: list[str], path: Path, *, outstanding: int = 100, once: bool = False, server: int = 0
) -> Result:
    """Ask names for a while with dnsperf on the other core."""
    path.write_text("".join(f"{name} A\n" for name in names))
    limit = ["-n", "1"] if once else ["-l", str(SECONDS)]
    before = core_seconds(server) if server else 0.0
    said = subprocess.run(
        ["ip", "netns", "exec", namespace, "taskset", "-c", "1", "dnsperf", "-s", SERVER, "-d", str(path), "-e"]
        + ["-q", str(outstanding), "-t", "2", *limit],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip

    def number(pattern: str) -> float:
        found = re.search(pattern, said)
        assert found is not None, said
        return float(found[1])

    spent = core_seconds(server) - before if server else 0.0
    return Result(
        number(r"Queries per second:\s+([\d.]+)"),
        1000 * number(r"Average Latency \(s\):\s+([\d.]+)"),
        number(r"Queries lost:\s+\d+ \(([\d.]+)%"),
        number(r"Queries completed:\s+(\d+)") / spent if spent else 0.0,
    )


def percentiles(namespace: str, names: list[str], path: Path, *, rate: int) -> tuple[float, float]:
    """Return p50 and p99 in milliseconds at a steady rate far below the limit."""
    path.write_text("".join(f"{name} A\n" for name in names))
    said = subprocess.run(
        ["ip", "netns", "exec", namespace, "taskset", "-c", "1", "dnsperf", "-s", SERVER, "-d", str(path), "-e", "-v"]
        + ["-q", "20", "-Q", str(rate), "-l", str(SECONDS)],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    found = sorted(1000 * float(value) for value in re.findall(r"^> NOERROR \S+ A ([\d.]+)", said, re.MULTILINE))
    return found[len(found) // 2], found[len(found) * 99 // 100]


HITS = [f"host-{number}.example.com" for number in range(1000)]
DENIED = [f"host-{number}.evil.example" for number in range(1000)]
MISSES = [f"n{number}.wild.example" for number in range(20_000)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bench_dns(benchmark: Any, namespaces: tuple[str, str], tmp_path: Path) -> None:
    """dns_hit, dns_denied and dns_miss, each next to its ceiling and its twin, in one run."""
    repeats = REPEATS if benchmark.enabled else 1
    series: dict[str, list[Result]] = {}
    latency: dict[str, list[tuple[float, float]]] = {}

    def all_of_it() -> None:
        for _ in range(repeats):
            measure(namespaces, tmp_path, series, latency, once=not benchmark.enabled)

    benchmark.group = "dns"
    benchmark.pedantic(all_of_it, rounds=1)
    results = {name: sorted(found, key=lambda one: one.per_second)[len(found) // 2] for name, found in series.items()}
    ceiling = results["echo uvloop"].per_core_second or 1.0
    print(f"\n{'':38}{'answers/s':>12}{'of a core':>12}{'mean ms':>10}{'lost %':>8}{'of echo':>9}")
    for name, result in results.items():
        print(
            f"{name:38}{result.per_second:12,.0f}{result.per_core_second:12,.0f}{result.mean_ms:10.3f}"
            f"{result.lost_percent:8.2f}{result.per_core_second / ceiling:9.2f}"
        )
    for name, found in latency.items():
        half, most = (statistics.median(one) for one in zip(*found, strict=True))
        print(f"dns_hit {name} at 10,000/s: p50 {half:.3f} ms, p99 {most:.3f} ms")
    assert all(result.lost_percent < 1 for result in results.values())
    if benchmark.enabled:
        plain = results["dns_hit gate, plain twins"]
        assert results["dns_hit gate"].per_core_second > plain.per_core_second


def measure(
    namespaces: tuple[str, str],
    directory: Path,
    series: dict[str, list[Result]],
    latency: dict[str, list[tuple[float, float]]],
    *,
    once: bool,
) -> None:
    """Every server once, one after the other."""
    server, client = namespaces
    path = directory / "names"

    def note(name: str, result: Result) -> None:
        series.setdefault(name, []).append(result)

    for loop in ("uvloop", "asyncio"):
        with serving(server, "echo", loop) as pid:
            note(f"echo {loop}", ask(client, HITS, path, once=once, server=pid))
    coredns = peer("coredns")
    ways: dict[str, tuple[tuple[str, ...], bool]] = {"gate": (("gate", "uvloop"), False)}
    ways["gate, plain twins"] = (("gate", "uvloop"), True)
    if coredns is not None:
        ways["CoreDNS"] = (("coredns", "uvloop", str(coredns), str(directory)), False)
    for label, (way, plain) in ways.items():
        with serving(server, "resolver", "uvloop"), serving(server, *way, plain=plain) as pid:
            ask(client, HITS, path, once=True)
            note(f"dns_hit {label}", ask(client, HITS, path, once=once, server=pid))
            if not once:
                latency.setdefault(label, []).append(percentiles(client, HITS, path, rate=10_000))
            note(f"dns_denied {label}", ask(client, DENIED, path, once=once, server=pid))
            note(f"dns_miss {label}", ask(client, MISSES[:1000] if once else MISSES, path, once=True, server=pid))
