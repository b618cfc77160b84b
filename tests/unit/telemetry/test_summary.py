"""
What is said at the end of a run.
"""

from __future__ import annotations

from clawker_cp.telemetry.flows import ALLOWED, DENIED, DNS, KERNEL, PROXY, REDIRECTED, Flow
from clawker_cp.telemetry.summary import Destination, Summary


def question(host: str, kind: str, reason: str = "not_allowed") -> Flow:
    return Flow(layer=DNS, verdict=DENIED, reason=reason, host=host, query_type=kind, proto="dns")


def test_lines() -> None:
    """The most frequent come first, each refusal with its reason and the command that would allow it."""
    summary = Summary()
    summary.add([Flow(layer=PROXY, verdict=ALLOWED, host="a.example", proto="https", port=443)] * 2)
    summary.add([question("b.example", "A")])
    summary.add(
        [
            Flow(
                layer=PROXY, verdict=DENIED, reason="path_denied", host="a.example", proto="https", port=443, path="/x",
                method="POST", status=403,
            )
        ]
        * 2
    )  # fmt: skip

    assert summary.lines(lambda target: f"allow {target.host}{target.path}") == [
        "2 allowed, 3 denied",
        "  allowed     2 x  https://a.example:443",
        "  denied      2 x  POST https://a.example:443/x  (path_denied)",
        "                 allow it with: allow a.example/x",
        "  denied      1 x  https://b.example:443  (not_allowed)",
        "                 allow it with: allow b.example",
    ]


def test_one_look_up_is_one_refusal() -> None:
    """A, AAAA and HTTPS questions of one look-up count once; the next look-up counts again."""
    summary = Summary()
    for kind in ("A", "AAAA", "HTTPS", "A", "AAAA"):
        summary.add([question("b.example", kind)])

    assert summary.denied == {Destination("b.example", "https", 443): 2}


def test_no_command_where_a_rule_does_not_help() -> None:
    """For a deny rule, a dead forwarder or a spent budget no command is offered."""
    summary = Summary()
    for number, reason in enumerate(("rule_deny", "forwarder_failed", "budget")):
        summary.add([question(f"{number}.example", "A", reason)])

    assert "allow it with" not in "\n".join(summary.lines(lambda _target: "x"))


def test_only_outcomes_count() -> None:
    """A redirect is not an outcome, the proxy's record of it is; an address rule goes out past the proxy."""
    summary = Summary()
    summary.add([Flow(layer=KERNEL, verdict=REDIRECTED, reason="name_route", host="a", port=443, proto="tcp")])
    summary.add(
        [Flow(layer=KERNEL, verdict=ALLOWED, reason="address_rule", address="203.0.113.1", port=1, proto="udp")]
    )

    assert summary.allowed == {Destination("203.0.113.1", "udp", 1): 1}


def test_bounded() -> None:
    """An agent that invents names fills its own bound and nothing else."""
    summary = Summary(limit=10)
    summary.add(question(f"{n}.example", "A") for n in range(1000))

    assert len(summary.denied) == 10
    assert len(summary.lines(lambda _target: "")) == 11
