"""
Row 24 and 25 of the threats, request by request: spellings, hosts, framing, overrides, from inside a sandbox.
"""

from __future__ import annotations

import json
from pathlib import Path

import h2
import pytest

from clawker_cp.testing.machine import machine_with_world

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.envoy, pytest.mark.timeout(180)]

TECHNIQUE = Path(__file__).with_name("requests_technique.py")
LIBRARIES = Path(h2.__file__).parents[1]
RULES = [
    "--allow", "GET,POST https://api.example.com/v1/", "--allow", "https://www.example.com",
    "--deny", "https://www.example.com/admin", "--allow", "wss://www.example.com/status/",
]  # fmt: skip


async def test_no_request_reaches_what_no_rule_allows() -> None:
    """Each request is refused at once, or an origin sees exactly the allowed one; nothing goes anywhere else."""
    async with machine_with_world() as machine:
        (machine.workdir / TECHNIQUE.name).write_bytes(TECHNIQUE.read_bytes())
        done = await machine.run(
            *RULES, "--mount", f"{LIBRARIES}:/libraries", "--env", "PYTHONPATH=/libraries",
            command=["/usr/bin/python3", TECHNIQUE.name], timeout_s=150,
        )  # fmt: skip
        results = [json.loads(line) for line in done.out.splitlines()]
        seen = {
            (request["method"], request["target"], request["host"], connection["sni"])
            for connection in await machine.world.connections(proto="tcp")
            for request in connection["requests"]
        }
        went = {(packet["dst"], packet["dport"]) for packet in await machine.world.packets()}
    refused = [r for r in results if r["kind"] == "refused"]
    answered = {code for r in refused for code in r["codes"]}
    upgrades = {r["name"]: r["codes"] for r in results if r["kind"] == "upgrade"}
    apart = {r["name"]: r["codes"] for r in results if r["kind"] == "apart"}

    assert done.code == 0, done.err[-2000:]
    assert len(refused) >= 120 and len(apart) == 5
    assert [r for r in refused if not r["codes"] or set(r["codes"]) & {"200", "101", "hang"}] == []
    assert answered <= {"400", "403", "404", "421", "426", "431", "501", "closed", "reset"}
    assert all(codes[0] == "200" and "200" not in codes[1:] for codes in apart.values()), apart
    assert upgrades == {"200": ["502"], "404": ["404"], "426": ["426"]}  # an origin's "200" is no upgrade
    assert seen == {
        *(("GET", f"/status/{status}", "www.example.com", "www.example.com") for status in upgrades),
        ("GET", "/v1/ok", "api.example.com", "api.example.com"),
        ("POST", "/v1/ok", "api.example.com", "api.example.com"),
    }
    assert went == {("198.51.100.53", 53), ("198.51.100.10", 443), ("198.51.100.11", 443)}
    assert any(flow["reason"] == "path_not_canonical" for flow in done.denied(host="www.example.com"))
