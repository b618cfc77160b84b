"""
Where records go, and that nothing on the way holds up who sends them.
"""

from __future__ import annotations

import asyncio
import gzip
from pathlib import Path

import pytest
import structlog

from clawker_cp.config import FLOW_BUFFER, FLOWS_WAITING
from clawker_cp.telemetry import flowlog as module
from clawker_cp.telemetry.flowlog import FlowLog
from clawker_cp.telemetry.flows import DENIED, Flow, FlowFilter, Loss, decode, encode_lines
from clawker_cp.telemetry.rotation import RotatingFile


def make(count: int, container: str = "c", start: int = 0) -> list[Flow]:
    return [
        Flow(event_id=f"k-{container}-{n}", time_unix_ns=n, container_id=container, sequence=n)
        for n in range(start, start + count)
    ]


async def written(log: FlowLog) -> None:
    """Run the writer until it is cancelled, which writes what is left."""
    task = asyncio.ensure_future(log.run())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_every_record_is_written_once(tmp_path: Path) -> None:
    """What was taken before and while the writer runs is in the file once, in order, also when it is cancelled."""
    log = FlowLog(tmp_path / "logs" / "flows.jsonl")
    log.add(make(1000))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(log.run())
        for start in range(1000, 5000, 1000):
            log.add(make(1000, start=start))
            await asyncio.sleep(0.02)
        task.cancel()
    lines = (tmp_path / "logs" / "flows.jsonl").read_bytes().splitlines()

    assert [decode(line).sequence for line in lines] == list(range(5000))
    assert log.statistics()["waiting"] == 0
    assert log.lost.total() == 0


async def test_unwritable_place_is_counted_never_raised(tmp_path: Path) -> None:
    """With the disk gone records are counted under `export`, the log says so once, and it recovers by itself."""
    (tmp_path / "logs").write_text("a file where the directory should be")
    log = FlowLog(tmp_path / "logs" / "flows.jsonl")
    with structlog.testing.capture_logs() as logs:
        for start in range(3):
            log.add(make(10, start=start * 10))
            await written(log)
        (tmp_path / "logs").unlink()
        log.add(make(1, start=30))
        await written(log)

    assert log.lost["export"] == 30
    assert [entry["event"] for entry in logs] == ["flows_unavailable", "flows_recovered"]
    assert len((tmp_path / "logs" / "flows.jsonl").read_bytes().splitlines()) == 1


@pytest.mark.root
async def test_full_disk_leaves_whole_lines() -> None:
    """On a device that is always full nothing is raised and everything is counted."""
    log = FlowLog(Path("/dev/full"))
    log.add(make(10))
    with structlog.testing.capture_logs():
        await written(log)

    assert log.lost["export"] == 10


