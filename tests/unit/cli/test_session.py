"""How people write agents, scopes and times, and how answers line up."""

from __future__ import annotations

import pytest

from clawker_cp.adminclient.messages import control
from clawker_cp.cli.ctl.session import agent_ref, enum_word, moment, scope_of, seconds_of, table
from clawker_cp.errors import InvalidInput


def test_an_agent_is_named_either_way() -> None:
    """With a slash by project and agent, without one as a container."""
    assert agent_ref("shop/dev") == control.AgentRef(project="shop", agent="dev")
    assert agent_ref("/dev") == control.AgentRef(agent="dev")
    assert agent_ref("clawker.shop.dev") == control.AgentRef(container_id="clawker.shop.dev")
    with pytest.raises(InvalidInput):
        agent_ref("shop/")


def test_a_scope_is_an_agents_a_projects_or_everybodys() -> None:
    """One of both options, never both."""
    assert (scope_of("", ""), scope_of("", "p"), scope_of("p/a", ""), scope_of("/a", "")) == (
        "global", "project:p", "agent:p/a", "agent:/a",
    )  # fmt: skip
    for agent, project in (("p/a", "p"), ("abc", "")):
        with pytest.raises(InvalidInput):
            scope_of(agent, project)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("20m", 1200), ("2h", 7200), ("1d", 86400)])
def test_a_time_has_a_unit(text: str, seconds: int) -> None:
    """Seconds without one."""
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "0", "-5m", "5w", "1.5h", "\u0665m"])
def test_no_time_is_an_error(text: str) -> None:
    """It names what was written."""
    with pytest.raises(InvalidInput, match="time"):
        seconds_of(text)


def test_a_table_lines_up_and_is_printable() -> None:
    """Columns are as wide as their widest cell; control characters are shown, not sent."""
    lines = list(table(("A", "BB"), [("xxx", "\x1b[31m"), ("y", 2)]))
    assert lines == ["A    BB", "xxx  \\x1b[31m", "y    2"]


def test_enums_and_times_read_as_words() -> None:
    """Without prefix, and a dash for never."""
    assert enum_word(control.Component(health=control.HEALTH_DEGRADED), "health") == "degraded"
    assert enum_word(control.Flow(layer=control.LAYER_DNS), "layer") == "dns"
    assert (moment(0), moment(1_800_000_000)) == ("-", "2027-01-15 08:00:00Z")
