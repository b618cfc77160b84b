"""
The entry into the loop and its signals.
"""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, sys
from clawker_cp.runtime.runner import run_until_signal
async def main(stop):
    print(type(asyncio.get_running_loop()).__module__, flush=True)
    await stop.wait()
    print("draining", flush=True)
    if sys.argv[1] == "stuck":
        await asyncio.Event().wait()
    return 7
sys.exit(run_until_signal(main))
"""


@pytest.mark.slow
def test_first_signal_asks_second_cancels() -> None:
    """The first signal lets the program drain and choose its code; the second ends a drain that hangs."""
    for kind, signals in (("clean", [signal.SIGTERM]), ("stuck", [signal.SIGINT, signal.SIGTERM])):
        child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, kind], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        with child:
            assert child.stdout is not None
            try:
                assert child.stdout.readline() == "uvloop\n"
                child.send_signal(signals[0])
                assert child.stdout.readline() == "draining\n"
                for number in signals[1:]:
                    child.send_signal(number)
                code = child.wait(timeout=20)
            finally:
                child.kill()
        if kind == "clean":
            assert code == 7
        else:
            assert code != 0
