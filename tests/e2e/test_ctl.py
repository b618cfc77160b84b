"""`clawkerctl` against a real server, as somebody at a terminal uses it."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from clawker_cp.testing.machine import Machine
from clawker_cp.testing.served import Served, serving
from clawker_cp.testing.world import Finished

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(machine: Machine) -> AsyncIterator[Served]:
    async with serving(machine) as served:
        yield served


async def ctl(served: Served, *words: str, stdin: str = "") -> Finished:
    line = [sys.executable, "-m", "clawker_cp.cli.ctl.main", *words]
    if stdin:
        line = ["sh", "-c", 'printf %s "$0" | exec "$@"', stdin, *line]
    return await served.machine.host.run(line, env=served.machine.environment, timeout_s=40)


async def ok(served: Served, *words: str, stdin: str = "") -> str:
    done = await ctl(served, *words, stdin=stdin)
    assert done.code == 0, done.err + done.out
    return done.out


async def test_status_shows_what_runs(served: Served) -> None:
    """Version, policy, components; JSON has the same."""
    text = await ok(served, "status")
    assert "ready since" in text and "COMPONENT" in text and "enforcement" in text
    said = json.loads(await ok(served, "--json", "status"))
    assert said["ready"] is True and {one["name"] for one in said["components"]} >= {"envoy", "dns", "authority"}


async def test_a_rule_is_allowed_checked_and_deleted(served: Served) -> None:
    """The life of a rule at the terminal, with the exit codes of a question."""
    denied = await ctl(served, "check", "https://api.example.com")
    assert denied.code == 1 and "denied by dns: not_allowed" in denied.out and "to allow it: clawkerctl" in denied.out
    assert "added" in await ok(served, "allow", "GET https://api.example.com/echo", "--comment", "docs")
    assert "allowed by proxy" in await ok(served, "check", "https://api.example.com/echo")
    put = await ctl(served, "check", "PUT https://api.example.com/echo")
    assert put.code == 1 and "path_denied" in put.out
    listed = json.loads(await ok(served, "--json", "rules", "list"))["rules"]
    assert [(one["scope"], one["comment"], one["source"]) for one in listed] == [("global", "docs", "control")]
    dry = await ok(served, "rules", "delete", listed[0]["id"], "--dry-run")
    assert "would delete" in dry and listed[0]["id"] in await ok(served, "rules", "list")
    assert "deleted" in await ok(served, "rules", "delete", listed[0]["id"])
    assert (await ctl(served, "rules", "delete", listed[0]["id"])).code == 1


async def test_rules_come_from_a_file_all_or_none(served: Served) -> None:
    """A file with one bad rule changes nothing, and a dry run says which."""
    path = served.machine.workdir / "rules.yaml"
    path.write_text("rules:\n  - dst: one.example.com\n  - dst: bad..example.com\n")
    done = await ctl(served, "rules", "put", str(path))
    assert done.code == 2 and "bad..example.com" in done.err
    path.write_text("rules:\n  - dst: one.example.com\n    scope: project:shop\n")
    assert "added" in await ok(served, "rules", "put", str(path), "--dry-run")
    assert "one.example.com" not in await ok(served, "rules", "list")
    await ok(served, "rules", "put", str(path))
    assert "project:shop" in await ok(served, "rules", "list", "--scope", "project:shop")
    await ok(served, "rules", "delete", "--scope", "project:shop")


async def test_a_sandbox_is_run_with_its_input_output_and_code(served: Served) -> None:
    """Like a command in a pipe: what goes in comes out, and the exit code is its own."""
    work = str(served.machine.workdir)
    done = await ctl(
        served, "sandbox", "run", "--rm", "--project", "shop", "--agent", "pipe", "--workdir", work, "--",
        "sh", "-c", "tr a-z A-Z; exit 3", stdin="hello\n",
    )  # fmt: skip
    assert (done.code, done.out) == (3, "HELLO\n"), done.err
    assert "shop/pipe" not in await ok(served, "sandbox", "list", "--all")


async def test_an_agent_is_seen_granted_quarantined_and_removed(served: Served) -> None:
    """A detached sandbox through its whole life."""
    work = str(served.machine.workdir)
    words = ["sandbox", "run", "-d", "--project", "shop", "--agent", "life", "--workdir", work, "--", "sleep", "600"]
    sandbox = (await ok(served, *words)).strip()
    assert len(sandbox) == 64
    assert "shop/life" in await ok(served, "agents")
    granted = await ok(served, "allow", "https://www.example.com", "--agent", "shop/life", "--for", "20m")
    assert "granted until" in granted
    assert "allowed" in await ok(served, "check", "https://www.example.com", "--agent", "shop/life")
    assert "www.example.com" in await ok(served, "rules", "effective", "shop/life")
    assert "passes" in await ok(served, "bypass", "shop/life", "--for", "1m")
    await ok(served, "firewall", "enable", sandbox[:12])
    assert "quarantined" in await ok(served, "quarantine", "shop/life", "--reason", "looked odd")
    assert "looked odd" in await ok(served, "agents")
    refused = await ctl(served, "bypass", "shop/life")
    assert refused.code == 1 and "quarantined" in refused.err and "clawkerctl release" in refused.err
    await ok(served, "release", "shop/life")
    running = await ctl(served, "sandbox", "remove", sandbox)
    assert running.code == 1 and "is running" in running.err
    assert "is removed" in await ok(served, "sandbox", "remove", "--force", "--grace", "1", sandbox)
    gone = await ctl(served, "rules", "effective", "shop/life")
    assert gone.code == 1 and "is not known here" in gone.err
    await ok(served, "rules", "delete", "--scope", "agent:shop/life")


async def test_a_sandbox_that_cannot_be_taken_away_stays_and_goes_later(served: Served) -> None:
    """While somebody has removed the packet filter that its pin is in, it is listed; then it goes by itself."""
    work, host, table = str(served.machine.workdir), served.machine.host, ["table", "inet", "clawker_clawker0"]
    words = ["sandbox", "run", "-d", "--project", "shop", "--agent", "stuck", "--workdir", work, "--", "sleep", "600"]
    sandbox = (await ok(served, *words)).strip()
    kept = await host.run(["nft", "list", *table])
    await host.run(["nft", "delete", *table])
    refused = await ctl(served, "sandbox", "remove", "--force", sandbox)
    listed, agents = await ok(served, "sandbox", "list"), await ok(served, "agents")
    again = await ctl(served, *words)
    restored = await host.run(["nft", "-f", "-"], data=kept.out.encode())
    async with asyncio.timeout(30):
        while "shop/stuck" in await ok(served, "sandbox", "list"):
            await asyncio.sleep(0.2)

    assert restored.code == 0, restored.err
    assert refused.code == 1 and "cannot be taken away now" in refused.err and "tried again" in refused.err
    assert "shop/stuck" in listed and "shop/stuck" in agents
    assert again.code == 1 and "runs already" in again.err
    assert "shop/stuck" not in await ok(served, "sandbox", "list", "--all")


async def test_flows_are_shown_and_explained(served: Served) -> None:
    """A refusal has a line with an id, and the id has an explanation with what would allow it."""
    work = str(served.machine.workdir)
    await ctl(
        served, "sandbox", "run", "--rm", "--project", "shop", "--agent", "flow", "--workdir", work, "--",
        "curl", "-sS", "-m", "3", "https://evil.example.org/",
    )  # fmt: skip
    lines = (await ok(served, "flows", "--verdict", "denied", "--host", "evil.example.org")).splitlines()
    assert "evil.example.org" in lines[-1] and "dns not_allowed" in lines[-1]
    explained = await ok(served, "why", lines[-1].split()[-1])
    assert "now:" in explained and "denied" in explained and "to allow it: clawkerctl allow" in explained


async def test_the_firewall_verbs_answer(served: Served) -> None:
    """Each verb of AdminService once."""
    assert "added" in await ok(served, "firewall", "add", "db.example.com", "--proto", "tcp", "--port", "5432")
    assert "db.example.com" in await ok(served, "firewall", "list")
    assert "firewall on" in await ok(served, "firewall", "status")
    assert "routes" in await ok(served, "firewall", "sync-routes")
    assert "read" in await ok(served, "firewall", "reload")
    assert "rotated" in await ok(served, "firewall", "rotate-ca")
    assert "removed" in await ok(served, "firewall", "remove", "db.example.com", "--proto", "tcp", "--port", "5432")
    assert "127.0.0.1" in await ok(served, "firewall", "resolve", "localhost")
    assert "off" in await ok(served, "firewall", "down")
    assert "on: proxy" in await ok(served, "firewall", "up")


async def test_tokens_are_revoked(served: Served) -> None:
    """All of them, and the next call fetches a new one."""
    assert "revoked" in await ok(served, "token", "revoke", "--all")
    assert "ready" in await ok(served, "status")
    assert (await ctl(served, "token", "revoke")).code == 2
    assert (await ctl(served, "token", "revoke", "--sha256", "xyz")).code == 1


async def test_certificates_are_shown(served: Served) -> None:
    """The auth tree without asking the server; a broken file is exit code 1 with a hint."""
    text = await ok(served, "auth", "status")
    assert "tls/server.pem" in text and "clawker-cli" in text
    assert (await ctl(served, "--auth-dir", "/nowhere", "auth", "status")).code == 1


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--admin-port", "1", "status"], 1, "hint: is the control plane running?"),
        (["--token-port", "1", "status"], 1, "token endpoint"),
        (["--auth-dir", "/nowhere", "status"], 1, "cannot be read"),
        (["allow", "gopher://x"], 2, "gopher"),
        (["allow", "https://x.example", "--for", "20m"], 2, "--agent"),
        (["allow", "https://x.example", "--agent", "nobody/here", "--for", "20m"], 1, "not known"),
        (["bypass", "no/body"], 1, "not running"),
        (["flows", "--since", "soon"], 2, "soon"),
        (["nonsense"], 2, "No such command"),
    ],
)
async def test_a_failure_is_one_line_and_a_hint(served: Served, words: list[str], code: int, said: str) -> None:
    """What was wrong and what to do; no traceback, and the exit code of its kind."""
    done = await ctl(served, *words)
    assert done.code == code and said in done.err, done.err
    assert "Traceback" not in done.err
