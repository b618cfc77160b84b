"""
The pinned maps as they are, read without a manager: what `ebpf-manager` shows and changes.

Reading needs no running control plane. `change` writes behind it and is break-glass only (I8).
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from clawker_cp import accel
from clawker_cp._fast import bpfmap, layout
from clawker_cp.ebpf.attachments import CGROUP
from clawker_cp.ebpf.config import AgentConfig, unmapped
from clawker_cp.errors import InvalidInput, NotFound, Unavailable

LINKS = "links"
VERDICTS = {1: "allowed", 2: "denied", 3: "bypassed", 4: "redirected"}
# enum clawker_site and CLAWKER_ERRNOS of the ABI header.
SITES = {0: "ring", 1: "metric", 2: "storage", 3: "inbound_flow", 4: "state", 5: "packet"}
ERRNOS = 160
_ACTIONS = {0: "deny", 1: "proxy", 2: "pass"}
_INBOUND = {1: "host", 2: "any", 3: "control plane"}


class Pins:
    """The maps below a pin directory, opened as they are asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def open(self, name: str) -> bpfmap.BpfMap:
        """
        One pinned map. Raises `NotFound` when nothing is pinned there.
        """
        key_bytes, value_bytes = layout.SIZES[name]
        try:
            return bpfmap.BpfMap.pinned(str(self.directory / name), key_bytes, value_bytes)
        except FileNotFoundError as error:
            raise NotFound(
                f"nothing is pinned at {self.directory}", hint="no control plane has run here, or --pin-dir differs"
            ) from error
        except OSError as error:
            raise Unavailable(f"cannot open {self.directory / name}: {error.strerror}") from error

    def rows(self, name: str) -> list[tuple[bytes, bytes]]:
        """
        All rows of one map at this moment.
        """
        opened = self.open(name)
        try:
            return opened.items()
        finally:
            opened.close()

    def change(self, cgroup_id: int, **changes: Any) -> AgentConfig:
        """
        Rewrite fields of one agent's row. Raises `NotFound` for an agent that is not enrolled.
        """
        opened = self.open("container_map")
        key = cgroup_id.to_bytes(8, "little")
        try:
            row = opened.get(key)
            if row is None:
                raise NotFound(f"cgroup {cgroup_id} is not enrolled", hint="`ebpf-manager dump-containers` lists them")
            changed = replace(AgentConfig.unpack(row), **changes)
            opened.put(key, changed.pack())
        finally:
            opened.close()
        return changed

    def status(self) -> dict[str, Any]:
        """
        Generation, switches, links to the agents' parent, cgroups with links of their own, and how many rows
        each map holds.
        """
        control = self.rows("control")
        row: dict[str, Any] = dict(layout.unpack_control(control[0][1])) if control else {}
        links = self.directory / LINKS
        row["links"] = sum(not path.is_dir() for path in links.iterdir()) if links.exists() else 0
        row["attached"] = len(self.attached())
        for name in ("container_map", "route_map", "cidr_map", "dns_cache", "reserved_map"):
            row[name] = len(self.rows(name))
        return row

    def attached(self) -> dict[int, tuple[int, str]]:
        """
        The cgroups that have links of their own, by id: how many links, and the path they were attached by.
        """
        links = self.directory / LINKS
        found = {}
        for directory in links.iterdir() if links.exists() else ():
            if directory.name.isdecimal():
                names = [path.name for path in directory.iterdir()]
                path = str((directory / CGROUP).readlink()) if CGROUP in names else ""
                found[int(directory.name)] = (len(names) - (CGROUP in names), path)
        return found

    def containers(self) -> list[dict[str, Any]]:
        """
        Every enrolled agent; `own_links` counts the links to its own cgroup, 0 where its parent's judge it.
        """
        rows = []
        attached = self.attached()
        for key, value in self.rows("container_map"):
            config = AgentConfig.unpack(value)
            left = max(0.0, (config.bypass_until_ns - time.monotonic_ns()) / 1e9)
            rows.append(
                {
                    "cgroup_id": int.from_bytes(key, "little"),
                    "policy": config.policy,
                    "proxy": config.proxy_addr,
                    "quarantined": config.quarantined,
                    "learn": config.learn,
                    "bypass_s": round(left, 3),
                    "own_links": attached.get(int.from_bytes(key, "little"), (0, ""))[0],
                }
            )
        return rows

    def not_enrolled(self) -> list[dict[str, Any]]:
        """
        Cgroups with links of their own and no row: denied everything, or dead with a socket left.
        """
        enrolled = {int.from_bytes(key, "little") for key, _value in self.rows("container_map")}
        return [
            {"cgroup_id": cgroup_id, "enrolled": False, "own_links": links, "path": path}
            for cgroup_id, (links, path) in sorted(self.attached().items())
            if cgroup_id not in enrolled
        ]

    def routes(self) -> list[dict[str, Any]]:
        """
        Every route row, of every generation.
        """
        rows = []
        for key, value in sorted(self.rows("route_map")):
            generation, policy, identity, port, l4 = layout.unpack_route_key(key)
            action, proxy_port, rule, deadline_ns = layout.unpack_route_value(value)
            rows.append(
                {
                    "generation": generation,
                    "policy": policy,
                    "identity": identity,
                    "port": port,
                    "l4": l4,
                    "action": _ACTIONS.get(action, str(action)),
                    "proxy_port": proxy_port,
                    "rule": rule,
                    "deadline_ns": deadline_ns,
                }
            )
        return rows

    def names(self) -> list[dict[str, Any]]:
        """
        Every address an agent was told, and for how many seconds it counts.
        """
        rows = []
        for key, value in self.rows("dns_cache"):
            cgroup_id, addr, identities, expires_ns, _source = layout.unpack_name(key, value)
            left = round((expires_ns - time.monotonic_ns()) / 1e9)
            address = unmapped(addr)
            rows.append({"cgroup_id": cgroup_id, "address": address, "identities": list(identities), "left_s": left})
        return rows

    def metrics(self) -> list[dict[str, Any]]:
        """
        Exact decisions by agent, name identity, port and outcome, summed over processors; the largest first.

        An agent's row of identity 0 and port 0 counts what had no row of its own.
        """
        rows = []
        for key, count in self._counted("metrics_map"):
            cgroup_id, identity, port, verdict, reason = layout.unpack_metric_key(key)
            rows.append(
                {
                    "cgroup_id": cgroup_id,
                    "identity": identity,
                    "port": port,
                    "verdict": VERDICTS.get(verdict, str(verdict)),
                    "reason": reason,
                    "count": count,
                }
            )
        return sorted(rows, key=lambda row: -row["count"])

    def flows(self) -> list[dict[str, Any]]:
        """
        What agents have going: records suppressed and numbers given, by agent; and who may come in where.

        Connections that agents opened live in their sockets and go with them: no map lists them.
        """
        rows: list[dict[str, Any]] = []
        for key, value in sorted(self.rows("state_map")):
            state = layout.unpack_state(value)
            rows.append({"cgroup_id": int.from_bytes(key, "little"), **state})
        for key, value in sorted(self.rows("inbound_map")):
            cgroup_id, port = layout.unpack_inbound(key)
            who = _INBOUND.get(int.from_bytes(value, "little"), "?")
            rows.append({"cgroup_id": cgroup_id, "inbound_port": port, "from": who})
        return rows

    def resolve(self, reference: str, cgroup_root: Path) -> dict[str, Any]:
        """
        A cgroup id, or a path below the cgroup2 mount, as the agent it is: id, path, enrolled, policy.

        Raises `NotFound` for what is neither, `InvalidInput` for an empty reference.
        """
        if not reference:
            raise InvalidInput("reference: give a cgroup id or a path of a cgroup")
        enrolled = {row["cgroup_id"]: row for row in self.containers()}
        if reference.isdecimal():
            cgroup_id = int(reference)
            path = next(
                (one for one in cgroup_root.rglob("*") if one.is_dir() and one.stat().st_ino == cgroup_id), None
            )
        else:
            path = Path(reference) if reference.startswith("/") else cgroup_root / reference
            if not path.is_dir():
                raise NotFound(f"{path} is no cgroup")
            cgroup_id = path.stat().st_ino
        if path is None and cgroup_id not in enrolled:
            raise NotFound(f"cgroup {cgroup_id} neither exists nor is enrolled")
        row = enrolled.get(cgroup_id)
        above = [one.stat().st_ino for one in path.parents if one.is_dir()] if path is not None else []
        by = next((one for one in above if one in enrolled), None)
        return {
            "cgroup_id": cgroup_id,
            "path": str(path) if path is not None else "gone",
            "enrolled": row is not None,
            "policy": row["policy"] if row is not None else None,
            "judged_as": cgroup_id if row is not None else by,
        }

    @contextmanager
    def ring(self) -> Iterator[Callable[[int], list[accel.KernelEvent]]]:
        """
        The ring of records, as a function that takes at most so many. What is taken is gone for every other reader.
        """
        opened = self.open("events")
        ring = bpfmap.RingBuffer(opened.fd)
        try:
            yield lambda limit: accel.decode_events(ring.drain(limit))
        finally:
            ring.close()
            opened.close()

    def errors(self) -> dict[str, int]:
        """
        Failures of kernel helpers by site and errno, those that happened.
        """
        found = {}
        for key, count in self._counted("error_map"):
            site, number = divmod(int.from_bytes(key, "little"), ERRNOS)
            if count:
                found[f"{SITES.get(site, site)}:{errno.errorcode.get(number, number)}"] = count
        return found

    def _counted(self, name: str) -> list[tuple[bytes, int]]:
        """The rows of a map that counts on every processor by itself, summed."""
        opened = self.open(name)
        every = bpfmap.BpfMap(os.dup(opened.fd), name, opened.key_bytes, 8 * bpfmap.possible_cpus())
        try:
            return [(key, sum(count for (count,) in struct.iter_unpack("=Q", value))) for key, value in every.items()]
        finally:
            every.close()
            opened.close()
