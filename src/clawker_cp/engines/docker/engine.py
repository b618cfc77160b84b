"""
The Docker engine's front: which agents run, what each is, who has an address, and how to stop one.

Agents are the daemon's containers; this only reads their record and their place in the kernel. Nothing
is started here, and enforcement is somebody else's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from clawker_cp.engines.base import AgentContainer, AgentNetwork
from clawker_cp.engines.docker import cgroups, namespaces
from clawker_cp.engines.docker.addresses import AddressCache
from clawker_cp.engines.docker.containers import AGENTS, address_on, describe, is_meant, labels_of, section, text
from clawker_cp.engines.docker.exposures import Neighbour, Surroundings, exposures
from clawker_cp.engines.docker_client import DockerClient
from clawker_cp.engines.dockerevents import DockerEvent
from clawker_cp.engines.host.cgroups import read_mounts
from clawker_cp.engines.host.sockets import SocketInfo
from clawker_cp.errors import ClawkerError, InvalidInput, NotFound, Unavailable, Unsupported
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock

log = structlog.get_logger()

MISS_LIMIT_S = 5.0
WAIT_POLL_S = 5.0
# Inspections at once; the client's other threads stay free for other callers.
AT_ONCE = 6
_SHARED = "container:"
# After these a second container may have an address; after those one is not what it was.
_ARRIVING = frozenset(("start", "restart", "connect"))
_CHANGING = frozenset(("die", "destroy", "rename", "disconnect", "pause", "unpause", "update"))
_ENDING = frozenset(("die", "destroy"))


class _Question:
    """One question to the engine, for all who ask it meanwhile. Neither outcome: its asker was cancelled."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.found: list[AgentContainer] | None = None
        self.failure: ClawkerError | None = None


