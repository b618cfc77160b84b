"""`clawker-cp serve` with the real Hydra, Kratos and Oathkeeper as its children."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from clawker_cp.testing.machine import Machine, machine_with_world
from clawker_cp.testing.peers import WHY, peer
from clawker_cp.testing.served import Served, serving

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]
CHILDREN = ("hydra", "kratos", "oathkeeper")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine() -> AsyncIterator[Machine]:
    """A machine with the three programs on its PATH, and none other than those."""
    found = {name: peer(name) for name in CHILDREN}
    for name, path in found.items():
        if path is None:
            pytest.skip(WHY.format(name=name))
    async with machine_with_world() as made:
        programs = made.host.directory / "ory"
        programs.mkdir()
        for name, path in found.items():
            (programs / name).symlink_to(str(path))
        made.environment = {**made.environment, "PATH": f"{programs}:{os.environ['PATH']}"}
        yield made


async def child_pid(served: Served, name: str) -> int:
    done = await served.machine.host.run(["pgrep", "-P", str(served.process.pid), "-x", name])
    return int(done.out.split()[0])


async def test_hydra_gives_the_tokens_and_both_others_are_watched(machine: Machine) -> None:
    """Calls pass with Hydra's tokens, revoked ones no longer, and health and status name what runs."""
    async with serving(machine) as served:
        said = await served.call("""
            status = told(await client.call("GetStatus", C.GetStatusRequest()))
            result["authority"] = next(one for one in status["components"] if one["name"] == "authority")
            token = await client._tokens.token()
            await client.call("RevokeToken", C.RevokeTokenRequest(token=token))
            import base64
            head = token.split(".")[0]
            result["header"] = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
            async with AsyncAdminClient(ClientIdentity(ROOT)) as other:
                other._tokens._token, other._tokens._until = token, time.monotonic() + 600
                again = await other.call("GetStatus", C.GetStatusRequest())  # re-mints once
                result["reminted"] = other._tokens._token != token and again.ready
        """)
        assert said["authority"]["implementation"] == "hydra" and said["authority"]["health"] == "HEALTH_OK"
        assert said["header"]["alg"] == "ES256" and said["header"]["kid"] == "at1"
        assert said["reminted"] is True
        pids = [await child_pid(served, name) for name in CHILDREN]
        assert await served.stop() == 0
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("name", CHILDREN)
async def test_losing_a_child_drains(machine: Machine, name: str) -> None:
    """After kill -9 of one the server ends with code 1, and a sandbox stays enforced and is adopted by the next."""
    async with serving(machine) as served:
        await served.call("""
            await client.call("CreateSandbox", C.CreateSandboxRequest(
                project="shop", agent="kept", argv=["sleep", "600"], workdir=WORK, auto_remove=True))
        """)
        await machine.host.run(["kill", "-9", str(await child_pid(served, name))])
        async with asyncio.timeout(30):
            assert await served.process.wait() == 1
        log = (machine.host.directory / "state" / "logs" / "clawker-controlplane.log").read_text()
        assert "cp_subprocess_crashed" in log and "drain_done" in log and "stays pinned" in log
    async with serving(machine) as served:
        said = await served.call("""
            kept = (await client.call("ListSandboxes", C.ListSandboxesRequest())).sandboxes
            result["kept"] = [one.agent for one in kept]
            for one in kept:
                await client.call("RemoveSandbox", C.RemoveSandboxRequest(id=one.id, force=True, grace_seconds=1))
        """)
        assert said["kept"] == ["kept"]


async def test_children_die_with_a_killed_server(machine: Machine) -> None:
    """After kill -9 of the server none of them is left, and the next one starts on the same ports."""
    async with serving(machine) as served:
        pids = [await child_pid(served, name) for name in CHILDREN]
        await served.stop(signal.SIGKILL)
        async with asyncio.timeout(5):
            while any(Path(f"/proc/{pid}").exists() for pid in pids):
                await asyncio.sleep(0.01)
    async with serving(machine) as served:
        assert await served.stop() == 0
