"""
`clawkerctl up` and `down`: make, adopt, upgrade and end the container `clawker-controlplane`.

What it is made of is decided in `own_container.py`; this does it, in the order that leaves enforcement
in the kernel at every moment, and gives the previous container back when a new one does not get healthy.
"""

from __future__ import annotations

import asyncio
import http.client
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson

from clawker_cp.config import Directories, Settings
from clawker_cp.engines.base import AgentNetwork
from clawker_cp.engines.docker.network import read_plan
from clawker_cp.engines.docker.siblings import COREDNS, ENVOY, is_ours
from clawker_cp.engines.docker.stack import remove_sibling
from clawker_cp.engines.docker_client import endpoint_from, socket_path
from clawker_cp.errors import ClawkerError, Conflict, DeadlineExceeded, InvalidInput, NotFound, Unavailable, Unsupported
from clawker_cp.pki.tree import AuthTree
from clawker_cp.wiring.host_files import PID_FILE, RUN_DIRECTORY, alone, server_runs
from clawker_cp.wiring.kernel_sweep import sweep
from clawker_cp.wiring.own_container import (
    BPF_FS,
    MANAGED,
    NAME,
    PURPOSE,
    SPEC,
    STOP_S,
    Wanted,
    create_body,
    decide,
    identity_labels,
    is_running,
    last_word,
    refuse_foreign,
    without_bpf_capability,
)

PREVIOUS = f"{NAME}.previous"
HEALTHY_LIMIT_S = 90.0
POLL_S = 0.25
ANSWER_LIMIT_S = 3.0
LOG_LINES = 40
LOCK = "lifecycle.lock"
ONE_AT_A_TIME = "`clawkerctl up` or `clawkerctl down`"


