"""Rules as documents (contract 7.1, R37)."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawker_cp.errors import InvalidInput
from clawker_cp.firewall.documents import emit_rules, parse_yaml, read_rules, read_rules_file, scalar
from clawker_cp.firewall.rules import PathRule, Rule, RuleInvalid, normalise
from clawker_cp.firewall.validate import rule_problems


def test_a_document_of_every_field_reads() -> None:
    """Ports may be numbers, times are RFC 3339."""
    (found,) = read_rules(
        """
rules:
  - dst: x.com.
    proto: TLS
    port: 8443
    action: Allow
    path_rules:
      - path: /a
        action: allow
        methods: [get, POST]
    path_default: deny
    insecure_skip_tls_verify: true
    tls: inspect
    allow_private: true
    comment: why
    source: admin
    created_at: 2026-01-02T03:04:05Z
    scope: agent:p/a
    expires_at: "2026-01-02T03:04:05.5+00:00"
"""
    )
    assert found == Rule(
        "x.com", "https", "8443", "allow", (PathRule("/a", "allow", ("GET", "POST")),), "deny", True, "inspect", True,
        "why", "admin", 1767323045, "agent:p/a", 1767323045.5,
    )  # fmt: skip


def test_the_scope_of_a_rule_without_one_is_the_readers() -> None:
    """The run's own agent."""
    one, two = read_rules("rules: [{dst: a.com}, {dst: b.com, scope: 'project:p'}]", scope="agent:p/a")
    assert (one.scope, two.scope) == ("agent:p/a", "project:p")


@pytest.mark.parametrize("text", ["", "# nothing\n", "rules:\n", "rules: []\n", "{}"])
def test_an_empty_document_is_an_empty_set(text: str) -> None:
    """Also without the key."""
    assert read_rules(text) == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rules: [", r"not YAML: .*line 1"),
        ("- dst: x.com", "mapping with the key"),
        ("rules: 5", '"rules" has to be a list'),
        ("a: &x [*x]\nrules: x", '"rules" has to be a list'),
        ("rules: !!python/object:os.system []", "not YAML"),
        ("\x00", "not YAML"),
        ("rules: [{dst: !!bool x.com}]", "not YAML"),
        ("rules: [{[[]]: x}]", "not YAML"),
        ("rules: [{dst: !!int ''}]", "not YAML"),
    ],
)
def test_a_document_of_another_shape_is_refused(text: str, says: str) -> None:
    """With what it should be, and where."""
    with pytest.raises(InvalidInput, match=says):
        read_rules(text)


def test_unknown_keys_wrong_types_and_bad_values_are_reported_together() -> None:
    """With index, field and what would be right."""
    with pytest.raises(RuleInvalid) as caught:
        read_rules(
            """
version: 1
rules:
  - {dst: x.com, ports: 443}
  - {dst: [x.com], port: 4.5, insecure_skip_tls_verify: 1}
  - text
  - {dst: y.com, port: 70000, path_rules: [{path: x, verb: GET}, 5]}
  - {dst: z..com, expires_at: tomorrow}
  - {dst: q..com, proto: smtp}
"""
        )
    assert [(problem.index, problem.field) for problem in caught.value.problems] == [
        (-1, "version"),
        (0, "ports"),
        (1, "dst"),
        (1, "port"),
        (1, "insecure_skip_tls_verify"),
        (2, "rule"),
        (3, "path_rules[0].verb"),
        (3, "path_rules[1]"),
        (4, "expires_at"),
        (5, "dst"),
        (5, "proto"),
    ]


def test_a_few_lines_of_aliases_do_not_become_gigabytes() -> None:
    """A list of lists that aliases make is refused by its kind; nobody writes it out."""
    names = [f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20)]
    text = "rules:\n" + "".join(f"- {name}\n" for name in ["&a0 [x]", *names])
    with pytest.raises(InvalidInput) as refused:
        read_rules(text)

    assert "rule has to be a mapping, is a list" in str(refused.value)


def test_half_a_character_is_no_text() -> None:
    """What could never be written down again is refused with its field."""
    with pytest.raises(InvalidInput, match="comment holds half a character"):
        read_rules('rules: [{dst: x.com, comment: "\\ud800"}]')


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Missing, a directory, not text, without an end."""
    (tmp_path / "latin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("missing", ".", "latin", "endless"):
        with pytest.raises(InvalidInput, match="rules file"):
            read_rules_file(tmp_path / name)


TEXT = st.text(max_size=20)
RULES = st.builds(
    Rule,
    st.sampled_from(["x.com", ".x.com", "10.0.0.0/8", "2001:db8::1", "1e5.com", "no.com", "0.0.0.0"]),
    st.sampled_from(["https", "http", "tcp", "udp", "ssh", "wss"]),
    st.sampled_from(["", "443", "1-9"]),
    st.sampled_from(["allow", "deny"]),
    st.lists(st.builds(PathRule, st.sampled_from(["/", "/a", "~/a\\.b", "/a:b"]), st.just("deny")), max_size=2).map(
        tuple
    ),
    st.sampled_from(["", "allow"]),
    st.booleans(),
    st.sampled_from(["auto", "inspect"]),
    st.sampled_from([None, True, False]),
    TEXT,
    st.sampled_from(["", "admin"]),
    st.integers(0, 2**31),
    st.sampled_from(["global", "project:p", "agent:/a"]),
    st.sampled_from([0.0, 1767323045.0, 1767323045.25]),
)


@settings(deadline=None)
@given(st.lists(RULES, max_size=4))
def test_what_is_emitted_reads_back_the_same(rules: list[Rule]) -> None:
    """For every rule that validates, whatever its comment."""
    valid = [normalise(one) for one in rules if not rule_problems(one)]
    assert list(read_rules(emit_rules(valid))) == valid


@settings(deadline=None)
@given(TEXT)
def test_a_scalar_reads_back_as_the_same_text(text: str) -> None:
    """Also words that YAML takes for something else."""
    assert parse_yaml("a: " + scalar(text)) == {"a": text}


@settings(deadline=None, max_examples=200)
@given(st.one_of(TEXT, st.text("rules: -\n{}[]&*!'\"#dst.com", max_size=40)))
def test_any_text_is_rules_or_invalid_input(text: str) -> None:
    """Never another exception."""
    with contextlib.suppress(InvalidInput):
        read_rules(text)
