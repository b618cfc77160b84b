"""
Both event loops, for tests of what waits: asyncio in debug mode, and uvloop.
"""

from __future__ import annotations

import asyncio

import uvloop


def debug_loop() -> asyncio.AbstractEventLoop:
    """
    A loop of asyncio that complains about slow and misplaced calls.
    """
    loop = asyncio.new_event_loop()
    loop.set_debug(True)
    return loop


LOOPS = (debug_loop, uvloop.new_event_loop)
