"""
What is wrong with the host, its files or its settings is said in one line, and what runs goes on.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from clawker_cp.testing.machine import Machine
from clawker_cp.testing.served import serving

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

GONE = "for i in $(seq 200); do ip link show clawker0 >/dev/null 2>&1 || exit 0; sleep 0.1; done; exit 1"
NOTHING = (
    "! ip -o link show type bridge | grep clawker && ! ls /sys/fs/bpf/clawker 2>/dev/null"
    " && ! ip netns list | grep . && ! nft list tables | grep clawker"
)
HOLD_PORT = """
import socket, sys
kind, address, port = sys.argv[1:]
held = socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
held.bind((address, int(port)))
if kind == "tcp": held.listen()
print("held", flush=True)
sys.stdin.read()
"""


async def no_server(machine: Machine) -> None:
    """Wait until the server of an earlier run is gone: a run joins one that lives, whatever its own settings."""
    assert (await machine.host.run(["sh", "-c", GONE], timeout_s=40)).code == 0


async def run(machine: Machine, *options: str, **settings: str) -> tuple[int, str]:
    """Run `true`; the exit code and what was said."""
    environment = {**machine.environment, **{f"CLAWKER_CP_{name}": value for name, value in settings.items()}}
    argv = [sys.executable, "-m", "clawker_cp", "run", "--workdir", str(machine.workdir), *options, "--", "true"]
    done = await machine.host.run(argv, env=environment, timeout_s=60)
    return done.code, done.err


async def refused(machine: Machine, *says: str, options: tuple[str, ...] = (), **settings: str) -> None:
    """Assert that a run is refused with one line, and a hint at most, that says all of that; nothing is left."""
    await no_server(machine)
    code, err = await run(machine, *options, **settings)
    lines = err.splitlines()

    assert code == 125, err
    assert lines[0].startswith("clawker-cp: "), err
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("  hint: ")), err
    assert all(word in err for word in says), err
    await no_server(machine)
    assert (await machine.host.run(["sh", "-c", NOTHING])).code == 0


@asynccontextmanager
async def settings_file(machine: Machine, text: str) -> AsyncIterator[Path]:
    path = machine.host.directory / "config" / "control-plane.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    try:
        yield path
    finally:
        path.unlink()


@asynccontextmanager
async def held_port(machine: Machine, kind: str, address: str, port: int) -> AsyncIterator[None]:
    pipe = asyncio.subprocess.PIPE
    process = await machine.host.start(
        ["python3", "-c", HOLD_PORT, kind, address, str(port)], stdin=pipe, stdout=pipe, env=machine.environment
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"held\n"
        yield
    finally:
        process.kill()
        await process.wait()


async def shell(machine: Machine, script: str) -> str:
    done = await machine.host.run(["sh", "-c", script], env=machine.environment)
    assert done.code == 0, done.err
    return done.out


async def test_settings_with_several_faults_are_refused_with_all_of_them(machine: Machine) -> None:
    """Unknown keys, wrong types and values out of range are named together, each with its key."""
    text = "firewal: {}\ndns: {budgt: 3, proxy_view_port: many}\nhost: {subnet: nowhere}\n"
    async with settings_file(machine, text) as path:
        await refused(machine, str(path), "did you mean firewall", "dns.budgt", "dns.proxy_view_port", "host.subnet")


@pytest.mark.parametrize(
    ("text", "says"), [("dns: [", "is not YAML"), ("- a", "is not a mapping"), ("a: \x00", "YAML")]
)
async def test_settings_that_are_no_settings_are_refused(machine: Machine, text: str, says: str) -> None:
    """Neither broken YAML nor another shape is taken for the defaults; the file is named."""
    async with settings_file(machine, text) as path:
        await refused(machine, str(path), says)


async def test_a_settings_file_that_cannot_be_read_is_named(machine: Machine) -> None:
    """A directory in its place ends the start."""
    path = machine.host.directory / "config" / "control-plane.yaml"
    path.mkdir(parents=True)
    try:
        await refused(machine, str(path), "cannot be read")
    finally:
        path.rmdir()


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("open.yaml", b"rules: [", ("open.yaml", "line 1")),
        ("shape.yaml", b"- dst: a.com\n", ("shape.yaml", "mapping")),
        ("binary.yaml", b"\xff\xfe\x00", ("binary.yaml", "UTF-8")),
        (
            "wrong.yaml",
            b"rules:\n- {dst: a.com, porto: 1}\n- {dst: b..com, port: 70000}\n- {dst: c.com, action: maybe}\n",
            ("porto is not a field", "empty label", "70000", '"maybe"'),
        ),
        (
            "clash.yaml",
            b"rules:\n- {dst: a.com, proto: tcp, port: '443'}\n- {dst: a.com}\n",
            ("a.com:tcp:443", "a.com:https:443"),
        ),
    ],
)  # fmt: skip
async def test_rules_that_cannot_be_used_are_refused(
    machine: Machine, name: str, data: bytes, says: tuple[str, ...]
) -> None:
    """Broken, mistyped and conflicting rules are refused before anything starts, with every fault."""
    (machine.workdir / name).write_bytes(data)

    await refused(machine, *says, options=("--rules", str(machine.workdir / name)))


async def test_what_the_proxy_needs_is_looked_at_before_it_starts(machine: Machine) -> None:
    """A binary that is not there or is no Envoy, and a bundle without certificates, are named with their setting."""
    empty = machine.workdir / "empty.pem"
    empty.write_text("")

    await refused(machine, "envoy.binary", "/nonexistent", ENVOY__BINARY="/nonexistent")
    await refused(machine, "Envoy ended at start", "envoy.log", ENVOY__BINARY="/bin/false")
    await refused(machine, "envoy.trusted_ca", "/nonexistent.pem", ENVOY__TRUSTED_CA="/nonexistent.pem")
    await refused(machine, "envoy.trusted_ca", "no certificate", ENVOY__TRUSTED_CA=str(empty))


async def test_a_bridge_of_somebody_else_is_left_alone(machine: Machine) -> None:
    """A link with our bridge's name that is not ours ends the start and stays."""
    await no_server(machine)
    await shell(machine, "ip link add clawker0 type veth peer name other0")
    try:
        code, err = await run(machine)
        kept = await shell(machine, "ip -d link show clawker0")
    finally:
        await shell(machine, "ip link del clawker0")

    assert (code, len(err.splitlines())) == (125, 2)
    assert "host.bridge: clawker0 exists and is not ours" in err
    assert "veth" in kept


