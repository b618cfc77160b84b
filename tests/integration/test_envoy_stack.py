"""
The generated configuration in a real Envoy, with real origins: who is served, who is refused, and why.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path

import pytest

from clawker_cp.testing.plan_world import rule
from clawker_cp.testing.proxy_world import OUTSIDE, PROXY, proxy_world, run_in_namespace

pytestmark = [pytest.mark.root, pytest.mark.envoy, pytest.mark.slow]


def test_inspected_passed_and_opaque_destinations_are_served(tmp_path: Path) -> None:
    """An inspected name, a passed-through name and a TCP name reach their origins; Envoy acknowledges."""

    async def main() -> None:
        rules = (
            rule("https://api.example.com"),
            rule("https://pinned.example.com", tls="passthrough"),
            rule("tcp://db.example.com:5432"),
        )
        async with proxy_world(tmp_path) as world:
            zone = ("api.example.com", "pinned.example.com", "db.example.com")
            world.view.zone.update(dict.fromkeys(zone, OUTSIDE))
            await world.outside.http(443, "api.example.com", "pinned.example.com")
            await world.outside.echo(5432)

            assert await world.apply(*rules) > 0

            status, headers, body = await world.request("https://api.example.com/x?y=1")
            assert (status, body) == (200, b"GET /x?y=1 api.example.com")
            assert headers["server"] == "outside"
            origin_trust = ssl.create_default_context(cadata=world.outside.authority.cert_pem.bytes().decode())
            _, writer = await world.connect("pinned.example.com", trust=origin_trust)
            writer.close()
            (target,) = world.compiled.plan.policies[1].opaque
            reader, writer = await asyncio.open_connection(PROXY, target.listen)
            writer.write(b"ping")
            assert await reader.readexactly(4) == b"ping"
            writer.close()
            status, _, body = await world.request("https://other.example.com/", sni="api.example.com")
            assert status == 403
            assert json.loads(body)["reason"] == "host_not_allowed"

    run_in_namespace(main)