async def test_queue_is_bounded(tmp_path: Path) -> None:
    """With nobody writing the queue stops at its bound and the newest are counted; memory still has them."""
    log = FlowLog(tmp_path / "f", memory=100, per_agent=100)
    batch = make(1000)
    for _ in range(FLOWS_WAITING // 1000 + 2):
        log.add(batch)

    statistics = log.statistics()
    assert statistics["waiting"] == FLOWS_WAITING
    assert statistics["lost_queue"] == statistics["taken"] - FLOWS_WAITING
    assert statistics["held"] <= 100


def test_a_noisy_agent_pushes_out_only_itself(tmp_path: Path) -> None:
    """Each agent has its own bound, and when all together are too many the largest give way."""
    log = FlowLog(tmp_path / "f", memory=1000, per_agent=400)
    log.add(make(50, "quiet"))
    for number in range(10):
        log.add(make(500, f"noisy{number}"))

    assert [flow.sequence for flow in log.recent("quiet")] == list(range(50))
    assert log.statistics()["held"] <= 1000
    assert log.recent("noisy9")[-1].sequence == 499
    assert log.statistics()["held"] == len(log.recent())
    log.forget("quiet")
    assert log.recent("quiet") == []


def test_more_agents_than_memory(tmp_path: Path) -> None:
    """The bound in all holds with more agents than records."""
    log = FlowLog(tmp_path / "f", memory=64, per_agent=64)
    for number in range(1000):
        log.add(make(1, f"c{number}"))
        assert log.statistics()["held"] <= 64


async def test_search_in_memory_file_and_backups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record is found by its id wherever it is by now; an unknown or malformed id is None."""
    monkeypatch.setattr(module, "RotatingFile", lambda path: RotatingFile(path, limit_bytes=3000))
    log = FlowLog(tmp_path / "f.jsonl", memory=16, per_agent=16)
    for start in range(0, 400, 40):
        log.add(make(40, "c", start))
        await written(log)
        log._file.compress()

    assert (tmp_path / "f.jsonl.1.gz").exists()
    for number in (399, 300):
        found = await log.search(f"k-c-{number}")
        assert found is not None
        assert found.sequence == number
    assert log.find("k-c-300") is None
    assert await log.search("k-c-100000") is None
    assert await log.search('"},') is None


@pytest.mark.parametrize("spoilt", [b"no gzip", b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + b"\xff" * 100, b"\x1f\x8b", None])
async def test_a_spoilt_backup_hides_none_of_the_others(tmp_path: Path, spoilt: bytes | None) -> None:
    """Whatever is wrong with one, or in its place, records of older ones are found and unknown ones are None."""
    path = tmp_path / "flows.jsonl"
    if spoilt is None:
        (tmp_path / "flows.jsonl.1.gz").mkdir()
    else:
        (tmp_path / "flows.jsonl.1.gz").write_bytes(spoilt)
    (tmp_path / "flows.jsonl.2.gz").write_bytes(gzip.compress(encode_lines(make(3))))
    log = FlowLog(path)

    found = await log.search("k-c-2")
    assert found is not None and found.sequence == 2
    assert await log.search("k-c-9") is None


async def test_search_finds_what_is_not_yet_written(tmp_path: Path) -> None:
    """A record that left memory before the writer came round is found all the same."""
    log = FlowLog(tmp_path / "f", memory=16, per_agent=16)
    log.add(make(100))

    found = await log.search("k-c-3")
    log.close()

    assert found is not None
    assert found.sequence == 3


async def test_slow_subscriber(tmp_path: Path) -> None:
    """A subscriber that does not read loses its oldest records, is told how many of whom, and delays nobody."""
    log = FlowLog(tmp_path / "f")
    async with log.subscribe() as slow, log.subscribe("other") as other:
        log.add(make(FLOW_BUFFER + 5))
        log.add(make(1, "other"))
        batch = await slow.next_batch()

        assert len(batch) == FLOW_BUFFER
        assert batch[0].sequence == 6
        assert slow.losses() == [Loss("c", "subscriber", 6)]
        assert slow.losses() == []
        assert [flow.container_id for flow in await other.next_batch()] == ["other"]
    assert log.lost["subscriber"] == 6
    assert log.statistics()["subscribers"] == 0


async def test_subscriber_with_filter(tmp_path: Path) -> None:
    """Only wanted records take room in a subscriber's buffer."""
    log = FlowLog(tmp_path / "f")
    async with log.subscribe(wanted=FlowFilter(verdicts=frozenset({DENIED}))) as followed:
        log.add(make(FLOW_BUFFER * 2))
        log.add([Flow(verdict=DENIED)])

        assert await followed.next_batch() == [Flow(verdict=DENIED)]
    assert log.lost["subscriber"] == 0


async def test_kernel_losses_are_counted(tmp_path: Path) -> None:
    """Gaps in the kernel's series are lost records."""
    log = FlowLog(tmp_path / "f")
    log.add([Flow(lost_before=3), Flow(lost_before=4)])

    assert log.lost["kernel"] == 7
