"""
One container that serves the agents, as a process: adopted, started, replaced, waited for and ended.

Fulfils what `firewall.envoy.stack.EnvoyStack` needs of a process. The engine restarts the container by itself
(`unless-stopped`), also while no control plane lives; whoever waits here hears of each end and starts it again, which
then finds it running. Nothing is made or removed that does not have this container's name.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import structlog

from clawker_cp.engines.base import AgentNetwork
from clawker_cp.engines.docker.containers import number, section, text
from clawker_cp.engines.docker.network import NAME as NETWORK
from clawker_cp.engines.docker.network import is_static_refused
from clawker_cp.engines.docker.siblings import STOP_S, Sibling, creation, decide, is_named_by, is_ours, runs
from clawker_cp.engines.docker_client import DockerClient
from clawker_cp.engines.host.process import start_time, wait_gone
from clawker_cp.errors import ClawkerError, Conflict, NotFound, Unavailable, Unsupported
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock

log = structlog.get_logger()

POLL_S = 1.0


class SiblingProcess:
    """
    One container of `sibling`'s name. `admit` is told its id after each start, so that its frames pass the ring;
    `log_path` is the file that it writes its log to, if any.
    """

    def __init__(
        self,
        client: DockerClient,
        network: AgentNetwork,
        sibling: Sibling,
        *,
        admit: Callable[[str], Awaitable[None]],
        log_path: Path | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._client = client
        self._network = network
        self._sibling = sibling
        self._admit = admit
        self._log_path = log_path
        self._log_start = 0
        self._clock = clock
        self._life: _Life | None = None

    @property
    def name(self) -> str:
        return self._sibling.name

    @property
    def pid(self) -> int:
        """The first process, as the engine numbers it; 0 when none is held."""
        return self._life.pid if self._life is not None else 0

    @property
    def running(self) -> bool:
        """Whether it runs; where its processes cannot be seen, as `wait` last heard."""
        return self._life is not None and self._life.lives

    async def start(self, digest: str) -> bool:
        """
        Adopt the container that was made from the same spec, image and digest, else replace it; True when adopted.

        Raises `Unsupported` when the image is not there, `Unavailable` with the engine's words when it does not start.
        """
        self.let_live()
        body = creation(self._sibling, self._network, await self._image_id(), digest)
        record = await _record(self._client, self.name)
        decision = decide(record, body, self._network)
        container = text((record or {}).get("Id"))
        if decision.action == "replace":
            event = "firewall_container_spec_drift" if decision.drift else "firewall_container_replaced"
            log.warning(event, name=self.name, id=container[:12], why=decision.why)
            await _remove(self._client, container)
        self._log_start = await asyncio.to_thread(_size, self._log_path)
        if decision.action in {"create", "replace"}:
            container = await self._make(body)
        elif decision.action == "resume":
            await self._client.unpause(container)
        elif decision.action == "start":
            # Between two lives the engine waits longer and longer; a stop ends that.
            await self._client.stop(container, grace_s=0)
            await self._client.start(container)
        adopted = decision.action in {"adopt", "resume"}
        await self._hold(container)
        await self._admit(container)
        log.info("firewall_container_adopted" if adopted else "firewall_container_started", name=self.name)
        return adopted

    async def wait(self) -> None:
        """
        Wait until it has ended, or was let go; any number may wait.
        """
        life = self._life
        if life is None:
            return
        async with asyncio.TaskGroup() as group:
            waits = [
                group.create_task(self._wait_over(life), name=f"{self.name}-end"),
                group.create_task(life.released.wait(), name=f"{self.name}-released"),
            ]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in waits:
                task.cancel()

    async def stop(self) -> None:
        """
        End and remove it, with SIGTERM first. Fine when there is none; a stranger of that name stays.
        """
        await remove_sibling(self._client, self.name)
        self.let_live()

    def let_live(self) -> None:
        """
        Stop watching and leave it running for the next start to adopt.
        """
        life, self._life = self._life, None
        if life is not None:
            life.released.set()

    def last_output(self, limit_bytes: int = 4096) -> str:
        """
        The end of what it has written to its log since it was started here.
        """
        if self._log_path is None:
            return ""
        try:
            with self._log_path.open("rb") as output:
                # Less than it began with: the log was put aside meanwhile.
                size = os.fstat(output.fileno()).st_size
                begin = self._log_start if self._log_start <= size else 0
                output.seek(max(begin, size - limit_bytes))
                return output.read().decode("utf-8", "replace").strip()
        except OSError:
            return ""

    async def _image_id(self) -> str:
        image = self._sibling.image
        try:
            record = await self._client.image_inspect(image)
        except NotFound as error:
            raise Unsupported(
                f"the engine does not have the image {image} of {self.name}",
                feature="stack",
                needs=image,
                hint=f"docker pull {image}, or set stack to embedded",
            ) from error
        if not is_named_by(image, record):
            raise Unsupported(
                f"what the engine has as {image} for {self.name} has another digest",
                feature="stack",
                needs=image,
                hint=f"docker pull {image}",
            )
        return text(record.get("Id"))

    async def _make(self, body: dict[str, Any]) -> str:
        container = await self._client.create(self.name, body)
        try:
            await self._client.start(container)
        except ClawkerError as error:
            # Its address, its ports or its program cannot be had: nothing stays that would come back by itself.
            with suppress(ClawkerError):
                await self._client.remove(container, force=True)
            if is_static_refused(error):
                raise Conflict(
                    f"{self.name} cannot have {self._sibling.address}: {NETWORK} was made without a subnet",
                    hint=f"docker network rm {NETWORK} when nothing is on it, and the next start makes it anew; "
                    "or set stack to embedded",
                ) from error
            raise Unavailable(
                f"{self.name} cannot be started: {error.message}",
                hint=f"its address is {self._sibling.address} on {NETWORK}, its image {self._sibling.image}",
            ) from error
        return container

    async def _hold(self, container: str) -> None:
        state = section(await self._client.inspect(container), "State")
        self._life = _Life(container, number(state.get("Pid")), text(state.get("StartedAt")))

    async def _wait_over(self, life: _Life) -> None:
        if life.visible:
            if life.lives:
                await wait_gone(life.pid, life.born)
            return
        while life.lives:
            await self._clock.sleep(POLL_S)
            try:
                state = section(await self._client.inspect(life.container), "State")
            except NotFound:
                state = {}
            except ClawkerError:
                continue  # who does not answer says nothing about the container
            life.over = not runs(state) or text(state.get("StartedAt")) != life.started_at


class Remover(Protocol):
    """The part of `DockerClient` that takes a container away."""

    async def inspect(self, reference: str) -> dict[str, Any]: ...
    async def stop(self, reference: str, *, grace_s: int = 10) -> None: ...
    async def remove(self, reference: str, *, force: bool = False) -> None: ...


async def remove_sibling(client: Remover, name: str) -> bool:
    """
    End and remove the container of that name, unless it is somebody else's; True when there was one.
    """
    record = await _record(client, name)
    if record is None or not is_ours(record):
        return False
    await _remove(client, text(record.get("Id")))
    return True


async def _record(client: Remover, name: str) -> dict[str, Any] | None:
    try:
        return await client.inspect(name)
    except NotFound:
        return None


async def _remove(client: Remover, container: str) -> None:
    with suppress(NotFound):
        with suppress(Conflict):  # it is on its way out, or frozen; removing does that too
            await client.stop(container, grace_s=STOP_S)
        await client.remove(container, force=True)


class _Life:
    """
    One life of a container. `visible`: its first process can be seen from here (pid: host), which needs no engine.
    """

    def __init__(self, container: str, pid: int, started_at: str, proc: Path = Path("/proc")) -> None:
        self.container = container
        self.pid = pid
        self.started_at = started_at
        self.released = asyncio.Event()
        self.over = not pid
        try:
            # In another pid namespace the number is somebody else's.
            self.visible = bool(pid) and container in (proc / str(pid) / "cgroup").read_text()
        except OSError:
            self.visible = False
        self.born = start_time(pid) if self.visible else 0

    @property
    def lives(self) -> bool:
        if self.visible:
            return start_time(self.pid) == self.born != 0
        return not self.over


def _size(path: Path | None) -> int:
    try:
        return path.stat().st_size if path is not None else 0
    except OSError:
        return 0
