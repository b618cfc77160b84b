"""Tests of how Envoy is started, and when it is not."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from clawker_cp.firewall.envoy import stack
from clawker_cp.firewall.envoy.options import find_binary
from clawker_cp.firewall.envoy.stack import envoy_command
from clawker_cp.firewall.inspection import InspectionAuthority
from clawker_cp.processes.lasting import LastingProcess
from clawker_cp.testing.proxy_config import OPTIONS


def test_the_command_line_is_the_contracts() -> None:
    """No hot restart, immediate drain, two workers."""
    command = envoy_command("/usr/bin/envoy", OPTIONS, hide_hosts=False)

    assert command[0] == "/usr/bin/envoy"
    text = " ".join(command)
    assert "--disable-hot-restart --concurrency 2 --drain-time-s 1 --drain-strategy immediate" in text
    assert find_binary().name == "envoy"


def test_the_hosts_file_is_hidden_by_the_same_process() -> None:
    """The wrapper ends in exec, so the pid that is kept is Envoy's."""
    command = envoy_command("/usr/bin/envoy", OPTIONS, hide_hosts=True)

    assert command[0] == "unshare"
    assert "mount --bind /dev/null /etc/hosts && exec" in command[command.index("-c") + 1]
    assert command[command.index("/usr/bin/envoy") + 1] == "-c"


async def test_what_was_stopped_while_it_waited_to_restart_stays_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An Envoy that died before the firewall went down is not started again after it."""
    monkeypatch.setattr(stack, "RESTART_MIN_S", 0.05)
    options = replace(OPTIONS, directory=tmp_path)
    process = LastingProcess("envoy", ["sleep", "60"], tmp_path / "mark", tmp_path / "log")
    envoy = stack.EnvoyStack(options, process, InspectionAuthority(tmp_path))
    await process.start("")
    supervising = asyncio.create_task(envoy.supervise())
    try:
        os.kill(process.pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            while not envoy.restarts:
                await asyncio.sleep(0)
        await envoy.stop()
        await asyncio.wait([supervising], timeout=5)

        assert supervising.done()
        assert not process.running
    finally:
        supervising.cancel()
        await process.stop()
