"""
HTTP/3 through the real Envoy: the same rules, the same refusals, advertised to who asks over TCP.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path
from typing import Any

import pytest
from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration

from clawker_cp.testing.plan_world import deny, rule
from clawker_cp.testing.proxy_world import OUTSIDE, PROXY, ProxyWorld, proxy_world, run_in_namespace

pytestmark = [pytest.mark.root, pytest.mark.envoy, pytest.mark.slow]


class _Client(QuicConnectionProtocol):
    """One HTTP/3 request at a time."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._http = H3Connection(self._quic)
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.headers: dict[str, str] = {}
        self.body = b""

    def quic_event_received(self, event: Any) -> None:
        for happened in self._http.handle_event(event):
            if isinstance(happened, HeadersReceived):
                self.headers = {key.decode(): value.decode() for key, value in happened.headers}
            elif isinstance(happened, DataReceived):
                self.body += happened.data
            if getattr(happened, "stream_ended", False) and not self._done.done():
                self._done.set_result(None)

    async def get(self, authority: str, path: str) -> tuple[int, bytes]:
        stream = self._quic.get_next_available_stream_id()
        fields = {":method": "GET", ":scheme": "https", ":authority": authority, ":path": path}
        self._http.send_headers(stream, [(k.encode(), v.encode()) for k, v in fields.items()], end_stream=True)
        self.transmit()
        await asyncio.wait_for(self._done, 10)
        return int(self.headers[":status"]), self.body


async def _get(world: ProxyWorld, sni: str, authority: str, path: str) -> tuple[int, bytes]:
    configuration = QuicConfiguration(is_client=True, alpn_protocols=["h3"], server_name=sni)
    configuration.load_verify_locations(cadata=world.authority.certificate_pem().encode())
    configuration.verify_mode = ssl.CERT_REQUIRED
    async with connect(PROXY, 10000, configuration=configuration, create_protocol=_Client) as client:
        assert isinstance(client, _Client)
        return await client.get(authority, path)


def test_http3_is_served_and_judged_like_the_rest(tmp_path: Path) -> None:
    """Allowed, path-denied, wrong Host and denied requests end as over TCP; TCP answers point to it."""

    async def main() -> None:
        rules = (rule("https://api.example.com/v1"), rule("https://*.wild.example"), deny("https://bad.wild.example"))
        async with proxy_world(tmp_path, *rules) as world:
            names = ("api.example.com", "x.wild.example", "bad.wild.example")
            world.view.zone.update(dict.fromkeys(names, OUTSIDE))
            await world.outside.http(443, *names)

            assert await _get(world, "api.example.com", "api.example.com", "/v1") == (
                200,
                b"GET /v1 api.example.com",
            )
            status, body = await _get(world, "api.example.com", "api.example.com", "/v2")
            assert (status, json.loads(body)["reason"]) == (403, "path_denied")
            status, body = await _get(world, "api.example.com", "x.wild.example", "/")
            assert (status, json.loads(body)["reason"]) == (421, "sni_mismatch")
            status, body = await _get(world, "bad.wild.example", "bad.wild.example", "/")
            assert (status, json.loads(body)["reason"]) == (403, "rule_deny")
            _, headers, _ = await world.request("https://api.example.com/v1")
            assert headers["alt-svc"] == 'h3=":443"; ma=86400'

    run_in_namespace(main)
