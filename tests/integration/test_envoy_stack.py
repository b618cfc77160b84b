"""
The generated configuration in a real Envoy, with real origins: who is served, who is refused, and why.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path

import pytest

from clawker_cp.errors import ClawkerError
from clawker_cp.testing.plan_world import deny, rule
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


def test_envoy_accepts_everything_rules_can_say(tmp_path: Path) -> None:
    """A plan with every kind of rule, several policies and a learning agent is taken as a whole."""

    async def main() -> None:
        agent = "agent:p/a"
        rules = (
            rule("https://example.com"),
            rule("https://*.example.com"),
            rule("https://*.example.com:8443"),
            rule("GET,POST,M-SEARCH https://paths.example.org~/v[0-9]+/(a|b)"),
            rule("https://semicolon.example.org/a;b"),
            rule("wss://sock.example.org/chat"),
            rule("ws://sock.example.org"),
            rule("http://plain.example.org:8080/x"),
            rule("https://insecure.example.org", insecure_skip_tls_verify=True),
            rule("https://*.pass.example.net", tls="passthrough"),
            rule("https://read.pass.example.net"),
            rule("https://one.example.net:4443", tls="passthrough"),
            deny("https://no.example.com"),
            deny("http://*.no2.example.com"),
            deny("https://denied.example.com:8443"),
            rule("tcp://b-a.example.net:4242-4250"),
            rule("tcp://b.a.example.net:4242"),
            rule("ssh://git.example.net"),
            rule("udp://time.example.net:123"),
            rule("https://192.0.2.7/x"),
            rule("http://192.0.2.7:8080"),
            rule("wss://192.0.2.8"),
            rule("tcp://192.0.2.9:22"),
            rule("udp://192.0.2.9:53"),
            rule("tcp://*.cluster.example.net:9000"),
            rule("https://own.example.com", scope=agent),
            rule("tcp://b.a.example.net:4242", scope=agent),
        )
        async with proxy_world(tmp_path) as world:
            assert await world.apply(*rules, agents=[agent], names=["x.cluster.example.net"]) > 0
            assert await world.apply(*rules, agents=[agent], learn=["agent:p/l"], sans=["*.deep.example.com"]) > 0
            await world.stack.validate(world.compiled.plan)
            assert await world.apply() > 0
            left = {path.name for path in (tmp_path / "envoy").glob("*.json")}
            assert left == {"bootstrap.json", "lds.json", "cds.json"} | {
                "rc_p1_tls.json",
                "rc_p1_plain.json",
                "sds-p1-0.json",
                "sds-p1-1.json",
            }

    run_in_namespace(main)


def test_a_refusal_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """Envoy's own words are in the error; what was served is served on."""

    async def main() -> None:
        api = rule("https://api.example.com")
        async with proxy_world(tmp_path, api) as world:
            world.view.zone["api.example.com"] = OUTSIDE
            await world.outside.http(443, "api.example.com")
            squatter = await asyncio.start_server(lambda _, __: None, PROXY, 10001)
            squatter_second = world.compile([api, rule("tcp://db.example.com:22"), rule("https://new.example.com")])

            with pytest.raises(ClawkerError, match="Address already in use") as failure:
                await world.stack.open(squatter_second.plan)

            assert failure.value.code == "RULE_INVALID"
            assert (await world.request("https://api.example.com/"))[0] == 200
            status, _, body = await world.request("https://new.example.com/", sni="api.example.com")
            assert (status, json.loads(body)["reason"]) == (403, "host_not_allowed")
            squatter.close()

    run_in_namespace(main)


def test_a_rotated_ca_is_served_at_once_and_both_are_trusted(tmp_path: Path) -> None:
    """D20: after a rotation agents with the old CA and agents with the new one both get through."""

    async def main() -> None:
        async with proxy_world(tmp_path, rule("https://api.example.com")) as world:
            world.view.zone["api.example.com"] = OUTSIDE
            await world.outside.http(443, "api.example.com")
            old = world.trust()
            world.authority.rotate()
            await world.stack.apply(world.compiled.plan)

            for trust in (old, world.trust()):
                _, writer = await world.connect("api.example.com", trust=trust)
                writer.close()

    run_in_namespace(main)


def test_the_health_listener_answers(tmp_path: Path) -> None:
    """Any path on the health port is 200 `ok`."""

    async def main() -> None:
        async with proxy_world(tmp_path) as world:
            status, _, body = await world.request("http://health/anything", port=world.options.health_port)

            assert (status, body) == (200, b"ok")

    run_in_namespace(main)
