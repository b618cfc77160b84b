"""A server called as the CLI calls it: mTLS, tokens, firewall, agents, sandboxes, health."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from clawker_cp.testing.machine import Machine
from clawker_cp.testing.served import Served, serving

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(machine: Machine) -> AsyncIterator[Served]:
    async with serving(machine) as served:
        yield served


async def test_health_and_metrics_are_served(served: Served) -> None:
    """The body is the contract's, verbose has the components, and metrics are Prometheus text."""
    assert await served.get("http://127.0.0.1:7080/healthz") == (200, '{"status":"healthy"}')
    status, body = await served.get("http://127.0.0.1:7080/healthz?verbose=1")
    components = json.loads(body)["components"]
    assert status == 200 and list(json.loads(body)) == ["status", "components"]
    assert set(components) == {
        "enforcement", "engine", "envoy", "dns", "authority", "rules", "pki", "registry", "agents", "flows",
        "telemetry", "fleet", "accel",
    }  # fmt: skip
    off = {name for name, one in components.items() if one["health"] == "HEALTH_OFF"}
    assert off == {"telemetry", "fleet"}  # what does not run is not called well
    assert {one["health"] for name, one in components.items() if name not in off} == {"HEALTH_OK"}
    assert {name for name, one in components.items() if one["critical"]} == {"enforcement", "envoy", "dns", "authority"}
    await served.call("await client.call('GetStatus', C.GetStatusRequest())")
    status, body = await served.get("http://127.0.0.1:7081/metrics")
    assert status == 200 and "clawker_cp_policy_version 1.0" in body
    for line in (
        'clawker_cp_info{accel="fast",engine="host",stack="embedded"', "clawker_cp_ready 1.0",
        'clawker_cp_map_capacity{map="route_map"} 262144.0', 'clawker_cp_tokens_issued_total{client="clawker-cli"} 1.0',
        'clawker_cp_auth_total{result="miss"} 1.0', 'clawker_cp_certificate_expiry_seconds{name="tls/server.pem"} 3',
        'clawker_cp_rpc_total{code="OK",method="GetStatus"} 1.0', 'clawker_cp_policy_apply_seconds_count{result=',
    ):  # fmt: skip
        assert line in body, line
    # What needs the dialer of agents is not there yet; every other name of the contract is.
    for name in (
        "component_health", "agents", "decisions_total", "flow_records_total", "flow_lost_total", "policies", "rules",
        "routes", "connections_cut_total", "map_entries", "dns_queries_total", "dns_seconds", "auth_seconds",
        "token_cache_entries", "tokens_refused_total", "rpc_seconds", "child_restarts_total", "loop_lag_seconds",
    ):  # fmt: skip
        assert f"# TYPE clawker_cp_{name}" in body or f"# TYPE clawker_cp_{name.removesuffix('_total')}" in body, name
    assert (await served.get("http://127.0.0.1:7080/elsewhere"))[0] == 404


