"""
The packet filter tables of rings, whichever bridge they are around: what they are called, and taking all of them away.

A ring owns its tables and removes them; this is for what one left whose control plane died.
"""

from __future__ import annotations

import json

from clawker_cp.engines.host.commands import in_host, run

PREFIX = "clawker_"


async def remove_rings(host_pid: int) -> list[str]:
    """
    Remove every table of ours from the network namespace of a process, in one transaction; returns which they were.
    """
    where = in_host(host_pid)
    listed = json.loads(await run(*where, "nft", "-j", "list", "tables"))
    tables = [item["table"] for item in listed["nftables"] if "table" in item]
    found = sorted(f"{one['family']} {one['name']}" for one in tables if one["name"].startswith(PREFIX))
    if found:
        await run(*where, "nft", "-f", "-", text="".join(f"delete table {name}\n" for name in found))
    return found
