"""
The one writer of the kernel maps (I8): load, adopt, attach, and the verbs of docs/bpf.md.

Verbs are synchronous and cheap; `load`, `flush` and `sync_routes` of a large table block for
milliseconds and belong in a thread. Nothing here knows who an agent is or what a rule says.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import structlog

from clawker_cp import accel
from clawker_cp._fast import bpfmap, layout
from clawker_cp.ebpf import routes
from clawker_cp.ebpf.attachments import Attachments
from clawker_cp.ebpf.config import AgentConfig, InboundFrom, IPNetwork, NameRowLike, mapped_prefix
from clawker_cp.ebpf.kernel_cgroups import KernelCgroups, Place
from clawker_cp.ebpf.mending import Mender
from clawker_cp.ebpf.names import LearntNames
from clawker_cp.errors import CapacityExceeded, Conflict, InvalidInput, Unavailable, Unsupported

log = structlog.get_logger()

OLD_GENERATION_S = 1.0
CONTROL_KEY = bytes(4)
NOBODY = bytes(8)
LINKS_DIR = "links"


@dataclass(frozen=True, slots=True)
class LoadReport:
    """
    What `load` found: pins of this layout (adopted), of another one (replaced), or none; how many agents
    have rows, and how many containers have links of their own.
    """

    adopted: bool
    replaced: bool
    agents: int
    attached: int = 0


@dataclass(frozen=True, slots=True)
class SyncReport:
    """How many rows changed, whether a new generation was written, and how long it took."""

    changed: int
    full: bool
    elapsed_us: int


class Manager:
    """
    Owns the pinned kernel state below `pin_dir`.

    Construction does nothing. `close` gives descriptors back and leaves everything pinned and
    enforcing; only `flush` takes enforcement away.
    """

    def __init__(self, pin_dir: Path, *, max_agents: int = 4096) -> None:
        self._pin_dir = pin_dir
        self._max_agents = max_agents
        self._cgroups = KernelCgroups()
        self._attachments = Attachments(pin_dir / LINKS_DIR, self._load_object, self._cgroups)
        self._maps: dict[str, bpfmap.BpfMap] = {}
        self._life = threading.RLock()  # who gave up waiting for a load flushes: after it
        self.mender = Mender(pin_dir, self._attachments, self._maps)
        self._ring: bpfmap.RingBuffer | None = None
        self._generation = 0
        self._table = routes.Table()
        self._stale: tuple[float, routes.Table] | None = None
        self._names: LearntNames
        self._budgets = (0, 0, 0)

    # -- life ---------------------------------------------------------------------------------

    def load(self, parent: Path | None) -> LoadReport:
        """
        Load and attach to the agents' parent cgroup, adopting what an earlier run pinned; None: to no parent,
        agents are then judged where `attach` is told to.

        Links of an earlier run get the new programs by an atomic update: there is no moment
        without one. Pins of another layout are replaced after the new programs are linked.
        Raises `Unsupported` with the verifier's first line when the kernel refuses, `Conflict` when
        agents live below another parent that an earlier run had.
        """
        with self._life:
            self._prepare_pin_dir()
            adopted = (self._pin_dir / "control").exists()
            replaced = False
            try:
                place = self._place(parent) if parent is not None else None
                loaded = self._attachments.first_object(place)
            except OSError as error:
                if not adopted or error.errno not in {22, 17}:
                    raise self._unsupported(error) from error
                log.warning("pins_replaced", pin_dir=str(self._pin_dir), cause=str(error))
                self._set_aside_maps()
                adopted, replaced = False, True
                place = self._place(parent) if parent is not None else None
                loaded = self._attachments.first_object(place)
            for name, (key_bytes, value_bytes) in layout.SIZES.items():
                self._maps[name] = loaded.map(name, key_bytes, value_bytes)
            self._names = LearntNames(self._maps["dns_cache"], lambda: routes.identities(self._table))
            self._adopt_control(adopted=adopted)
            self._attachments.adopt(parent, place)
            self._ring = bpfmap.RingBuffer(self._maps["events"].fd)
            if adopted:
                self._adopt_rows()
            log.info("pins_adopted" if adopted else "ebpf_loaded", pin_dir=str(self._pin_dir))
            agents = len(self._maps["container_map"].all_keys())
            return LoadReport(adopted, replaced, agents, len(self._attachments.attached()))

    @property
    def loaded(self) -> bool:
        """Whether the programs are attached and the maps can be written."""
        return self._ring is not None

    def close(self) -> None:
        """Give descriptors back; enforcement stays pinned. Safe to call twice."""
        with self._life:
            if self._ring is not None:
                self._ring.close()
                self._ring = None
            with self.mender.paused():
                for opened in self._maps.values():
                    opened.close()
                self._maps.clear()
            self._attachments.close()
            self._cgroups.close()
            # What was mirrored of the maps counts for those maps only: a later `load` finds out anew.
            self._table, self._stale, self._generation = routes.Table(), None, 0

    def flush(self, *, force: bool = False) -> None:
        """
        Detach and unpin everything. Refuses while a cgroup below the parent, or an attached one, has processes.
        """
        with self._life:
            if not force and (busy := self._attachments.busy()):
                raise Conflict(
                    f"{len(busy)} agent cgroups still have processes, the first is {busy[0]}",
                    hint="stop the agents first; enforcement stays",
                )
            self.close()
            shutil.rmtree(self._pin_dir / LINKS_DIR, ignore_errors=True)
            for path in self._pin_dir.iterdir() if self._pin_dir.exists() else ():
                path.unlink(missing_ok=True)
            if self._pin_dir.exists():
                self._pin_dir.rmdir()

    # -- containers outside the agents' parent ---------------------------------------------------

    def attach(self, cgroup: Path) -> int:
        """
        See to it that a container's cgroup, and all below it, is judged as one agent; returns the id to enrol.

        One directly below the agents' parent is judged there already and gets no links. Attach before
        `enroll`: without a row everything is denied. Idempotent; finishes what was interrupted. Takes
        milliseconds, a second for the first at its depth: in a thread. Raises `NotFound` for a cgroup that
        is gone; `Conflict` for one that the programs would know as somebody else (deeper below the
        parent, inside another agent), or that is none of an agent (the root, above the parent, our own).
        """
        if self._ring is None:
            raise Unavailable("the kernel side is not loaded", code="ENFORCEMENT_UNAVAILABLE")
        return self._attachments.attach(cgroup)

    def detach(self, cgroup_id: int) -> None:
        """
        Let go of a dead or empty cgroup; unknown ids are fine. `Conflict` while it has processes.

        Its links are unpinned once the kernel has forgotten the cgroup, with its last socket (`collect_garbage`).
        """
        self._attachments.detach(cgroup_id)

    def attached(self) -> set[int]:
        """
        Ids of the cgroups that have links of their own. Those of dead containers want `detach`.
        """
        return self._attachments.attached()

    # -- agents -------------------------------------------------------------------------------

    def enroll(self, cgroup_id: int, config: AgentConfig) -> None:
        """
        Write an agent's row; from here on its policy holds. Raises `CapacityExceeded` when full.
        """
        key = _u64(cgroup_id)
        try:
            if self._maps["state_map"].get(key) is None:
                self._maps["state_map"].put(key, layout.empty_state())
            self._maps["container_map"].put(key, config.pack())
        except OSError as error:
            if error.errno == 7:  # E2BIG: the map is full
                raise CapacityExceeded(
                    f"{self._max_agents} agents are enrolled already",
                    limit="agents",
                    hint="raise firewall.max_agents and restart the control plane",
                ) from error
            raise Unavailable(f"cannot enrol an agent: {error.strerror}") from error

    def withdraw(self, cgroup_id: int) -> None:
        """
        Remove every row of an agent that is dead, and let go of its cgroup; unknown ids are fine.

        One that has processes after all stays attached, and is denied everything.
        """
        key = _u64(cgroup_id)
        self._maps["container_map"].delete(key)
        self._maps["state_map"].delete(key)
        self.forget_names(cgroup_id)
        for row in self._maps["inbound_map"].all_keys():
            if layout.unpack_inbound(row)[0] == cgroup_id:
                self._maps["inbound_map"].delete(row)
        for row in self._maps["metrics_map"].all_keys():
            if layout.unpack_metric_key(row)[0] == cgroup_id:
                self._maps["metrics_map"].delete(row)
        with suppress(Conflict):
            self._attachments.detach(cgroup_id)

    def agents(self) -> dict[int, AgentConfig]:
        """
        Every enrolled agent as the kernel has it.
        """
        rows = self._maps["container_map"].items()
        return {int.from_bytes(key, "little"): AgentConfig.unpack(row) for key, row in rows}

    def bypass(self, cgroup_id: int, until_ns: int) -> None:
        """
        Set the deadline (CLOCK_MONOTONIC ns, 0 = end now) up to which the kernel lets an agent pass.
        """
        self._change(cgroup_id, bypass_until_ns=until_ns)

    def set_policy(self, cgroup_id: int, policy: int) -> None:
        """
        Put an enrolled agent under another policy number.
        """
        self._change(cgroup_id, policy=policy)

    def quarantine(self, cgroup_id: int, *, on: bool) -> None:
        """
        Leave an agent only its loopback, the gate and the control plane, or end that.
        """
        self._change(cgroup_id, quarantined=on)

    def set_inbound(self, cgroup_id: int, ports: Mapping[int, InboundFrom]) -> None:
        """
        Say who may connect to which TCP ports of an agent; earlier ports are closed.
        """
        for row in self._maps["inbound_map"].all_keys():
            owner, port = layout.unpack_inbound(row)
            if owner == cgroup_id and port not in ports:
                self._maps["inbound_map"].delete(row)
        for port, who in ports.items():
            self._maps["inbound_map"].put(layout.pack_inbound(cgroup_id, port), int(who).to_bytes(4, "little"))

    # -- policy -------------------------------------------------------------------------------

    def sync_routes(
        self,
        route_rows: Iterable[routes.RouteLike],
        cidr_rows: Iterable[routes.CidrLike],
        ports: Iterable[routes.ProxyPortLike],
    ) -> SyncReport:
        """
        Make the kernel's tables equal to the given ones; nothing is left open on the way.
        """
        started = time.perf_counter_ns()
        self._drop_stale()
        wanted = routes.build_table(route_rows, cidr_rows, ports, routes.kernel_deadline_ns)
        changed = sum(
            routes.differences(getattr(self._table, part), getattr(wanted, part))
            for part in ("routes", "cidrs", "ports")
        )
        full = changed > routes.SMALL
        if full:
            self._write_generation(wanted)
        elif changed:
            self._write_in_place(wanted)
        self._table = wanted
        return SyncReport(changed, full, (time.perf_counter_ns() - started) // 1000)

    def set_reserved(self, prefixes: Iterable[IPNetwork]) -> None:
        """
        Replace the addresses that no rule, bypass or learning opens (R12); new ones first.
        """
        wanted = {layout.pack_reserved(*mapped_prefix(prefix)) for prefix in prefixes}
        reserved = self._maps["reserved_map"]
        for key in wanted:
            reserved.put(key, b"\1\0\0\0")
        for key in reserved.all_keys():
            if key not in wanted:
                reserved.delete(key)

    # -- names --------------------------------------------------------------------------------

    def update_dns(self, cgroup_id: int, rows: Sequence[NameRowLike], /) -> None:
        """
        Record which name an agent was told for an address, before it is told (I7).

        All or nothing within the quota of 4,096 addresses and four names an address;
        beyond it `CapacityExceeded`, and the answer must not leave.
        """
        self._names.update(cgroup_id, rows)

    def forget_names(self, cgroup_id: int) -> None:
        """
        Remove every learnt address of an agent, as before it asked its first question.
        """
        self._names.forget(cgroup_id)

    def collect_garbage(self) -> int:
        """
        Remove expired learnt addresses, and links of cgroups that are gone; returns how many addresses.
        """
        self._attachments.sweep()
        return self._names.collect()

    # -- events and counters ------------------------------------------------------------------

    @property
    def events_fd(self) -> int:
        """An epoll descriptor for `loop.add_reader`; also poll it, wake-ups are batched."""
        if self._ring is None:
            raise Unavailable("the kernel side is not loaded")
        return self._ring.fd

    def drain_events(self, limit: int = 4096) -> list[accel.KernelEvent]:
        """
        Take at most `limit` waiting decision records, oldest first; none once the manager is closed.
        """
        ring = self._ring  # once: another thread may close the manager here
        return [] if ring is None else accel.decode_events(ring.drain(limit))

    def counters(self) -> dict[tuple[int, int, int, int, int], int]:
        """
        Exact decisions by (cgroup id, identity, port bucket, verdict, reason).
        """
        cpus = bpfmap.possible_cpus()
        with_cpus = bpfmap.BpfMap(os.dup(self._maps["metrics_map"].fd), "metrics_map", 16, 8 * cpus)
        try:
            return {
                layout.unpack_metric_key(key): sum(
                    int.from_bytes(row[at : at + 8], "little") for at in range(0, len(row), 8)
                )
                for key, row in with_cpus.items()
            }
        finally:
            with_cpus.close()

    def set_budgets(self, *, deny: int = 0, bypass: int = 0, allow: int = 0) -> None:
        """
        Bound the records a second and agent, by kind; 0 = the default of the programs. Counters stay exact.
        """
        for name, value in (("deny", deny), ("bypass", bypass), ("allow", allow)):
            if not 0 <= value < 1 << 32:
                raise InvalidInput(f"{name}: {value} is not a number of records a second")
        self._budgets = (deny, bypass, allow)
        self._maps["control"].put(CONTROL_KEY, layout.pack_control(self._generation, 1, self._budgets, 0))

    def statistics(self) -> dict[str, int]:
        """
        Sizes and losses: agents, cgroups attached or being let go, learnt addresses, route rows, generation, records
        suppressed.
        """
        states = [layout.unpack_state(row) for _key, row in self._maps["state_map"].items()]
        return {
            "agents": len(self._maps["container_map"].all_keys()),
            "attached": len(self._attachments.attached()),
            "leaving": len(self._attachments.leaving()),
            "names": len(self._names),
            "rows": len(self._table),
            "generation": self._generation,
            "suppressed": sum(state["suppressed"] for state in states),
            "uncounted": sum(state["uncounted"] for state in states),
        }

    # -- inner --------------------------------------------------------------------------------

    def _prepare_pin_dir(self) -> None:
        try:
            self._pin_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._pin_dir.chmod(0o700)
            (self._pin_dir / LINKS_DIR).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise Unsupported(
                f"cannot use {self._pin_dir} for pins: {error.strerror}",
                feature="bpffs",
                needs="a BPF file system",
                hint=f"mount it: mount -t bpf bpf {self._pin_dir.parent}",
            ) from error

    def _place(self, cgroup: Path) -> Place:
        place = self._cgroups.find(cgroup.stat().st_ino)
        if place is None:
            raise Unavailable(f"the kernel does not know the cgroup {cgroup}")
        return place

    def _load_object(self, agent_level: int) -> bpfmap.BpfObject:
        path = files("clawker_cp") / "_bpf" / "clawker.bpf.o"
        return bpfmap.BpfObject.load(
            str(path), pin_dir=str(self._pin_dir), agent_level=agent_level, max_agents=self._max_agents
        )

    def _unsupported(self, error: OSError) -> Unsupported:
        lines = [line for line in getattr(error, "log", "").splitlines() if line.strip()]
        wrapped = Unsupported(
            f"the kernel does not take the programs: {lines[-1] if lines else error.strerror}",
            feature="cgroup eBPF",
            needs="Linux 6.2 with BTF",
            hint="see `clawker-cp check`",
        )
        wrapped.log = "\n".join(lines)  # type: ignore[attr-defined]
        return wrapped

    def _set_aside_maps(self) -> None:
        # Only the names go: the old links keep the old programs and their maps enforcing until
        # they are replaced below.
        for name in layout.SIZES:
            (self._pin_dir / name).unlink(missing_ok=True)
        (self._pin_dir / "flow_map").unlink(missing_ok=True)

    def _adopt_control(self, *, adopted: bool) -> None:
        row = self._maps["control"].get(CONTROL_KEY)
        present = layout.unpack_control(row) if row else {"abi": 0, "generation": 0}
        if adopted and present["abi"] not in {0, layout.ABI_VERSION}:
            raise Conflict(
                f"{self._pin_dir} holds state of layout {present['abi']}, this program needs {layout.ABI_VERSION}",
                hint="stop the agents, remove the pins with `ebpf-manager flush`, and start again",
            )
        self._generation = present["generation"]
        self._maps["control"].put(CONTROL_KEY, layout.pack_control(self._generation, 1, self._budgets, 0))
        if self._maps["state_map"].get(NOBODY) is None:
            self._maps["state_map"].put(NOBODY, layout.empty_state())

    def _adopt_rows(self) -> None:
        table = routes.Table()
        for part, name in (("routes", "route_map"), ("cidrs", "cidr_map"), ("ports", "proxy_port_map")):
            rows: dict[bytes, bytes] = getattr(table, part)
            for key, value in self._maps[name].items():
                at = slice(4, 8) if name == "cidr_map" else slice(0, 4)
                generation = int.from_bytes(key[at], "big" if name == "cidr_map" else "little")
                if generation == self._generation:
                    rows[key[: at.start] + bytes(4) + key[at.stop :]] = value
                else:
                    self._maps[name].delete(key)
        self._table = table
        self._names.adopt()

    def _change(self, cgroup_id: int, **changes: int | bool) -> None:
        key = _u64(cgroup_id)
        row = self._maps["container_map"].get(key)
        if row is None:
            raise Conflict(f"cgroup {cgroup_id} is not enrolled")
        self._maps["container_map"].put(key, replace(AgentConfig.unpack(row), **changes).pack())  # type: ignore[arg-type]

    def _write_in_place(self, wanted: routes.Table) -> None:
        g = self._generation
        old, maps = self._table, self._maps
        maps["proxy_port_map"].put_many(*routes.join(routes.rekey_routes(routes.new(old.ports, wanted.ports), g)))
        maps["cidr_map"].delete_many(b"".join(routes.rekey_cidrs(routes.gone(old.cidrs, wanted.cidrs), g)))
        maps["route_map"].delete_many(b"".join(routes.rekey_routes(routes.gone(old.routes, wanted.routes), g)))
        maps["cidr_map"].put_many(*routes.join(routes.rekey_cidrs(routes.new(old.cidrs, wanted.cidrs), g)))
        maps["route_map"].put_many(*routes.join(routes.rekey_routes(routes.new(old.routes, wanted.routes), g)))
        maps["proxy_port_map"].delete_many(b"".join(routes.rekey_routes(routes.gone(old.ports, wanted.ports), g)))

    def _write_generation(self, wanted: routes.Table) -> None:
        following = (self._generation + 1) & 0xFFFFFFFF
        self._maps["proxy_port_map"].put_many(*routes.join(routes.rekey_routes(wanted.ports, following)))
        self._maps["cidr_map"].put_many(*routes.join(routes.rekey_cidrs(wanted.cidrs, following)))
        self._maps["route_map"].put_many(*routes.join(routes.rekey_routes(wanted.routes, following)))
        self._maps["control"].put(CONTROL_KEY, layout.pack_control(following, 1, self._budgets, 0))
        # Programs that read the old word may still be looking rows up: they keep a second.
        self._stale = (time.monotonic() + OLD_GENERATION_S, routes.under(self._table, self._generation))
        self._generation = following

    def _drop_stale(self) -> None:
        if self._stale is None:
            return
        due, table = self._stale
        if (wait := due - time.monotonic()) > 0 and len(table) < len(self._table) * 4:
            # Two bulk changes within a second: the maps have room for several generations.
            time.sleep(min(wait, OLD_GENERATION_S))
        self._maps["route_map"].delete_many(b"".join(table.routes))
        self._maps["cidr_map"].delete_many(b"".join(table.cidrs))
        self._maps["proxy_port_map"].delete_many(b"".join(table.ports))
        self._stale = None


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "little")
