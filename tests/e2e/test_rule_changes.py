"""
Rules that change under running agents: what stays allowed survives, what is removed is cut (I6).

The global rules file is edited and the server told with SIGHUP, as an operator would.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from clawker_cp.testing.escapes import START
from clawker_cp.testing.machine import Machine, Outcome, outcome
from clawker_cp.testing.served import serving

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

CHANGES = 100
BYTES = int(os.environ.get("CLAWKER_TEST_BYTES", str(1 << 30)))
PIPE = asyncio.subprocess.PIPE

# One connection per rule, each asked again and again; says which one breaks, how, and after how long
# without an answer. `https:` connections carry requests: the proxy alone would only refuse the next one.
HOLD = """
import errno, os, socket, ssl, sys, time
held = {}
for target in sys.argv[1:]:
    kind, host, port = target.split(":")
    s = socket.create_connection((host, int(port)), 5)
    if kind == "https":
        s = ssl.create_default_context().wrap_socket(s, server_hostname=host)
    s.settimeout(5)
    held[target] = s
open("held", "w").close()

def ask(target, s):
    kind, host, port = target.split(":")
    if kind == "tcp":
        s.sendall(b"ping\\n")
        if not s.recv(64): raise ConnectionResetError(errno.ECONNRESET, "closed")
        return
    s.sendall(f"GET /echo HTTP/1.1\\r\\nHost: {host}\\r\\n\\r\\n".encode())
    answer = b""
    while b"}" not in answer:
        got = s.recv(65536)
        if not got: raise ConnectionResetError(errno.ECONNRESET, "closed")
        answer += got

while not os.path.exists("stop"):
    for target, s in list(held.items()):
        began = time.monotonic()
        try:
            ask(target, s)
        except OSError as error:
            del held[target]
            at_once = time.monotonic() - began < 1
            print("BROKEN", target, "at once" if at_once else "hanging", flush=True)
    time.sleep(0.02)
print("KEPT", *sorted(held), flush=True)
"""

WEBSOCKET = """
import base64, os, socket, ssl
raw = socket.create_connection(("www.example.com", 9443), 5)
s = ssl.create_default_context().wrap_socket(raw, server_hostname="www.example.com")
key = base64.b64encode(b"0123456789abcdef").decode()
s.sendall(("GET /ws HTTP/1.1\\r\\nHost: www.example.com:9443\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\n"
           f"Sec-WebSocket-Version: 13\\r\\nSec-WebSocket-Key: {key}\\r\\n\\r\\n").encode())
answer = b""
while b"\\r\\n\\r\\n" not in answer: answer += s.recv(4096)
print("UPGRADED", b" 101 " in answer[:20], flush=True)
open("held", "w").close()
count = 0
while not os.path.exists("stop"):
    s.sendall(b"\\x81\\x84\\0\\0\\0\\0ping")
    frame = b""
    while len(frame) < 6:
        got = s.recv(6 - len(frame))
        if not got: raise SystemExit("the websocket broke")
        frame += got
    assert frame[2:] == b"ping", frame
    count += 1
print("FRAMES", count > 10, flush=True)
"""


# One TLS connection, asked again and again; says how each went.
ASKING = """
import socket, ssl, time
s = ssl.create_default_context().wrap_socket(
    socket.create_connection(("api.example.com", 443), 5), server_hostname="api.example.com")
s.settimeout(3)
while True:
    try:
        s.sendall(b"GET /echo HTTP/1.1\\r\\nHost: api.example.com\\r\\n\\r\\n")
        answer = b""
        while b"}" not in answer:
            got = s.recv(65536)
            if not got: raise OSError("closed")
            answer += got
        print("answered")
    except OSError as error:
        print("broken", error)
        time.sleep(1)
    time.sleep(0.05)
