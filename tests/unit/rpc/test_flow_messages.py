"""Flow records over the wire: nothing is lost, nothing an agent wrote breaks a message."""

from __future__ import annotations

from typing import cast

import pytest

from clawker_cp._proto.clawker.control.v1 import control_pb2
from clawker_cp.errors import InvalidInput
from clawker_cp.rpc.flow_messages import event_message, filter_from, flow_message, loss_message
from clawker_cp.runtime.topics import Event
from clawker_cp.telemetry.flows import DENIED, KERNEL, Flow, Loss

FLOW = Flow(
    event_id="k-1f-2", time_unix_ns=3, container_id="c", project="p", agent="a", layer=KERNEL, verdict=DENIED,
    reason="no_route", rule_id="r-1", policy=4, proto="tcp", host="x.example", address="198.51.100.7", port=443,
    proxy_port=10000, method="GET", path="/", status=403, query_type="A", uid=1001, pid=9, sequence=10, lost_before=11,
    hook="connect4", bytes_sent=12, bytes_received=13, duration_us=14,
)  # fmt: skip


def test_a_record_goes_out_whole() -> None:
    """Every field of the record is in the message, the address as octets in network order."""
    message = control_pb2.Flow.FromString(flow_message(FLOW).SerializeToString())
    assert (message.layer, message.verdict) == (control_pb2.LAYER_KERNEL, control_pb2.FLOW_VERDICT_DENIED)
    assert message.address == bytes([198, 51, 100, 7])
    for field in FLOW.__struct_fields__:
        if field not in {"layer", "verdict", "address"}:
            assert getattr(message, field) == getattr(FLOW, field), field


@pytest.mark.parametrize(("address", "octets"), [("2001:db8::1", 16), ("", 0), ("not an address", 0)])
def test_an_address_is_four_sixteen_or_no_octets(address: str, octets: int) -> None:
    """IPv6 is sixteen, what is no address is left out."""
    assert len(flow_message(Flow(address=address)).address) == octets


def test_what_an_agent_wrote_cannot_break_a_message() -> None:
    """Lone surrogates in a path are replaced, not an error of the stream."""
    assert flow_message(Flow(path="/\udc80")).path == "/?"


def test_a_filter_is_read_by_names() -> None:
    """Verdicts and layers become the words of records; agents come in resolved."""
    message = control_pb2.FlowFilter(
        verdicts=[control_pb2.FLOW_VERDICT_DENIED], layers=[control_pb2.LAYER_KERNEL], host_suffix="x.example"
    )
    wanted = filter_from(message, ["c"])
    assert wanted.admits(FLOW)
    assert not filter_from(message, ["other"]).admits(FLOW)


@pytest.mark.parametrize(
    "message",
    [
        control_pb2.FlowFilter(protos=["carrier-pigeon"]),
        control_pb2.FlowFilter(verdicts=[control_pb2.FLOW_VERDICT_UNSPECIFIED]),
        control_pb2.FlowFilter(layers=[cast("control_pb2.Layer", 77)]),
    ],
)
def test_a_filter_that_matches_nothing_is_refused(message: control_pb2.FlowFilter) -> None:
    """An unknown word or number is an error that names the field."""
    with pytest.raises(InvalidInput, match=r"filter\."):
        filter_from(message, [])


def test_losses_and_events_go_out() -> None:
    """The counts and fields are those that were told."""
    assert loss_message(Loss("c", "subscriber", 5)) == control_pb2.Loss(container_id="c", where="subscriber", count=5)
    message = event_message(Event(1, "agent", "enrolled", "c", "p", "a", {"policy": "7"}))
    assert (message.topic, message.name, dict(message.fields)) == ("agent", "enrolled", {"policy": "7"})
