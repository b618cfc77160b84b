"""
Any table, any destination: the program agrees with a reference written from the manual.

The universe is small (a few addresses, ports, names), so that random rows meet random questions.
"""

from __future__ import annotations

import ipaddress
import itertools
import time
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clawker_cp.ebpf.config import AgentConfig
from clawker_cp.testing.bpf_abi import ABI
from clawker_cp.testing.bpf_cases import BASE, TCP, UDP, Decisions

pytestmark = pytest.mark.root

RESERVED = ("10.231.80.0/20", "2001:db8:5::/48", "198.51.100.128/25")
ADDRESSES = (
    "203.0.113.7", "203.0.113.70", "198.51.100.1", "198.51.100.200", "127.0.0.1", "127.0.0.11", "10.231.80.1",
    "10.231.80.40", "224.0.0.5", "255.255.255.255", "::1", "2001:db8::1", "2001:db8:5::1", "64:ff9b::10.231.80.40",
    "64:ff9b::203.0.113.7", "ff02::2",
)  # fmt: skip
PREFIXES = (
    "0.0.0.0/0", "203.0.113.0/24", "203.0.113.64/26", "203.0.113.7/32", "198.51.100.0/24", "10.231.80.40/32", "::/0",
    "2001:db8::/32", "2001:db8::1/128",
)  # fmt: skip
PORTS = (53, 80, 443, 7444, 10000, 10001, 18374, 60000)
IDENTITIES = (ABI.ID_HTTP, ABI.ID_BYPASS, 300, 301, 302)
LISTENERS = (10000, 10001, 12003, 13000)
AGES = ("none", "past", "future")


@dataclass
class Tables:
    """What the maps hold; times are "none", "past" or "future"."""

    routes: dict[tuple[int, int, int], tuple[int, int, str]] = field(default_factory=dict)
    cidrs: dict[tuple[str, int], list[tuple[int, int, int, int, str]]] = field(default_factory=dict)
    listeners: set[tuple[int, int]] = field(default_factory=set)
    names: dict[str, tuple[tuple[int, ...], bool]] = field(default_factory=dict)
    bypass: str = "none"


def by_action(action: int, to: int, age: str, reason: str) -> str:
    if age == "past":
        return "denied route_expired"
    if action == ABI.ACT_PASS:
        return f"allowed {reason}"
    if action == ABI.ACT_PROXY and to:
        return f"redirected {reason} {to}"
    return "denied rule_deny"


def covering(tables: Tables, addr: str, port: int, l4: int) -> tuple[int, int, int, int, str] | None:
    address = ipaddress.ip_address(addr)
    rows = [ipaddress.ip_network(p) for p, row_l4 in tables.cidrs if row_l4 == l4]
    longest = max((n for n in rows if address in n), key=lambda n: n.prefixlen, default=None)
    if longest is None:
        return None
    spans = tables.cidrs[str(longest), l4]
    return next((span for span in spans if span[0] <= port <= span[1]), None)


def off_limits(config: AgentConfig, addr: str) -> bool:
    address = ipaddress.ip_address(addr)
    carried = None
    if address.version == 6 and address in ipaddress.ip_network("64:ff9b::/96"):
        carried = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    ours = {config.proxy_addr, config.dns_addr, config.cp_addr, config.host_addr, config.host_proxy_addr}
    reserved = [ipaddress.ip_network(p) for p in RESERVED]
    return (
        address.is_multicast
        or addr == "255.255.255.255"
        or addr in ours
        or any(a in n for n in reserved for a in (address, carried) if a is not None)
    )


def loopback(addr: str) -> bool:
    return ipaddress.ip_address(addr).is_loopback


def infrastructure(config: AgentConfig, addr: str, port: int, l4: int) -> bool:
    return l4 == TCP and addr == config.cp_addr and port in (7444, 4444, 7080)


def host_proxy(config: AgentConfig, addr: str, port: int, l4: int) -> bool:
    return l4 == TCP and (addr, port) == (config.host_proxy_addr, config.host_proxy_port)


def expected_flow(config: AgentConfig, tables: Tables, addr: str, port: int, l4: int) -> str:
    six = ":" in addr
    if port == 53:
        return "denied ipv6_unrouted" if six else "redirected dns 53"
    if addr == "127.0.0.11":
        return "denied engine_resolver"
    if loopback(addr):
        return "allowed loopback"
    if infrastructure(config, addr, port, l4):
        return "allowed infrastructure"
    if config.quarantined:
        return "denied quarantined"
    if host_proxy(config, addr, port, l4):
        return "allowed infrastructure"
    if six and not config.ipv6:
        return "denied ipv6_unrouted"
    if off_limits(config, addr):
        return "denied proxy_port" if addr == config.proxy_addr and 10000 <= port <= 31999 else "denied no_route"
    if tables.bypass == "future":
        return "bypassed bypass"
    answer = by_rule(config, tables, addr, port, l4)
    return "denied ipv6_unrouted" if six and answer.startswith("redirected") else answer


def by_rule(config: AgentConfig, tables: Tables, addr: str, port: int, l4: int) -> str:
    identities, alive = tables.names.get(addr, ((), False))
    rows = [tables.routes[i, port, l4] for i in identities if alive and (i, port, l4) in tables.routes]
    http = [r for r in rows if r[0] == ABI.ACT_PROXY and (r[1] == 10000 or 12000 <= r[1] <= 12999)]
    denies = [r for r in rows if r[0] == ABI.ACT_DENY]
    for choice in (http, denies, rows):
        if choice:
            return by_action(*choice[0], "name_route")
    span = covering(tables, addr, port, l4)
    if span:
        return by_action(span[2], span[3], span[4], "address_rule")
    if (ABI.ID_CATCH_ALL, port, l4) in tables.routes:
        return by_action(*tables.routes[ABI.ID_CATCH_ALL, port, l4], "catch_all")
    return "allowed learn" if config.learn else "denied no_route"


