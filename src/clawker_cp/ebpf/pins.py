"""
The pinned maps as they are, read without a manager: what `ebpf-manager` shows and changes.

Reading needs no running control plane. `change` writes behind it and is break-glass only (I8).
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from clawker_cp._fast import bpfmap
from clawker_cp.ebpf.config import AgentConfig, unmapped
from clawker_cp.errors import NotFound, Unavailable

LINKS = "links"
_ACTIONS = {0: "deny", 1: "proxy", 2: "pass"}


class Pins:
    """The maps below a pin directory, opened as they are asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def open(self, name: str) -> bpfmap.BpfMap:
        """
        One pinned map. Raises `NotFound` when nothing is pinned there.
        """
        key_bytes, value_bytes = bpfmap.SIZES[name]
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
        Generation, switches, links, and how many rows each map holds.
        """
        control = self.rows("control")
        row: dict[str, Any] = dict(bpfmap.unpack_control(control[0][1])) if control else {}
        links = self.directory / LINKS
        row["links"] = len(list(links.iterdir())) if links.exists() else 0
        for name in ("container_map", "route_map", "cidr_map", "dns_cache", "reserved_map"):
            row[name] = len(self.rows(name))
        return row

    def containers(self) -> list[dict[str, Any]]:
        """
        Every enrolled agent.
        """
        rows = []
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
                    "bypass_s": round(left, 1),
                }
            )
        return rows

    def routes(self) -> list[dict[str, Any]]:
        """
        Every route row, of every generation.
        """
        rows = []
        for key, value in sorted(self.rows("route_map")):
            generation, policy, identity, port, l4 = bpfmap.unpack_route_key(key)
            action, proxy_port, rule, deadline_ns = bpfmap.unpack_route_value(value)
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
            cgroup_id, addr, identities, expires_ns, _source = bpfmap.unpack_name(key, value)
            left = round((expires_ns - time.monotonic_ns()) / 1e9)
            address = unmapped(addr)
            rows.append({"cgroup_id": cgroup_id, "address": address, "identities": list(identities), "left_s": left})
        return rows
