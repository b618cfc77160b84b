"""Tests of the admin client against a real UNIX socket."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from clawker_cp.errors import Unavailable
from clawker_cp.firewall.envoy.admin import EnvoyAdmin


async def _serve(path: Path, answers: dict[str, tuple[str, str]]) -> asyncio.Server:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        target = head.split(" ")[1].partition("?")[0]
        status, body = answers.get(target, ("404 Not Found", ""))
        writer.write(f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
        await writer.drain()
        writer.close()

    return await asyncio.start_unix_server(answer, path)


async def test_statistics_are_read_as_text(tmp_path: Path) -> None:
    """Numbers stay text, quoted texts lose their quotes."""
    body = 'a.version_text: "12"\nb.update_rejected: 3\n'
    server = await _serve(tmp_path / "s", {"/stats": ("200 OK", body), "/ready": ("200 OK", "LIVE\n")})
    admin = EnvoyAdmin(tmp_path / "s")

    assert await admin.statistics("x") == {"a.version_text": "12", "b.update_rejected": "3"}
    assert await admin.is_live()
    with pytest.raises(Unavailable, match="reopen"):
        await admin.reopen_logs()
    await admin.aclose()
    server.close()


async def test_nobody_there_is_unavailable_not_a_crash(tmp_path: Path) -> None:
    """A missing socket: not live, and a clear error for a question."""
    admin = EnvoyAdmin(tmp_path / "missing")

    assert not await admin.is_live()
    with pytest.raises(Unavailable, match="admin socket") as refused:
        await admin.statistics("x")
    assert refused.value.code == "STACK_PROBE"
    await admin.aclose()
