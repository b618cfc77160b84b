"""
The control plane as a box beside the agents' boxes: what one of them may take of it. No engine needed.
"""

from __future__ import annotations

import contextlib
import socket

import pytest

from clawker_cp.engines.base import RingEvent
from clawker_cp.engines.docker.own_share import OwnShare
from clawker_cp.engines.host.namespaces import in_netns
from clawker_cp.engines.host.nflog import RingLog
from clawker_cp.errors import Unavailable
from clawker_cp.testing.bridge_world import AS_CONTAINER, CP, Box, yard
from clawker_cp.testing.sandbox_world import eventually, tcp_server

pytestmark = [pytest.mark.root, pytest.mark.slow]


def begin(box: Box, count: int, port: int = 7444) -> list[socket.socket]:
    """Begin connections to the control plane, and wait for none."""

    def begun() -> list[socket.socket]:
        made = [socket.socket() for _ in range(count)]
        for one in made:
            one.setblocking(False)
            one.connect_ex((CP, port))
        return made

    return in_netns(box.netns, begun)


def reached(sockets: list[socket.socket]) -> int:
    """How many of these connections are there."""
    found = 0
    for one in sockets:
        with contextlib.suppress(OSError):
            one.getpeername()
            found += 1
    return found


async def test_one_agent_gets_sixty_four_connections_and_no_other_is_kept_out() -> None:
    """
    Whichever of the ports it takes, the rest gets no answer and is recorded as its own; the other agent and the
    host are answered meanwhile, and itself once it let go. Without the table it may have all.
    """
    events: list[RingEvent] = []
    async with yard(AS_CONTAINER) as made, contextlib.AsyncExitStack() as stack:
        cp, greedy, other = await made.ours(202), await made.agent(5), await made.agent(6)
        share = OwnShare(made.network, pid=cp.pid)
        for port in (7444, 4444):
            stack.enter_context(tcp_server("0.0.0.0", port, cp.netns))
        await share.install()
        log = RingLog(share.group, lambda _index: "", events.append, by_source=str, namespace=cp.netns)
        log.open()
        stack.callback(log.close)
        held = begin(greedy, 40) + begin(greedy, 40, 4444)
        for one in held:
            stack.callback(one.close)
        await eventually(lambda: reached(held) >= 64 and events, "64 connections and a record")
        others = [other.connect(CP, 7444), made.from_host(CP, 7444)]
        refused = greedy.connect(CP, 7444)
        counted = reached(held)
        for one in held:
            one.close()
        after = greedy.connect(CP, 7444)
        await share.install()  # as a server that starts again where it was
        await share.remove()
        await share.remove()
        unlimited = begin(greedy, 80)
        for one in unlimited:
            stack.callback(one.close)
        await eventually(lambda: reached(unlimited) == 80, "all of them")
        left = cp.sh("nft", "list", "tables")

    assert counted == 64 and refused == "TimeoutError"
    assert others == [other.address, made.network.gateway]
    assert after == greedy.address
    assert {(one.sandbox_id, one.reason, one.destination) for one in events} == {(greedy.address, "no_route", CP)}
    assert left == ""


async def test_where_it_may_not_the_cause_is_said() -> None:
    """In a namespace that is gone there is nothing to count in."""
    async with yard(AS_CONTAINER) as made:
        share = OwnShare(made.network, pid=made.box(202).pid)
    with pytest.raises(Unavailable, match="network namespace"):
        await share.install()
