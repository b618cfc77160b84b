"""Tests of what is refused in a sandbox's spec before anything is made."""

from __future__ import annotations

from typing import Any

import pytest

from clawker_cp.engines.base import Limits, Publish, SandboxSpec
from clawker_cp.engines.host.spec_check import check_spec
from clawker_cp.errors import InvalidInput


def spec(**changes: Any) -> SandboxSpec:
    return SandboxSpec(**{"project": "demo", "agent": "one", "argv": ("id",), "uid": 1000, "gid": 1000, **changes})


@pytest.mark.parametrize(
    "changes",
    [{}, {"project": ""}, {"uid": 0, "allow_root": True}, {"capabilities": ("chown",)}],
    ids=["plain", "no project", "root that is meant", "a capability of Docker's own set"],
)
def test_what_can_be_is_taken(changes: dict[str, Any]) -> None:
    """A spec that a sandbox can be made of raises nothing."""
    check_spec(spec(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"project": "-x"}, "--project: '-x' is not a name"),
        ({"agent": ""}, "--agent: '' is not a name"),
        ({"agent": "a\n"}, "--agent: 'a\\n' is not a name"),
        ({"project": "x" * 256}, "xxx' is not a name"),
        ({"env": {"A\n": "b"}}, "--env: 'A\\n' is not a variable name"),
        ({"argv": ()}, "no command to run"),
        ({"argv": ("a\0b",)}, "NUL bytes"),
        ({"env": {"A-B": "1"}}, "--env: 'A-B' is not a variable name"),
        ({"uid": 0}, "--allow-root"),
        ({"gid": 2**32 - 1}, "--user: 1000:4294967295 is out of range"),
        ({"capabilities": ("sys_admin",)}, "sys_admin would be a way out"),
        ({"limits": Limits(pids=-1)}, "limits: are not negative"),
        ({"publish": (Publish(0, 0),)}, "--publish 0:0"),
    ],
)
def test_each_problem_is_named(changes: dict[str, Any], said: str) -> None:
    """What cannot be is refused with the option that says it."""
    with pytest.raises(InvalidInput) as refused:
        check_spec(spec(**changes))

    assert said in str(refused.value)


def test_all_problems_are_said_at_once() -> None:
    """Whoever mends a spec sees everything that is wrong with it."""
    with pytest.raises(InvalidInput) as refused:
        check_spec(spec(agent="", argv=(), uid=0))

    assert str(refused.value).count(";") == 2
