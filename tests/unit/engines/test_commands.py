"""Running the system's tools."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from clawker_cp.engines.host import commands
from clawker_cp.errors import DeadlineExceeded, Unavailable, Unsupported


async def test_output_and_input_pass_through() -> None:
    """A tool gets the text given and its output comes back."""
    assert await commands.run("cat", text="a line\n") == "a line\n"


async def test_failure_says_the_tools_own_first_words() -> None:
    """A failing tool raises with what it said; without words its exit code is told."""
    with pytest.raises(Unavailable, match="first"):
        await commands.run("sh", "-c", "echo first >&2; echo second >&2; exit 3")
    with pytest.raises(Unavailable, match="exit 3"):
        await commands.run("sh", "-c", "exit 3")


async def test_failure_that_does_not_matter_is_not_one() -> None:
    """With `check` off a failing tool gives what it printed."""
    assert await commands.run("sh", "-c", "echo some; exit 1", check=False) == "some\n"


async def test_missing_tool_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool that is not installed is told with the package that has it."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Unsupported) as refused:
        await commands.run("nft", "list", "tables")
    assert refused.value.feature == "nft"
    assert "nftables" in str(refused.value.hint)


async def test_tool_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool that does not end within the limit is killed and told."""
    monkeypatch.setattr(commands, "LIMIT_S", 0.1)
    with pytest.raises(DeadlineExceeded, match="sleep"):
        await commands.run("sleep", "60")


async def test_tool_whose_caller_is_cancelled_is_ended() -> None:
    """Nobody waits for it any more: it does not wait for the rest of its input either."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text().split()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        task = group.create_task(commands.run("cat", text="x" * (1 << 22)))
        while children.read_text().split() == before:
            await asyncio.sleep(0)
        task.cancel()

    assert task.cancelled()
    assert children.read_text().split() == before


@pytest.mark.root
async def test_command_enters_the_hosts_network_only_from_another() -> None:
    """Nothing goes before a command where we share the network; elsewhere it runs in that process's."""
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo ready; exec sleep 60"], stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n"
            links = await commands.run(*commands.in_host(other.pid), "ip", "-o", "link")

            assert len(links.splitlines()) == 1
            assert commands.in_host(os.getpid()) == ()
        finally:
            other.kill()
    with pytest.raises(Unavailable, match="cannot see the network namespace"):
        commands.in_host(other.pid)