def expected_packet(config: AgentConfig, tables: Tables, addr: str, port: int, l4: int) -> str:
    if (addr, port) == (config.dns_addr, 53):
        return "allowed dns"
    if infrastructure(config, addr, port, l4):
        return "allowed infrastructure"
    if config.quarantined:
        return "denied quarantined"
    if host_proxy(config, addr, port, l4):
        return "allowed infrastructure"
    if addr == config.proxy_addr:
        return "allowed name_route" if (port, l4) in tables.listeners else "denied proxy_port"
    if ":" in addr and not config.ipv6:
        return "denied ipv6_unrouted"
    if loopback(addr) or off_limits(config, addr):
        return "denied no_route"
    if tables.bypass == "future":
        return "bypassed bypass"
    span = covering(tables, addr, port, l4)
    if span and span[2] != ABI.ACT_PROXY:
        return by_action(span[2], 0, span[4], "address_rule")
    return "allowed learn" if config.learn else "denied no_route"


actions = st.sampled_from([ABI.ACT_DENY, ABI.ACT_PROXY, ABI.ACT_PASS])
l4s = st.sampled_from([TCP, UDP])
ports = st.sampled_from(PORTS)
route_rows = st.dictionaries(
    st.tuples(st.sampled_from([ABI.ID_CATCH_ALL, *IDENTITIES]), ports, l4s),
    st.tuples(actions, st.sampled_from([0, *LISTENERS]), st.sampled_from(AGES)),
    max_size=12,
)
spans = st.lists(
    st.tuples(ports, ports, actions, st.sampled_from([0, *LISTENERS]), st.sampled_from(AGES)).map(
        lambda s: (min(s[:2]), max(s[:2]), *s[2:])
    ),
    min_size=1,
    max_size=ABI.SPANS,
)
tables_of = st.builds(
    Tables,
    routes=route_rows,
    cidrs=st.dictionaries(st.tuples(st.sampled_from(PREFIXES), l4s), spans, max_size=6),
    listeners=st.sets(st.tuples(st.sampled_from(LISTENERS), l4s)),
    names=st.dictionaries(
        st.sampled_from(ADDRESSES),
        st.tuples(st.lists(st.sampled_from(IDENTITIES), min_size=1, max_size=4, unique=True).map(tuple), st.booleans()),
        max_size=6,
    ),
    bypass=st.sampled_from(AGES),
)
configs = st.builds(
    replace,
    st.just(BASE),
    learn=st.booleans(),
    ipv6=st.booleans(),
    quarantined=st.sampled_from([False, False, False, True]),
    host_proxy_addr=st.just("198.51.100.1"),
    host_proxy_port=st.sampled_from([0, 18374]),
)
questions = st.lists(st.tuples(st.sampled_from(ADDRESSES), ports, l4s), min_size=1, max_size=24)
cgroups = itertools.count(1000)


def deadline(age: str) -> int:
    now = time.monotonic_ns()
    return {"none": 0, "past": now - 10**9, "future": now + 10**12}[age]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables=tables_of, config=configs, asked=questions)
def test_any_policy(kernel: Decisions, tables: Tables, config: AgentConfig, asked: list[tuple[str, int, int]]) -> None:
    """Flows and packets are decided as the manual says, for every table and destination."""
    if not config.host_proxy_port:
        config = replace(config, host_proxy_addr="")
    config = replace(config, bypass_until_ns=deadline(tables.bypass))
    kernel.next_generation()
    cgroup = next(cgroups)
    for prefix in RESERVED:
        kernel.reserve(prefix)
    for (identity, port, l4), (action, to, age) in tables.routes.items():
        kernel.route(identity, port, l4, action=action, to=to, deadline_ns=deadline(age))
    for (prefix, l4), row in tables.cidrs.items():
        kernel.cidr(prefix, [(low, high, act, to, 9, deadline(age)) for low, high, act, to, age in row], l4)
    for port, l4 in tables.listeners:
        kernel.listener(port, l4)
    for addr, (identities, alive) in tables.names.items():
        kernel.name(cgroup, addr, *identities, lives_s=600 if alive else -1)

    for addr, port, l4 in asked:
        question = f"{addr} {port} {l4}"
        flow = kernel.flow(addr, port, l4, config=config, cgroup=cgroup)
        assert (question, str(flow)) == (question, expected_flow(config, tables, addr, port, l4))
        packet = kernel.packet(addr, port, l4, config=config, cgroup=cgroup)
        assert (question, str(packet)) == (question, expected_packet(config, tables, addr, port, l4))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables=tables_of, config=configs, port=ports, l4=l4s, addr=st.sampled_from(ADDRESSES))
def test_no_flow_ends_where_packets_may_not_go(
    kernel: Decisions, tables: Tables, config: AgentConfig, addr: str, port: int, l4: int
) -> None:
    """Where both layers speak of one destination, what the hook lets go straight the backstop lets pass."""
    kernel.next_generation()
    cgroup = next(cgroups)
    config = replace(config, host_proxy_addr="" if not config.host_proxy_port else config.host_proxy_addr)
    for (prefix, row_l4), row in tables.cidrs.items():
        kernel.cidr(prefix, [(low, high, act, to, 9, deadline(age)) for low, high, act, to, age in row], row_l4)

    flow = kernel.flow(addr, port, l4, config=config, cgroup=cgroup)

    if flow.verdict == "allowed" and flow.reason != "loopback":
        assert kernel.packet(addr, port, l4, config=config, cgroup=cgroup).verdict == "allowed"