class DockerEngine:
    """
    The agents of one daemon. Construction does nothing; the client and the ring stay the caller's.

    `own` are our directories as the host has them, whose mounting is an exposure; `host_netns` the host's network
    namespace when that is not ours (a container with pid: host: `/proc/1/ns/net`). Verbs raise `NotFound` for a
    container that is gone and `Unavailable` for a daemon that does not answer. `take_event` needs every event.
    """

    def __init__(
        self,
        client: DockerClient,
        network: AgentNetwork,
        *,
        ring: Any = None,
        own: Sequence[Path] = (),
        host_netns: Path | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._client = client
        self.network = network
        self.ring = ring
        self._own = tuple(str(path) for path in own)
        self._host_netns = host_netns
        self._clock = clock
        self._cache = AddressCache(clock)
        self._questions: dict[str, _Question] = {}
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._info: Mapping[str, Any] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._hits = self._misses = 0

    @property
    def gateway(self) -> str:
        return self.network.gateway

    @property
    def subnet(self) -> str:
        return self.network.subnet

    # -- who there is --------------------------------------------------------------------------

    async def living(self) -> list[AgentContainer]:
        """
        Every running agent, paused ones included; those that end meanwhile are left out.
        """
        entries = await self._client.list_containers()
        return await self._described(entries, (entry for entry in entries if _is_agent(entry)))

    async def inspect(self, reference: str) -> AgentContainer:
        """
        One container, agent or not, by full id, unique prefix of 12 or more, or name; stopped ones too.
        """
        mark = self._cache.mark()
        try:
            record = await self._client.inspect(reference)
        except InvalidInput as error:
            # What is no reference, and the engine's word for a prefix of several.
            raise NotFound(f"no container {reference[:80]!r}: {error}") from error
        container = describe(record, self.network)
        if not is_meant(reference, container):
            raise NotFound(f"no container {reference[:80]!r}")
        entries = await self._client.list_containers() if container.is_agent else []
        container = await self._completed(container, record, entries)
        self._cache.keep(container, mark)
        return container

    async def running_at(self, address: str) -> list[AgentContainer]:
        """
        The running agents that have an address on the agents' network; anything but one is a refusal.

        Remembered for a minute, as long as no event says otherwise and the process lives. What is not remembered
        is asked of the engine, once for all who ask at the same time, within `MISS_LIMIT_S`.
        """
        kept = self._cache.at(address)
        if kept:
            self._hits += 1
            return kept
        self._misses += 1
        while (question := self._questions.get(address)) is not None:
            await question.done.wait()
            if question.failure is not None:
                raise question.failure
            if question.found is not None:
                return question.found
        question = self._questions[address] = _Question()
        try:
            question.found = await self._ask(address)
        except ClawkerError as error:
            question.failure = error
            raise
        finally:
            del self._questions[address]
            question.done.set()
        return question.found

    def take_event(self, event: DockerEvent) -> None:
        """
        Forget what an event makes wrong, and wake who waits for an end.
        """
        number = event.container_id
        if event.action in _ARRIVING:
            self._cache.clear()
        elif event.action in _CHANGING and number:
            self._cache.forget(number)
        if event.kind == "container" and event.action in _ENDING:
            for waiting in self._waiting.get(number, ()):
                waiting.set()

    def forget(self) -> None:
        """
        Forget every address: events were lost.
        """
        self._cache.clear()

    def statistics(self) -> dict[str, int]:
        """
        Look-ups answered from memory and by the engine, and addresses remembered.
        """
        return {"hits": self._hits, "misses": self._misses, "remembered": len(self._cache)}

    # -- what is done to one -------------------------------------------------------------------

    async def pause(self, container_id: str) -> None:
        await self._client.pause(container_id)

    async def unpause(self, container_id: str) -> None:
        await self._client.unpause(container_id)

    async def kill(self, container_id: str) -> None:
        """
        SIGKILL. `Conflict` when it does not run.
        """
        await self._client.kill(container_id)

    async def wait(self, container_id: str) -> int:
        """
        Wait for the end of a container and return its exit code; at once for one that does not run.

        Raises `NotFound` when it is removed before its code could be read. Holds no thread; a daemon that does
        not answer meanwhile is asked again.
        """
        ended = asyncio.Event()
        self._waiting.setdefault(container_id, set()).add(ended)
        try:
            while True:
                ended.clear()
                try:
                    state = section(await self._client.inspect(container_id), "State")
                    if state.get("Running") is not True and state.get("Status") != "created":
                        code = state.get("ExitCode")
                        return code if isinstance(code, int) else 0
                except Unavailable as error:
                    log.info("engines_wait_retried", id=container_id[:12], cause=str(error))
                try:
                    async with asyncio.timeout(WAIT_POLL_S):
                        await ended.wait()
                except TimeoutError:
                    continue
        finally:
            self._waiting[container_id].discard(ended)
            if not self._waiting[container_id]:
                del self._waiting[container_id]

    async def cut(self, container_id: str, match: Callable[[SocketInfo], bool]) -> int:
        """
        Destroy the container's sockets that match; returns how many, 0 for one that does not run.

        In the host's own network namespace (an exposure) nothing is cut: the sockets there are everybody's. Raises
        `Unavailable` when its process cannot be seen.
        """
        container = await self.inspect(container_id)
        if not container.running:
            return 0
        if not container.pid:
            raise Unavailable(
                f"the process of container {container_id[:12]} cannot be seen, so its connections cannot be cut",
                hint="run the control plane on the host, or as a container with pid: host",
            )
        path = Path(f"/proc/{container.pid}/ns/net")
        return await asyncio.to_thread(namespaces.cut_inside, path, self._host_netns, match)

    async def host_addresses(self) -> list[str]:
        """
        Every address of the host's interfaces.
        """
        return await namespaces.host_addresses(self._host_netns)

    # -- inner ---------------------------------------------------------------------------------

    async def _ask(self, address: str) -> list[AgentContainer]:
        timeout = asyncio.timeout(MISS_LIMIT_S)
        try:
            async with timeout:
                entries = await self._client.list_containers()
                here = {
                    text(entry.get("Id"))
                    for entry in entries
                    if address_on(self.network, section(entry, "NetworkSettings")) == address
                }
                sharing = {_SHARED + number for number in here}
                wanted = (
                    entry
                    for entry in entries
                    if _is_agent(entry) and (entry.get("Id") in here or _network_mode(entry) in sharing)
                )
                found = await self._described(entries, wanted)
                return [container for container in found if container.running and container.address == address]
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise Unavailable(f"the engine did not say within {MISS_LIMIT_S:.0f} s who has {address}") from error

    async def _described(
        self, entries: list[dict[str, Any]], wanted: Iterable[Mapping[str, Any]]
    ) -> list[AgentContainer]:
        """The containers behind list entries, in full; those that are gone meanwhile are left out."""
        found: dict[str, AgentContainer] = {}

        async def one(number: str) -> None:
            async with self._slots:
                mark = self._cache.mark()
                try:
                    record = await self._client.inspect(number)
                except NotFound:
                    return
                container = describe(record, self.network)
                if container.running and container.is_agent:
                    found[number] = await self._completed(container, record, entries)
                    self._cache.keep(found[number], mark)

        numbers = [text(entry.get("Id")) for entry in wanted]
        try:
            async with asyncio.TaskGroup() as group:
                for number in numbers:
                    group.create_task(one(number), name=f"inspect {number[:12]}")
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [found[number] for number in numbers if number in found]

    async def _completed(
        self, container: AgentContainer, record: Mapping[str, Any], entries: list[dict[str, Any]]
    ) -> AgentContainer:
        """With what the host knows: address behind a shared namespace, cgroup, process, exposures."""
        info = await self._engine_info()
        if container.is_agent:
            found = exposures(
                record,
                self._surroundings(info),
                neighbours=[_neighbour(entry) for entry in entries],
                volumes=await self._bound_volumes(record),
            )
            container = replace(container, exposures=found)
        if not container.running:
            return container
        mode = text(section(record, "HostConfig").get("NetworkMode"))
        if mode.startswith(_SHARED):
            owner = next((entry for entry in entries if _SHARED + text(entry.get("Id")) == mode), {})
            container = replace(container, address=address_on(self.network, section(owner, "NetworkSettings")))
        parent = text(section(record, "HostConfig").get("CgroupParent"))
        driver, user = text(info.get("CgroupDriver")), self._rootless_user(info)
        try:
            place = await asyncio.to_thread(
                cgroups.locate, container.id, container.pid, driver=driver, parent=parent, user=user
            )
        except (NotFound, Unsupported) as error:
            # Told, not raised: the container is what it is, and nobody can enrol it without a cgroup.
            log.warning("engines_cgroup_unknown", id=container.id[:12], cause=str(error), hint=error.hint)
            return replace(container, pid=0)
        return replace(container, cgroup_path=place.path, cgroup_id=place.id, pid=place.pid)

    async def _engine_info(self) -> Mapping[str, Any]:
        if not self._info:
            self._info = await self._client.info()
        return self._info

    def _surroundings(self, info: Mapping[str, Any]) -> Surroundings:
        known = Surroundings(self.network.id)
        mounts = read_mounts()
        return Surroundings(
            network=self.network.id,
            data_root=text(info.get("DockerRootDir")) or known.data_root,
            sockets=(self._client.socket,),
            own=self._own,
            cgroupfs=(*known.cgroupfs, *(str(m.path) for m in mounts if m.kind in {"cgroup", "cgroup2"})),
            bpffs=(*known.bpffs, *(str(m.path) for m in mounts if m.kind == "bpf")),
        )

    def _rootless_user(self, info: Mapping[str, Any]) -> int | None:
        options = info.get("SecurityOptions")
        if not isinstance(options, list) or "name=rootless" not in options:
            return None
        try:
            return Path(self._client.socket).stat().st_uid
        except OSError:
            return None

    async def _bound_volumes(self, record: Mapping[str, Any]) -> dict[str, str]:
        """The volumes of a container that are a path of the host in disguise (driver option `device`)."""
        found = {}
        mounts = record.get("Mounts")
        for mount in mounts if isinstance(mounts, list) else ():
            name = text(mount.get("Name"))
            if mount.get("Type") != "volume" or not name:
                continue
            try:
                options = section(await self._client.volume_inspect(name), "Options")
            except NotFound:
                continue
            if "bind" in text(options.get("o")).split(",") and text(options.get("device")):
                found[name] = text(options.get("device"))
        return found


def _is_agent(entry: Mapping[str, Any]) -> bool:
    labels = labels_of(entry.get("Labels"))
    return all(labels.get(key) == value for key, value in AGENTS.items())


def _network_mode(entry: Mapping[str, Any]) -> str:
    return text(section(entry, "HostConfig").get("NetworkMode"))


def _neighbour(entry: Mapping[str, Any]) -> Neighbour:
    names = entry.get("Names")
    name = text(names[0]).removeprefix("/") if isinstance(names, list) and names else ""
    return Neighbour(text(entry.get("Id")), name, _network_mode(entry), _is_agent(entry))
