"""What a rule's dst may be (contract 7.3 point 1)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawker_cp.firewall.destinations import (
    Destination,
    DestinationError,
    Kind,
    parse_destination,
    stored_destination,
)


@pytest.mark.parametrize(
    ("dst", "kind", "base", "wildcard"),
    [
        ("api.example.com", Kind.NAME, "api.example.com", False),
        ("api.example.com.", Kind.NAME, "api.example.com", False),
        (".example.com", Kind.NAME, "example.com", True),
        (".com", Kind.NAME, "com", True),
        ("localhost", Kind.NAME, "localhost", False),
        ("123-456", Kind.NAME, "123-456", False),
        ("_dmarc.example.com", Kind.NAME, "_dmarc.example.com", False),
        ("203.0.113.7", Kind.ADDRESS, "203.0.113.7", False),
        ("2001:DB8::1", Kind.ADDRESS, "2001:db8::1", False),
        ("::ffff:203.0.113.7", Kind.ADDRESS, "203.0.113.7", False),
        ("203.0.113.0/24", Kind.CIDR, "203.0.113.0/24", False),
        ("203.0.113.9/24", Kind.CIDR, "203.0.113.0/24", False),
        ("::ffff:203.0.113.0/120", Kind.CIDR, "203.0.113.0/24", False),
        ("0.0.0.0/0", Kind.CIDR, "0.0.0.0/0", False),
    ],
)
def test_names_wildcards_addresses_and_networks_are_told_apart(dst: str, kind: Kind, base: str, wildcard: bool) -> None:
    """A v4-mapped IPv6 address counts as the address it maps."""
    found = parse_destination(dst)
    assert (found.kind, found.base, found.wildcard) == (kind, base, wildcard)


@pytest.mark.parametrize(
    ("dst", "says"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        (".", "nothing but dots"),
        ("..", "nothing but dots"),
        ("API.example.com", "upper-case"),
        ("a b.com", "characters other than"),
        ("bücher.de", "characters other than"),
        ("a..b", "empty label"),
        ("..a.com", "empty label"),
        ("-a.com", 'label "-a"'),
        ("a-.com", 'label "a-"'),
        ("a" * 64 + ".com", "longer than 63"),
        ("a." * 126 + "ab", "longer than 253"),
        ("123.456", "only digits"),
        ("1.2.3.4.5", "only digits"),
        (".203.0.113.7", "cannot begin with a dot"),
        (".10.0.0.0/8", "cannot begin with a dot"),
        ("*.example.com", "characters other than"),
        ("fe80::1%eth0", "characters other than"),
        ("10.0.0.0/33", "characters other than"),
    ],
)
def test_a_bad_destination_is_refused_with_what_is_wrong(dst: str, says: str) -> None:
    """Upper case is a problem of its own."""
    with pytest.raises(DestinationError, match=says):
        parse_destination(dst)


@given(st.one_of(st.text(max_size=40), st.from_regex(r"\.?[a-z0-9.:/-]{1,40}\.?", fullmatch=True)))
def test_any_text_is_a_destination_or_a_destination_problem(dst: str) -> None:
    """Nothing else is raised, and what is accepted means the same with the trailing dot gone."""
    try:
        found = parse_destination(dst)
    except DestinationError:
        return
    assert isinstance(found, Destination)
    assert parse_destination(stored_destination(dst)) == found