async def test_rules_are_added_listed_and_removed(served: Served) -> None:
    """Statuses, the live flag and the stored list are those of the contract."""
    said = await served.call("""
        rules = [A.EgressRule(dst="api.example.com"), A.EgressRule(dst="db.example.com", proto="tcp", port="5432")]
        result["added"] = told(await client.call("FirewallAddRules", A.FirewallAddRulesRequest(rules=rules)))
        result["again"] = told(await client.call("FirewallAddRules", A.FirewallAddRulesRequest(rules=rules)))
        result["listed"] = told(await client.call("FirewallListRules", A.FirewallListRulesRequest()))
        result["status"] = told(await client.call("FirewallStatus", A.FirewallStatusRequest()))
        bad = [A.EgressRule(dst="ok.example.com"), A.EgressRule(dst="api.example.com", proto="tcp", port="443")]
        result["bad"] = await refused(client.call("FirewallAddRules", A.FirewallAddRulesRequest(rules=bad)))
        result["routes"] = told(await client.call("FirewallSyncRoutes", A.FirewallSyncRoutesRequest()))
        removed = A.FirewallRemoveRuleRequest(dst="db.example.com", proto="tcp", port="5432")
        result["removed"] = told(await client.call("FirewallRemoveRule", removed))
        result["missing"] = told(await client.call("FirewallRemoveRule", removed))
        both = A.FirewallRemoveRuleRequest(dst="x", all=True)
        result["both"] = await refused(client.call("FirewallRemoveRule", both))
        result["all"] = told(await client.call("FirewallRemoveRule", A.FirewallRemoveRuleRequest(all=True)))
    """)
    assert said["added"] == {"statuses": ["ADD_RULE_STATUS_ADDED"] * 2, "stack_restarted": True}
    assert said["again"] == {"statuses": ["ADD_RULE_STATUS_UNCHANGED"] * 2}
    assert [rule["dst"] for rule in said["listed"]["rules"]] == ["api.example.com", "db.example.com"]
    assert said["listed"]["rules"][1] == {"dst": "db.example.com", "proto": "tcp", "port": "5432", "action": "allow"}
    status = said["status"]
    assert status["running"] and status["envoy_health"] and status["coredns_health"] and status["rule_count"] == 2
    assert status["network_id"] == "host:clawker0" and status["cidr"].endswith("/20")
    assert said["bad"][:2] == ["INVALID_ARGUMENT", "RULE_INVALID"] and said["bad"][3]["index"] == "1"
    assert said["routes"]["applied"] > 0
    assert said["removed"] == {"stack_restarted": True, "status": "REMOVE_RULE_STATUS_REMOVED"}
    assert said["missing"] == {"status": "REMOVE_RULE_STATUS_NOT_FOUND"}
    assert said["both"][0] == "INVALID_ARGUMENT"
    assert said["all"]["status"] == "REMOVE_RULE_STATUS_REMOVED"


async def test_what_happens_is_followed(served: Served) -> None:
    """A watcher of policy sees the rule and the version as they come, and an unknown topic is refused."""
    said = await served.call("""
        stream = client.stream("WatchEvents", C.WatchEventsRequest(topics=["policy"]))
        first = asyncio.ensure_future(anext(stream))
        rules = [A.EgressRule(dst="seen.example.com")]
        while not first.done():
            await client.call("FirewallAddRules", A.FirewallAddRulesRequest(rules=rules))
            await client.call("FirewallRemoveRule", A.FirewallRemoveRuleRequest(all=True))
        seen = [told(await first)] + [told(await anext(stream)) for _ in range(2)]
        await stream.aclose()
        result["seen"] = seen
        bad = client.stream("WatchEvents", C.WatchEventsRequest(topics=["weather"]))
        result["bad"] = await refused(anext(bad))
    """)
    assert {one["topic"] for one in said["seen"]} == {"policy"}
    assert {"policy_applied", "rule_added"} & {one["name"] for one in said["seen"]}
    assert said["bad"][0] == "INVALID_ARGUMENT" and "weather" in said["bad"][2]


async def test_only_the_clis_certificate_and_a_token_open_the_door(served: Served) -> None:
    """No token, a wrong one, another certificate of the same CA and none at all are refused as the contract says."""
    said = await served.call("""
        import grpc
        from clawker_cp._proto.clawker.admin.v1 import admin_pb2_grpc
        identity = ClientIdentity(ROOT)

        async def ask(certificate, key, metadata=(), method="FirewallStatus", request=None):
            pair = (identity.read(key), identity.read(certificate)) if certificate else (None, None)
            credentials = grpc.ssl_channel_credentials(identity.read("ca/ca.pem"), *pair)
            options = [("grpc.ssl_target_name_override", "clawker-controlplane")]
            async with grpc.aio.secure_channel("127.0.0.1:7443", credentials, options=options) as channel:
                stub = admin_pb2_grpc.AdminServiceStub(channel)
                try:
                    await getattr(stub, method)(request or A.FirewallStatusRequest(), timeout=5, metadata=metadata)
                except grpc.aio.AioRpcError as error:
                    return [error.code().name, error.details()]
                return "passed"

        mine = ("cli/client.pem", "cli/client.key")
        token = await client._tokens.token()
        good = (("authorization", "Bearer " + token),)
        result["good"] = await ask(*mine, good)
        result["no token"] = await ask(*mine)
        result["lower case"] = await ask(*mine, (("authorization", "bearer " + token),))
        result["garbage"] = await ask(*mine, (("authorization", "Bearer garbage"),))
        result["twice"] = await ask(*mine, good + good)
        result["the server's own certificate"] = await ask("cp/client.pem", "cp/client.key", good)
        result["no certificate"] = (await ask(None, None, good))[0]
        result["clock"] = await ask(*mine, (), "GetSystemTime", A.GetSystemTimeRequest())
        result["clock, other certificate"] = await ask("cp/client.pem", "cp/client.key", (), "GetSystemTime",
                                                       A.GetSystemTimeRequest())
        await client.call("RevokeToken", C.RevokeTokenRequest(token=token))
        result["revoked"] = await ask(*mine, good)
    """)
    assert said == {
        "good": "passed",
        "no token": ["UNAUTHENTICATED", "missing bearer token"],
        "lower case": ["UNAUTHENTICATED", "missing bearer token"],
        "garbage": ["UNAUTHENTICATED", "token inactive or invalid"],
        "twice": ["UNAUTHENTICATED", "missing bearer token"],
        "the server's own certificate": ["PERMISSION_DENIED", "client certificate not accepted here"],
        "no certificate": "UNAVAILABLE",
        "clock": "passed",
        "clock, other certificate": ["PERMISSION_DENIED", "client certificate not accepted here"],
        "revoked": ["UNAUTHENTICATED", "token inactive or invalid"],
    }


