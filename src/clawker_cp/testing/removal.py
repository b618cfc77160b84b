"""
Leaving nothing behind: what a part of a test's world has made goes when it is left, and when it cannot be entered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType


class Removed(ABC):
    """An asynchronous context whose `_remove` takes apart whatever of it exists."""

    @abstractmethod
    async def _remove(self) -> None: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._remove()

    @asynccontextmanager
    async def _or_removed(self) -> AsyncIterator[None]:
        """Around what `__aenter__` makes: if it fails or is cancelled, what was made goes."""
        try:
            yield
        except BaseException:
            await self._remove()
            raise
