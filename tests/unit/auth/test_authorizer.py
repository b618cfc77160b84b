"""Who may pass, decided from the cache where possible, and denied on every surprise."""

from __future__ import annotations

import asyncio
import hashlib
import random
import tracemalloc

import pytest

from clawker_cp.auth import authorizer as module
from clawker_cp.auth.authorizer import BOUND, FAILED, INACTIVE, Authorizer, Pending, Refusal
from clawker_cp.auth.introspect import IntrospectionResult
from clawker_cp.errors import Unavailable

CERTIFICATE, OTHER = b"\x01" * 32, b"\x02" * 32
GOOD = IntrospectionResult(True, "admin other", "clawker-cli", "s", 1000)


class Authority:
    """Answers from a table; can be held back, and counts."""

    def __init__(self, **answers: IntrospectionResult | BaseException) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.go = asyncio.Event()
        self.go.set()
        self.together = self.most = 0

    async def introspect(self, token: str, required_scope: str) -> IntrospectionResult:
        self.asked.append(token)
        self.together += 1
        self.most = max(self.most, self.together)
        try:
            await self.go.wait()
        finally:
            self.together -= 1
        answer = self.answers.get(token, IntrospectionResult(active=False))
        if isinstance(answer, BaseException):
            raise answer
        return answer


class Clock:
    wall = 0.0
    monotonic = 0.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


def made(authority: Authority, clock: Clock, client_id: str = "") -> Authorizer:
    return Authorizer(authority, client_id=client_id, wall=lambda: clock.wall, monotonic=lambda: clock.monotonic)


async def judge(one: Authorizer, token: str, certificate: bytes = CERTIFICATE, scope: str = "admin") -> Refusal | None:
    decided = one.decide(token, certificate, scope)
    return await one.ask(decided, token, certificate, scope) if isinstance(decided, Pending) else decided


async def test_a_good_token_is_asked_once_in_ten_seconds(clock: Clock) -> None:
    """Then it passes without a question, and is asked again when the entry ends."""
    authority = Authority(good=GOOD)
    one = made(authority, clock)
    for _ in range(3):
        assert await judge(one, "good") is None
    assert one.decide("good", CERTIFICATE, "other") is None
    clock.monotonic = clock.wall = 10.0
    assert await judge(one, "good") is None
    assert authority.asked == ["good", "good"]


async def test_scope_and_client_are_judged_at_every_call(clock: Clock) -> None:
    """One answer serves every method, and a token of another client does not pass a pin."""
    one = made(Authority(good=GOOD), clock)
    assert await judge(one, "good") is None
    refusal = await judge(one, "good", scope="agent:self:register")
    assert refusal is not None and refusal.authenticated
    assert refusal.message == 'token missing required scope "agent:self:register"'
    pinned = made(Authority(good=GOOD), clock, "clawker-agent")
    refusal = await judge(pinned, "good")
    assert refusal is not None and refusal.message == 'token missing required scope "admin"'


async def test_an_inactive_token_is_not_asked_about_for_a_second(clock: Clock) -> None:
    """Also one whose own time is over."""
    late = IntrospectionResult(True, "admin", "c", "", 0)
    authority = Authority(late=late)
    one = made(authority, clock)
    for token in ("bad", "late"):
        assert await judge(one, token) is INACTIVE and await judge(one, token) is INACTIVE
    assert authority.asked == ["bad", "late"]
    clock.monotonic = 1.0
    assert await judge(one, "bad") is INACTIVE and authority.asked[-1] == "bad"


@pytest.mark.parametrize("surprise", [RuntimeError("x"), TimeoutError(), ValueError("y"), KeyError("z")])
async def test_every_surprise_is_a_denial_that_is_not_kept(clock: Clock, surprise: Exception) -> None:
    """Whatever the introspector raises, the call is denied and the next one asks again."""
    authority = Authority(odd=surprise)
    one = made(authority, clock)
    refusal = await judge(one, "odd")
    assert refusal is not None and (refusal.authenticated, refusal.message) == (False, FAILED.message)
    authority.answers["odd"] = GOOD
    assert await judge(one, "odd") is None
    assert one.statistics()["errors"] == 1


