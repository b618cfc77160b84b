"""Counts of tokens, by labels of ours only."""

from __future__ import annotations

from typing import Any

import pytest

from clawker_cp.auth.tally import TokenTally


@pytest.mark.parametrize(
    ("status", "body", "issued", "refused"),
    [
        (200, {"scope": "admin"}, {"clawker-cli": 1}, {}),
        (200, b'{"scope":"agent:self:register"}', {"clawker-agent": 1}, {}),
        (200, {"scope": "made up"}, {"other": 1}, {}),
        (200, b"no json", {"other": 1}, {}),
        (401, {"error": "invalid_client"}, {}, {"invalid_client": 1}),
        (503, b'{"error":"temporarily_unavailable"}', {}, {"temporarily_unavailable": 1}),
        (400, {"error": "made up"}, {}, {"other": 1}),
        (400, {"error": None}, {}, {"other": 1}),
        (500, b"[]", {}, {"other": 1}),
        (500, b'{"error":"' + b"x" * 70_000 + b'"}', {}, {"other": 1}),
        (500, None, {}, {"other": 1}),
    ],
)
def test_an_answer_is_counted_by_what_it_says(status: int, body: Any, issued: Any, refused: Any) -> None:
    """Clients by their scope, refusals by their code; whatever else somebody may put there is one label."""
    tally = TokenTally()
    tally.count(status, body)

    assert (dict(tally.issued), dict(tally.refused)) == (issued, refused)
