"""A client that knows the wire contract alone: openssl's certificates, plain grpcio, its own protos and assertions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from clawker_cp.testing.machine import Machine
from clawker_cp.testing.served import Served, serving

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

CONTRACT = Path(__file__).with_name("contract")
PROTOS = ("admin", "agent", "control")
BOUND = ["PERMISSION_DENIED", "token bound to another certificate"]
_PRELUDE = """
import json, sys, time, uuid
from client import *
WORK, KEY = sys.argv[1:]
result = {{}}
{body}
print(json.dumps(result))
"""


class Outsider:
    """A directory with the client, its compiled protos and openssl's material, beside a server that has the latter."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.place = machine.host.directory / "outsider"
        self.served: Served

    async def prepare(self) -> None:
        """Compile and make certificates, with nothing of the package."""
        self.place.mkdir()
        for name in ("client.py", "openssl.sh", *(f"{name}.proto" for name in PROTOS)):
            shutil.copy(CONTRACT / name, self.place)
        await self.sh("sh", "openssl.sh")
        await self.sh(
            sys.executable, "-m", "grpc_tools.protoc", "-I.", "--python_out=.", *(f"{n}.proto" for n in PROTOS)
        )

    async def sh(self, *argv: str) -> str:
        line = ["sh", "-c", 'cd "$0" && exec "$@"', str(self.place), *argv]
        done = await self.machine.host.run(line, env=self.machine.environment, timeout_s=120)
        assert done.code == 0, done.err[-4000:]
        return done.out

    async def call(self, body: str) -> dict[str, Any]:
        """Run a piece of the client; returns what it put into `result`."""
        code = _PRELUDE.format(body=textwrap.dedent(body))
        key = self.machine.host.directory / "data" / "controlplane" / "token-signing.key"
        said = await self.sh(sys.executable, "-c", code, str(self.machine.workdir), str(key))
        found: dict[str, Any] = json.loads(said.splitlines()[-1])
        return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def outsider(machine: Machine) -> AsyncIterator[Outsider]:
    outsider = Outsider(machine)
    await outsider.prepare()
    files = {"--tls-ca": "ca.pem", "--tls-cert": "server.pem", "--tls-key": "server.key", "--jwk": "signing-jwk.json"}
    flags = [word for flag, name in files.items() for word in (flag, str(outsider.place / name))]
    async with serving(machine, *flags) as outsider.served:
        yield outsider


