"""
`clawkerctl up`, `down` and `status` on a machine with a real engine, as somebody at a terminal uses them.

What the engine runs is a stand-in that answers `/healthz` in the place of the server, or does not: what is
held here is what happens to containers. `tests/integration/test_image.py` runs the server's own image.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from clawker_cp.testing.docker_world import missing
from clawker_cp.testing.image_world import EngineHost, engine_host
from clawker_cp.wiring.own_container import NAME, SPEC

pytestmark = [
    pytest.mark.root, pytest.mark.slow, pytest.mark.docker, pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(180), pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]  # fmt: skip

BUSYBOX = Path(shutil.which("busybox") or "/bin/busybox")
# Answers as the server would; says when it is asked to drain, and does.
HEALTHY = """#!/bin/sh
trap 'echo drained; kill $!; exit 0' TERM
echo '{"level":"info","event":"cp_ready"}'
ANSWER='HTTP/1.1 200 OK\\r\\n\\r\\n{"status":"healthy"}'
while :; do printf "$ANSWER" | nc -l -p 7080 & wait $!; done
"""
DIES = """#!/bin/sh
echo '{"level":"info","event":"cp_starting"}'
echo '{"level":"error","event":"cp_serve_failed","message":"no room","cause":"the disk is full"}'
exit 1
"""
STUCK = """#!/bin/sh
trap 'exit 0' TERM
ANSWER='HTTP/1.1 503 No\\r\\n\\r\\n{"status":"unhealthy","failed_probe":"envoy"}'
while :; do printf "$ANSWER" | nc -l -p 7080 & wait $!; done
"""


SWEPT = """#!/bin/sh
echo '{"removed":["/sys/fs/bpf/clawker","table inet clawker_br-0"]}'
"""
NOT_SWEPT = """#!/bin/sh
echo 'clawker-cp: 1 agent cgroups still have processes, the first is /x' >&2
echo '  hint: stop the agents first' >&2
exit 1
"""


def image(script: str, sweeper: str) -> bytes:
    """A file system of busybox and two scripts, as `docker import` takes it."""
    buffer = io.BytesIO()
    programs = {"busybox": BUSYBOX.read_bytes(), "clawker-cp": script.encode(), "ebpf-manager": sweeper.encode()}
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in ((f"bin/{one}", data) for one, data in programs.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            archive.addfile(entry, io.BytesIO(data))
        for applet in ("sh", "nc", "printf", "kill"):
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(entry)
    return buffer.getvalue()


async def have_image(engine: EngineHost, name: str, script: str, sweeper: str = SWEPT) -> None:
    await engine.out("import", "--change", 'ENTRYPOINT ["/bin/clawker-cp"]', "-", name, data=image(script, sweeper))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[EngineHost]:
    async with engine_host() as engine:
        for name, script in (
            ("clawker-cp", HEALTHY), ("newer", HEALTHY + "# newer\n"), ("dies", DIES), ("stuck", STUCK),
        ):  # fmt: skip
            await have_image(engine, name, script)
        await have_image(engine, "judged", HEALTHY, NOT_SWEPT)
        yield engine


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def _nothing_there(engine: EngineHost) -> AsyncIterator[None]:
    yield
    for one in (await engine.out("ps", "-aq")).split():
        await engine.out("rm", "--force", one)


async def up(engine: EngineHost, *words: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    done = await engine.ctl("--json", "up", "--wait", "30", *words, env=env)
    assert done.code == 0, done.err
    return dict(json.loads(done.out))


async def inspect(engine: EngineHost, name: str = NAME) -> dict[str, Any]:
    return dict(json.loads(await engine.out("inspect", name))[0])


async def test_up_makes_it_once(engine: EngineHost) -> None:
    """The first call makes certificates, network and container, the second finds all of it as it should be."""
    first = await up(engine)
    record = await inspect(engine)
    again = await up(engine)

    assert (first["action"], again["action"]) == ("create", "keep")
    assert first["id"] == again["id"] == record["Id"] == (await inspect(engine))["Id"]
    assert (engine.host.directory / "data/auth/ca/ca.key").exists()
    network = record["NetworkSettings"]["Networks"]["clawker-net"]
    assert network["IPAddress"] == "10.231.96.202"


async def test_the_engine_took_what_was_asked(engine: EngineHost) -> None:
    """The host's processes and cgroups, read-only what is read-only, few capabilities, no key of the operator's."""
    await up(engine)
    record = await inspect(engine)
    host = record["HostConfig"]

    assert (host["PidMode"], host["CgroupnsMode"], host["Privileged"]) == ("host", "host", False)
    ports = {key: {(one["HostIp"], one["HostPort"]) for one in bound} for key, bound in host["PortBindings"].items()}
    assert ports == {f"{port}/tcp": {("127.0.0.1", str(port))} for port in (7443, 4444, 7080, 7081)}
    status = Path(f"/proc/{record['State']['Pid']}/status").read_text()
    held = int(next(line for line in status.splitlines() if line.startswith("CapEff")).split()[1], 16)
    # linux/capability.h: DAC_OVERRIDE 1, NET_BIND_SERVICE 10, NET_ADMIN 12, SYS_PTRACE 19, SYS_ADMIN 21, BPF 39,
    # which Debian's engine does not know.
    expected = sum(1 << number for number in (1, 10, 12, 19, 21))
    assert held & ~(1 << 39) == expected
    assert "NoNewPrivs:\t1" in status
    listed = await engine.out("exec", NAME, "/bin/busybox", "find", "/etc/clawker", "/usr/local/share/clawker")
    assert not [line for line in listed.splitlines() if line.endswith(("ca/ca.key", "signing.key", "cli/client.key"))]
    assert "/etc/clawker/auth/tls/ca.pem" in listed.splitlines()
    refused = await engine.docker("exec", NAME, "/bin/busybox", "touch", "/etc/clawker/config/x")
    assert refused.code and "Read-only" in refused.err
    await engine.out("exec", NAME, "/bin/busybox", "touch", "/usr/local/share/clawker/firewall/x")
    assert (engine.host.directory / "data/firewall/x").exists()


@pytest.mark.parametrize(("left_out", "code"), [("SYS_PTRACE", 1), ("SYS_ADMIN", 1), ("", 0)])
async def test_another_processes_network_takes_two_of_its_capabilities(
    engine: EngineHost, left_out: str, code: int
) -> None:
    """SYS_PTRACE to open the namespace, SYS_ADMIN to enter it; with either alone the kernel refuses (R1)."""
    given = [f"--cap-add={name}" for name in ("SYS_ADMIN", "SYS_PTRACE", "NET_ADMIN") if name != left_out]
    done = await engine.docker(
        "run", "--rm", "--network=none", "--pid=host", "--cap-drop=ALL", *given, "--volume=/usr:/usr:ro",
        "clawker-test:1", "/usr/bin/nsenter", "--target", str(os.getpid()), "--net", "true",
    )  # fmt: skip
    assert (done.code, "ns/net" in done.err or "reassociate" in done.err) == (code, bool(code))


async def test_another_image_replaces_it(engine: EngineHost) -> None:
    """The old server is asked to drain first, nothing of it is left, and the reason is told."""
    await up(engine)
    old = await inspect(engine)
    said = await up(engine, "--image", "newer")
    new = await inspect(engine)

    assert (said["action"], said["why"]) == ("replace", "the image is another one")
    assert new["Id"] != old["Id"] and new["Config"]["Labels"][SPEC] != old["Config"]["Labels"][SPEC]
    assert len((await engine.out("ps", "-aq")).split()) == 1


async def test_changed_settings_and_renewed_certificates_replace_it(engine: EngineHost) -> None:
    """A variable, and a new leaf: a mount would go on showing the old file."""
    await up(engine)
    changed = await up(engine, env={"CLAWKER_CP_ENVOY__CONCURRENCY": "3"})
    assert "CLAWKER_CP_ENVOY__CONCURRENCY=3" in (await inspect(engine))["Config"]["Env"]
    assert (await engine.ctl("auth", "rotate")).code == 0
    rotated = await up(engine, env={"CLAWKER_CP_ENVOY__CONCURRENCY": "3"})
    assert [changed["action"], rotated["action"]] == ["replace", "replace"]


@pytest.mark.parametrize(
    ("broken", "words"),
    [("dies", "ended before it was healthy: cp_serve_failed no room the disk is full"), ("stuck", "unhealthy: envoy")],
)
async def test_one_that_does_not_get_healthy_is_taken_back(engine: EngineHost, broken: str, words: str) -> None:
    """The error is the server's own word; the previous container runs again, and the next call finds it."""
    await up(engine)
    old = await inspect(engine)
    failed = await engine.ctl("up", "--image", broken, "--wait", "4")

    assert failed.code == 1 and words in failed.err.splitlines()[0]
    assert "the previous container runs again" in failed.err
    now = await inspect(engine)
    assert now["Id"] == old["Id"] and now["State"]["Running"]
    assert len((await engine.out("ps", "-aq")).split()) == 1
    assert (await up(engine))["action"] == "keep"


