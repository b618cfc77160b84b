"""
From what a caller names to exactly one agent (`AgentRef` of the contract). Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from clawker_cp.errors import InvalidInput, NotFound

MIN_PREFIX = 12  # characters of an id that may stand for the whole


class Named(Protocol):
    """What an agent can be named by."""

    @property
    def id(self) -> str: ...
    @property
    def project(self) -> str: ...
    @property
    def agent(self) -> str: ...


N = TypeVar("N", bound=Named)


def full_name(project: str, agent: str) -> str:
    """
    Return `clawker.<project>.<agent>`, without the project when it is empty.
    """
    return ".".join(part for part in ("clawker", project, agent) if part)


def by_container(reference: str, agents: Iterable[N]) -> N:
    """
    Find by full id, unique prefix of 12 or more characters, or full name.

    Raises `InvalidInput` for an empty reference or several matches, `NotFound` (`AGENT_NOT_FOUND`) for none.
    """
    if not reference:
        raise InvalidInput("container_id: is empty; give a full id, a prefix of 12 or more characters, or a name")
    listed = list(agents)
    exact = [one for one in listed if one.id == reference]
    found = exact or [
        one
        for one in listed
        if full_name(one.project, one.agent) == reference
        or (len(reference) >= MIN_PREFIX and one.id.startswith(reference))
    ]
    return _only(found, f"container {reference!r}")


def by_name(project: str, agent: str, agents: Iterable[N]) -> N:
    """
    Find by project ("" = none) and agent. Raises like `by_container`.
    """
    return _only(
        [one for one in agents if (one.project, one.agent) == (project, agent)], f"agent {project or ''}/{agent}"
    )


def resolve(container_id: str, project: str, agent: str, agents: Iterable[N]) -> N:
    """
    Find the agent of an `AgentRef`: container_id alone, or agent with project.
    """
    if container_id and (project or agent):
        raise InvalidInput("agent: give container_id, or project and agent, not both")
    if container_id:
        return by_container(container_id, agents)
    if not agent:
        raise InvalidInput("agent: is empty; give container_id, or agent with its project")
    return by_name(project, agent, agents)


def _only(found: list[N], what: str) -> N:
    if not found:
        raise NotFound(f"{what} is not known here", code="AGENT_NOT_FOUND", hint="`clawkerctl agents` lists them")
    if len(found) > 1:
        names = ", ".join(sorted(one.id[:MIN_PREFIX] for one in found))
        raise InvalidInput(f"{what} means {len(found)} agents ({names}): give a full id")
    return found[0]
