"""
What each program costs the verifier: instructions processed and stack depth, against the budget.

Loads every program of an object through libbpf and reads the statistics that the verifier logs; nothing is
attached. Used by `ebpf-manager verify` and by the check of the sources' budget.
"""

from __future__ import annotations

import ctypes
import json
import re
from importlib.resources import as_file, files
from pathlib import Path

from clawker_cp.errors import Unsupported

GROWTH = 1.10
STATISTICS_LOG = 4  # BPF_LOG_STATS of <linux/bpf_verifier.h>
LOG_BYTES = 1 << 16

Costs = dict[str, dict[str, int]]


def measure(path: Path) -> Costs:
    """
    Load every program of an object and return {program: {"instructions": n, "stack": bytes}}.

    Raises `OSError` with the last line of the verifier's words when one does not load.
    """
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    libbpf.libbpf_set_print.argtypes = [pointer]
    libbpf.bpf_object__open_file.restype = pointer
    libbpf.bpf_object__open_file.argtypes = [text, pointer]
    libbpf.bpf_object__next_program.restype = pointer
    libbpf.bpf_object__next_program.argtypes = [pointer, pointer]
    libbpf.bpf_object__load.argtypes = [pointer]
    libbpf.bpf_object__close.argtypes = [pointer]
    libbpf.bpf_program__name.restype = text
    libbpf.bpf_program__name.argtypes = [pointer]
    libbpf.bpf_program__set_log_level.argtypes = [pointer, ctypes.c_uint32]
    libbpf.bpf_program__set_log_buf.argtypes = [pointer, pointer, ctypes.c_size_t]
    libbpf.libbpf_set_print(None)
    opened = libbpf.bpf_object__open_file(str(path).encode(), None)
    if not opened:
        raise OSError(ctypes.get_errno(), f"cannot open {path}")
    logs = {}
    try:
        program = libbpf.bpf_object__next_program(opened, None)
        while program:
            log = ctypes.create_string_buffer(LOG_BYTES)
            libbpf.bpf_program__set_log_level(program, STATISTICS_LOG)
            libbpf.bpf_program__set_log_buf(program, log, LOG_BYTES)
            logs[libbpf.bpf_program__name(program).decode()] = log
            program = libbpf.bpf_object__next_program(opened, program)
        rc = libbpf.bpf_object__load(opened)
        if rc:
            words = [line for log in logs.values() for line in log.value.decode().splitlines() if line]
            raise OSError(-rc, f"{path.name} does not load: {words[-1] if words else 'no log'}")
    finally:
        libbpf.bpf_object__close(opened)
    return {name: _costs(log.value.decode()) for name, log in sorted(logs.items())}


def _costs(log: str) -> dict[str, int]:
    processed = re.search(r"processed (\d+) insns", log)
    depths = re.search(r"stack depth ([\d+]+)", log)
    if processed is None or depths is None:
        raise ValueError(f"the verifier logged no statistics: {log!r}")
    return {"instructions": int(processed[1]), "stack": max(int(depth) for depth in depths[1].split("+"))}


def problems(costs: Costs, budget: Costs) -> list[str]:
    """
    What is over budget or not in it, one sentence each.
    """
    found = [f"{name}: not in bpf/budget.json" for name in costs.keys() - budget.keys()]
    found += [f"{name}: in bpf/budget.json, but there is no such program" for name in budget.keys() - costs.keys()]
    for name in sorted(costs.keys() & budget.keys()):
        for what, allowed in budget[name].items():
            if costs[name][what] > allowed * GROWTH:
                found.append(f"{name}: {what} {costs[name][what]}, the budget is {allowed}")
    return found


def verify() -> tuple[Costs, Costs]:
    """
    Measure the installed programs on this kernel; returns costs and budget. Raises `Unsupported` if one does not load.
    """
    package = files("clawker_cp") / "_bpf"
    budget: Costs = json.loads((package / "budget.json").read_text())
    with as_file(package / "clawker.bpf.o") as path:
        try:
            return measure(path), budget
        except OSError as error:
            raise Unsupported(str(error.strerror), feature="cgroup eBPF", needs="Linux 6.2 with BTF") from error
