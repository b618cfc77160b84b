"""Judging rules one by one (contract 7.3, bounds of 5.5)."""

from __future__ import annotations

import pytest

from clawker_cp.firewall.rules import PathRule, Rule
from clawker_cp.firewall.validate import MAX_RULES_PER_REQUEST, rule_problems, rule_warnings, validate


def problems(rule: Rule) -> list[str]:
    """Fields that are wrong."""
    return [field for field, _ in rule_problems(rule)]


def test_all_problems_of_all_rules_are_reported_at_once() -> None:
    """Each with its index and dst."""
    found = validate([Rule("ok.com"), Rule("x..y", "foo", "0", "maybe"), Rule("", path_default="no")])
    assert [(p.index, p.dst, p.field) for p in found.problems] == [
        (1, "x..y", "dst"),
        (1, "x..y", "port"),
        (1, "x..y", "proto"),
        (1, "x..y", "action"),
        (2, "", "dst"),
        (2, "", "path_default"),
    ]


@pytest.mark.parametrize("proto", ["https", "http", "ws", "wss"])
def test_a_port_range_on_an_http_protocol_is_a_problem(proto: str) -> None:
    """D24."""
    assert problems(Rule("x.com", proto, "1-2")) == ["port"]


@pytest.mark.parametrize("proto", ["htps", "icmp", "any", "quic", "HTTPS2"])
def test_an_unknown_protocol_is_a_problem(proto: str) -> None:
    """D25; the internal word for a widened deny is no protocol either."""
    assert problems(Rule("x.com", proto)) == ["proto"]


@pytest.mark.parametrize("word", ["", "allow", "deny", "Allow", "DENY"])
def test_actions_are_allow_or_deny_in_any_case(word: str) -> None:
    """Empty means allow."""
    assert problems(Rule("x.com", action=word, path_default=word, path_rules=(PathRule("/", word),))) == []


@pytest.mark.parametrize("path", ["", " ", "x", "/a b", "/a?b", "/ä", "/a#b", "~x", "~^x", "~/(", "~/(?=a)", "/a\\b"])
def test_a_path_is_a_literal_from_the_root_or_an_re2(path: str) -> None:
    """Anything else is a problem."""
    assert problems(Rule("x.com", path_rules=(PathRule(path),))) == ["path"]


@pytest.mark.parametrize("path", ["/%2e", "/a%2Fb", "/%5c", "/%00", "/%252e", "/%255C", "//", "/./a", "/a/../b"])
def test_a_literal_path_that_could_never_match_is_a_problem(path: str) -> None:
    """It is not in canonical form, and only canonical requests are judged."""
    assert problems(Rule("x.com", path_rules=(PathRule(path),))) == ["path"]


@pytest.mark.parametrize("path", ["/", "/a-b_c.d~e!$&'()*+,;=:@%20", "/.", "/.well-known", "/a/.", "~/v[0-9]+", "~^/a"])
def test_a_literal_may_end_in_the_beginning_of_a_segment(path: str) -> None:
    """Literals are open prefixes, so /. is the beginning of /.well-known."""
    assert problems(Rule("x.com", path_rules=(PathRule(path),))) == []


@pytest.mark.parametrize("method", ["GET POST", "1GET", "G.T", "-"])
def test_a_method_is_letters_and_dashes(method: str) -> None:
    """Beginning with a letter."""
    assert problems(Rule("x.com", path_rules=(PathRule("/", methods=(method,)),))) == ["method"]


def test_http_fields_on_an_opaque_protocol_are_ignored_with_a_warning() -> None:
    """Not a problem: rules of others have them."""
    rule = Rule("x.com", "tcp", "22", path_rules=(PathRule("/"),), path_default="deny", insecure_skip_tls_verify=True)
    assert problems(rule) == []
    assert [field for field, _ in rule_warnings(rule)] == ["proto"]


def test_a_top_level_wildcard_is_allowed_with_a_warning() -> None:
    """It is rarely meant."""
    assert problems(Rule(".com")) == []
    assert [field for field, _ in rule_warnings(Rule(".com"))] == ["dst"]


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (Rule("10.0.0.0/8", path_rules=(PathRule("/"),)), "path_rules"),
        (Rule("10.0.0.0/8", path_default="deny"), "path_default"),
        (Rule("10.0.0.0/8", insecure_skip_tls_verify=True), "insecure_skip_tls_verify"),
        (Rule("10.0.0.0/8", tls="inspect"), "tls"),
        (Rule("10.0.0.0/8", "ws"), "proto"),
        (Rule("10.0.0.0/8", "wss"), "proto"),
    ],
)
def test_a_network_goes_straight_through_so_nothing_of_it_can_be_read(rule: Rule, field: str) -> None:
    """HTTP-family rules on a CIDR with anything to inspect are problems."""
    assert problems(rule) == [field]


@pytest.mark.parametrize(
    "rule",
    [
        Rule("x.com", tls="passthrough", path_rules=(PathRule("/"),)),
        Rule("x.com", tls="passthrough", path_default="allow"),
        Rule("x.com", tls="passthrough", insecure_skip_tls_verify=True),
        Rule("x.com", "http", tls="passthrough"),
        Rule("x.com", "wss", tls="inspect"),
        Rule("x.com", tls="bump"),
    ],
)
def test_passthrough_goes_with_bare_https_only(rule: Rule) -> None:
    """What is not read has no paths."""
    assert problems(rule) == ["tls"]


@pytest.mark.parametrize(
    ("rule", "fine"),
    [
        (Rule("x.com", "tcp", "1-1024"), True),
        (Rule("x.com", "tcp", "1-1025"), False),
        (Rule(".x.com", "udp", "1-16"), True),
        (Rule(".x.com", "udp", "1-17"), False),
        (Rule("10.0.0.0/8", "tcp", "1-65535"), True),
        (Rule("10.0.0.1", "tcp", "1-1025"), False),
    ],
)
def test_port_ranges_that_need_listeners_are_bounded(rule: Rule, fine: bool) -> None:
    """1,024 on a name or address, 16 on a wildcard, any width on a network."""
    assert (problems(rule) == []) is fine


def test_other_bounds_hold() -> None:
    """256 path entries, 1,024 bytes of pattern, 200 characters of comment without control characters."""
    many = tuple(PathRule(f"/{number}") for number in range(257))
    assert problems(Rule("x.com", path_rules=many)) == ["path_rules"]
    assert problems(Rule("x.com", path_rules=(PathRule("/" + "a" * 1024),))) == ["path"]
    assert problems(Rule("x.com", comment="a" * 201)) == ["comment"]
    assert problems(Rule("x.com", comment="a\nb")) == ["comment"]
    assert problems(Rule("x.com", scope="nowhere")) == ["scope"]
    assert problems(Rule("x.com", expires_at=-1)) == ["expires_at"]


def test_a_request_of_too_many_rules_is_one_capacity_problem() -> None:
    """Nothing of it is judged."""
    found = validate([Rule("x.com")] * (MAX_RULES_PER_REQUEST + 1))
    assert [(p.code, p.limit) for p in found.problems] == [("CAPACITY", "rules")]
