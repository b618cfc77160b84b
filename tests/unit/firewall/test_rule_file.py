"""Rules files keep what a change does not concern (contract 7.9)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawker_cp.errors import InvalidInput
from clawker_cp.firewall.merge import merge
from clawker_cp.firewall.rule_file import RuleFile
from clawker_cp.firewall.rules import Rule
from clawker_cp.testing.plan_world import deny, rule

HAND_WRITTEN = """\
# Rules of this host.
# Ask Kim before changing them.
rules:
  # the API
  - dst: api.example.com   # production
    ticket: OPS-17
    port: 443
    path_rules:
      - path: /v1   # old clients
        action: allow
  # the database

  - dst: db.example.com
    proto: tcp
    port: '5432'
  # end of rules
owner: kim
"""


def test_a_file_reads_into_its_rules() -> None:
    """Normalised."""
    assert [one.key for one in RuleFile.parse(HAND_WRITTEN).rules] == [
        "api.example.com:https:443",
        "db.example.com:tcp:5432",
    ]


def test_an_unchanged_set_is_the_same_text() -> None:
    """Byte for byte."""
    file = RuleFile.parse(HAND_WRITTEN)
    assert file.update(file.rules).text == HAND_WRITTEN


def test_an_added_rule_comes_last_and_everything_else_stays() -> None:
    """Before the keys that follow the list."""
    file = RuleFile.parse(HAND_WRITTEN)
    text = file.update([*file.rules, rule("tcp://x.com:22")]).text
    added = '  - dst: x.com\n    proto: tcp\n    port: "22"\n    action: allow\n'
    assert text == HAND_WRITTEN.replace("owner: kim\n", added + "owner: kim\n")


def test_a_removed_rule_takes_only_its_own_lines() -> None:
    """Comments between items stay: nobody knows which item they mean."""
    file = RuleFile.parse(HAND_WRITTEN)
    text = file.update(file.rules[1:]).text
    assert "api.example.com" not in text and "OPS-17" not in text
    for kept in ("# Ask Kim", "# the API", "# the database", "# end of rules", "owner: kim", "port: '5432'"):
        assert kept in text


def test_a_modified_rule_keeps_its_comments_and_unknown_keys() -> None:
    """And the other rules their text."""
    file = RuleFile.parse(HAND_WRITTEN)
    changed = merge(file.rules[0], rule("api.example.com/v2"))
    after = file.update([changed, file.rules[1]])
    assert after.rules == [changed, file.rules[1]]
    for kept in ("# production", "ticket: OPS-17", "# old clients", "port: 443\n", "port: '5432'"):
        assert kept in after.text
    assert after.text.index("path: /v2") < after.text.index("# the database")


def test_a_turned_action_changes_the_rule_in_place() -> None:
    """Not removed and appended."""
    file = RuleFile.parse(HAND_WRITTEN)
    after = file.update([deny("https://api.example.com"), file.rules[1]])
    assert [one.action for one in after.rules] == ["deny", "allow"]
    assert "OPS-17" in after.text


def test_kept_items_stay_whatever_the_new_set_is() -> None:
    """Items that do not hold are repaired by people."""
    text = "rules:\n  - dst: bad..com # oops\n  - 5\n  - dst: a.com\n"
    file = RuleFile.parse(text)
    assert file.update([rule("b.com")], kept=frozenset({0})).text.startswith(
        "rules:\n  - dst: bad..com # oops\n  - 5\n"
    )


def test_removing_all_rules_leaves_an_empty_list() -> None:
    """That reads as one, with the other keys and the comments above."""
    file = RuleFile.parse(HAND_WRITTEN)
    after = file.update([])
    assert RuleFile.parse(after.text).rules == []
    assert after.text.startswith("# Rules of this host.\n# Ask Kim") and "owner: kim" in after.text
    again = after.update([rule("x.com")])
    assert RuleFile.parse(again.text).rules == [rule("x.com")] and "owner: kim" in again.text


@pytest.mark.parametrize(
    "text",
    [
        "rules: [{dst: a.com}, {dst: b.com, note: x}]\n",
        "rules:\n  - &a\n    dst: a.com\n  - dst: b.com\n    note: x\n",
        "rules:\n  -\n    dst: a.com\n  - {dst: b.com, note: x}\n",
        "{rules: [{dst: a.com}, {dst: b.com, note: x}]}",
        "rules:\n- dst: a.com\n- dst: b.com\n  note: x",
        "---\nrules:\n    -   dst: a.com\n    -   dst: b.com\n        note: x\n...\n",
        "rules:\r\n  - dst: a.com\r\n  - dst: b.com\r\n    note: x\r\n",
    ],
)
def test_other_layouts_are_changed_too(text: str) -> None:
    """Flow style, anchors, no indent, no newline at the end."""
    file = RuleFile.parse(text)
    assert [one.dst for one in file.rules] == ["a.com", "b.com"]
    after = file.update([file.rules[1], rule("c.com")])
    assert [one.dst for one in RuleFile.parse(after.text).rules] == ["b.com", "c.com"]
    assert "note: x" in after.text
    changed = merge(file.rules[1], rule("b.com/x"))
    assert RuleFile.parse(file.update([file.rules[0], changed]).text).rules == [file.rules[0], changed]


SETS = st.lists(
    st.builds(
        lambda name, path, action: rule(f"{name}.com{path}") if action == "allow" else deny(f"{name}.com"),
        st.sampled_from("abcdef"),
        st.sampled_from(["", "/x", "/y"]),
        st.sampled_from(["allow", "deny"]),
    ),
    max_size=5,
    unique_by=lambda one: one.key,
)


@settings(deadline=None, max_examples=60)
@given(st.lists(SETS, min_size=1, max_size=4))
def test_any_history_of_changes_reads_back_as_its_last_set(history: list[list[Rule]]) -> None:
    """Written incrementally, read from scratch."""
    file = RuleFile.parse("# head\nrules:\n  - dst: hand.com # kept\n    key: 1\nlast: 1\n")
    hand = file.rules[0]
    for rules in history:
        file = file.update([hand, *rules])
        read = RuleFile.parse(file.text)
        assert sorted(read.rules, key=lambda one: one.key) == sorted([hand, *rules], key=lambda one: one.key)
        assert "# head" in file.text and "# kept" in file.text and "last: 1" in file.text
        assert [chunk.text for chunk in read.chunks] == [chunk.text for chunk in file.chunks]


@pytest.mark.parametrize(
    "text",
    [
        "rules: [{dst: !!bool x.com}]", "rules: [{[[]]: x}]", "rules: [{dst: !!int ''}]",
        "rules:\n- {dst: x.com, port: !!omap '443'}\n", "rules:\n- &a {<<: *a}\n",
    ],
)  # fmt: skip
def test_a_file_that_the_library_stumbles_over_is_no_yaml(text: str) -> None:
    """Whatever it raises in place of its own errors, the file is refused, so that its rules count as unreadable."""
    with pytest.raises(InvalidInput, match="not YAML"):
        RuleFile.parse(text)
