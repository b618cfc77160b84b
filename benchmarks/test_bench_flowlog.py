"""
Kernel records to disk, stage by stage: decoded, enriched, taken, encoded and written. 4,096 records a round.

The budget is 200,000 a second on one core, so 20.5 ms for a round of `whole`. Baselines: the plain decoder, and
orjson over dictionaries in place of the typed encoder.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from pathlib import Path
from typing import Any

import orjson
import pytest

from clawker_cp import accel
from clawker_cp._fast.events import decode_events as fast_decode
from clawker_cp._pure.events import decode_events as plain_decode
from clawker_cp.telemetry import enrich
from clawker_cp.telemetry.flowlog import FlowLog
from clawker_cp.telemetry.flows import Flow, encode_lines
from clawker_cp.telemetry.summary import Summary

COUNT = 4096
_RECORD = struct.Struct("<QQQQ16sIIIIIHHBBBBBBB9x")


class Who:
    """An agent."""

    id = "c" * 64
    project = "bench"
    agent = "worker"


def buffer() -> bytes:
    """Return records of one agent to 200 addresses, a tenth of them denied."""
    records = []
    for n in range(COUNT):
        address = b"\0" * 10 + b"\xff\xff" + socket.inet_aton(f"203.0.113.{n % 200}")
        verdict, reason = (2, 4) if n % 10 == 0 else (4, 69)
        records.append(
            _RECORD.pack(
                10**12 + n, 4711, n + 1, n, address, 257, 3, 0, 1001, 4242, 443, 12001, verdict, reason, 1, 2, 6, 1, 0
            )
        )
    return b"".join(records)


BUFFER = buffer()
NAMES = {f"203.0.113.{n}": f"host-{n}.example.com" for n in range(200)}


def to_flows(events: list[Any]) -> list[Flow]:
    """Enrich as the pipeline does."""
    who = Who()
    return enrich.kernel_flows(
        events,
        lambda _cgroup: who,
        offset_ns=1,
        rule_ids=("https:example.com",),
        name_of=lambda _cgroup, address: NAMES.get(address, ""),
        sequences=enrich.Sequences(),
    )


@pytest.mark.benchmark(group="decode 4096 records")
@pytest.mark.parametrize("decode", [fast_decode, plain_decode], ids=["accel", "plain"])
def test_bench_decode(benchmark: Any, decode: Any) -> None:
    """Ring buffer bytes to objects."""
    assert len(benchmark(decode, BUFFER, accel.KernelEvent)) == COUNT


@pytest.mark.benchmark(group="enrich 4096 records")
def test_bench_enrich(benchmark: Any) -> None:
    """Objects to flow records."""
    events = accel.decode_events(BUFFER)
    assert len(benchmark(to_flows, events)) == COUNT


@pytest.mark.benchmark(group="summarise 4096 records")
def test_bench_summary(benchmark: Any) -> None:
    """The counts that the end of a run prints."""
    flows = to_flows(accel.decode_events(BUFFER))
    benchmark(lambda: Summary().add(flows))


def _by_dictionary(flows: list[Flow]) -> bytes:
    return b"".join(orjson.dumps(flow.as_mapping(), option=orjson.OPT_APPEND_NEWLINE) for flow in flows)


@pytest.mark.benchmark(group="encode 4096 records")
@pytest.mark.parametrize("encode", [encode_lines, _by_dictionary], ids=["typed", "orjson"])
def test_bench_encode(benchmark: Any, encode: Any) -> None:
    """Flow records to lines."""
    flows = to_flows(accel.decode_events(BUFFER))
    assert benchmark(encode, flows).count(b"\n") == COUNT


@pytest.mark.benchmark(group="take 4096 records")
@pytest.mark.parametrize("subscribers", [0, 4])
def test_bench_take(benchmark: Any, tmp_path: Path, subscribers: int) -> None:
    """Flow records into memory, queue and subscribers."""
    flows = to_flows(accel.decode_events(BUFFER))
    log = FlowLog(tmp_path / "f")

    def take() -> None:
        log.add(flows)
        log._pending.clear()

    async def round_of() -> None:
        async with asyncio.TaskGroup() as group:
            del group
            stack = [log.subscribe() for _ in range(subscribers)]
            for entry in stack:
                await entry.__aenter__()
            benchmark(take)
            for entry in stack:
                await entry.__aexit__(None, None, None)

    asyncio.run(round_of())


@pytest.mark.benchmark(group="whole 4096 records")
def test_bench_whole(benchmark: Any, tmp_path: Path) -> None:
    """Ring buffer bytes to lines on disk, everything on one core; nothing may be lost."""
    log = FlowLog(tmp_path / "f")

    def whole() -> None:
        log.add(to_flows(accel.decode_events(BUFFER)))
        log.close()

    benchmark(whole)

    assert log.lost.total() == 0
    assert log.statistics()["waiting"] == 0