async def test_a_first_one_that_fails_leaves_nothing(engine: EngineHost) -> None:
    """Not even a container that the engine would start again with the machine."""
    failed = await engine.ctl("up", "--image", "dies", "--wait", "10")
    assert failed.code == 1 and "the disk is full" in failed.err
    assert await engine.out("ps", "-aq") == ""


async def test_an_interrupted_upgrade_is_finished_by_the_next(engine: EngineHost) -> None:
    """Killed between its steps, the old container has another name: it is the one that counts."""
    await up(engine)
    old = await inspect(engine)
    await engine.out("stop", NAME)
    await engine.out("rename", NAME, f"{NAME}.previous")
    said = await up(engine)
    assert (said["action"], said["id"]) == ("start", old["Id"])


async def test_what_the_released_cli_made_is_replaced_and_keeps_its_labels(engine: EngineHost) -> None:
    """It adopts ours by the two values that it gave its own."""
    await engine.out(
        "create", "--name", NAME, "--label", "dev.clawker.managed=true", "--label", "dev.clawker.purpose=controlplane",
        "--label", "dev.clawker.cp.binary_sha256=feed", "--label", "dev.clawker.cp.bpffs_source=/elsewhere", "dies",
    )  # fmt: skip
    said = await up(engine)
    labels = (await inspect(engine))["Config"]["Labels"]
    assert (said["action"], said["why"]) == ("replace", "it was made by another program")
    assert labels["dev.clawker.cp.binary_sha256"] == "feed"
    assert labels["dev.clawker.cp.bpffs_source"] == "/elsewhere"