async def test_a_cause_never_repeats_what_a_foreign_error_says(clock: Clock) -> None:
    """An introspector's own words may hold the token (I11); only our errors' messages are passed on."""
    authority = Authority(odd=ValueError("token odd-secret is bad"), down=Unavailable("nobody there"))
    one = made(authority, clock)
    odd, down = await judge(one, "odd"), await judge(one, "down")
    assert odd is not None and odd.cause == "introspection failed: ValueError"
    assert down is not None and down.cause == "introspection failed: Unavailable: nobody there"


async def test_an_introspector_without_a_limit_of_its_own_is_cut_off(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call is denied, and the place is free for the next question."""
    monkeypatch.setattr(module, "ANSWER_LIMIT_S", 0.01)
    authority = Authority(good=GOOD)
    authority.go.clear()
    one = made(authority, clock)
    refusal = await judge(one, "good")
    assert refusal is not None and refusal.cause == "introspection failed: TimeoutError"
    assert one.statistics()["asking"] == 0
    authority.go.set()
    assert await judge(one, "good") is None


async def test_one_certificate_cannot_fill_the_queue(clock: Clock) -> None:
    """Beyond its share its new tokens are refused at once; another certificate still gets its answer."""
    authority = Authority(good=GOOD)
    authority.go.clear()
    one = made(authority, clock)
    share = module.QUESTIONS_PER_CERTIFICATE
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(judge(one, f"t{number}")) for number in range(share + 50)]
        while len(authority.asked) < module.QUESTIONS_AT_ONCE:
            await asyncio.sleep(0)
        other = group.create_task(judge(one, "good", OTHER))
        await asyncio.sleep(0)
        waiting = one.statistics()
        authority.go.set()
    refused = [call.result() for call in calls if call.result() is not INACTIVE]
    assert waiting["asking"] == share + 1 and waiting["overloads"] == 50
    assert len(refused) == 50 and {refusal.message for refusal in refused if refusal} == {FAILED.message}
    assert other.result() is None and one.statistics()["asking"] == 0


async def test_the_queue_as_a_whole_is_bounded(clock: Clock) -> None:
    """Tens of certificates together make no longer a queue than the bound."""
    authority = Authority()
    authority.go.clear()
    one = made(authority, clock)
    bound = module.QUESTIONS_AT_ONCE + module.QUESTIONS_WAITING
    async with asyncio.TaskGroup() as group:
        for number in range(bound + 20):
            group.create_task(judge(one, f"t{number}", bytes([number % 50]) * 32))
        while one.overloads < 20:
            await asyncio.sleep(0)
        assert one.statistics()["asking"] == bound
        authority.go.set()
    assert one.overloads == 20


async def test_a_question_nobody_waits_for_is_not_begun(clock: Clock) -> None:
    """When its turn comes and its caller has gone, the authority is not bothered."""
    authority = Authority()
    authority.go.clear()
    one = made(authority, clock)
    async with asyncio.TaskGroup() as group:
        for number in range(module.QUESTIONS_AT_ONCE):
            group.create_task(judge(one, f"t{number}"))
        while len(authority.asked) < module.QUESTIONS_AT_ONCE:
            await asyncio.sleep(0)
        late = group.create_task(judge(one, "late"))
        await asyncio.sleep(0)
        late.cancel()
        await asyncio.wait([late])
        authority.go.set()
    while one.statistics()["asking"]:
        await asyncio.sleep(0)
    assert late.cancelled() and "late" not in authority.asked


async def test_a_wall_clock_set_back_does_not_prolong_a_grant(clock: Clock) -> None:
    """Its time to live runs on the monotonic clock, whatever the wall clock says; then the token is asked anew."""
    authority = Authority(good=GOOD)
    one = made(authority, clock)
    clock.wall = 995.0
    assert await judge(one, "good") is None
    clock.wall, clock.monotonic = 0.0, 5.0
    assert isinstance(one.decide("good", CERTIFICATE, "admin"), Pending)  # its rest was five seconds
    clock.wall, clock.monotonic = 2000.0, 5.0
    assert await judge(one, "good") is INACTIVE


async def test_a_wall_clock_set_forward_ends_a_grant_at_once(clock: Clock) -> None:
    """The token's own end is compared at every hit."""
    one = made(Authority(good=GOOD), clock)
    assert await judge(one, "good") is None
    clock.wall = 1000.0
    assert await judge(one, "good") is INACTIVE


class BarList:
    def __init__(self) -> None:
        self.clients: set[str] = set()
        self.digests: set[bytes] = set()

    def barred(self, token_sha256: bytes, client_id: str, exp: int) -> bool:
        return token_sha256 in self.digests or client_id in self.clients


async def test_a_barred_token_stays_out_although_the_authority_says_active(clock: Clock) -> None:
    """The bar list is consulted on every miss, so a revocation holds with an authority that knows nothing of it."""
    bars = BarList()
    one = Authorizer(Authority(good=GOOD), bars=bars, wall=lambda: clock.wall, monotonic=lambda: clock.monotonic)
    assert await judge(one, "good") is None
    bars.digests.add(hashlib.sha256(b"good").digest())
    one.revoke(token="good")
    assert await judge(one, "good") is INACTIVE
    bars.digests.clear()
    bars.clients.add("clawker-cli")
    clock.monotonic = 2.0
    assert await judge(one, "good") is INACTIVE


async def test_a_bar_list_that_fails_denies(clock: Clock) -> None:
    """Not knowing whether a token is barred is a denial (I10)."""

    class Broken:
        def barred(self, token_sha256: bytes, client_id: str, exp: int) -> bool:
            raise OSError("disk")

    one = Authorizer(Authority(good=GOOD), bars=Broken(), wall=lambda: clock.wall, monotonic=lambda: clock.monotonic)
    refusal = await judge(one, "good")
    assert refusal is not None and refusal.message == FAILED.message


async def test_listeners_may_share_the_bound_on_questions(clock: Clock) -> None:
    """Two authorizers with one room never ask more together than the room has places."""
    authority, room = Authority(), asyncio.Semaphore(4)
    authority.go.clear()
    both = [
        Authorizer(authority, room=room, wall=lambda: clock.wall, monotonic=lambda: clock.monotonic) for _ in range(2)
    ]
    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(judge(both[number % 2], f"t{number}"))
        while len(authority.asked) < 4:
            await asyncio.sleep(0)
        authority.go.set()
    assert authority.most == 4 and len(authority.asked) == 20


async def test_closing_before_a_question_began_refuses_its_caller(clock: Clock) -> None:
    """Also a task that never had its first step leaves no caller waiting."""
    one = made(Authority(good=GOOD), clock)
    async with asyncio.TaskGroup() as group:
        call = group.create_task(judge(one, "good"))
        await asyncio.sleep(0)
        await one.aclose()
    assert call.result() is FAILED and one.statistics()["asking"] == 0


async def test_concurrent_calls_share_one_question(clock: Clock) -> None:
    """A hundred callers, one introspection; its failure is everybody's."""
    authority = Authority(good=GOOD)
    authority.go.clear()
    one = made(authority, clock)
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(judge(one, "good")) for _ in range(100)]
        while not authority.asked:
            await asyncio.sleep(0)
        authority.go.set()
    assert [call.result() for call in calls] == [None] * 100 and authority.asked == ["good"]


