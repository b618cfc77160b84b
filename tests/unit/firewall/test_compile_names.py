"""What rules on names compile to, asked of a model of the data plane (contract 7.6, 7.8)."""

from __future__ import annotations

import pytest

from clawker_cp.firewall.plan import (
    IDENTITY_BYPASS,
    IDENTITY_CATCH_ALL,
    IDENTITY_FIRST,
    IDENTITY_HTTP,
    IDENTITY_HTTP_TCP,
    TCP,
    UDP,
    RouteAction,
    Topology,
)
from clawker_cp.testing.plan_world import World, build, deny, problems, rule, world


def test_an_allowed_https_name_resolves_and_is_forwarded() -> None:
    """Through the egress listener, on its port, over TCP and HTTP/3."""
    w = world(rule("https://api.example.com"))
    assert w.reaches("api.example.com", 443, "https")
    assert w.listener("api.example.com", 443, UDP) == "egress"
    assert w.identity("api.example.com") == IDENTITY_HTTP


def test_an_exact_name_is_only_the_name_itself() -> None:
    """Nothing below it, nothing above it."""
    w = world(rule("https://api.example.com"))
    assert not w.resolves("www.api.example.com")
    assert not w.resolves("example.com")
    assert w.http("www.api.example.com") == "host_not_allowed"


def test_a_wildcard_is_the_name_and_its_whole_subtree() -> None:
    """However deep."""
    w = world(rule("https://*.example.com"))
    for name in ("example.com", "a.example.com", "a.b.c.example.com"):
        assert w.reaches(name, 443, "https")
    assert not w.resolves("notexample.com")


def test_ports_are_part_of_every_match() -> None:
    """Also at the proxy, where the name is the same."""
    w = world(rule("https://x.com"), rule("https://y.com:8443"))
    assert not w.reaches("x.com", 8443, "https")
    assert not w.reaches("y.com", 443, "https")
    assert w.reaches("y.com", 8443, "https")


def test_an_exact_allow_beats_a_wildcard_deny() -> None:
    """It is more specific."""
    w = world(rule("https://www.x.com"), deny("https://*.x.com"))
    assert w.reaches("www.x.com", 443, "https")
    assert not w.reaches("x.com", 443, "https")
    assert w.http("a.x.com") == "rule_deny"


def test_a_wildcard_allow_loses_to_a_deny_of_its_base_for_the_apex_and_below() -> None:
    """A deny matches its base and everything below, written exact or wildcard alike."""
    w = world(rule("https://*.x.com"), deny("https://x.com"))
    for name in ("x.com", "a.x.com", "a.b.x.com"):
        assert not w.resolves(name)
        assert w.http(name) == "rule_deny"


def test_a_deny_below_a_wildcard_holds_at_the_proxy_too() -> None:
    """For the name and its subtree, also when the agent brings the address itself (D33)."""
    w = world(rule("https://*.x.com"), deny("https://evil.x.com"))
    assert w.http("evil.x.com") == "rule_deny"
    assert w.http("a.evil.x.com") == "rule_deny"
    assert w.http("good.x.com") == "forwarded"
    assert not w.resolves("evil.x.com")


def test_a_deeper_allow_opens_again_below_a_deny() -> None:
    """Specificity has no end."""
    w = world(
        rule("https://*.x.com"), deny("https://b.x.com"), rule("https://*.a.b.x.com"), deny("https://c.a.b.x.com")
    )
    found = {n: w.reaches(n, 443, "https") for n in ("x.com", "b.x.com", "q.b.x.com", "a.b.x.com", "q.a.b.x.com")}
    assert found == {"x.com": True, "b.x.com": False, "q.b.x.com": False, "a.b.x.com": True, "q.a.b.x.com": True}
    assert not w.reaches("q.c.a.b.x.com", 443, "https")


def test_at_equality_deny_wins_whatever_the_scopes() -> None:
    """Scopes have no rank of their own."""
    for scopes in (("global", "agent:p/a"), ("agent:p/a", "global")):
        compiled = build(rule("https://x.com", scope=scopes[0]), deny("https://x.com", scopes[1]), agents=["agent:p/a"])
        assert not World(compiled, compiled.plan.agents["agent:p/a"]).resolves("x.com")


