"""A container as a process, where the engine cannot be asked or its processes cannot be seen."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from clawker_cp.engines.base import AgentNetwork
from clawker_cp.engines.docker.siblings import Sibling
from clawker_cp.engines.docker.stack import SiblingProcess, _Life
from clawker_cp.engines.docker_client import DockerClient
from clawker_cp.engines.host.process import start_time
from clawker_cp.errors import Unavailable

NETWORK = AgentNetwork("n", "10.0.0.0/24", "10.0.0.1", "b", "10.0.0.200", "10.0.0.1", "10.0.0.1")
SIBLING = Sibling("clawker-envoy", "envoy:1", "10.0.0.200", ("envoy",), (), {}, "0:0")


async def _admit(_container: str) -> None:
    return


def make(tmp_path: Path) -> tuple[DockerClient, SiblingProcess]:
    client = DockerClient(f"unix://{tmp_path}/none.sock")
    return client, SiblingProcess(client, NETWORK, SIBLING, admit=_admit, log_path=tmp_path / "envoy.log")


async def test_an_engine_that_is_gone_is_said(tmp_path: Path) -> None:
    """Starting and stopping need the engine; holding nothing does not."""
    client, process = make(tmp_path)
    with pytest.raises(Unavailable):
        await process.start("d")
    with pytest.raises(Unavailable):
        await process.stop()
    await process.wait()
    process.let_live()

    assert (process.running, process.pid, process.name) == (False, 0, "clawker-envoy")
    await client.aclose()


async def test_last_words_are_the_end_of_its_log(tmp_path: Path) -> None:
    """What it wrote, bounded; nothing where there is no log."""
    client, process = make(tmp_path)
    assert process.last_output() == ""
    (tmp_path / "envoy.log").write_text("first\nlast words\n")

    assert process.last_output(11) == "last words"
    await client.aclose()


async def test_letting_it_live_ends_every_wait(tmp_path: Path) -> None:
    """Whoever waits for the end is let go when it is left to the next start."""
    client, process = make(tmp_path)
    process._life = _Life("c" * 64, os.getpid(), "then")
    waiting = [asyncio.ensure_future(process.wait()) for _ in range(2)]
    await asyncio.sleep(0)
    process.let_live()
    async with asyncio.timeout(5):
        for one in waiting:
            await one
    await client.aclose()


def test_a_process_of_another_namespace_is_not_taken_for_the_containers(tmp_path: Path) -> None:
    """A pid is ours to look at only if its cgroup names the container; else the engine's word counts."""
    container = "c" * 64
    place = tmp_path / str(os.getpid())
    place.mkdir()
    (place / "cgroup").write_text("0::/init.scope\n")
    strangers = _Life(container, os.getpid(), "then", tmp_path)
    (place / "cgroup").write_text(f"0::/docker/{container}\n")
    own = _Life(container, os.getpid(), "then", tmp_path)
    dead = _Life(container, 0, "then", tmp_path)

    assert (strangers.visible, strangers.lives, strangers.born) == (False, True, 0)
    strangers.over = True
    assert not strangers.lives
    assert own.visible and own.lives and own.born == start_time(os.getpid())
    assert not dead.lives
