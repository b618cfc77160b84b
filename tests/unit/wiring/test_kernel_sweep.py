"""
What a dead control plane left is taken away by a container; `tests/docker/test_container_mode.py` has a real one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from clawker_cp.errors import Conflict, DeadlineExceeded, NotFound, Unavailable
from clawker_cp.wiring.kernel_sweep import SWEEPER, sweep, sweeper_body


class Engine:
    """An engine with at most one container, writing down what it is asked."""

    def __init__(self, said: bytes = b'{"removed":["a"]}\n', code: int = 0, present: str = "") -> None:
        self.said, self.code, self.present = said, code, present
        self.steps: list[str] = []
        self.slow = False

    async def inspect(self, _reference: str) -> dict[str, Any]:
        if not self.present:
            raise NotFound("no such container")
        return {"Config": {"Labels": {"dev.clawker.purpose": self.present}}}

    async def create(self, name: str, _body: Mapping[str, Any]) -> None:
        self.steps.append(f"create {name}")

    async def start(self, _reference: str) -> None:
        self.steps.append("start")

    async def wait(self, _reference: str, *, limit_s: float) -> int:
        self.steps.append("wait")
        if self.slow:
            raise DeadlineExceeded(f"not within {limit_s} s")
        return self.code

    async def remove(self, _reference: str, *, force: bool = False) -> None:
        self.steps.append(f"remove {force}")

    async def logs(self, _reference: str, *, lines: int = 100) -> bytes:
        return self.said


WHOLE = [f"create {SWEEPER}", "start", "wait", "remove True"]


async def test_what_was_removed_is_told_and_the_container_is_gone() -> None:
    """One that an interrupted call left goes first, a stranger of the name does not."""
    for present, before in (("", []), ("sweep", ["remove True"]), ("mine", [])):
        engine = Engine(present=present)
        assert await sweep(engine, engine.create, "sha256:1", "/sys/fs/bpf/clawker") == ["a"]
        assert engine.steps == before + WHOLE


async def test_a_refusal_is_told_in_its_words_and_the_container_is_gone() -> None:
    """The reason that it gave, or its exit code; nothing of it stays."""
    for said, words in (
        (b"clawker-cp: an agent lives\n  hint: end it\n", "stays: an agent lives"),
        (b"", "exit code 1"),
    ):
        engine = Engine(said, code=1)
        with pytest.raises(Conflict, match=words):
            await sweep(engine, engine.create, "sha256:1", "/sys/fs/bpf/clawker")
        assert engine.steps == WHOLE


async def test_one_that_hangs_or_says_nothing_is_an_error() -> None:
    """Nobody takes silence for an empty kernel."""
    slow, dumb = Engine(), Engine(b"well\n")
    slow.slow = True
    with pytest.raises(DeadlineExceeded):
        await sweep(slow, slow.create, "sha256:1", "/sys/fs/bpf/clawker")
    with pytest.raises(Unavailable, match="did not say"):
        await sweep(dumb, dumb.create, "sha256:1", "/sys/fs/bpf/clawker")
    assert slow.steps == dumb.steps == WHOLE


def test_it_has_no_network_and_only_what_the_kernel_asks_for() -> None:
    """It sees the host's processes and pins, and nothing of the operator's."""
    body = sweeper_body("sha256:1", "/sys/fs/bpf/other")
    host = body["HostConfig"]

    assert body["Cmd"][:2] == ["--pin-dir", "/sys/fs/bpf/other"]
    assert (host["NetworkMode"], host["PidMode"], host["CapDrop"]) == ("none", "host", ["ALL"])
    assert {one["Target"]: one["ReadOnly"] for one in host["Mounts"]} == {"/sys/fs/cgroup": True, "/sys/fs/bpf": False}
