"""Which engine is taken: by setting, by place, and by whether a daemon is there."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from clawker_cp.config import Directories, Settings
from clawker_cp.engines.host.engine import HostEngine
from clawker_cp.errors import InvalidInput, Unavailable
from clawker_cp.wiring.engine_choice import chosen_engine
from clawker_cp.wiring.placement import Placement

ON_HOST, IN_CONTAINER = Placement(), Placement(container_id="a" * 64)


def directories(tmp_path: Path) -> Directories:
    return Directories(config=tmp_path, data=tmp_path, state=tmp_path, cache=tmp_path)


def settings(engine: str) -> Settings:
    return msgspec.structs.replace(Settings(), engine=engine)


@pytest.fixture(autouse=True)
def _no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")


@pytest.mark.parametrize("engine", ["auto", "host"])
async def test_without_a_daemon_it_is_the_hosts(tmp_path: Path, engine: str) -> None:
    """Nothing is asked of a daemon that is not there."""
    async with chosen_engine(settings(engine), directories(tmp_path), ON_HOST) as chosen:
        assert isinstance(chosen, HostEngine)


async def test_a_socket_nobody_listens_on_is_no_daemon(tmp_path: Path) -> None:
    """`auto` says in the log that the daemon does not answer, and serves sandboxes."""
    (tmp_path / "none.sock").touch()
    async with chosen_engine(settings("auto"), directories(tmp_path), ON_HOST) as chosen:
        assert isinstance(chosen, HostEngine)


async def test_an_engine_that_is_asked_for_has_to_answer(tmp_path: Path) -> None:
    """`engine: docker` without a daemon is an error that names the socket, not another engine."""
    with pytest.raises(Unavailable, match=r"none\.sock"):
        async with chosen_engine(settings("docker"), directories(tmp_path), ON_HOST):
            pass


@pytest.mark.parametrize("engine", ["auto", "docker"])
async def test_a_container_has_no_sandboxes(tmp_path: Path, engine: str) -> None:
    """There the daemon has to answer whatever was asked for, and `host` is an error of its own."""
    with pytest.raises(Unavailable):
        async with chosen_engine(settings(engine), directories(tmp_path), IN_CONTAINER):
            pass
    with pytest.raises(InvalidInput, match="engine"):
        async with chosen_engine(settings("host"), directories(tmp_path), IN_CONTAINER):
            pass


async def test_a_server_of_run_never_asks_a_daemon(tmp_path: Path) -> None:
    """`run` starts a server for its own sandbox, also where a daemon is."""
    (tmp_path / "none.sock").touch()
    async with chosen_engine(settings("docker"), directories(tmp_path), ON_HOST, only_host=True) as chosen:
        assert isinstance(chosen, HostEngine)
