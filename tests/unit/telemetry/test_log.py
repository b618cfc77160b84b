"""
The log: whole lines of JSON, nothing secret in them, and nobody waits for it.
"""

from __future__ import annotations

import fcntl
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from clawker_cp import errors
from clawker_cp.config import LOG_LINES_WAITING
from clawker_cp.errors import CapacityExceeded, ClawkerError, Unsupported
from clawker_cp.telemetry.log import LOG_FILE, STDERR, LogSink, configure

PEM = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIJ\n-----END PRIVATE KEY-----"
JWT = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Callable[[], list[dict[str, object]]]]:
    sink = configure(tmp_path, stderr=False)

    def read() -> list[dict[str, object]]:
        sink.close()
        return [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]

    try:
        yield read
    finally:
        sink.close()
        structlog.reset_defaults()


def test_every_line_has_the_same_head(lines: Callable[[], list[dict[str, object]]]) -> None:
    """A line begins with time, level, event and message; fields follow; below info nothing is written."""
    log = structlog.get_logger()
    log.debug("not_this")
    log.info("cp_ready", agents=2)
    log.warning("rules_unreadable", message="the file is damaged", path=Path("/x"))
    first, second = lines()

    assert list(first) == ["time", "level", "event", "message", "agents"]
    assert (first["level"], first["event"], first["message"]) == ("info", "cp_ready", "cp ready")
    assert str(first["time"]).endswith("Z")
    assert (second["message"], second["path"]) == ("the file is damaged", "/x")


@pytest.mark.parametrize(
    "fields",
    [
        {"token": JWT},
        {"access_token": "opaque-secret-thing"},
        {"client_secret": "opaque-secret-thing"},
        {"cause": f"401 for {JWT} at once"},
        {"cause": f"cannot read {PEM}"},
        {"cause": PEM[:60]},
        {"header": "Authorization: Bearer opaque-secret-thing"},
        {"url": "https://user:opaque-secret-thing@host/"},
        {"nested": {"list": [{"password": "opaque-secret-thing"}, PEM]}},
        {"raw": b"opaque-secret-thing"},
    ],
)
def test_secrets_stay_out(lines: Callable[[], list[dict[str, object]]], fields: dict[str, object]) -> None:
    """Tokens, keys and passwords never reach a line, under whatever name or inside whatever text."""
    structlog.get_logger().info("x_happened", **fields)
    text = json.dumps(lines())

    for secret in ("opaque-secret-thing", "MC4CAQ", "c2lnbmF0dXJl"):
        assert secret not in text


def test_no_error_class_leaks(lines: Callable[[], list[dict[str, object]]]) -> None:
    """An exception with a secret in its message, of any of our categories, is logged without the secret (I11)."""
    needed: dict[object, dict[str, Any]] = {CapacityExceeded: {"limit": "x"}, Unsupported: {"feature": "x"}}
    for _name, category in inspect.getmembers(errors, inspect.isclass):
        if issubclass(category, ClawkerError):
            try:
                raise category(f"refused {JWT}", **needed.get(category, {}))
            except ClawkerError:
                structlog.get_logger().exception("call_failed")
    written = lines()

    assert len(written) >= 10
    assert JWT not in json.dumps(written)
    assert all("Traceback" in str(line["exception"]) for line in written)


def test_harmless_words_stay(lines: Callable[[], list[dict[str, object]]]) -> None:
    """What only resembles a secret is kept: scope keys, counts of tokens, cookies of sockets."""
    structlog.get_logger().info("x_happened", key="agent:p/a", tokens=3, cookie=77, url="https://a.example/b")
    (line,) = lines()

    assert (line["key"], line["tokens"], line["cookie"], line["url"]) == ("agent:p/a", 3, 77, "https://a.example/b")


def test_any_value_is_one_line(lines: Callable[[], list[dict[str, object]]]) -> None:
    """Newlines, huge texts, huge numbers and lone surrogates make a line like any other."""
    log = structlog.get_logger()
    log.info("x_happened", text="a\nb", long="x" * 100_000, many={1, 2})
    log.info("y_happened", number=1 << 80)
    log.info("z_happened", text="\ud800")
    first, second, third = lines()

    assert first["text"] == "a\nb"
    assert len(str(first["long"])) < 5000
    assert second["number"] == str(1 << 80)
    assert "z_happened" in str(third["event"])


def test_libraries_are_heard_from_warnings_on(lines: Callable[[], list[dict[str, object]]]) -> None:
    """A warning of a library becomes an event; its chatter does not."""
    logging.getLogger("somelib").info("chatter")
    logging.getLogger("somelib").warning("odd %s", "thing")
    (line,) = lines()

    assert (line["event"], line["logger"], line["message"]) == ("library_log", "somelib", "odd thing")


def test_full_queue_drops_and_counts(tmp_path: Path) -> None:
    """With the writer stuck lines are dropped and counted; whoever logs never waits."""
    sink = LogSink(tmp_path / "f", stderr=False)  # not started: nobody takes lines
    for _ in range(LOG_LINES_WAITING + 3):
        sink.msg(b"x\n")

    assert sink.statistics() == {"dropped": 3, "unwritten": 0, "unread": 0, "waiting": LOG_LINES_WAITING}


def test_unwritable_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file that cannot be written is said once on stderr and counted, nothing is raised."""
    (tmp_path / "d").write_text("no directory")
    sink = LogSink(tmp_path / "d" / "f", stderr=False)
    sink.start()
    sink.msg(b"x\n")
    sink.close()

    assert sink.statistics()["unwritten"] >= 1
    assert capfd.readouterr().err.count("file_logger_unavailable") == 1


def test_nobody_who_reads_stderr_holds_the_file_up(tmp_path: Path) -> None:
    """With a full pipe on standard error every line reaches the file; read again, whole lines come there too."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    kept = os.dup(STDERR)
    os.dup2(writing, STDERR)
    try:
        sink = LogSink(tmp_path / "f")
        sink.start()
        for number in range(200):
            sink.msg(b'{"number":%d,"text":"%s"}\n' % (number, b"x" * 100))
        sink.close()
        unread = sink.statistics()["unread"]
        first = os.read(reading, 4096)
        again = LogSink(tmp_path / "f")
        again.start()
        again.msg(b'{"number":200}\n')
        again.close()
        os.close(writing)
    finally:
        os.dup2(kept, STDERR)
        os.close(kept)
    later = os.read(reading, 8192)
    os.close(reading)

    assert [json.loads(line)["number"] for line in (tmp_path / "f").read_text().splitlines()] == list(range(201))
    assert unread > 100 and first.startswith(b'{"number":0,')
    assert later.splitlines()[-1] == b'{"number":200}'
