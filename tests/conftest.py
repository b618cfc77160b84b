"""
What holds for every test: root and BPF are asked for by name, skips are earned, nothing is left behind.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import AsyncIterator, Generator

import hypothesis
import pytest
import pytest_asyncio

REQUIRED = os.environ.get("CLAWKER_CP_REQUIRE_BPF") == "1"

# A run that decides whether a change lands tries the same examples every time; a developer's tries new ones.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None)
# `make coverage` asks which branches are reached, not what else could happen in them.
hypothesis.settings.register_profile("few", derandomize=True, deadline=None, max_examples=10)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") or REQUIRED else "explore")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs root without it."""
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs root: namespaces, cgroups and BPF programs")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CLAWKER_CP_REQUIRE_BPF=1 a skip is a failure: the machine is meant to have everything."""
    report = yield
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped although everything is required: {report.longrepr}"
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let every asynchronous test be watched; the others need no loop."""
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            item.fixturenames.insert(0, "_no_task_left_behind")


@pytest_asyncio.fixture
async def _no_task_left_behind() -> AsyncIterator[None]:
    """Fail a test that leaves a task running or reaches the loop's exception handler."""
    loop = asyncio.get_running_loop()
    before = asyncio.all_tasks(loop)
    unhandled: list[str] = []
    loop.set_exception_handler(lambda _, context: unhandled.append(str(context.get("exception") or context["message"])))
    yield
    left = {task for task in asyncio.all_tasks(loop) - before if task is not asyncio.current_task()}
    # Nobody can await the tasks that grpc has for calls it refused: they end a little after the call, by themselves.
    if grpcs := [task for task in left if task.get_name().startswith(("rpc_task", "HandleExceptions["))]:
        await asyncio.wait(grpcs, timeout=5.0)
    loop.set_exception_handler(None)
    names = sorted(task.get_name() for task in left if not task.done())

    assert not unhandled, f"reached the loop's exception handler: {unhandled}"
    assert not names, f"left running: {names}"