async def test_every_rpc_of_the_operators_answers(outsider: Outsider) -> None:
    """All of AdminService and ControlService, each at least once with success."""
    said = await outsider.call("""
    ch, good = channel(), bearer(token())
    def ok(name, request=None, **more):
        service = "admin.v1.AdminService" if hasattr(A, name + "Request") and name not in {"GetStatus"} else ""
        service = service or "control.v1.ControlService"
        method = f"/clawker.{service}/{name}"
        got = call(ch, method, request, good, **more)
        assert got[0] == "OK", (name, got)
        seen.add(method)
        return got[1]
    seen = set()
    result["clock"] = abs(int(ok("GetSystemTime")["unix_nanos"]) / 1e9 - time.time())
    result["sos"] = ok("WatchSOS")
    result["init"] = ok("FirewallInit")
    result["status"] = ok("GetStatus")
    result["added"] = ok("FirewallAddRules", A.FirewallAddRulesRequest(rules=[
        A.EgressRule(dst="api.example.com", path_rules=[A.PathRule(path="/v1", action="allow", methods=["GET"])],
                     path_default="deny"),
        A.EgressRule(dst="db.example.com", proto="tcp", port="5432")]))
    result["listed"] = ok("FirewallListRules")
    result["firewall"] = ok("FirewallStatus")
    result["reloaded"] = ok("FirewallReload")
    result["rotated"] = ok("FirewallRotateCA")
    result["synced"] = ok("FirewallSyncRoutes", A.FirewallSyncRoutesRequest(routes=[A.Route(identity=1)]))
    result["resolved"] = ok("FirewallResolveHostname", A.FirewallResolveHostnameRequest(hostname="localhost"))
    result["removed"] = ok("FirewallRemoveRule", A.FirewallRemoveRuleRequest(dst="api.example.com", path="/v1"))
    made = ok("CreateSandbox", C.CreateSandboxRequest(
        project="shop", agent="dev", argv=["sh", "-c", "read x; echo got $x; exit 5"], workdir=WORK))["sandbox"]
    ref, box = C.AgentRef(project="shop", agent="dev"), made["id"]
    result["sandboxes"] = ok("ListSandboxes")
    result["sessions"] = ok("ListSessions")
    result["agents"] = ok("ListAgents")
    ok("FirewallEnable", A.FirewallEnableRequest(container_id=box))
    ok("FirewallBypass", A.FirewallBypassRequest(container_id=box, timeout_seconds=5))
    ok("FirewallDisable", A.FirewallDisableRequest(container_id="f" * 64))
    rule = C.Rule(scope="project:shop", egress=A.EgressRule(dst=".example.org"), comment="why")
    result["put"] = ok("PutRules", C.PutRulesRequest(rules=[rule]))
    result["rules"] = ok("ListRules")
    result["effective"] = ok("GetEffectiveRules", C.GetEffectiveRulesRequest(agent=ref))
    result["granted"] = ok("Grant", C.GrantRequest(
        agent=ref, egress=A.EgressRule(dst="x.example.net"), duration_seconds=60, reason="to look"))
    result["check"] = ok("Check", C.CheckRequest(agent=ref, host="no.example.net"))
    ok("Quarantine", C.QuarantineRequest(agent=ref, reason="odd"))
    ok("Release", C.ReleaseRequest(agent=ref))
    events = begun(ch, "/clawker.control.v1.ControlService/WatchEvents", C.WatchEventsRequest(topics=["policy"]), good)
    events.initial_metadata()
    attach = "/clawker.control.v1.ControlService/AttachSandbox"
    def typing():
        yield C.AttachSandboxRequest(id=box)
        yield C.AttachSandboxRequest(stdin=b"hello\\n")
        yield C.AttachSandboxRequest(close_stdin=True)
    stream = ch.stream_stream(attach, request_serializer=lambda one: one.SerializeToString(),
                              response_deserializer=C.AttachSandboxResult.FromString)
    came = list(stream(typing(), metadata=good, timeout=20))
    seen.add(attach)
    result["output"] = b"".join(one.output for one in came).decode(), came[-1].exit_code
    result["gone"] = ok("RemoveSandbox", C.RemoveSandboxRequest(id=box))
    result["deleted"] = ok("DeleteRules", C.DeleteRulesRequest(scope="agent:shop/dev"))
    ok("DeleteRules", C.DeleteRulesRequest(scope="project:shop"))
    result["event"] = next(events).topic
    seen.add("/clawker.control.v1.ControlService/WatchEvents")
    events.cancel()
    deny = ok("CreateSandbox", C.CreateSandboxRequest(
        agent="asks", argv=["curl", "-sS", "-m", "3", "https://evil.example.org/"], workdir=WORK, auto_remove=True))
    flows = begun(ch, "/clawker.control.v1.ControlService/WatchFlows",
                  C.WatchFlowsRequest(follow=True, last=100, filter=C.FlowFilter(host_suffix="example.org")), good)
    flow = next(flows).flow
    flows.cancel()
    seen.add("/clawker.control.v1.ControlService/WatchFlows")
    result["explained"] = ok("Explain", C.ExplainRequest(event_id=flow.event_id))
    ok("FirewallRemoveRule", A.FirewallRemoveRuleRequest(all=True))
    until = time.monotonic() + 10
    while ok("ListSandboxes").get("sandboxes") and time.monotonic() < until: pass
    ok("FirewallRemove")
    ok("FirewallInit")
    result["revoked"] = ok("RevokeToken", C.RevokeTokenRequest(all=True))
    result["after"] = call(ch, "/clawker.admin.v1.AdminService/FirewallStatus", None, good)
    result["never called"] = sorted(set(OPERATORS) - seen)
    """)
    assert said["never called"] == []
    assert said["clock"] < 5 and said["sos"] == [] and said["init"]["network_id"] == "host:clawker0"
    assert said["status"]["ready"] is True
    assert said["added"] == {"statuses": ["ADD_RULE_STATUS_ADDED"] * 2, "stack_restarted": True}
    assert said["listed"]["rules"][0]["path_rules"] == [{"path": "/v1", "action": "allow", "methods": ["GET"]}]
    assert said["firewall"]["rule_count"] == 2 and said["synced"]["applied"] > 0
    assert said["removed"]["status"] == "REMOVE_RULE_STATUS_PATH_REMOVED"
    assert said["put"]["outcomes"][0]["status"] == "ADD_RULE_STATUS_ADDED"
    assert {one["scope"] for one in said["rules"]["rules"]} == {"global", "project:shop"}
    assert {one["rule"]["scope"] for one in said["effective"]["rules"]} == {"global", "project:shop"}
    assert said["granted"]["rule"]["source"] == "grant" and said["check"]["verdict"]["reason"] == "not_allowed"
    assert said["output"] == ["got hello\n", 5] and said["event"] == "policy"
    assert said["explained"]["flow"]["reason"] == "not_allowed"
    assert said["after"][:2] == ["UNAUTHENTICATED", "token inactive or invalid"]


