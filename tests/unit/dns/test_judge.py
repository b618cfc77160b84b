"""
Decisions of the gate without sockets, on a clock of the test's own.
"""

from __future__ import annotations

import ipaddress

import dns.message
import dns.rrset
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawker_cp.accel import Query, parse_query
from clawker_cp.dns.judge import FORWARD, ROW_FRESH_NS, Judge, Wait
from clawker_cp.dns.resolved import read_answer
from clawker_cp.dns.settings import GateSettings
from clawker_cp.errors import Unavailable
from clawker_cp.firewall.plan import NameVerdict
from clawker_cp.testing.dns_world import FakeAgent, FakeAgents, FakeKernel, FakePolicies, RecordList

S = 1_000_000_000
CLIENT = "198.51.100.9"
ALLOWED = NameVerdict(True, rule_id="r", identity=2)


class Bench:
    """One judge with a clock that stands still until told."""

    def __init__(self) -> None:
        self.now_ns = 1000 * S
        self.agents = FakeAgents({CLIENT: FakeAgent()})
        self.policies = FakePolicies({2: {"a.example": ALLOWED, "b.example": ALLOWED}})
        self.kernel = FakeKernel()
        self.records = RecordList()
        self.judge = Judge(
            GateSettings(address="x", control_plane_address="198.51.100.2"),
            agents=self.agents,
            policies=self.policies,
            kernel=self.kernel,
            records=self.records,
            clock_ns=lambda: self.now_ns,
            wall_ns=lambda: 0,
        )

    def query(self, name: str, kind: str = "A") -> Query:
        query = parse_query(dns.message.make_query(name, kind, use_edns=0).to_wire())
        assert query is not None
        return query

    def keep(self, name: str, *addresses: str, ttl: int = 60) -> None:
        query = dns.message.make_query(name, "A")
        reply = dns.message.make_response(query)
        reply.answer.append(dns.rrset.from_text(f"{name}.", ttl, "IN", "A", *addresses))
        key = self.query(name).key
        self.judge.cache.put(key, read_answer(reply.to_wire(), key + b"\0\1", now_ns=self.now_ns))

    def ask(self, query: Query) -> bytes | Wait:
        return self.judge.answer(query, CLIENT, self.now_ns, False, 1232)


def message(reply: bytes | Wait) -> dns.message.Message:
    assert isinstance(reply, bytes)
    return dns.message.from_wire(reply)


def test_waits_are_named() -> None:
    """What is not known has to be forwarded, what has no listener to be prepared, and neither is recorded yet."""
    bench = Bench()
    assert bench.ask(bench.query("a.example")) is FORWARD
    bench.policies.exact[2]["c.example"] = NameVerdict(True, concrete=True)
    bench.policies.changed()
    wait = bench.ask(bench.query("c.example"))
    assert isinstance(wait, Wait)
    assert (wait.policy, wait.prepare) == (2, bench.policies.exact[2]["c.example"])
    assert bench.records == []


def test_expired_answers_are_asked_again() -> None:
    """After its TTL an answer is forgotten."""
    bench = Bench()
    bench.keep("a.example", "203.0.113.1", ttl=60)
    assert message(bench.ask(bench.query("a.example"))).answer
    bench.now_ns += 60 * S
    assert bench.ask(bench.query("a.example")) is FORWARD
    assert len(bench.judge.cache) == 0


def test_rows_are_refreshed() -> None:
    """Within 30 s a row is not written again, after that every answer renews its life."""
    bench = Bench()
    bench.keep("a.example", "203.0.113.1", ttl=3600)
    for step_ns, writes in ((0, 1), (ROW_FRESH_NS - 1, 1), (1, 2), (10 * S, 2)):
        bench.now_ns += step_ns
        bench.ask(bench.query("a.example"))
        assert bench.kernel.writes == writes


