"""What the engine's record says of a container as an agent."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawker_cp.engines.base import AgentContainer, AgentNetwork, Publish
from clawker_cp.engines.docker.containers import describe, identity_problem, is_meant, number, unix_seconds

ID, NET = "0123456789ab" + "c" * 52, "n" * 64
NETWORK = AgentNetwork(NET, "10.231.96.0/20", "10.231.96.1", "br-x", "10.231.96.1", "10.231.96.1", "10.231.96.1")
LABELS = {
    "dev.clawker.managed": "true",
    "dev.clawker.purpose": "agent",
    "dev.clawker.project": "p",
    "dev.clawker.agent": "dev",
}


def record(**changes: Any) -> dict[str, Any]:
    return {
        "Id": ID,
        "Name": "/clawker.p.dev",
        "Path": "sh",
        "Args": ["-c", "true"],
        "State": {"Running": True, "Paused": False, "Pid": 4711, "StartedAt": "2026-11-28T01:32:59.344241069Z"},
        "Config": {"Labels": LABELS},
        "HostConfig": {},
        "NetworkSettings": {
            "Ports": {},
            "Networks": {
                "lab": {"NetworkID": "l", "IPAddress": "172.20.0.2"},
                "clawker-net": {"NetworkID": NET, "IPAddress": "10.231.104.5"},
            },
        },
        **changes,
    }


def test_running_agent_is_described() -> None:
    """Identity, address on the agents' network, process, start and command come from the record."""
    assert describe(record(), NETWORK) == AgentContainer(
        id=ID, name="clawker.p.dev", labels=LABELS, running=True, address="10.231.104.5", pid=4711,
        started_at_unix=1795829579, command=("sh", "-c", "true"),
    )  # fmt: skip


def test_stopped_container_has_neither_process_nor_address() -> None:
    """What a stopped container's record still says of them is not believed."""
    described = describe(record(State={"Running": False, "Paused": True, "Pid": 4711}), NETWORK)

    assert (described.running, described.paused, described.pid, described.address) == (False, False, 0, "")


def test_address_is_that_of_the_network_by_id_not_by_name() -> None:
    """Another network of the same name is not the agents'."""
    networks = {"clawker-net": {"NetworkID": "other", "IPAddress": "172.20.0.2"}}

    assert describe(record(NetworkSettings={"Networks": networks}), NETWORK).address == ""


def test_published_ports_are_tcp_each_pair_once() -> None:
    """IPv4 and IPv6 bindings of one port are one; UDP and nonsense are none; before the start the wish counts."""
    ports = {
        "80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8080"}, {"HostIp": "::", "HostPort": "8080"}],
        "53/udp": [{"HostPort": "53"}],
        "99/tcp": None,
        "x/tcp": [{"HostPort": "1"}],
        "70000/tcp": [{"HostPort": "1"}],
        "81/tcp": [{"HostPort": "eighty"}, None],
    }
    assert describe(record(NetworkSettings={"Ports": ports}), NETWORK).publish == (Publish(8080, 80), Publish(0, 81))
    wish = {"PortBindings": {"80/tcp": [{"HostIp": "", "HostPort": ""}]}}

    assert describe(record(NetworkSettings={}, HostConfig=wish), NETWORK).publish == (Publish(0, 80),)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 70000) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["Id", "Name", "State", "Config", "HostConfig", "NetworkSettings", "Path", "Args", "Mounts"]),
        json_values,
    )
)
def test_no_record_is_a_crash(odd: dict[str, Any]) -> None:
    """Whatever types a record has, it is described; nothing in it becomes an agent by accident."""
    described = describe({**record(), **odd}, NETWORK)

    assert described.pid >= 0
    assert all(isinstance(value, str) for value in described.labels.values())


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ({}, ""),
        ({"dev.clawker.project": ""}, ""),
        ({"dev.clawker.agent": "A.b-c_9"}, ""),
        ({"dev.clawker.agent": ""}, "agent is missing"),
        ({"dev.clawker.agent": ".dev"}, "'.dev', not a name"),
        ({"dev.clawker.agent": "a b"}, "'a b', not a name"),
        ({"dev.clawker.agent": "a\n"}, "not a name"),
        ({"dev.clawker.agent": "ü"}, "not a name"),
        ({"dev.clawker.project": "../x"}, "project is '../x', not a name"),
        ({"dev.clawker.project": "x" * 500 + "/"}, "not a name"),
    ],
)
def test_labels_that_make_no_identity_are_told(labels: dict[str, str], problem: str) -> None:
    """Agent and project have to be names of contract 1.2; the project may be empty."""
    container = describe(record(Config={"Labels": {**LABELS, **labels}}), NETWORK)
    told = identity_problem(container)

    assert problem in told
    assert bool(told) == bool(problem)
    assert len(told) < 200


def test_container_without_labels_is_no_agent() -> None:
    """Missing, null or partial labels make no agent."""
    partial, spelled = {"dev.clawker.managed": "true"}, {**LABELS, "dev.clawker.managed": "True"}
    kinds: tuple[object, ...] = (None, {}, [], partial, spelled)
    for labels in kinds:
        assert not describe(record(Config={"Labels": labels}), NETWORK).is_agent
    assert describe(record(), NETWORK).is_agent


@pytest.mark.parametrize(
    ("reference", "meant"),
    [
        (ID, True),
        (ID[:12], True),
        (ID[:11], False),
        ("clawker.p.dev", True),
        ("clawker.p", False),
        ("", False),
        ("d" * 12, False),
    ],
)
def test_reference_is_full_id_long_prefix_or_name(reference: str, meant: bool) -> None:
    """Shorter prefixes and parts of a name mean nobody."""
    assert is_meant(reference, describe(record(), NETWORK)) is meant


@pytest.mark.parametrize(
    ("stamp", "seconds"),
    [
        ("2026-11-28T01:32:59.344241069Z", 1795829579), ("2026-11-28T01:32:59Z", 1795829579),
        ("2026-11-28T02:32:59.1+01:00", 1795829579), ("0001-01-01T00:00:00Z", 0), ("", 0), ("yesterday", 0),
    ],
)  # fmt: skip
def test_stamps_become_seconds(stamp: str, seconds: int) -> None:
    """RFC 3339 with any fraction; the engine's "never" and nonsense are 0."""
    assert unix_seconds(stamp) == seconds


@pytest.mark.parametrize(
    ("value", "expected"),
    [("80", 80), (80, 80), ("", 0), ("-1", 0), (-1, 0), (True, 0), (None, 0), ("٣", 0), ("9" * 30, 0)],
)
def test_numbers_are_read_or_nothing(value: object, expected: int) -> None:
    """Decimal text and numbers above zero; anything else is 0."""
    assert number(value) == expected
