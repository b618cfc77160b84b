"""Normal form, keys and ids of rules (contract 7.4), scopes (1.2)."""

from __future__ import annotations

import hashlib

import pytest

from clawker_cp.firewall.rules import (
    PathRule,
    Problem,
    Rule,
    RuleInvalid,
    normalise,
    scope_order,
    scopes_of,
    valid_scope,
)


@pytest.mark.parametrize(
    ("proto", "stored", "port"),
    [
        ("", "https", "443"),
        ("TLS", "https", "443"),
        ("HTTPS", "https", "443"),
        ("wss", "wss", "443"),
        ("http", "http", "80"),
        ("ws", "ws", "80"),
        ("SSH", "ssh", "22"),
        ("tcp", "tcp", ""),
        ("udp", "udp", ""),
    ],
)
def test_protocols_and_ports_are_stored_lower_case_with_defaults_written_out(
    proto: str, stored: str, port: str
) -> None:
    """tls and empty mean https; tcp and udp keep an empty port."""
    rule = normalise(Rule("x.com", proto))
    assert (rule.proto, rule.port) == (stored, port)


def test_methods_are_trimmed_upper_cased_unique_and_sorted() -> None:
    """Empty ones are dropped, and none left means all."""
    rule = normalise(Rule("x.com", path_rules=(PathRule(" /a ", "DENY", (" post", "GET", "get", " ")), PathRule("/b"))))
    assert rule.path_rules == (PathRule("/a", "deny", ("GET", "POST")), PathRule("/b", "allow"))


def test_dst_is_kept_as_entered_but_for_the_trailing_dot() -> None:
    """So the wildcard and the name have different keys."""
    assert normalise(Rule("x.com.")).key == "x.com:https:443"
    assert normalise(Rule(".x.com")).key == ".x.com:https:443"


def test_normalising_twice_changes_nothing() -> None:
    """A stored rule is its own normal form."""
    rule = normalise(Rule("x.com.", " TLS ", " 443 ", "ALLOW", (PathRule("/a", ""),), "Deny"))
    assert normalise(rule) == rule


def test_the_rule_id_is_the_hash_of_scope_key_and_action() -> None:
    """r- and the first 12 hex digits of SHA-256."""
    rule = normalise(Rule("x.com", scope="project:p"))
    digest = hashlib.sha256(b"project:p\nx.com:https:443\nallow").hexdigest()
    assert rule.id == "r-" + digest[:12]
    assert rule.id != normalise(Rule("x.com", scope="project:p", action="deny")).id


@pytest.mark.parametrize("scope", ["global", "project:p", "project:a.b_c-d", "agent:p/a", "agent:/a"])
def test_the_three_kinds_of_scope_are_valid(scope: str) -> None:
    """An agent's project may be empty."""
    assert valid_scope(scope)


@pytest.mark.parametrize(
    "scope", ["", "Global", "project:", "agent:a", "agent:p/", "agent:p/a/b", "project:-x", "project:a\n", "x:y"]
)
def test_other_scopes_are_not(scope: str) -> None:
    """Names begin with a letter or digit; an agent's is never empty."""
    assert not valid_scope(scope)


def test_an_agent_is_in_its_own_scope_its_projects_and_the_global_one() -> None:
    """Widest first; no project, no project scope."""
    assert scopes_of("agent:p/a") == ("global", "project:p", "agent:p/a")
    assert scopes_of("agent:/a") == ("global", "agent:/a")


def test_scopes_are_listed_global_then_projects_then_agents() -> None:
    """Each by name."""
    scopes = ["agent:a/a", "project:z", "global", "project:b"]
    assert sorted(scopes, key=scope_order) == ["global", "project:b", "project:z", "agent:a/a"]


def test_the_error_names_every_problem() -> None:
    """With index and dst, and a code for programs."""
    error = RuleInvalid([Problem(0, "x..y", "dst", "is bad"), Problem(3, "z", "port", "is worse")])
    assert str(error) == "rule 0 (x..y): dst is bad; rule 3 (z): port is worse"
    assert error.code == "RULE_INVALID"
