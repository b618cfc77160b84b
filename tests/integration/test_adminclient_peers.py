"""The client against peers that are slow, broken, refusing or strangers, and against files that do not fit."""

from __future__ import annotations

import asyncio
import datetime as dt
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from clawker_cp._proto.clawker.admin.v1 import admin_pb2
from clawker_cp._proto.clawker.control.v1 import control_pb2
from clawker_cp.adminclient import AdminClient, AsyncAdminClient, ClientIdentity, RpcFailed
from clawker_cp.adminclient import tokens as tokens_module
from clawker_cp.errors import Unauthenticated, Unavailable
from clawker_cp.pki import profiles
from clawker_cp.pki.certificates import key_pem as pem_of
from clawker_cp.pki.certificates import mint, new_key
from clawker_cp.pki.tree import CA, CLI_CLIENT, SIGNING_KEY, AuthTree
from clawker_cp.runtime.asgi import Answer
from clawker_cp.testing.admin_peer import Peer, listening

CLOCK = admin_pb2.GetSystemTimeRequest()
LIST = admin_pb2.FirewallListRulesRequest()
EVENTS = control_pb2.WatchEventsRequest()


@pytest_asyncio.fixture
async def peer(tmp_path: Path) -> AsyncIterator[Peer]:
    async with Peer(tmp_path).running() as peer:
        yield peer


@pytest.fixture
def tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time for the first token is over after one attempt."""
    monkeypatch.setattr(tokens_module, "FIRST_LIMIT_S", 0.0)


async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.write(b"\0 what is this \r\n" * 64)
    writer.close()


# Streams and repeated calls


async def test_a_stream_whose_token_is_refused_begins_anew_once(peer: Peer) -> None:
    """With another token, when nothing came yet."""
    peer.servicer.refuse = 1
    async with peer.client() as client:
        names = [event.name async for event in client.stream("WatchEvents", EVENTS)]

    assert names == ["last"]
    assert peer.servicer.bearers == ["Bearer token-1", "Bearer token-2"]


async def test_a_stream_that_is_refused_twice_fails(peer: Peer) -> None:
    """A new token is fetched once, not for ever."""
    peer.servicer.refuse = 9
    async with peer.client() as client:
        with pytest.raises(RpcFailed, match="token inactive") as refused:
            async for _ in client.stream("WatchEvents", EVENTS):
                pass

    assert (refused.value.status, peer.servicer.refuse) == ("UNAUTHENTICATED", 7)


async def test_a_call_that_is_refused_twice_fails(peer: Peer) -> None:
    """A new token is fetched once, not for ever."""
    peer.servicer.refuse = 9
    async with peer.client() as client:
        with pytest.raises(RpcFailed, match="token inactive") as refused:
            await client.call("FirewallListRules", LIST)

    assert (refused.value.status, peer.servicer.refuse) == ("UNAUTHENTICATED", 7)


async def test_a_stream_that_has_begun_is_not_begun_anew(peer: Peer) -> None:
    """Its reader would see the first messages twice."""
    peer.servicer.refuse, peer.servicer.before = 1, 1
    names = []
    async with peer.client() as client:
        with pytest.raises(RpcFailed):
            async for event in client.stream("WatchEvents", EVENTS):
                names.append(event.name)

    assert (names, len(peer.servicer.bearers)) == (["first"], 1)


async def test_input_that_may_be_used_up_is_not_sent_anew(peer: Peer) -> None:
    """A two-way stream that is refused fails, and the next one has a new token."""

    async def requests() -> AsyncIterator[Any]:
        yield control_pb2.AttachSandboxRequest(id="x")

    peer.servicer.refuse = 1
    async with peer.client() as client:
        with pytest.raises(RpcFailed):
            async for _ in client.stream("AttachSandbox", requests()):
                pass
        codes = [answer.exit_code async for answer in client.stream("AttachSandbox", requests())]

    assert codes == [7]
    assert peer.servicer.bearers == ["Bearer token-1", "Bearer token-2"]


async def test_a_call_without_a_token_is_not_repeated(peer: Peer) -> None:
    """GetSystemTime has none that could be fetched anew."""
    peer.servicer.refuse = 9
    async with peer.client() as client:
        with pytest.raises(RpcFailed):
            await client.call("GetSystemTime", CLOCK)

    assert peer.servicer.bearers == [""]
    assert peer.issued == 0


async def test_what_a_call_takes_is_not_being_behind(peer: Peer) -> None:
    """The clock is compared with the moment of asking."""
    peer.servicer.unix_nanos = 100 * 10**9
    async with peer.client() as client:
        await client.wait_clock(limit_s=0, wall=lambda: 200.0 if peer.servicer.bearers else 100.0)

    assert len(peer.servicer.bearers) == 1


# Peers that are no control plane


async def test_something_else_on_the_port_is_unavailable(peer: Peer) -> None:
    """Bytes that are no TLS are no reason to hang or to crash."""
    async with listening(garbage) as port, peer.client(admin_port=port) as client:
        with pytest.raises(RpcFailed) as failed:
            await client.call("GetSystemTime", CLOCK, timeout_s=5)

    assert failed.value.status == "UNAVAILABLE"
    assert "clawker-cp serve" in str(failed.value.hint)


async def test_a_port_that_says_nothing_is_left_at_the_deadline(peer: Peer) -> None:
    """A handshake that is never answered is within the call's time."""
    hang_up = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hang_up.wait()
        writer.close()

    async with listening(silent) as port, peer.client(admin_port=port) as client:
        with pytest.raises(RpcFailed) as late:
            await client.call("GetSystemTime", CLOCK, timeout_s=0.2)
        hang_up.set()

    assert late.value.status == "DEADLINE_EXCEEDED"


