"""Which authority a server has, and the secret that Hydra's database needs."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from clawker_cp.agents.database import Database
from clawker_cp.config import OauthSettings, Settings
from clawker_cp.errors import InvalidInput, Unavailable
from clawker_cp.pki.tree import AuthTree
from clawker_cp.wiring.ory_stack import OryBinaries, migrate, system_secret, token_backend
from clawker_cp.wiring.token_service import TokenBackend


def backend(wanted: Literal["auto", "embedded", "hydra"], tmp_path: Path) -> TokenBackend:
    settings = msgspec.structs.replace(Settings(), oauth=OauthSettings(implementation=wanted))
    tree, database = AuthTree(tmp_path / "auth"), Database(tmp_path / "cp.db")
    return token_backend(settings, tmp_path, tree, database, ("127.0.0.1",))


def program(directory: Path, name: str, text: str = "#!/bin/sh\nexit 0\n") -> None:
    path = directory / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_hydra_serves_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes it and its siblings as they are found, `embedded` never does, `hydra` insists."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    assert [backend(wanted, tmp_path).implementation for wanted in ("auto", "embedded")] == ["embedded"] * 2
    with pytest.raises(InvalidInput, match=r"oauth\.implementation"):
        backend("hydra", tmp_path)
    program(programs, "hydra")
    program(programs, "kratos")
    found = backend("auto", tmp_path)
    assert (found.implementation, tuple(found.children)) == ("hydra", ("kratos",))
    assert backend("embedded", tmp_path).implementation == "embedded"
    assert OryBinaries.find() == OryBinaries(str(programs / "hydra"), str(programs / "kratos"), "")


def test_the_secret_is_made_once(tmp_path: Path) -> None:
    """32 random bytes as hex, mode 0600; what holds something else is an error and is left alone."""
    path = tmp_path / "hydra-system-secret"
    secret = system_secret(path)
    assert len(bytes.fromhex(secret)) == 32 and path.stat().st_mode & 0o777 == 0o600
    assert system_secret(path) == secret
    for spoilt in (b"short", b"\xff" * 80):
        path.write_bytes(spoilt)
        with pytest.raises(Unavailable, match="hydra-system-secret"):
            system_secret(path)
        assert path.read_bytes() == spoilt


async def test_a_migration_that_fails_says_what_hydra_said(tmp_path: Path) -> None:
    """Its last lines are the error."""
    program(tmp_path, "hydra", "#!/bin/sh\necho one; echo disk full >&2; exit 1\n")
    with pytest.raises(Unavailable, match="one disk full"):
        await migrate(str(tmp_path / "hydra"), "sqlite://x")
    program(tmp_path, "hydra")
    await migrate(str(tmp_path / "hydra"), "sqlite://x")
