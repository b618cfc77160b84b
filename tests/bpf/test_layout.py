"""What Python writes and reads lies where the compiler of the programs put it."""

from __future__ import annotations

import re
import struct

import pytest

from clawker_cp._fast import events, layout
from clawker_cp._pure import events as pure_events
from clawker_cp.ebpf.config import AgentConfig, mapped
from clawker_cp.testing.bpf_abi import ABI, OBJECTS, REASONS, Layout, layouts, root

ADDR = mapped("203.0.113.7")


@pytest.fixture(scope="module")
def described() -> dict[str, Layout]:
    return layouts(OBJECTS / "decide.bpf.o")


def check(layout: Layout, row: bytes, **expected: int | bytes) -> None:
    assert len(row) == layout.size
    assert {name: layout.read(row, name) for name in expected} == expected


def test_config(described: dict[str, Layout]) -> None:
    """Every field of an agent's row is read where it was written, and no byte else is set."""
    row = AgentConfig(
        policy=0x01020304, proxy_addr="203.0.113.1", dns_addr="203.0.113.2", cp_addr="203.0.113.3",
        host_addr="203.0.113.4", host_proxy_addr="203.0.113.5", cp_agent_port=0x1111, cp_token_port=0x2222,
        cp_health_port=0x3333, host_proxy_port=0x4444, learn=True, ipv6=True, quarantined=True,
        bypass_until_ns=0x0102030405060708,
    ).pack()  # fmt: skip

    check(
        described["clawker_config"], row, policy=0x01020304, proxy_addr=mapped("203.0.113.1"),
        dns_addr=mapped("203.0.113.2"), cp_addr=mapped("203.0.113.3"), host_addr=mapped("203.0.113.4"),
        host_proxy_addr=mapped("203.0.113.5"), cp_agent_port=0x1111, cp_token_port=0x2222, cp_health_port=0x3333,
        host_proxy_port=0x4444, bypass_until_ns=0x0102030405060708,
        flags=ABI.F_QUARANTINE | ABI.F_LEARN | ABI.F_IPV6 | ABI.F_HOST_PROXY,
    )  # fmt: skip


def test_names(described: dict[str, Layout]) -> None:
    """A learnt address: agent and address are the key, identities newest first the value."""
    key, value = layout.pack_name(0x0102030405060708, ADDR, (11, 12, 13, 14), 99, 2)

    check(described["clawker_name_key"], key, cgroup_id=0x0102030405060708, addr=ADDR)
    check(
        described["clawker_name_value"], value, identities=struct.pack("<4I", 11, 12, 13, 14), expires_ns=99, source=2
    )


def test_routes(described: dict[str, Layout]) -> None:
    """A route row and a proxy port row."""
    check(
        described["clawker_route_key"], layout.pack_route_key(1, 2, 3, 4, 6), generation=1, policy=2, identity=3,
        port=4, l4=6,
    )  # fmt: skip
    check(
        described["clawker_route_value"], layout.pack_route_value(1, 2, 3, 4), action=1, proxy_port=2, rule=3,
        deadline_ns=4,
    )  # fmt: skip
    check(described["clawker_proxy_port_key"], layout.pack_proxy_port(1, 2, 3, 6), generation=1, policy=2, port=3, l4=6)


def test_prefixes(described: dict[str, Layout]) -> None:
    """Prefix keys are network order, so that the trie compares generation, policy, protocol, address."""
    key = layout.pack_cidr_key(0x01020304, 0x05060708, 6, ADDR, 120)
    six = layout.pack_cidr_key(1, 2, 6, mapped("2001:db8::"), 32)
    value = layout.pack_spans([(1, 2, 1, 3, 4, 5)])
    span = described["clawker_span"]

    check(
        described["clawker_cidr_key"], key, prefixlen=72 + 120, generation_be=0x04030201, policy_be=0x08070605, l4=6,
        addr=ADDR,
    )  # fmt: skip
    check(described["clawker_cidr_key"], six, prefixlen=72 + 32, l4=6 | ABI.CIDR_IPV6, addr=mapped("2001:db8::"))
    assert len(value) == described["clawker_cidr_value"].size == ABI.SPANS * span.size
    check(span, value[: span.size], low=1, high=2, action=1, proxy_port=3, rule=4, deadline_ns=5)
    unused = value[span.size : 2 * span.size]
    low, high = span.read(unused, "low"), span.read(unused, "high")
    assert isinstance(low, int) and isinstance(high, int) and low > high
    check(described["clawker_reserved_key"], layout.pack_reserved(ADDR, 120), prefixlen=120, addr=ADDR)