class Docker(Protocol):
    """What is asked of the engine (`engines.docker_client.DockerClient`); errors are ours."""

    async def inspect(self, reference: str) -> dict[str, Any]: ...
    async def image_inspect(self, image: str) -> dict[str, Any]: ...
    async def inspect_network(self, reference: str) -> dict[str, Any]: ...
    async def list_containers(self, *, labels: Mapping[str, str] | None = None) -> list[dict[str, Any]]: ...
    async def create(self, name: str, config: Mapping[str, Any]) -> str: ...
    async def start(self, reference: str) -> None: ...
    async def stop(self, reference: str, *, grace_s: int = 10) -> None: ...
    async def rename(self, reference: str, name: str) -> None: ...
    async def remove(self, reference: str, *, force: bool = False) -> None: ...
    async def wait(self, reference: str, *, limit_s: float) -> int: ...
    async def logs(self, reference: str, *, lines: int = 100) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done to which container, and why; `action` as in `Decision`, or `removed` and `absent`."""

    action: str
    why: str = ""
    container_id: str = ""

    def as_mapping(self) -> dict[str, str]:
        """The outcome for JSON output."""
        return {"container": NAME, "action": self.action, "why": self.why, "id": self.container_id}


class ContainerLife:
    """
    The life of the one container, seen from the host. Each verb may be repeated at any time.

    `ensure_network` makes or adopts the agents' network. One call at a time, of this or any other process.
    """

    def __init__(
        self,
        docker: Docker,
        settings: Settings,
        directories: Directories,
        environ: Mapping[str, str],
        *,
        ensure_network: Callable[[], Awaitable[AgentNetwork]],
        bpffs: Path = Path(BPF_FS),
        pid_file: Path = RUN_DIRECTORY / PID_FILE,
    ) -> None:
        self._docker = docker
        self._settings = settings
        self._directories = directories
        self._environ = environ
        self._ensure_network = ensure_network
        self._bpffs = bpffs
        self._pid_file = pid_file
        self._lock = directories.data / LOCK

    async def up(self, image: str, *, limit_s: float = HEALTHY_LIMIT_S) -> Outcome:
        """
        Have the container run and answer `/healthz`; an equal one is left alone.

        Raises `Conflict` when a server runs on the host itself, the name is somebody else's or another call is at
        work, `NotFound` without the image, `Unavailable` or `DeadlineExceeded` with the server's own last word when
        it does not get healthy.
        """
        await asyncio.to_thread(refuse_server_on_host, self._pid_file)
        await asyncio.to_thread(refuse_without_bpffs, self._bpffs)
        with alone(self._lock, ONE_AT_A_TIME):
            image_id = await self._image_id(image)
            existing = await self._recover()
            body = await self._body(image, image_id, existing)
            decision = decide(existing, body, image_id)
            if existing is not None and decision.action in ("keep", "start"):
                if decision.action == "start":
                    await self._docker.start(NAME)
                await self._wait_healthy(limit_s)
            elif existing is not None and decision.action == "replace":
                await self._replace(existing, body, limit_s)
            else:
                await self._make(body, limit_s)
            return Outcome(decision.action, decision.why, str((await self._docker.inspect(NAME))["Id"]))

    async def down(self, image: str) -> Outcome:
        """
        Stop the server, which drains, and remove its container; what one that died left goes as well, in whatever
        state it is: containers that carried traffic, programs, maps, pins, packet filters. `image` looks after the
        kernel's part when there is no container, or its own image is gone.

        Raises `Conflict` naming the agents that run: without a control plane they would be denied everything new.
        May be repeated: what an error kept from being done is done then.
        """
        with alone(self._lock, ONE_AT_A_TIME):
            existing = await self._recover()
            on_host = await asyncio.to_thread(server_runs, self._pid_file)
            if existing is not None:
                refuse_foreign(existing)
            elif on_host:
                return Outcome("absent")
            await self._refuse_with_agents()
            drained = existing is not None and await self._stopped(existing)
            # Nobody would enrol one that was started meanwhile, and taking the ring away would open it.
            await self._refuse_with_agents()
            left = await self._siblings()
            for name in left:
                await remove_sibling(self._docker, name)
            if not on_host:
                left += await self._swept(existing, image, drained=drained)
            if existing is not None:
                await self._docker.remove(NAME)
        why = f"{', '.join(left[:-1])}{' and ' if left[1:] else ''}{left[-1]} had been left" if left else ""
        return Outcome("removed", why, str(existing["Id"])) if existing is not None else Outcome("absent", why)

    async def _refuse_with_agents(self) -> None:
        running = await self.agents()
        if running:
            raise Conflict(
                f"{len(running)} agents run: {', '.join(running[:5])}{', ...' if len(running) > 5 else ''}",
                code="AGENTS_RUNNING",
                hint=f"stop them first: docker stop {' '.join(running[:5])}. The kernel would go on enforcing without "
                "a control plane, and deny them every name and every proxied connection",
            )

    async def _stopped(self, existing: Mapping[str, Any]) -> bool:
        """End the server; whether it ran, and ended as one that has drained."""
        ran = is_running(existing)
        await self._docker.stop(NAME, grace_s=STOP_S)
        return ran and (await self._docker.inspect(NAME))["State"].get("ExitCode") == 0

    async def _swept(self, existing: Mapping[str, Any] | None, image: str, *, drained: bool) -> list[str]:
        """Take away what is left in the kernel; what there was."""
        pin_dir = self._settings.firewall.pin_dir
        ours = existing is not None and SPEC in (existing["Config"].get("Labels") or {})
        for name in [*([str(existing["Image"])] if existing is not None and ours else []), image]:
            try:
                image_id = str((await self._docker.image_inspect(name))["Id"])
            except NotFound:
                continue
            return await sweep(self._docker, self._create, image_id, pin_dir)
        there = await asyncio.to_thread(is_there, Path(pin_dir))
        if drained or there is False or (there is None and existing is None):
            return []
        raise NotFound(
            f"what the control plane left in the kernel stays: the engine has no image {image} to take it away with",
            hint="make it (`make image`) or name another with --image, and repeat this; or as root: ebpf-manager flush",
        )

    async def agents(self) -> list[str]:
        """Names of the agents' containers that run or are paused."""
        found = await self._docker.list_containers(labels={MANAGED: "true", PURPOSE: "agent"})
        return sorted(str((one.get("Names") or [one["Id"][:12]])[0]).lstrip("/") for one in found)

    async def _siblings(self) -> list[str]:
        """Names of the containers that are there to carry the traffic of a server."""
        found = [(name, await self._find(name)) for name in (ENVOY, COREDNS)]
        return [name for name, record in found if record is not None and is_ours(record)]

    async def state(self) -> dict[str, Any] | None:
        """The container as `clawkerctl status` shows it; None when there is none."""
        existing = await self._find(NAME)
        if existing is None:
            return None
        state = existing["State"]
        return {
            "name": NAME,
            "id": existing["Id"],
            "image": existing["Config"]["Image"],
            "status": state["Status"],
            "health": (state.get("Health") or {}).get("Status", ""),
            "exit_code": state.get("ExitCode", 0),
            "restarts": existing.get("RestartCount", 0),
            "started_at": state.get("StartedAt", ""),
        }

    async def last_word(self) -> str:
        """What the server said last, in one line."""
        try:
            return last_word((await self._docker.logs(NAME, lines=LOG_LINES)).decode("utf-8", "replace"))
        except ClawkerError:
            return ""

    # -- steps -------------------------------------------------------------------------------

    async def _image_id(self, image: str) -> str:
        try:
            return str((await self._docker.image_inspect(image))["Id"])
        except NotFound as error:
            raise NotFound(
                f"the engine has no image {image}", hint="docker build -t clawker-cp . (or `make image`), or --image"
            ) from error

    async def _find(self, name: str) -> dict[str, Any] | None:
        try:
            return await self._docker.inspect(name)
        except NotFound:
            return None

    async def _recover(self) -> dict[str, Any] | None:
        """The container; an upgrade that was interrupted between its steps is undone first."""
        existing, previous = await self._find(NAME), await self._find(PREVIOUS)
        if previous is None:
            return existing
        if existing is not None and is_running(existing):
            await self._docker.remove(PREVIOUS, force=True)
            return existing
        if existing is not None:
            await self._docker.remove(NAME, force=True)
        await self._docker.rename(PREVIOUS, NAME)
        return await self._find(NAME)

    async def _body(self, image: str, image_id: str, existing: Mapping[str, Any] | None) -> dict[str, Any]:
        socket = socket_path(endpoint_from(self._environ))
        tree = AuthTree(self._directories.data / "auth")
        await asyncio.to_thread(self._prepare, tree)
        network = await self._ensure_network()
        record = await self._docker.inspect_network(network.id)
        # The engine takes a static address only on a network made with a subnet, as ours is (R2).
        ranged = any(one.get("IPRange") for one in (record.get("IPAM") or {}).get("Config") or ())
        address = str(read_plan(record).static(self._settings.network.octets.cp)) if ranged else ""
        labels = identity_labels(existing, image_id, self._environ)
        wanted = Wanted(image, image_id, address, socket, self._environ, labels)
        return create_body(self._settings, self._directories, tree, wanted)

    def _prepare(self, tree: AuthTree) -> None:
        """Whatever is mounted has to be there: the engine would make a directory, and of root, in its place."""
        tree.ensure()
        self._directories.config.mkdir(parents=True, exist_ok=True)
        for directory in (self._directories.firewall, self._directories.logs):
            directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        (self._directories.data / "controlplane").mkdir(parents=True, exist_ok=True, mode=0o700)

    async def _make(self, body: Mapping[str, Any], limit_s: float) -> None:
        """Create and start; one that does not get healthy is removed again, its last word is in the error."""
        await self._create(NAME, body)
        try:
            await self._docker.start(NAME)
            await self._wait_healthy(limit_s)
        except BaseException:
            async with asyncio.timeout(STOP_S):
                await self._docker.remove(NAME, force=True)
            raise

    async def _create(self, name: str, body: Mapping[str, Any]) -> None:
        try:
            await self._docker.create(name, body)
        except InvalidInput as error:
            if "CAP_BPF" not in error.message:
                raise
            await self._docker.create(name, without_bpf_capability(body))

    async def _replace(self, existing: Mapping[str, Any], body: Mapping[str, Any], limit_s: float) -> None:
        """
        End the old server, start the new one; the old one comes back if that fails.

        Told by SIGTERM while agents run, the old server leaves its programs and maps in the kernel, where the new
        one adopts them: what is denied stays denied. Names and proxied connections wait for the new server.
        """
        ran = is_running(existing)
        await self._docker.stop(NAME, grace_s=STOP_S)
        await self._docker.rename(NAME, PREVIOUS)
        try:
            await self._make(body, limit_s)
        except BaseException as error:
            async with asyncio.timeout(STOP_S):
                await self._docker.rename(PREVIOUS, NAME)
                if ran:
                    await self._docker.start(NAME)
            if isinstance(error, ClawkerError):
                kept = f"the previous container {'runs again' if ran else 'is kept'}"
                error.hint = f"{kept}; {error.hint}" if error.hint else kept
            raise
        await self._docker.remove(PREVIOUS, force=True)

    async def _wait_healthy(self, limit_s: float) -> None:
        port = self._settings.cli.control_plane.health_port
        until = time.monotonic() + limit_s
        said = "nothing answers"
        while time.monotonic() < until:
            record = await self._docker.inspect(NAME)
            if not is_running(record) or record.get("RestartCount"):
                raise Unavailable(
                    f"{NAME} ended before it was healthy: {await self.last_word() or 'it said nothing'}",
                    hint=f"its whole log: {self._directories.logs / 'clawker-controlplane.log'}",
                )
            healthy, said = await asyncio.to_thread(ask_health, port)
            if healthy:
                return
            await asyncio.sleep(POLL_S)
        raise DeadlineExceeded(
            f"{NAME} was not healthy within {limit_s:g} s ({said}): {await self.last_word()}",
            hint=f"its whole log: {self._directories.logs / 'clawker-controlplane.log'}",
        )


