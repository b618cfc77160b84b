"""
What the composition root decides by itself: what a request and the settings may ask for.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from clawker_cp.config import Settings, known_keys
from clawker_cp.errors import InvalidInput, Unsupported
from clawker_cp.wiring.translation import NO_RULES, adopted_request, life_request, refuse_what_is_not_offered

REQUEST = {"project": "p", "agent": "a", "argv": ["true"], "publish": [{"host_port": 0, "port": 8000}]}
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


def test_a_request_keeps_its_rules_for_an_adopting_start() -> None:
    """What a sandbox was started with is found again in its record."""
    asked = life_request({**REQUEST, "rules": "rules: [{dst: a.example}]", "learn": True})

    assert adopted_request(asked.spec) == asked
    assert life_request(REQUEST).rules == NO_RULES


@pytest.mark.parametrize("wrong", [{"rules": 7}, {"argv": 7}, {"uid": "x"}, {"mounts": [{}]}])
def test_a_malformed_request_is_refused(wrong: dict[str, object]) -> None:
    """A request of another shape is an error, not a surprise later."""
    with pytest.raises(InvalidInput):
        life_request({**REQUEST, **wrong})


def test_nothing_is_published_where_inbound_is_none() -> None:
    """With firewall.inbound none a port to publish is refused (R33)."""
    with pytest.raises(InvalidInput, match="inbound"):
        life_request(REQUEST, inbound="none")


@pytest.mark.parametrize(
    "asked",
    [
        {"fleet": {"name": "f", "endpoints": ["https://192.0.2.1:2379"]}},
        {"telemetry": {"otlp_endpoint": "https://192.0.2.1:4318"}},
    ],
    ids=str,
)
def test_what_is_not_offered_is_an_error(asked: dict[str, object]) -> None:
    """A setting for something this version does not do ends the start instead of being ignored."""
    refuse_what_is_not_offered(Settings())
    with pytest.raises(Unsupported, match="not offered"):
        refuse_what_is_not_offered(msgspec.convert(asked, Settings))


def test_every_setting_is_documented() -> None:
    """The operations page names every key there is, and says which have no effect yet."""
    text = OPERATIONS.read_text()

    assert [key for key in known_keys() if f"`{key}`" not in text and f"`{key}: " not in text] == []
