"""What a container that serves agents is made of, and what is done about one that has its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clawker_cp.engines.base import AgentNetwork
from clawker_cp.engines.docker.siblings import SPEC, Bind, Sibling, creation, decide, is_named_by, is_ours

NETWORK = AgentNetwork("n", "10.231.96.0/20", "10.231.96.1", "br-n", "10.231.96.200", "10.231.96.1", "10.231.96.1")
SIBLING = Sibling(
    name="clawker-envoy",
    image="envoy:1",
    address="10.231.96.200",
    command=("envoy", "-c", "b.json"),
    binds=(Bind(Path("/host/envoy"), Path("/data/envoy"), read_only=False), Bind(Path("/host/h"), Path("/etc/hosts"))),
    published={9902: 18901},
    user="0:0",
)
BODY = creation(SIBLING, NETWORK, "sha256:a", "d")


def record(*, body: dict[str, Any] = BODY, address: str = SIBLING.address, **state: Any) -> dict[str, Any]:
    return {
        "Id": "c",
        "Config": {"Labels": body["Labels"]},
        "State": {"Running": True, "Restarting": False, "Paused": False, **state},
        "NetworkSettings": {"Networks": {"clawker-net": {"NetworkID": NETWORK.id, "IPAddress": address}}},
    }


def test_it_has_nothing_but_what_it_needs() -> None:
    """No capability, a read-only root, ports on loopback only, its own address, and a life beyond a crash."""
    host = BODY["HostConfig"]

    assert (BODY["Entrypoint"], BODY["Cmd"]) == (["envoy"], ["-c", "b.json"])
    assert (host["CapDrop"], host["CapAdd"], host["ReadonlyRootfs"]) == (["ALL"], [], True)
    assert host["PortBindings"] == {"9902/tcp": [{"HostIp": "127.0.0.1", "HostPort": "18901"}]}
    assert host["RestartPolicy"] == {"Name": "unless-stopped"}
    assert [(one["Target"], one["ReadOnly"]) for one in host["Mounts"]] == [
        ("/data/envoy", False),
        ("/etc/hosts", True),
    ]
    assert BODY["NetworkingConfig"]["EndpointsConfig"] == {"n": {"IPAMConfig": {"IPv4Address": "10.231.96.200"}}}
    assert is_ours({"Config": {"Labels": BODY["Labels"]}})


@pytest.mark.parametrize(
    ("sibling", "image", "digest"),
    [
        (SIBLING, "sha256:b", "d"),
        (SIBLING, "sha256:a", "e"),
        (replace(SIBLING, address="10.231.96.199"), "sha256:a", "d"),
        (replace(SIBLING, command=("envoy",)), "sha256:a", "d"),
        (replace(SIBLING, binds=()), "sha256:a", "d"),
        (replace(SIBLING, published={}), "sha256:a", "d"),
    ],
)
def test_whatever_differs_makes_another_spec(sibling: Sibling, image: str, digest: str) -> None:
    """The label is the digest of all of it; the name of an image counts for nothing, what is in it does."""
    other = creation(sibling, NETWORK, image, digest)
    same = creation(replace(SIBLING, image="renamed:2"), NETWORK, "sha256:a", "d")

    assert other["Labels"][SPEC] != BODY["Labels"][SPEC] == same["Labels"][SPEC]
    assert decide(record(body=other), BODY, NETWORK).drift
    assert len(BODY["Labels"][SPEC]) == 64


def test_an_image_is_named_by_what_is_in_it() -> None:
    """The engine is told the id that was looked at; a digest has to be the image's own, a tag may be anything."""
    image = {"Id": "sha256:a", "RepoDigests": ["envoy@sha256:d", "mirror/envoy@sha256:e"]}

    assert (BODY["Image"], BODY["Labels"]["dev.clawker.image"]) == ("sha256:a", "envoy:1")
    assert is_named_by("envoy:1", image) and is_named_by("envoy:1", {})
    assert is_named_by("envoy@sha256:d", image) and is_named_by("envoy:1@sha256:e", image)
    assert not is_named_by("envoy@sha256:f", image) and not is_named_by("envoy@sha256:d", {"RepoDigests": None})


def test_the_wanted_one_is_adopted_woken_or_started() -> None:
    """With an equal spec nothing is made anew, whatever state it is in."""
    assert decide(None, BODY, NETWORK).action == "create"
    assert decide(record(), BODY, NETWORK).action == "adopt"
    assert decide(record(Paused=True), BODY, NETWORK).action == "resume"
    assert decide(record(Running=False), BODY, NETWORK).action == "start"
    assert decide(record(Restarting=True), BODY, NETWORK).action == "start"


def test_one_that_left_the_network_or_is_a_strangers_is_replaced() -> None:
    """Only what was ours counts as drift; records with holes are somebody else's."""
    moved = decide(record(address="10.231.96.77"), BODY, NETWORK)
    foreign = decide({"Id": "x", "Config": {"Labels": {"dev.clawker.managed": "true"}}}, BODY, NETWORK)
    hollow = decide({}, BODY, NETWORK)

    assert (moved.action, moved.drift) == ("replace", True)
    assert (foreign.action, foreign.drift) == (hollow.action, hollow.drift) == ("replace", False)
