"""
The record of a sandbox on disk, by which a later start of the control plane adopts or sweeps it.

One JSON file in the sandbox's directory, replaced by rename. It holds the agent's environment, so
only its owner reads it. Called by the engine alone.
"""

from __future__ import annotations

from pathlib import Path

import orjson
import structlog

from clawker_cp.engines.base import Publish, Sandbox, SandboxSpec
from clawker_cp.errors import Unavailable

log = structlog.get_logger()

RECORD = "record.json"


def write_record(sandbox: Sandbox) -> None:
    """
    Replace the record with the sandbox as it is now. Raises `Unavailable` when it cannot be written.
    """
    record = {
        "id": sandbox.id,
        "spec": sandbox.spec.as_mapping(),
        "address": sandbox.address,
        "netns": sandbox.netns,
        "interface": sandbox.interface,
        "cgroup_path": str(sandbox.cgroup_path),
        "cgroup_id": sandbox.cgroup_id,
        "publish": [{"host_port": p.host_port, "port": p.port} for p in sandbox.publish],
        "pid": sandbox.pid,
        "started": sandbox.started,
    }
    temporary = sandbox.directory / f".clawker-{RECORD}.tmp"
    try:
        temporary.touch(mode=0o600)  # the spec holds the agent's environment
        temporary.write_bytes(orjson.dumps(record))
        temporary.replace(sandbox.directory / RECORD)
    except OSError as error:
        raise Unavailable(f"cannot write {sandbox.directory / RECORD}: {error.strerror}") from error


def read_record(directory: Path) -> Sandbox | None:
    """
    Read the sandbox whose directory this is; None, with a line in the log, when there is no whole record.
    """
    try:
        raw = orjson.loads((directory / RECORD).read_bytes())
        return Sandbox(
            id=raw["id"],
            spec=SandboxSpec.from_mapping(raw["spec"]),
            address=raw["address"],
            netns=raw["netns"],
            interface=raw["interface"],
            cgroup_path=Path(raw["cgroup_path"]),
            cgroup_id=int(raw["cgroup_id"]),
            directory=directory,
            publish=tuple(Publish(p["host_port"], p["port"]) for p in raw["publish"]),
            pid=int(raw["pid"]),
            started=int(raw.get("started", 0)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("engines_record_skipped", directory=str(directory), error=str(error))
        return None
