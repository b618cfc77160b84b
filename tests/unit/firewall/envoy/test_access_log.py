"""Tests of the access log reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clawker_cp.firewall.envoy.access_log import AccessLogTail, settle


def _line(**fields: Any) -> bytes:
    return json.dumps({"action": "allowed", "reason": "forwarded", "rule": "r-1", **fields}).encode() + b"\n"


def test_records_come_whole_and_only_new_ones(tmp_path: Path) -> None:
    """Half a line waits for its other half; what was there before is not read."""
    path = tmp_path / "access.jsonl"
    path.write_bytes(_line(n=0))
    tail = AccessLogTail(path)
    tail.open()
    line = _line(n=1)
    with path.open("ab") as file:
        file.write(line[:10])
        file.flush()
        assert tail.read() == []
        file.write(line[10:] + _line(n=2))
    records = tail.read()
    tail.close()

    assert [record["n"] for record in records] == [1, 2]


def test_a_file_that_is_not_there_yet_is_read_from_its_beginning(tmp_path: Path) -> None:
    """Opening before Envoy has written anything loses nothing."""
    tail = AccessLogTail(tmp_path / "access.jsonl")
    tail.open()
    assert tail.read() == []
    (tmp_path / "access.jsonl").write_bytes(_line(n=1))

    assert [record["n"] for record in tail.read()] == [1]
    tail.close()


async def test_rotation_loses_nothing(tmp_path: Path) -> None:
    """Records before, during and after a rotation arrive once each, in order."""
    path = tmp_path / "access.jsonl"

    class Owner:
        async def reopen_logs(self) -> None:
            old.write(_line(n=2))
            old.close()
            path.write_bytes(_line(n=3))

    tail = AccessLogTail(path, Owner())
    tail.open()
    old = path.open("wb", buffering=0)
    old.write(_line(n=1))
    seen = [record["n"] for record in tail.read()]
    await tail.rotate()
    for _ in range(4):
        seen += [record["n"] for record in tail.read()]
    tail.close()

    assert seen == [1, 2, 3]
    assert (tmp_path / "access.jsonl.1").exists()


def test_damaged_lines_are_counted_and_skipped(tmp_path: Path) -> None:
    """A line that is no JSON object costs itself only."""
    path = tmp_path / "access.jsonl"
    tail = AccessLogTail(path)
    path.write_bytes(b"{broken\n[1]\n\n" + _line(n=1))

    assert [record["n"] for record in tail.read()] == [1]
    assert tail.statistics() == {"records": 1, "damaged": 2, "lost_bytes": 0}
    tail.close()


def test_an_emptied_file_is_read_again(tmp_path: Path) -> None:
    """Truncation starts over instead of waiting for the old size."""
    path = tmp_path / "access.jsonl"
    path.write_bytes(_line(n=1) * 3)
    tail = AccessLogTail(path)
    tail.read()
    path.write_bytes(_line(n=2))

    assert [record["n"] for record in tail.read()] == [2]
    tail.close()


def test_records_of_requests_the_proxy_answered_itself_are_completed() -> None:
    """No route, a refused upgrade and a dead origin have verdict and reason too."""
    no_route = settle({"action": None, "reason": None, "rule": None, "response_code": 404})
    refused = settle(
        {"action": "allowed", "reason": "forwarded", "response_code": 403, "response_code_details": "upgrade_failed"}
    )
    dead = settle(
        {"action": "allowed", "reason": "forwarded", "response_code": 503, "response_code_details": "upstream_reset"}
    )
    origin = settle(
        {"action": "allowed", "reason": "forwarded", "response_code": 404, "response_code_details": "via_upstream"}
    )

    assert (no_route["action"], no_route["reason"], no_route["rule"]) == ("denied", "request_refused", "")
    assert (refused["action"], refused["reason"]) == ("denied", "request_refused")
    assert (dead["action"], dead["reason"]) == ("allowed", "origin_error")
    assert (origin["action"], origin["reason"]) == ("allowed", "forwarded")