async def test_wrong_credentials_get_their_code_and_message_at_every_method(outsider: Outsider) -> None:
    """Each wrong token and each wrong certificate, at each method of both services: contract 5.1, to the letter."""
    said = await outsider.call("""
    ch, mine = channel(), token()
    agents = token("clawker-agent", "agent:self:register")
    tokens = wrong_tokens("clawker-cli", "admin", mine, KEY) | {"of the agents": bearer(agents)}
    result["tokens"] = {}
    for name, metadata in tokens.items():
        answers = {json.dumps(call(ch, method, None, metadata, timeout=5)) for method in OPERATORS
                   if not method.endswith("GetSystemTime")}
        result["tokens"][name] = [json.loads(one) for one in answers]
    result["clock without a token"] = call(ch, "/clawker.admin.v1.AdminService/GetSystemTime")[0]
    result["certificates"] = {}
    for leaf in ("cp", "agent", "cli-again", "stranger", "ended", "server-only", ""):
        with channel(leaf) as other:
            call(ch, "/clawker.admin.v1.AdminService/FirewallStatus", None, bearer(mine))  # it is bound to `cli`
            answers = {json.dumps(call(other, method, None, bearer(mine), timeout=5)[:2]) for method in OPERATORS
                       if leaf != "cli-again" or not method.endswith("GetSystemTime")}
            answers = [json.loads(one) for one in answers]
            result["certificates"][leaf] = answers if leaf in {"cp", "agent", "cli-again"} else [a[0] for a in answers]
    with channel(ca="other-ca.pem") as distrustful:
        result["certificates"]["who trusts another CA"] = call(distrustful, OPERATORS[0], None, bearer(mine))[0]
    result["not a method"] = []
    for name in ("/clawker.admin.v1.AdminService/Nothing", "/clawker.agent.v1.AgentService/Register",
                 "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"):
        try:
            ch.unary_unary(name)(b"", metadata=bearer(mine), timeout=5)
        except grpc.RpcError as error:
            result["not a method"].append([error.code().name, error.details()])
    """)
    assert_refused(said["tokens"], "admin", {"of the agents"})
    assert said["clock without a token"] == "OK"
    not_here = [["PERMISSION_DENIED", "client certificate not accepted here"]]
    assert said["certificates"] == {
        "cp": not_here,
        "agent": not_here,
        "cli-again": [BOUND],
        "stranger": ["UNAVAILABLE"],
        "ended": ["UNAVAILABLE"],
        "server-only": ["UNAVAILABLE"],
        "": ["UNAVAILABLE"],
        "who trusts another CA": "UNAVAILABLE",
    }
    assert said["not a method"] == [["UNAUTHENTICATED", "unauthorized"]] * 3