def ask_health(port: int) -> tuple[bool, str]:
    """
    Ask `/healthz` on loopback; whether it is healthy, and what it says in a few words. Blocks up to `ANSWER_LIMIT_S`.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_LIMIT_S)
    try:
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        body = answer.read(4096)
    except (OSError, http.client.HTTPException):
        return False, "nothing answers"
    finally:
        connection.close()
    try:
        told = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False, f"HTTP {answer.status}"
    probe = told.get("failed_probe") if isinstance(told, dict) else None
    said = str(told.get("status")) if isinstance(told, dict) else f"HTTP {answer.status}"
    return answer.status == http.client.OK, f"{said}: {probe}" if probe else said


def refuse_server_on_host(pid_file: Path) -> None:
    """
    Raise `Conflict` when a server runs on the host itself: it holds the pid file, and the pins.
    """
    if server_runs(pid_file):
        raise Conflict(
            f"a control plane runs on this host already, outside of a container (see {pid_file})",
            code="ALREADY_RUNNING",
            hint=f"end it first: kill $(cat {pid_file}); enforcement stays while agents run",
        )


def refuse_without_bpffs(path: Path) -> None:
    """
    Raise `Unsupported` when the host has no bpffs to mount: pins would end with the container.
    """
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    if not any(line.split(" ")[4] == str(path) and " - bpf " in line for line in mounts):
        raise Unsupported(
            f"{path} is no bpffs on this host", feature="bpffs", needs="bpffs", hint=f"mount -t bpf bpf {path}"
        )


def is_there(path: Path) -> bool | None:
    """
    Whether there is something at a path; None when we may not look.
    """
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return True
