"""Clients that misbehave in numbers: others are served, memory stays bounded, each gets its code."""

from __future__ import annotations

from pathlib import Path

import pytest

from clawker_cp.testing.machine import Machine
from clawker_cp.testing.served import serving

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

GROWTH_KIB = 96 * 1024  # of a server that would keep what it was sent: 10,000 tokens alone are 80 MiB
ABUSE = """
        import collections, secrets, socket
        import grpc
        identity = ClientIdentity(ROOT)
        credentials = grpc.ssl_channel_credentials(
            identity.read("ca/ca.pem"), identity.read("cli/client.key"), identity.read("cli/client.pem"))
        NAME = "/clawker.admin.v1.AdminService/FirewallStatus"
        ADD = "/clawker.admin.v1.AdminService/FirewallAddRules"

        def channel():
            options = [("grpc.ssl_target_name_override", "clawker-controlplane"), ("grpc.use_local_subchannel_pool", 1),
                       ("grpc.max_send_message_length", -1), ("grpc.max_metadata_size", 1 << 20)]
            return grpc.aio.secure_channel("127.0.0.1:7443", credentials, options=options)

        async def outcome(made, metadata=(), data=b"", method=NAME):
            try:
                await made.unary_unary(method)(data, metadata=metadata, timeout=20)
            except grpc.aio.AioRpcError as error:
                return error.code().name, error.details()
            return "OK", ""

        good = (("authorization", "Bearer " + await client._tokens.token()),)
        served, slowest = 0, 0.0
        over = asyncio.Event()

        async def somebody_else():
            # One connection of before, used all the time.
            nonlocal served, slowest
            async with channel() as made:
                while not over.is_set():
                    begun = time.monotonic()
                    assert await outcome(made, good) == ("OK", "")
                    served, slowest = served + 1, max(slowest, time.monotonic() - begun)
                    await asyncio.sleep(0.02)

        other = asyncio.ensure_future(somebody_else())
        while not served:
            await asyncio.sleep(0.01)

        # 10,000 tokens that nobody knows, 8 KiB each.
        said = collections.Counter()
        left = iter(range(10_000))
        async def flood(made):
            for _ in left:
                said[await outcome(made, (("authorization", "Bearer " + secrets.token_hex(4000)),))] += 1
        made = [channel() for _ in range(4)]
        await asyncio.gather(*(flood(made[n % 4]) for n in range(64)))
        result["tokens"] = {" ".join(key): count for key, count in said.items()}

        # Whole messages of 4 MiB and more, and metadata beyond the bound.
        big = await asyncio.gather(*(outcome(made[n % 4], good, bytes(5 << 20), ADD) for n in range(24)))
        result["big"] = sorted({code for code, _ in big})
        heads = await asyncio.gather(*(outcome(made[0], (*good, ("x-more", "m" * 60_000))) for _ in range(24)))
        result["heads"] = sorted({code for code, _ in heads})
        odd = [(("authorization", "Bearer ~ ~"),), (("authorization-bin", bytes(range(256))),)]
        result["odd"] = [await outcome(made[1], one) for one in odd]
        for one in made:
            await one.close()

        async def page(port):
            asked = await asyncio.create_subprocess_exec(
                "curl", "-sS", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}",
                f"http://127.0.0.1:{port}/" + {7080: "healthz", 7081: "metrics"}[port], stdout=asyncio.subprocess.PIPE)
            return (await asked.communicate())[0].decode()

        # Connections that say nothing, or begin to: at two listeners more than one takes, some at every other.
        loris = []
        GATEWAY = "10.231.80.1"
        places = [("127.0.0.1", 4444, 600), ("127.0.0.1", 4445, 100), (GATEWAY, 7444, 100), (GATEWAY, 4444, 100),
                  ("127.0.0.1", 7080, 100), (GATEWAY, 7080, 100), ("127.0.0.1", 7081, 100), ("127.0.0.1", 7443, 600)]
        for host, port, count in places:
            if port == 7443:  # beyond its bound it takes nobody, and /healthz says so
                result["pages"] = [await page(7080), await page(7081)]
            for n in range(count):
                reader, writer = await asyncio.open_connection(host, port)
                if n % 2:
                    writer.write(b"GET /healthz HTTP/1.1\\r\\nHost: " if port in {7080, 7081} else b"\\x16")
                loris.append((reader, writer))

        before = served
        async def ended(reader):
            try:
                while await reader.read(4096): pass
            except OSError: pass
        begun = time.monotonic()
        async with asyncio.timeout(30):
            await asyncio.gather(*(ended(reader) for reader, _ in loris))
        result["loris ended after"] = time.monotonic() - begun
        for _, writer in loris:
            writer.close()
        result["served meanwhile"] = served - before
        async with channel() as fresh:
            result["afterwards"] = await outcome(fresh, good)
        async with asyncio.timeout(10):
            while await page(7080) != "200":
                pass
        over.set()
        await other
        result["served"], result["slowest"] = served, slowest
"""


def resident_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS:")))


async def test_floods_hurt_nobody_else(machine: Machine) -> None:
    """10,000 made-up tokens, messages too big, heads too long, 1,800 silent connections to every listener."""
    async with serving(machine) as served:
        await served.call("await client.call('GetStatus', C.GetStatusRequest())")
        before = resident_kib(served.process.pid)
        said = await served.call(ABUSE, timeout_s=200)
        grown = resident_kib(served.process.pid) - before

    assert sum(said["tokens"].values()) == 10_000
    assert set(said["tokens"]) <= {
        "UNAUTHENTICATED token inactive or invalid", "UNAUTHENTICATED token validation failed",
    }  # fmt: skip
    assert said["big"] == ["RESOURCE_EXHAUSTED"] and said["heads"] == ["RESOURCE_EXHAUSTED"]
    assert {code for code, _ in said["odd"]} == {"UNAUTHENTICATED"}
    assert said["pages"] == ["200", "200"]
    assert said["loris ended after"] < 20 and said["served meanwhile"] > 10
    assert said["afterwards"] == ["OK", ""] and said["served"] > 100 and said["slowest"] < 10
    assert grown < GROWTH_KIB, grown
