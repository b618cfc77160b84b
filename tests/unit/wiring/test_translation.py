"""What is turned down before anything starts, and requests as the packages take them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from clawker_cp.config import DnsBudget, DnsSettings, FleetSettings, Settings
from clawker_cp.engines.base import AgentNetwork, HostFeature
from clawker_cp.errors import InvalidInput, Unsupported
from clawker_cp.wiring.translation import (
    adopted_request,
    gate_settings,
    life_request,
    load_configuration,
    refuse_host,
    refuse_what_is_not_offered,
)

REQUEST = {"project": "shop", "agent": "dev", "argv": ["true"], "workdir": "/srv", "uid": 1000, "gid": 1000}


def test_flags_beat_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories given by flag are used, the others come from the environment, settings from the former."""
    for kind in ("CONFIG", "DATA", "STATE", "CACHE"):
        monkeypatch.setenv(f"CLAWKER_{kind}_DIR", str(tmp_path / kind))
    config = tmp_path / "flag"
    config.mkdir()
    (config / "control-plane.yaml").write_text("metrics_port: 17081\n")
    settings, directories = load_configuration(config_dir=config)
    assert (settings.metrics_port, directories.config, directories.data) == (17081, config, tmp_path / "DATA")
    assert load_configuration(data_dir=tmp_path)[1].data == tmp_path


def test_the_gate_has_the_operators_numbers() -> None:
    """Forwarders, zones and budgets are those of the settings; addresses are those of the agents' network."""
    dns = DnsSettings(
        forwarders=["192.0.2.1"], zones={"corp": ["192.0.2.2"]}, budget=DnsBudget(names=1, bytes=2, txt=3)
    )
    network = AgentNetwork("n", "10.0.0.0/24", "10.0.0.1", "b", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5")
    gate = gate_settings(msgspec.structs.replace(Settings(), dns=dns), network)
    assert (gate.forwarders, gate.zones) == (("192.0.2.1",), {"corp": ("192.0.2.2",)})
    assert (gate.budget.names, gate.budget.name_bytes, gate.budget.txt) == (1, 2, 3)
    addresses = (gate.address, gate.control_plane_address, gate.host_proxy_address, gate.gateway_address)
    assert addresses == ("10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.1")


def test_where_others_get_to_the_proxys_view_only_the_proxy_may_ask() -> None:
    """On loopback it is this host's; at an address of the network it is the proxy's container's."""
    network = AgentNetwork("n", "10.0.0.0/24", "10.0.0.1", "b", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5")
    own, shared = gate_settings(Settings(), network), gate_settings(Settings(), network, view="10.0.0.4")

    assert (own.proxy_view_address, own.proxy_view_client) == ("127.0.0.1", "")
    assert (shared.proxy_view_address, shared.proxy_view_client) == ("10.0.0.4", "10.0.0.2")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fleet": FleetSettings(name="f", endpoints=["https://x"])}, r"fleet\.name"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(changes: dict[str, object], named: str) -> None:
    """A setting that would be ignored is an error; the defaults are none."""
    refuse_what_is_not_offered(Settings())
    with pytest.raises(Unsupported, match=named):
        refuse_what_is_not_offered(msgspec.structs.replace(Settings(), **changes))


def test_a_host_that_cannot_enforce_is_told_all_that_is_missing() -> None:
    """Optional rows do not count, required ones are named together with what they need."""
    good = HostFeature("bpf", present=True, required=True, detail="", need="a kernel with BPF", cost="")
    lost = [
        HostFeature("nft", present=False, required=True, detail="", need="install nftables", cost="nothing runs"),
        HostFeature("bwrap", present=False, required=True, detail="", need="install bubblewrap", cost="nothing runs"),
        HostFeature("color", present=False, required=False, detail="", need="paint", cost=""),
    ]
    refuse_host([good])
    with pytest.raises(Unsupported, match="nft, bwrap missing") as caught:
        refuse_host([good, *lost])
    assert caught.value.hint == "install nftables; install bubblewrap"


def test_a_request_survives_its_record() -> None:
    """Rules and learning are in the spec that is written down, so that an adopting start has them."""
    request = life_request({**REQUEST, "rules": "rules:\n- dst: a.example\n", "learn": True})
    assert adopted_request(request.spec) == request
    assert (request.learn, request.spec.project) == (True, "shop")


@pytest.mark.parametrize(
    ("changes", "named"), [({"rules": 1}, "rules"), ({"argv": 7}, "malformed"), ({"uid": "root"}, "malformed")]
)
def test_a_malformed_request_is_named(changes: dict[str, object], named: str) -> None:
    """Whatever a client sends is a request or an `InvalidInput`."""
    with pytest.raises(InvalidInput, match=named):
        life_request({**REQUEST, **changes})


def test_nothing_is_published_where_nothing_may_come_in() -> None:
    """`firewall.inbound: none` and a port to publish contradict each other (R33)."""
    asked = {**REQUEST, "publish": [{"port": 80, "host_port": 0}]}
    assert life_request(asked).spec.publish
    with pytest.raises(InvalidInput, match="--publish"):
        life_request(asked, inbound="none")