def test_an_opaque_deny_takes_only_its_own_ports() -> None:
    """Not https, not the name."""
    w = world(rule("https://x.com"), deny("tcp://x.com:22"))
    assert w.reaches("x.com", 443, "https")
    assert w.listener("x.com", 22) == "deny"


def test_a_deny_of_one_port_or_protocol_never_takes_the_name_from_the_others() -> None:
    """D34."""
    w = world(rule("https://x.com"), rule("http://x.com"), rule("udp://x.com:53"), deny("https://x.com"))
    assert not w.reaches("x.com", 443, "https")
    assert w.reaches("x.com", 80, "http")
    assert w.reaches("x.com", 53, "udp")


def test_a_name_of_which_nothing_is_left_does_not_resolve() -> None:
    """And says which rule it was."""
    w = world(rule("tcp://x.com:4242"), deny("tcp://x.com:4242"))
    found = w.name_class("x.com")
    assert found is not None and (found.allowed, found.reason) == (False, "rule_deny")
    assert found.rule_id == deny("tcp://x.com:4242").id


@pytest.mark.parametrize("proto", ["tcp", "ssh", "udp"])
def test_every_port_of_an_opaque_rule_has_its_dedicated_listener(proto: str) -> None:
    """Bytes to that name and port."""
    w = world(rule(f"{proto}://x.com:9000-9003"))
    l4 = UDP if proto == "udp" else TCP
    assert [w.listener("x.com", port, l4) for port in range(8999, 9005)] == [
        "none",
        *(f"x.com:{port}" for port in range(9000, 9004)),
        "none",
    ]


def test_denied_ports_are_carved_out_of_allowed_ones() -> None:
    """allow 4242-4250 and deny 4246."""
    w = world(rule("tcp://x.com:4242-4250"), deny("tcp://x.com:4246"))
    assert [port for port in range(4240, 4253) if w.reaches("x.com", port, "tcp")] == [
        4242, 4243, 4244, 4245, 4247, 4248, 4249, 4250,
    ]  # fmt: skip
    assert w.listener("x.com", 4246) == "deny"


def test_names_with_opaque_rules_have_identities_of_their_own() -> None:
    """256 and up, one per destination."""
    w = world(rule("ssh://a.com"), rule("ssh://b.com"), rule("https://a.com"))
    assert sorted((w.identity("a.com"), w.identity("b.com"))) == [IDENTITY_FIRST, IDENTITY_FIRST + 1]
    assert w.listener("a.com", 443) == "egress"


def test_an_opaque_wildcard_dials_the_name_that_was_asked_for() -> None:
    """One listener per concrete name, the apex among them (D30)."""
    w = world(rule("ssh://*.x.com"), names=["a.x.com", "x.com"])
    assert w.listener("a.x.com", 22) == "a.x.com:22"
    assert w.listener("x.com", 22) == "x.com:22"
    assert w.identity("a.x.com") != w.identity("x.com")
    found = w.name_class("b.x.com")
    assert found is not None and found.wildcard_opaque and "b.x.com" not in w.policy.concrete


def test_a_live_name_that_no_opaque_wildcard_covers_any_more_is_forgotten() -> None:
    """The compile says which are left."""
    compiled = build(rule("ssh://*.x.com"), deny("ssh://b.x.com"), names=["a.x.com", "b.x.com", "a.y.com"])
    assert compiled.live["global"].names == {"a.x.com"}


def test_an_exact_rule_below_an_opaque_wildcard_keeps_both() -> None:
    """Specificity is judged per port."""
    w = world(rule("ssh://*.x.com"), rule("https://www.x.com"), deny("tcp://www.x.com:443"), names=["www.x.com"])
    assert w.listener("www.x.com", 22) == "www.x.com:22"
    assert w.listener("www.x.com", 443) == "deny"


def test_an_exact_rule_on_one_port_takes_nothing_from_a_wildcard_on_another() -> None:
    """Per (name, port)."""
    w = world(rule("https://*.x.com"), rule("https://www.x.com:8443"))
    assert w.reaches("www.x.com", 443, "https")
    assert w.reaches("www.x.com", 8443, "https")
    assert not w.reaches("a.x.com", 8443, "https")


