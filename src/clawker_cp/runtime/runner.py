"""
The one entry into the event loop: uvloop, and signals that set an event.

The first SIGTERM or SIGINT asks for a drain, the second cancels at once.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")


def run_main(main: Coroutine[Any, Any, T]) -> T:
    """
    Run a coroutine to its end on a fresh uvloop.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def run_until_signal(main: Callable[[asyncio.Event], Awaitable[T]]) -> T:
    """
    Run `main(stop)`; a first signal sets `stop`, a second cancels.
    """

    async def entry() -> T:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        task = asyncio.current_task()

        def on_signal() -> None:
            if stop.is_set() and task is not None:
                task.cancel()
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        return await main(stop)

    return run_main(entry())


def on_hangup(act: Callable[[], object]) -> None:
    """
    Call `act` on the running loop at each SIGHUP, which ends nothing from now on, not even when the loop is closed.
    """
    loop = asyncio.get_running_loop()

    def heard(_number: int, _frame: object) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(act)

    # A handler of the loop's own goes with it, and the next hangup would be the end of the process.
    signal.signal(signal.SIGHUP, heard)