async def test_a_foreign_container_is_left_alone(engine: EngineHost) -> None:
    """Its name alone makes it no control plane; neither verb touches it."""
    await engine.out("create", "--name", NAME, "dies")
    before = (await inspect(engine))["Id"]
    for verb in ("up", "down"):
        done = await engine.ctl(verb)
        assert done.code == 1 and "is no control plane" in done.err and "docker rename" in done.err
    assert (await inspect(engine))["Id"] == before


async def test_down_waits_for_agents_to_be_gone(engine: EngineHost) -> None:
    """Refused with their names while one runs, paused ones included; then drained and removed; then nothing to do."""
    await up(engine)
    agent = ["--label", "dev.clawker.managed=true", "--label", "dev.clawker.purpose=agent"]
    await engine.out("run", "-d", "--name", "clawker.shop.dev", *agent, "stuck")
    await engine.out("pause", "clawker.shop.dev")
    refused = await engine.ctl("down")
    assert refused.code == 1 and "1 agents run: clawker.shop.dev" in refused.err
    assert (await inspect(engine))["State"]["Running"]
    await engine.out("rm", "--force", "clawker.shop.dev")
    for expected in ("drained and removed", "is not there"):
        done = await engine.ctl("down")
        assert done.code == 0 and expected in done.out
    assert await engine.out("ps", "-aq") == ""


@pytest.mark.parametrize("end", ["kill", "stop", "pause", "rm --force"])
async def test_down_clears_what_any_end_of_it_left(engine: EngineHost, end: str) -> None:
    """However the server ended, its own image looks after the kernel, and no container is left."""
    await up(engine)
    await engine.out(*end.split(), NAME)
    done = await engine.ctl("--json", "down")
    told = json.loads(done.out)

    assert done.code == 0, done.err
    assert told["action"] == ("absent" if end.startswith("rm") else "removed")
    assert told["why"] == "/sys/fs/bpf/clawker and table inet clawker_br-0 had been left"
    assert await engine.out("ps", "-aq") == ""


