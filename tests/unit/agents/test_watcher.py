"""Drain-to-zero: when the host counts as empty, and when it does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from clawker_cp.agents.watcher import AgentListCeiling, AgentWatcher, AgentWatcherOptions
from clawker_cp.errors import ClawkerError, Conflict, DeadlineExceeded, InvalidInput, Unavailable
from clawker_cp.testing.clock import FakeClock
from clawker_cp.testing.loops import LOOPS

DEFAULTS = AgentWatcherOptions()


class Host:
    """An engine that answers what the test says, and a callback that counts."""

    def __init__(self, *answers: Any) -> None:
        self.clock = FakeClock()
        self.answers = list(answers)
        self.began = self.clock.monotonic()
        self.polls: list[float] = []
        self.drains: list[float] = []

    @property
    def elapsed(self) -> float:
        return self.clock.monotonic() - self.began

    async def list_agents(self) -> Any:
        """The next answer; the last one for ever."""
        self.polls.append(self.elapsed)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def on_drain(self) -> None:
        self.drains.append(self.elapsed)

    def watcher(self, options: AgentWatcherOptions | None = None, **named: Any) -> AgentWatcher:
        return AgentWatcher(self.list_agents, self.on_drain, options, clock=self.clock, **named)

    async def pass_time(self, seconds: float, step: float = 1.0) -> None:
        for _ in range(round(seconds / step)):
            await self.clock.advance(step)


@asynccontextmanager
async def running(watcher: AgentWatcher) -> AsyncIterator[asyncio.Task[None]]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(watcher.run())
        await asyncio.sleep(0)
        try:
            yield task
        finally:
            task.cancel()


async def failure_of(coroutine: Awaitable[None]) -> ClawkerError:
    try:
        await coroutine
    except ClawkerError as error:
        return error
    raise AssertionError("nothing was raised")


def test_the_defaults() -> None:
    """30 seconds, twice, after a minute; twenty failures."""
    assert (DEFAULTS.poll_interval, DEFAULTS.missed_threshold) == (30.0, 2)
    assert (DEFAULTS.grace_period, DEFAULTS.list_error_ceiling) == (60.0, 20)


def test_zero_means_the_default() -> None:
    """Each option on its own, and what was given stays."""
    assert AgentWatcherOptions(0, 0, 0, 0) == DEFAULTS
    assert AgentWatcherOptions(poll_interval=5, grace_period=0) == AgentWatcherOptions(5, 2, 60.0, 20)


@pytest.mark.parametrize("name", ["poll_interval", "missed_threshold", "grace_period", "list_error_ceiling"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), True, None, "30"])
def test_a_value_that_makes_no_sense_raises_at_construction(name: str, value: Any) -> None:
    """Negative, not finite or no number: the message names the option."""
    with pytest.raises(InvalidInput, match=f"^{name}: "):
        AgentWatcherOptions(**{name: value})


def test_a_fraction_of_a_poll_is_refused() -> None:
    """Polls are counted in whole numbers."""
    half: dict[str, Any] = {"missed_threshold": 1.5}
    with pytest.raises(InvalidInput, match="missed_threshold: 1.5 is not a whole number"):
        AgentWatcherOptions(**half)


@pytest.mark.parametrize(
    ("listing", "callback", "named"), [(True, None, "on_drain_to_zero"), (None, True, "list_agents")]
)
def test_a_missing_callback_raises_at_construction(listing: Any, callback: Any, named: str) -> None:
    """A watcher that could not do its job is never made."""
    host = Host(0)
    with pytest.raises(InvalidInput, match=f"{named}: is missing"):
        AgentWatcher(listing and host.list_agents, callback and host.on_drain, DEFAULTS)


@pytest.mark.parametrize("nobody", [0, [], ()])
async def test_an_empty_host_drains_when_the_grace_ends(nobody: Any) -> None:
    """With the defaults after exactly 60 seconds and two polls, once; then `run` returns."""
    host = Host(nobody)
    async with running(host.watcher()) as task:
        await host.pass_time(59)
        early = list(host.drains)
        await host.pass_time(1)

        assert early == []
        assert (host.polls, host.drains) == ([30.0, 60.0], [60.0])
        assert task.done()
        assert task.result() is None


async def test_polls_within_the_grace_count_but_do_not_complete() -> None:
    """The streak is long enough at once; the first poll past the grace is the end."""
    host = Host(0)
    async with running(host.watcher(AgentWatcherOptions(poll_interval=10, missed_threshold=3, grace_period=95))):
        await host.pass_time(99)
        early = list(host.drains)
        await host.pass_time(1)

        assert early == []
        assert host.drains == [100.0]


async def test_after_the_grace_the_streak_has_to_be_complete() -> None:
    """The grace is over and the last agent leaves: that many polls from then on."""
    host = Host(1, 1, 1, 0)
    async with running(host.watcher(AgentWatcherOptions(poll_interval=10, missed_threshold=3, grace_period=5))):
        await host.pass_time(70)

        assert host.polls == [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
        assert host.drains == [60.0]


async def test_the_grace_is_time_not_polls() -> None:
    """However slow the listing is, grace is counted from entry: here the first poll ends after it."""
    host = Host(0)

    async def slow() -> int:
        await host.clock.sleep(55)
        return 0

    watcher = AgentWatcher(
        slow,
        host.on_drain,
        AgentWatcherOptions(poll_interval=10, missed_threshold=1, grace_period=60),
        clock=host.clock,
    )
    async with running(watcher):
        await host.pass_time(64)
        early = list(host.drains)
        await host.pass_time(1)

        assert early == []
        assert host.drains == [65.0]


@pytest.mark.parametrize("other", [1, ["a"], {"a": 1}, OSError("socket")], ids=["number", "list", "map", "failure"])
async def test_only_empty_polls_in_a_row_count(other: Any) -> None:
    """A poll that finds an agent, as a number or as what was listed, or that fails begins the count anew."""
    host = Host(0, other, 0, other, 0, 0)
    async with running(host.watcher(AgentWatcherOptions(poll_interval=10, grace_period=1))):
        await host.pass_time(55)
        early = list(host.drains)
        await host.pass_time(5)

        assert early == []
        assert host.drains == [60.0]


async def test_a_poll_that_succeeds_resets_the_failures() -> None:
    """Whether it found agents or none: only failures in a row count."""
    broken = OSError("socket")
    host = Host(broken, broken, 1, broken, broken, 0, broken, broken, broken)
    watcher = host.watcher(AgentWatcherOptions(poll_interval=10, missed_threshold=9, list_error_ceiling=3))
    async with asyncio.TaskGroup() as group:
        failed = group.create_task(failure_of(watcher.run()))
        await asyncio.sleep(0)
        await host.pass_time(85)
        early = failed.done(), watcher.statistics()
        await host.pass_time(5)

        assert early == (False, {"zero_polls": 0, "list_failures": 2})
        assert len(host.polls) == 9
        assert isinstance(await failed, AgentListCeiling)


@pytest.mark.parametrize(
    "failure", [OSError("no such socket"), Unavailable("the engine is down"), RuntimeError("a bug"), TimeoutError()]
)
async def test_the_ceiling_carries_the_last_failure(failure: Exception) -> None:
    """Whatever kind it is; the callback never runs, and nothing is polled any more."""
    host = Host(OSError("earlier"), failure)
    watcher = host.watcher(AgentWatcherOptions(poll_interval=1))
    with capture_logs() as logs:
        async with asyncio.TaskGroup() as group:
            failed = group.create_task(failure_of(watcher.run()))
            await asyncio.sleep(0)
            await host.pass_time(40)
    error = await failed

    assert isinstance(error, AgentListCeiling)
    assert (error.failures, error.last_failure, error.__cause__) == (20, failure, failure)
    assert "20 polls" in str(error)
    assert type(failure).__name__ in str(error)
    assert (len(host.polls), host.drains) == (20, [])
    assert [line["event"] for line in logs] == ["agent_watcher_poll_failed"] * 20


async def test_a_count_below_zero_is_a_failure() -> None:
    """An engine that says nonsense has not said that nobody runs."""
    host = Host(-1)
    watcher = host.watcher(AgentWatcherOptions(poll_interval=1, list_error_ceiling=2))
    async with asyncio.TaskGroup() as group:
        failed = group.create_task(failure_of(watcher.run()))
        await asyncio.sleep(0)
        await host.pass_time(2)
    error = await failed

    assert isinstance(error, AgentListCeiling)
    assert isinstance(error.last_failure, InvalidInput)


async def test_a_listing_that_hangs_is_a_failure_in_bounded_time() -> None:
    """It is cancelled, counts like any other, and the next poll comes."""
    host = Host(0)
    cancelled = []

    async def hang() -> int:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(host.elapsed)
            raise
        return 0

    watcher = AgentWatcher(
        hang,
        host.on_drain,
        AgentWatcherOptions(poll_interval=10, list_error_ceiling=2, grace_period=1),
        clock=host.clock,
        list_limit_s=0.01,
    )
    async with asyncio.TaskGroup() as group:
        failed = group.create_task(failure_of(watcher.run()))
        for _ in range(2):
            await host.clock.wait_sleeping()
            await host.clock.advance(10)
    error = await failed

    assert cancelled == [10.0, 20.0]
    assert isinstance(error, AgentListCeiling)
    assert isinstance(error.last_failure, DeadlineExceeded)
    assert "listing the running agents took longer than 0.01 s" in str(error)
    assert host.drains == []


async def test_polls_do_not_overlap() -> None:
    """A listing that takes longer than the interval is asked again one interval after its answer."""
    host = Host(1)
    began: list[float] = []
    now = 0

    async def slow() -> int:
        nonlocal now
        began.append(host.elapsed)
        now += 1
        assert now == 1
        await host.clock.sleep(25)
        now -= 1
        return 1

    watcher = AgentWatcher(slow, host.on_drain, AgentWatcherOptions(poll_interval=10), clock=host.clock)
    async with running(watcher):
        await host.pass_time(100)

        assert began == [10.0, 45.0, 80.0]


async def test_the_callback_is_awaited_and_its_error_is_raised() -> None:
    """`run` ends when the callback does, with what it raised; it is not called again."""
    host = Host(0)
    calls = 0
    release = asyncio.Event()

    async def failing() -> None:
        nonlocal calls
        calls += 1
        await release.wait()
        raise Unavailable("the drain failed")

    watcher = AgentWatcher(host.list_agents, failing, clock=host.clock)
    async with asyncio.TaskGroup() as group:
        failed = group.create_task(failure_of(watcher.run()))
        await asyncio.sleep(0)
        await host.pass_time(300)
        waited = failed.done()
        release.set()
    error = await failed

    assert not waited
    assert isinstance(error, Unavailable)
    assert str(error) == "the drain failed"
    assert calls == 1
    assert len(host.polls) == 2


async def test_a_second_run_is_refused() -> None:
    """While the first goes on, and after it was cancelled; the first is not disturbed."""
    host = Host(1)
    watcher = host.watcher()
    async with running(watcher) as task:
        with pytest.raises(Conflict, match="ran already"):
            await watcher.run()
        await host.pass_time(30)

        assert not task.done()
        assert host.polls == [30.0]
    with pytest.raises(Conflict, match="ran already"):
        await watcher.run()


def _hang_in_listing(entered: asyncio.Event) -> tuple[Callable[[], Awaitable[Any]], Callable[[], Awaitable[None]]]:
    async def hang() -> Any:
        entered.set()
        await asyncio.Event().wait()

    async def never() -> None:
        raise AssertionError

    return hang, never


def _hang_in_callback(entered: asyncio.Event) -> tuple[Callable[[], Awaitable[Any]], Callable[[], Awaitable[None]]]:
    async def hang() -> Any:
        entered.set()
        await asyncio.Event().wait()

    async def nobody() -> int:
        return 0

    return nobody, hang


@pytest.mark.parametrize("where", [_hang_in_listing, _hang_in_callback])
async def test_cancelled_while_it_waits_for_others(where: Any) -> None:
    """In the listing it is no failed poll, in the callback no error: `run` is cancelled, and that is all."""
    entered = asyncio.Event()
    clock = FakeClock()
    listing, callback = where(entered)
    watcher = AgentWatcher(listing, callback, AgentWatcherOptions(1, 1, 1, 1), clock=clock)
    with capture_logs() as logs:
        async with running(watcher) as task:
            await clock.advance(1)
            await entered.wait()

    assert task.cancelled()
    assert clock.sleeping == 0
    assert watcher.statistics()["list_failures"] == 0
    assert "agent_watcher_poll_failed" not in [line["event"] for line in logs]


async def test_cancelled_between_polls() -> None:
    """Nothing sleeps on, nothing is polled."""
    host = Host(0)
    async with running(host.watcher()) as task:
        await host.clock.wait_sleeping()
    assert task.cancelled()
    assert (host.clock.sleeping, host.polls, host.drains) == (0, [], [])


async def test_the_given_log_is_used() -> None:
    """Lines go where the caller wants them."""
    lines: list[str] = []

    class Log:
        def info(self, event: str, **_fields: Any) -> None:
            lines.append(event)

    host = Host(0)
    async with running(AgentWatcher(host.list_agents, host.on_drain, DEFAULTS, Log(), clock=host.clock)):
        await host.pass_time(60)

    assert lines == ["agent_watcher_drained_to_zero"]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    "case",
    [
        test_the_grace_is_time_not_polls,
        test_a_poll_that_succeeds_resets_the_failures,
        test_a_listing_that_hangs_is_a_failure_in_bounded_time,
        test_the_callback_is_awaited_and_its_error_is_raised,
        test_a_second_run_is_refused,
        test_cancelled_between_polls,
    ],
)
def test_on_both_loops(case: Callable[[], Coroutine[Any, Any, None]], loop: Any) -> None:
    """What waits does the same on asyncio, which complains when debugged, and on uvloop."""
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(case())