async def test_old_tls_is_refused(served: Served) -> None:
    """Neither the gRPC listener nor the token endpoint speaks TLS 1.2; both speak 1.3."""
    auth = f"{served.machine.environment['CLAWKER_DATA_DIR']}/auth"
    for port in (7443, 4444):
        for version, works in (("-tls1_2", False), ("-tls1_3", True)):
            done = await served.machine.host.run(
                ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", version, "-CAfile", f"{auth}/ca/ca.pem",
                 "-cert", f"{auth}/cli/client.pem", "-key", f"{auth}/cli/client.key", "-brief"],
                env=served.machine.environment, timeout_s=20,
            )  # fmt: skip
            assert ("Protocol version: TLSv1.3" in done.err) is works, (port, version, done.err)


async def test_a_sandbox_lives_on_the_server(served: Served) -> None:
    """Created, listed, attached to, judged, granted a way out for a time, and removed."""
    said = await served.call("""
        async def attach(sandbox_id, data=b""):
            async def requests():
                yield C.AttachSandboxRequest(id=sandbox_id)
                if data:
                    yield C.AttachSandboxRequest(stdin=data)
                yield C.AttachSandboxRequest(close_stdin=True)
                await asyncio.Event().wait()
            output, code = b"", None
            async for message in client.stream("AttachSandbox", requests()):
                if message.WhichOneof("item") == "output":
                    output += message.output
                else:
                    code = message.exit_code
            return output.decode(), code

        script = "read x; curl -sS -m 5 https://www.example.com/echo; echo; read y; echo got $x; exit 7"
        made = await client.call("CreateSandbox", C.CreateSandboxRequest(
            project="shop", agent="dev", argv=["sh", "-c", script], workdir=WORK))
        sandbox = told(made.sandbox)
        result["made"] = sandbox
        ref = C.AgentRef(project="shop", agent="dev")
        result["sessions"] = told(await client.call("ListSessions", C.ListSessionsRequest()))
        check = C.CheckRequest(agent=ref, host="www.example.com")
        result["before"] = told(await client.call("Check", check))
        bad = C.GrantRequest(agent=ref, egress=A.EgressRule(dst="www.example.com"), duration_seconds=60)
        result["no reason"] = await refused(client.call("Grant", bad))
        granted = await client.call("Grant", C.GrantRequest(
            agent=ref, egress=A.EgressRule(dst="www.example.com"), duration_seconds=60, reason="to look"))
        result["granted"] = told(granted)
        result["after"] = told(await client.call("Check", check))
        result["listed"] = told(await client.call("ListSandboxes", C.ListSandboxesRequest()))
        result["again"] = await refused(client.call("CreateSandbox", C.CreateSandboxRequest(
            project="shop", agent="dev", argv=["true"])))
        result["running"] = await refused(client.call("RemoveSandbox", C.RemoveSandboxRequest(id=sandbox["id"])))
        result["output"] = await attach(sandbox["id"], b"hello\\n\\n")
        rows = await client.call("ListSandboxes", C.ListSandboxesRequest(all=True))
        result["ended"] = told(rows)
        await client.call("RemoveSandbox", C.RemoveSandboxRequest(id=sandbox["id"]))
        result["left"] = told(await client.call("ListSandboxes", C.ListSandboxesRequest(all=True)))
        flows = []
        request = C.WatchFlowsRequest(last=100, filter=C.FlowFilter(host_suffix="example.com"))
        async for item in client.stream("WatchFlows", request):
            flows.append(told(item.flow))
        result["flows"] = flows
        explained = await client.call("Explain", C.ExplainRequest(event_id=flows[-1]["event_id"]))
        result["explained"] = told(explained)
        result["unknown event"] = await refused(client.call("Explain", C.ExplainRequest(event_id="k-1-1")))
        await client.call("DeleteRules", C.DeleteRulesRequest(scope="agent:shop/dev"))
    """)
    assert said["made"]["state"] == "SANDBOX_STATE_RUNNING" and said["made"]["project"] == "shop"
    (session,) = said["sessions"]["sessions"]
    assert session["enrolled"] and session["running"] and session["agent"] == "dev" and session["policy"] == 1
    assert "allowed" not in said["before"]["verdict"] and said["before"]["verdict"]["reason"] == "not_allowed"
    assert "--agent shop/dev --for 20m" in said["before"]["verdict"]["allow_command"]
    assert said["no reason"][0] == "INVALID_ARGUMENT" and said["no reason"][2].startswith("reason:")
    assert said["granted"]["applied"]["live"] and said["granted"]["rule"]["source"] == "grant"
    assert said["granted"]["rule"]["comment"] == "to look" and int(said["granted"]["rule"]["expires_at_unix"]) > 0
    assert said["after"]["verdict"]["allowed"] is True
    assert said["listed"]["sandboxes"][0]["id"] == said["made"]["id"]
    assert said["again"][0] == "FAILED_PRECONDITION"
    assert said["running"][:2] == ["FAILED_PRECONDITION", "AGENT_RUNNING"]
    output, code = said["output"]
    assert code == 7 and '"sni": "www.example.com"' in output and "got hello" in output
    (ended,) = said["ended"]["sandboxes"]
    assert ended["state"] == "SANDBOX_STATE_EXITED" and ended["exit_code"] == 7 and said["left"] == {}
    assert any(flow["reason"] == "forwarded" for flow in said["flows"])
    assert said["explained"]["flow"]["event_id"] == said["flows"][-1]["event_id"]
    assert said["unknown event"][0] == "NOT_FOUND"


