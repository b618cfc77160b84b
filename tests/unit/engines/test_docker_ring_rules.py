"""The ring's rules as text: which tuples, for which deployment, and what a setting adds."""

from __future__ import annotations

import pytest

from clawker_cp.engines.base import AgentNetwork
from clawker_cp.engines.docker.ring import DockerRing
from clawker_cp.engines.docker.ring_rules import PROXY_UDP, Pin, Rules
from clawker_cp.engines.host.ring import LISTENS, PROXY_TCP

GATEWAY = "10.231.96.1"


def network(proxy: str = GATEWAY, dns: str = GATEWAY, cp: str = GATEWAY) -> AgentNetwork:
    return AgentNetwork(
        id="n", subnet="10.231.96.0/20", gateway=GATEWAY, bridge="br-0123456789ab", proxy=proxy, dns=dns, cp=cp
    )


def chain(script: str, family: str, name: str) -> str:
    table = script[script.index(f"\ntable {family} ") :]
    start = table.index(f"chain {name} {{")
    return table[start : table.index("}\n  chain", start) if "}\n  chain" in table[start:] else None]


def rules(where: AgentNetwork, inbound: str = "host") -> Rules:
    return Rules("clawker_x", where, inbound, 7, [("172.17.0.1", 18374)])


def test_tuples_are_the_hosts_when_the_gateway_serves() -> None:
    """On the gateway everything is accepted by the host's input and nothing by bridging, but what is named extra."""
    script = rules(network()).script()

    listener = f"{LISTENS} accept"
    assert f"ip daddr {GATEWAY} tcp dport {{ {PROXY_TCP} }} {listener}" in chain(script, "inet", "input")
    assert f"tcp dport {{ {PROXY_TCP} }} accept" not in script
    assert "ip daddr 172.17.0.1 tcp dport { 18374 } accept" in chain(script, "inet", "input")
    assert GATEWAY not in chain(script, "bridge", "to_infrastructure").replace(f"arp daddr ip {{ {GATEWAY} }}", "")


def test_tuples_are_bridged_each_to_its_own_address() -> None:
    """With addresses of their own proxy, gate and agent-side ports answer only where they are."""
    script = rules(network("10.231.96.200", "10.231.96.202", "10.231.96.202")).script()
    bridged = chain(script, "bridge", "to_infrastructure")

    assert f"ip daddr 10.231.96.200 udp dport {{ {PROXY_UDP} }} {LISTENS} accept" in bridged
    assert "ip daddr 10.231.96.202 tcp dport { 4444, 7080, 7444 } accept" in bridged
    assert f"ip daddr 10.231.96.202 tcp dport {{ {PROXY_TCP} }}" not in bridged
    assert f"ip daddr {GATEWAY}" not in script


@pytest.mark.parametrize(
    ("inbound", "dnat", "closed"), [("host", False, False), ("published", True, False), ("none", False, True)]
)
def test_inbound_setting_opens_and_closes_published_ports(inbound: str, *, dnat: bool, closed: bool) -> None:
    """Only `published` lets forwarded connections in, only `none` refuses the host's own."""
    script = rules(network(), inbound).script()

    assert ("ct status dnat" in script) is dnat
    assert ("ct state new counter drop" in script) is closed


def test_shared_mac_is_kept() -> None:
    """Taking a pin back leaves the MAC that another port has as well."""
    made, pin = rules(network()), Pin("veth1", "10.231.96.5", "02:42:0a:e7:60:05")

    assert "delete element bridge clawker_x macs" in made.take(pin, infrastructure=False, keep_mac=False)
    assert "macs" not in made.take(pin, infrastructure=False, keep_mac=True)


def test_script_without_applying_it() -> None:
    """The transaction can be had for a check, with the pins of agents and of ours."""
    text = DockerRing(network()).script(
        [Pin("veth1", "10.231.96.5", "02:42:0a:e7:60:05")], [Pin("veth2", "10.231.96.202", "02:42:0a:e7:60:ca")]
    )

    assert 'agent_pins { "veth1" . 02:42:0a:e7:60:05 . 10.231.96.5 }' in text
    assert 'infrastructure_ports { "veth2" }' in text