async def test_a_caller_that_leaves_does_not_take_the_answer_along(clock: Clock) -> None:
    """Cancelling the first caller leaves the second with its answer, from one question."""
    authority = Authority(good=GOOD)
    authority.go.clear()
    one = made(authority, clock)
    async with asyncio.TaskGroup() as group:
        first, second = (group.create_task(judge(one, "good")) for _ in range(2))
        while not authority.asked:
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        authority.go.set()
    assert first.cancelled() and second.result() is None and authority.asked == ["good"]


async def test_a_token_belongs_to_the_certificate_that_came_first(clock: Clock) -> None:
    """Another certificate is refused without asking, also after the entry has gone."""
    authority = Authority(good=GOOD)
    one = made(authority, clock)
    assert await judge(one, "good") is None
    assert await judge(one, "good", OTHER) is BOUND
    clock.monotonic = 60.0
    assert await judge(one, "good", OTHER) is BOUND
    assert authority.asked == ["good"]


async def test_a_revoked_token_is_not_kept_by_an_answer_on_its_way(clock: Clock) -> None:
    """The flight begun before the revocation denies and stores nothing."""
    authority = Authority(good=GOOD)
    authority.go.clear()
    one = made(authority, clock)
    async with asyncio.TaskGroup() as group:
        call = group.create_task(judge(one, "good"))
        while not authority.asked:
            await asyncio.sleep(0)
        one.revoke(token="good")
        authority.go.set()
    assert call.result() is INACTIVE
    assert isinstance(one.decide("good", CERTIFICATE, "admin"), Pending)