async def test_wrong_credentials_at_the_agents_listener(outsider: Outsider) -> None:
    """The same where agents call: by token, by certificate, by method; and sound ones from where no agent lives."""
    said = await outsider.call("""
    register, agents = "/clawker.agent.v1.AgentService/Register", lambda: token("clawker-agent", "agent:self:register")
    at = lambda leaf, **more: channel(leaf, target=AGENT, **more)
    asked = lambda made, metadata, name=register: call(made, name, None, metadata, timeout=5)
    mine = agents()
    with at("agent") as ch:
        result["sound"] = asked(ch, bearer(mine))
        wrong = wrong_tokens("clawker-agent", "agent:self:register", mine, KEY) | {"of the CLI": bearer(token())}
        result["tokens"] = {name: [asked(ch, metadata)] for name, metadata in wrong.items()}
        result["methods"] = [asked(ch, bearer(mine), name)[:2] for name in OPERATORS]
    result["certificates"] = {}
    for leaf in ("cli", "cp", "stranger", "ended", "server-only", ""):
        with at(leaf) as other:
            result["certificates"][leaf] = [asked(other, bearer(agents()))[:2], asked(other, bearer(mine))[:2]]
    with at("agent", ca="other-ca.pem") as distrustful:
        result["distrustful"] = asked(distrustful, bearer(mine))[0]
    """)
    rejected = ["PERMISSION_DENIED", "registration rejected"]
    assert said["sound"] == [*rejected, []]
    assert_refused(said["tokens"], "agent:self:register", {"of the CLI"})
    assert {tuple(one) for one in said["methods"]} == {("UNAUTHENTICATED", "unauthorized")}
    certificates = said["certificates"]
    assert {leaf: certificates.pop(leaf) for leaf in ("cli", "cp")} == dict.fromkeys(("cli", "cp"), [rejected, BOUND])
    assert {one[0] for answers in certificates.values() for one in answers} == {said["distrustful"]} == {"UNAVAILABLE"}


def assert_refused(answers: dict[str, Any], scope: str, foreign: set[str]) -> None:
    """Each of `wrong_tokens`, and the `foreign` ones, has the code and the message of contract 5.1."""
    missing = ["UNAUTHENTICATED", "missing bearer token", []]
    inactive = ["UNAUTHENTICATED", "token inactive or invalid", []]
    elsewhere = ["PERMISSION_DENIED", f'token missing required scope "{scope}"', []]
    no_token = {"none", "twice", "lower case", "basic", "empty", "blank inside", "9 KiB", "in a binary header"}
    other = {"of another client with the scope", "without the scope", *foreign}
    for name, found in answers.items():
        assert found == [missing if name in no_token else elsewhere if name in other else inactive], name


async def test_assertions_are_judged_as_the_contract_says(outsider: Outsider) -> None:
    """Replayed, foreign, early, late, too long-lived ones get no token, and their row's status and code."""
    said = await outsider.call("""
    now = int(time.time())
    once = assertion("clawker-cli")
    rows = {
        "good": (once, "admin"), "replayed": (once, "admin"),
        "another key": (assertion("clawker-cli", "other-signing.key"), "admin"),
        "unknown client": (assertion("nobody"), "admin"),
        "iss is not sub": (assertion("clawker-cli", iss="clawker-agent"), "admin"),
        "another audience": (assertion("clawker-cli", aud="https://127.0.0.1:4444/"), "admin"),
        "two audiences": (assertion("clawker-cli", aud=[AUDIENCE, "x"]), "admin"),
        "one in a list": (assertion("clawker-cli", aud=[AUDIENCE]), "admin"),
        "ended": (assertion("clawker-cli", iat=now - 60, exp=now - 11), "admin"),
        "from the future": (assertion("clawker-cli", iat=now + 90, exp=now + 120), "admin"),
        "long-lived": (assertion("clawker-cli", iat=now, exp=now + 301), "admin"),
        "no number": (assertion("clawker-cli", jti=""), "admin"),
        "a scope of others": (assertion("clawker-cli"), "agent:self:register"),
        "no scope": (assertion("clawker-cli"), ""),
        "kid": (signed({"alg": "ES256", "typ": "JWT", "kid": "x"}, {"iss": "clawker-cli", "sub": "clawker-cli",
            "aud": AUDIENCE, "jti": str(uuid.uuid4()), "iat": now, "exp": now + 30}, "signing.key"), "admin"),
        "9 KiB": (assertion("clawker-cli", more="x" * 9000), "admin"),
        "an agent's, for a day": (assertion("clawker-agent", exp=now + 86400), "agent:self:register"),
    }
    result = {name: [status, body.get("error", body.get("scope"))] for name, (status, body) in
              ((name, exchange(*row)) for name, row in rows.items())}
    """)
    good = {"good": "admin", "one in a list": "admin", "no scope": "admin"}
    assert {name: scope for name, (status, scope) in said.items() if status == 200} == {
        **good,
        "an agent's, for a day": "agent:self:register",
    }
    assert said["a scope of others"] == [400, "invalid_scope"]
    refused = {name for name, answer in said.items() if answer == [401, "invalid_client"]}
    assert refused == set(said) - set(good) - {"an agent's, for a day", "a scope of others"}


