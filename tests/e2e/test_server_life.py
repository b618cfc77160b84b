"""The life of a server: killed and started again, and starts that cannot be."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from clawker_cp.testing.machine import Machine
from clawker_cp.testing.served import Served, serving

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

TAKE_53 = """
import socket, time
taken = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
taken.bind(("0.0.0.0", 53))
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


def log_of(machine: Machine) -> str:
    path = machine.host.directory / "state" / "logs" / "clawker-controlplane.log"
    return path.read_text() if path.exists() else ""


def count(text: str, event: str) -> int:
    return len(re.findall(f'"event":"{event}"', text))


def stop_listening(pid: int, port: int) -> None:
    """Shut a listening socket of another process down, as a kernel that loses it would; nobody tells the process."""
    library = ctypes.CDLL(None, use_errno=True)
    wanted = f":{port:04X}"
    inodes = {
        fields[9]
        for table in ("tcp", "tcp6")
        for fields in (line.split() for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:])
        if fields[1].endswith(wanted) and fields[3] == "0A"
    }
    assert inodes
    pidfd = os.pidfd_open(pid)
    for link in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(link)
        if target.startswith("socket:[") and target[8:-1] in inodes:
            copy = library.syscall(438, pidfd, int(link.name), 0)  # pidfd_getfd
            assert copy >= 0, os.strerror(ctypes.get_errno())
            with socket.socket(fileno=copy) as sock:
                sock.shutdown(socket.SHUT_RDWR)
    os.close(pidfd)


@pytest.mark.parametrize("port", [7443, 7444, 7080, 4444])
async def test_losing_a_listener_drains(machine: Machine, port: int) -> None:
    """A listener whose socket no longer listens ends the server: one drain, exit code 1, the reason in the log."""
    before = log_of(machine)
    async with serving(machine) as served:
        stop_listening(served.process.pid, port)
        async with asyncio.timeout(30):
            assert await served.process.wait() == 1
    said = log_of(machine)[len(before) :]
    assert count(said, "cp_listener_lost") == 1 and "refuses connections" in said
    assert count(said, "drain_started") == count(said, "drain_done") == 1


WATCH = """
        made = await client.call("CreateSandbox", C.CreateSandboxRequest(
            project="shop", agent="stays", argv=["sleep", "600"], workdir=WORK))
        result["id"] = made.sandbox.id
        stream = client.stream("WatchEvents", C.WatchEventsRequest())
        following = asyncio.ensure_future(anext(stream))
        while not following.done():
            await client.call("FirewallAddRules", A.FirewallAddRulesRequest(rules=[A.EgressRule(dst="a.example.com")]))
            await client.call("FirewallRemoveRule", A.FirewallRemoveRuleRequest(all=True))
        Path("{mark}").touch()
        try:
            while True:
                await anext(stream)
        except RpcFailed as error:
            result["end"] = error.status
"""


async def test_a_signal_ends_calls_in_flight_and_a_second_one_the_drain(machine: Machine) -> None:
    """An open stream holds the drain up for seconds, not for ever; a second signal for nothing; nobody is let out."""
    mark = machine.host.directory / "watching"
    for signals, code in ((1, 0), (2, 1)):
        before = log_of(machine)
        async with serving(machine) as served:
            watcher = asyncio.ensure_future(served.call(WATCH.replace("{mark}", str(mark))))
            async with asyncio.timeout(30):
                while not mark.exists():
                    assert not watcher.done(), watcher.result()
                    await asyncio.sleep(0.02)
            mark.unlink()
            begun = time.monotonic()
            served.process.send_signal(signal.SIGTERM)
            if signals == 2:
                async with asyncio.timeout(10):
                    while count(log_of(machine)[len(before) :], "drain_started") == 0:
                        await asyncio.sleep(0.01)
                served.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(25):
                assert await served.process.wait() == code
            took = time.monotonic() - begun
            said = await watcher
            assert said["end"] in {"UNAVAILABLE", "CANCELLED"}
        logged = log_of(machine)[len(before) :]
        assert count(logged, "drain_started") == 1 and count(logged, "drain_done") == (signals == 1)
        assert took < (15 if signals == 1 else 4), took
        async with serving(machine) as served:
            kept = await served.call("""
                kept = (await client.call("ListSandboxes", C.ListSandboxesRequest())).sandboxes
                result["kept"] = [one.agent for one in kept]
                result["enrolled"] = [one.enrolled for one in
                                      (await client.call("ListSessions", C.ListSessionsRequest())).sessions]
                for one in kept:
                    await client.call("RemoveSandbox", C.RemoveSandboxRequest(id=one.id, force=True, grace_seconds=1))
            """)
            assert kept == {"kept": ["stays"], "enrolled": [True]}


