"""Events of a real daemon over its life: killed, frozen, restarted, and what callers see meanwhile."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path

import pytest

from clawker_cp.engines.docker import network as agents_network
from clawker_cp.engines.docker_client import DockerClient
from clawker_cp.errors import Unavailable
from clawker_cp.testing import docker_world
from clawker_cp.testing.docker_following import LIMIT_S, Followed, engine_of, followed
from clawker_cp.testing.docker_world import DockerWorld, missing
from clawker_cp.testing.world import HostNamespace

pytestmark = [
    pytest.mark.root, pytest.mark.docker, pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]  # fmt: skip

NET = agents_network.NAME


async def test_events_of_a_life_come_in_order_with_labels(docker: DockerWorld) -> None:
    """Create to destroy, network joins included, each with the engine's message and the container's labels."""
    engine = await engine_of(docker)
    async with followed(docker, engine) as events:
        made = await docker.agent("dev", network=NET)
        await docker.client.pause(made)
        await docker.client.unpause(made)
        await docker.client.remove(made, force=True)
        last = await events.action("destroy", made)
        joined = [event for event in events.seen if event.kind == "network" and event.container_id == made]

    assert events.actions(made) == ["create", "start", "pause", "unpause", "kill", "die", "destroy"]
    assert [event.action for event in joined] == ["connect", "disconnect"]
    assert last.attributes["dev.clawker.agent"] == "dev"
    assert last.name == "clawker.p.dev"
    assert json.loads(last.raw)["Actor"]["ID"] == made
    assert not any(event.synthetic for event in events.seen)


async def test_container_started_while_subscribing_is_never_missed(docker: DockerWorld) -> None:
    """Containers that start around the moment of subscribing are all told, by list or by event (R25)."""
    made: list[str] = []

    async def busy() -> None:
        for number in range(6):
            made.append(await docker.agent(f"a{number}"))

    async with asyncio.TaskGroup() as group:
        group.create_task(busy())
        while len(made) < 2:
            await asyncio.sleep(0.01)
        async with followed(docker) as events:
            async with asyncio.timeout(60):
                while len(made) < 6:
                    await asyncio.sleep(0.02)
            for number in made:
                await events.action("start", number)


@pytest.mark.parametrize("live_restore", [False, True])
async def test_daemon_killed_and_started_again_is_followed_over_the_gap(live_restore: bool) -> None:
    """After kill -9 of dockerd, what ended or vanished meanwhile is told, what lives on is known, and events go on."""
    async with HostNamespace() as host, DockerWorld(host, live_restore=live_restore) as world:
        engine = await engine_of(world)
        stays = await world.agent("stays", network=NET)
        leaves = await world.agent("leaves", network=NET)
        async with followed(world, engine) as events:
            await events.action("start", leaves)
            pid = (await engine.inspect(leaves)).pid
            await world.kill_daemon()
            async with asyncio.timeout(LIMIT_S):
                while not events.changes:
                    await asyncio.sleep(0.02)
            with pytest.raises(Unavailable):
                await engine.living()
            assert not events.feeder.following.is_set()
            (host.mount / world.cgroup_parent / leaves / "cgroup.kill").write_text("1")
            await world.start_daemon()
            await events.action("die", leaves)
            if not live_restore:
                await events.action("die", stays)
            async with asyncio.timeout(LIMIT_S):
                await events.feeder.following.wait()
            late = await world.agent("late", network=NET)
            assert not (await events.action("start", late)).synthetic
            living = {container.id for container in await engine.living()}

        assert living == ({stays, late} if live_restore else {late})
        assert events.changes[0] != "" and events.changes[-1] == ""
        assert "destroy" not in events.actions(stays)
        assert pid > 0


async def test_container_removed_while_nobody_followed_is_told_as_destroyed(docker: DockerWorld) -> None:
    """What vanished between two connections gets a destroy with its last labels; what came is told too."""
    gone = await docker.agent("gone")
    following = Followed(docker.client, None)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(following.feeder.run())
        await following.action("start", gone)
        task.cancel()
    await docker.client.remove(gone, force=True)
    await docker.stop_daemon()  # forgets its events
    await docker.start_daemon()
    new = await docker.agent("new")
    async with asyncio.TaskGroup() as group:
        task = group.create_task(following.feeder.run())
        destroyed = await following.action("destroy", gone)
        await following.action("start", new)
        task.cancel()

    assert destroyed.attributes["dev.clawker.agent"] == "gone"
    assert following.actions(gone).count("destroy") == 1


async def test_frozen_daemon_frees_callers_at_the_limit_and_comes_back(docker: DockerWorld) -> None:
    """A daemon that stops running while calls are under way costs each its limit, no thread, and works again after."""
    client = DockerClient(docker.endpoint, threads=2, limit_s=0.5)
    try:
        await client.ping()
        docker.freeze_daemon(on=True)
        failures = []

        async def ask() -> None:
            try:
                await client.ping()
            except Unavailable as error:
                failures.append(error)

        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            for _ in range(6):
                group.create_task(ask())
        docker.freeze_daemon(on=False)
        assert len(failures) == 6
        async with asyncio.timeout(LIMIT_S):
            while True:
                try:
                    await client.ping()
                    break
                except Unavailable:
                    continue
    finally:
        docker.freeze_daemon(on=False)
        await client.aclose()


async def test_daemon_restarted_under_a_call_is_unavailable(docker: DockerWorld) -> None:
    """A call that waits while the daemon is killed fails at once, not at its limit; the next one works."""
    made = await docker.agent("dev")
    async with asyncio.TaskGroup() as group:
        outcome: list[str] = []

        async def wait() -> None:
            try:
                await docker.client.wait(made, limit_s=LIMIT_S)
            except Unavailable:
                outcome.append("unavailable")

        group.create_task(wait())
        while docker.client.statistics()["under_way"] == 0:
            await asyncio.sleep(0)
        await docker.client.ping()
        began = time.monotonic()
        await docker.kill_daemon()
    assert outcome == ["unavailable"]
    assert time.monotonic() - began < 10
    await docker.start_daemon()
    assert (await docker.client.inspect(made))["Id"] == made


async def test_world_leaves_nothing_behind_when_its_start_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon whose set-up breaks half-way is gone, with its cgroups and files."""
    monkeypatch.setattr(docker_world, "image_archive", lambda: (_ for _ in ()).throw(RuntimeError("no image")))
    async with HostNamespace() as host:
        world = DockerWorld(host)
        with pytest.raises(RuntimeError, match="no image"):
            async with world:
                raise AssertionError("it started")
        assert world.pid == 0
        assert not list(Path("/sys/fs/cgroup").glob(f"*/{world.cgroup_parent}"))
        with socket.socket(socket.AF_UNIX) as probe, pytest.raises(OSError):
            probe.connect(str(world.directory / "docker.sock"))
