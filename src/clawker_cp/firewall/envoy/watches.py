"""
Enough inotify instances for Envoy's file subscriptions.

Each costs one, all processes of a user share the limit, and an Envoy that gets none ends itself.
So the limit is looked at before a policy is added, and raised where we may.
"""

from __future__ import annotations

from pathlib import Path

import structlog

from clawker_cp.errors import CapacityExceeded

log = structlog.get_logger()

LIMIT = Path("/proc/sys/fs/inotify/max_user_instances")
PER_POLICY = 4  # two route configurations, two certificate shards
SHARED = 4
# What everything else of this user may hold: init, desktop services, our own log readers.
OTHERS = 64


def ensure_watches(policies: int, path: Path = LIMIT) -> None:
    """
    Make sure that so many policies can be watched.

    Raises the kernel's limit (never lowers it) when it is too small; raises `CapacityExceeded`
    where that is not possible. A kernel without the file has no such limit.
    """
    needed = policies * PER_POLICY + SHARED + OTHERS
    try:
        present = int(path.read_text())
    except (OSError, ValueError):
        return
    if present >= needed:
        return
    wanted = max(needed, 2 * present)
    try:
        path.write_text(f"{wanted}\n")
    except OSError as error:
        raise CapacityExceeded(
            f"{policies} policies need {needed} inotify instances, this host allows {present}",
            limit="policies",
            hint=f"sysctl fs.inotify.max_user_instances={wanted}",
        ) from error
    log.info("envoy_watches_raised", before=present, now=wanted)
