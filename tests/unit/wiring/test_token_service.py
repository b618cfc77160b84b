"""The embedded authority as the server runs it: files, listeners, clients."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgspec
import pytest

from clawker_cp.adminclient.identity import ClientIdentity
from clawker_cp.adminclient.tokens import TokenSource
from clawker_cp.agents.database import Database
from clawker_cp.config import CliPorts, CliSettings, Settings
from clawker_cp.errors import Conflict
from clawker_cp.pki.tree import AuthTree
from clawker_cp.testing.authority_world import free_ports
from clawker_cp.wiring.token_service import EmbeddedTokens


class Place:
    """A server's files, and an authority on free ports."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.public, self.admin = free_ports(2)
        ports = CliPorts(hydra_public_port=self.public, hydra_admin_port=self.admin)
        self.settings = msgspec.structs.replace(Settings(), cli=CliSettings(control_plane=ports))
        self.tree = AuthTree(root / "auth")
        self.tree.ensure()
        self.database = Database(root / "cp.db")
        self.database.open()

    def tokens(self) -> EmbeddedTokens:
        tokens = EmbeddedTokens(self.settings, self.root, self.tree, self.database, ("127.0.0.1",))
        tokens.load(time.time())
        return tokens


async def test_it_serves_the_clients_of_the_tree(tmp_path: Path) -> None:
    """The CLI's key of the tree gets a token that the introspector knows; closed, nothing answers."""
    place = Place(tmp_path)
    tokens = place.tokens()
    tokens.open()
    async with tokens.supervised(), asyncio.TaskGroup() as group:
        await tokens.start(group)
        await tokens.register_clients()
        assert await tokens.answers() is True
        url = f"https://127.0.0.1:{place.public}/oauth2/token"
        token = await TokenSource(ClientIdentity(tmp_path / "auth"), url=url, audience=url).token()
        known = await tokens.introspector.introspect(token, "")
        assert (known.active, known.client_id, known.scope) == (True, "clawker-cli", "admin")
        await tokens.revocation.bar("client", "clawker-cli")
        assert (await tokens.introspector.introspect(token, "")).active is False
        tokens.close()
    assert await tokens.answers() is False
    place.database.close()


async def test_a_taken_port_is_told_before_anything_serves(tmp_path: Path) -> None:
    """Named, and nothing stays bound."""
    place = Place(tmp_path)
    first, second = place.tokens(), place.tokens()
    first.open()
    with pytest.raises(Conflict, match=str(place.public)):
        second.open()
    first.close()
    second.open()
    second.close()
    place.database.close()
