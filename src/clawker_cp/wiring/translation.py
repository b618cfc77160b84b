"""
From files, settings and requests of clients to what the packages take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clawker_cp.agents.lifecycle import LifeRequest
from clawker_cp.config import Directories, Settings, environment, load_settings
from clawker_cp.dns.settings import BudgetSettings, GateSettings
from clawker_cp.engines.base import AgentNetwork, HostFeature, SandboxSpec
from clawker_cp.errors import InvalidInput, Unsupported
from clawker_cp.wiring.placement import LOOPBACK

NO_RULES = "rules: []\n"


def load_configuration(*, config_dir: Path | None = None, data_dir: Path | None = None) -> tuple[Settings, Directories]:
    """
    Settings and directories of this process, flags over environment.
    """
    directories = Directories.from_environment(environment())
    directories = Directories(
        config=config_dir or directories.config,
        data=data_dir or directories.data,
        state=directories.state,
        cache=directories.cache,
    )
    return load_settings(directories, environment()), directories


def gate_settings(settings: Settings, network: AgentNetwork, *, front: str = "", view: str = LOOPBACK) -> GateSettings:
    """
    The gate's settings from the operator's, the agents' network, and the stack: whom it asks first, and where the
    proxy asks it.
    """
    budget = settings.dns.budget
    return GateSettings(
        address=network.dns,
        proxy_view_address=view,
        # On loopback only this host's programs get there; at an address of the network everything on it does.
        proxy_view_client="" if view == LOOPBACK else network.proxy,
        proxy_view_port=settings.dns.proxy_view_port,
        forwarders=tuple(settings.dns.forwarders),
        zones={zone: tuple(servers) for zone, servers in settings.dns.zones.items()},
        front=front,
        control_plane_address=network.cp,
        host_proxy_address=network.host_proxy,
        gateway_address=network.gateway,
        internal_names=tuple(settings.dns.internal_names),
        budget=BudgetSettings(names=budget.names, name_bytes=budget.bytes, txt=budget.txt),
    )


def refuse_what_is_not_offered(settings: Settings) -> None:
    """
    Raise `Unsupported` for settings that ask for something this version does not do.

    A setting that is accepted and then ignored would be worse than an error.
    """
    asked = {
        f"fleet.name: {settings.fleet.name}": bool(settings.fleet.name),
        f"telemetry.otlp_endpoint: {settings.telemetry.otlp_endpoint}": bool(settings.telemetry.otlp_endpoint),
    }
    for what, wanted in asked.items():
        if wanted:
            raise Unsupported(
                f"{what} is not offered by this version",
                feature=what.partition(":")[0],
                hint="take it out of control-plane.yaml; docs/operations.md says what is in effect",
            )


def refuse_host(rows: Sequence[HostFeature]) -> None:
    """
    Raise `Unsupported` for a host that lacks what enforcement cannot do without; names all of it.
    """
    missing = [row for row in rows if row.required and not row.present]
    if missing:
        raise Unsupported(
            f"this host cannot enforce: {', '.join(row.name for row in missing)} missing",
            feature=missing[0].name,
            needs=missing[0].need,
            hint="; ".join(row.need for row in missing),
        )


def life_request(request: Mapping[str, Any], *, inbound: str = "host") -> LifeRequest:
    """
    A client's request as spec and rules; the rules stay with the record for an adopting start.

    Raises `InvalidInput` naming what is missing or wrong, and for a port to publish where
    `firewall.inbound` is `none` (R33).
    """
    rules = request.get("rules", NO_RULES)
    if not isinstance(rules, str):
        raise InvalidInput("rules: has to be a YAML document as text")
    learn = bool(request.get("learn", False))
    try:
        spec = SandboxSpec.from_mapping({**request, "extra": {"rules": rules, "learn": learn}})
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"the request to run a sandbox is malformed: {error}") from error
    if spec.publish and inbound == "none":
        raise InvalidInput("--publish: firewall.inbound is none, no port is published", hint="set it to host")
    return LifeRequest(spec, rules, learn)


def adopted_request(spec: SandboxSpec) -> LifeRequest:
    """
    The request an adopted sandbox was started with.
    """
    return LifeRequest(spec, str(spec.extra.get("rules", NO_RULES)), bool(spec.extra.get("learn", False)))