async def test_refusals_carry_their_reason_and_facts(outsider: Outsider) -> None:
    """The rows of contract 5.4 that an operator can meet: code, reason, domain and facts, over the wire."""
    said = await outsider.call("""
    ch, good = channel(), bearer(token())
    ADM, CTL = "/clawker.admin.v1.AdminService/", "/clawker.control.v1.ControlService/"
    ask = lambda method, request=None: call(ch, method, request, good)
    made = ask(CTL + "CreateSandbox", C.CreateSandboxRequest(
        project="shop", agent="sits", argv=["sleep", "600"], workdir=WORK, auto_remove=True))[1]["sandbox"]
    ref, box = C.AgentRef(project="shop", agent="sits"), made["id"]
    bad = [A.EgressRule(dst="fine.example.com"), A.EgressRule(dst="bad name", proto="https"),
           A.EgressRule(dst="x.example.com", proto="gopher")]
    result["RULE_INVALID"] = ask(ADM + "FirewallAddRules", A.FirewallAddRulesRequest(rules=bad))
    many = [A.EgressRule(dst=f"n{i}.example.com") for i in range(5001)]
    result["CAPACITY"] = ask(ADM + "FirewallAddRules", A.FirewallAddRulesRequest(rules=many))
    result["AGENT_RUNNING"] = ask(ADM + "FirewallDisable", A.FirewallDisableRequest(container_id=box))
    result["AGENT_RUNNING, removal"] = ask(CTL + "RemoveSandbox", C.RemoveSandboxRequest(id=box))
    result["AGENTS_RUNNING"] = ask(ADM + "FirewallRemove")
    result["AGENT_NOT_FOUND"] = ask(CTL + "Quarantine", C.QuarantineRequest(agent=C.AgentRef(agent="no"), reason="x"))
    result["CONTAINER_GONE"] = ask(ADM + "FirewallEnable", A.FirewallEnableRequest(container_id="a" * 64))
    result["CONTAINER_GONE, bypass"] = ask(ADM + "FirewallBypass", A.FirewallBypassRequest(container_id="a" * 64))
    ask(CTL + "Quarantine", C.QuarantineRequest(agent=ref, reason="odd"))
    result["AGENT_QUARANTINED"] = ask(ADM + "FirewallBypass", A.FirewallBypassRequest(container_id=box))
    result["AGENT_QUARANTINED, grant"] = ask(CTL + "Grant", C.GrantRequest(
        agent=ref, egress=A.EgressRule(dst="x.example.com"), duration_seconds=60, reason="x"))
    result["empty id"] = [ask(ADM + "FirewallEnable"), ask(ADM + "FirewallBypass"), ask(ADM + "FirewallDisable")]
    result["too long"] = ask(ADM + "FirewallBypass", A.FirewallBypassRequest(container_id=box, timeout_seconds=3601))
    result["all and more"] = ask(ADM + "FirewallRemoveRule", A.FirewallRemoveRuleRequest(dst="x", all=True))
    result["empty name"] = ask(ADM + "FirewallResolveHostname")
    result["unresolved"] = ask(ADM + "FirewallResolveHostname",
                               A.FirewallResolveHostnameRequest(hostname="nowhere.invalid"))
    result["grant too long"] = ask(CTL + "Grant", C.GrantRequest(
        agent=ref, egress=A.EgressRule(dst="x.example.com"), duration_seconds=86401, reason="x"))
    result["ids and scope"] = ask(CTL + "DeleteRules", C.DeleteRulesRequest(ids=["x"], scope="global"))
    result["unknown event"] = ask(CTL + "Explain", C.ExplainRequest(event_id="k-1-1"))
    ask(CTL + "RemoveSandbox", C.RemoveSandboxRequest(id=box, force=True, grace_seconds=1))
    ask(ADM + "FirewallRemove")
    result["FIREWALL_NOT_INITIALIZED"] = [
        ask(ADM + "FirewallEnable", A.FirewallEnableRequest(container_id=box)),
        ask(ADM + "FirewallBypass", A.FirewallBypassRequest(container_id=box)),
        ask(CTL + "CreateSandbox", C.CreateSandboxRequest(agent="x", argv=["true"]))]
    ask(ADM + "FirewallInit")
    """)

    def is_refused(name: str, code: str, **facts: str) -> None:
        answers = said[name] if isinstance(said[name][0], list) else [said[name]]
        for answer in answers:
            assert answer[0] == code, (name, answer)
            reason = name.partition(",")[0]
            assert [one[:2] for one in answer[2]] == [[reason, "firewall.clawker.dev"]], (name, answer)
            assert facts.items() <= answer[2][0][2].items(), (name, answer)

    is_refused("RULE_INVALID", "INVALID_ARGUMENT", index="1", dst="bad name")
    assert "gopher" in said["RULE_INVALID"][1] and said["RULE_INVALID"][2][0][2]["problem"]
    is_refused("CAPACITY", "RESOURCE_EXHAUSTED", limit="rules")
    for name in ("AGENT_RUNNING", "AGENT_RUNNING, removal", "AGENTS_RUNNING", "CONTAINER_GONE"):
        is_refused(name, "FAILED_PRECONDITION")
    for name in ("CONTAINER_GONE, bypass", "AGENT_QUARANTINED", "AGENT_QUARANTINED, grant", "FIREWALL_NOT_INITIALIZED"):
        is_refused(name, "FAILED_PRECONDITION")
    is_refused("AGENT_NOT_FOUND", "NOT_FOUND")
    assert said["AGENT_RUNNING"][1] == (
        'firewall stays on while the container runs; for a limited time use "firewall bypass"'
    )
    assert "clawker.shop.sits" in said["AGENTS_RUNNING"][1]
    for name in ("too long", "all and more", "empty name", "grant too long", "ids and scope"):
        assert (said[name][0], said[name][2]) == ("INVALID_ARGUMENT", []), (name, said[name])
    assert {one[0] for one in said["empty id"]} == {"INVALID_ARGUMENT"}
    assert (said["unresolved"][0], said["unknown event"][0]) == ("INTERNAL", "NOT_FOUND")


