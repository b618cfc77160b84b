"""Path entries: canonical form, order, default (contract 7.7)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawker_cp.firewall.paths import effective_default, is_canonical, judge, ordered, path_problem
from clawker_cp.firewall.plan import PathPolicy
from clawker_cp.firewall.rules import PathRule


def policy(*entries: PathRule, default: str = "") -> PathPolicy:
    """Build the policy of one rule."""
    return PathPolicy("r-1", ordered(entries), effective_default(default, entries))


@pytest.mark.parametrize(
    ("default", "actions", "allows"),
    [
        ("", [], True),
        ("", ["allow"], False),
        ("", ["deny"], True),
        ("allow", ["allow"], True),
        ("deny", ["deny"], False),
    ],
)
def test_the_default_is_deny_if_any_entry_allows(default: str, actions: list[str], allows: bool) -> None:
    """An explicit value wins."""
    assert effective_default(default, [PathRule("/x", action) for action in actions]) is allows


@pytest.mark.parametrize(
    "path",
    [
        "/%2e/x",
        "/%2E",
        "/a%2fb",
        "/a%5Cb",
        "/%00",
        "/%252e",
        "/%252F",
        "/%255c",
        "/a%25252e",
        "/%61dmin",
        "/a%7euser",
        "/a%2Db",
        "/%2561dmin",
        "/a%0d%0ab",
        "/a%7f",
        "/%c0%ae",
        "/%ff",
        "/a%",
        "/a%4",
        "/a%zz",
        "/%u002e",
        "/a%3bx",
        "/a\\b",
        "//",
        "/a/./b",
        "/a/..",
        "/.",
    ],
)
def test_a_path_that_is_not_canonical_is_refused(path: str) -> None:
    """Whatever the entries say."""
    verdict = judge(policy(PathRule("/", "allow")), "GET", path)
    assert (verdict.allowed, verdict.reason) == (False, "path_not_canonical")


@pytest.mark.parametrize(
    "path", ["/a%20b", "/a%25", "/...", "/.well-known", "/a.b", "/a%2520b", "/%40scope", "/caf%C3%A9", "/a%c3%a9"]
)
def test_ordinary_escapes_and_dots_are_canonical(path: str) -> None:
    """Only what another parser may turn into something else is refused."""
    assert is_canonical(path, ordered([PathRule("/", "allow")]))


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("/@scope", "/%40scope"),
        ("/a:b", "/a%3Ab"),
        ("/a:b", "/a%253ab"),
        ("~/a[,+]b", "/a%2cb"),
        ("/caf%C3%A9", "/caf%c3%a9"),
    ],
)
def test_a_denied_path_is_not_reached_by_writing_it_otherwise(pattern: str, path: str) -> None:
    """What an origin decodes to a denied path is refused; without that denial the same spelling is fine."""
    denied = policy(PathRule(pattern, "deny"))
    assert judge(denied, "GET", path).reason == "path_not_canonical"
    assert judge(policy(PathRule("/other", "deny")), "GET", path.replace("%25", "%")).allowed


def test_a_pattern_that_could_never_match_is_a_problem() -> None:
    """Escapes that no canonical path has, and escapes in lower case."""
    assert "canonical" in path_problem("/%61dmin")
    assert "upper case" not in path_problem("/caf%C3%A9") and "%C3" in path_problem("/caf%c3%a9")


def test_a_semicolon_is_canonical_only_if_a_pattern_has_one() -> None:
    """Path parameters hide segments from matching."""
    assert judge(policy(PathRule("/a", "allow")), "GET", "/a;x").reason == "path_not_canonical"
    assert judge(policy(PathRule("/a;x", "allow")), "GET", "/a;x").allowed


def test_without_entries_the_path_is_not_even_read() -> None:
    """%2F works on origins without path rules."""
    assert judge(policy(), "GET", "/a%2Fb//..").allowed


def test_the_longest_pattern_is_tried_first() -> None:
    """Whatever the stored order."""
    found = policy(PathRule("/", "allow"), PathRule("/admin", "deny"), PathRule("/admin/health", "allow"))
    assert judge(found, "GET", "/admin/x").entry == "/admin"
    assert judge(found, "GET", "/admin/health").allowed
    assert judge(found, "GET", "/x").allowed


def test_at_equal_length_deny_comes_first_then_stored_order() -> None:
    """A regular expression counts with its mark."""
    found = policy(PathRule("~/a.", "allow"), PathRule("/abc", "deny"), PathRule("/ab", "allow"), default="deny")
    assert [entry.pattern for entry in found.entries] == ["/abc", "~/a.", "/ab"]


def test_a_literal_is_an_open_prefix_and_a_regex_matches_the_whole_path() -> None:
    """/repos/x also covers /repos/x-evil."""
    assert judge(policy(PathRule("/repos/x", "allow")), "GET", "/repos/x-evil").allowed
    assert not judge(policy(PathRule("~/v[0-9]+", "allow")), "GET", "/v1/x").allowed
    assert judge(policy(PathRule("~/v[0-9]+", "allow")), "GET", "/v12").allowed


def test_other_methods_fall_through_to_the_next_entry() -> None:
    """And then to the default."""
    found = policy(PathRule("/a/b", "deny", ("DELETE",)), PathRule("/a", "allow", ("GET",)))
    assert judge(found, "GET", "/a/b").allowed
    assert not judge(found, "DELETE", "/a/b").allowed
    assert judge(found, "PUT", "/a/b").other_method


def test_the_query_is_not_part_of_the_path() -> None:
    """Neither for matching nor for canonical form."""
    assert judge(policy(PathRule("~/a", "allow")), "GET", "/a?x=//..;%2e").allowed


def test_a_deny_of_one_kind_of_request_denies_all_paths() -> None:
    """With its own reason."""
    assert judge(PathPolicy("r-1", (), default_allow=False, denied=True), "GET", "/").reason == "rule_deny"


PATTERNS = st.sampled_from(["/", "/a", "/ab", "/a/b", "~/a.*", "~/.", "/b"])
POLICIES = st.lists(
    st.builds(PathRule, PATTERNS, st.sampled_from(["allow", "deny"]), st.sampled_from([(), ("GET",), ("POST",)])),
    max_size=5,
    unique_by=lambda entry: entry.path,
)


@given(POLICIES, st.sampled_from(["", "allow", "deny"]), st.text("ab/", max_size=4), st.sampled_from(["GET", "POST"]))
def test_the_decision_is_that_of_the_first_matching_entry(
    entries: list[PathRule], default: str, rest: str, method: str
) -> None:
    """Oracle: scan all entries for the best by (length, deny, position)."""
    import re

    path = "/" + rest
    if "//" in path or (not entries and default != "deny"):
        return
    best = None
    for position, entry in enumerate(entries):
        hit = re.fullmatch(entry.path[1:], path) if entry.path[0] == "~" else path.startswith(entry.path)
        if hit and (not entry.methods or method in entry.methods):
            rank = (-len(entry.path), entry.action == "allow", position)
            if best is None or rank < best[0]:
                best = (rank, entry.action == "allow")
    expected = best[1] if best else effective_default(default, entries)
    assert judge(policy(*entries, default=default), method, path).allowed is expected
