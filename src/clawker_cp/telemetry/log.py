"""
The log of this process: JSON lines on stderr and in a rotating file, without secrets.

`configure` is called once, by the entry point. Lines are made where the event happens and written by
a thread of their own; a slow or full disk costs lines, never time (I12).
"""

from __future__ import annotations

import logging
import os
import queue
import re
import select
import threading
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import orjson
import structlog

from clawker_cp.config import FLUSH_LIMIT_S, LOG_LINES_WAITING
from clawker_cp.telemetry.rotation import RotatingFile

LOG_FILE = "clawker-controlplane.log"
VALUE_LIMIT = 4096
REDACTED = "[redacted]"
STDERR = 2
STDERR_WAIT_MS = 100

_SECRET_KEYS = re.compile(
    r"(^|_)(token|access_token|secret|password|passwd|passphrase|private_key|signing_key|assertion|authorization"
    r"|credentials?|pem|certificate|jwk|api_key)$",
    re.IGNORECASE,
)
# PEM blocks; compact JWTs; HTTP credentials; user:password in a URL.
_SECRET_TEXT = re.compile(
    r"-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|\Z)"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?"
    r"|(?i:(?<=bearer )|(?<=basic ))[A-Za-z0-9._~+/=-]{8,}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)",
    re.DOTALL,
)


def redact(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """
    Replace what looks like a secret by name or by shape, and cut long values. A structlog processor.
    """
    for key, value in event.items():
        event[key] = REDACTED if _SECRET_KEYS.search(key) and value else _clean(value)
    return event


def _clean(value: Any, depth: int = 0) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        text = _SECRET_TEXT.sub(REDACTED, value)
        return text if len(text) <= VALUE_LIMIT else f"{text[:VALUE_LIMIT]}… ({len(text)} characters)"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{len(value)} bytes"
    if depth > 4:
        return type(value).__name__
    if isinstance(value, Mapping):
        return {
            str(k): REDACTED if _SECRET_KEYS.search(str(k)) and v else _clean(v, depth + 1) for k, v in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(item, depth + 1) for item in value]
    return _clean(str(value), depth)


def _shape(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Put what every line has first; the message says the event in words unless one was given."""
    name = str(event.pop("event", "log"))
    message = event.pop("message", None) or name.replace("_", " ")
    return {"time": event.pop("time"), "level": event.pop("level"), "event": name, "message": message, **event}


def _line(_logger: object, _method: str, event: MutableMapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(event) + b"\n"
    except TypeError:  # an integer beyond 64 bits, a lone surrogate
        return orjson.dumps({key: ascii(value) for key, value in event.items()}) + b"\n"


class _Stderr:
    """
    Standard error, given up line by line while nobody reads it: what waits there for ever would hold the file too.
    """

    def __init__(self) -> None:
        self._ready = select.poll()
        self._ready.register(STDERR, select.POLLOUT)
        self._stuck = False
        self._half = False
        self._gone = False
        self.unread = 0

    def write(self, lines: bytes, count: int) -> None:
        if self._gone:
            return
        view = memoryview(b"\n" + lines if self._half else lines)
        try:
            while view:
                # A pipe that is ready takes this much at once (pipe(7)).
                if not self._ready.poll(0 if self._stuck else STDERR_WAIT_MS):
                    self._stuck = True
                    self.unread += count
                    return
                self._stuck = False
                written = os.write(STDERR, view[: select.PIPE_BUF])
                self._half = view[written - 1] != 0x0A
                view = view[written:]
        except BlockingIOError:  # somebody else filled it just now
            self.unread += count
        except OSError:  # its reader has gone
            self._gone = True


class LogSink:
    """
    Takes lines without waiting; at most `LOG_LINES_WAITING` wait, beyond that they are dropped and counted.
    """

    def __init__(self, path: Path | None, *, stderr: bool = True) -> None:
        self._file = RotatingFile(path) if path is not None else None
        self._listeners: tuple[Callable[[Mapping[str, Any]], None], ...] = ()
        self._also_stderr = stderr
        self._stderr = _Stderr()
        self._lines: queue.Queue[bytes | None] = queue.Queue(LOG_LINES_WAITING)
        self._thread = threading.Thread(target=self._write_all, name="clawker-log", daemon=True)
        self._failing = False
        self.dropped = 0
        self.unwritten = 0

    def start(self) -> None:
        self._thread.start()

    def msg(self, line: bytes) -> None:
        """
        Take one line.
        """
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    log = debug = info = warning = warn = error = critical = exception = fatal = failure = msg

    def close(self) -> None:
        """
        Write what waits, within `FLUSH_LIMIT_S`.
        """
        if not self._thread.is_alive():
            return
        try:
            self._lines.put(None, timeout=FLUSH_LIMIT_S)
        except queue.Full:
            return
        self._thread.join(FLUSH_LIMIT_S)

    def _write_all(self) -> None:
        ended = False
        while not ended:
            batch = [self._lines.get()]
            while len(batch) < 256:
                try:
                    batch.append(self._lines.get_nowait())
                except queue.Empty:
                    break
            ended = None in batch
            self._write(b"".join(line for line in batch if line is not None), len(batch))
        if self._file is not None:
            self._file.close()

    def _write(self, lines: bytes, count: int) -> None:
        if self._also_stderr:
            self._stderr.write(lines, count)
        if self._file is None or not lines:
            return
        try:
            self._file.write(lines)
            if self._file.full:
                self._file.rotate()
                self._file.compress()
            self._failing = False
        except OSError as error:
            self.unwritten += count
            self._file.close()
            if not self._failing:
                self._failing = True
                event = {"level": "warning", "event": "file_logger_unavailable", "cause": str(error)}
                self._stderr.write(orjson.dumps(event) + b"\n", 1)

    def listen(self, listener: Callable[[Mapping[str, Any]], None]) -> None:
        """
        Show `listener` every line from now on, redacted, where it is logged; it must not block or raise.
        """
        self._listeners = (*self._listeners, listener)

    def tell(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """
        Show a line to the listener. A structlog processor.
        """
        for listener in self._listeners:
            listener(event)
        return event

    def statistics(self) -> dict[str, int]:
        """
        Lines dropped because the queue was full, lines the file did not take, and lines nobody read on stderr.
        """
        return {
            "dropped": self.dropped, "unwritten": self.unwritten, "unread": self._stderr.unread,
            "waiting": self._lines.qsize(),
        }  # fmt: skip


class _LibraryHandler(logging.Handler):
    """Log records of libraries, as events `library_log`."""

    def emit(self, record: logging.LogRecord) -> None:
        name = logging.getLevelName(record.levelno).lower()
        structlog.get_logger().log(
            record.levelno if name in logging.getLevelNamesMapping() else logging.WARNING,
            "library_log",
            logger=record.name,
            message=record.getMessage(),
            exc_info=record.exc_info,
        )


def configure(directory: Path | None, *, stderr: bool = True, level: int = logging.INFO) -> LogSink:
    """
    Send every event of this process to `<directory>/clawker-controlplane.log` and stderr.

    None: stderr only. Libraries are heard from warnings on. The caller closes the sink last of all.
    """
    sink = LogSink(directory / LOG_FILE if directory is not None else None, stderr=stderr)
    sink.start()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            structlog.processors.format_exc_info,
            redact,
            sink.tell,
            _shape,
            _line,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_args: sink,
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _LibraryHandler)]:
        root.removeHandler(handler)
    root.addHandler(_LibraryHandler(logging.WARNING))
    return sink
