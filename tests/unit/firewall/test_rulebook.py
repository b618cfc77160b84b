"""The rules as services see them: what a request becomes, and what is said when it cannot be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from clawker_cp.errors import ClawkerError, InvalidInput, Unavailable
from clawker_cp.firewall.allocations import EMPTY
from clawker_cp.firewall.changes import Applied, Progress
from clawker_cp.firewall.check import Request
from clawker_cp.firewall.compile import compile_plan
from clawker_cp.firewall.merge import AddStatus, RemoveStatus
from clawker_cp.firewall.plan import Topology
from clawker_cp.firewall.rulebook import RuleBook
from clawker_cp.firewall.rules import Problem, Rule, RuleInvalid, normalise
from clawker_cp.firewall.validate import validate

NOW = 1_000_000.0
AGENT = "agent:p/a"


class Policy:
    """A reconciler that keeps its rules in memory and compiles them for real."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = tuple(normalise(rule) for rule in rules)
        self.topology = Topology()
        self.readable = True
        self.version = 1
        self.slow_before = self.slow_after = False

    def policy_of(self, key: str, /) -> int:
        return 7

    def _problems(self, rules: Sequence[Rule]) -> list[Problem]:
        problems = list(validate(rules).problems)
        if problems:
            return problems
        found = compile_plan(rules, frozenset({AGENT}), self.topology, EMPTY, now=NOW)
        return found if isinstance(found, list) else []

    async def change_stored(
        self, change: Callable[[Sequence[Rule]], Sequence[Rule]], progress: Progress | None = None
    ) -> Applied:
        if self.slow_before:
            await asyncio.Event().wait()
        rules = tuple(change(self.rules))
        problems = self._problems(rules)
        if problems:
            raise RuleInvalid(problems)
        self.version += rules != self.rules
        self.rules = rules
        if progress is not None:
            progress.saved = True
        if self.slow_after:
            await asyncio.Event().wait()
        return Applied(self.version, live=True)

    async def judge_stored(self, change: Callable[[Sequence[Rule]], Sequence[Rule]]) -> list[Problem]:
        return self._problems(tuple(change(self.rules)))

    async def start_over(self) -> Applied:
        self.rules, self.readable = (), True
        return Applied(2, live=True)


def book(policy: Policy) -> RuleBook:
    return RuleBook(policy, wall=lambda: NOW)


async def test_a_new_rule_says_who_brought_it_and_when() -> None:
    """The source and time are kept with an added rule; adding it again is no change at all."""
    policy = Policy()
    outcomes, _ = await book(policy).put([Rule("example.com")], source="admin", limit_s=5)
    (stored,) = policy.rules
    assert (stored.source, stored.created_at, outcomes[0].status) == ("admin", int(NOW), AddStatus.ADDED)
    again, applied = await book(policy).put([Rule("EXAMPLE.com".lower(), "HTTPS")], source="control", limit_s=5)
    assert (again[0].status, again[0].rule_id) == (AddStatus.UNCHANGED, stored.id)
    assert policy.rules == (stored,) and applied.version == 2


async def test_a_rule_of_a_hand_edited_file_stays_as_it_is() -> None:
    """Adding what the file has already does not stamp it."""
    policy = Policy(Rule("example.com"))
    outcomes, _ = await book(policy).put([Rule("example.com")], source="admin", limit_s=5)
    assert outcomes[0].status is AddStatus.UNCHANGED and policy.rules[0].source == ""


async def test_every_problem_is_told_by_its_place_in_the_request() -> None:
    """Validation and conflicts both count from the request, not from the stored rules."""
    policy = Policy(Rule("one.example"), Rule("two.example"), Rule("db.example", "tcp", "443"))
    with pytest.raises(RuleInvalid) as refused:
        await book(policy).put([Rule("ok.example"), Rule("bad_.example-", port="x")], source="admin", limit_s=5)
    assert {problem.index for problem in refused.value.problems} == {1}
    with pytest.raises(RuleInvalid) as conflict:
        await book(policy).put([Rule("ok.example"), Rule("db.example")], source="admin", limit_s=5)
    assert [problem.index for problem in conflict.value.problems] == [1]
    assert len(policy.rules) == 3


async def test_a_dry_run_writes_nothing_and_never_fails() -> None:
    """Good rules get their status, bad ones their problem, in the order of the request."""
    policy = Policy(Rule("one.example"), Rule("db.example", "tcp", "443"))
    asked = [Rule("one.example"), Rule(""), Rule("db.example"), Rule("new.example")]
    outcomes = await book(policy).judge(asked, limit_s=5)
    assert [outcome.status for outcome in outcomes] == [AddStatus.UNCHANGED, None, None, AddStatus.ADDED]
    assert "dst" in outcomes[1].problem and outcomes[2].problem
    assert len(policy.rules) == 2


async def test_a_grant_that_is_over_is_refused() -> None:
    """An expiry in the past names the field."""
    with pytest.raises(RuleInvalid, match="expires_at is over already"):
        await book(Policy()).put([Rule("x.example", expires_at=NOW - 1)], source="grant", limit_s=5)