async def test_revoking_by_token_client_and_all(clock: Clock) -> None:
    """Each drops what it names, and the next call asks again."""
    one = made(Authority(good=GOOD), clock)
    for selector in ({"token": "good"}, {"client_id": "clawker-cli"}, {"everything": True}):
        assert await judge(one, "good") is None
        assert one.revoke(**selector) == 1
        assert isinstance(one.decide("good", CERTIFICATE, "admin"), Pending)


async def test_no_more_than_64_questions_at_once(clock: Clock) -> None:
    """The rest wait for their turn."""
    authority = Authority()
    authority.go.clear()
    one = made(authority, clock)
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(judge(one, f"t{number}")) for number in range(200)]
        while len(authority.asked) < module.QUESTIONS_AT_ONCE:
            await asyncio.sleep(0)
        authority.go.set()
    assert authority.most == module.QUESTIONS_AT_ONCE and {call.result() for call in calls} == {INACTIVE}


@pytest.mark.slow
async def test_ten_thousand_bad_tokens_leave_no_memory_behind(clock: Clock) -> None:
    """After the first thousands more of them cost nothing that stays."""
    one = made(Authority(), clock)
    one._introspector.asked = _Forget()  # type: ignore[attr-defined]
    for number in range(3000):
        await judge(one, f"token-{number}")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(3000, 13_000):
            await judge(one, f"token-{number}")
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 400_000 and one.statistics()["negative"] == 1024 and one.statistics()["asking"] == 0


class _Forget(list[str]):
    def append(self, item: str, /) -> None:
        return


async def test_closing_refuses_who_still_waits(clock: Clock) -> None:
    """A question that never ends does not outlive the listener."""
    authority = Authority()
    authority.go.clear()
    one = made(authority, clock)
    async with asyncio.TaskGroup() as group:
        call = group.create_task(judge(one, "good"))
        while not authority.asked:
            await asyncio.sleep(0)
        await one.aclose()
    assert call.result() is FAILED


@pytest.mark.parametrize("selector", [{"token": "good"}, {"client_id": "clawker-cli"}, {"everything": True}])
@pytest.mark.parametrize("seed", range(40))
async def test_nothing_begun_after_a_revocation_passes(clock: Clock, selector: dict[str, object], seed: int) -> None:
    """However calls, answers on their way and the revocation interleave."""
    chance = random.Random(seed)

    class Slow:
        active = True

        async def introspect(self, token: str, required_scope: str) -> IntrospectionResult:
            result = GOOD if self.active else IntrospectionResult(active=False)
            for _ in range(chance.randrange(6)):
                await asyncio.sleep(0)
            return result

    authority = Slow()
    one = Authorizer(authority, wall=lambda: clock.wall, monotonic=lambda: clock.monotonic)
    wrong: list[Refusal | None] = []
    passed = 0

    async def caller() -> None:
        nonlocal passed
        for _ in range(chance.randrange(20)):
            await asyncio.sleep(0)
        late = not authority.active
        refusal = await judge(one, "good", bytes([chance.randrange(2)]) * 32)
        passed += refusal is None
        if late and refusal is None:
            wrong.append(refusal)

    async with asyncio.TaskGroup() as group:
        for _ in range(30):
            group.create_task(caller())
        for _ in range(chance.randrange(1, 20)):
            await asyncio.sleep(0)
        authority.active = False
        one.revoke(**selector)  # type: ignore[arg-type]
    assert wrong == [] and one.statistics()["asking"] == 0
    assert isinstance(one.decide("good", CERTIFICATE, "admin"), Pending | Refusal)


async def test_an_authority_that_never_answers_is_a_refusal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller waits its time and is denied; the question stays shared, and a late answer serves the next one."""
    authority = Authority(t=GOOD)
    authority.go.clear()
    one = made(authority, clock)
    monkeypatch.setattr(module, "WAIT_LIMIT_S", 0.01)
    refused = await judge(one, "t")
    assert refused is not None and refused.message == FAILED.message and "no answer within" in refused.cause
    monkeypatch.undo()
    authority.go.set()
    assert await judge(one, "t") is None
    assert authority.asked == ["t"]
