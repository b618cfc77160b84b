"""
What the engine's record of a container says of it as an agent.

Plain functions over the JSON of `inspect` and of the list; whatever is missing or malformed in it is
described as absent, never a crash: labels are written by whoever made the container.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from clawker_cp.engines.base import AgentContainer, AgentNetwork, Publish
from clawker_cp.runtime.agent_names import is_name

LABEL = "dev.clawker."
MANAGED = {f"{LABEL}managed": "true"}
AGENTS = {**MANAGED, f"{LABEL}purpose": "agent"}
ID = re.compile(r"[0-9a-f]{64}")
MIN_PREFIX = 12
_MAX_PORT = 65535


def describe(record: Mapping[str, Any], network: AgentNetwork) -> AgentContainer:
    """
    The container of an `inspect` answer, without what only the host knows: cgroup, interface, exposures.
    """
    state, settings = section(record, "State"), section(record, "NetworkSettings")
    arguments = record.get("Args")
    running = state.get("Running") is True
    mode = text(section(record, "HostConfig").get("NetworkMode"))
    return AgentContainer(
        id=text(record.get("Id")),
        name=text(record.get("Name")).removeprefix("/"),
        labels=labels_of(section(record, "Config").get("Labels")),
        running=running,
        paused=running and state.get("Paused") is True,
        address=address_on(network, settings) if running else "",
        pid=number(state.get("Pid")) if running else 0,
        publish=tuple(published(settings, section(record, "HostConfig"))),
        started_at_unix=unix_seconds(text(state.get("StartedAt"))),
        command=tuple(
            word
            for word in (record.get("Path"), *(arguments if isinstance(arguments, list) else ()))
            if isinstance(word, str) and word
        ),
        shares=mode.removeprefix("container:") if mode.startswith("container:") else "",
    )


def identity_problem(container: AgentContainer) -> str:
    """
    Why an agent's labels make no identity (contract 1.2), "" when they do.

    Such a container is enrolled as denied: whose rules would it have?
    """
    if not is_name(container.agent):
        return f"label {LABEL}agent is {'missing' if not container.agent else repr(container.agent[:80])}, not a name"
    if container.project and not is_name(container.project):
        return f"label {LABEL}project is {container.project[:80]!r}, not a name"
    return ""


def is_meant(reference: str, container: AgentContainer) -> bool:
    """
    Whether a reference names the container as `AgentRef` does: full id, prefix of 12 or more, or name.
    """
    if reference == container.name:
        return True
    return len(reference) >= MIN_PREFIX and container.id.startswith(reference)


def address_on(network: AgentNetwork, settings: Mapping[str, Any]) -> str:
    """
    The IPv4 address that a record or a list entry has on the agents' network, "" without one.
    """
    for endpoint in section(settings, "Networks").values():
        if isinstance(endpoint, Mapping) and endpoint.get("NetworkID") == network.id:
            return text(endpoint.get("IPAddress"))
    return ""


def networks_of(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """
    Name and id of each network that a container is on.
    """
    for name, endpoint in section(section(record, "NetworkSettings"), "Networks").items():
        yield text(name), text(endpoint.get("NetworkID")) if isinstance(endpoint, Mapping) else ""


def published(settings: Mapping[str, Any], host_config: Mapping[str, Any]) -> Iterator[Publish]:
    """
    TCP ports that the owner published, each pair once; before the start as asked for, 0 = chosen.
    """
    seen = set()
    ports = section(settings, "Ports") or section(host_config, "PortBindings")
    for key, bindings in ports.items():
        inner, _, protocol = text(key).partition("/")
        if protocol not in {"", "tcp"} or not isinstance(bindings, list):
            continue
        for binding in bindings:
            pair = (number(binding.get("HostPort")) if isinstance(binding, Mapping) else 0, number(inner))
            if pair not in seen and 0 < pair[1] <= _MAX_PORT and pair[0] <= _MAX_PORT:
                seen.add(pair)
                yield Publish(*pair)


def labels_of(raw: Any) -> dict[str, str]:
    """
    Labels as text; a record without any has none.
    """
    return {key: value for key, value in raw.items() if isinstance(value, str)} if isinstance(raw, Mapping) else {}


def unix_seconds(stamp: str) -> int:
    """
    Seconds of an RFC 3339 stamp, 0 for none (the engine's year 1) and for what is no stamp.
    """
    # Nine digits of a second are more than datetime reads.
    shortened = re.sub(r"(\.\d{1,6})\d*", r"\1", stamp)
    try:
        return max(0, int(datetime.fromisoformat(shortened).timestamp()))
    except (ValueError, OverflowError):
        return 0


def section(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """
    An object inside an object; empty when it is null, absent or something else.
    """
    value = record.get(key)
    return value if isinstance(value, Mapping) else {}


def text(value: Any) -> str:
    """A string, "" for anything else."""
    return value if isinstance(value, str) else ""


def number(value: Any) -> int:
    """A number that is not negative, also when written as text; 0 for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 10:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