def test_refused_rows_are_not_taken_for_written() -> None:
    """A refused write is tried again by the next question."""
    bench = Bench()
    bench.keep("a.example", "203.0.113.1")
    bench.kernel.refusal = Unavailable("no kernel")
    assert message(bench.ask(bench.query("a.example"))).rcode() == 2
    bench.kernel.refusal = None
    assert message(bench.ask(bench.query("a.example"))).answer
    assert bench.judge.counts.kernel_refusals == 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("ask"), st.sampled_from(["a.example", "b.example"])),
            st.tuples(st.just("wait"), st.integers(1, 400)),
            st.tuples(st.just("answer"), st.sampled_from([(1, 10), (2, 100), (1, 900)])),
            st.tuples(st.just("identity"), st.integers(2, 4)),
            st.tuples(st.just("agent"), st.integers(1, 2)),
        ),
        max_size=40,
    )
)
def test_every_released_address_is_in_the_kernel(steps: list[tuple[str, object]]) -> None:
    """Whatever happens between questions, an address that left has a row that outlives it by minutes (I7)."""
    bench = Bench()
    identity = 2
    for what, value in steps:
        if what == "wait":
            assert isinstance(value, int)
            bench.now_ns += value * S // 4
        elif what == "answer":
            assert isinstance(value, tuple)
            for name in ("a.example", "b.example"):
                bench.keep(name, f"203.0.113.{value[0]}", ttl=value[1])
        elif what == "identity":
            assert isinstance(value, int)
            identity = value
            bench.policies.exact[2] = dict.fromkeys(("a.example", "b.example"), NameVerdict(True, identity=identity))
            bench.policies.changed()
        elif what == "agent":
            assert isinstance(value, int)
            bench.agents[CLIENT].cgroup_id = value
        else:
            reply = bench.ask(bench.query(str(value)))
            if isinstance(reply, Wait):
                continue
            for found in message(reply).answer:
                for rdata in found:
                    packed = bytes(10) + b"\xff\xff" + ipaddress.ip_address(rdata.address).packed
                    row = bench.kernel.rows[bench.agents[CLIENT].cgroup_id, packed]
                    assert row.expires_ns >= bench.now_ns + found.ttl * S + 200 * S


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.binary(min_size=1, max_size=63), max_size=3),
    st.integers(0, 65535),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_any_question_has_an_answer(
    labels: list[bytes], qtype: int, proxy: bool, bypassed: bool, quarantined: bool
) -> None:
    """Any name and type gives a reply that can be read, and one record, or a wait."""
    bench = Bench()
    bench.policies.below[2] = {"example": NameVerdict(True, identity=2, zone="example")}
    bench.agents[CLIENT].bypassed, bench.agents[CLIENT].quarantined = bypassed, quarantined
    name = b"".join(bytes((len(label),)) + label for label in [*labels, b"example"]) + b"\0"
    raw = bytes(5) + b"\1" + bytes(6) + name + qtype.to_bytes(2, "big") + b"\0\1"
    query = parse_query(raw)
    assert query is not None
    reply = bench.judge.answer(query, CLIENT, bench.now_ns, proxy, 512)
    if isinstance(reply, bytes):
        assert dns.message.from_wire(reply).question
        assert len(bench.records) == 1
    else:
        assert reply is FORWARD


@pytest.mark.parametrize(
    ("wait", "reason"),
    [(None, "forwarder_failed"), (FORWARD, "forwarder_failed"), (Wait(2, ALLOWED), "proxy_not_ready")],
)
def test_failures_are_answered(wait: Wait | None, reason: str) -> None:
    """What could not be waited for is SERVFAIL with its reason."""
    bench = Bench()
    reply = bench.judge.fail(bench.query("a.example"), CLIENT, wait, bench.now_ns, proxy=False, limit=512)
    assert message(reply).rcode() == 2
    assert (bench.records[-1].verdict, bench.records[-1].reason) == ("failed", reason)


def test_reserved_name_with_a_rule_has_a_row() -> None:
    """A rule for a reserved name makes its address reachable, not resolvable elsewhere."""
    bench = Bench()
    bench.policies.exact[2]["clawker-controlplane"] = NameVerdict(True, identity=300)
    bench.policies.changed()
    assert message(bench.ask(bench.query("clawker-controlplane"))).answer[0][0].address == "198.51.100.2"
    assert [row.identity for row in bench.kernel.rows.values()] == [300]


def test_records_are_numbered() -> None:
    """Event ids are unique, and the one a client is told is the record's."""
    bench = Bench()
    replies = [message(bench.ask(bench.query("evil.example"))) for _ in range(3)]
    ids = [record.event_id for record in bench.records]
    assert len(set(ids)) == 3
    assert [str(reply.options[0]).count(event) for reply, event in zip(replies, ids, strict=True)] == [1, 1, 1]
