"""
Ask the compiled decisions: maps to fill, cases to run, answers by name.

The object is bpf/tests/decide.bpf.c; its maps are its own and vanish with it.
"""

from __future__ import annotations

import ctypes
import ipaddress
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clawker_cp import accel
from clawker_cp._fast import bpfmap, layout
from clawker_cp.ebpf.config import AgentConfig, mapped, mapped_prefix
from clawker_cp.testing.bpf_abi import ABI, OBJECTS, REASONS, VERDICTS, layouts

TCP, UDP = 6, 17
OBJECT = OBJECTS / "decide.bpf.o"
BASE = AgentConfig(
    policy=1,
    proxy_addr="10.231.80.1",
    dns_addr="10.231.80.1",
    cp_addr="10.231.80.1",
    host_addr="10.231.80.1",
)


class TestRunOptions(ctypes.Structure):
    """`struct bpf_test_run_opts` of libbpf 1.x."""

    __test__ = False
    _fields_ = [
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_void_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_void_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    ]


@dataclass(frozen=True)
class Answer:
    """A decision: verdict and reason by name, the listener if redirected, identity and rule."""

    verdict: str
    reason: str
    proxy_port: int = 0
    identity: int = 0
    rule: int = ABI.NO_RULE
    to_gate: bool = False

    def __str__(self) -> str:
        return f"{self.verdict} {self.reason}" + (f" {self.proxy_port}" if self.proxy_port else "")


