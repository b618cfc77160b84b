"""A listener's material: the new pair is taken over, a broken one never."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest

from clawker_cp.pki.material import ListenerMaterial
from clawker_cp.pki.tree import SERVER, AuthTree


@pytest.fixture
def tree(tmp_path: Path) -> AuthTree:
    tree = AuthTree(tmp_path / "auth")
    tree.ensure()
    return tree


def test_a_rotated_pair_is_read_and_a_broken_one_is_not(tree: AuthTree) -> None:
    """The mark changes with the pair; while the files are broken the last good pair stays."""
    material = ListenerMaterial(tree)
    first = material.read()
    assert material.read() is first and "PRIVATE" not in repr(first)
    tree.rotate()
    second = material.read()
    assert second.mark != first.mark and second.key_pem != first.key_pem
    tree.path(SERVER.key).write_bytes(b"garbage")
    assert material.read() is second
    tree.path(SERVER.certificate).unlink()
    assert material.read() is second
    with pytest.raises(OSError, match="No such file"):
        ListenerMaterial(tree).read()


async def test_a_running_listener_changes_its_certificate_and_keeps_connections(tree: AuthTree) -> None:
    """New handshakes see the new leaf, the open connection goes on."""
    material = ListenerMaterial(tree)
    context = material.server_context()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=material.client_context(), server_hostname="clawker-controlplane"
        )
        tls: ssl.SSLObject = writer.get_extra_info("ssl_object")
        assert tls.version() == "TLSv1.3"
        return reader, writer, tls.getpeercert(binary_form=True) or b""

    reader, writer, before = await connect()
    tree.rotate()
    material.client_context()  # a probe reads the files first
    assert material.refresh(context) is True and material.refresh(context) is False
    other_reader, other_writer, after = await connect()
    assert before != after
    for one, other in ((reader, writer), (other_reader, other_writer)):
        other.write(b"still here\n")
        assert await one.readline() == b"still here\n"
        other.close()
    server.close()
    await server.wait_closed()