async def test_removing_tells_what_happened() -> None:
    """A hit, a miss and a path each have their own status; a miss applies nothing."""
    policy = Policy(Rule("one.example"))
    assert await book(policy).remove("two.example", "", "", "", limit_s=5) == (RemoveStatus.NOT_FOUND, None)
    status, applied = await book(policy).remove("one.example", "", "", "", limit_s=5)
    assert status is RemoveStatus.REMOVED and applied is not None and policy.rules == ()
    with pytest.raises(InvalidInput, match="dst"):
        await book(policy).remove("", "", "", "", limit_s=5)


async def test_removing_all_takes_global_permanent_rules_only() -> None:
    """Grants and scoped rules stay; an empty set is not found."""
    policy = Policy(Rule("one.example"), Rule("two.example", scope=AGENT), Rule("g.example", expires_at=NOW + 9))
    status, _ = await book(policy).remove_all(limit_s=5)
    assert status is RemoveStatus.REMOVED and [rule.dst for rule in policy.rules] == ["two.example", "g.example"]
    assert await book(policy).remove_all(limit_s=5) == (RemoveStatus.NOT_FOUND, None)


async def test_removing_all_repairs_files_that_cannot_be_read() -> None:
    """Then the files start over, whatever was in them."""
    policy = Policy()
    policy.readable = False
    status, applied = await book(policy).remove_all(limit_s=5)
    assert status is RemoveStatus.REMOVED and applied is not None and policy.readable


async def test_deleting_goes_by_ids_or_by_scope() -> None:
    """Unknown ids are listed, both or neither is refused, and a dry run deletes nothing."""
    policy = Policy(Rule("one.example"), Rule("two.example", scope=AGENT))
    first = policy.rules[0].id
    removed, missing, applied = await book(policy).delete([first, "r-nothing"], "", dry_run=True, limit_s=5)
    assert ([rule.id for rule in removed], missing, applied) == ([first], ("r-nothing",), None)
    assert len(policy.rules) == 2
    removed, missing, applied = await book(policy).delete([first, "r-nothing"], "", dry_run=False, limit_s=5)
    assert [rule.id for rule in removed] == [first] and missing == ("r-nothing",) and applied is not None
    removed, _, _ = await book(policy).delete([], AGENT, dry_run=False, limit_s=5)
    assert [rule.dst for rule in removed] == ["two.example"] and not policy.rules
    for ids, scope in (([], ""), (["r-1"], "global"), ([], "everything")):
        with pytest.raises(InvalidInput):
            await book(policy).delete(ids, scope, dry_run=False, limit_s=5)


@pytest.mark.parametrize(("stage", "saved"), [("slow_before", "false"), ("slow_after", "true")])
async def test_a_caller_that_cannot_wait_hears_whether_it_is_saved(stage: str, saved: str) -> None:
    """Stored and not yet live is told apart from not stored."""
    policy = Policy()
    setattr(policy, stage, True)
    with pytest.raises(Unavailable) as late:
        await book(policy).put([Rule("one.example")], source="admin", limit_s=0.01)
    assert (late.value.code, late.value.details["saved"]) == ("STACK_UNHEALTHY", saved)


async def test_lists_are_ordered_by_scope_and_carry_hits() -> None:
    """Global first, then projects, then agents; each with the time it last decided."""
    policy = Policy(Rule("a.example", scope=AGENT), Rule("p.example", scope="project:p"), Rule("g.example"))
    book_ = RuleBook(policy, hits=lambda: {policy.rules[0].id: 5}, wall=lambda: NOW)
    assert [(rule.dst, hit) for rule, hit in book_.in_scope()] == [("g.example", 0), ("p.example", 0), ("a.example", 5)]
    assert [rule.dst for rule, _ in book_.in_scope(AGENT)] == ["a.example"]
    with pytest.raises(InvalidInput):
        book_.in_scope("nowhere")


async def test_effective_rules_and_checks_are_the_agents_own() -> None:
    """Rules of other agents and expired ones do not hold, but may be the near miss."""
    policy = Policy(
        Rule("g.example"), Rule("mine.example", scope=AGENT), Rule("theirs.a.example", scope="agent:p/b"),
        Rule("over.a.example", scope=AGENT, expires_at=NOW - 1),
    )  # fmt: skip
    rules = book(policy)
    assert {item.rule.dst for item in rules.effective(AGENT)} == {"g.example", "mine.example"}
    assert rules.check(AGENT, Request("mine.example")).allowed
    assert not rules.check("global", Request("mine.example")).allowed
    other = rules.check(AGENT, Request("theirs.a.example"))
    assert other.near_miss is not None and other.near_miss.differences == ("scope",)
    over = rules.check(AGENT, Request("over.a.example"))
    assert over.near_miss is not None and over.near_miss.differences == ("expired",)
    assert "--agent p/a --for 20m" in over.allow_command


async def test_a_refusal_to_write_is_passed_on() -> None:
    """What the store says is not rewritten."""

    class Broken(Policy):
        async def change_stored(self, change: object, progress: Progress | None = None) -> Applied:
            raise ClawkerError("disk full", code="RULE_STORE_WRITE")

    with pytest.raises(ClawkerError) as refused:
        await book(Broken()).put([Rule("one.example")], source="admin", limit_s=5)
    assert refused.value.code == "RULE_STORE_WRITE"
