"""
The agents' network `clawker-net` and the addresses that serve agents on it (contract 1.3, ruling R2).

Created with a subnet of ours and a range that leaves the static addresses out; an existing one is
taken as it is, with the addresses that the engine assigned.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Literal

import structlog

from clawker_cp.config import NetworkSettings
from clawker_cp.engines.base import AgentNetwork
from clawker_cp.engines.docker.containers import MANAGED, networks_of, section, text
from clawker_cp.engines.docker_client import DockerClient
from clawker_cp.errors import ClawkerError, Conflict, InvalidInput

log = structlog.get_logger()

NAME = "clawker-net"
BRIDGE_OPTION = "com.docker.network.bridge.name"
_HINT = f"remove {NAME} when nothing is on it, and the next start makes it anew: docker network rm {NAME}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What an engine's network offers us: its id, bridge, IPv4 subnet and gateway."""

    id: str
    bridge: str
    subnet: IPv4Network
    gateway: IPv4Address

    def static(self, octet: int) -> IPv4Address:
        """
        The gateway's address with another last octet. Raises `Conflict` outside the subnet, or for the gateway.
        """
        address = IPv4Address((int(self.gateway) & 0xFFFFFF00) | octet)
        edges = {self.subnet.network_address, self.subnet.broadcast_address, self.gateway}
        if address not in self.subnet or address in edges:
            raise Conflict(
                f"network.octets: {address} is no free address of {self.subnet}",
                hint="choose other network.octets, or a wider network.subnet",
            )
        return address


def creation(settings: NetworkSettings) -> list[dict[str, str]]:
    """
    The IPAM entry that `clawker-net` is created with.
    """
    subnet = IPv4Network(settings.subnet)
    plan = Plan("", "", subnet, subnet.network_address + 1)
    octets = settings.octets
    fixed = []
    for octet in (octets.envoy, octets.dns, octets.cp):
        # One that does not fit matters to whom it is meant for, and is told there.
        with contextlib.suppress(Conflict):
            fixed.append(plan.static(octet))
    return [{"Subnet": str(subnet), "Gateway": str(plan.gateway), "IPRange": str(free_range(subnet, fixed))}]


def free_range(subnet: IPv4Network, fixed: list[IPv4Address]) -> IPv4Network:
    """
    The largest part of a subnet that has none of the fixed addresses, the highest of equal ones.
    """
    for length in range(subnet.prefixlen + bool(fixed), 31):
        parts = [part for part in subnet.subnets(new_prefix=length) if not any(address in part for address in fixed)]
        if parts:
            return parts[-1]
    raise InvalidInput(f"network.subnet: {subnet} is too small for agents beside the static addresses")


def read_plan(record: Mapping[str, Any]) -> Plan:
    """
    Subnet, gateway and bridge of an `inspect` answer.

    Raises `Conflict` with what is wrong and what to do: not a bridge, IPv6 only, no gateway, addresses
    that make no sense.
    """
    name, number = text(record.get("Name")) or NAME, text(record.get("Id"))
    if record.get("Driver") != "bridge":
        raise Conflict(f"{name} is a network of driver {record.get('Driver')!r}, not bridge", hint=_HINT)
    entries = section(record, "IPAM").get("Config") or []
    subnets = []
    for entry in entries if isinstance(entries, list) else []:
        try:
            subnet = ipaddress.ip_network(text(entry.get("Subnet")), strict=False)
            # Older engines write the gateway with the length of the subnet.
            gateway = text(entry.get("Gateway")).partition("/")[0]
            if isinstance(subnet, IPv4Network):
                subnets.append((subnet, IPv4Address(gateway) if gateway else None))
        except (AttributeError, ValueError) as error:
            raise Conflict(f"{name} has a subnet that cannot be read: {error}", hint=_HINT) from error
    if not subnets:
        raise Conflict(f"{name} has no IPv4 subnet: agents are served over IPv4", hint=_HINT)
    subnet, found = subnets[0]
    if found is None:
        raise Conflict(f"{name} has no gateway", hint=_HINT)
    if found not in subnet:
        raise Conflict(f"{name} has a gateway {found} outside its subnet {subnet}", hint=_HINT)
    bridge = section(record, "Options").get(BRIDGE_OPTION)
    return Plan(number, bridge if isinstance(bridge, str) and bridge else f"br-{number[:12]}", subnet, found)