async def test_bypass_and_quarantine_hold_in_the_kernel(served: Served) -> None:
    """A bypass opens and ends by the clock, a quarantine closes everything, a running agent is never disabled."""
    said = await served.call("""
        script = (
            "import socket, time\\n"
            "while True:\\n"
            "    try:\\n"
            "        socket.create_connection(('203.0.113.30', 5432), 2).close(); print('yes', flush=True)\\n"
            "    except OSError: print('no', flush=True)\\n"
            "    time.sleep(0.05)\\n"
        )
        made = await client.call("CreateSandbox", C.CreateSandboxRequest(
            project="shop", agent="byp", argv=["/usr/bin/python3", "-c", script], workdir=WORK, auto_remove=True))
        sandbox_id = made.sandbox.id

        async def requests():
            yield C.AttachSandboxRequest(id=sandbox_id)
            await asyncio.Event().wait()

        stream = client.stream("AttachSandbox", requests())
        async def until(word, count=3):
            seen = 0
            while seen < count:
                words = (await anext(stream)).output.decode().split()
                seen = seen + len(words) if words and set(words) == {word} else 0

        await until("no")
        disable = A.FirewallDisableRequest(container_id=sandbox_id)
        result["disable"] = await refused(client.call("FirewallDisable", disable))
        long = A.FirewallBypassRequest(container_id=sandbox_id, timeout_seconds=4000)
        result["too long"] = await refused(client.call("FirewallBypass", long))
        await client.call("FirewallBypass", A.FirewallBypassRequest(container_id=sandbox_id[:12], timeout_seconds=600))
        result["bypassed"] = told(await client.call("ListSessions", C.ListSessionsRequest()))
        await until("yes")
        await client.call("FirewallEnable", A.FirewallEnableRequest(container_id="clawker.shop.byp"))
        await until("no")
        await client.call("FirewallBypass", A.FirewallBypassRequest(container_id=sandbox_id, timeout_seconds=2))
        await until("yes", 1)
        await until("no")
        ref = C.AgentRef(container_id=sandbox_id)
        result["quarantined"] = told(await client.call("Quarantine", C.QuarantineRequest(agent=ref, reason="odd")))
        again = A.FirewallBypassRequest(container_id=sandbox_id)
        result["bypass of it"] = await refused(client.call("FirewallBypass", again))
        sessions = await client.call("ListSessions", C.ListSessionsRequest())
        result["session"] = told(sessions.sessions[0])
        await client.call("Release", C.ReleaseRequest(agent=ref))
        result["down"] = await refused(client.call("FirewallRemove", A.FirewallRemoveRequest()))
        await client.call("RemoveSandbox", C.RemoveSandboxRequest(id=sandbox_id, force=True, grace_seconds=1))
        await stream.aclose()
        result["gone"] = await refused(client.call("FirewallEnable", A.FirewallEnableRequest(container_id=sandbox_id)))
    """)
    assert said["disable"][:2] == ["FAILED_PRECONDITION", "AGENT_RUNNING"]
    assert said["too long"][0] == "INVALID_ARGUMENT"
    assert int(said["bypassed"]["sessions"][0]["bypass_until_unix"]) > 0
    assert said["bypass of it"][:2] == ["FAILED_PRECONDITION", "AGENT_QUARANTINED"]
    assert said["session"]["quarantined"] and said["session"]["quarantine_reason"] == "odd"
    assert said["down"][:2] == ["FAILED_PRECONDITION", "AGENTS_RUNNING"] and "clawker.shop.byp" in said["down"][2]
    assert said["gone"][:2] == ["FAILED_PRECONDITION", "CONTAINER_GONE"]


