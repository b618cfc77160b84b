"""
A control plane that serves on a machine of the test's own, and programs that call it from there.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from clawker_cp.engines.host.namespaces import in_netns
from clawker_cp.testing.machine import Machine

READY_LIMIT_S = 40.0
POLL_S = 0.02
LOG, LOG_SHOWN = "serve.log", 4000
STOP_LIMIT_S = 30.0
_PRELUDE = """
import asyncio, json, os, sys, time
from pathlib import Path
from clawker_cp.adminclient import AsyncAdminClient, ClientIdentity, RpcFailed
from clawker_cp._proto.clawker.admin.v1 import admin_pb2 as A
from clawker_cp._proto.clawker.control.v1 import control_pb2 as C
from google.protobuf.json_format import MessageToDict

ROOT = Path(os.environ["CLAWKER_DATA_DIR"]) / "auth"
WORK = {work!r}

def told(message):
    return MessageToDict(message, preserving_proto_field_name=True)

async def refused(awaitable):
    try:
        await awaitable
    except RpcFailed as error:
        return [error.status, error.code, error.message, dict(error.details)]
    return None

async def main(client, result):
{body}

async def run():
    result = {{}}
    async with AsyncAdminClient(ClientIdentity(ROOT)) as client:
        await main(client, result)
    print(json.dumps(result))

asyncio.run(run())
"""


class Served:
    """One running server on a machine."""

    def __init__(self, machine: Machine, process: asyncio.subprocess.Process) -> None:
        self.machine = machine
        self.process = process

    async def call(self, body: str, *, timeout_s: float = 60) -> dict[str, Any]:
        """
        Run the body of an `async def main(client, result)` beside the server; returns what it put into `result`.
        """
        code = _PRELUDE.format(body=textwrap.indent(textwrap.dedent(body), "    "), work=str(self.machine.workdir))
        done = await self.machine.host.run(
            [sys.executable, "-c", code], env=self.machine.environment, timeout_s=timeout_s
        )
        if done.code != 0:
            raise AssertionError(f"the caller failed: {done.err[-4000:]}\n{self.state()}")
        said: dict[str, Any] = json.loads(done.out.splitlines()[-1])
        return said

    async def get(self, url: str) -> tuple[int, str]:
        """
        Status and body of an HTTP GET from the machine.
        """
        done = await self.machine.host.run(
            ["curl", "-sS", "-o", "-", "-w", "\n%{http_code}", url], env=self.machine.environment, timeout_s=20
        )
        body, _, status = done.out.rpartition("\n")
        return int(status or 0), body

    async def wait_ready(self) -> None:
        """
        Wait until `/healthz` says healthy.
        """
        async with asyncio.timeout(READY_LIMIT_S):
            while not await asyncio.to_thread(in_netns, self.machine.host.netns, _healthy):
                if self.process.returncode is not None:
                    raise AssertionError(self.state())
                await asyncio.sleep(POLL_S)

    def state(self) -> str:
        """
        Whether the server runs, or how it ended, with the last it logged: what a failed test needs to tell.
        """
        ended = self.process.returncode
        log = self.machine.host.directory / LOG
        said = log.read_text(errors="replace")[-LOG_SHOWN:] if log.exists() else ""
        return f"the server {'runs' if ended is None else f'ended with {ended}'}; its log ends with:\n{said}"

    async def stop(self, signo: int = signal.SIGTERM) -> int:
        """
        Send a signal and wait for the end; returns the exit code.
        """
        if self.process.returncode is None:
            self.process.send_signal(signo)
        async with asyncio.timeout(STOP_LIMIT_S):
            return await self.process.wait()


def _healthy() -> bool:
    # No process for a question: on two cores they would take from the server what it needs to start.
    connection = http.client.HTTPConnection("127.0.0.1", 7080, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@asynccontextmanager
async def serving(machine: Machine, *options: str) -> AsyncIterator[Served]:
    """
    `clawker-cp serve` until the block ends.
    """
    with (machine.host.directory / LOG).open("ab") as out:
        process = await machine.host.start(
            [sys.executable, "-X", "faulthandler", "-m", "clawker_cp", "serve", *options],
            env=machine.environment, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip
    served = Served(machine, process)
    try:
        await served.wait_ready()
        yield served
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(STOP_LIMIT_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
