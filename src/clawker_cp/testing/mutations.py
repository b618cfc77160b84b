"""
Every mutation of the control surface, and what it changes: for tests that kill the server inside one.

Runs on a machine of the test's own (`python -m clawker_cp.testing.mutations WORKDIR`), starts and kills
servers there, and answers requests on its standard input, a JSON line each.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clawker_cp._proto.clawker.admin.v1 import admin_pb2 as admin
from clawker_cp._proto.clawker.control.v1 import control_pb2 as control
from clawker_cp.adminclient import AsyncAdminClient, ClientIdentity, RpcFailed

READY_LIMIT_S = 30.0
ANSWER_LIMIT_S = 20.0
POLL_S = 0.01
GRACE_S = 1

READS = frozenset({
    "FirewallListRules", "FirewallStatus", "FirewallResolveHostname", "ListAgents", "GetSystemTime", "WatchSOS",
    "GetStatus", "ListRules", "GetEffectiveRules", "Check", "Explain", "WatchFlows", "WatchEvents", "ListSessions",
    "ListSandboxes", "AttachSandbox",
})  # fmt: skip
# The firewall goes up and down only while no agent lives.
ALONE = ("FirewallInit", "FirewallRemove")

# The agent: never gets through to one address, and says on request what else it reaches.
WORKER = """
import os, socket, ssl, time
def reaches(host, port, tls=False):
    try:
        with socket.create_connection((host, port), 3) as s:
            if tls: ssl.create_default_context().wrap_socket(s, server_hostname=host).close()
            return True
    except OSError:
        return False
done = ""
while True:
    never = reaches("203.0.113.66", 6379)
    if never: open("opened", "w").close()
    asked = open("asked").read() if os.path.exists("asked") else ""
    if asked != done:
        done = asked
        said = [reaches("203.0.113.66", 6379), reaches("db.example.com", 5432), reaches("www.example.com", 443, True)]
        open("said.new", "w").write(repr((done, said)).lower().replace("'", '"').replace("(", "[").replace(")", "]"))
        os.replace("said.new", "said")
    time.sleep(0.005)