def addresses(plan: Plan, *, own: IPv4Address | None, proxy: IPv4Address | None = None) -> AgentNetwork:
    """
    Who serves agents where: `own` is ours when we are a container on the network, `proxy` a sibling's.
    """
    cp = own or plan.gateway
    return AgentNetwork(
        id=plan.id,
        subnet=str(plan.subnet),
        gateway=str(plan.gateway),
        bridge=plan.bridge,
        proxy=str(proxy or cp),
        dns=str(cp),
        cp=str(cp),
    )


def fixed_address(network: AgentNetwork, octet: int) -> str:
    """
    The address with that last octet on the agents' network. Raises `Conflict` where there is none.
    """
    return str(Plan("", "", IPv4Network(network.subnet), IPv4Address(network.gateway)).static(octet))


def is_static_refused(error: ClawkerError) -> bool:
    """
    Whether the engine refused a fixed address because the network was made without a subnet (ruling R2).
    """
    return "user configured subnet" in error.message.lower()


async def ensure_network(
    client: DockerClient,
    settings: NetworkSettings,
    *,
    own_container_id: str | None,
    stack: Literal["embedded", "container"] = "embedded",
) -> AgentNetwork:
    """
    Find or make `clawker-net`, join it when we are a container, and say what serves agents where.

    With stack `container` the proxy's address is the one its container will get. Raises `Conflict` for a network
    that cannot serve (two of the name, no gateway, no IPv4, an address outside it or in use).
    """
    record = await _find_or_create(client, settings)
    plan = read_plan(record)
    proxy = plan.static(settings.octets.envoy) if stack == "container" else None
    if own_container_id is None:
        return addresses(plan, own=None, proxy=proxy)
    own = await _join(client, plan, settings.octets.cp, own_container_id)
    return addresses(plan, own=own, proxy=proxy)


async def _find_or_create(client: DockerClient, settings: NetworkSettings) -> dict[str, Any]:
    found = await client.list_networks(NAME)
    if not found:
        try:
            await client.create_network(NAME, ipam=creation(settings), labels=MANAGED)
            log.info("engines_network_created", network=NAME, subnet=settings.subnet)
        except Conflict as error:
            # Somebody else made it meanwhile, or the subnet is taken.
            if not await client.list_networks(NAME):
                raise Conflict(
                    f"network.subnet: the engine refuses {settings.subnet}: {error}",
                    hint="choose another network.subnet in control-plane.yaml",
                ) from error
        found = await client.list_networks(NAME)
    if len(found) != 1:
        ids = ", ".join(sorted(text(network.get("Id"))[:12] for network in found))
        raise Conflict(f"there are {len(found)} networks called {NAME}: {ids}", hint="remove all but one by id")
    return await client.inspect_network(text(found[0].get("Id")))


async def _join(client: DockerClient, plan: Plan, octet: int, container: str) -> IPv4Address:
    """Our own address on the network, joining it first where needed."""
    own = await _own_address(client, plan, container)
    if own is not None:
        return own
    wanted = plan.static(octet)
    try:
        await client.connect(plan.id, container, address=str(wanted))
    except InvalidInput as error:
        if not is_static_refused(error):
            raise
        log.info("engines_network_static_refused", wanted=str(wanted), cause=str(error))
        await client.connect(plan.id, container)
    own = await _own_address(client, plan, container)
    if own is None:
        raise Conflict(f"the engine joined container {container[:12]} to {NAME} without an IPv4 address", hint=_HINT)
    return own


async def _own_address(client: DockerClient, plan: Plan, container: str) -> IPv4Address | None:
    record = await client.inspect(container)
    for name, number in networks_of(record):
        if number == plan.id:
            endpoint = section(section(section(record, "NetworkSettings"), "Networks"), name)
            address = text(endpoint.get("IPAddress"))
            if address and IPv4Address(address) not in plan.subnet:
                raise Conflict(f"our address {address} is outside {plan.subnet}", hint=_HINT)
            return IPv4Address(address) if address else None
    return None
