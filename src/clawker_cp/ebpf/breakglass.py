"""
Writing the pinned maps when the control plane cannot: what `ebpf-manager` changes (I8).

Everything here errs closed: a row that is taken away denies, a row that is written has been checked.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from clawker_cp._fast import bpfmap, layout
from clawker_cp.ebpf.config import AgentConfig, mapped, mapped_prefix
from clawker_cp.ebpf.pins import Pins
from clawker_cp.errors import Conflict, InvalidInput, NotFound

MAX_U32 = 2**32 - 1
MAX_TTL_S = 86400
ACTIONS = {"deny": 0, "proxy": 1}
TRANSPORTS = {"tcp": 6, "udp": 17}
ROUTE_FIELDS = ("policy", "identity", "port", "l4", "action", "proxy_port")
FROM_OPERATOR = 1  # a name row's source: outranks what DNS said


@dataclass(frozen=True, slots=True)
class Route:
    """One route row as it is written."""

    policy: int
    identity: int
    port: int
    l4: int
    action: int
    proxy_port: int


def enable(pins: Pins, cgroup_id: int, policy: int) -> AgentConfig:
    """
    Enrol a cgroup under a policy, with the addresses that the other agents have.

    Raises `NotFound` when there is no other agent to take them from.
    """
    _check_policy(policy)
    rows = pins.rows("container_map")
    known = {int.from_bytes(key, "little"): AgentConfig.unpack(row) for key, row in rows}
    if cgroup_id in known:
        return pins.change(cgroup_id, policy=policy)
    if not known:
        raise NotFound(
            "no agent is enrolled whose gateway addresses could be taken over",
            hint="start the control plane: it enrols by itself",
        )
    like = next(iter(known.values()))
    config = AgentConfig(
        policy=policy,
        proxy_addr=like.proxy_addr,
        dns_addr=like.dns_addr,
        cp_addr=like.cp_addr,
        host_addr=like.host_addr,
        cp_agent_port=like.cp_agent_port,
        cp_token_port=like.cp_token_port,
        cp_health_port=like.cp_health_port,
    )
    key = cgroup_id.to_bytes(8, "little")
    with _opened(pins, "state_map") as states:
        if states.get(key) is None:
            states.put(key, layout.empty_state())
    with _opened(pins, "container_map") as containers:
        containers.put(key, config.pack())
    return config


def disable(pins: Pins, cgroup_id: int) -> None:
    """
    Take an agent's row away: from then on everything of it is denied, `not_enrolled`. Raises `NotFound`.
    """
    with _opened(pins, "container_map") as containers:
        if not containers.delete(cgroup_id.to_bytes(8, "little")):
            raise NotFound(f"cgroup {cgroup_id} is not enrolled", hint="`ebpf-manager dump-containers` lists them")


def read_routes(document: Any) -> list[Route]:
    """
    Read a list of route rows; raises `InvalidInput` naming index and field of everything that is wrong.
    """
    if not isinstance(document, list):
        raise InvalidInput("routes: has to be a JSON list of objects")
    routes, wrong = [], []
    for index, item in enumerate(document):
        problems = list(_route_problems(item))
        wrong += [f"routes[{index}].{problem}" for problem in problems]
        if not problems:
            routes.append(
                Route(
                    item["policy"], item["identity"], item["port"], TRANSPORTS[item["l4"]], ACTIONS[item["action"]],
                    item.get("proxy_port", 0),
                )
            )  # fmt: skip
    if wrong:
        raise InvalidInput("; ".join(wrong))
    return routes


def sync_routes(pins: Pins, routes: Iterable[Route]) -> tuple[int, int]:
    """
    Make the routes of the present generation equal to these; returns how many were written and removed.

    Proxy ports are admitted before the rows that lead to them, and rows go before anything else.
    """
    control = pins.rows("control")
    if not control:
        raise NotFound(f"nothing is pinned at {pins.directory}")
    generation = int(layout.unpack_control(control[0][1])["generation"])
    wanted = {layout.pack_route_key(generation, one.policy, one.identity, one.port, one.l4): one for one in routes}
    with _opened(pins, "proxy_port_map") as ports:
        for one in wanted.values():
            if one.proxy_port:
                ports.put(
                    layout.pack_proxy_port(generation, one.policy, one.proxy_port, one.l4), (1).to_bytes(4, "little")
                )
    with _opened(pins, "route_map") as table:
        present = [key for key in table.all_keys() if layout.unpack_route_key(key)[0] == generation]
        for key, one in wanted.items():
            table.put(key, layout.pack_route_value(one.action, one.proxy_port, MAX_U32, 0))
        gone = [key for key in present if key not in wanted]
        for key in gone:
            table.delete(key)
    return len(wanted), len(gone)


def update_dns(pins: Pins, cgroup_id: int, address: str, identity: int, ttl_s: int) -> None:
    """
    Tell the kernel, for a time, which name identity an address has for an agent.

    Raises `InvalidInput` for an address that no rule may open (R12), `NotFound` for an unknown agent.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError as error:
        raise InvalidInput(f"address: {error}") from error
    if not 256 <= identity <= MAX_U32:
        raise InvalidInput(f"identity: {identity} is not a name's (256 to {MAX_U32})")
    if not 1 <= ttl_s <= MAX_TTL_S:
        raise InvalidInput(f"ttl: {ttl_s} is not 1 to {MAX_TTL_S}")
    reserved = {key for key, _ in pins.rows("reserved_map")}
    network = ipaddress.ip_network(address)
    covers = [network.supernet(new_prefix=length) for length in range(network.max_prefixlen + 1)]
    if any(layout.pack_reserved(*mapped_prefix(one)) in reserved for one in covers):
        raise Conflict(f"address: {parsed} is reserved, nothing opens it")
    if cgroup_id not in {row["cgroup_id"] for row in pins.containers()}:
        raise NotFound(f"cgroup {cgroup_id} is not enrolled")
    expires = time.monotonic_ns() + ttl_s * 1_000_000_000
    with _opened(pins, "dns_cache") as names:
        names.put(*layout.pack_name(cgroup_id, mapped(address), (identity,), expires, FROM_OPERATOR))