"""


class Mutations:
    """One machine's servers, one after the other, and the agent that lives through all of them."""

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir
        self._data = Path(os.environ["CLAWKER_DATA_DIR"])
        self._server: asyncio.subprocess.Process | None = None
        self._client: AsyncAdminClient
        self._questions = 0
        self._worker = ""
        self._token = ""

    # -- requests ----------------------------------------------------------------------------

    async def reference(self, name: str) -> dict[str, Any]:
        """What `name` changes when nobody is killed, and how long it takes."""
        await self._prepare(name)
        old = await self._state()
        begun = time.monotonic()
        status = await self._outcome(name)
        took = time.monotonic() - begun
        return {"old": old, "new": await self._state(), "status": status, "seconds": took}

    async def kill(self, name: str, delay_s: float) -> dict[str, Any]:
        """Kill the server some time after `name` was sent; the answer, and what the next server says."""
        await self._prepare(name)
        opened = self._workdir / "opened"
        answer = asyncio.create_task(self._outcome(name))
        await asyncio.sleep(delay_s)
        await self._end_server()
        status = await answer
        await self._start_server()
        state = await self._state()
        return {"status": status, "state": state, "opened": opened.exists()}

    async def stop(self) -> None:
        """End server and agent."""
        if self._worker:
            await self._remove(self._worker)
        if self._server is not None:
            self._server.terminate()
            await self._server.wait()
        await self._client.__aexit__()

    # -- servers -----------------------------------------------------------------------------

    async def _start_server(self) -> None:
        null = asyncio.subprocess.DEVNULL
        errors = self._data.with_name("server.err")
        with errors.open("wb") as stderr:
            self._server = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "clawker_cp", "serve", stdin=null, stdout=null, stderr=stderr
            )
        async with asyncio.timeout(READY_LIMIT_S):
            while not await _healthy():
                if self._server.returncode is not None:
                    raise RuntimeError(f"the server ended with {self._server.returncode}: {errors.read_text()}")
                await asyncio.sleep(POLL_S)
        self._client = await AsyncAdminClient(ClientIdentity(self._data / "auth")).__aenter__()

    async def _end_server(self) -> None:
        assert self._server is not None
        self._server.kill()
        await self._server.wait()

    async def _call(self, method: str, **fields: Any) -> Any:
        module = admin if hasattr(admin, f"{method}Request") else control
        return await self._client.call(method, getattr(module, f"{method}Request")(**fields))

    async def _outcome(self, name: str) -> str:
        method, fields = self._request(name)
        try:
            await self._call(method, **fields)
        except RpcFailed as error:
            return error.status
        return "OK"

    # -- mutations ---------------------------------------------------------------------------

    def _request(self, name: str) -> tuple[str, dict[str, Any]]:
        agent = control.AgentRef(container_id=self._worker)
        database = admin.EgressRule(dst="db.example.com", proto="tcp", port="5432")
        scoped = control.Rule(scope="agent:kill/worker", egress=database)
        fields: dict[str, dict[str, Any]] = {
            "FirewallInit": {}, "FirewallRemove": {}, "FirewallReload": {}, "FirewallRotateCA": {},
            "FirewallSyncRoutes": {},
            "FirewallEnable": {"container_id": self._worker}, "FirewallDisable": {"container_id": self._worker},
            "FirewallBypass": {"container_id": self._worker, "timeout_seconds": 600},
            "FirewallAddRules": {"rules": [database]},
            "FirewallRemoveRule": {"dst": "db.example.com", "proto": "tcp", "port": "5432"},
            "PutRules": {"rules": [scoped]}, "DeleteRules": {"scope": "agent:kill/worker"},
            "Grant": {"agent": agent, "egress": database, "duration_seconds": 600, "reason": "killed"},
            "Quarantine": {"agent": agent, "reason": "killed"}, "Release": {"agent": agent},
            "RevokeToken": {"token": self._token},
            "CreateSandbox": self._sandbox("other", "sleep", "600"),
            "RemoveSandbox": {"id": "clawker.kill.other", "force": True, "grace_seconds": GRACE_S},
        }  # fmt: skip
        return name, fields[name]

    def _sandbox(self, agent: str, *argv: str) -> dict[str, Any]:
        return {"project": "kill", "agent": agent, "argv": argv, "workdir": str(self._workdir)}

    async def _prepare(self, name: str) -> None:
        """Bring everything to where `name` changes something."""
        if self._server is None:
            await self._start_server()
        await self._call("FirewallInit")
        for one in (await self._call("ListSandboxes", all=True)).sandboxes:
            if one.agent == "other" or name in ALONE:
                await self._remove(one.id)
        if name not in ALONE and not self._worker:
            made = await self._call("CreateSandbox", **self._sandbox("worker", "/usr/bin/python3", "-c", WORKER))
            self._worker = made.sandbox.id
        if self._worker:
            await self._call("Release", agent=control.AgentRef(container_id=self._worker))
            await self._call("FirewallEnable", container_id=self._worker)
        await self._call("FirewallRemoveRule", all=True)
        await self._call("DeleteRules", scope="agent:kill/worker")
        await self._call("FirewallAddRules", rules=[admin.EgressRule(dst="www.example.com")])
        first = {
            "FirewallInit": "FirewallRemove", "FirewallEnable": "FirewallBypass",
            "FirewallRemoveRule": "FirewallAddRules", "DeleteRules": "PutRules", "Release": "Quarantine",
            "RemoveSandbox": "CreateSandbox",
        }.get(name)  # fmt: skip
        if first is not None:
            method, fields = self._request(first)
            await self._call(method, **fields)
        if name == "FirewallReload":
            rules = self._data / "firewall" / "egress-rules.yaml"
            rules.write_text(f"{rules.read_text()}  - dst: db.example.com\n    proto: tcp\n    port: '5432'\n")
        if name == "RevokeToken" or not self._token:
            async with AsyncAdminClient(ClientIdentity(self._data / "auth")) as other:
                self._token = await other._tokens.token()
        (self._workdir / "opened").unlink(missing_ok=True)

    async def _remove(self, sandbox_id: str) -> None:
        await self._call("RemoveSandbox", id=sandbox_id, force=True, grace_seconds=GRACE_S)
        if sandbox_id == self._worker:
            self._worker = ""

    # -- what holds ----------------------------------------------------------------------------

    async def _state(self) -> dict[str, Any]:
        """What the server says, what the host has and what the agent reaches; equal for equal states."""
        rules = (await self._call("ListRules")).rules
        sandboxes = (await self._call("ListSandboxes", all=True)).sandboxes
        sessions = (await self._call("ListSessions")).sessions
        components = (await self._call("GetStatus")).components
        namespaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        return {
            "on": (await self._call("FirewallStatus")).running,
            "rules": sorted(f"{one.scope} {one.egress.dst} {one.egress.port} {one.source}" for one in rules),
            "readable": [one.detail for one in components if one.name == "rules"],
            "sandboxes": sorted(f"{one.agent} {control.SandboxState.Name(one.state)}" for one in sandboxes),
            "sessions": sorted(
                f"{one.agent} enrolled={one.enrolled} quarantined={one.quarantined}"
                f" bypassed={one.bypass_until_unix > 0}"
                for one in sessions
            ),
            "namespaces": len(namespaces.splitlines()),
            "token": await self._holds(self._token),
            "reaches": await self._reaches() if self._worker else [],
        }

    async def _holds(self, token: str) -> bool:
        stub: Any = self._client._method("GetStatus")
        try:
            await stub(control.GetStatusRequest(), metadata=(("authorization", f"Bearer {token}"),), timeout=5)
        except Exception as error:
            if "UNAUTHENTICATED" not in str(error):
                raise
            return False
        return True

    async def _reaches(self) -> list[bool]:
        self._questions += 1
        (self._workdir / "asked").write_text(str(self._questions))
        async with asyncio.timeout(ANSWER_LIMIT_S):
            while True:
                said = self._workdir / "said"
                if said.exists():
                    number, reached = json.loads(said.read_text())
                    if number == str(self._questions):
                        return list(reached)
                await asyncio.sleep(POLL_S)


async def _healthy() -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", 7080)
    except OSError:
        return False
    try:
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return b" 200 " in await reader.readline()
    except OSError:
        return False
    finally:
        writer.close()


async def _answer() -> None:
    driver = Mutations(Path(sys.argv[1]))
    verbs: dict[str, Callable[..., Any]] = {"reference": driver.reference, "kill": driver.kill, "stop": driver.stop}
    while line := await asyncio.to_thread(sys.stdin.readline):
        verb, *arguments = json.loads(line)
        print(json.dumps(await verbs[verb](*arguments)), flush=True)


if __name__ == "__main__":
    asyncio.run(_answer())