@pytest.mark.parametrize(
    ("kind", "address", "port", "says"),
    [
        ("udp", "0.0.0.0", 53, "port 53"),
        ("tcp", "127.0.0.1", 9953, "dns.proxy_view_port"),
        ("tcp", "127.0.0.1", 7080, "7080"),
        ("tcp", "127.0.0.1", 7443, "7443"),
    ],
)
async def test_a_busy_port_is_named(machine: Machine, kind: str, address: str, port: int, says: str) -> None:
    """A port that another program has ends the start with that port; nothing is left enforced."""
    async with held_port(machine, kind, address, port):
        await refused(machine, says)


async def test_a_busy_port_of_the_proxy_is_passed_over(machine: Machine) -> None:
    """Ports that are given out are free ones: another program on one of them changes nothing."""
    await no_server(machine)
    # The first numbers of the bands, and the egress listener of the first policy (contract 1.1).
    async with held_port(machine, "tcp", "0.0.0.0", 10001), held_port(machine, "tcp", "0.0.0.0", 12000):
        done = await machine.run(
            "--allow", "tcp://db.example.com:5432",
            command=["bash", "-c", "exec 3<>/dev/tcp/db.example.com/5432; echo hello >&3; head -n 1 <&3"],
        )  # fmt: skip

    assert done.out == "hello\n", done.err


async def test_state_of_another_layout_is_not_adopted(machine: Machine) -> None:
    """Pins that say another ABI end the start while they enforce; when they are removed the next start is whole."""
    script = """
import sys
from pathlib import Path
from clawker_cp._fast import bpfmap, layout
size = layout.SIZES["control"]
control = bpfmap.BpfMap.pinned("/sys/fs/bpf/clawker/control", *size)
row = bytearray(control.items()[0][1])
row[0:4] = (4711).to_bytes(4, "little")
control.put(control.items()[0][0], bytes(row))
control.close()
"""
    async with serving(machine) as served:
        await served.stop(signal.SIGKILL)
    changed = await machine.host.run([sys.executable, "-c", script], env=machine.environment)
    code, err = await run(machine)
    links = await shell(machine, "ls /sys/fs/bpf/clawker/links | wc -l")
    await shell(machine, "rm -r /sys/fs/bpf/clawker")
    again = await run(machine)

    assert changed.code == 0, changed.err
    assert code == 125 and "layout 4711" in err, err
    assert int(links) > 0
    assert again[0] == 0, again[1]


