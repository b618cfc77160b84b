"""The rules files on disk (contract 7.9)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clawker_cp.errors import ClawkerError
from clawker_cp.firewall.rules import Rule
from clawker_cp.firewall.store import GLOBAL_FILE, SCOPED_FILE, RuleStore
from clawker_cp.runtime.durable import locked
from clawker_cp.testing.plan_world import rule


def put(directory: Path, *rules: Rule) -> RuleStore:
    """Write rules through a store."""
    store = RuleStore(directory)
    with store.lock():
        store.read()
        store.write(list(rules))
    return store


def test_missing_files_are_an_empty_set(tmp_path: Path) -> None:
    """And reading creates nothing."""
    assert RuleStore(tmp_path).read().rules == ()
    assert list(tmp_path.iterdir()) == []


def test_global_permanent_rules_have_a_file_of_their_own(tmp_path: Path) -> None:
    """The other reader of it knows neither scopes nor expiry."""
    rules = (rule("a.com"), rule("b.com", scope="project:p"), rule("c.com", expires_at=5e9))
    put(tmp_path, *rules)
    assert "a.com" in (tmp_path / GLOBAL_FILE).read_text()
    text = (tmp_path / SCOPED_FILE).read_text()
    assert "project:p" in text and "expires_at" in text and "a.com" not in text
    assert RuleStore(tmp_path).read().rules == rules


def test_an_unchanged_set_is_never_written(tmp_path: Path) -> None:
    """Not even with the same bytes."""
    store = put(tmp_path, rule("a.com"))
    before = os.stat(tmp_path / GLOBAL_FILE).st_ino
    assert not store.write([rule("a.com")])
    assert os.stat(tmp_path / GLOBAL_FILE).st_ino == before


def test_a_hand_edit_is_read_before_the_next_mutation(tmp_path: Path) -> None:
    """So it is never lost (D35)."""
    store = put(tmp_path, rule("a.com"))
    with (tmp_path / GLOBAL_FILE).open("a") as file:
        file.write("  - dst: hand.com # mine\n")
    stored = store.read()
    assert [one.dst for one in stored.rules] == ["a.com", "hand.com"]
    store.write([*stored.rules, rule("b.com")])
    assert "# mine" in (tmp_path / GLOBAL_FILE).read_text()
    assert [one.dst for one in RuleStore(tmp_path).read().rules] == ["a.com", "hand.com", "b.com"]


def test_what_was_written_is_not_parsed_again(tmp_path: Path) -> None:
    """The same result object comes back while the digest stays."""
    store = put(tmp_path, rule("a.com"))
    assert store.read() is store.read()


@pytest.mark.parametrize("data", [b"rules: [", b"rules: 5", b"[]", b"\xff\xfe", b"- a"])
def test_an_unreadable_file_is_never_an_empty_set(tmp_path: Path, data: bytes) -> None:
    """Rules unknown, the file untouched, and writing refused (D36)."""
    (tmp_path / GLOBAL_FILE).write_bytes(data)
    store = RuleStore(tmp_path)
    stored = store.read()
    assert GLOBAL_FILE in stored.unreadable and stored.rules == ()
    with pytest.raises(ClawkerError, match="not readable") as caught:
        store.write([rule("a.com")])
    assert caught.value.code == "RULE_STORE_WRITE"
    assert (tmp_path / GLOBAL_FILE).read_bytes() == data


def test_a_directory_in_the_files_place_is_unreadable_too(tmp_path: Path) -> None:
    """Any error of the file system but absence."""
    (tmp_path / SCOPED_FILE).mkdir()
    assert SCOPED_FILE in RuleStore(tmp_path).read().unreadable


def test_an_unreadable_file_is_repaired_by_hand_or_by_starting_over(tmp_path: Path) -> None:
    """Starting over keeps a copy."""
    (tmp_path / GLOBAL_FILE).write_bytes(b"rules: [")
    store = RuleStore(tmp_path)
    (broken,) = store.reset()
    assert broken.name.startswith(GLOBAL_FILE + ".broken-") and broken.read_bytes() == b"rules: ["
    assert store.read().unreadable == ""
    assert store.write([rule("a.com")])
    (tmp_path / GLOBAL_FILE).write_bytes(b"rules: [")
    assert store.read().unreadable
    (tmp_path / GLOBAL_FILE).write_bytes(b"rules: [{dst: b.com}]")
    assert [one.dst for one in store.read().rules] == ["b.com"]


def test_a_rule_that_does_not_hold_is_left_out_and_stays_in_the_file(tmp_path: Path) -> None:
    """The file is not rewritten, and a mutation keeps the item."""
    text = "rules:\n  - dst: a.com\n  - dst: b..com # typo\n  - dst: c.com\n    action: deny\n    proto: htps\n"
    (tmp_path / GLOBAL_FILE).write_text(text)
    store = RuleStore(tmp_path)
    stored = store.read()
    assert [one.dst for one in stored.rules] == ["a.com"]
    assert [(one.index, one.dst) for one in stored.skipped] == [(1, "b..com"), (2, "c.com")]
    assert [(one.dst, one.proto, one.action) for one in stored.closing] == [("c.com", "any", "deny")]
    assert (tmp_path / GLOBAL_FILE).read_text() == text
    store.write([rule("d.com")])
    kept = (tmp_path / GLOBAL_FILE).read_text()
    assert "# typo" in kept and "htps" in kept and "a.com" not in kept and "d.com" in kept


def test_a_lock_held_elsewhere_is_a_store_error(tmp_path: Path) -> None:
    """After the limit."""
    store = RuleStore(tmp_path, lock_timeout_s=0.1)
    held = locked(tmp_path / (SCOPED_FILE + ".lock"), 0.0)
    with held, pytest.raises(ClawkerError, match="holds the lock") as caught, store.lock():
        pass
    assert caught.value.code == "RULE_STORE_WRITE"


def test_a_failing_second_file_gives_the_first_back_what_it_had(tmp_path: Path) -> None:
    """One mutation is all or nothing."""
    store = put(tmp_path, rule("a.com"))
    before = (tmp_path / GLOBAL_FILE).read_text()
    (tmp_path / SCOPED_FILE).symlink_to(tmp_path / "nowhere" / "x")
    store.read()
    (tmp_path / SCOPED_FILE).unlink()
    (tmp_path / SCOPED_FILE).mkdir()
    (tmp_path / SCOPED_FILE / "x").write_text("")
    with pytest.raises(ClawkerError) as caught:
        store.write([rule("b.com"), rule("c.com", scope="project:p")])
    assert caught.value.code == "RULE_STORE_WRITE"
    assert (tmp_path / GLOBAL_FILE).read_text() == before