def test_http_and_https_on_one_port_are_no_conflict() -> None:
    """The listener tells them apart."""
    w = world(rule("https://x.com:8080"), rule("http://x.com:8080"), deny("http://y.com:8080"))
    assert w.reaches("x.com", 8080, "https")
    assert w.reaches("x.com", 8080, "http")


def test_a_deny_of_plain_http_leaves_https_of_the_port() -> None:
    """Each side has its own virtual hosts."""
    w = world(rule("https://x.com:8080"), rule("http://*.x.com:8080"), deny("http://x.com:8080"))
    assert w.reaches("x.com", 8080, "https")
    assert not w.reaches("x.com", 8080, "http")


def test_upgrades_need_a_websocket_rule() -> None:
    """Without one they are refused; without an http rule the websocket rule judges all."""
    w = world(rule("https://a.com"), rule("wss://b.com"), rule("https://c.com"), rule("wss://c.com/live"))
    assert w.http("a.com", upgrade=True) == "request_refused"
    assert w.http("b.com", upgrade=True) == "forwarded"
    assert w.http("b.com") == "forwarded"
    assert w.http("c.com", upgrade=True, path="/x") == "path_denied"
    assert w.http("c.com", upgrade=True, path="/live") == "forwarded"
    assert w.http("c.com", path="/x") == "forwarded"


def test_a_deny_of_ordinary_requests_leaves_upgrades() -> None:
    """A deny takes its own kind only."""
    w = world(rule("https://x.com"), rule("wss://x.com"), deny("https://x.com"))
    assert w.http("x.com") == "rule_deny"
    assert w.http("x.com", upgrade=True) == "forwarded"
    assert w.resolves("x.com")


def test_rules_of_one_name_in_several_scopes_add_up() -> None:
    """Paths of both are allowed, and the narrower scope is named."""
    compiled = build(rule("https://x.com/a"), rule("https://x.com/b", scope="agent:p/a"), agents=["agent:p/a"])
    mine, others = World(compiled, compiled.plan.agents["agent:p/a"]), World(compiled, 1)
    assert [mine.http("x.com", path=path) for path in ("/a", "/b", "/c")] == ["forwarded", "forwarded", "path_denied"]
    assert [others.http("x.com", path=path) for path in ("/a", "/b")] == ["forwarded", "path_denied"]


def test_a_passthrough_name_is_passed_by_sni_and_has_no_http3() -> None:
    """TCP only, read by nobody, and no certificate is made for it."""
    w = world(rule("https://x.com", tls="passthrough"), rule("https://y.com"))
    assert w.host("x.com", 443, tls=True) == "pass"
    assert w.identity("x.com") == IDENTITY_HTTP_TCP
    assert w.route("x.com", 443, UDP) is None
    assert w.policy.sans == ("y.com",)


def test_with_minimal_tls_only_rules_that_need_reading_are_inspected() -> None:
    """firewall.tls_auto: minimal; wss and explicit inspect stay inspected."""
    w = world(
        rule("https://a.com"),
        rule("https://b.com/x"),
        rule("https://c.com", tls="inspect"),
        rule("wss://d.com"),
        topology=Topology(tls_minimal=True),
    )
    assert {name for name in "abcd" if w.host(f"{name}.com", 443, tls=True) == "pass"} == {"a"}


def test_a_denied_name_below_a_passthrough_wildcard_is_told_to_the_proxy() -> None:
    """Its server name must not reach the chain."""
    w = world(rule("https://*.x.com", tls="passthrough"), deny("https://evil.x.com"), deny("tcp://raw.x.com:443"))
    assert w.host("a.x.com", 443, tls=True) == "pass"
    assert w.host("evil.x.com", 443, tls=True) == "rule_deny"
    assert w.host("raw.x.com", 443, tls=True) == "rule_deny"


def test_certificates_cover_every_inspected_name_and_denied_ones_too() -> None:
    """A wildcard's apex and its star; deeper names are asked for one by one."""
    w = world(rule("https://*.x.com"), rule("https://y.com"), deny("https://z.com"), rule("http://plain.com"))
    assert w.policy.sans == ("*.x.com", "*.z.com", "x.com", "y.com", "z.com")