class Decisions:
    """
    The loaded test object. `generation` starts at 1; rows are written for it unless told otherwise.
    """

    def __init__(self) -> None:
        self._libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
        self._object = bpfmap.BpfObject.load(str(OBJECT), pin_dir=None, agent_level=1, max_agents=64)
        self.maps = {name: self._object.map(name, *sizes) for name, sizes in layout.SIZES.items()}
        self.maps["inbound_flow"] = self._object.map("inbound_flow", layouts(OBJECT)["clawker_flow_key"].size, 8)
        self._ring = bpfmap.RingBuffer(self.maps["events"].fd)
        self._layouts = layouts(OBJECT)
        self.generation = 1
        self.control()

    def close(self) -> None:
        self._ring.close()
        for one in self.maps.values():
            one.close()
        self._object.close()

    # -- what the maps say

    def control(self, *, enforce: bool = True, budget: tuple[int, int, int] = (0, 0, 0)) -> None:
        row = layout.pack_control(self.generation, int(enforce), budget, 0)
        self.maps["control"].put(bytes(4), row)

    def next_generation(self) -> None:
        """Start with empty tables: rows of earlier generations count no more."""
        self.generation += 1
        self.control()

    def route(
        self, identity: int, port: int, l4: int = TCP, *, action: int = ABI.ACT_PROXY, to: int = 0, policy: int = 1,
        rule: int = 7, deadline_ns: int = 0,
    ) -> None:  # fmt: skip
        key = layout.pack_route_key(self.generation, policy, identity, port, l4)
        self.maps["route_map"].put(key, layout.pack_route_value(action, to, rule, deadline_ns))

    def cidr(self, prefix: str, spans: Iterable[tuple[int, ...]], l4: int = TCP, *, policy: int = 1) -> None:
        """Spans are (low, high, action, proxy port, rule, deadline_ns), the last three optional."""
        addr, bits = mapped_prefix(ipaddress.ip_network(prefix))
        key = layout.pack_cidr_key(self.generation, policy, l4, addr, bits)
        full: Any = [tuple(span) + (0, 9, 0)[len(span) - 3 :] for span in spans]
        self.maps["cidr_map"].put(key, layout.pack_spans(full))

    def listener(self, port: int, l4: int = TCP, *, policy: int = 1) -> None:
        self.maps["proxy_port_map"].put(layout.pack_proxy_port(self.generation, policy, port, l4), b"\1\0\0\0")

    def reserve(self, prefix: str) -> None:
        key = layout.pack_reserved(*mapped_prefix(ipaddress.ip_network(prefix)))
        self.maps["reserved_map"].put(key, b"\1\0\0\0")

    def name(self, cgroup_id: int, addr: str, *identities: int, lives_s: float = 60.0) -> None:
        expires = time.monotonic_ns() + int(lives_s * 1e9)
        self.maps["dns_cache"].put(*layout.pack_name(cgroup_id, mapped(addr), identities, expires, 2))

    def publish(self, cgroup_id: int, port: int, who: int) -> None:
        self.maps["inbound_map"].put(layout.pack_inbound(cgroup_id, port), who.to_bytes(4, "little"))

    def state(self, cgroup_id: int) -> None:
        self.maps["state_map"].put(cgroup_id.to_bytes(8, "little"), layout.empty_state())

    # -- questions

    def flow(
        self, addr: str, port: int, l4: int = TCP, *, config: AgentConfig | None = BASE, cgroup: int = 5
    ) -> Answer:
        """What a socket hook decides; `config` None: nobody enrolled the cgroup."""
        return self._answer(self._run("clawker_flow", self._case(addr, port, l4, config, cgroup)))

    def packet(self, addr: str, port: int, l4: int = TCP, *, config: AgentConfig = BASE, cgroup: int = 5) -> Answer:
        """What the backstop decides of a packet from or to (addr, port)."""
        return self._answer(self._run("clawker_packet", self._case(addr, port, l4, config, cgroup)))

    def inbound(
        self, addr: str, remote_port: int, local_port: int, *, opens: bool = False, outgoing: bool = False,
        config: AgentConfig = BASE, cgroup: int = 5, l4: int = TCP,
    ) -> int:  # fmt: skip
        case = self._case(addr, remote_port, l4, config, cgroup)
        self._set(case, "clawker_case", local_port=local_port, opens=int(opens), outgoing=int(outgoing))
        out = self._run("clawker_inbound", case)
        return int(self._layouts["clawker_case"].read(out, "entry"))

    def record(
        self, cgroup: int, verdict: int, reason: int, *, identity: int = 0, port: int = 443, quiet: bool = False,
        times: int = 1,
    ) -> None:  # fmt: skip
        """Record one decision, `times` over in one system call."""
        case = self._case("203.0.113.7", port, TCP, BASE, cgroup)
        self._set(case, "clawker_case", quiet=int(quiet))
        at = self._layouts["clawker_case"].fields["decision"].offset
        self._set(case, "clawker_decision", at, verdict=verdict, reason=reason, identity=identity)
        self._run("clawker_record", case, times)

    def events(self) -> list[accel.KernelEvent]:
        return accel.decode_events(self._ring.drain(65536))

    def counters(self, cgroup: int) -> dict[tuple[int, int, str, str], int]:
        """(identity, port bucket, verdict, reason) -> decisions."""
        found = {}
        for key, total in self._per_cpu("metrics_map", 16):
            owner, identity, port, verdict, reason = layout.unpack_metric_key(key)
            if owner == cgroup:
                found[identity, port, VERDICTS[verdict], REASONS[reason]] = total
        return found

    def errors(self) -> dict[tuple[str, int], int]:
        """(site, errno) -> failures, where there were any."""
        sites = {value: name[2:].lower() for name, value in vars(ABI).items() if name.startswith("S_")}
        found = {}
        for key, total in self._per_cpu("error_map", 4):
            site, errno = divmod(int.from_bytes(key, "little"), ABI.ERRNOS)
            if total:
                found[sites[site], errno] = total
        return found

    # -- inner

    def _per_cpu(self, name: str, key_bytes: int) -> list[tuple[bytes, int]]:
        """Rows of a per-CPU map of numbers, summed."""
        opened = self._object.map(name, key_bytes, 8 * bpfmap.possible_cpus())
        try:
            rows = opened.items()
        finally:
            opened.close()
        return [
            (key, sum(int.from_bytes(row[i : i + 8], "little") for i in range(0, len(row), 8))) for key, row in rows
        ]

    def _set(self, case: bytearray, layout: str, at: int = 0, **values: int) -> None:
        for name, value in values.items():
            field = self._layouts[layout].fields[name]
            case[at + field.offset : at + field.offset + field.size] = value.to_bytes(field.size, "little")

    def _case(self, addr: str, port: int, l4: int, config: AgentConfig | None, cgroup: int) -> bytearray:
        layout = self._layouts["clawker_case"]
        case = bytearray(layout.size)
        self._set(case, "clawker_case", cgroup_id=cgroup, enrolled=int(config is not None))
        if config is not None:
            at = layout.fields["config"].offset
            case[at : at + len(config.pack())] = config.pack()
        at = layout.fields["want"].offset
        case[at : at + 16] = mapped(addr)
        self._set(case, "clawker_want", at, port=port, l4=l4)
        return case

    def _run(self, program: str, case: bytearray, times: int = 1) -> bytes:
        size = len(case)
        given = (ctypes.c_char * size).from_buffer(case)
        answer = ctypes.create_string_buffer(size)
        options = TestRunOptions(sz=ctypes.sizeof(TestRunOptions), data_size_in=size, data_size_out=size)
        options.repeat = times
        options.data_in = ctypes.addressof(given)
        options.data_out = ctypes.addressof(answer)
        rc = self._libbpf.bpf_prog_test_run_opts(self._object.program_fd(program), ctypes.byref(options))
        if rc or options.retval:
            raise OSError(-rc, f"test run of {program} failed")
        return answer.raw

    def _answer(self, out: bytes) -> Answer:
        layout, at = self._layouts["clawker_decision"], self._layouts["clawker_case"].fields["decision"].offset
        d = {name: int(layout.read(out[at:], name)) for name in layout.fields if name != "pad"}
        return Answer(
            VERDICTS[d["verdict"]], REASONS[d["reason"]], d["proxy_port"], d["identity"], d["rule"], bool(d["to_gate"])
        )


def built() -> Path:
    """The test object, or a failure that says how to make it."""
    assert OBJECT.exists(), f"{OBJECT} is missing: build with `pip install --no-build-isolation -e .`"
    return OBJECT