def test_switches(described: dict[str, Layout]) -> None:
    """The control row and the published ports."""
    check(
        described["clawker_control"], layout.pack_control(7, 1, (2, 3, 4), 5), abi=ABI.ABI_VERSION, generation=7,
        enforce=1, budget=struct.pack("<3I", 2, 3, 4), wakeup=5,
    )  # fmt: skip
    check(described["clawker_inbound_key"], layout.pack_inbound(9, 80), cgroup_id=9, port=80)


def test_sizes_of_maps(described: dict[str, Layout]) -> None:
    """The bridge's idea of every key and value size is the compiler's."""
    of = {name: layout.size for name, layout in described.items()}

    assert layout.SIZES == {
        "container_map": (8, of["clawker_config"]),
        "dns_cache": (of["clawker_name_key"], of["clawker_name_value"]),
        "route_map": (of["clawker_route_key"], of["clawker_route_value"]),
        "cidr_map": (of["clawker_cidr_key"], of["clawker_cidr_value"]),
        "proxy_port_map": (of["clawker_proxy_port_key"], 4),
        "reserved_map": (of["clawker_reserved_key"], 4),
        "inbound_map": (of["clawker_inbound_key"], 4),
        "state_map": (8, of["clawker_state"]),
        "metrics_map": (of["clawker_metric_key"], 8),
        "error_map": (4, 8),
        "control": (4, of["clawker_control"]),
        "events": (0, 0),
    }


def test_records(described: dict[str, Layout]) -> None:
    """Both decoders give every field of a record its own value, in the order of the header."""
    layout = described["clawker_event"]
    row = bytearray(layout.size)
    expected: list[int | bytes] = []
    for number, (name, field) in enumerate(layout.fields.items(), 1):
        if name != "pad":
            value = bytes([number] * field.size)
            row[field.offset : field.offset + field.size] = value
            expected.append(value if field.size == 16 else int.from_bytes(value, "little"))

    assert [tuple(expected)] == events.decode_events(bytes(row)) == pure_events.decode_events(bytes(row))


def test_reasons_are_those_of_the_contract() -> None:
    """The kernel's names of reasons, which the wire contract repeats; append-only."""
    assert REASONS == {
        0: "none", 1: "not_enrolled", 2: "quarantined", 3: "engine_resolver", 4: "no_route", 5: "rule_deny",
        6: "route_expired", 7: "family", 8: "protocol", 9: "ipv6_unrouted", 10: "ip_options", 11: "socket_option",
        12: "fragment", 13: "inbound", 14: "proxy_port", 15: "map_full", 16: "config_missing", 17: "malformed",
        64: "bypass", 65: "dns", 66: "loopback", 67: "infrastructure", 68: "address_rule", 69: "name_route",
        70: "catch_all", 71: "learn", 72: "inbound_reply",
    }  # fmt: skip


def test_the_manual_names_every_map_and_program() -> None:
    """docs/bpf.md lists exactly the maps of maps.h and the programs of hooks/."""
    manual = (root() / "docs/bpf.md").read_text()
    maps = set(re.findall(r"^\} (\w+) SEC\(\"\.maps\"\)", (root() / "bpf/maps.h").read_text(), re.M))
    hooks = "".join(path.read_text() for path in sorted((root() / "bpf/hooks").glob("*.h")))
    programs = set(re.findall(r"^int (clawker_\w+)\(", hooks, re.M))

    assert set(re.findall(r"^\| `(\w+)` \| ", manual, re.M)) == maps | programs
