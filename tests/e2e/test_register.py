"""An agent calls home: from its own namespace and cgroup, with a certificate of the host's CA and an agent's token."""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jwt
import pytest
import pytest_asyncio

from clawker_cp.testing.certificates import TestCa
from clawker_cp.testing.daemon_program import daemon_program
from clawker_cp.testing.machine import Machine
from clawker_cp.testing.served import Served, serving

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

GATEWAY = "10.231.80.1"
CALL = daemon_program(GATEWAY)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(machine: Machine) -> AsyncIterator[Served]:
    async with serving(machine) as served:
        yield served


class Agent:
    """A sandbox of a server, and the bootstrap material that somebody gave it."""

    def __init__(self, served: Served, sandbox_id: str) -> None:
        self.served = served
        self.id = sandbox_id
        self.place = served.machine.host.directory / f"boot-{sandbox_id[:12]}"
        self.place.mkdir()
        self.auth = served.machine.host.directory / "data" / "auth"
        self.ca = TestCa.of(self.place, self.auth / "ca" / "ca.pem", self.auth / "ca" / "ca.key")
        (self.place / "ca.pem").write_bytes(self.ca.certificate.read_bytes())

    def assertion(self) -> str:
        now = int(time.time())
        claims = {
            "iss": "clawker-agent", "sub": "clawker-agent", "aud": "https://127.0.0.1:4444/oauth2/token",
            "jti": str(uuid.uuid4()), "iat": now, "exp": now + 86_400,
        }  # fmt: skip
        return jwt.encode(claims, (self.auth / "cli" / "signing.key").read_bytes(), algorithm="ES256")

    def mint(self, agent: str, project: str, container_id: str) -> None:
        self.ca.leaf(
            "clawker-clawkerd", file="leaf",
            uris=[f"urn:clawker:agent:clawker.{project}.{agent}", f"urn:clawker:container:{container_id}"],
        )  # fmt: skip

    async def register(self, agent: str, project: str) -> tuple[str, str]:
        """Call from the sandbox's network namespace and cgroup."""
        machine = self.served.machine
        names = (await machine.host.run(["ip", "netns", "list"])).out.split()
        (namespace,) = [name for name in names if self.id[:8] in name]
        (cgroup,) = [path for path in machine.host.agents.iterdir() if path.is_dir() and self.id[:8] in path.name]
        enter = f'echo $$ > {cgroup}/cgroup.procs && exec ip netns exec {namespace} "$@"'
        done = await machine.host.run(
            ["sh", "-c", enter, "enter", sys.executable, "-c", CALL, str(self.place), self.assertion(), agent, project],
            env=machine.environment, timeout_s=30,
        )  # fmt: skip
        assert done.code == 0, done.err[-2000:]
        said: list[Any] = json.loads(done.out)
        return said[0], said[1]


async def sandbox(served: Served, project: str, agent: str) -> Agent:
    said = await served.call(f"""
        made = await client.call("CreateSandbox", C.CreateSandboxRequest(
            project={project!r}, agent={agent!r}, argv=["sleep", "600"], workdir=WORK, auto_remove=True))
        result["id"] = made.sandbox.id
    """)
    return Agent(served, said["id"])


async def test_an_agent_registers_from_where_it_lives(served: Served) -> None:
    """Through the kernel's hooks and the host ring, with a real token; it is seen, and a second leaf is refused."""
    agent = await sandbox(served, "shop", "home")
    agent.mint("home", "shop", agent.id)
    assert await agent.register("home", "shop") == ("OK", "")
    assert await agent.register("home", "shop") == ("OK", "")
    said = await served.call("""
        sessions = (await client.call("ListSessions", C.ListSessionsRequest())).sessions
        result["sessions"] = [told(one) for one in sessions if one.agent == "home"]
        result["agents"] = [told(one) for one in (await client.call("ListAgents", A.ListAgentsRequest())).agents]
    """)
    (session,) = said["sessions"]
    assert session["registered"] is True
    assert [one["container_id"] for one in said["agents"]] == [agent.id]
    agent.mint("home", "shop", agent.id)
    assert await agent.register("home", "shop") == ("PERMISSION_DENIED", "registration rejected")


async def test_nobody_registers_as_somebody_else(served: Served) -> None:
    """A sound certificate and a good token of another agent, sent from here, are refused with the reason in the log."""
    victim, thief = await sandbox(served, "shop", "victim"), await sandbox(served, "other", "thief")
    for uris in (("victim", "shop", victim.id), ("thief", "other", victim.id), ("victim", "shop", thief.id)):
        thief.mint(*uris)
        for names in (("victim", "shop"), ("thief", "other")):
            assert await thief.register(*names) == ("PERMISSION_DENIED", "registration rejected")
    log = Path(served.machine.host.directory / "state" / "logs" / "clawker-controlplane.log").read_text()
    for event in ("agent_identity_san_label_mismatch", "agent_register_container_id_mismatch"):
        assert event in log
    victim.mint("victim", "shop", victim.id)
    assert await victim.register("victim", "shop") == ("OK", "")


async def test_the_host_itself_is_no_agent(served: Served) -> None:
    """From the host's own address the same certificate is refused: nobody lives there."""
    agent = await sandbox(served, "shop", "elsewhere")
    agent.mint("elsewhere", "shop", agent.id)
    machine = served.machine
    done = await machine.host.run(
        [sys.executable, "-c", CALL, str(agent.place), agent.assertion(), "elsewhere", "shop"],
        env=machine.environment, timeout_s=30,
    )  # fmt: skip
    assert json.loads(done.out) == ["PERMISSION_DENIED", "registration rejected"]
