"""Verdicts without trying, near misses, and the command that would allow it (contract 2.4)."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawker_cp.errors import InvalidInput
from clawker_cp.firewall.check import Checker, Request, Verdict, allow_command
from clawker_cp.firewall.plan import TCP, UDP, HttpOrigin, Topology
from clawker_cp.firewall.rules import Rule
from clawker_cp.testing.plan_world import World, build, deny, rule


def check(*rules: Rule, host: str, others: tuple[Rule, ...] = (), **request: Any) -> Verdict:
    """Check one request."""
    return Checker(rules, agent="p/a", others=others).check(Request(host, **request))


def test_the_defaults_are_https_its_port_get_and_root() -> None:
    """Of `CheckRequest`."""
    found = check(rule("x.com"), host="X.com.")
    assert (found.allowed, found.layer, found.reason, found.allow_command) == (True, "proxy", "forwarded", "")
    assert found.rule == rule("x.com")


@pytest.mark.parametrize(
    ("rules", "request_", "layer", "reason"),
    [
        ([rule("x.com")], Request("y.com"), "dns", "not_allowed"),
        ([rule("*.x.com"), deny("y.x.com")], Request("y.x.com"), "dns", "rule_deny"),
        ([rule("x.com"), deny("tcp://x.com:22")], Request("x.com", "ssh"), "kernel", "rule_deny"),
        ([rule("x.com")], Request("x.com", "ssh"), "kernel", "no_route"),
        ([rule("x.com")], Request("x.com", "tcp", 443), "proxy", "host_not_allowed"),
        ([rule("http://x.com"), deny("x.com")], Request("x.com"), "proxy", "rule_deny"),
        ([rule("x.com/a")], Request("x.com", path="/b"), "proxy", "path_denied"),
        ([rule("x.com/a")], Request("x.com", path="/a/../b"), "proxy", "path_not_canonical"),
        ([rule("x.com")], Request("x.com", "wss"), "proxy", "request_refused"),
        ([rule("http://x.com")], Request("x.com", "udp", 80), "kernel", "no_route"),
        ([rule("x.com")], Request("203.0.113.7", "tcp", 22), "kernel", "no_route"),
        ([rule("x.com")], Request("203.0.113.7"), "proxy", "host_not_allowed"),
        ([rule("10.0.0.0/8"), deny("10.1.0.0/16")], Request("10.1.2.3"), "kernel", "rule_deny"),
        ([], Request("2001:db8::1"), "kernel", "ipv6_unrouted"),
    ],
)
def test_a_refusal_names_layer_and_reason(rules: list[Rule], request_: Request, layer: str, reason: str) -> None:
    """The same that the data plane records."""
    found = Checker(rules).check(request_)
    assert (found.allowed, found.layer, found.reason) == (False, layer, reason)


@pytest.mark.parametrize(
    ("rules", "request_", "layer", "reason"),
    [
        ([rule("ssh://*.x.com")], Request("a.x.com", "ssh"), "kernel", "name_route"),
        ([rule("udp://x.com:53")], Request("x.com", "udp", 53), "kernel", "name_route"),
        ([rule("x.com")], Request("x.com", "udp", 443), "kernel", "name_route"),
        ([rule("10.0.0.0/8")], Request("10.1.2.3"), "kernel", "address_rule"),
        ([rule("tcp://10.0.0.1:22")], Request("10.0.0.1", "tcp", 22), "kernel", "address_rule"),
        ([rule("https://10.0.0.1/a")], Request("10.0.0.1", path="/a"), "proxy", "forwarded"),
        ([rule("x.com", tls="passthrough")], Request("x.com", path="/%2e"), "proxy", "forwarded"),
        ([rule("wss://x.com")], Request("x.com", "wss"), "proxy", "forwarded"),
        ([], Request("127.0.0.1", "tcp", 80), "kernel", "loopback"),
    ],
)
def test_what_passes_names_where_it_was_decided(rules: list[Rule], request_: Request, layer: str, reason: str) -> None:
    """Kernel for routes, proxy for what it reads."""
    found = Checker(rules).check(request_)
    assert (found.allowed, found.layer, found.reason) == (True, layer, reason)


def test_the_path_entry_that_decided_is_named() -> None:
    """Empty for the default."""
    rules = [rule("x.com", path_rules=(*rule("x.com/a").path_rules, *deny("x.com/a/b").path_rules))]
    assert check(*rules, host="x.com", path="/a/b/c").path_rule == "/a/b"
    assert check(*rules, host="x.com", path="/q").path_rule == ""


def test_infrastructure_is_refused_before_any_rule() -> None:
    """R12."""
    checker = Checker([rule("tcp://0.0.0.0/0:1-65535")], reserved=(ipaddress.ip_network("10.231.80.0/20"),))
    assert not checker.check(Request("10.231.81.1", "tcp", 22)).allowed
    assert checker.check(Request("10.1.1.1", "tcp", 22)).allowed


@pytest.mark.parametrize(
    ("rules", "request_", "differences"),
    [
        ([rule("x.com:8443")], Request("x.com"), ("port",)),
        ([rule("x.com")], Request("y.com"), ("name",)),
        ([rule("http://x.com:443")], Request("x.com"), ("proto",)),
        ([rule("x.com/a")], Request("x.com", path="/b"), ("path",)),
        ([rule("GET x.com")], Request("x.com", method="POST"), ("method",)),
        ([rule("x.com"), rule("x.com:8443"), rule("ssh://z.com")], Request("x.com", port=9), ("port",)),
    ],
)
def test_the_near_miss_is_the_rule_with_the_fewest_differences(
    rules: list[Rule], request_: Request, differences: tuple[str, ...]
) -> None:
    """Name, port, proto, path, method."""
    found = Checker(rules).check(request_).near_miss
    assert found is not None and found.differences == differences


def test_a_rule_of_another_scope_or_time_is_a_near_miss_too() -> None:
    """scope and expired."""
    elsewhere = rule("x.com", scope="project:q")
    found = check(host="x.com", others=(elsewhere,)).near_miss
    assert found is not None and (found.rule, found.differences) == (elsewhere, ("scope",))
    late = Checker([], others=(elsewhere,), expired=frozenset({elsewhere.id})).check(Request("x.com")).near_miss
    assert late is not None and late.differences == ("expired",)


def test_the_command_that_would_allow_it() -> None:
    """Path and method for a path refusal, deletion for an explicit deny."""
    assert check(host="y.com").allow_command == (
        "clawkerctl allow y.com --proto https --port 443 --agent p/a --for 20m"
    )
    assert check(rule("x.com/a"), host="x.com", path="/b?q", method="post").allow_command == (
        "clawkerctl allow x.com --proto https --port 443 --path /b --method POST --agent p/a --for 20m"
    )
    closed = deny("x.com")
    assert check(rule("*.x.com"), closed, host="x.com").allow_command == f"clawkerctl rules delete {closed.id}"


def test_a_path_in_the_command_is_quoted_for_the_shell() -> None:
    """It comes from the agent and is pasted by an operator."""
    assert "--path '/$(reboot)'" in allow_command("x.com", "https", 443, "p/a", path="/$(reboot)")
    assert "--path '/a'\\''b'" in allow_command("x.com", "https", 443, "p/a", path="/a'b")


@pytest.mark.parametrize(
    "request_",
    [Request(""), Request("a..b"), Request(".x.com"), Request("10.0.0.0/8"), Request("x.com", "smtp"),
     Request("x.com", port=70000), Request("x.com", path="x")],
)  # fmt: skip
def test_a_request_that_makes_no_sense_is_invalid_input(request_: Request) -> None:
    """With the field."""
    with pytest.raises(InvalidInput, match=r"host|proto|port|path"):
        Checker([]).check(request_)


NAMES = ["x.com", "a.x.com", "b.a.x.com", "y.com"]
RULES = st.builds(
    lambda dst, wild, proto, port, path, action: rule(
        f"{proto}://{'*.' if wild else ''}{dst}:{port}{path if proto[0] == 'h' and action == 'allow' else ''}", action
    ),
    st.sampled_from(NAMES),
    st.booleans(),
    st.sampled_from(["https", "http", "tcp", "udp"]),
    st.sampled_from([80, 443]),
    st.sampled_from(["", "/a"]),
    st.sampled_from(["allow", "deny"]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(RULES, max_size=6), st.sampled_from([*NAMES, "q.a.x.com"]), st.sampled_from(["/", "/a"]))
def test_the_answer_is_what_the_compiled_plan_does(rules: list[Rule], name: str, path: str) -> None:
    """For names, over the model of the data plane."""
    from clawker_cp.firewall.allocations import EMPTY
    from clawker_cp.firewall.compile import compile_plan

    if isinstance(compile_plan(rules, (), Topology(), EMPTY, now=1000.0), list):
        return
    data_plane = World(build(*rules, names=[*NAMES, "q.a.x.com"]))
    checker = Checker(rules)
    for proto in ("https", "http", "tcp", "udp"):
        for port in (80, 443):
            found = checker.check(Request(name, proto, port, path=path))
            if proto in ("tcp", "udp"):
                where = data_plane.resolves(name) and data_plane.listener(name, port, UDP if proto == "udp" else TCP)
                quic = where == "egress" and proto == "udp"
                # Names share rows: whether HTTP/3 is spoken for this one is the proxy's to say.
                goes = (
                    isinstance(data_plane.host(name, port, tls=True), HttpOrigin) if quic else where == f"{name}:{port}"
                )
            elif data_plane.resolves(name) and data_plane.listener(name, port) == f"{name}:{port}":
                goes = True
            else:
                goes = data_plane.resolves(name) and data_plane.listener(name, port) == "egress"
                goes = goes and data_plane.http(name, port, tls=proto == "https", path=path) == "forwarded"
            assert found.allowed is goes, (proto, port, found)
