"""
Containers beside the control plane that serve the agents: what they are made of, and whether one that exists is it.

Plain functions over the engine's JSON (contract 1.2, 8.7); `stack.py` acts on what they decide. Who may reach such a
container is not decided here: agents reach the proxy's ports of `clawker-envoy` and nothing of any other (the ring).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from clawker_cp.engines.base import AgentNetwork
from clawker_cp.engines.docker.containers import LABEL, MANAGED, address_on, labels_of, section, text

ENVOY, COREDNS = "clawker-envoy", "clawker-coredns"
LABELS = {**MANAGED, f"{LABEL}purpose": "firewall"}
SPEC = f"{LABEL}firewall.spec"
LOOPBACK = "127.0.0.1"
STOP_S = 5
LOG_OPTIONS = {"max-size": "10m", "max-file": "2"}


@dataclass(frozen=True, slots=True)
class Bind:
    """A file or directory of the host inside the container."""

    source: Path
    target: Path
    read_only: bool = True


@dataclass(frozen=True, slots=True)
class Sibling:
    """
    One such container. `published` are ports on the host's loopback, by port inside (D1).

    It has no capability but those named, and writes to nothing but its binds; `user` has to be the one that wrote
    what it is to read.
    """

    name: str
    image: str
    address: str
    command: tuple[str, ...]
    binds: tuple[Bind, ...]
    published: Mapping[int, int]
    user: str
    capabilities: tuple[str, ...] = ()


def creation(sibling: Sibling, network: AgentNetwork, image_id: str, digest: str) -> dict[str, Any]:
    """
    The engine's create request, with the digest of all of it, of the image and of what it is started with as label.

    The image is named by its id: a tag may be another one's by the time the engine looks it up again.
    """
    program, *words = sibling.command
    body: dict[str, Any] = {
        "Image": image_id,
        "Entrypoint": [program],
        "Cmd": words,
        "User": sibling.user,
        "Labels": dict(LABELS),
        "ExposedPorts": {f"{inner}/tcp": {} for inner in sibling.published},
        "StopSignal": "SIGTERM",
        "HostConfig": {
            "Mounts": [
                {"Type": "bind", "Source": str(one.source), "Target": str(one.target), "ReadOnly": one.read_only}
                for one in sibling.binds
            ],
            "PortBindings": {
                f"{inner}/tcp": [{"HostIp": LOOPBACK, "HostPort": str(outer)}]
                for inner, outer in sibling.published.items()
            },
            "RestartPolicy": {"Name": "unless-stopped"},
            "CapDrop": ["ALL"],
            "CapAdd": list(sibling.capabilities),
            "SecurityOpt": ["no-new-privileges"],
            "ReadonlyRootfs": True,
            "NetworkMode": network.id,
            "LogConfig": {"Type": "json-file", "Config": LOG_OPTIONS},
        },
        "NetworkingConfig": {"EndpointsConfig": {network.id: {"IPAMConfig": {"IPv4Address": sibling.address}}}},
    }
    spec = orjson.dumps({**body, "digest": digest}, option=orjson.OPT_SORT_KEYS)
    # The name of an image says nothing about what is in it.
    body["Labels"] |= {SPEC: hashlib.sha256(spec).hexdigest(), f"{LABEL}image": sibling.image}
    return body


def is_named_by(reference: str, image: Mapping[str, Any]) -> bool:
    """
    Whether the engine's record of an image has the digest of `NAME@DIGEST`; a reference without one says nothing.
    """
    digest = reference.partition("@")[2]
    known = {text(one).partition("@")[2] for one in image.get("RepoDigests") or ()}
    return not digest or digest in known


@dataclass(frozen=True, slots=True)
class Decision:
    """
    What is to be done about the container of that name, and why.

    `adopt`: it is the wanted one, and runs. `resume`: the same, frozen. `start`: the same, not running. `replace`:
    it is another one; `drift` says that it was ours.
    """

    action: Literal["create", "adopt", "resume", "start", "replace"]
    why: str = ""
    drift: bool = False


def decide(existing: Mapping[str, Any] | None, body: Mapping[str, Any], network: AgentNetwork) -> Decision:
    """
    Compare the engine's record of the container with that name to the one that is wanted.
    """
    if existing is None:
        return Decision("create")
    if not is_ours(existing):
        return Decision("replace", "it was made by somebody else")
    labels = labels_of(section(existing, "Config").get("Labels"))
    if labels.get(SPEC) != body["Labels"][SPEC]:
        return Decision("replace", "image, settings, mounts or addresses are others", drift=True)
    state = section(existing, "State")
    if not runs(state):
        return Decision("start", "it had stopped")
    wanted = body["NetworkingConfig"]["EndpointsConfig"][network.id]["IPAMConfig"]["IPv4Address"]
    if address_on(network, section(existing, "NetworkSettings")) != wanted:
        return Decision("replace", "it was taken from the agents' network", drift=True)
    return Decision("resume", "it was paused") if state.get("Paused") is True else Decision("adopt")


def is_ours(existing: Mapping[str, Any]) -> bool:
    """
    Whether a control plane made it to serve agents.
    """
    labels = labels_of(section(existing, "Config").get("Labels"))
    return all(labels.get(name) == value for name, value in LABELS.items())


def runs(state: Mapping[str, Any]) -> bool:
    """
    Whether its first process lives; between two lives the engine says `Restarting`.
    """
    return state.get("Running") is True and state.get("Restarting") is not True
