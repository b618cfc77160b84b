"""Tests of virtual hosts and routes."""

from __future__ import annotations

from typing import Any

import orjson
import re2
from hypothesis import given, settings
from hypothesis import strategies as st

from clawker_cp.firewall.envoy.routes import origin_routes
from clawker_cp.firewall.paths import judge
from clawker_cp.firewall.rules import PathRule, Rule, normalise
from clawker_cp.testing.plan_world import build, deny, rule
from clawker_cp.testing.proxy_config import read, resources_of


def test_no_two_virtual_hosts_claim_one_domain() -> None:
    """Envoy refuses a whole route configuration for one duplicate, so there is none."""
    rules = (
        rule("https://example.com"),
        rule("https://*.example.com"),
        rule("https://*.example.com:8443"),
        rule("wss://example.com/chat"),
        deny("https://sub.example.com"),
        deny("https://*.sub2.example.com"),
        rule("http://example.com"),
        rule("http://example.com:8080"),
        rule("https://*.pass.example.org", tls="passthrough"),
        rule("https://x.pass.example.org/a"),
    )
    resources = resources_of(build(*rules))
    for file in ("rc_p1_tls.json", "rc_p1_plain.json"):
        (config,) = read(resources, file)
        domains = [domain for host in config["virtual_hosts"] for domain in host["domains"]]
        names = [host["name"] for host in config["virtual_hosts"]]
        assert len(domains) == len(set(domains))
        assert len(names) == len(set(names))
        assert names[-1] == "deny_all"


def test_every_route_says_what_it_means() -> None:
    """No route without action, reason and rule in its metadata, and forwards never time out."""
    rules = (rule("GET https://a.example.com/x"), rule("wss://b.example.com"), deny("https://c.example.com"))
    resources = resources_of(build(rule("https://*.example.com"), *rules))
    for file in ("rc_p1_tls.json", "rc_p1_plain.json"):
        for host in read(resources, file)[0]["virtual_hosts"]:
            for route in host["routes"]:
                said = route["metadata"]["filter_metadata"]["clawker"]
                assert set(said) == {"action", "reason", "rule"}
                assert (said["action"] == "allowed") == ("route" in route)
                assert route.get("route", {}).get("timeout", "0s") == "0s"


def test_every_tls_host_begins_with_the_server_name_check() -> None:
    """The first route of every TLS virtual host but the last resort compares Host and session."""
    resources = resources_of(
        build(rule("https://*.example.com"), rule("https://a.org/x"), deny("https://c.example.com"))
    )
    for host in read(resources, "rc_p1_tls.json")[0]["virtual_hosts"][:-1]:
        first = host["routes"][0]
        assert first["direct_response"]["status"] == 421
        assert first["match"]["headers"][0]["name"] == "x-clawker-sni"


def _matches(match: dict[str, Any], path: str, method: str) -> bool:
    for header in match.get("headers", ()):
        if header["name"] != ":method":
            return False
        if re2.fullmatch(header["string_match"]["safe_regex"]["regex"], method) is None:
            return False
    if "safe_regex" in match:
        return re2.fullmatch(match["safe_regex"]["regex"], path) is not None
    return path.startswith(match["prefix"])


PATTERNS = st.sampled_from(["/", "/a", "/a/b", "/a;b", "~/v[0-9]+/x", "~/a.*", "~/(a|b)", "/v1"])
ENTRIES = st.lists(
    st.builds(PathRule, PATTERNS, st.sampled_from(["allow", "deny"]), st.sampled_from([(), ("GET",), ("GET", "POST")])),
    max_size=4,
)
PATHS = st.text(alphabet="/ab.v1x;%2eF\\", max_size=12).map(lambda text: "/" + text)


@given(ENTRIES, st.sampled_from(["", "allow", "deny"]), PATHS, st.sampled_from(["GET", "get", "POST", "PUT"]))
@settings(max_examples=300, deadline=None)
def test_routes_decide_as_the_words_of_contract_7_7(
    entries: list[PathRule], default: str, path: str, method: str
) -> None:
    """For any entries and request the first matching route says what `paths.judge` says."""
    made = normalise(Rule("a.example.com", "https", path_rules=tuple(entries), path_default=default))
    (origin,) = build(made).plan.policies[1].origins
    assert origin.http is not None
    routes = list(origin_routes(origin))
    first = next(route for route in routes if _matches(route["match"], path, method))

    assert first["metadata"]["filter_metadata"]["clawker"]["reason"] == judge(origin.http, method, path).reason


def test_hosts_that_mean_this_machine_are_never_forwarded() -> None:
    """localhost and what is below it have no forwarding route, whatever a rule says."""
    resources = resources_of(build(rule("https://localhost"), rule("http://*.localhost:8080")))
    for file in ("rc_p1_tls.json", "rc_p1_plain.json"):
        text = orjson.dumps(read(resources, file)).decode()
        assert '"cluster"' not in text
