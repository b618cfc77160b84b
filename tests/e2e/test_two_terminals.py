"""
`clawker-cp serve` in one terminal, `clawkerctl` in another: sandboxes of several projects with rules of their own,
whose traffic flows through kills of the server.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys

import pytest

from clawker_cp.testing.machine import Machine
from clawker_cp.testing.served import Served, serving
from clawker_cp.testing.world import Finished

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(400)]

KILLS = 2
# Holds one connection and asks on it all the time, asks anew whenever it can, and tries what is the others'.
WORKER = """
import os, socket, ssl, subprocess, sys, time
name, kind, host, port, *others = sys.argv[1:]
def held():
    s = socket.create_connection((host, int(port)), 10)
    if kind == "https":
        s = ssl.create_default_context().wrap_socket(s, server_hostname=host)
    s.settimeout(10)
    return s
def ask(s):
    if kind == "tcp":
        s.sendall(b"ping\\n")
        return s.recv(64) == b"ping\\n"
    s.sendall(f"GET /echo HTTP/1.1\\r\\nHost: {host}\\r\\n\\r\\n".encode())
    got = b""
    while b"}" not in got:
        more = s.recv(65536)
        if not more: return False
        got += more
    return True
long, asked, opened, fresh = held(), 0, set(), 0
open(name + ".up", "w").close()
while not os.path.exists("stop"):
    assert ask(long), "the connection that was allowed all the time broke"
    asked += 1
    for other in others:
        other_kind, other_host, other_port = other.split(":")
        try:
            s = socket.create_connection((other_host, int(other_port)), 1)
            if other_kind == "https":
                s = ssl.create_default_context().wrap_socket(s, server_hostname=other_host)
            opened.add(other); s.close()
        except OSError: pass
    try:
        with held() as s: fresh += ask(s)
    except OSError: pass
    time.sleep(0.02)
print(name, "asked", asked > 10, "opened", sorted(opened), "fresh", fresh > 3, flush=True)
sys.exit(len(name))
"""
AGENTS = {
    "shop/dev": ("https", "api.example.com", "443"),
    "bank/ops": ("tcp", "db.example.com", "5432"),
    "lab/dev": ("https", "www.example.com", "443"),
}


async def ctl(machine: Machine, *words: str) -> Finished:
    line = [sys.executable, "-m", "clawker_cp.cli.ctl.main", *words]
    return await machine.host.run(line, env=machine.environment, timeout_s=60)


async def ok(machine: Machine, *words: str) -> str:
    done = await ctl(machine, *words)
    assert done.code == 0, done.err + done.out
    return done.out


async def until_said(machine: Machine, words: tuple[str, ...], *, code: int) -> None:
    async with asyncio.timeout(20):
        while (await ctl(machine, *words)).code != code:
            pass


async def begin(machine: Machine, name: str) -> str:
    """Start a worker from the terminal, with the rule it needs; returns the sandbox's id."""
    project, agent = name.split("/")
    kind, host, port = AGENTS[name]
    where = ("--project", project) if agent == "dev" else ("--agent", name)
    assert "added" in await ok(machine, "allow", f"{kind}://{host}:{port}", *where)
    others = [":".join(target) for other, target in AGENTS.items() if other != name]
    made = await ok(
        machine, "sandbox", "run", "-d", "--project", project, "--agent", agent, "--workdir", str(machine.workdir),
        "--", "/usr/bin/python3", "-c", WORKER, name.replace("/", "-"), kind, host, port, *others,
    )  # fmt: skip
    return made.strip()


async def test_three_projects_through_kills_of_the_server(machine: Machine) -> None:
    """Nothing allowed breaks and nothing else opens; after every kill the terminal has every verb again."""
    ids: dict[str, str] = {}
    for turn in range(KILLS + 1):
        async with serving(machine) as served:
            if not turn:
                for name in AGENTS:
                    ids[name] = await begin(machine, name)
                async with asyncio.timeout(30):
                    while not all((machine.workdir / f"{name.replace('/', '-')}.up").exists() for name in AGENTS):
                        await asyncio.sleep(0.05)
            await use_every_verb(machine, ids)
            if turn < KILLS:
                await served.stop(signal.SIGKILL)
                continue
            await end(machine, served, ids)


async def use_every_verb(machine: Machine, ids: dict[str, str]) -> None:
    """What somebody does at the second terminal while the sandboxes work."""
    sessions = json.loads(await ok(machine, "--json", "agents"))["sessions"]
    assert {f"{one['project']}/{one['agent']}": one["container_id"] for one in sessions} == ids
    assert all(one["enrolled"] for one in sessions) and len({one["policy"] for one in sessions}) == 3
    await until_said(machine, ("check", "tcp://db.example.com:5432", "--agent", "bank/ops"), code=0)
    await until_said(machine, ("check", "tcp://db.example.com:5432", "--agent", "lab/dev"), code=1)
    assert "db.example.com" in await ok(machine, "rules", "effective", "bank/ops")
    # A passing permission, given and taken back, beside what flows.
    granted = await ok(machine, "--json", "allow", "https://git.example.org", "--agent", "bank/ops", "--for", "20m")
    assert "deleted" in await ok(machine, "rules", "delete", json.loads(granted)["rule"]["id"])
    assert "added" in await ok(machine, "firewall", "add", "everybody.example.com")
    assert "removed" in await ok(machine, "firewall", "remove", "everybody.example.com")
    assert "ready" in await ok(machine, "status")
    denied = await ok(machine, "flows", "--verdict", "denied", "--agent", "bank/ops", "--last", "5")
    event = denied.splitlines()[-1].split()[-1]
    assert "denied" in await ok(machine, "why", event)


async def end(machine: Machine, served: Served, ids: dict[str, str]) -> None:
    """The workers are told to stop, and each says from the terminal how it went."""
    (machine.workdir / "stop").touch()
    for name, sandbox in ids.items():
        done = await ctl(machine, "sandbox", "attach", sandbox)
        said = f"{name.replace('/', '-')} asked True opened [] fresh True"
        assert (said in done.out, done.code) == (True, len(name)), done.out + done.err
        assert "is removed" in await ok(machine, "sandbox", "remove", sandbox)
    for scope in ("project:shop", "project:lab", "agent:bank/ops"):
        assert "deleted" in await ok(machine, "rules", "delete", "--scope", scope)
    assert "off" in await ok(machine, "firewall", "down")
    assert await served.stop() == 0
