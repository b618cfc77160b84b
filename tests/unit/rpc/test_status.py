"""Our errors as gRPC statuses: codes, messages, reasons, and never more than a client takes."""

from __future__ import annotations

import errno
import re
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from clawker_cp.errors import (
    CapacityExceeded,
    ClawkerError,
    Conflict,
    DeadlineExceeded,
    Denied,
    InvalidInput,
    NotFound,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from clawker_cp.rpc.status import DETAILS_KEY, DOMAIN, REASONS, Status, status_of
from clawker_cp.testing.bpf_abi import root

Code = grpc.StatusCode


def infos(status: Status) -> list[error_details_pb2.ErrorInfo]:
    """The ErrorInfo of a status, read as a client reads them."""
    metadata = dict(status.trailing_metadata())
    if not metadata:
        return []
    message = status_pb2.Status.FromString(metadata[DETAILS_KEY])
    assert (message.code, message.message) == (status.code.value[0], status.message)
    found = []
    for detail in message.details:
        info = error_details_pb2.ErrorInfo()
        assert detail.Unpack(info)
        found.append(info)
    return found


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidInput("m"), Code.INVALID_ARGUMENT),
        (Unauthenticated("m"), Code.UNAUTHENTICATED),
        (Denied("m"), Code.PERMISSION_DENIED),
        (NotFound("m"), Code.NOT_FOUND),
        (Conflict("m"), Code.FAILED_PRECONDITION),
        (Unavailable("m"), Code.UNAVAILABLE),
        (Unsupported("m", feature="f"), Code.FAILED_PRECONDITION),
        (DeadlineExceeded("m"), Code.DEADLINE_EXCEEDED),
        (ClawkerError("m"), Code.INTERNAL),
        (Unavailable("m", code="REGISTRY_UNAVAILABLE"), Code.UNAVAILABLE),
    ],
)
def test_without_a_reason_the_category_decides(error: ClawkerError, code: grpc.StatusCode) -> None:
    """And the status has no details."""
    status = status_of(error)
    assert status == Status(code, "m") and status.trailing_metadata() == ()


@pytest.mark.parametrize("reason", REASONS)
def test_a_reason_decides_the_code(reason: str) -> None:
    """Whatever the category, and is told with the domain and the facts of the error."""
    status = status_of(InvalidInput("m", code=reason, details={"index": "3", "dst": "x"}))
    assert status is not None and status.code is REASONS[reason]
    (info,) = infos(status)
    assert (info.reason, info.domain, dict(info.metadata)) == (reason, DOMAIN, {"index": "3", "dst": "x"})


def test_the_table_is_the_contracts() -> None:
    """Every reason of contract 5.4, with its code, in its order."""
    grouped = {
        "UNAVAILABLE": "CP_NOT_RUNNING QUEUE_CLOSED STACK_PROBE STACK_UNHEALTHY ENFORCEMENT_UNAVAILABLE",
        "FAILED_PRECONDITION": "FIREWALL_NOT_INITIALIZED CONTAINER_GONE AGENT_RUNNING AGENTS_RUNNING "
        "AGENT_QUARANTINED ENGINE_UNSUPPORTED",
        "INVALID_ARGUMENT": "RULE_INVALID",
        "INTERNAL": "RULE_STORE_WRITE CERT_REGEN CONFIG_REGEN ENVOY_RESTART COREDNS_RESTART ROUTE_SYNC",
        "NOT_FOUND": "AGENT_NOT_FOUND",
        "RESOURCE_EXHAUSTED": "CAPACITY",
    }
    expected = {reason: Code[code] for code, reasons in grouped.items() for reason in reasons.split()}
    assert dict(REASONS) == expected
    assert list(REASONS)[:5] == [
        "CP_NOT_RUNNING",
        "QUEUE_CLOSED",
        "FIREWALL_NOT_INITIALIZED",
        "CONTAINER_GONE",
        "RULE_INVALID",
    ]


def test_the_manual_lists_every_reason_and_says_which_are_never_sent() -> None:
    """docs/control-surface.md has the table in order; every reason in it is raised somewhere, or said never to be."""
    manual = (root() / "docs/control-surface.md").read_text().split("\n## Refusals\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+) \|$", manual, re.M)
    sources = "".join(path.read_text() for path in (root() / "src/clawker_cp").rglob("*.py"))
    raised = set(re.findall(r'\bcode ?= ?"([A-Z_]+)"', sources))

    assert [(reason, Code[code]) for reason, code, _ in rows] == list(REASONS.items())
    never = {reason for reason, _, when in rows if when.startswith("never sent: ")}
    assert never == {"CP_NOT_RUNNING", "COREDNS_RESTART"}
    assert set(REASONS) - raised == never and not raised & never


def test_a_bound_names_its_limit() -> None:
    """CAPACITY carries which bound was reached."""
    status = status_of(CapacityExceeded("too many", limit="agents", hint="raise firewall.max_agents"))
    assert status is not None and status.code is Code.RESOURCE_EXHAUSTED
    assert status.message == "too many; raise firewall.max_agents"
    assert [dict(info.metadata) for info in infos(status)] == [{"limit": "agents"}]


def test_having_no_descriptor_left_is_a_bound_and_no_bug() -> None:
    """A system call that found none says which limit it was and how to raise it."""
    status = status_of(ExceptionGroup("g", [OSError(errno.EMFILE, "m")]))
    assert status is not None and status.code is Code.RESOURCE_EXHAUSTED
    assert "LimitNOFILE" in status.message
    assert [dict(info.metadata) for info in infos(status)] == [{"limit": "file descriptors"}]


def test_of_several_reasons_the_first_in_the_contracts_order_decides() -> None:
    """A group's errors are all told, one detail per reason."""
    errors = [
        Unavailable("envoy did not answer", code="STACK_UNHEALTHY", details={"saved": "true"}),
        InvalidInput("bad rule", code="RULE_INVALID"),
        InvalidInput("another", code="RULE_INVALID"),
        NotFound("whatever"),
    ]
    status = status_of(ExceptionGroup("g", [errors[0], ExceptionGroup("h", errors[1:])]))
    assert status is not None and status.code is Code.INVALID_ARGUMENT
    assert status.message == "bad rule; another; envoy did not answer; whatever"
    assert [info.reason for info in infos(status)] == ["RULE_INVALID", "STACK_UNHEALTHY"]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        TimeoutError(),
        OSError(errno.EIO, "x"),
        ExceptionGroup("g", [NotFound("x"), KeyError("bug")]),
        KeyboardInterrupt(),
    ],
)
def test_what_is_not_ours_has_no_status(error: BaseException) -> None:
    """Also a group in which one error is a bug."""
    assert status_of(error) is None


@given(
    message=st.text(max_size=6000) | st.text("%€😀", min_size=1000, max_size=6000),
    facts=st.dictionaries(st.text("abc", min_size=1, max_size=20), st.text(max_size=4000), max_size=5),
)
def test_trailers_stay_below_what_clients_take(message: str, facts: dict[str, str]) -> None:
    """8 KiB in all, whatever the alphabet, and what is cut is still readable."""
    status = status_of(InvalidInput(message, code="RULE_INVALID", details=facts))
    assert status is not None
    (details,) = status.trailing_metadata()
    encoded = quote(status.message, safe="".join(map(chr, [*range(32, 37), *range(38, 127)])))
    assert len(encoded) + (len(details[1]) + 2) // 3 * 4 + len(DETAILS_KEY) < 8000
    assert status.message == message or message.startswith(status.message[:-1])
    assert infos(status)[0].reason == "RULE_INVALID"
