"""The rule shorthand of the command line (R36)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clawker_cp.errors import InvalidInput
from clawker_cp.firewall.documents import read_rules
from clawker_cp.firewall.effective import RuleIndex, read_rule
from clawker_cp.firewall.rules import PathRule, Rule, normalise
from clawker_cp.firewall.shorthand import (
    format_shorthand,
    format_shorthands,
    parse_rule_shorthand,
    parse_shorthands,
    shorthand_for,
)
from clawker_cp.firewall.validate import rule_problems


@pytest.mark.parametrize(
    ("text", "dst", "proto", "port"),
    [
        ("api.example.com", "api.example.com", "https", "443"),
        ("https://api.example.com", "api.example.com", "https", "443"),
        ("tls://api.example.com:8443", "api.example.com", "https", "8443"),
        ("HTTPS://api.example.com.", "api.example.com", "https", "443"),
        ("*.example.com", ".example.com", "https", "443"),
        (".example.com", ".example.com", "https", "443"),
        ("ssh://git.example.org", "git.example.org", "ssh", "22"),
        ("tcp://db.example.org:5432-5440", "db.example.org", "tcp", "5432-5440"),
        ("udp://ntp.example.org:123", "ntp.example.org", "udp", "123"),
        ("http://203.0.113.7:8080", "203.0.113.7", "http", "8080"),
        ("[2001:db8::1]", "2001:db8::1", "https", "443"),
        ("tcp://[2001:db8::1]:22", "2001:db8::1", "tcp", "22"),
        ("tcp://10.1.0.0/16:5432", "10.1.0.0/16", "tcp", "5432"),
        ("10.1.0.0/16", "10.1.0.0/16", "https", "443"),
        ("tcp://[2001:db8::]/32:1-65535", "2001:db8::/32", "tcp", "1-65535"),
        ("tcp://[2001:db8::/32]:9", "2001:db8::/32", "tcp", "9"),
    ],
)
def test_destinations_protocols_and_ports(text: str, dst: str, proto: str, port: str) -> None:
    """https is the default protocol, and each protocol has its default port."""
    rule = parse_rule_shorthand(text)
    assert (rule.dst, rule.proto, rule.port, rule.action) == (dst, proto, port, "allow")
    assert rule.path_rules == ()


@pytest.mark.parametrize(
    ("text", "path", "methods"),
    [
        ("https://x.com/", "/", ()),
        ("https://x.com/a/b", "/a/b", ()),
        ("x.com:8443/a~b:c", "/a~b:c", ()),
        ("https://x.com~/v[0-9]+/x", "~/v[0-9]+/x", ()),
        ("https://x.com:8443~/a(b|c)?", "~/a(b|c)?", ()),
        ("GET https://x.com", "/", ("GET",)),
        ("POST,GET https://x.com/a", "/a", ("GET", "POST")),
        ("https://10.0.0.1/8/x", "/8/x", ()),
        ("https://10.0.0.1:443/8", "/8", ()),
        ("https://[2001:db8::1]/a", "/a", ()),
    ],
)
def test_a_path_begins_after_the_authority(text: str, path: str, methods: tuple[str, ...]) -> None:
    """A literal prefix, or ~ and an RE2; methods stand in front."""
    assert parse_rule_shorthand(text).path_rules == (PathRule(path, "allow", methods),)


@pytest.mark.parametrize(
    ("text", "quotes"),
    [
        ("", '""'),
        ("foo://x.com", '"foo"'),
        ("x.com:", '"x.com:"'),
        ("x.com:99999", '"99999"'),
        ("tcp://x.com:9-", '"9-"'),
        ("tcp://x.com:9-8", '"9-8"'),
        ("https://x.com:1-2", '"1-2"'),
        ("10.0.0.1/8", '"10.0.0.1/8"'),
        ("2001:db8::1", '"2001:db8::1"'),
        ("[x.com]", r'"\[x.com\]"'),
        ("tcp://x.com:1/p", '"/p"'),
        ("GET tcp://x.com:1", '"GET"'),
        ("x com", '"x com"'),
        ("https://x.com/a b", '"https://x.com/a b"'),
        ("https://", '""'),
        ("x..com", '"x..com"'),
        ("X.com", '"X.com"'),
        ("https://x.com/a?b", r'"/a\?b"'),
        ("https://x.com~/(", r'"~/\("'),
        ("user@x.com", '"user@x.com"'),
        ("*", r'"\*"'),
        ("a.*.com", r'"a.\*.com"'),
    ],
)
def test_anything_else_is_an_error_that_quotes_the_part(text: str, quotes: str) -> None:
    """With the code of a bad rule and a hint."""
    with pytest.raises(InvalidInput, match="^" + quotes) as caught:
        parse_rule_shorthand(text)
    assert caught.value.code == "RULE_INVALID"
    assert caught.value.hint


def test_a_denied_path_alone_opens_nothing() -> None:
    """Its rule allows no other path either."""
    rule = parse_rule_shorthand("https://x.com/admin", "deny")
    assert (rule.action, rule.path_default) == ("allow", "deny")
    assert rule.path_rules == (PathRule("/admin", "deny"),)


def test_allowed_paths_of_one_destination_add_up() -> None:
    """As do methods of one path."""
    (rule,) = parse_shorthands(["https://x.com/a", "GET https://x.com/b", "POST https://x.com/b"], [])
    assert rule.path_rules == (PathRule("/a", "allow"), PathRule("/b", "allow", ("GET", "POST")))


def test_a_destination_allowed_as_a_whole_stays_allowed_beside_paths_of_it() -> None:
    """In either order."""
    for texts in (["https://x.com", "https://x.com/a"], ["https://x.com/a", "https://x.com"]):
        (rule,) = parse_shorthands(texts, [])
        assert rule.path_default == "allow"


def test_a_denied_path_is_laid_over_the_allow_of_the_same_name() -> None:
    """The rest of the name stays as it was."""
    (rule,) = parse_shorthands(["https://x.com"], ["https://x.com/admin"])
    assert (rule.action, rule.path_default, rule.path_rules) == ("allow", "", (PathRule("/admin", "deny"),))


def test_a_denied_path_below_an_allowed_wildcard_gets_a_copy_of_that_allow() -> None:
    """Other names of the wildcard are untouched."""
    wide, narrow = parse_shorthands(["https://*.x.com/a"], ["https://www.x.com/a/admin"])
    assert (wide.dst, wide.path_rules) == (".x.com", (PathRule("/a", "allow"),))
    assert narrow.dst == "www.x.com"
    assert narrow.path_rules == (PathRule("/a", "allow"), PathRule("/a/admin", "deny"))


def test_a_denied_path_of_nothing_allowed_is_an_error() -> None:
    """It could only be a slip."""
    with pytest.raises(InvalidInput, match=r'"y.com" .*not allowed by any other rule'):
        parse_shorthands(["https://x.com"], ["https://y.com/admin"])


def test_denied_methods_are_taken_out_of_allowed_ones() -> None:
    """And what cannot be taken out is an error, not a wider or narrower rule."""
    (rule,) = parse_shorthands(["GET,POST https://x.com"], ["POST https://x.com"])
    assert rule.path_rules == (PathRule("/", "allow", ("GET",)),)
    with pytest.raises(InvalidInput, match="every method"):
        parse_shorthands(["https://x.com/"], ["POST https://x.com/"])


def test_a_denied_name_is_a_deny_rule() -> None:
    """Beside the allow, not instead of it."""
    rules = parse_shorthands(["https://*.x.com"], ["https://evil.x.com", "tcp://10.0.0.0/8:1-65535"])
    assert [(rule.dst, rule.action) for rule in rules] == [
        (".x.com", "allow"),
        ("evil.x.com", "deny"),
        ("10.0.0.0/8", "deny"),
    ]


LABELS = st.from_regex(r"[a-z]([a-z0-9-]{0,5}[a-z0-9])?", fullmatch=True)
NAMES = st.lists(LABELS, min_size=1, max_size=4).map(".".join)
DESTINATIONS = st.one_of(
    NAMES,
    NAMES.map(lambda name: "." + name),
    st.ip_addresses().map(str),
    st.tuples(st.ip_addresses(v=4), st.integers(0, 32)).map(lambda t: str(_network(t))),
    st.tuples(st.ip_addresses(v=6), st.integers(0, 128)).map(lambda t: str(_network(t))),
)
PORTS = st.one_of(st.just(""), st.integers(1, 65535).map(str), st.integers(1, 60000).map(lambda n: f"{n}-{n + 9}"))
PATHS = st.one_of(
    st.from_regex(r"/[a-z0-9_~:-]{0,8}", fullmatch=True), st.from_regex(r"~/[a-z]{1,5}\+?", fullmatch=True)
)
ENTRIES = st.builds(
    PathRule, PATHS, st.just("allow"), st.lists(st.sampled_from(["GET", "POST", "M-SEARCH"]), max_size=2).map(tuple)
)


def _network(parts: tuple[object, int]) -> object:
    import ipaddress

    return ipaddress.ip_network(f"{parts[0]}/{parts[1]}", strict=False)


@given(
    st.builds(
        Rule,
        DESTINATIONS,
        st.sampled_from(["https", "http", "ws", "wss", "tcp", "ssh", "udp"]),
        PORTS,
        st.just("allow"),
        st.lists(ENTRIES, max_size=1).map(tuple),
    )
)
@example(Rule("203.0.113.7", "https", "443", "allow", (PathRule("/0:"),)))
@example(Rule("203.0.113.7", "https", "443", "allow", (PathRule("/8:80"),)))
@example(Rule("2001:db8::1", "https", "443", "allow", (PathRule("/1/0"),)))
def test_a_rule_written_as_shorthand_reads_back_the_same(rule: Rule) -> None:
    """For everything the shorthand has words for."""
    rule = normalise(rule)
    if rule_problems(rule) or not rule.is_http:
        rule = normalise(Rule(rule.dst, rule.proto, rule.port))
    if rule_problems(rule):
        return
    read = parse_rule_shorthand(format_shorthand(rule))
    index = [read_rule(one) for one in (rule, read)]
    assert index[0].destination == index[1].destination
    assert (read.proto, index[1].low, index[1].high, read.path_rules) == (
        rule.proto,
        index[0].low,
        index[0].high,
        rule.path_rules,
    )


@given(st.text(max_size=30))
def test_any_text_is_a_rule_or_invalid_input(text: str) -> None:
    """And what is accepted validates."""
    try:
        rule = parse_rule_shorthand(text)
    except InvalidInput:
        return
    assert rule_problems(rule) == []


def test_several_paths_are_several_shorthands() -> None:
    """Together they read back as the rule."""
    (rule,) = parse_shorthands(["https://x.com/a", "GET https://x.com/b", "GET,PUT https://x.com"], [])
    assert parse_shorthands(format_shorthands(rule), []) == (rule,)


def test_the_shorthand_for_a_refused_request() -> None:
    """Path and method only when they matter."""
    assert shorthand_for("x.com", "https", 443) == "https://x.com"
    assert shorthand_for("x.com", "https", 8443, "/a", "post") == "POST https://x.com:8443/a"
    assert shorthand_for("2001:db8::1", "tcp", 22) == "tcp://[2001:db8::1]:22"
    assert RuleIndex([read_rule(parse_rule_shorthand(shorthand_for("x.com", "udp", 53)))]).candidates("x.com")


def test_every_shorthand_of_the_manual_is_a_rule() -> None:
    """The table of docs/rules.md."""
    manual = (Path(__file__).parents[3] / "docs" / "rules.md").read_text()
    table = manual.partition("| Write | For |")[2].partition("\n\n")[0]
    written = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(written) >= 9
    for text in written:
        assert rule_problems(parse_rule_shorthand(text)) == []


def test_the_example_file_of_the_manual_reads() -> None:
    """Strictly."""
    manual = (Path(__file__).parents[3] / "docs" / "rules.md").read_text()
    (found,) = read_rules(manual.partition("```yaml\n")[2].partition("```")[0])
    assert (found.dst, found.path_default) == ("api.example.com", "deny")
