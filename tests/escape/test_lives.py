"""
Techniques that need something to happen around the agent: time, other agents, operators, the server's death.

Each is tried from inside a real sandbox, as an ordinary user and as root; what must not arrive is looked for
outside.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from clawker_cp.engines.host.cgroups import find_cgroup2
from clawker_cp.testing.escapes import DATABASE, EVIL, GOING_ON, START
from clawker_cp.testing.machine import Machine, machine_with_world
from clawker_cp.testing.served import Served, serving

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

BOTH = pytest.mark.parametrize("root", ["False", "True"], ids=["user", "root"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine() -> AsyncIterator[Machine]:
    async with machine_with_world() as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(machine: Machine) -> AsyncIterator[Served]:
    async with serving(machine) as served:
        yield served


@BOTH
async def test_a_socket_of_a_bypass_is_cut_at_its_end(served: Served, root: str) -> None:
    """Row 9: what was opened during a bypass sends nothing after it, TCP and UDP, and the refusals are recorded."""
    said = await served.call(
        START
        + f"""
sandbox, stream = await start("byp", {GOING_ON!r}, allow_root={root})
lines = Lines(stream)
await lines.until("stopped")
await client.call("FirewallBypass", A.FirewallBypassRequest(container_id=sandbox.id, timeout_seconds=2))
await lines.until("sent")
await lines.until("stopped")
for _ in range(5):
    result.setdefault("after", []).append(await lines.next())
result["reasons"] = sorted({{flow["reason"] for flow in await flows(sandbox) if flow["verdict"].endswith("DENIED")}})
result["bypassed"] = any(flow["reason"] == "bypass" for flow in await flows(sandbox))
await remove(sandbox)
"""
    )
    assert said["bypassed"] and set(said["after"]) == {"stopped"}
    assert "no_route" in said["reasons"]


@BOTH
async def test_a_nested_cgroup_is_still_the_agent(served: Served, root: str) -> None:
    """Row 6: a process moved into a child of its agent's cgroup is judged as that agent."""
    await served.machine.world.reset()
    code = f"""
import socket, sys
print("ready")
sys.stdin.readline()
try:
    socket.create_connection(("{EVIL}", 443), 2)
    print("out")
except OSError as error:
    print("refused", error.errno)
"""
    said = await served.call(
        START
        + f"""
sandbox, stream = await start("nested", {code!r}, allow_root={root})
await Lines(stream).until("ready")
parent = Path({str(find_cgroup2())!r})
cgroup = next(one for one in parent.rglob("clawker-" + sandbox.id[:12]) if one.is_dir())
inner = cgroup / "inner"
inner.mkdir()
pids = (cgroup / "cgroup.procs").read_text().split()
for pid in pids:
    (inner / "cgroup.procs").write_text(pid)
result["moved"] = len((inner / "cgroup.procs").read_text().split())
await stream.aclose()

async def requests():
    yield C.AttachSandboxRequest(id=sandbox.id)
    yield C.AttachSandboxRequest(stdin=b"go\\n")
    await asyncio.Event().wait()

lines = Lines(client.stream("AttachSandbox", requests()))
result["said"] = await lines.next()
until = time.monotonic() + 5
while not result.get("denied") and time.monotonic() < until:
    result["denied"] = [f["reason"] for f in await flows(sandbox) if f.get("port") == 443]
"""
    )
    assert said["moved"] >= 1 and said["said"].startswith("refused") and "no_route" in said["denied"]
    assert await served.machine.world.packets(dst=EVIL) == []


