"""A token is taken from exactly one header of the exact form; anything else is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawker_cp._pure.bearer import MAX_TOKEN_BYTES
from clawker_cp.accel import presented_token
from clawker_cp.auth.bearer import bearer_token, is_token


def test_one_good_header_gives_the_token() -> None:
    """Among other metadata, the token is found as it is."""
    assert bearer_token([("user-agent", "x"), ("authorization", "Bearer a.b-c_d~e+f/g=")]) == "a.b-c_d~e+f/g="


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer ")],
        [("authorization", "bearer x")],
        [("authorization", "Basic x")],
        [("authorization", "Bearer\tx")],
        [("authorization", "Bearer x y")],
        [("authorization", " Bearer x")],
        [("authorization", "Bearer x\n")],
        [("authorization", "Bearer \u00e9")],
        [("authorization", b"Bearer x")],
        [("authorization", "Bearer x"), ("authorization", "Bearer x")],
        [("authorization", "Bearer x"), ("authorization", "")],
        [("authorization", ""), ("authorization", "Bearer x")],
        [("authorization", b""), ("authorization", "Bearer x")],
        [("authorization", "Bearer x,Bearer y")],
        [("authorization", "Bearer x\x00")],
        [("authorization", "Bearer " + "x" * 1_000_000)],
        [("authorization-bin", "Bearer x")],
        [("authorization", "Bearer " + "x" * (MAX_TOKEN_BYTES + 1))],
    ],
)
def test_anything_else_is_no_token(metadata: list[tuple[str, str | bytes]]) -> None:
    """Wrong case, several headers, blanks, control characters, other alphabets and giants are refused."""
    assert bearer_token(metadata) == ""


def test_the_longest_token_still_counts() -> None:
    """8 KiB is in."""
    token = "x" * MAX_TOKEN_BYTES
    assert bearer_token([("authorization", f"Bearer {token}")]) == token


@given(st.lists(st.tuples(st.sampled_from(["authorization", "x"]), st.text() | st.binary()), max_size=3))
def test_garbage_never_raises(metadata: list[tuple[str, str | bytes]]) -> None:
    """Whatever comes in, the answer is a printable token or nothing."""
    token = bearer_token(metadata)
    assert token == "" or (token.isascii() and token.isprintable() and " " not in token)


@given(st.text(max_size=40))
def test_what_every_call_pays_and_what_only_new_tokens_owe_are_one_rule(text: str) -> None:
    """The two steps together say what `bearer_token` says."""
    metadata = [("authorization", f"Bearer {text}")]
    presented = presented_token(metadata)
    assert presented == text
    assert bearer_token(metadata) == (presented if is_token(presented) else "")