def test_a_deeper_certificate_name_is_added_once_it_was_asked_for() -> None:
    """And only while an inspected wildcard covers it."""
    compiled = build(rule("https://*.x.com"), sans=["*.b.x.com", "*.y.com"])
    assert "*.b.x.com" in compiled.plan.policies[1].sans
    assert compiled.live["global"].sans == {"*.b.x.com"}


def test_the_catch_all_exists_only_on_ports_that_an_http_rule_of_the_policy_names() -> None:
    """R11; elsewhere a connect is refused at once."""
    w = world(
        rule("https://x.com"), rule("http://x.com:8080"), rule("tcp://x.com:22"), rule("https://203.0.113.7:9443")
    )
    assert {port for identity, port, _ in w.routes if identity == IDENTITY_CATCH_ALL} == {443, 8080}
    assert all(l4 == TCP for identity, _, l4 in w.routes if identity == IDENTITY_CATCH_ALL)


def test_a_denied_https_name_with_http_left_has_no_http3() -> None:
    """TCP goes to the listener that says 403, UDP is denied."""
    w = world(rule("http://x.com"), deny("https://x.com"), rule("https://other.com"))
    assert w.listener("x.com", 443) == "egress"
    assert w.http("x.com") == "rule_deny"
    assert w.route("x.com", 443, UDP) is None


def test_a_udp_rule_owns_its_port() -> None:
    """HTTP/3 of https is what is not spoken for."""
    w = world(rule("https://x.com"), rule("udp://x.com:443"))
    assert w.listener("x.com", 443, UDP) == "x.com:443"
    assert world(rule("https://x.com"), deny("udp://x.com:443")).listener("x.com", 443, UDP) == "deny"


def test_without_http3_there_are_no_udp_rows_for_https() -> None:
    """Setting envoy.http3."""
    w = world(rule("https://x.com"), topology=Topology(http3=False))
    assert {l4 for _, _, l4 in w.routes} == {TCP}
    assert {one.l4 for one in w.plan.proxy_ports} == {TCP}


def test_rows_of_a_grant_carry_its_deadline() -> None:
    """Shared rows end with the last rule that needs them."""
    w = world(rule("ssh://x.com", expires_at=2000.0), rule("https://y.com", expires_at=3000.0))
    row = w.route("x.com", 22)
    assert row is not None and row.expires_at == 2000.0
    assert w.routes[IDENTITY_CATCH_ALL, 443, TCP].expires_at == 3000.0
    w = world(rule("https://y.com", expires_at=3000.0), rule("https://z.com"))
    assert w.routes[IDENTITY_CATCH_ALL, 443, TCP].expires_at == 0.0


def test_a_permanent_rule_beside_a_grant_of_the_same_key_has_no_deadline() -> None:
    """Whichever came first."""
    rules = [rule("ssh://x.com"), rule("ssh://x.com", expires_at=2000.0)]
    for order in (rules, rules[::-1]):
        row = world(*order).route("x.com", 22)
        assert row is not None and row.expires_at == 0.0


def test_an_expired_rule_is_left_out() -> None:
    """From its second on."""
    assert not world(rule("https://x.com", expires_at=1000.0), now=1000.0).resolves("x.com")
    assert world(rule("https://x.com", expires_at=1000.5), now=1000.0).resolves("x.com")


def test_private_answers_are_allowed_per_name() -> None:
    """By the most specific rule that allows the name."""
    w = world(rule("https://*.x.com", allow_private=True), rule("https://www.x.com"))
    below, exact = w.name_class("a.x.com"), w.name_class("www.x.com")
    assert below is not None and below.allow_private is True
    assert exact is not None and exact.allow_private is False


def test_the_wildcard_a_name_was_allowed_by_is_its_budget_zone() -> None:
    """Exact names have none."""
    w = world(rule("https://*.x.com"), rule("https://www.x.com"))
    found = [w.name_class(name) for name in ("a.b.x.com", "x.com", "www.x.com")]
    assert [one and one.zone for one in found] == ["x.com", "x.com", ""]