"""


class Rules:
    """The machine's global rules file, and the server that reads it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.path = machine.host.directory / "data" / "firewall" / "egress-rules.yaml"
        self.log = machine.host.directory / "state" / "logs" / "clawker-controlplane.log"

    def _reloads(self) -> int:
        return self.log.read_text().count("policy_reloaded") if self.log.exists() else 0

    async def apply(self, rules: list[dict[str, str]]) -> None:
        """Replace the global rules and wait until they are in force."""
        before = self._reloads()
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps({"rules": rules}))  # JSON is YAML
        temporary.replace(self.path)
        await self.machine.host.run(["sh", "-c", "kill -HUP $(cat /run/clawker/cp.pid)"])
        await until(lambda: self._reloads() > before, "the reload")


async def until(condition: Callable[[], bool], what: str, limit_s: float = 30) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


@asynccontextmanager
async def running(
    machine: Machine, *options: str, command: list[str]
) -> AsyncIterator[Callable[[], Awaitable[Outcome]]]:
    """A run beside the test; yields what awaits its end after letting it stop."""
    for name in ("held", "stop"):
        (machine.workdir / name).unlink(missing_ok=True)
    argv = machine.argv(*options, command=command)
    process = await machine.host.start(argv, env=machine.environment, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    held = machine.workdir / "held"

    async def finish() -> Outcome:
        (machine.workdir / "stop").touch()
        async with asyncio.timeout(120):
            out, err = await process.communicate()
        return outcome(process.returncode or 0, out.decode(), err.decode())

    try:
        await until(lambda: held.exists() or process.returncode is not None, "the command")
        yield finish
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def noise(number: int) -> list[dict[str, str]]:
    """Rules that have nothing to do with what is held: another set each time, of every kind."""
    return [
        {"dst": f"n{number}.example.org"},
        {"dst": f"t{number % 3}.example.org", "proto": "tcp", "port": str(6000 + number % 5)},
        {"dst": f".w{number % 2}.example.org", "tls": "passthrough"},
    ]


async def test_a_websocket_survives_a_hundred_rule_changes(machine: Machine) -> None:
    """Frames keep coming back over one connection while a hundred other rules come and go."""
    rules = Rules(machine)
    async with running(
        machine, "--allow", "wss://www.example.com:9443", command=["/usr/bin/python3", "-c", WEBSOCKET]
    ) as finish:
        for number in range(CHANGES):
            await rules.apply(noise(number))
        done = await finish()

    assert "UPGRADED True" in done.out, done.err[-1500:]
    assert "FRAMES True" in done.out, done.err[-1500:]
    assert done.code == 0


async def test_a_large_download_survives_rule_changes_next_to_it(machine: Machine) -> None:
    """Every byte of a 1 GiB download arrives while other rules change a hundred times between its hundredths."""
    rules = Rules(machine)
    command = [
        "sh", "-c",
        ": > held; curl -sS https://big.example.com/big/$0 | { for change in $(seq $1); do head -c $2; "
        "while [ ! -e changed-$change ]; do sleep 0.01; done; done; cat; } | wc -c",
        str(BYTES), str(CHANGES), str(BYTES // CHANGES),
    ]  # fmt: skip
    async with running(machine, "--allow", "https://big.example.com", command=command) as finish:
        for number in range(CHANGES):
            await rules.apply(noise(number))
            (machine.workdir / f"changed-{number + 1}").touch()
        done = await finish()

    assert done.out.split() == [str(BYTES)], done.err[-1500:]


async def test_a_removed_rule_cuts_exactly_its_own_connections(machine: Machine) -> None:
    """Removing a TCP, a CIDR and an https rule breaks its own connection at once and leaves the others'."""
    rules = Rules(machine)
    database = {"dst": "db.example.com", "proto": "tcp", "port": "5432"}
    www = {"dst": "www.example.com"}
    going = [
        ("tcp:git.example.org:2222", {"dst": "git.example.org", "proto": "tcp", "port": "2222"}),
        ("tcp:198.51.100.10:6379", {"dst": "198.51.100.0/24", "proto": "tcp", "port": "6379"}),
        ("https:api.example.com:443", {"dst": "api.example.com"}),
    ]
    left = [rule for _, rule in going]
    rules.path.parent.mkdir(parents=True, exist_ok=True)
    rules.path.write_text(json.dumps({"rules": [database, www, *left]}))
    kept = ["https:www.example.com:443", "tcp:db.example.com:5432"]
    command = ["/usr/bin/python3", "-c", HOLD, *kept, *(target for target, _ in going)]
    async with running(machine, command=command) as finish:
        while left:
            left.pop(0)
            await rules.apply([database, www, *left])
            await asyncio.sleep(1)  # the contract's bound for a cut (6.1)
        done = await finish()

    assert done.out.splitlines() == [
        *(f"BROKEN {target} at once" for target, _ in going),
        "KEPT " + " ".join(kept),
    ], done.err[-1500:]


async def test_a_rules_file_nobody_can_read_changes_nothing(machine: Machine) -> None:
    """A broken file is refused, what runs goes on, a new run is refused, and a repair opens again."""
    rules = Rules(machine)
    rules.path.parent.mkdir(parents=True, exist_ok=True)
    rules.path.write_text('{"rules": []}')
    async with running(
        machine, "--allow", "tcp://db.example.com:5432",
        command=["/usr/bin/python3", "-c", HOLD, "tcp:db.example.com:5432"],
    ) as finish:  # fmt: skip
        rules.path.write_text("rules: [")
        await machine.host.run(["sh", "-c", "kill -HUP $(cat /run/clawker/cp.pid)"])
        refused = await machine.run("--agent", "second", command=["true"])
        await rules.apply([])
        allowed = await machine.run("--agent", "third", command=["true"])
        done = await finish()

    assert refused.code == 125
    assert "not readable" in refused.err
    assert allowed.code == 0, allowed.err
    assert done.out.splitlines() == ["KEPT tcp:db.example.com:5432"], done.err[-1500:]


async def test_an_agent_that_changes_policy_keeps_what_both_allow(machine: Machine) -> None:
    """A grant moves an agent to a policy of its own, its end does not cut either; a rule for the host does (R13)."""
    async with serving(machine) as served:
        said = await served.call(
            START
            + f"""
await client.call("PutRules", C.PutRulesRequest(rules=[C.Rule(egress=A.EgressRule(dst="api.example.com"))]))
sandbox, stream = await start("moves", {ASKING!r})
lines = Lines(stream)
async def answered(times):
    for _ in range(times):
        word = await lines.next()
        result["broken"] = result.get("broken", False) or word != "answered"
await lines.until("answered")
me = C.AgentRef(container_id=sandbox.id)
before = (await client.call("GetEffectiveRules", C.GetEffectiveRulesRequest(agent=me))).policy
grant = await client.call("Grant", C.GrantRequest(
    agent=me, egress=A.EgressRule(dst="www.example.com"), duration_seconds=600, reason="a test"))
moved = (await client.call("GetEffectiveRules", C.GetEffectiveRulesRequest(agent=me))).policy
result["moved"] = before != moved
await answered(10)
result["granted"] = result["broken"]
await client.call("DeleteRules", C.DeleteRulesRequest(ids=[grant.rule.id]))
await answered(10)
result["ended"] = result["broken"]
await client.call("PutRules", C.PutRulesRequest(rules=[C.Rule(
    scope="agent:esc/moves", egress=A.EgressRule(dst="api.example.com", path_rules=[A.PathRule(path="/echo")]))]))
until = time.monotonic() + 5
while time.monotonic() < until and await lines.next() == "answered":
    pass
result["cut_after_s"] = 5 - (until - time.monotonic())
await remove(sandbox)
""",
            timeout_s=90,
        )

    assert said["moved"] and said["granted"] is False and said["ended"] is False
    assert said["cut_after_s"] < 2
