"""What the entries of the worldview say of themselves."""

from __future__ import annotations

import pytest

from clawker_cp._proto.clawker.control.v1 import control_pb2
from clawker_cp.agents.world_messages import ContainerEntry, SessionState


def test_session_states_are_those_of_the_wire() -> None:
    """A state goes into `SessionInfo` as it is."""
    wire = {name.removeprefix("SESSION_STATE_"): number for name, number in control_pb2.SessionState.items()}
    assert {state.name: state.value for state in SessionState} == wire


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        (ContainerEntry("a", project="shop", agent="dev"), "agent:shop/dev"),
        (ContainerEntry("a", agent="dev"), "agent:/dev"),
        (ContainerEntry("a", project="shop", agent="dev", is_agent=False), ""),
    ],
)
def test_an_agent_has_the_key_of_its_scope(entry: ContainerEntry, key: str) -> None:
    """A container that is none has no key, whatever its labels say."""
    assert entry.key == key
