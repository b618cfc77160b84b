"""
What a sandbox's spec may say of itself, before anything is made of it. Pure.

What it mounts and where it starts depends on the host: `filesystem.check_view`.
"""

from __future__ import annotations

import re

from clawker_cp.engines.base import SandboxSpec
from clawker_cp.engines.host.bubble import DOCKER_CAPABILITIES
from clawker_cp.errors import InvalidInput
from clawker_cp.runtime.agent_names import is_name

MAX_PORT = 65535
MAX_ID = 2**32 - 1
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_spec(spec: SandboxSpec) -> None:
    """
    Raise `InvalidInput` with every problem of a spec's own fields, each named.
    """
    problems = []
    if spec.project and not is_name(spec.project):
        problems.append(f"--project: {spec.project[:80]!r} is not a name")
    if not is_name(spec.agent):
        problems.append(f"--agent: {spec.agent[:80]!r} is not a name")
    if not spec.argv or not spec.argv[0]:
        problems.append("no command to run: write it after --")
    if any("\0" in text for text in (*spec.argv, *spec.env, *spec.env.values(), spec.workdir)):
        problems.append("command, environment, workdir: NUL bytes are not possible")
    problems += [f"--env: {name!r} is not a variable name" for name in spec.env if not _VARIABLE.fullmatch(name)]
    if spec.uid == 0 and not spec.allow_root:
        problems.append("the command would run as root: add --allow-root if that is meant")
    if not (0 <= spec.uid < MAX_ID and 0 <= spec.gid < MAX_ID):
        problems.append(f"--user: {spec.uid}:{spec.gid} is out of range")
    unknown = set(spec.capabilities or ()) - set(DOCKER_CAPABILITIES)
    if unknown:
        problems.append(f"capabilities: {', '.join(sorted(unknown))} would be a way out, or unknown")
    if min(spec.limits.memory_bytes, spec.limits.cpu_percent, spec.limits.pids) < 0:
        problems.append("limits: are not negative")
    for item in spec.publish:
        if not 1 <= item.port <= MAX_PORT or not 0 <= item.host_port <= MAX_PORT:
            problems.append(f"--publish {item.host_port}:{item.port}: is not [HOST_PORT:]PORT")
    if problems:
        raise InvalidInput("; ".join(problems))