async def test_the_firewall_goes_down_and_up_again(served: Served) -> None:
    """Off it refuses sandboxes and keeps rules; on again it enforces; nothing is half up."""
    said = await served.call("""
        await client.call("FirewallRemove", A.FirewallRemoveRequest())
        result["off"] = told(await client.call("FirewallStatus", A.FirewallStatusRequest()))
        made = C.CreateSandboxRequest(agent="x", argv=["true"])
        result["refused"] = await refused(client.call("CreateSandbox", made))
        rule = A.FirewallAddRulesRequest(rules=[A.EgressRule(dst="api.example.com")])
        result["stored"] = told(await client.call("FirewallAddRules", rule))
        both = [client.call("FirewallInit", A.FirewallInitRequest()) for _ in range(3)]
        result["init"] = [told(one) for one in [await each for each in both]]
        result["on"] = told(await client.call("FirewallStatus", A.FirewallStatusRequest()))
        result["rotated"] = told(await client.call("FirewallRotateCA", A.FirewallRotateCARequest()))
        await client.call("FirewallRemoveRule", A.FirewallRemoveRuleRequest(all=True))
    """)
    assert "running" not in said["off"] and said["refused"][:2] == ["FAILED_PRECONDITION", "FIREWALL_NOT_INITIALIZED"]
    assert said["stored"] == {"statuses": ["ADD_RULE_STATUS_ADDED"]}
    assert said["init"][0]["envoy_ip"] == said["init"][0]["coredns_ip"] and len(said["init"]) == 3
    assert said["on"]["running"] and said["on"]["rule_count"] == 1
    assert said["rotated"] == {"stack_restarted": True}


async def test_a_run_joins_the_server(served: Served) -> None:
    """`clawker-cp run` is a client of it: its sandbox is listed while it lives and rules stay its own."""
    done = await served.machine.run(
        "--allow", "https://api.example.com", command=["curl", "-sS", "https://api.example.com/echo"]
    )
    assert done.code == 0, done.err
    said = await served.call("""
        result["status"] = told(await client.call("GetStatus", C.GetStatusRequest()))
        result["rules"] = told(await client.call("ListRules", C.ListRulesRequest()))
    """)
    assert said["status"]["ready"] and said["status"]["engine"] == "host" and "rules" not in said["rules"]
