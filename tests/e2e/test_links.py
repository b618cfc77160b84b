"""Somebody with root damages the kernel side under a running server: it is put back, or said and nothing opened."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from clawker_cp.testing.machine import Machine
from clawker_cp.testing.served import Served, serving

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

PRELUDE = """
        import grpc, shutil
        from grpc_health.v1 import health_pb2, health_pb2_grpc
        PINS = Path("/sys/fs/bpf/clawker")
        LINK = PINS / "links" / "clawker_connect4"
        identity = ClientIdentity(ROOT)

        async def overall():
            pair = identity.read("cli/client.key"), identity.read("cli/client.pem")
            credentials = grpc.ssl_channel_credentials(identity.read("ca/ca.pem"), *pair)
            options = [("grpc.ssl_target_name_override", "clawker-controlplane")]
            async with grpc.aio.secure_channel("127.0.0.1:7443", credentials, options=options) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                said = [await stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in
                        ("", "clawker.admin.v1.AdminService")]
            return [health_pb2.HealthCheckResponse.ServingStatus.Name(one.status) for one in said]

        async def enforcement():
            components = (await client.call("GetStatus", C.GetStatusRequest())).components
            (one,) = (one for one in components if one.name == "enforcement")
            return C.Health.Name(one.health), one.detail

        async def healthz():
            page = await asyncio.create_subprocess_exec(
                "curl", "-sS", "http://127.0.0.1:7080/healthz", stdout=asyncio.subprocess.PIPE)
            return json.loads((await page.communicate())[0])

        async def until(health):
            async with asyncio.timeout(20):
                while (now := await enforcement())[0] != health:
                    await asyncio.sleep(0.05)
            return now[1]
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(machine: Machine) -> AsyncIterator[Served]:
    async with serving(machine) as served:
        yield served


async def test_what_is_removed_is_back_and_watchers_hear_of_it(served: Served) -> None:
    """With every pin of links and maps removed an agent ends up denied as before, and who watches is told."""
    dial = (
        "import socket\n"
        "while True:\n"
        "    input()\n"
        "    try: socket.create_connection(('203.0.113.66', 6379), 2).close(); print('OPEN', flush=True)\n"
        "    except OSError as error: print(error.errno, flush=True)\n"
    )
    said = await served.call(f"""{PRELUDE}
        made = await client.call("CreateSandbox", C.CreateSandboxRequest(
            project="shop", agent="cut", argv=["/usr/bin/python3", "-c", {dial!r}], workdir=WORK, auto_remove=True))
        asks = asyncio.Queue()

        async def requests():
            yield C.AttachSandboxRequest(id=made.sandbox.id)
            while True:
                yield C.AttachSandboxRequest(stdin=await asks.get())

        stream = client.stream("AttachSandbox", requests())

        async def dials():
            await asks.put(b"\\n")
            return (await anext(stream)).output.decode().strip()

        result["before"] = await dials()
        events = client.stream("WatchEvents", C.WatchEventsRequest(topics=["enforcement"]))
        first = asyncio.ensure_future(anext(events))
        while not first.done():  # until the watcher is there
            shutil.rmtree(PINS / "links")
            (PINS / "dns_cache").unlink(missing_ok=True)
            async with asyncio.timeout(20):
                while len(list(PINS.rglob("clawker_*"))) < 12 or not (PINS / "dns_cache").exists():
                    await asyncio.sleep(0.02)
        event = await first
        result["event"] = [event.name, event.fields["fault"]]
        await events.aclose()
        result["after"] = await dials()
        await client.call("RemoveSandbox", C.RemoveSandboxRequest(id=made.sandbox.id, force=True, grace_seconds=1))
        await stream.aclose()
        await until("HEALTH_OK")
    """)
    assert said["before"] == said["after"] == "111"
    assert said["event"][0] == "links_restored" and "is not judged by clawker_" in said["event"][1]


async def test_what_cannot_be_put_back_is_red_and_opens_nothing(served: Served) -> None:
    """With something else in a pin's place health says which program and why, and no agent starts until it is gone."""
    said = await served.call(f"""{PRELUDE}
        result["well"] = await overall()
        LINK.unlink()
        LINK.mkdir()
        try:
            result["detail"] = await until("HEALTH_FAILED")
            async with asyncio.timeout(10):
                while (await overall())[0] != "NOT_SERVING":
                    await asyncio.sleep(0.05)
            result["ill"] = await overall()
            create = C.CreateSandboxRequest(project="shop", agent="no", argv=["true"], workdir=WORK)
            result["create"] = await refused(client.call("CreateSandbox", create))
            result["sync"] = await refused(client.call("FirewallSyncRoutes", A.FirewallSyncRoutesRequest()))
            async with asyncio.timeout(10):
                while (page := await healthz())["status"] == "healthy":  # what was found is kept two seconds
                    await asyncio.sleep(0.05)
            result["healthz"] = page
        finally:
            LINK.rmdir()
        await until("HEALTH_OK")
        async with asyncio.timeout(10):
            while (await overall())[0] != "SERVING":
                await asyncio.sleep(0.05)
        result["again"] = await refused(client.call("FirewallSyncRoutes", A.FirewallSyncRoutesRequest()))
    """)
    assert said["well"] == ["SERVING", "SERVING"] and said["ill"] == ["NOT_SERVING", "SERVING"]
    assert "is not judged by clawker_connect4" in said["detail"] and "repair what it names" in said["detail"]
    for name in ("create", "sync"):
        assert said[name][:2] == ["UNAVAILABLE", "ENFORCEMENT_UNAVAILABLE"], said[name]
        assert "clawker_connect4" in said[name][2]
    assert said["healthz"] == {"status": "unhealthy", "failed_probe": "enforcement"}
    assert said["again"] is None
