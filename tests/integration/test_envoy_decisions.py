"""
What the real Envoy does with requests an agent may send to get around its rules.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from clawker_cp.testing.plan_world import deny, rule
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

UPGRADE = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA==")


def test_paths_and_methods_are_judged_in_order(tmp_path: Path) -> None:
    """Longest pattern first, methods fall through, defaults hold, odd spellings are refused."""

    async def main() -> None:
        paths = rule("https://api.example.com/repos/")
        regex = rule("GET,POST https://api.example.com~/v[0-9]+/x", path_default="deny")
        async with proxy_world(tmp_path, paths, regex) as world:
            await answering(world, "api.example.com")
            base = "https://api.example.com"

            assert await refusal(world, f"{base}/repos/a?x=/../") == (200, "")
            assert await refusal(world, f"{base}/v12/x") == (200, "")
            assert await refusal(world, f"{base}/v12/x", method="DELETE") == (403, "path_denied")
            assert await refusal(world, f"{base}/v12/x/y") == (403, "path_denied")
            assert await refusal(world, f"{base}/") == (403, "path_denied")
            for odd in ("/repos/../x", "/repos/%2e%2e/x", "/repos//x", "/repos/%2Fx", "/repos/a;b", "/repos/."):
                assert await refusal(world, base + odd) == (403, "path_not_canonical"), odd
            for odd in ("/repos/%252e", "/repos/%00", "/repos/a\\b", "/repos/%5C"):
                assert (await refusal(world, base + odd))[0] in (400, 403), odd
            for odd in ("/repos/%61", "/repos/a%7e", "/repos/%zz", "/repos/%2561", "/repos/a%3bb", "/repos/%c0%ae"):
                assert await refusal(world, base + odd) == (403, "path_not_canonical"), odd
            for fine in ("/repos/%40scope", "/repos/caf%c3%a9", "/repos/a%20b%2520c", "/repos/a:b"):
                assert await refusal(world, base + fine) == (200, ""), fine
            for header in ("X-Original-URL: /admin", "X-HTTP-Method-Override: DELETE"):
                assert await refusal(world, f"{base}/repos/x", headers=[header]) == (403, "request_refused"), header
            assert not any(path.startswith("/repos/..") for _, path, _ in world.outside.requests)

    run_in_namespace(main)


def test_without_path_rules_the_path_is_nobodys_business(tmp_path: Path) -> None:
    """%2F, dots and doubled slashes arrive at the origin as sent; so do underscore headers."""

    async def main() -> None:
        async with proxy_world(tmp_path, rule("https://api.example.com")) as world:
            await answering(world, "api.example.com")

            await world.request("https://api.example.com/a%2Fb//c/../d", headers=["x_y: 1", "X-Request-Id: mine"])

            _, path, headers = world.outside.requests[-1]
            assert path == "/a%2Fb//c/../d"
            assert (headers["x_y"], headers["x-request-id"]) == ("1", "mine")
            added = {name for name in headers if name.startswith(("x-clawker", "x-envoy", "x-forwarded", "via"))}
            assert added == set()

    run_in_namespace(main)


def test_host_and_server_name_have_to_agree(tmp_path: Path) -> None:
    """A session for one name never carries a request for another, forged header or not."""

    async def main() -> None:
        rules = (rule("https://a.example.com"), rule("https://b.example.com"), rule("https://*.wild.example"))
        async with proxy_world(tmp_path, *rules) as world:
            await answering(world, "a.example.com", "b.example.com", "x.wild.example", "y.wild.example")

            assert await refusal(world, "https://a.example.com/") == (200, "")
            assert await refusal(world, "https://b.example.com/", sni="a.example.com") == (421, "sni_mismatch")
            forged = ["x-clawker-sni: b.example.com"]
            assert await refusal(world, "https://b.example.com/", sni="a.example.com", headers=forged) == (
                421,
                "sni_mismatch",
            )
            assert await refusal(world, "https://A.example.COM/", sni="a.example.com") == (200, "")
            assert await refusal(world, "https://a.example.com:443/") == (200, "")
            assert await refusal(world, "https://a.example.com:444/") == (403, "host_not_allowed")
            assert await refusal(world, "https://y.wild.example/", sni="x.wild.example") == (200, "")
            assert await refusal(world, "https://x.wild.example/", sni="a.example.com") == (421, "sni_mismatch")
            assert (await refusal(world, "https://x@y.wild.example/", sni="x.wild.example"))[0] in (400, 403)

    run_in_namespace(main)


def test_denials_hold_below_wildcards_and_say_so(tmp_path: Path) -> None:
    """A denied name and everything below it is refused with the rule; the body is complete."""

    async def main() -> None:
        refusing = deny("https://bad.example.com")
        async with proxy_world(tmp_path, rule("https://*.example.com"), refusing) as world:
            await answering(world, "bad.example.com", "good.example.com")

            assert await refusal(world, "https://good.example.com/") == (200, "")
            status, headers, body = await world.request("https://bad.example.com/x?secret=1")
            found = json.loads(body)
            assert status == 403
            assert headers["content-type"] == "application/json"
            assert list(found) == sorted(found)
            assert found["error"] == "egress_denied"
            assert (found["reason"], found["rule"], found["status"]) == ("rule_deny", refusing.id, 403)
            assert (found["host"], found["method"], found["path"]) == ("bad.example.com", "GET", "/x")
            assert found["event_id"].startswith("p-")
            assert found["hint"] == f"clawkerctl explain {found['event_id']}"
            assert found["details"] == "direct_response"

    run_in_namespace(main)


def test_websockets_pass_only_where_a_rule_says_so(tmp_path: Path) -> None:
    """Upgrades need a ws rule; other upgrades and CONNECT never pass."""

    async def main() -> None:
        rules = (rule("wss://sock.example.com/chat"), rule("https://api.example.com"), rule("ws://plain.example.com"))
        async with proxy_world(tmp_path, *rules) as world:
            await answering(world, "sock.example.com", "api.example.com")
            world.view.zone["plain.example.com"] = OUTSIDE
            await world.outside.http(80)

            for url in ("https://sock.example.com/chat", "http://plain.example.com/"):
                tls = url.startswith("https")
                host = url.split("/")[2]
                reader, writer = await world.connect(host, tls=tls)
                head = f"GET /chat HTTP/1.1\r\nHost: {host}\r\n" + "\r\n".join(UPGRADE) + "\r\n\r\n"
                writer.write(head.encode())
                status, _, _ = await read_response(reader)
                assert status == 101
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"
                writer.close()
            assert await refusal(world, "https://sock.example.com/other", headers=UPGRADE) == (403, "path_denied")
            assert await refusal(world, "https://api.example.com/", headers=UPGRADE) == (403, "request_refused")
            other = ["Connection: Upgrade", "Upgrade: shell"]
            assert await refusal(world, "https://api.example.com/", headers=other) == (403, "request_refused")
            assert await refusal(world, "https://sock.example.com/chat", headers=other) == (403, "request_refused")
            reader, writer = await world.connect("api.example.com")
            writer.write(b"CONNECT api.example.com:443 HTTP/1.1\r\nHost: api.example.com:443\r\n\r\n")
            status, _, body = await read_response(reader)
            assert (status, json.loads(body)["error"]) in {(404, "request_refused"), (403, "egress_denied")}
            writer.close()

    run_in_namespace(main)


def test_origins_are_verified(tmp_path: Path) -> None:
    """A wrong name is always refused, an unknown issuer only without the insecure flag."""

    async def main() -> None:
        import trustme

        rules = (
            rule("https://good.example.com"),
            rule("https://wrongname.example.com"),
            rule("https://insecure.example.com", insecure_skip_tls_verify=True),
            rule("https://unknown.example.com"),
        )
        async with proxy_world(tmp_path, *rules) as world:
            world.view.zone.update(
                {
                    "good.example.com": OUTSIDE,
                    "wrongname.example.com": OUTSIDE,
                    "insecure.example.com": "198.51.100.20",
                    "unknown.example.com": "198.51.100.20",
                }
            )
            await world.outside.http(443, "good.example.com")
            known, world.outside.authority = world.outside.authority, trustme.CA()
            await world.outside.http(443, "insecure.example.com", "unknown.example.com", host="198.51.100.20")
            world.outside.authority = known

            assert await refusal(world, "https://good.example.com/") == (200, "")
            assert await refusal(world, "https://wrongname.example.com/") == (503, "origin_error")
            assert await refusal(world, "https://unknown.example.com/") == (503, "origin_error")
            assert await refusal(world, "https://insecure.example.com/") == (200, "")

    run_in_namespace(main)


def test_plain_http_goes_by_host(tmp_path: Path) -> None:
    """Plain HTTP is served by Host and port; absolute-form request lines change nothing."""

    async def main() -> None:
        async with proxy_world(
            tmp_path, rule("http://plain.example.com"), rule("http://alt.example.com:8080")
        ) as world:
            world.view.zone.update(dict.fromkeys(("plain.example.com", "alt.example.com"), OUTSIDE))
            await world.outside.http(80)
            await world.outside.http(8080)

            assert await refusal(world, "http://plain.example.com/") == (200, "")
            assert await refusal(world, "http://alt.example.com:8080/") == (200, "")
            assert await refusal(world, "http://alt.example.com/") == (403, "host_not_allowed")
            reader, writer = await world.connect("", tls=False)
            writer.write(b"GET http://evil.example.com/ HTTP/1.1\r\nHost: plain.example.com\r\n\r\n")
            status, _, body = await read_response(reader)
            assert (status, json.loads(body)["reason"]) == (403, "host_not_allowed")
            writer.close()

    run_in_namespace(main)


def test_silence_and_unknown_names_get_nothing(tmp_path: Path) -> None:
    """A connection that says nothing is closed after a second; TLS for a name without rule meets no origin."""

    async def main() -> None:
        async with proxy_world(tmp_path, rule("https://api.example.com")) as world:
            reader, writer = await world.connect("", tls=False)
            assert await asyncio.wait_for(reader.read(), 3) == b""
            writer.close()

    run_in_namespace(main)


def test_names_of_this_host_are_asked_of_the_gate_only(tmp_path: Path) -> None:
    """Neither the hosts file nor the resolver library's own ideas of localhost decide an address."""

    async def main() -> None:
        import socket

        name = socket.gethostname()
        rules = (
            rule("http://localhost"),
            rule("http://*.localhost"),
            rule(f"http://{name}"),
            rule("tcp://localhost:5432"),
            rule("https://*.tls.localhost", tls="passthrough"),
        )
        async with proxy_world(tmp_path, *rules) as world:
            await world.outside.http(80, host="127.0.0.1")
            await world.outside.echo(5432, host="127.0.0.1")
            await world.outside.echo(443, host="127.0.0.1")

            for host in ("localhost", "a.localhost", "A.LocalHost"):
                assert await refusal(world, f"http://{host}/") == (403, "host_not_allowed"), host
            assert (await refusal(world, f"http://{name}/"))[0] == 503
            assert name in world.view.asked
            (target,) = world.compiled.plan.policies[1].opaque
            reader, writer = await asyncio.open_connection(PROXY, target.listen)
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
            with pytest.raises((OSError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(world.connect("x.tls.localhost"), 5)
            assert world.outside.requests == []

    run_in_namespace(main)


def test_a_learning_agent_passes_names_but_not_this_host(tmp_path: Path) -> None:
    """R38: TLS by SNI and HTTP by Host pass, denials and this host's own addresses do not."""

    async def main() -> None:
        agent = "agent:p/l"
        async with proxy_world(tmp_path, deny("https://bad.example.com", scope=agent), learn=[agent]) as world:
            names = ("any.example.com", "bad.example.com")
            world.view.zone.update(dict.fromkeys(names, OUTSIDE))
            await world.outside.http(443, *names)
            await world.outside.http(80)
            await world.outside.http(80, host="127.0.0.1")
            await world.outside.echo(443, host="127.0.0.1")
            port = world.compiled.plan.policies[2].egress_port
            import ssl

            trust = ssl.create_default_context(cadata=world.outside.authority.cert_pem.bytes().decode())
            _, writer = await world.connect("any.example.com", port=port, trust=trust)
            writer.close()
            assert await refusal(world, "http://any.example.com/", port=port) == (200, "")
            assert await refusal(world, "https://bad.example.com/", port=port) == (403, "rule_deny")
            for host in ("127.0.0.1", "localhost", "127.0.0.1:80", "0x7f.1", "2130706433", "[::1]", "a.localhost"):
                assert (await refusal(world, f"http://{host}/", port=port))[0] in (400, 403), host
            seen = len(world.outside.requests)
            blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
            for host in ("localhost", "127.0.0.1"):
                with pytest.raises((OSError, ssl.SSLError, asyncio.IncompleteReadError)):
                    await asyncio.wait_for(world.connect(host, port=port, trust=blind), 5)
            assert len(world.outside.requests) == seen

    run_in_namespace(main)


def test_more_specific_rules_below_a_wildcard_passthrough_are_read(tmp_path: Path) -> None:
    """Names below are passed on unread, apart from those that a rule inspects or denies."""

    async def main() -> None:
        import ssl

        rules = (
            rule("https://*.example.com", tls="passthrough"),
            rule("https://api.example.com/v1"),
            deny("https://bad.example.com"),
        )
        async with proxy_world(tmp_path, *rules) as world:
            await answering(world, "free.example.com", "api.example.com", "bad.example.com")
            trust = ssl.create_default_context(cadata=world.outside.authority.cert_pem.bytes().decode())

            _, writer = await world.connect("free.example.com", trust=trust)
            writer.close()
            assert await refusal(world, "https://api.example.com/v1") == (200, "")
            assert await refusal(world, "https://api.example.com/v2") == (403, "path_denied")
            assert await refusal(world, "https://bad.example.com/") == (403, "rule_deny")

    run_in_namespace(main)


def test_address_rules_are_served_with_a_certificate_for_the_address(tmp_path: Path) -> None:
    """https to an address: leaf with IP SAN, Host is the address, another Host is refused."""

    async def main() -> None:
        async with proxy_world(tmp_path, rule(f"https://{OUTSIDE}"), rule("tcp://203.0.113.9:22")) as world:
            await world.outside.http(443, OUTSIDE)
            await world.outside.echo(22, "203.0.113.9")
            policy = world.compiled.plan.policies[1]
            (origin,), (target,) = policy.origins, policy.opaque

            assert await refusal(world, f"https://{OUTSIDE}/", port=origin.listen) == (200, "")
            assert await refusal(world, "https://x.example.com/", sni=OUTSIDE, port=origin.listen) == (
                403,
                "host_not_allowed",
            )
            reader, writer = await asyncio.open_connection(PROXY, target.listen)
            writer.write(b"ssh")
            assert await reader.readexactly(3) == b"ssh"
            writer.close()

    run_in_namespace(main)


def test_datagrams_reach_the_named_destination(tmp_path: Path) -> None:
    """A UDP rule: datagrams go to the name and answers come back."""

    async def main() -> None:
        class Echo(asyncio.DatagramProtocol):
            def connection_made(self, transport: Any) -> None:
                self.transport = transport

            def datagram_received(self, data: bytes, addr: Any) -> None:
                self.transport.sendto(data.upper(), addr)

        class Client(asyncio.DatagramProtocol):
            def __init__(self) -> None:
                self.got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

            def datagram_received(self, data: bytes, addr: Any) -> None:
                self.got.set_result(data)

        loop = asyncio.get_running_loop()
        async with proxy_world(tmp_path) as world:
            world.view.zone["ntp.example.com"] = OUTSIDE
            echo, _ = await loop.create_datagram_endpoint(Echo, (OUTSIDE, 123))
            await world.apply(rule("udp://ntp.example.com:123"))
            (target,) = world.compiled.plan.policies[1].opaque

            transport, client = await loop.create_datagram_endpoint(Client, remote_addr=(PROXY, target.listen))
            transport.sendto(b"what time")
            assert await asyncio.wait_for(client.got, 5) == b"WHAT TIME"
            transport.close()
            echo.close()

    run_in_namespace(main)


def test_http2_clients_are_judged_per_request(tmp_path: Path) -> None:
    """One HTTP/2 connection: allowed and refused requests side by side, another host is a mismatch."""

    async def main() -> None:
        import httpx

        rules = (rule("https://api.example.com/v1"), rule("https://b.example.com"))
        async with proxy_world(tmp_path, *rules) as world:
            await answering(world, "api.example.com", "b.example.com")
            async with httpx.AsyncClient(http2=True, verify=world.trust(), timeout=10) as client:

                async def get(path: str, host: str = "api.example.com") -> httpx.Response:
                    return await client.get(
                        f"https://{PROXY}:10000{path}",
                        headers={"host": host},
                        extensions={"sni_hostname": "api.example.com"},
                    )

                async with asyncio.TaskGroup() as group:
                    good = [group.create_task(get("/v1")) for _ in range(20)]
                    bad = [group.create_task(get("/v2")) for _ in range(20)]
                    foreign = group.create_task(get("/", "b.example.com"))

            assert {(one.result().status_code, one.result().http_version) for one in good} == {(200, "HTTP/2")}
            assert {one.result().json()["reason"] for one in bad} == {"path_denied"}
            assert (foreign.result().status_code, foreign.result().json()["reason"]) == (421, "sni_mismatch")

    run_in_namespace(main)
