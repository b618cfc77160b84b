"""
A request to the Docker engine on its way, the stream of its events, and what its refusals mean.

Requests and stream are carried by threads; here is what lets the loop end them at any time. Knows
sockets, bytes and statuses, neither the SDK nor what a message says.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Self

from clawker_cp.errors import CapacityExceeded, ClawkerError, Conflict, InvalidInput, NotFound, Unavailable

Json = dict[str, Any]

# Messages that may wait for the reader of an event stream, and the longest one.
EVENTS_WAITING, EVENT_BYTES = 8192, 1 << 20
CLOSE_LIMIT_S = 5.0
_WRONG_STATE = re.compile(r"is (not|already) (paused|running)", re.IGNORECASE)


class Call:
    """
    One request: the loop ends it from outside by shutting its socket down, which wakes the thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: Any = None
        self._aborted = False

    def begin(self, connection: Any) -> None:
        """
        Note the connection that carries the request; raises when the caller went away already.
        """
        with self._lock:
            if self._aborted:
                raise ConnectionAbortedError("the caller went away")
            self._connection = connection

    def end(self) -> None:
        """
        Let go of the connection: the thread's next request may use it.
        """
        with self._lock:
            self._connection = None

    def abort(self) -> None:
        """
        Wake the thread, whatever it waits for. Fine at any time, from any thread, more than once.
        """
        with self._lock:
            self._aborted = True
            sock = getattr(self._connection, "sock", None)
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)


class EventStream:
    """
    The engine's messages, verbatim, one JSON object each; entering returns once the engine has answered.

    One daemon thread reads. It ends when its response is closed: by leaving the context, by the engine, or
    because `EVENTS_WAITING` messages wait unread. What was read comes first, then the iteration raises
    `Unavailable` (`CapacityExceeded` for too many, or a message of more than `EVENT_BYTES`). Cancelling a
    wait loses nothing. Entered once.
    """

    def __init__(self, connect: Callable[[Call], Generator[bytes, None, None]], limit_s: float) -> None:
        self._connect = connect
        self._limit_s = limit_s
        self._call = Call()
        self._waiting: deque[bytes] = deque()
        self._failure: ClawkerError | None = None
        self._answered = asyncio.Event()
        self._news = asyncio.Event()
        self._ended = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, name="docker-events", daemon=True).start()
        timeout = asyncio.timeout(self._limit_s)
        try:
            async with timeout:
                await self._answered.wait()
        except TimeoutError as error:
            raise Unavailable(f"the Docker engine did not answer within {self._limit_s:.3g} s (events)") from error
        finally:
            if not self._answered.is_set():
                self._call.abort()
        if self._failure is not None and not self._waiting:
            raise self._failure
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.abort()
        async with asyncio.timeout(CLOSE_LIMIT_S):
            await self._ended.wait()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while not self._waiting:
            if self._failure is not None:
                raise self._failure
            self._news.clear()
            await self._news.wait()
        return self._waiting.popleft()

    # -- in the thread -------------------------------------------------------------------------

    def _read(self) -> None:
        failure: ClawkerError = Unavailable("the Docker engine ended the stream of events")
        try:
            with contextlib.closing(self._connect(self._call)) as chunks:
                self._tell(self._answered.set)
                rest = b""
                for chunk in chunks:
                    *messages, rest = (rest + chunk).split(b"\n")
                    for message in messages:
                        self._take(message.strip())
                    if len(rest) > EVENT_BYTES:
                        raise CapacityExceeded(f"an engine event is longer than {EVENT_BYTES} bytes", limit="event")
        except ClawkerError as error:
            failure = error
        except OSError as error:
            failure = Unavailable(f"the stream of events broke: {error}")
        finally:
            self._call.end()
            self._tell(lambda: self._finish(failure))

    def _take(self, message: bytes) -> None:
        if not message:
            return
        if len(self._waiting) >= EVENTS_WAITING:
            raise CapacityExceeded(f"{EVENTS_WAITING} engine events wait unread", limit="events")
        self._waiting.append(message)
        self._tell(self._news.set)

    def _tell(self, action: Callable[[], None]) -> None:
        # RuntimeError: the loop is closed, nobody listens any more.
        with contextlib.suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(action)

    def _finish(self, failure: ClawkerError) -> None:
        self._failure = failure
        for event in (self._answered, self._news, self._ended):
            event.set()


def mapping(value: Any) -> Json:
    """
    An answer that has to be a JSON object; raises `Unavailable` for one that is not.
    """
    if not isinstance(value, dict):
        raise Unavailable("the Docker engine answered something else than it should")
    return value


def mappings(value: Any) -> list[Json]:
    """
    An answer that has to be a list of JSON objects.
    """
    if not isinstance(value, list):
        raise Unavailable("the Docker engine answered something else than it should")
    return [mapping(item) for item in value]


def refusal(status: int, words: str, what: str) -> ClawkerError:
    """
    The error that an HTTP status of the engine stands for, with the engine's words.
    """
    message = f"{what}: {words.strip()[:500]}"
    if status == 404:
        return NotFound(message)
    # Some refusals for a container's state are server errors to the engine.
    if status in {403, 409} or (status >= 500 and _WRONG_STATE.search(words)):
        return Conflict(message)
    if 400 <= status < 500:
        return InvalidInput(message)
    return Unavailable(message)


def innermost(error: BaseException) -> str:
    """
    The reason at the bottom of a chain of errors, which is the one that says something.
    """
    seen = {id(error)}
    while True:
        inner = error.__cause__ or error.__context__
        if inner is None or id(inner) in seen:
            return str(getattr(error, "strerror", None) or error or type(error).__name__)[:200]
        seen.add(id(inner))
        error = inner