@pytest.mark.usefixtures("tried_once")
async def test_an_assertion_hangs_on_no_error(peer: Peer) -> None:
    """Neither the message nor anything the error refers to leads to the request (I11)."""
    async with listening(garbage) as port:
        with pytest.raises(Unavailable, match="did not answer") as failed:
            await peer.source(port).token()
    chain: list[BaseException | None] = [failed.value, failed.value.__cause__, failed.value.__context__]

    assert chain[1:] == [None, None]
    assert not hasattr(failed.value, "request")


@pytest.mark.usefixtures("tried_once")
async def test_a_token_endpoint_that_drips_is_left(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is one of the whole exchange, not of each byte."""
    monkeypatch.setattr(tokens_module, "REQUEST_LIMIT_S", 0.3)

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        while not reader.at_eof():
            writer.write(b" ")
            try:
                async with asyncio.timeout(0.05):
                    await reader.read(4096)
            except TimeoutError:
                continue
        writer.close()

    async with listening(drip, peer.tree) as port:
        async with asyncio.timeout(5):
            with pytest.raises(Unavailable, match="did not answer: TimeoutError"):
                await peer.source(port).token()


@pytest.mark.usefixtures("tried_once")
async def test_an_answer_without_end_is_cut(peer: Peer) -> None:
    """Not more than the bound is kept, and the connection is given up."""
    sent = 0

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while not writer.is_closing() and sent < 2**30:
                writer.write(b" " * 2**16)
                await writer.drain()
                sent += 2**16
        except OSError:
            pass
        writer.close()

    async with listening(pour, peer.tree) as port:
        with pytest.raises(Unavailable, match="holds no token"):
            await peer.source(port).token()

    assert sent < 2**26


@pytest.mark.usefixtures("tried_once")
@pytest.mark.parametrize(
    "token", ["secret\nx: y", "secret token", "sécret", "s" * 9000], ids=["line", "space", "é", "long"]
)
async def test_a_token_that_is_no_header_value_is_not_used(peer: Peer, token: str) -> None:
    """It is an answer without a token, and is not shown."""
    peer.answer = Answer(200, {"access_token": token})
    async with peer.client() as client:
        with pytest.raises(Unavailable, match="no usable token") as failed:
            await client.call("FirewallListRules", LIST)

    assert token not in str(failed.value)
    assert peer.servicer.bearers == []


@pytest.mark.usefixtures("tried_once")
@pytest.mark.parametrize("status", [201, 307, 404, 429, 500, 503])
async def test_only_200_is_an_answer(peer: Peer, status: int) -> None:
    """Everything that is neither 200 nor a refusal is a failure, also with a token in it or with somewhere to go."""
    peer.answer = Answer(status, {"access_token": "token"}, {"location": "https://127.0.0.1:1/"})

    with pytest.raises(Unavailable, match=f"answered {status}"):
        await peer.source().token()


# Who waits for a token


async def test_those_who_wait_for_a_token_share_its_failure(peer: Peer, tried_once: None) -> None:
    """Five callers of a dead endpoint wait as long as one; whoever comes later tries again."""
    connections = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await garbage(reader, writer)

    async def fail() -> None:
        with pytest.raises(Unavailable, match="did not answer"):
            await source.token()

    async with listening(count) as port:
        source = peer.source(port)
        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(fail())
        together = connections
        await fail()

    assert (together, connections) == (1, 2)


async def test_who_stops_waiting_takes_nobody_along(peer: Peer) -> None:
    """The caller that does the exchange is cancelled; the next one does it and has a token."""
    source = peer.source()
    peer.go_on.clear()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        first = group.create_task(source.token())
        await peer.asked.wait()
        second = group.create_task(source.token())
        peer.asked.clear()
        first.cancel()
        await peer.asked.wait()
        peer.go_on.set()
        token = await second

    assert first.cancelled()
    assert await source.token() == token


async def test_a_refusal_is_shared_and_then_forgotten(peer: Peer) -> None:
    """One that was refused, by a key not known yet, may ask again later."""
    peer.answer = Answer(401, {"error": "invalid_client"})
    source = peer.source()
    with pytest.raises(Unauthenticated, match="invalid_client"):
        await source.token()
    peer.answer = None

    assert await source.token() == "token-1"


# Files of our own


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """An auth tree to damage."""
    tree = AuthTree(tmp_path / "ours")
    tree.ensure()
    return tree.root


LEAF, LEAF_KEY = CLI_CLIENT.certificate, CLI_CLIENT.key


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (LEAF_KEY, b"", "client.key is no private key"),
        (LEAF_KEY, b"garbage", "client.key is no private key"),
        (LEAF_KEY, pem_of(new_key()), "client.key is not the key of cli/client.pem"),
        (LEAF, b"", "client.pem is no certificate"),
        (LEAF, b"garbage", "client.pem is no certificate"),
        (CA.certificate, b"garbage", "ca.pem is no certificate"),
    ],
)
async def test_a_file_that_does_not_fit_is_named(copy: Path, name: str, content: bytes, problem: str) -> None:
    """Before gRPC sees it: that one ends the process at an empty key."""
    (copy / name).write_bytes(content)

    with pytest.raises(Unavailable, match=problem) as unfit:
        async with AsyncAdminClient(ClientIdentity(copy)):
            pass
    assert unfit.value.code == "NO_IDENTITY"
    assert "clawkerctl auth status" in str(unfit.value.hint)


async def test_a_leaf_of_another_ca_is_named(copy: Path, tmp_path: Path) -> None:
    """The server would only close the connection."""
    stranger = AuthTree(tmp_path / "stranger")
    stranger.ensure()
    for name in (LEAF, LEAF_KEY):
        shutil.copy(stranger.path(name), copy / name)

    with pytest.raises(Unavailable, match=r"client\.pem was not issued by ca/ca\.pem"):
        async with AsyncAdminClient(ClientIdentity(copy)):
            pass


async def test_an_ended_leaf_is_said_to_have_ended(copy: Path) -> None:
    """With its day, and with what makes a new one."""
    past = dt.datetime.now(dt.UTC) - dt.timedelta(days=400)
    leaf = mint(profiles.CLI_CLIENT, AuthTree(copy).identity(CA), past)
    (copy / LEAF).write_bytes(leaf.certificate_pem)
    (copy / LEAF_KEY).write_bytes(leaf.key_pem)

    with pytest.raises(Unavailable, match=rf"client\.pem ended on {past + profiles.YEAR:%Y-%m-%d}") as ended:
        async with AsyncAdminClient(ClientIdentity(copy)):
            pass
    assert "auth rotate" in str(ended.value.hint)


def test_an_ended_ca_and_a_clock_that_is_behind_are_said(copy: Path) -> None:
    """The CA's end comes first; certificates from the future mean this machine's clock."""
    identity = ClientIdentity(copy)
    now = time.time()

    with pytest.raises(Unavailable, match=r"ca\.pem ended on"):
        identity.channel_material(now + 6 * 365 * 86400)
    with pytest.raises(Unavailable, match=r"ca\.pem is not valid before") as early:
        identity.channel_material(now - 86400)
    assert early.value.hint == "set this machine's clock"


def test_what_is_read_of_keys_is_not_shown(copy: Path) -> None:
    """Neither file nor material has its key in its text."""
    material = ClientIdentity(copy).channel_material()

    assert b"PRIVATE KEY" in material.key
    assert "PRIVATE" not in repr(material) + str(material)


async def test_a_missing_signing_key_is_not_waited_for(peer: Peer, copy: Path) -> None:
    """Fifteen seconds would not bring it back."""
    (copy / SIGNING_KEY).unlink()

    async with asyncio.timeout(5):
        with pytest.raises(Unavailable, match=r"signing\.key cannot be read"):
            await peer.source(identity=ClientIdentity(copy)).token()
    assert not peer.asked.is_set()


# The synchronous client


def test_a_client_that_could_not_open_leaves_nothing_open(copy: Path) -> None:
    """No loop stays behind, and it says that it is closed."""
    (copy / LEAF_KEY).unlink()
    client = AdminClient(ClientIdentity(copy))
    with pytest.raises(Unavailable, match=r"client\.key cannot be read"), client:
        pass

    assert client._runner is None
    with pytest.raises(RpcFailed, match="not open"):
        client.call("GetSystemTime", CLOCK)


async def test_a_closed_client_says_so(peer: Peer) -> None:
    """After use as before it, for calls and for streams."""

    def work() -> None:
        client = AdminClient(peer.identity(), admin_port=peer.admin_port, token_port=peer.token_port)
        with client:
            client.call("FirewallListRules", LIST)
        with pytest.raises(RpcFailed, match="not open"):
            client.call("GetSystemTime", CLOCK)
        with pytest.raises(RpcFailed, match="not open"), client.stream("WatchEvents", EVENTS):
            pass

    await asyncio.to_thread(work)


async def test_a_stream_that_is_left_early_ends_with_its_client(peer: Peer) -> None:
    """Nothing of it reaches the loops of others, whose poller it shares; ten, since without care a few of them do."""

    def work() -> str:
        client = AdminClient(peer.identity(), admin_port=peer.admin_port, token_port=peer.token_port)
        with client, client.stream("WatchEvents", EVENTS) as events:
            name: str = next(events).name
        return name

    peer.servicer.before = 1000
    names = [await asyncio.to_thread(work) for _ in range(10)]

    assert names == ["first"] * 10
