"""The outside world of the tests is itself held by tests: others prove with it that nothing arrived."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator

import pytest

from clawker_cp.testing import world_names as names
from clawker_cp.testing.world import HostNamespace, World

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.fixture
async def machine() -> AsyncIterator[tuple[HostNamespace, World]]:
    async with HostNamespace() as host, World(host) as world:
        yield host, world


async def test_curl_reaches_every_kind_of_web_server(machine: tuple[HostNamespace, World]) -> None:
    """Plain HTTP, HTTPS by name with HTTP/2 and HTTP/1.1 all answer and are recorded with their server name."""
    host, world = machine
    ca = str(world.ca)
    plain = await host.run(["curl", "-sS", "http://www.example.com/a%2Fb?x=1"])
    two = await host.run(["curl", "-sS", "--cacert", ca, "--http2", "https://api.example.com/two"])
    one = await host.run(["curl", "-sS", "--cacert", ca, "--http1.1", "-d", "hi", "https://deep.sub.example.net/one"])
    seen = await world.connections()

    assert [plain.code, two.code, one.code] == [0, 0, 0], (plain, two, one)
    assert json.loads(plain.out)["target"] == "/a%2Fb?x=1"
    assert json.loads(two.out)["version"] == "2"
    assert json.loads(one.out)["body"] == "hi"
    assert [(c["service"], c["dst"], c["sni"], c["alpn"]) for c in seen] == [
        ("http", names.WWW, "", ""),
        ("https", names.API, "api.example.com", "h2"),
        ("https", names.WILDCARD, "deep.sub.example.net", "http/1.1"),
    ]


async def test_a_large_download_arrives_whole(machine: tuple[HostNamespace, World]) -> None:
    """`/big/N` sends N bytes over both HTTP versions."""
    host, world = machine
    for version in ("--http2", "--http1.1"):
        done = await host.run(
            ["curl", "-sS", "--cacert", str(world.ca), version, "-o", "/dev/null", "-w", "%{size_download}",
             "https://api.example.com/big/50000000"]
        )  # fmt: skip
        assert (done.code, done.out) == (0, "50000000"), done


async def test_echo_and_ssh(machine: tuple[HostNamespace, World]) -> None:
    """TCP and UDP echo on any address of the ranges, IPv6 as well, and SSH runs a command without a password."""
    host, world = machine
    script = """
import socket, sys
for family, address in ((socket.AF_INET, "203.0.113.99"), (socket.AF_INET6, "2001:db8:77::1")):
    for kind, port in ((socket.SOCK_STREAM, 9000), (socket.SOCK_DGRAM, 9001)):
        s = socket.socket(family, kind); s.settimeout(5); s.connect((address, port)); s.send(b"hello")
        assert s.recv(99) == b"hello"; assert s.getpeername()[0] == address
"""
    echoed = await host.run([sys.executable, "-c", script])
    options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
    ssh = await host.run(["ssh", *options, "git@git.example.org", "hello"])
    seen = await world.connections()

    assert echoed.code == 0, echoed
    assert (ssh.code, ssh.out) == (0, "world: hello\n"), ssh
    assert {(c["proto"], c["dst"]) for c in seen if c["service"] == "echo"} == {
        ("tcp", "203.0.113.99"), ("udp", "203.0.113.99"), ("tcp", "2001:db8:77::1"), ("udp", "2001:db8:77::1"),
    }  # fmt: skip
    assert [c["dst"] for c in seen if c["service"] == "ssh"] == [names.GIT]


async def test_packets_to_nobody_are_seen(machine: tuple[HostNamespace, World]) -> None:
    """A SYN to a port without a listener appears in the packets, and only there; a reset forgets it."""
    host, world = machine
    refused = await host.run(["curl", "-sS", "http://198.51.100.201:4321/"])
    flows = await world.packets(proto="tcp")
    await world.reset()

    assert refused.code == 7, refused
    assert [(f["src"], f["dst"], f["dport"]) for f in flows] == [("192.0.2.1", "198.51.100.201", 4321)]
    assert await world.connections() == []
    assert await world.packets() == []


async def test_dns_misbehaves_on_demand(machine: tuple[HostNamespace, World]) -> None:
    """Long answers need TCP, a name can turn bad or move, and every question is counted."""
    host, world = machine
    script = """
import json, sys, dns.resolver, dns.flags
r = dns.resolver.Resolver(); r.lifetime = 2
def ask(name, kind="A"):
    try: return len(r.resolve(name, kind).rrset)
    except Exception as error: return type(error).__name__
print(json.dumps([ask(*a.split("/")) for a in sys.argv[1:]]))
"""
    ask = [sys.executable, "-c", script]
    await world.behave("www.example.com", "servfail")
    await world.zone("new.example.org", {"A": ["198.51.100.77", "198.51.100.78"]})
    done = await host.run([*ask, "many.example.com", "www.example.com", "new.example.org", "nobody.invalid",
                           "hidden.example.com/HTTPS", "only6.example.com"])  # fmt: skip
    asked = await world.queries()

    assert json.loads(done.out) == [80, "NoNameservers", 2, "NXDOMAIN", 1, "NoAnswer"], done
    assert [q["transport"] for q in asked if q["name"] == "many.example.com"] == ["udp", "tcp"]


async def test_nothing_else_is_reachable(machine: tuple[HostNamespace, World]) -> None:
    """No route leads out of the test ranges; what runs there is in its cgroup and sees a bpffs of its own."""
    host, _ = machine
    out = await host.run(["curl", "-sS", "-m", "3", "http://192.0.0.8/"])
    inside = await host.run(["sh", "-c", "grep ^0:: /proc/self/cgroup; ls /sys/fs/bpf"])

    assert out.code == 7, out
    assert inside.out.splitlines()[0] == f"0::/{host.prefix}"
    assert set(inside.out.splitlines()[1:]) <= {"maps.debug", "progs.debug"}


async def test_leaving_removes_everything() -> None:
    """Processes, cgroups and files are gone afterwards, background processes included."""
    async with HostNamespace() as host, World(host) as world:
        process = await host.start(["sleep", "1000"])
        cgroup, directories = host.cgroup, [host.directory, world.directory]
    await process.wait()

    assert not cgroup.exists()
    assert [path for path in directories if path.exists()] == []
