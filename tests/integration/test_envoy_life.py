"""
What the real Envoy records, and what outlives a change of rules, its own death and its control plane's.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from clawker_cp.firewall.envoy.access_log import AccessLogTail
from clawker_cp.processes.lasting import start_time
from clawker_cp.testing.plan_world import rule
from clawker_cp.testing.proxy_world import (
    OUTSIDE,
    PROXY,
    answering,
    proxy_world,
    read_response,
    refusal,
    run_in_namespace,
)

pytestmark = [pytest.mark.root, pytest.mark.envoy, pytest.mark.slow]


async def records(tail: AccessLogTail, count: int) -> list[dict[str, Any]]:
    """Wait for a number of records."""
    found: list[dict[str, Any]] = []
    async with asyncio.timeout(10):
        while len(found) < count:
            found += tail.read()
            await asyncio.sleep(0.01)
    return found


def test_every_request_is_recorded_at_its_beginning_and_end(tmp_path: Path) -> None:
    """Allowed and refused requests have records with who, where, why; the path without query."""

    async def main() -> None:
        async with proxy_world(tmp_path) as world:
            tail = AccessLogTail(world.options.access_log, world.stack.admin)
            tail.open()
            allowed = rule("https://api.example.com/v1")
            await world.apply(allowed)
            await answering(world, "api.example.com")

            await world.request("https://api.example.com/v1?token=secret")
            begin, end = await records(tail, 2)
            assert (begin["record"], end["record"]) == ("DownstreamStart", "DownstreamEnd")
            for record in (begin, end):
                assert (record["action"], record["reason"], record["rule"]) == ("allowed", "forwarded", allowed.id)
                assert (record["server.address"], record["path"]) == ("api.example.com", "/v1")
                assert (record["policy"], record["tls.established"]) == ("1", "true")
                assert record["event_id"] == begin["event_id"]
                assert record["downstream_remote"].startswith(PROXY + ":")
            assert (end["network.peer.address"], end["network.peer.port"]) == (OUTSIDE, 443)
            assert end["response_code"] == 200
            assert "secret" not in json.dumps([begin, end])
            await tail.rotate()
            await world.request("https://api.example.com/v2")
            begin, end = await records(tail, 2)
            assert (end["action"], end["reason"], end["response_code"]) == ("denied", "path_denied", 403)
            tail.close()

    run_in_namespace(main)


def test_connections_survive_a_control_plane_that_dies(tmp_path: Path) -> None:
    """R22: the next start adopts the running Envoy; an open connection never notices."""

    async def main() -> None:
        rules = (rule("tcp://db.example.com:5432"),)
        async with proxy_world(tmp_path) as world:
            world.view.zone["db.example.com"] = OUTSIDE
            await world.outside.echo(5432)
            await world.apply(*rules)
            (target,) = world.compiled.plan.policies[1].opaque
            reader, writer = await asyncio.open_connection(PROXY, target.listen)
            writer.write(b"before")
            await reader.readexactly(6)
            pid = world.stack._process.pid
            await world.stack.leave()

            world.stack = world.make_stack()
            await world.stack.start(world.compile(rules).plan)

            assert world.stack.adopted
            assert world.stack._process.pid == pid
            writer.write(b"after")
            assert await reader.readexactly(5) == b"after"
            assert await world.apply(*rules, rule("https://more.example.com")) > 0
            writer.write(b"still")
            assert await reader.readexactly(5) == b"still"
            writer.close()

    run_in_namespace(main)


@pytest.mark.parametrize("harm", ["stopped", "deaf"])
def test_an_adopted_envoy_that_does_not_answer_is_replaced(tmp_path: Path, harm: str) -> None:
    """One that hangs, or whose admin socket is gone, is ended and another started: a start never fails for it."""

    async def main() -> None:
        async with proxy_world(tmp_path, rule("https://api.example.com")) as world:
            await answering(world, "api.example.com")
            pid = world.stack._process.pid
            await world.stack.leave()
            if harm == "stopped":
                os.kill(pid, signal.SIGSTOP)
            else:
                world.options.admin_socket.unlink()

            world.stack = world.make_stack()
            await world.stack.start(world.compiled.plan)

            assert not world.stack.adopted and world.stack._process.pid != pid
            assert start_time(pid) is None
            assert await refusal(world, "https://api.example.com/") == (200, "")

    run_in_namespace(main)


def test_an_envoy_that_dies_comes_back_with_its_policy(tmp_path: Path) -> None:
    """R23: after SIGKILL it is started again and serves the same rules."""

    async def main() -> None:
        async with proxy_world(tmp_path, rule("https://api.example.com")) as world:
            await answering(world, "api.example.com")
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(world.stack.supervise())
                await asyncio.sleep(0)
                os.kill(world.stack._process.pid, signal.SIGKILL)
                async with asyncio.timeout(15):
                    while world.stack.restarts == 0 or not await world.stack.is_healthy():
                        await asyncio.sleep(0.02)

                assert await refusal(world, "https://api.example.com/") == (200, "")
                watching.cancel()

    run_in_namespace(main)


def test_a_change_made_while_envoy_was_down_holds_when_it_is_back(tmp_path: Path) -> None:
    """What was staged for it is what it serves; nothing that was taken away comes back."""

    async def main() -> None:
        gone, stays = rule("https://gone.example.com"), rule("https://stays.example.com")
        async with proxy_world(tmp_path, gone, stays) as world:
            await answering(world, "gone.example.com", "stays.example.com")
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(world.stack.supervise())
                await asyncio.sleep(0)
                os.kill(world.stack._process.pid, signal.SIGKILL)
                await world.stack.stage(world.compile([stays]).plan)
                async with asyncio.timeout(15):
                    while world.stack.restarts == 0 or not await world.stack.is_healthy():
                        await asyncio.sleep(0.02)

                assert await refusal(world, "https://stays.example.com/") == (200, "")
                refused = await refusal(world, "https://gone.example.com/", sni="stays.example.com")
                assert refused == (403, "host_not_allowed")
                watching.cancel()

    run_in_namespace(main)


def test_an_ordinary_rule_touches_no_listener_and_no_connection(tmp_path: Path) -> None:
    """Adding and removing https rules writes routes and certificates only; open connections live on."""

    async def main() -> None:
        first = rule("https://api.example.com")
        async with proxy_world(tmp_path, first) as world:
            await answering(world, "api.example.com")
            reader, writer = await world.connect("api.example.com")
            before = {n: (tmp_path / "envoy" / n).read_bytes() for n in ("lds.json", "cds.json")}

            for number in range(5):
                assert 0 < await world.apply(first, rule(f"https://n{number}.example.com")) <= 3

            assert before == {n: (tmp_path / "envoy" / n).read_bytes() for n in ("lds.json", "cds.json")}
            writer.write(b"GET / HTTP/1.1\r\nHost: api.example.com\r\n\r\n")
            assert (await read_response(reader))[0] == 200
            writer.close()

    run_in_namespace(main)
