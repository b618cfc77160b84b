"""
What a client is told, and that an agent's words in it stay words.
"""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawker_cp.cli.decisions import decision_line
from clawker_cp.firewall.check import allow_command
from clawker_cp.telemetry.flows import DENIED, PROXY, Flow
from clawker_cp.telemetry.summary import Destination, Summary
from clawker_cp.wiring.reports import POLL_S, QUIET_POLL_S, allow_option, next_pause

# What an HTTP path and a method may hold, quotes, backticks and pipes included.
PATHS = st.text(alphabet="aA0/._~!$&'()*+,;=:@%-", max_size=30).map(lambda tail: "/" + tail)
METHODS = st.text(alphabet="GET!#$%&'*+-.^_`|~", min_size=1, max_size=8)


@given(path=PATHS, method=METHODS)
def test_a_suggested_option_is_two_words_for_a_shell(path: str, method: str) -> None:
    """Whatever path or method an agent was refused, what is offered to be pasted runs nothing else."""
    option = allow_option(Destination("api.example.com", "https", 443, path, method))

    assert option == "" or (len(shlex.split(option)) == 2 and shlex.split(option)[0] == "--allow")


@given(path=PATHS, method=METHODS)
def test_a_suggested_command_keeps_its_words(path: str, method: str) -> None:
    """The same of the command that `Check` offers."""
    words = shlex.split(allow_command("api.example.com", "https", 443, "p/a", path=path, method=method))

    assert words[words.index("--path") + 1] == path
    assert words[words.index("--method") + 1] == method
    assert words[-2:] == ["--for", "20m"]


@pytest.mark.parametrize("path", ["/\x1b]0;owned\x07", "/\r\nclawker-cp: allowed", "/\u202egpj"])
def test_an_agent_cannot_write_on_the_terminal(path: str) -> None:
    """Control and direction characters of a path are shown as escapes, live and in the summary."""
    flow = Flow(
        event_id="p-1", container_id="c", layer=PROXY, verdict=DENIED, reason="path_denied", proto="https",
        host="api.example.com", port=443, method="GET", path=path, status=403,
    )  # fmt: skip
    summary = Summary()
    summary.add([flow])
    shown = [decision_line(flow.as_mapping(), colour=False), *summary.lines(lambda _target: "")]

    assert all(line.isprintable() for line in shown)
    assert any("\\" in line for line in shown)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Destination("api.example.com", "https", 443), "--allow https://api.example.com"),
        (Destination("203.0.113.7", "tcp", 22), "--allow ssh://203.0.113.7"),
        (Destination("203.0.113.7", "udp", 0), ""),
        (Destination("", "tcp", 80), ""),
        (Destination("x", "raw", 0), ""),
    ],
)
def test_the_option_that_would_have_allowed_it(target: Destination, expected: str) -> None:
    """The usual protocol of a port is named; what no rule could allow gets no suggestion."""
    assert allow_option(target) == expected


def test_a_quiet_ring_is_looked_at_less_often_and_a_busy_one_is_not() -> None:
    """The pause grows to its limit while nothing comes, never beyond, and one record ends that."""
    pauses = [POLL_S]
    for _ in range(30):
        pauses.append(next_pause(pauses[-1], 0))

    assert pauses == sorted(pauses) and pauses[-1] == QUIET_POLL_S
    assert next_pause(QUIET_POLL_S, 1) == POLL_S
    # A ring of 4 MiB holds 43,690 records: a storm that begins in the longest pause is read before it is full.
    assert QUIET_POLL_S * 200_000 < 43_690 / 4
