"""Adding with merge, removing, expiring (contract 7.5)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawker_cp.firewall.effective import RuleIndex, read_rule
from clawker_cp.firewall.merge import (
    AddStatus,
    RemoveStatus,
    add,
    expire,
    merge,
    remove,
    remove_all,
    remove_ids,
    remove_scope,
)
from clawker_cp.firewall.outcomes import decide_ports
from clawker_cp.firewall.rules import PathRule, Rule
from clawker_cp.testing.plan_world import deny, rule

ADDED, MODIFIED, UNCHANGED = AddStatus.ADDED, AddStatus.MODIFIED, AddStatus.UNCHANGED


def statuses(stored: list[Rule], *incoming: Rule) -> list[AddStatus]:
    """Statuses of adding."""
    return [status for status, _ in add(stored, incoming).outcomes]


def test_absent_keys_are_added_in_order_of_arrival() -> None:
    """After what is stored."""
    found = add([rule("a.com")], [rule("c.com"), rule("b.com")])
    assert [one.dst for one in found.rules] == ["a.com", "c.com", "b.com"]
    assert found.changed


def test_an_equal_rule_is_unchanged() -> None:
    """And there is nothing to write."""
    found = add([rule("a.com")], [rule("a.com")])
    assert [status for status, _ in found.outcomes] == [UNCHANGED] and not found.changed


def test_later_rules_of_a_request_see_earlier_ones() -> None:
    """ADDED then MODIFIED then UNCHANGED."""
    assert statuses([], rule("a.com"), rule("a.com/x"), rule("a.com/x")) == [ADDED, MODIFIED, UNCHANGED]


def test_the_wildcard_and_the_name_are_different_keys() -> None:
    """So are ports and protocols."""
    assert statuses([rule("x.com")], rule("*.x.com"), rule("x.com:8443"), rule("wss://x.com")) == [ADDED] * 3


def test_the_incoming_action_wins_in_place() -> None:
    """The rule keeps its position."""
    found = add([rule("a.com"), rule("b.com")], [deny("a.com")])
    assert [(one.dst, one.action) for one in found.rules] == [("a.com", "deny"), ("b.com", "allow")]


def test_path_rules_are_a_union_by_path() -> None:
    """Incoming replaces in place, new ones are appended."""
    stored = rule("x.com", path_rules=(PathRule("/a", "allow"), PathRule("/b", "allow")))
    incoming = rule("x.com", path_rules=(PathRule("/c", "deny"), PathRule("/a", "deny", ("GET",))))
    assert merge(stored, incoming).path_rules == (
        PathRule("/a", "deny", ("GET",)),
        PathRule("/b", "allow"),
        PathRule("/c", "deny"),
    )


def test_an_incoming_path_default_wins_if_there_is_one() -> None:
    """Empty keeps the stored one."""
    stored = rule("x.com", path_default="deny")
    assert merge(stored, rule("x.com")).path_default == "deny"
    assert merge(stored, rule("x.com", path_default="allow")).path_default == "allow"


def test_the_insecure_flag_wins_in_both_directions() -> None:
    """D26: it can be taken back."""
    insecure = rule("x.com", insecure_skip_tls_verify=True)
    assert merge(rule("x.com"), insecure).insecure_skip_tls_verify
    assert not merge(insecure, rule("x.com")).insecure_skip_tls_verify


def test_our_fields_win_when_set() -> None:
    """tls, allow_private, comment."""
    stored = rule("x.com", tls="inspect", allow_private=True, comment="old", created_at=5)
    assert merge(stored, rule("x.com")) == stored
    found = merge(stored, rule("x.com", tls="passthrough", allow_private=False, comment="new", created_at=9))
    assert (found.tls, found.allow_private, found.comment, found.created_at) == ("passthrough", False, "new", 5)


@pytest.mark.parametrize(
    ("stored", "incoming", "status"),
    [
        ([rule("tcp://x.com:4242-5000")], rule("tcp://x.com:4243"), UNCHANGED),
        ([deny("tcp://x.com:4242-5000")], rule("tcp://x.com:4243"), UNCHANGED),
        ([rule("tcp://x.com:1-5"), rule("tcp://x.com:6-9")], rule("tcp://x.com:4-7"), UNCHANGED),
        ([deny("tcp://x.com:4242-5000")], deny("tcp://x.com:4243"), UNCHANGED),
        ([rule("tcp://x.com:4242-5000")], deny("tcp://x.com:4243"), ADDED),
        ([rule("tcp://x.com:4242-5000")], rule("tcp://x.com:5000-5001"), ADDED),
        ([rule("tcp://x.com:4242-5000")], rule("udp://x.com:4243"), ADDED),
        ([rule("tcp://x.com:4242-5000")], rule("tcp://*.x.com:4243"), ADDED),
        ([rule("tcp://x.com:4242-5000")], rule("tcp://x.com:4243", scope="project:p"), ADDED),
        ([rule("tcp://x.com:4242-5000", expires_at=9.0)], rule("tcp://x.com:4243"), ADDED),
        ([], deny("tcp://x.com:4243"), ADDED),
        ([rule("tcp://x.com:80")], deny("tcp://x.com:4243"), ADDED),
    ],
)
def test_an_opaque_rule_that_says_nothing_new_is_not_stored(
    stored: list[Rule], incoming: Rule, status: AddStatus
) -> None:
    """A deny of what nothing allows is never redundant."""
    assert statuses(stored, incoming) == [status]


def test_http_rules_are_never_redundant() -> None:
    """Their paths matter."""
    assert statuses([rule("*.x.com")], rule("x.com")) == [ADDED]


def test_a_grant_neither_shortens_nor_widens_a_permanent_rule() -> None:
    """They are kept apart; a second grant replaces the time of the first."""
    found = add([rule("x.com/a")], [rule("x.com/b", expires_at=50.0), rule("x.com/b", expires_at=20.0)])
    assert [(one.expires_at, [e.path for e in one.path_rules]) for one in found.rules] == [
        (0.0, ["/a"]),
        (20.0, ["/b"]),
    ]
    assert [status for status, _ in found.outcomes] == [ADDED, MODIFIED]


def test_removing_goes_by_normalised_key() -> None:
    """Case of the protocol, default port and trailing dot do not matter."""
    found = remove([rule("x.com"), rule("y.com")], "x.com.", "HTTPS", "")
    assert (found.status, [one.dst for one in found.rules]) == (RemoveStatus.REMOVED, ["y.com"])


def test_a_miss_is_not_found_and_changes_nothing() -> None:
    """Another port, another scope, another path."""
    stored = [rule("x.com/a"), rule("z.com", scope="project:p")]
    for args in (("x.com", "https", "8443"), ("z.com",), ("x.com", "", "", "/b")):
        found = remove(stored, *args)
        assert (found.status, found.rules) == (RemoveStatus.NOT_FOUND, tuple(stored))


def test_a_rule_that_others_carve_can_be_removed_as_entered() -> None:
    """D27."""
    found = remove([rule("tcp://x.com:4242-4250"), deny("tcp://x.com:4246")], "x.com", "tcp", "4242-4250")
    assert found.status is RemoveStatus.REMOVED


def test_removing_the_last_allowed_path_keeps_the_rest_denied() -> None:
    """path_default: deny is stored with it (D28)."""
    found = remove([rule("x.com/a")], "x.com", path="/a")
    assert found.status is RemoveStatus.PATH_REMOVED
    assert (found.rules[0].path_rules, found.rules[0].path_default) == ((), "deny")


PATHS = ["/a", "/b", "/a/b"]


@settings(deadline=None)
@given(
    st.lists(
        st.builds(PathRule, st.sampled_from(PATHS), st.sampled_from(["allow", "deny"])),
        min_size=1,
        max_size=3,
        unique_by=lambda entry: entry.path,
    ),
    st.sampled_from(["", "allow", "deny"]),
    st.sampled_from(PATHS),
)
def test_removing_an_allowed_path_never_widens(entries: list[PathRule], default: str, path: str) -> None:
    """No request passes afterwards that did not pass before, except those the removed deny refused."""
    from clawker_cp.firewall.effective import path_policy
    from clawker_cp.firewall.paths import judge

    before = rule("x.com", path_rules=tuple(entries), path_default=default)
    after = remove([before], "x.com", path=path).rules[0]
    removed = next((entry for entry in entries if entry.path == path), None)
    for request in ("/", "/a", "/a/b", "/b", "/c"):
        passed = [judge(path_policy([read_rule(one)]), "GET", request).allowed for one in (before, after)]
        if removed is None or removed.action == "allow" or not request.startswith(path):
            assert passed[1] <= passed[0]


def test_remove_all_takes_global_permanent_rules_only() -> None:
    """Scopes and grants stay."""
    stored = [rule("a.com"), rule("b.com", scope="project:p"), rule("c.com", expires_at=5.0)]
    found = remove_all(stored)
    assert [one.dst for one in found.rules] == ["b.com", "c.com"]
    assert remove_all(found.rules).status is RemoveStatus.NOT_FOUND


def test_removing_a_scope_takes_its_expiring_rules_too() -> None:
    """Other scopes stay."""
    stored = [rule("a.com"), rule("b.com", scope="project:p"), rule("c.com", scope="project:p", expires_at=5.0)]
    assert [one.dst for one in remove_scope(stored, "project:p").removed] == ["b.com", "c.com"]


def test_removing_by_id_lists_the_unknown_ones() -> None:
    """They are no error."""
    stored = [rule("a.com"), rule("b.com")]
    found, unknown = remove_ids(stored, [stored[0].id, "r-nothing"])
    assert ([one.dst for one in found.rules], unknown) == (["b.com"], ("r-nothing",))


def test_expired_rules_go_when_their_time_is_over() -> None:
    """Permanent ones never."""
    found = expire([rule("a.com"), rule("b.com", expires_at=5.0), rule("c.com", expires_at=6.0)], 5.0)
    assert [one.dst for one in found.removed] == ["b.com"]


OPAQUE = st.builds(
    lambda low, width, action: rule(f"tcp://x.com:{low}-{low + width}", action),
    st.integers(1, 12),
    st.integers(0, 5),
    st.sampled_from(["allow", "deny"]),
)


@settings(deadline=None)
@given(st.lists(OPAQUE, max_size=6))
def test_leaving_out_redundant_rules_changes_no_decision(rules: list[Rule]) -> None:
    """Ports allowed by what was stored = ports allowed by everything that was sent (last action per key)."""
    sent: dict[str, Rule] = {}
    for one in rules:
        sent[one.key] = one
    stored = add([], list(sent.values())).rules

    def ports(some: tuple[Rule, ...]) -> set[int]:
        outcomes = decide_ports(RuleIndex(map(read_rule, some)).candidates("x.com"))
        return {port for one in outcomes if one.left for port in range(one.low, one.high + 1)}

    assert ports(stored) == ports(tuple(sent.values()))
