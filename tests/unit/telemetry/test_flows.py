"""
The shape of a record.
"""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawker_cp.telemetry.flows import DENIED, DNS, KERNEL, Flow, FlowFilter, decode, encode, encode_lines

# Order and names of the contract's `Flow` message.
FIELDS = (
    "event_id time_unix_ns container_id project agent layer verdict reason rule_id policy proto host address port "
    "proxy_port method path status query_type uid pid sequence lost_before hook bytes_sent bytes_received duration_us"
).split()


def test_fields() -> None:
    """A record has exactly the fields of the contract, in its order."""
    assert [field.name for field in msgspec.structs.fields(Flow)] == FIELDS


def test_zero_values_are_left_out() -> None:
    """Only what is known is written."""
    flow = Flow(event_id="k-1-2", layer=KERNEL, verdict=DENIED, port=443)

    assert encode(flow) == b'{"event_id":"k-1-2","layer":"LAYER_KERNEL","verdict":"FLOW_VERDICT_DENIED","port":443}'
    assert flow.as_mapping() == {
        "event_id": "k-1-2", "layer": "LAYER_KERNEL", "verdict": "FLOW_VERDICT_DENIED", "port": 443,
    }  # fmt: skip


@given(
    st.lists(
        st.builds(
            Flow, event_id=st.text(), host=st.text(), path=st.text(), port=st.integers(0, 65535),
            sequence=st.integers(0, 2**63 - 1),
        )
    )
)  # fmt: skip
def test_lines_are_read_back(flows: list[Flow]) -> None:
    """Whatever an agent puts into a name or path, a record is one line and reads back equal."""
    lines = encode_lines(flows).splitlines() if flows else []

    assert [decode(line) for line in lines] == flows


FLOW = Flow(container_id="c1", verdict=DENIED, layer=DNS, reason="not_allowed", host="a.example.com", proto="dns")


@pytest.mark.parametrize(
    ("wanted", "admitted"),
    [
        (FlowFilter(), True),
        (FlowFilter(container_ids=frozenset({"c1", "c2"})), True),
        (FlowFilter(container_ids=frozenset({"c2"})), False),
        (FlowFilter(verdicts=frozenset({DENIED}), layers=frozenset({DNS})), True),
        (FlowFilter(verdicts=frozenset({DENIED}), layers=frozenset({KERNEL})), False),
        (FlowFilter(reasons=frozenset({"budget"})), False),
        (FlowFilter(host_suffix="Example.com."), True),
        (FlowFilter(host_suffix="a.example.com"), True),
        (FlowFilter(host_suffix="ample.com"), False),
        (FlowFilter(rule_ids=frozenset({"r"})), False),
        (FlowFilter(protos=frozenset({"dns", "tcp"})), True),
    ],
)
def test_filter(wanted: FlowFilter, admitted: bool) -> None:
    """Fields AND, values within a field OR, empty = any; a suffix ends at a dot."""
    assert wanted.admits(FLOW) is admitted
