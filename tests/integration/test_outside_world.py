"""What the tour and the end-to-end tests take for granted of their outside world."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from clawker_cp.testing.world import HostNamespace, World

pytestmark = [pytest.mark.root, pytest.mark.slow]

_WEBSOCKETS = """
import ssl, sys
from websockets.sync.client import connect
tls = ssl.create_default_context(cafile=sys.argv[1])
for url, context in (("ws://api.example.com:9080/", None), ("wss://api.example.com:9443/", tls)):
    with connect(url, ssl=context, proxy=None) as ws:
        ws.send("hello")
        print(ws.recv(timeout=5))
"""
_ECHOES = """
import socket
for name, kind, port in (
    ("db.example.org", socket.SOCK_STREAM, 5432), ("git.example.org", socket.SOCK_STREAM, 2222),
    ("api.example.com", socket.SOCK_DGRAM, 5000),
):
    s = socket.socket(socket.AF_INET, kind); s.settimeout(5); s.connect((name, port)); s.send(b"ping")
    print(s.recv(99).decode())
"""


def _namespaces() -> set[str]:
    found = set()
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(str(link.readlink()))
        except OSError:
            continue
    return found


async def test_a_name_is_reached_over_https_and_an_unknown_one_is_not() -> None:
    """HTTPS by name answers with what arrived and is recorded; a name outside the zone is NXDOMAIN."""
    async with HostNamespace() as host, World(host) as world:
        listed = await host.run(["curl", "-sS", "--cacert", str(world.ca), "https://api.example.com:8443/echo?x=1"])
        unlisted = await host.run(["curl", "-sS", "https://nobody.example.invalid/"])
        connections, queries = await world.connections(), await world.queries(name="nobody.example.invalid")

    assert listed.code == 0, listed
    said = json.loads(listed.out)
    assert [said[key] for key in ("method", "target", "host", "sni")] == [
        "GET", "/echo?x=1", "api.example.com:8443", "api.example.com",
    ]  # fmt: skip
    assert unlisted.code == 6, unlisted
    assert queries
    assert [(c["dst"], c["dport"], c["sni"]) for c in connections] == [("198.51.100.10", 8443, "api.example.com")]


async def test_other_protocols_echo() -> None:
    """WebSockets, TCP and UDP give back what they got, by name."""
    async with HostNamespace() as host, World(host) as world:
        sockets = await host.run([sys.executable, "-c", _WEBSOCKETS, str(world.ca)])
        echoes = await host.run([sys.executable, "-c", _ECHOES])

    assert (sockets.code, sockets.out) == (0, "hello\nhello\n"), sockets
    assert (echoes.code, echoes.out) == (0, "ping\nping\nping\n"), echoes


async def test_nothing_stays_even_after_half_a_setup() -> None:
    """A failure between machine and world leaves no namespace, process or cgroup, nor does a named netns in it."""
    made: list[Path] = []
    lived: set[str] = set()
    with pytest.raises(RuntimeError, match="ip refused"):
        async with HostNamespace() as host, World(host) as world:
            lived |= {str(Path(f"/proc/{pid}/ns/net").readlink()) for pid in (host.pid, world.pid)}
            made += [host.cgroup, host.directory, world.directory]
            named = await host.run(["ip", "netns", "add", "sandbox"])
            assert named.code == 0, named
            assert (await host.run(["ip", "netns", "list"])).out.strip() == "sandbox"
            await world.connect(host.pid)  # a second link of the same name
    async with asyncio.timeout(10):
        while _namespaces() & lived:
            await asyncio.sleep(0.01)

    assert len(lived) == 2
    assert [path for path in made if path.exists()] == []
    assert "sandbox" not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