async def test_down_clears_the_kernel_after_one_that_was_made_and_never_started(engine: EngineHost) -> None:
    """As an `up` leaves it that is killed between the two: an earlier server may have left something."""
    labels = ("managed=true", "purpose=controlplane", "cp.spec=1")
    await engine.out("create", "--name", NAME, *(f"--label=dev.clawker.{one}" for one in labels), "clawker-cp")
    done = await engine.ctl("down")
    assert done.code == 0 and "had been left" in done.out
    assert await engine.out("ps", "-aq") == ""


async def test_what_has_to_stay_is_said_and_the_next_down_goes_on(engine: EngineHost) -> None:
    """While somebody that no label shows is judged, the stopped container stays, with the reason in the error."""
    await up(engine, "--image", "judged")
    refused = [await engine.ctl("down", "--image", "judged") for _ in range(2)]
    state = (await inspect(engine))["State"]["Status"]
    left = await engine.out("ps", "-a", "--format", "{{.Names}}")

    assert [one.code for one in refused] == [1, 1]
    assert "stays: 1 agent cgroups still have processes, the first is /x" in refused[-1].err
    assert (state, left) == ("exited", NAME)


async def test_down_without_the_servers_image_takes_another_or_says_so(engine: EngineHost) -> None:
    """An image that was removed under a killed server is no reason to leave what it left, nor to forget it."""
    await have_image(engine, "gone", HEALTHY + "# gone\n")
    await up(engine, "--image", "gone")
    await engine.out("kill", NAME)
    await engine.out("rmi", "--force", (await inspect(engine))["Image"])
    pinned = "/sys/fs/bpf/clawker"
    await engine.host.run(["mkdir", pinned])
    refused = await engine.ctl("down", "--image", "nothing:1")
    state = (await inspect(engine))["State"]["Status"]
    done = await engine.ctl("down")
    await engine.host.run(["rmdir", pinned])

    assert refused.code == 1 and state == "exited"
    assert "has no image nothing:1" in refused.err and "--image" in refused.err
    assert done.code == 0 and "had been left" in done.out
    assert await engine.out("ps", "-aq") == ""


async def test_down_ends_what_the_released_cli_made(engine: EngineHost) -> None:
    """It drained, and whether there is an image of ours to look after it does not matter."""
    labels = ("--label", "dev.clawker.managed=true", "--label", "dev.clawker.purpose=controlplane")
    await engine.out("run", "--detach", "--name", NAME, *labels, "clawker-cp")
    async with asyncio.timeout(10):
        while "cp_ready" not in await engine.out("logs", NAME):
            await asyncio.sleep(0.05)
    done = await engine.ctl("down", "--image", "nothing:1")
    assert done.code == 0 and done.out.rstrip().endswith("drained and removed")
    assert await engine.out("ps", "-aq") == ""


async def test_one_verb_at_a_time(engine: EngineHost) -> None:
    """While one terminal waits for a server to get healthy, neither verb of another interferes, and says why."""
    async with asyncio.TaskGroup() as group:
        first = group.create_task(engine.ctl("up", "--image", "stuck", "--wait", "6"))
        async with asyncio.timeout(20):
            while (await engine.docker("inspect", NAME)).code:
                await asyncio.sleep(0.05)
        others = [await engine.ctl(verb) for verb in ("down", "up")]
        there = await inspect(engine)
    after = await engine.ctl("down")

    assert all(one.code == 1 and "is at work already, as process" in one.err for one in others)
    assert there["State"]["Running"] and first.result().code == 1
    assert after.code == 0, after.err


async def test_without_the_image_it_says_how_to_make_it(engine: EngineHost) -> None:
    """One line and a hint."""
    done = await engine.ctl("up", "--image", "nothing:1")
    assert done.code == 1 and "the engine has no image nothing:1" in done.err and "make image" in done.err


async def test_without_an_engine_it_says_where_it_looked(engine: EngineHost) -> None:
    """Neither verb waits for one that is not there."""
    for verb in ("up", "down"):
        done = await engine.ctl(verb, env={"DOCKER_HOST": "unix:///nowhere/docker.sock"})
        assert done.code == 1 and "/nowhere/docker.sock" in done.err and "is dockerd running" in done.err


async def test_status_tells_why_the_container_does_not_run(engine: EngineHost) -> None:
    """Beside the server's silence: the container's state and its last word."""
    await up(engine)
    await engine.out("stop", NAME)
    done = await engine.ctl("status")
    assert done.code == 1
    assert f"container {NAME}" in done.err and "exited with exit code 0: drained" in done.err