def test_kernel_rows_name_their_rule() -> None:
    """By an index into the plan's rule ids."""
    ssh, closed = rule("ssh://x.com"), deny("tcp://x.com:23")
    w = world(ssh, closed)
    rows = {row.port: row for row in w.plan.routes}
    assert w.plan.rule_ids[rows[22].rule] == ssh.id
    assert w.plan.rule_ids[rows[23].rule] == closed.id
    assert rows[23].action is RouteAction.DENY


def test_a_learning_agent_has_a_policy_of_its_own_that_resolves_everything() -> None:
    """But what an explicit deny covers stays denied (R38)."""
    key = "agent:p/a"
    compiled = build(rule("https://x.com", scope=key), deny("https://*.evil.com", key), agents=[key], learn=[key])
    w = World(compiled, compiled.plan.agents[key])
    assert w.policy.learn and w.resolves("anything.example.org") and w.resolves("x.com")
    assert not w.resolves("a.evil.com")
    assert {port for identity, port, _ in w.routes if identity == IDENTITY_CATCH_ALL} == {80, 443}
    assert IDENTITY_BYPASS not in {identity for identity, _, _ in w.routes}


def test_a_learning_agent_without_rules_still_has_a_policy_of_its_own() -> None:
    """Others are not opened by it."""
    compiled = build(agents=["agent:p/a", "agent:p/b"], learn=["agent:p/a"])
    assert compiled.plan.agents["agent:p/a"] != compiled.plan.agents["agent:p/b"] == 1
    assert not compiled.plan.policies[1].learn


@pytest.mark.parametrize("first", ["tcp://x.com:443", "ssh://x.com:443"])
def test_an_opaque_and_an_http_rule_on_one_port_of_one_dst_conflict(first: str) -> None:
    """Both rules are named, at the one that came later."""
    (found,) = problems(rule(first), rule("https://x.com"))
    assert (found.index, found.dst, found.field, found.code) == (1, "x.com", "port", "RULE_INVALID")
    assert rule(first).key in found.text and "x.com:https:443" in found.text


def test_the_same_on_different_dsts_is_no_conflict() -> None:
    """The more specific decides."""
    w = world(rule("https://*.x.com"), rule("tcp://www.x.com:443"), names=["www.x.com"])
    assert w.listener("www.x.com", 443) == "www.x.com:443"
    assert w.listener("a.x.com", 443) == "egress"


def test_one_name_is_either_inspected_or_passed_through() -> None:
    """Also when the rules come from different scopes or a wildcard."""
    (found,) = problems(rule("https://x.com", tls="passthrough"), rule("wss://x.com"))
    assert found.field == "tls"
    found, *_ = problems(rule("https://*.x.com", tls="passthrough"), rule("wss://www.x.com:8443"))
    assert found.field == "tls" and "www.x.com" in found.text


def test_a_passthrough_name_has_one_port() -> None:
    """The proxy knows it by SNI only."""
    (found,) = problems(rule("https://x.com", tls="passthrough"), rule("https://x.com:8443", tls="passthrough"))
    assert found.field == "port"


def test_rules_of_one_name_must_agree_on_private_answers_in_all_scopes() -> None:
    """Even if no agent is in both."""
    (found,) = problems(
        rule("https://x.com", scope="project:a", allow_private=True), rule("ssh://x.com", scope="project:b")
    )
    assert (found.index, found.field) == (1, "allow_private")


def test_what_is_no_conflict() -> None:
    """tcp and ssh, several ports, wildcard and exact with different protocols, insecure flags."""
    build(
        rule("tcp://x.com:22"),
        rule("ssh://x.com:22"),
        rule("https://y.com"),
        rule("https://y.com:8443"),
        rule("tcp://*.z.com:443"),
        rule("https://www.z.com"),
        rule("https://q.com", insecure_skip_tls_verify=True),
        rule("wss://q.com"),
    )


def test_every_problem_is_reported_at_once() -> None:
    """Ordered by rule."""
    found = problems(
        rule("tcp://x.com:443"), rule("https://x.com"), rule("https://y.com", tls="passthrough"), rule("wss://y.com")
    )
    assert [problem.index for problem in found] == [1, 3]
