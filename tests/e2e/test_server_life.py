"""The life of a server: killed and started again, and starts that cannot be."""

from __future__ import annotations

import asyncio
import signal
import sys

import pytest

from clawker_cp.testing.machine import Machine
from clawker_cp.testing.served import serving

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


TAKE = """
import socket, time
taken = socket.socket()
taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
taken.bind(("127.0.0.1", 7443))
taken.listen()
print("taken", flush=True)
time.sleep(60)
"""


async def test_killed_and_started_again_it_knows_its_sandbox(machine: Machine) -> None:
    """After kill -9 the next server lists the sandbox, attaches to it, and keeps its quarantine."""
    async with serving(machine) as first:
        said = await first.call("""
            made = await client.call("CreateSandbox", C.CreateSandboxRequest(
                project="shop", agent="last", argv=["sh", "-c", "echo one; read x; echo two $x"], workdir=WORK))
            await client.call("Quarantine", C.QuarantineRequest(
                agent=C.AgentRef(container_id=made.sandbox.id), reason="kept"))
            result["id"] = made.sandbox.id

            async def requests():
                yield C.AttachSandboxRequest(id=made.sandbox.id)
                await asyncio.Event().wait()

            stream = client.stream("AttachSandbox", requests())
            result["before"] = (await anext(stream)).output.decode()
            await stream.aclose()  # detaching does not stop it
            result["token"] = await client._tokens.token()
        """)
        await first.stop(signal.SIGKILL)
    async with serving(machine) as second:
        again = await second.call(f"""
            async def requests():
                yield C.AttachSandboxRequest(id="{said["id"]}")
                yield C.AttachSandboxRequest(stdin=b"more\\n")
                await asyncio.Event().wait()
            output, code = b"", None
            sessions = await client.call("ListSessions", C.ListSessionsRequest())
            result["session"] = told(sessions.sessions[0])
            client._tokens._token, client._tokens._until = "{said["token"]}", time.monotonic() + 600
            async for message in client.stream("AttachSandbox", requests()):
                output, code = output + message.output, message.exit_code
            result["output"], result["code"] = output.decode(), code
            result["token"] = client._tokens._token == "{said["token"]}"
        """)
        assert again["session"]["quarantine_reason"] == "kept" and again["session"]["quarantined"]
        assert (said["before"], again["output"], again["code"]) == ("one\n", "two more\n", 0)
        assert again["token"] is True
        assert await second.stop() == 0


async def test_a_start_that_cannot_be_is_told_to_who_watches(machine: Machine) -> None:
    """A taken port ends the start with exit code 1 and a message that names it; nothing is left enforced."""
    blocker = await machine.host.start(
        ["python3", "-c", TAKE],
        env=machine.environment, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert blocker.stdout is not None
        await blocker.stdout.readline()
        done = await machine.host.run(
            [sys.executable, "-m", "clawker_cp", "serve"], env=machine.environment, timeout_s=40
        )
        assert done.code == 1 and "7443" in done.err, done.err
    finally:
        blocker.kill()
        await blocker.wait()
