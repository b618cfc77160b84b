"""A listener serves a renewed leaf without being made again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from cryptography import x509

from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.rpc.tls import TlsMaterial, server_credentials
from clawker_cp.testing.certificates import Pair
from clawker_cp.testing.rpc_world import ONE, SCOPES, Authority, RpcWorld, active, bearer, outcome


async def served_leaf(port: int, world: RpcWorld) -> int:
    """Serial number of the leaf a new connection is shown."""
    context = world.ca.client_context()
    context.load_cert_chain(world.cli.certificate, world.cli.key)
    _, writer = await asyncio.open_connection("localhost", port, ssl=context)
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(der).serial_number


def serial(pair: Pair) -> int:
    return x509.load_pem_x509_certificate(pair.certificate_pem).serial_number


async def test_a_renewed_leaf_is_served_without_a_new_listener(tmp_path: Path) -> None:
    """New connections see it, a connection that is open stays, and material that cannot be read changes nothing."""
    world = RpcWorld(tmp_path)
    auth = AuthInterceptor(Authority(good=active()), SCOPES)
    async with world.serving(auth) as (server, channel):
        (port,) = server.ports
        first = serial(world.server)
        assert await outcome(channel, ONE, bearer("good")) == ("OK", "")
        assert await served_leaf(port, world) == first
        world.server = world.ca.server()
        second = serial(world.server)
        assert second != first and await served_leaf(port, world) == second
        world.server.key.write_bytes(b"broken")
        assert await served_leaf(port, world) == second
        world.server.key.unlink()
        assert await served_leaf(port, world) == second
        assert await outcome(channel, ONE, bearer("good")) == ("OK", "")


def test_the_first_material_has_to_be_there() -> None:
    """What it raises when the listener is made is not swallowed."""

    def nothing() -> TlsMaterial:
        raise FileNotFoundError("server.pem")

    with pytest.raises(FileNotFoundError):
        server_credentials(nothing)


def test_the_key_is_in_no_repr() -> None:
    """Material may be logged by mistake (I11)."""
    assert "hush" not in repr(TlsMaterial(b"certificate", b"hush", b"ca"))
