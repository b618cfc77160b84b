"""What the entries of the worldview have in common with the wire."""

from __future__ import annotations

from clawker_cp._proto.clawker.control.v1 import control_pb2
from clawker_cp.agents.world_messages import SessionState


def test_session_states_are_those_of_the_wire() -> None:
    """A state goes into `SessionInfo` as it is."""
    wire = {name.removeprefix("SESSION_STATE_"): number for name, number in control_pb2.SessionState.items()}
    assert {state.name: state.value for state in SessionState} == wire