@BOTH
async def test_nobody_comes_in_uninvited(served: Served, root: str) -> None:
    """Row 14: a listener in the sandbox is not reached from the host; a published port is, and pulls its data."""
    code = """
import socket, threading
def serve(port):
    listener = socket.create_server(("0.0.0.0", port))
    while True:
        one, _ = listener.accept()
        one.sendall(b"data")
        one.close()
for port in (8001, 8002):
    threading.Thread(target=serve, args=(port,), daemon=True).start()
print("listening")
import time; time.sleep(600)
"""
    said = await served.call(
        START
        + f"""
import socket
sandbox, stream = await start("inb", {code!r}, allow_root={root}, publish=[C.Publish(port=8002)])
await Lines(stream).until("listening")

def pull(address, port):
    try:
        with socket.create_connection((address, port), 1) as one:
            one.settimeout(1)
            return one.recv(10).decode()
    except OSError:
        return "refused"

result["uninvited"] = await asyncio.to_thread(pull, sandbox.address, 8001)
published = (await client.call("ListSandboxes", C.ListSandboxesRequest())).sandboxes[0].publish[0].host_port
result["published"] = await asyncio.to_thread(pull, "127.0.0.1", published)
until = time.monotonic() + 5
while not result.get("denied") and time.monotonic() < until:
    result["denied"] = [f["reason"] for f in await flows(sandbox) if f["reason"] == "inbound"]
await remove(sandbox)
"""
    )
    assert said["uninvited"] == "refused" and said["published"] == "data" and said["denied"]


@BOTH
async def test_an_agent_that_loses_its_row_loses_its_connections(served: Served, root: str) -> None:
    """Row 8: packets of sockets that no enrolled agent owns are dropped; enrolled again, it is judged again."""
    code = f"""
import socket, time
tcp = socket.create_connection(("{DATABASE}", 5432), 2)
tcp.settimeout(1)
while True:
    try:
        tcp.send(b"ping\\n")
        print("alive" if tcp.recv(100) else "closed")
    except OSError:
        print("dead")
    time.sleep(0.05)
"""
    said = await served.call(
        START
        + f"""
rule = C.Rule(scope="agent:esc/row", egress=A.EgressRule(dst="{DATABASE}", proto="tcp", port="5432"))
await client.call("PutRules", C.PutRulesRequest(rules=[rule]))
sandbox, stream = await start("row", {code!r}, allow_root={root})
lines = Lines(stream)
await lines.until("alive")
import subprocess
status = json.loads(subprocess.run([sys.executable, "-m", "clawker_cp.cli.ebpf_manager", "dump-containers", "--json"],
                                   capture_output=True, check=True).stdout)
cgroup = str(status[0]["cgroup_id"])
manager = [sys.executable, "-m", "clawker_cp.cli.ebpf_manager"]
subprocess.run([*manager, "disable", cgroup], capture_output=True, check=True)
result["without"] = await lines.until("dead", "closed")
await client.call("FirewallEnable", A.FirewallEnableRequest(container_id=sandbox.id))
result["enrolled"] = (await client.call("ListSessions", C.ListSessionsRequest())).sessions[0].enrolled
await remove(sandbox)
await client.call("DeleteRules", C.DeleteRulesRequest(scope="agent:esc/row"))
"""
    )
    assert said["without"] in {"dead", "closed"} and said["enrolled"] is True


@BOTH
async def test_names_are_no_channel_below_an_allowed_wildcard(served: Served, root: str) -> None:
    """Row 22: many and long labels and TXT questions below an allowed zone run into the budget, which is recorded."""
    code = """
import socket, struct
from pathlib import Path
words = Path("/etc/resolv.conf").read_text().split()
server = words[words.index("nameserver") + 1]
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(3)
answers = {}
for number in range(700):
    labels = [f"{number:04x}" + "a" * 50, "wild", "example", "net"]
    name = b"".join(bytes([len(l)]) + l.encode() for l in labels) + b"\\0"
    kind = 16 if number % 7 == 0 else 1
    sock.sendto(struct.pack(">HHHHHH", number, 256, 1, 0, 0, 0) + name + struct.pack(">HH", kind, 1), (server, 53))
    try:
        code = sock.recv(2048)[3] & 15
    except TimeoutError:
        code = -1
    answers[code] = answers.get(code, 0) + 1
import json
print(json.dumps(answers))
"""
    agent = "tunu" if root == "False" else "tunr"
    said = await served.call(
        START
        + f"""
rule = C.Rule(scope="agent:esc/{agent}", egress=A.EgressRule(dst=".wild.example.net"))
await client.call("PutRules", C.PutRulesRequest(rules=[rule]))
sandbox, stream = await start("{agent}", {code!r}, allow_root={root})
result["answers"] = json.loads(await Lines(stream).next())
result["denied"] = sum(f["reason"] == "budget" for f in await flows(sandbox, layers=[C.LAYER_DNS]))
await client.call("DeleteRules", C.DeleteRulesRequest(scope="agent:esc/{agent}"))
""",
        timeout_s=120,
    )
    assert said["denied"] >= 100, said
    asked = [q for q in await served.machine.world.queries() if str(q.get("name", "")).endswith("wild.example.net.")]
    assert len(asked) <= 1200, "two agents of 500 names each, and a few"