async def test_a_start_that_fails_late_is_told_to_who_watches(machine: Machine) -> None:
    """With the gate's port taken every watcher hears why, one that came before as one that comes after; then exit 1."""
    blocker = await machine.host.start(
        ["python3", "-c", TAKE_53],
        env=machine.environment, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert blocker.stdout is not None
        await blocker.stdout.readline()
        made = [sys.executable, "-m", "clawker_cp.cli.ctl.main", "auth", "init"]
        assert (await machine.host.run(made, env=machine.environment, timeout_s=30)).code == 0
        watcher = asyncio.ensure_future(
            Served(machine, blocker).call("""
            from clawker_cp.errors import Unavailable

            async def watch(heard):
                stream = client.stream("WatchSOS", A.WatchSOSRequest())
                heard.append((await anext(stream)).message)
                await stream.aclose()

            heard = []
            while not heard:
                try:
                    await watch(heard)
                except (RpcFailed, Unavailable) as error:
                    assert error.code == "UNAVAILABLE", error
                    await asyncio.sleep(0.02)
            await watch(heard)
            result["heard"] = heard
        """)
        )
        async with asyncio.timeout(40):
            code, err = 1, ""
            while not watcher.done():  # until the watcher was there in time: the machine may be slow
                done = await machine.host.run(
                    [sys.executable, "-m", "clawker_cp", "serve"], env=machine.environment, timeout_s=40
                )
                code, err = done.code, done.err
            said = await watcher
        assert len(said["heard"]) == 2 and all("port 53" in text for text in said["heard"])
        assert code == 1 and "port 53" in err and "Traceback" not in err
    finally:
        blocker.kill()
        await blocker.wait()


SHOWN = "openssl s_client -connect 127.0.0.1:{port} -tls1_3 {pair} </dev/null 2>/dev/null | openssl x509 -noout -serial"


async def test_rotated_certificates_are_served_while_a_stream_goes_on(machine: Machine) -> None:
    """After `clawkerctl auth rotate` every listener shows the new leaf to who comes, and no open call notices."""
    auth = machine.host.directory / "data" / "auth"
    pair = f"-cert {auth}/cli/client.pem -key {auth}/cli/client.key"

    async def shown(port: int) -> str:
        done = await machine.host.run(["sh", "-c", SHOWN.format(port=port, pair=pair)], timeout_s=20)
        return done.out

    mark, stop = machine.host.directory / "follows", machine.host.directory / "rotated"
    async with serving(machine) as served:
        before = {port: await shown(port) for port in (7443, 4444, 4445)}
        watcher = asyncio.ensure_future(
            served.call(f"""
            stream = client.stream("WatchEvents", C.WatchEventsRequest(topics=["policy"]))

            async def one(name):
                following = asyncio.ensure_future(anext(stream))
                while not following.done():
                    rules = [A.EgressRule(dst=name)]
                    await client.call("FirewallAddRules", A.FirewallAddRulesRequest(rules=rules))
                    await client.call("FirewallRemoveRule", A.FirewallRemoveRuleRequest(all=True))
                return (await following).name

            result["before"] = await one("before.example.com")
            Path("{mark}").touch()
            while not Path("{stop}").exists():
                await asyncio.sleep(0.02)
            result["after"] = await one("after.example.com")  # the stream and the channel of before the rotation
            async with AsyncAdminClient(ClientIdentity(ROOT)) as other:  # a new leaf, a new handshake
                result["new"] = (await other.call("GetStatus", C.GetStatusRequest())).ready
        """)
        )
        async with asyncio.timeout(60):
            while not mark.exists():
                assert not watcher.done(), watcher.result()
                await asyncio.sleep(0.02)
            rotate = [sys.executable, "-m", "clawker_cp.cli.ctl.main", "auth", "rotate"]
            assert (await machine.host.run(rotate, env=machine.environment, timeout_s=40)).code == 0
            new = (
                await machine.host.run(["openssl", "x509", "-noout", "-serial", "-in", f"{auth}/tls/server.pem"])
            ).out
            for port, old in before.items():
                assert old and old != new
                while await shown(port) != new:
                    await asyncio.sleep(0.05)
            stop.touch()
            said = await watcher
        assert said["before"] and said["after"] and said["new"] is True
        assert await served.stop() == 0


async def test_with_the_firewall_down_a_signal_ends_the_server_too(machine: Machine) -> None:
    """Down, up and down again, and then nothing waits for a proxy that nobody runs."""
    async with serving(machine) as served:
        said = await served.call("""
            for _ in range(2):
                await client.call("FirewallRemove", A.FirewallRemoveRequest())
                await client.call("FirewallInit", A.FirewallInitRequest())
            result["on"] = (await client.call("FirewallStatus", A.FirewallStatusRequest())).running
            await client.call("FirewallRemove", A.FirewallRemoveRequest())
        """)
        assert said["on"] is True
        begun = time.monotonic()
        assert await served.stop() == 0 and time.monotonic() - begun < 15
    assert "Invalid file descriptor" not in log_of(machine)


async def test_a_creation_that_is_given_up_leaves_nothing(machine: Machine) -> None:
    """Whenever its caller leaves, a sandbox is made whole or not at all: no row, process, namespace or tool stays."""
    async with serving(machine) as served:
        said = await served.call("""
            made = 0
            for number in range(24):
                request = C.CreateSandboxRequest(project="up", agent=f"a{number}", argv=["sleep", "1000"], workdir=WORK)
                try:
                    async with asyncio.timeout(0.02 * number):
                        await client.call("CreateSandbox", request)
                except TimeoutError:
                    continue
                made += 1
            async def ours():
                listed = await client.call("ListSandboxes", C.ListSandboxesRequest(all=True))
                return [one for one in listed.sandboxes if one.project == "up"]  # other tests ran on this machine

            result["made"], until = made, time.monotonic() + 40
            while left := await ours():
                if time.monotonic() > until:
                    break
                for one in left:
                    if one.state == C.SANDBOX_STATE_RUNNING:  # made whole: in time, or as its caller left
                        removal = C.RemoveSandboxRequest(id=one.id, force=True)
                        await refused(client.call("RemoveSandbox", removal))  # it may be going already
                await asyncio.sleep(0.05)
            result["left"] = [told(one) for one in left]
        """)
        namespaces = await machine.host.run(["ip", "netns", "list"])
        running = (machine.host.cgroup / "cgroup.procs").read_text().split()
        tools = [name for name in map(_name_of, running) if name in {"nft", "ip", "bridge"}]

    assert said["made"] < 24
    assert said["left"] == [], served.state()
    assert namespaces.out == "" and tools == []


def _name_of(pid: str) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


async def test_a_hangup_is_never_the_end(machine: Machine) -> None:
    """SIGHUP from the first moment on reloads or does nothing, before it is ready and while it drains as well."""
    hup = 'while kill -HUP "$(cat /run/clawker/cp.pid)"; do sleep 0.02; done'
    waits = 'until grep -q "$0" /run/clawker/cp.pid 2>/dev/null; do sleep 0.01; done; '
    with (machine.host.directory / "serve.log").open("ab") as out:
        process = await machine.host.start(
            [sys.executable, "-m", "clawker_cp", "serve"],
            env=machine.environment, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip
    served = Served(machine, process)
    storm = await machine.host.start(["sh", "-c", waits + hup, str(process.pid)], stderr=asyncio.subprocess.DEVNULL)
    try:
        await served.wait_ready()
        code = await served.stop()
    finally:
        for one in (storm, process):
            if one.returncode is None:
                one.kill()
                await one.wait()

    assert code == 0
