"""
`clawkerctl up` and `down`: the control plane as a container of this host's engine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import click
import orjson

from clawker_cp.cli.ctl.session import Session
from clawker_cp.config import environment
from clawker_cp.engines.docker.network import ensure_network
from clawker_cp.engines.docker_client import LIMIT_S, DockerClient, endpoint_from
from clawker_cp.errors import ClawkerError
from clawker_cp.runtime.runner import run_main
from clawker_cp.wiring.container_life import HEALTHY_LIMIT_S, ContainerLife, Outcome
from clawker_cp.wiring.own_container import IMAGE, NAME
from clawker_cp.wiring.translation import load_configuration

T = TypeVar("T")
STATUS_LIMIT_S = 3.0  # an engine that hangs is no reason to wait for what the server says
_SAYS = {
    "create": "made and healthy",
    "keep": "runs already, unchanged",
    "start": "started again and healthy",
    "replace": "replaced and healthy",
    "removed": "drained and removed",
    "absent": "is not there",
}


@click.command("up")
@click.option("--image", default=IMAGE, show_default=True, help="Image of the control plane.")
@click.option("--wait", "wait_s", type=click.FloatRange(1, 600), default=HEALTHY_LIMIT_S, show_default=True,
              help="Seconds until it has to be healthy.")  # fmt: skip
@click.pass_obj
def up(session: Session, /, *, image: str, wait_s: float) -> None:
    """
    Run the control plane as a container; adopt it, or replace it when anything about it has changed.

    Certificates are made or renewed first. While it is replaced the kernel goes on enforcing; names and
    proxied connections of agents wait for the new one. One that does not get healthy is taken back.
    """
    _show(session, _with_life(lambda life: life.up(image, limit_s=wait_s)))


@click.command("down")
@click.option("--image", default=IMAGE, show_default=True,
              help="Image that clears the kernel when the control plane's own is gone.")  # fmt: skip
@click.pass_obj
def down(session: Session, /, *, image: str) -> None:
    """
    Drain the control plane and remove its container. Refused while agents run.

    Of one that was killed, is stopped or is gone, what it left goes: containers beside it, programs, maps, pins
    and packet filters.
    """
    _show(session, _with_life(lambda life: life.down(image)))


def container_state() -> dict[str, Any] | None:
    """
    The control plane's container for `status`, with its last word when it does not run; None when there is none,
    or no engine that says so.
    """

    async def ask(life: ContainerLife) -> dict[str, Any] | None:
        state = await life.state()
        if state is not None and state["status"] != "running":
            state["last_word"] = await life.last_word()
        return state

    try:
        return _with_life(ask, limit_s=STATUS_LIMIT_S)
    except ClawkerError:
        return None


def _with_life(work: Callable[[ContainerLife], Awaitable[T]], *, limit_s: float = LIMIT_S) -> T:
    """Run one piece of work against the engine of this host."""
    settings, directories = load_configuration()
    environ = environment()

    async def main() -> T:
        docker = DockerClient(endpoint_from(environ), limit_s=limit_s)
        try:
            life = ContainerLife(
                docker, settings, directories, environ,
                ensure_network=lambda: ensure_network(docker, settings.network, own_container_id=None),
            )  # fmt: skip
            return await work(life)
        finally:
            await docker.aclose()

    return run_main(main())


def _show(session: Session, outcome: Outcome) -> None:
    if session.as_json:
        click.echo(orjson.dumps(outcome.as_mapping(), option=orjson.OPT_INDENT_2))
        return
    why = f" ({outcome.why})" if outcome.why else ""
    click.echo(f"{NAME} {outcome.container_id[:12]}".rstrip() + f": {_SAYS[outcome.action]}{why}")
