"""
The running proxy: process, files and acknowledgement behind a few verbs.

`open` brings Envoy to a plan without taking anything away yet, `close` takes away what the plan
does not have; `apply` is both. A refusal puts the old files back (I5, R19).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import orjson
import structlog

from clawker_cp.errors import ClawkerError, DeadlineExceeded, Unavailable
from clawker_cp.firewall.envoy.admin import EnvoyAdmin
from clawker_cp.firewall.envoy.files import ConfigDirectory, make_directory, replace_file, trim_log, writing_order
from clawker_cp.firewall.envoy.judging import judge, static_configuration
from clawker_cp.firewall.envoy.options import EnvoyOptions, find_binary
from clawker_cp.firewall.envoy.resources import CDS, LDS, ConfigFile, Resources, bootstrap, build_resources
from clawker_cp.firewall.envoy.watches import ensure_watches
from clawker_cp.firewall.inspection import Leaf
from clawker_cp.firewall.plan import Plan

log = structlog.get_logger()

START_LIMIT_S = 20.0
ADOPT_LIMIT_S = 3.0
ACKNOWLEDGE_LIMIT_S = 10.0
FIRST_ADDRESS_LIMIT_S = 3.0
RESTART_MIN_S, RESTART_MAX_S = 0.5, 10.0
END_SHOWS_S = 0.3  # less than RESTART_MIN_S: nobody starts the next one before
STEADY_S = 60.0
POLL_MIN_S, POLL_MAX_S = 0.002, 0.05
LOG_TAIL_BYTES = 65536
LOG_CHECK_S = 60.0


# The resolver library answers from the hosts file before it asks anybody, and cannot be told not
# to: Envoy gets a mount namespace in which that file is empty. The process stays the same.
_WITHOUT_HOSTS = ("unshare", "--mount", "--propagation", "private", "--", "sh", "-c")
_SCRIPT = 'mount --bind /dev/null /etc/hosts && exec "$0" "$@"'


# What Envoy finds in its environment beyond PATH and HOME: nothing of ours.
ENVOY_ENVIRONMENT: dict[str, str] = {}


class LastingProcessLike(Protocol):
    """What the stack needs of `processes.lasting.LastingProcess`, or of a container that fulfils the same."""

    @property
    def pid(self) -> int: ...
    @property
    def running(self) -> bool: ...
    async def start(self, digest: str) -> bool: ...
    async def wait(self) -> None: ...
    async def stop(self) -> None: ...
    def let_live(self) -> None: ...
    def last_output(self, limit_bytes: int = 4096) -> str: ...


class Certificates(Protocol):
    """What the stack needs of `inspection.InspectionAuthority`; called in a thread."""

    def leaves(self, plan: Plan) -> Mapping[str, Leaf]: ...
    def sweep(self, plan: Plan) -> None: ...


def envoy_command(binary: Path | str, options: EnvoyOptions, *, hide_hosts: bool | None = None) -> list[str]:
    """
    Return the command line of contract 8.4; its output goes to `options.log`.

    `hide_hosts` (default: when we may) keeps the hosts file of this machine from it.
    """
    command = [
        str(binary), "-c", str(options.bootstrap), "--disable-hot-restart",
        "--concurrency", str(options.concurrency), "--drain-time-s", "1", "--drain-strategy", "immediate",
        "--file-flush-interval-msec", "50", "-l", "warning",
    ]  # fmt: skip
    if hide_hosts is None:
        hide_hosts = os.geteuid() == 0
    return [*_WITHOUT_HOSTS, _SCRIPT, *command] if hide_hosts else command


class EnvoyStack:
    """
    Drives one Envoy. One caller at a time: the reconciler.

    `restarts` counts unexpected ends since the start.
    """

    def __init__(
        self,
        options: EnvoyOptions,
        process: LastingProcessLike,
        certificates: Certificates,
        *,
        binary: Path | str = "",
    ) -> None:
        self._options = options
        self._process = process
        self._certificates = certificates
        self._binary = binary
        self._admin = EnvoyAdmin(options.admin_socket)
        self._files = ConfigDirectory(options.directory, 0)
        self._resources: Resources | None = None
        self._plan: Plan | None = None
        self._stopping = False
        self._digest = ""
        self._lost = ""
        self.adopted = False
        self.restarts = 0

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process.running

    @property
    def lost(self) -> str:
        """Why an Envoy that ended by itself could not be brought back, "" otherwise; it is tried again and again."""
        return self._lost

    @property
    def admin(self) -> EnvoyAdmin:
        """The admin interface, for log rotation and probes."""
        return self._admin

    async def start(self, plan: Plan) -> None:
        """
        Write the whole configuration, adopt or launch Envoy, and wait until it carries it.

        An Envoy that an earlier control plane left running is adopted with its connections if it
        was started with the same bootstrap (R22), else ended. Raises `Unavailable` with Envoy's
        own last words.
        """
        self._stopping, self._lost = False, ""
        make_directory(self._options.directory)
        # Above every version an adopted Envoy may have seen.
        self._files = ConfigDirectory(self._options.directory, time.time_ns() // 1000)
        resources = await asyncio.to_thread(self._build, plan)
        start_text = bootstrap(self._options)
        self._digest = hashlib.sha256(start_text).hexdigest()
        replace_file(self._options.bootstrap, start_text, 0o640)
        for name in writing_order(resources.files):
            self._files.write(name, resources.files[name])
        try:
            refused = await self._launch(list(resources.files))
        except Unavailable as error:
            if "[critical]" in self._process.last_output(LOG_TAIL_BYTES) or not await self.has_ended():
                raise
            log.warning("envoy_ended_at_start", cause=str(error), effect="it is started once more")
            refused = await self._launch(list(resources.files))
        if refused:
            raise Unavailable(f"Envoy refused its configuration: {refused}")
        self._resources = resources
        self._remove_strays(resources)
        log.info("envoy_started", pid=self._process.pid, adopted=self.adopted)

    async def apply(self, plan: Plan) -> int:
        """Bring Envoy to a plan, in both directions; returns how many files changed."""
        return await self.open(plan) + await self.close()

    async def open(self, plan: Plan) -> int:
        """
        Bring Envoy to a plan, keeping listeners and clusters that the plan does not have.

        Returns how many files changed, once all are acknowledged. A refusal raises `ClawkerError`
        `RULE_INVALID` with Envoy's words after the old files are back; silence raises
        `DeadlineExceeded` `STACK_UNHEALTHY`.
        """
        before = self._resources
        if before is None:
            raise Unavailable("Envoy is not started", code="STACK_UNHEALTHY")
        resources = await asyncio.to_thread(self._build, plan)
        files = dict(resources.files)
        written = self._files.written
        for name in (CDS, LDS):
            files[name] = _union(files[name], written[name])
        changed = self._files.changed(files)
        if changed:
            await self._replace({name: files[name] for name in changed})
        self._resources, self._plan = resources, plan
        fresh = resources.opaque - before.opaque
        if fresh:
            await self._first_addresses(fresh)
        return len(changed)

    async def close(self) -> int:
        """Take away what the plan of the last `open` does not have; returns how many files changed."""
        resources = self._resources
        if resources is None:
            raise Unavailable("Envoy is not started", code="STACK_UNHEALTHY")
        count = 0
        for name in (LDS, CDS):
            if self._files.changed({name: resources.files[name]}):
                await self._replace({name: resources.files[name]})
                count += 1
        self._files.forget(resources.files)
        if count and self._plan is not None:
            await asyncio.to_thread(self._certificates.sweep, self._plan)
        return count

    async def validate(self, plan: Plan) -> None:
        """
        Let an Envoy that serves nothing judge a plan; for when the stack is stopped (R19).

        Raises `ClawkerError` `RULE_INVALID` with its words.
        """
        resources = await asyncio.to_thread(self._build, plan)
        text = await asyncio.to_thread(static_configuration, resources, self._options)
        make_directory(self._options.directory)
        path = self._options.directory / ".clawker-validate.json"
        replace_file(path, text, 0o600)
        try:
            await judge(find_binary(str(self._binary)), path)
        finally:
            path.unlink(missing_ok=True)

    async def stage(self, plan: Plan) -> None:
        """
        Write a plan for the next life of an Envoy that is down just now, without waiting for anybody.

        Nothing to do for a stopped stack: its start writes everything.
        """
        if self._resources is None:
            return
        resources = await asyncio.to_thread(self._build, plan)
        for name in self._files.changed(resources.files):
            self._files.write(name, resources.files[name])
        self._files.forget(resources.files)
        self._resources, self._plan = resources, plan

    async def has_ended(self) -> bool:
        """
        Whether what just failed failed because Envoy ended; its sockets close a moment before its end shows.
        """
        try:
            async with asyncio.timeout(END_SHOWS_S):
                await self._process.wait()
        except TimeoutError:
            return False
        return True

    async def busy(self, destinations: Collection[str]) -> set[str]:
        """Return those unread destinations that have connections now."""
        stems = self._resources.stems if self._resources else {}
        now = await self._admin.statistics(r"^cluster[.](?:tcp|udp)_.*[.]upstream_cx_active$")
        active = {name.split(".")[1] for name, value in now.items() if int(value)}
        return {
            dst
            for dst in destinations
            if dst in stems and any(name.partition("_")[2].rpartition("_")[0] == stems[dst] for name in active)
        }

    async def supervise(self) -> None:
        """
        Restart Envoy whenever it ends, for ever, with back-off (R23); until cancelled or stopped.

        Its files are whole at any moment, so it comes back with the policy it had.
        """
        pause = RESTART_MIN_S
        while not self._stopping:
            began = time.monotonic()
            await self._wait_for_end()
            if self._stopping:
                return
            self.restarts += 1
            log.error(
                "envoy_unavailable",
                cause=self._process.last_output(512),
                blast_radius="all proxied connections are gone, new ones are refused",
                retry_s=pause,
            )
            if time.monotonic() - began > STEADY_S:
                pause = RESTART_MIN_S
            await asyncio.sleep(pause)
            pause = min(pause * 2, RESTART_MAX_S)
            if self._stopping:  # meanwhile
                return
            try:
                await self._process.start(self._digest)
                await self._wait_live()
                self._lost = ""
                log.info("envoy_recovered", restarts=self.restarts)
            except ClawkerError as error:
                self._lost = str(error)
                log.warning("envoy_restart_failed", cause=str(error))

    async def stop(self) -> None:
        """End Envoy and its connections."""
        self._stopping = True
        self._resources = None
        await self._admin.aclose()
        await self._process.stop()

    async def leave(self) -> None:
        """Let Envoy run on, for the next start to adopt."""
        self._stopping = True
        self._process.let_live()
        await self._admin.aclose()

    async def is_healthy(self) -> bool:
        """Return whether Envoy is live; a probe, not a memory."""
        return await self._admin.is_live()

    # -- inner -------------------------------------------------------------------------------

    async def _launch(self, names: list[str]) -> str:
        """Adopt or launch Envoy and wait until it carries its files; returns what it refused."""
        self.adopted = await self._process.start(self._digest)
        if self.adopted and not await self._answers():
            log.warning(
                "envoy_silent", pid=self._process.pid, effect="it is ended with its connections, another starts"
            )
            await self._process.stop()
            self.adopted = await self._process.start(self._digest)
        await self._wait_live()
        return await self._acknowledge(names, {})

    def _build(self, plan: Plan) -> Resources:
        ensure_watches(len(plan.policies))
        return build_resources(plan, self._certificates.leaves(plan), self._options, self._resources)

    async def _replace(self, files: Mapping[str, ConfigFile]) -> None:
        """Write files and wait; put the old ones back if Envoy refuses."""
        old = {name: self._files.written.get(name) for name in files}
        counters = await self._admin.statistics("update_rejected$")
        position = self._log_size()
        for name in writing_order(files):
            self._files.write(name, files[name])
        refused = await self._acknowledge(list(files), counters)
        if not refused:
            return
        back = {name: file for name, file in old.items() if file is not None}
        for name in writing_order(back):
            self._files.write(name, back[name])
        words = self._refusal(position) or refused
        try:
            await self._acknowledge(list(back), await self._admin.statistics("update_rejected$"))
        except DeadlineExceeded:
            log.warning("envoy_undo_unacknowledged", files=sorted(back))
        raise ClawkerError(
            f"Envoy refused the change: {words}", code="RULE_INVALID", hint="nothing was changed; correct the rule"
        )

    async def _acknowledge(self, names: list[str], rejected_before: Mapping[str, str]) -> str:
        """
        Wait until Envoy shows the versions of all files; returns what it refused, "" = nothing.

        Raises `DeadlineExceeded` naming what is still missing.
        """
        wanted = self._files.expected(names)
        stems = sorted(stat.removesuffix("version_text") for stat in wanted)
        exact = "|".join(stem.replace(".", "[.]") for stem in stems)
        pattern = f"^(?:{exact})(?:version_text|update_rejected)$|^listener_manager[.]total_listeners_warming$"
        if len(stems) > 64:
            pattern = "(?:version_text|update_rejected|total_listeners_warming)$"
        until = time.monotonic() + ACKNOWLEDGE_LIMIT_S
        pause = POLL_MIN_S
        while True:
            now = await self._admin.statistics(pattern)
            for stem in stems:
                counter = f"{stem}update_rejected"
                if int(now.get(counter, "0")) > int(rejected_before.get(counter, "0")):
                    return stem.rstrip(".")
            missing = [stat for stat, version in wanted.items() if now.get(stat) != version]
            if not missing and now.get("listener_manager.total_listeners_warming", "0") == "0":
                return ""
            if not self._process.running:
                raise Unavailable(f"Envoy ended: {self._process.last_output(512)}", code="STACK_UNHEALTHY")
            if time.monotonic() > until:
                raise DeadlineExceeded(
                    f"Envoy did not take {', '.join(sorted(missing)[:3]) or 'its listeners'} "
                    f"within {ACKNOWLEDGE_LIMIT_S:.0f} s",
                    code="STACK_UNHEALTHY",
                    hint="the reconciler keeps trying",
                )
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, POLL_MAX_S)

    async def _first_addresses(self, clusters: frozenset[str]) -> None:
        """Wait until new clusters have asked for their address once, found or not."""
        until = time.monotonic() + FIRST_ADDRESS_LIMIT_S
        waiting = set(clusters)
        pause = POLL_MIN_S
        while waiting and time.monotonic() < until:
            now = await self._admin.statistics(r"^cluster[.].*[.]update_(?:success|failure|empty)$")
            waiting = {
                name
                for name in waiting
                if not any(int(now.get(f"cluster.{name}.update_{how}", "0")) for how in ("success", "failure", "empty"))
            }
            if waiting:
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, POLL_MAX_S)
        if waiting:
            log.warning("envoy_address_pending", clusters=sorted(waiting)[:5], count=len(waiting))

    async def _answers(self) -> bool:
        """Whether an adopted Envoy is live; one that is stopped, or has lost its admin socket, never will be."""
        try:
            async with asyncio.timeout(ADOPT_LIMIT_S):
                while self._process.running:
                    if await self._admin.is_live():
                        return True
                    await asyncio.sleep(0.02)
        except TimeoutError:
            pass
        return False

    async def _wait_live(self) -> None:
        until = time.monotonic() + START_LIMIT_S
        while not await self._admin.is_live():
            if not self._process.running:
                raise self._no_start("ended at start")
            if time.monotonic() > until:
                raise self._no_start(f"was not ready within {START_LIMIT_S:.0f} s")
            await asyncio.sleep(0.02)

    def _no_start(self, how: str) -> Unavailable:
        said = self._process.last_output(LOG_TAIL_BYTES).splitlines()
        why = next((line for line in reversed(said) if "[critical]" in line), said[-1] if said else "it said nothing")
        return Unavailable(
            f"Envoy {how}: {why.rpartition('] ')[2][:512]}",
            code="STACK_UNHEALTHY",
            hint=f"its log is {self._options.log}; envoy.binary has to be Envoy 1.40",
        )

    async def _wait_for_end(self) -> None:
        """Wait until the process has ended, keeping its log within bounds meanwhile."""
        while True:
            try:
                async with asyncio.timeout(LOG_CHECK_S):
                    await self._process.wait()
                return
            except TimeoutError:
                await asyncio.to_thread(trim_log, self._options.log)

    def _log_size(self) -> int:
        try:
            return self._options.log.stat().st_size
        except OSError:
            return 0

    def _refusal(self, position: int) -> str:
        """Return what Envoy said about the last update it refused."""
        try:
            with self._options.log.open("rb") as file:
                file.seek(position)
                text = file.read(LOG_TAIL_BYTES).decode("utf-8", "replace")
        except OSError:
            return ""
        lines = [line for line in text.splitlines() if "rejected: " in line]
        return lines[-1].partition("rejected: ")[2][:1024] if lines else ""

    def _remove_strays(self, resources: Resources) -> None:
        """Delete files of policies that an earlier life had."""
        for path in self._options.directory.glob("*.json"):
            known = path.name in resources.files or path == self._options.bootstrap
            if not known and path.name.startswith(("rc_p", "sds-p")):
                path.unlink(missing_ok=True)


def _union(new: ConfigFile, old: ConfigFile) -> ConfigFile:
    """Return the new resources, and those of the old that it does not have and whose place is free."""
    kept = {name: data for name, data in old.resources.items() if name not in new.resources}
    if not kept:
        return new
    places = {_place(data) for data in new.resources.values()} - {None}
    kept = {name: data for name, data in kept.items() if _place(data) not in places}
    resources = {**new.resources, **kept}
    digest = hashlib.blake2b(b"\n".join(resources.values()), digest_size=16).digest()
    return replace(new, resources=resources, digest=digest) if kept else new


def _place(resource: bytes) -> tuple[str, int] | None:
    """Return what a listener is bound to, None for a cluster."""
    address = orjson.loads(resource).get("address")
    if address is None:
        return None
    socket = address["socket_address"]
    return socket["protocol"], socket["port_value"]