def collect_names(pins: Pins) -> int:
    """
    Remove learnt addresses whose time is over; returns how many.
    """
    now, removed = time.monotonic_ns(), 0
    with _opened(pins, "dns_cache") as names:
        for key, value in names.items():
            if layout.unpack_name(key, value)[3] < now:
                removed += names.delete(key)
    return removed


class _opened:  # noqa: N801 - reads as the verb it is
    """A pinned map that is closed at the end of a block."""

    def __init__(self, pins: Pins, name: str) -> None:
        self._map = pins.open(name)

    def __enter__(self) -> bpfmap.BpfMap:
        return self._map

    def __exit__(self, *_: object) -> None:
        self._map.close()


def _check_policy(policy: int) -> None:
    if not 1 <= policy <= MAX_U32:
        raise InvalidInput(f"policy: {policy} is not a policy number")


def _route_problems(item: Any) -> Iterable[str]:
    if not isinstance(item, Mapping):
        yield "has to be an object"
        return
    unknown = sorted(set(item) - set(ROUTE_FIELDS))
    if unknown:
        yield f"{unknown[0]}: there is no such field"
    for field, low, high in (
        ("policy", 1, MAX_U32),
        ("identity", 1, MAX_U32),
        ("port", 1, 65535),
        ("proxy_port", 0, 65535),
    ):
        value = item.get(field, 0 if field == "proxy_port" else None)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            yield f"{field}: {value!r} is not {low} to {high}"
    if item.get("l4") not in TRANSPORTS:
        yield f"l4: {item.get('l4')!r} is not tcp or udp"
    if item.get("action") not in ACTIONS:
        yield f"action: {item.get('action')!r} is not deny or proxy"
    if item.get("action") == "proxy" and not item.get("proxy_port"):
        yield "proxy_port: is needed for the action proxy"