async def test_the_packages_messages_are_the_contracts() -> None:
    """Every message, field number, type, enum value and method; what the package has more is numbered 1000 and up."""
    contract, package = _described(CONTRACT, ""), _described(Path(__file__).parents[2] / "proto", "clawker/{}/v1/")

    assert contract - package == set()
    assert {row for row in package - contract if len(row) < 3 or not isinstance(row[2], int) or row[2] < 1000} == set()


def _described(root: Path, place: str) -> set[tuple[object, ...]]:
    """What protoc says of the three files, as rows."""
    prefix = "clawker_cp/_proto/" if place else ""
    names = [f"{prefix}{place.format(name)}{name}.proto" for name in PROTOS]
    with tempfile.NamedTemporaryFile() as file:
        subprocess.run(
            [sys.executable, "-m", "grpc_tools.protoc", f"-I{prefix}={root}" if prefix else f"-I{root}",
             f"--descriptor_set_out={file.name}", *names],
            check=True, capture_output=True,
        )  # fmt: skip
        described = FileDescriptorSet.FromString(file.read())
    rows: set[tuple[object, ...]] = set()
    for one in described.file:
        for message in one.message_type:
            rows.add((message.name, one.package))
            rows |= {
                (f"{one.package}.{message.name}", field.name, field.number, field.type, field.label, field.type_name,
                 field.oneof_index if field.HasField("oneof_index") else -1)
                for field in message.field
            }  # fmt: skip
        for enum in one.enum_type:
            rows |= {(f"{one.package}.{enum.name}", value.name, value.number) for value in enum.value}
        for service in one.service:
            rows |= {
                (f"{one.package}.{service.name}", method.name, method.input_type, method.output_type,
                 method.client_streaming, method.server_streaming)
                for method in service.method
            }  # fmt: skip
    return rows