@BOTH
async def test_a_flood_hides_nothing(served: Served, root: str) -> None:
    """Row 26: after 20,000 refusals the counters are exact and a refusal of another kind is still recorded."""
    code = f"""
import socket, time
for number in range(20000):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try: sock.sendto(b"x", ("{EVIL}", 9))
    except OSError: pass
    sock.close()
time.sleep(1.2)
try: socket.create_connection(("{EVIL}", 25), 1)
except OSError: pass
print("done")
import sys; sys.stdin.read()
"""
    said = await served.call(
        START
        + f"""
import subprocess
sandbox, stream = await start("flood", {code!r}, allow_root={root})
await Lines(stream).until("done")
manager = [sys.executable, "-m", "clawker_cp.cli.ebpf_manager"]
rows = json.loads(subprocess.run([*manager, "dump-metrics", "--json"], capture_output=True, check=True).stdout)
agents = json.loads(subprocess.run([*manager, "dump-containers", "--json"], capture_output=True, check=True).stdout)
own = [r for r in rows if r["cgroup_id"] == agents[0]["cgroup_id"]]
result["counted"] = sum(r["count"] for r in own if r["verdict"] == "denied")
result["hidden"] = [f["port"] for f in await flows(sandbox) if f.get("port") == 25]
errors = subprocess.run([*manager, "dump-errors", "--json"], capture_output=True, check=True).stdout
result["errors"] = json.loads(errors)
written = Path(os.environ["CLAWKER_STATE_DIR"]) / "logs" / "flows.jsonl"
accounted, until = 0, time.monotonic() + 20
while accounted < 20001 and time.monotonic() < until:
    records = [json.loads(line) for line in written.read_text().splitlines() if sandbox.id in line]
    accounted = sum(1 + r.get("lost_before", 0) for r in records if r["layer"] == "LAYER_KERNEL")
result["accounted"] = accounted
await remove(sandbox)
""",
        timeout_s=120,
    )
    assert said["counted"] >= 20_001 and said["hidden"] == [25]
    assert said["errors"] == [] and said["accounted"] >= 20_001, said


@BOTH
async def test_shared_addresses_do_not_lend_names(served: Served, root: str) -> None:
    """Row 23: two agents with one address between their names; neither reaches the other's name through it."""
    code = """
import subprocess, sys
def page(url, *more):
    return subprocess.run(["curl", "-sS", "-m", "4", *more, url], capture_output=True, text=True).stdout
mine, theirs = sys.argv[1], sys.argv[2]
print("mine", mine in page(f"https://{mine}/echo"))
print("theirs", theirs in page(f"https://{theirs}/echo", "--resolve", f"{theirs}:443:198.51.100.14"))
print("lied", '"sni"' in page(f"https://{mine}/echo", "-H", f"Host: {theirs}"))
"""
    said = await served.call(
        START
        + f"""
names = ["one.shared.example.com", "two.shared.example.com"]
for agent, name in zip(("a", "b"), names):
    rule = C.Rule(scope="agent:esc/" + agent, egress=A.EgressRule(dst=name))
    await client.call("PutRules", C.PutRulesRequest(rules=[rule]))
for agent, mine, theirs in (("a", *names), ("b", *reversed(names))):
    code = "import sys; sys.argv[1:] = " + repr([mine, theirs]) + "\\n" + {code!r}
    sandbox, stream = await start(agent, code, allow_root={root})
    lines = Lines(stream)
    result[agent] = [await lines.next() for _ in range(3)]
    await remove(sandbox)
for agent in "ab":
    await client.call("DeleteRules", C.DeleteRulesRequest(scope="agent:esc/" + agent))
"""
    )
    assert said["a"] == said["b"] == ["mine True", "theirs False", "lied False"], said
