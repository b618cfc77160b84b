"""Each refusal that blames a part of the server, provoked by breaking that part; once it is mended all goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from clawker_cp.firewall.envoy.options import find_binary
from clawker_cp.testing.machine import Machine
from clawker_cp.testing.served import Served, serving

pytestmark = [
    pytest.mark.root, pytest.mark.slow, pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(120),
]  # fmt: skip

PRELUDE = """
        import signal, subprocess
        from clawker_cp.testing.frozen import freeze
        FIREWALL = Path(os.environ["CLAWKER_DATA_DIR"]) / "firewall"

        def envoy():
            return json.loads((FIREWALL / "envoy.pid").read_text())["pid"]

        def shell(*argv):
            subprocess.run(argv, check=True)

        def add(name):
            return client.call("FirewallAddRules", A.FirewallAddRulesRequest(rules=[A.EgressRule(dst=name)]))

        def remove(name):
            return client.call("FirewallRemoveRule", A.FirewallRemoveRuleRequest(dst=name))

        def init():
            return client.call("FirewallInit", A.FirewallInitRequest())

        async def rules():
            return [one.dst for one in (await client.call("FirewallListRules", A.FirewallListRulesRequest())).rules]
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(machine: Machine) -> AsyncIterator[Served]:
    binary = machine.host.directory / "envoy"
    os.symlink(find_binary(), binary)
    machine.environment["CLAWKER_CP_ENVOY__BINARY"] = str(binary)
    async with serving(machine) as served:
        yield served


async def test_a_silent_proxy_is_stack_probe(served: Served) -> None:
    """What cannot be asked what it carries is given no change: nothing is stored, and the next try works."""
    said = await served.call(f"""{PRELUDE}
        freeze(envoy())
        try:
            result["refused"] = await refused(add("silent.example.com"))
            result["stored"] = await rules()
        finally:
            os.kill(envoy(), signal.SIGCONT)
        result["again"] = told(await add("silent.example.com"))
        await remove("silent.example.com")
    """)
    assert said["refused"][:2] == ["UNAVAILABLE", "STACK_PROBE"], said["refused"]
    assert "clawkerctl status" in said["refused"][2] and said["stored"] == []
    assert said["again"]["stack_restarted"] is True


async def test_configuration_that_cannot_be_written_is_config_regen(served: Served) -> None:
    """Where the proxy's files are read-only an opening is refused whole, a closing is stored and comes into force."""
    said = await served.call(f"""{PRELUDE}
        await add("before.example.com")
        place = str(FIREWALL / "envoy")
        shell("mount", "--bind", place, place)
        shell("mount", "-o", "remount,bind,ro", place)
        try:
            result["opening"] = await refused(add("late.example.com"))
            result["stored"] = await rules()
            result["closing"] = await refused(remove("before.example.com"))
            result["left"] = await rules()
        finally:
            shell("umount", place)
        result["again"] = told(await client.call("FirewallReload", A.FirewallReloadRequest()))
    """)
    assert said["opening"][:2] == ["INTERNAL", "CONFIG_REGEN"] and "envoy/" in said["opening"][2], said["opening"]
    assert said["stored"] == ["before.example.com"] and "saved" not in said["opening"][3]
    assert said["closing"][:2] == ["INTERNAL", "CONFIG_REGEN"] and said["closing"][3] == {"saved": "true"}
    assert said["left"] == [] and said["again"] == {"stack_restarted": True}


async def test_a_proxy_that_does_not_come_back_is_envoy_restart(served: Served) -> None:
    """After a crash with a broken binary turning the firewall on says so; rules are stored; mended, it comes back."""
    binary = served.machine.host.directory / "envoy"
    real, broken = os.readlink(binary), shutil.which("false")
    said = await served.call(f"""{PRELUDE}
        def point(to):
            os.symlink(to, "{binary}.new")
            os.replace("{binary}.new", "{binary}")

        point("{broken}")
        try:
            os.kill(envoy(), signal.SIGKILL)
            async with asyncio.timeout(20):
                while (said := await refused(init())) is None:
                    await asyncio.sleep(0.05)
            result["refused"] = said
        finally:
            point("{real}")
        async with asyncio.timeout(40):
            while await refused(init()) is not None:
                await asyncio.sleep(0.05)
        result["again"] = told(await add("again.example.com"))
        await remove("again.example.com")
    """)
    assert said["refused"][:2] == ["INTERNAL", "ENVOY_RESTART"], said["refused"]
    assert "Envoy ended and could not be brought back: Envoy ended at start" in said["refused"][2]
    assert said["again"]["stack_restarted"] is True


async def test_programs_that_cannot_be_loaded_are_enforcement_unavailable(served: Served) -> None:
    """Without a BPF file system the firewall does not turn on, says what it lacks, and does once it is there."""
    said = await served.call(f"""{PRELUDE}
        await client.call("FirewallRemove", A.FirewallRemoveRequest())
        shell("mount", "-t", "tmpfs", "none", "/sys/fs/bpf")
        try:
            result["refused"] = await refused(init())
            result["status"] = told(await client.call("FirewallStatus", A.FirewallStatusRequest()))
        finally:
            shell("umount", "/sys/fs/bpf")
        result["again"] = told(await init())
    """)
    assert said["refused"][:2] == ["UNAVAILABLE", "ENFORCEMENT_UNAVAILABLE"], said["refused"]
    assert "clawker-cp check" in said["refused"][2] and "running" not in said["status"]
    assert said["again"]["envoy_ip"]
