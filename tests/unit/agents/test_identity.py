"""Who a caller is: every contradiction has an event of its own and one answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from clawker_cp.agents.identity import (
    AGENT_URI,
    REJECTED,
    Caller,
    Identity,
    Rejected,
    identify,
    plain_address,
    read_uri,
)
from clawker_cp.errors import Unavailable


@dataclass(frozen=True)
class Record:
    id: str = "c" * 64
    project: str = "shop"
    agent: str = "dev"


class Engine:
    """Agents by address, or an engine that cannot tell."""

    def __init__(self, found: Sequence[Record] | None, address: str = "10.0.0.2") -> None:
        self._found = found
        self._address = address

    async def running_at(self, address: str) -> Sequence[Record]:
        if self._found is None:
            raise Unavailable("the engine does not answer")
        return self._found if address == self._address else []


CALLER = Caller("clawker-clawkerd", ("https://x", f"{AGENT_URI}clawker.shop.dev"), "ab" * 32, "10.0.0.2")
ONE = Engine([Record()])


@pytest.mark.parametrize("address", ["10.0.0.2", "::ffff:10.0.0.2"])
async def test_address_record_and_certificate_agree(address: str) -> None:
    """The identity is the record's; the certificate was only compared with it."""
    assert await identify(replace(CALLER, address=address), ONE) == Identity("c" * 64, "shop", "dev")
    unowned = replace(CALLER, uris=(f"{AGENT_URI}clawker.dev",))
    assert (await identify(unowned, Engine([Record(project="")]))).project == ""


@pytest.mark.parametrize(
    ("caller", "engine", "event"),
    [
        (replace(CALLER, address="nonsense"), ONE, "agent_identity_peer_auth_missing"),
        (replace(CALLER, common_name="clawker-cli"), ONE, "agent_identity_cn_mismatch"),
        (replace(CALLER, common_name=""), ONE, "agent_identity_cn_mismatch"),
        (replace(CALLER, uris=("urn:clawker:container:c",)), ONE, "agent_identity_no_agent_san"),
        (replace(CALLER, uris=(AGENT_URI,)), ONE, "agent_identity_malformed_agent_san"),
        (CALLER, Engine([]), "agent_identity_peer_lookup_no_match"),
        (replace(CALLER, address="10.0.0.3"), ONE, "agent_identity_peer_lookup_no_match"),
        (CALLER, Engine([Record(), Record("d" * 64)]), "agent_identity_ambiguous_peer_ip"),
        (CALLER, Engine(None), "agent_identity_peer_lookup_error"),
        (CALLER, Engine([Record(agent="")]), "agent_identity_invalid_labels"),
        (CALLER, Engine([Record(agent="other")]), "agent_identity_san_label_mismatch"),
        (replace(CALLER, uris=(f"{AGENT_URI}clawker.shop.dev\u00e9",)), ONE, "agent_identity_san_label_mismatch"),
    ],
)
async def test_any_contradiction_is_refused(caller: Caller, engine: Engine, event: str) -> None:
    """The event says which, the message never does."""
    with pytest.raises(Rejected) as caught:
        await identify(caller, engine)
    assert (caught.value.event, caught.value.message) == (event, REJECTED)


def test_the_first_uri_with_the_prefix_counts() -> None:
    """Found, missing and malformed are three things."""
    assert read_uri(("a:1", "b:2", "a:3"), "a:") == "1"
    assert read_uri(("b:2",), "a:") is None
    assert read_uri(("a:", "a:3"), "a:") == ""
    assert plain_address("2001:db8::1") == "2001:db8::1"