async def test_dead_forwarders_fail_at_once_and_are_recorded(machine: Machine) -> None:
    """With every upstream silent a name fails within seconds and with a reason, and answers again when they do."""
    code = """
import socket, time
def ask():
    began = time.monotonic()
    try: socket.gethostbyname("api.example.com"); return "known"
    except OSError: return "unknown " + ("soon" if time.monotonic() - began < 15 else "late")
print(ask(), flush=True)
open("asked", "w").close()
import os
while not os.path.exists("alive"): time.sleep(0.01)
print(ask(), flush=True)
"""
    for name in ("asked", "alive"):
        (machine.workdir / name).unlink(missing_ok=True)
    await machine.world.behave("*", "dead")
    try:
        run = asyncio.create_task(machine.python(code, "--allow", "https://api.example.com"))
        async with asyncio.timeout(60):
            while not (machine.workdir / "asked").exists():
                assert not run.done(), (await run).err
                await asyncio.sleep(0.02)
    finally:
        await machine.world.reset()
    (machine.workdir / "alive").touch()
    done = await run

    assert done.out.splitlines() == ["unknown soon", "known"], done.err
    assert done.denied(layer="LAYER_DNS", host="api.example.com"), done.flows


@pytest.mark.parametrize("size", ["4k", "60k", "300k"])
@pytest.mark.parametrize("which", ["data", "state"])
async def test_a_full_disk_refuses_the_run_and_leaves_nothing(machine: Machine, which: str, size: str) -> None:
    """However far a start gets on a disk that is too small, it ends with one line that names the file, or works."""
    await no_server(machine)
    await shell(
        machine,
        f"mkdir -p $CLAWKER_{which.upper()}_DIR && mount -t tmpfs -o size={size} t $CLAWKER_{which.upper()}_DIR",
    )
    try:
        code, err = await run(machine, "--allow", "https://api.example.com")
        await no_server(machine)
        left = await machine.host.run(["sh", "-c", NOTHING])
    finally:
        await shell(machine, f"umount -l $CLAWKER_{which.upper()}_DIR")

    assert code in {0, 125}, err
    if code:
        assert len(err.splitlines()) <= 2 and err.startswith("clawker-cp: "), err
        assert str(machine.host.directory / which) in err
        assert "disk" in err or "space" in err, err
    assert code == 125 or size != "4k"
    assert left.code == 0, left.out


async def test_a_disk_that_fills_up_changes_nothing_that_runs(machine: Machine) -> None:
    """With the disk full, changes and new sandboxes are refused with the reason, connections go on; then all works."""
    await no_server(machine)
    hold = """
import socket, time
tcp = socket.create_connection(("db.example.com", 5432), 5)
tcp.settimeout(5)
print("held", flush=True)
while True:
    tcp.sendall(b"ping\\n")
    print("alive" if tcp.recv(100) else "closed", flush=True)
    time.sleep(0.05)
"""
    await shell(machine, "mkdir -p $CLAWKER_DATA_DIR && mount -t tmpfs -o size=4m t $CLAWKER_DATA_DIR")
    try:
        async with serving(machine) as served:
            said = await served.call(f"""
                def put(name):
                    egress = A.EgressRule(dst=name, proto="tcp", port="5432")
                    rules = [C.Rule(scope="agent:full/one", egress=egress)]
                    return client.call("PutRules", C.PutRulesRequest(rules=rules))
                await put("db.example.com")
                made = await client.call("CreateSandbox", C.CreateSandboxRequest(
                    project="full", agent="one", argv=["/usr/bin/python3", "-c", {hold!r}], workdir=WORK))
                async def requests():
                    yield C.AttachSandboxRequest(id=made.sandbox.id)
                    await asyncio.Event().wait()
                stream = client.stream("AttachSandbox", requests())
                async def alive():
                    text = b""
                    while text.count(b"alive") < 5:
                        text += (await anext(stream)).output
                    return b"closed" not in text
                result["before"] = await alive()
                fill = Path(os.environ["CLAWKER_DATA_DIR"]) / "fill"
                with fill.open("wb", 0) as file:
                    try:
                        while True: file.write(bytes(1 << 12))
                    except OSError: pass
                result["put"] = await refused(put("git.example.org"))
                result["create"] = await refused(client.call("CreateSandbox", C.CreateSandboxRequest(
                    project="full", agent="two", argv=["true"], workdir=WORK)))
                listed = (await client.call("ListRules", C.ListRulesRequest(scope="agent:full/one"))).rules
                result["rules"] = [one.egress.dst for one in listed]
                result["during"] = await alive()
                fill.unlink()
                result["again"] = await refused(put("git.example.org"))
                result["after"] = await alive()
            """)
            assert await served.stop() == 0
    finally:
        await shell(machine, "umount -l $CLAWKER_DATA_DIR")

    assert said["before"] and said["during"] and said["after"]
    assert said["put"] is not None and "space" in json.dumps(said["put"]), said
    assert said["rules"] == ["db.example.com"]
    assert said["again"] is None
