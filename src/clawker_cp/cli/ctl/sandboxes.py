"""
`clawkerctl sandbox run|list|attach|remove`: sandboxes that belong to the server.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import orjson

from clawker_cp.adminclient import AsyncAdminClient, ClientIdentity
from clawker_cp.adminclient.messages import control, to_json
from clawker_cp.cli.ctl.session import Session, enum_word, moment, table
from clawker_cp.cli.ctl.streams import CallerStreams
from clawker_cp.errors import InvalidInput
from clawker_cp.runtime.runner import run_main

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@click.group("sandbox")
def sandbox() -> None:
    """
    Sandboxes that live on the server: they outlive this command and its terminal.
    """


@sandbox.command("run", context_settings={"ignore_unknown_options": False})
@click.option("--project", default="", help="Project of the agent (default: none).")
@click.option("--agent", default="", help="Name of the agent (default: sandbox-<4 hex>).")
@click.option("--workdir", default="", help="Directory inside, writable (default: here).")
@click.option("--mount", multiple=True, help="SRC[:DST][:rw], read-only without :rw.")
@click.option("--env", multiple=True, help="NAME=VALUE.")
@click.option("--publish", multiple=True, help="[HOST:]PORT, bound to 127.0.0.1 of the server's host.")
@click.option("--user", type=int, default=0, help="Uid inside (default: the server's unprivileged user).")
@click.option("--allow-root", is_flag=True, help="Run as root inside.")
@click.option("--tty", "-t", is_flag=True, help="Give the command a terminal.")
@click.option("--detach", "-d", is_flag=True, help="Do not attach; print the id.")
@click.option("--rm", "auto_remove", is_flag=True, help="Forget it when it ends.")
@click.argument("command", nargs=-1, required=True)
@click.pass_obj
def run(session: Session, /, *, command: tuple[str, ...], detach: bool, **options: Any) -> None:
    """
    Create a sandbox, start COMMAND in it, attach, and exit with its code.
    """
    request = control.CreateSandboxRequest(
        project=options["project"],
        agent=options["agent"] or f"sandbox-{secrets.token_hex(2)}",
        argv=command,
        env=dict(_variable(text) for text in options["env"]),
        workdir=options["workdir"] or str(Path.cwd()),
        mounts=[_mount(text) for text in options["mount"]],
        publish=[_publish(text) for text in options["publish"]],
        uid=options["user"],
        gid=options["user"],
        allow_root=options["allow_root"],
        tty=options["tty"],
        auto_remove=options["auto_remove"],
    )
    if detach:
        answer = session.call("CreateSandbox", request)
        session.show(answer, lambda: [answer.sandbox.id])
        return
    raise click.exceptions.Exit(run_main(_create_and_attach(session, request)))


@sandbox.command("attach")
@click.argument("sandbox_id")
@click.option("--tty", "-t", is_flag=True, help="Pass this terminal through raw.")
@click.pass_obj
def attach(session: Session, /, *, sandbox_id: str, tty: bool) -> None:
    """
    Follow a sandbox's output and write to its input; exits with its code.
    """
    raise click.exceptions.Exit(run_main(_attach(session, sandbox_id, tty=tty)))


@sandbox.command("list")
@click.option("--all", "everything", is_flag=True, help="Also those that have ended.")
@click.pass_obj
def list_sandboxes(session: Session, /, *, everything: bool) -> None:
    """
    Show sandboxes.
    """
    answer = session.call("ListSandboxes", control.ListSandboxesRequest(all=everything))
    rows = [
        (one.id[:12], f"{one.project}/{one.agent}", enum_word(one, "state").removeprefix("sandbox_state_"),
         one.address or "-", moment(one.started_at_unix), one.exit_code if one.finished_at_unix else "-",
         " ".join(one.argv)[:60])
        for one in answer.sandboxes
    ]  # fmt: skip
    session.show(answer, lambda: table(("ID", "AGENT", "STATE", "ADDRESS", "STARTED", "EXIT", "COMMAND"), rows))


@sandbox.command("remove")
@click.argument("sandbox_id")
@click.option("--force", is_flag=True, help="Also a running one: SIGTERM, then SIGKILL.")
@click.option("--grace", default=10, show_default=True, type=click.IntRange(1, 600), help="Seconds between both.")
@click.pass_obj
def remove(session: Session, /, *, sandbox_id: str, force: bool, grace: int) -> None:
    """
    End a sandbox and forget it.
    """
    request = control.RemoveSandboxRequest(id=sandbox_id, force=force, grace_seconds=grace)
    answer = session.call("RemoveSandbox", request)
    session.show(answer, lambda: [f"{sandbox_id} is removed"])


async def _create_and_attach(session: Session, request: Any) -> int:
    async with _client(session) as client:
        made = await client.call("CreateSandbox", request)
        if session.as_json:
            click.echo(orjson.dumps(to_json(made)), err=True)
        return await _follow(client, made.sandbox.id, tty=request.tty)


async def _attach(session: Session, sandbox_id: str, *, tty: bool) -> int:
    async with _client(session) as client:
        return await _follow(client, sandbox_id, tty=tty)


async def _follow(client: AsyncAdminClient, sandbox_id: str, *, tty: bool) -> int:
    """Copy both ways until the command ends; its exit code."""
    outbox: asyncio.Queue[Any] = asyncio.Queue(maxsize=16)
    outbox.put_nowait(control.AttachSandboxRequest(id=sandbox_id))
    loop = asyncio.get_running_loop()
    with CallerStreams(raw=tty) as streams:
        size = streams.size()
        if tty and size is not None:
            rows, columns = size
            outbox.put_nowait(control.AttachSandboxRequest(resize=control.WindowSize(rows=rows, columns=columns)))
        for number in SIGNALS:
            loop.add_signal_handler(number, _offer, outbox, control.AttachSandboxRequest(signal=number))
        loop.add_signal_handler(signal.SIGWINCH, _resized, outbox, streams)
        feeding = loop.create_task(_feed(streams, outbox), name="stdin")
        try:
            async for message in client.stream("AttachSandbox", _requests(outbox)):
                if message.WhichOneof("item") == "exit_code":
                    return int(message.exit_code)
                streams.write(message.output)
        finally:
            feeding.cancel()
            await asyncio.wait([feeding])
            for number in (*SIGNALS, signal.SIGWINCH):
                loop.remove_signal_handler(number)
    return 125


async def _requests(outbox: asyncio.Queue[Any]) -> AsyncIterator[Any]:
    while True:
        yield await outbox.get()


async def _feed(streams: CallerStreams, outbox: asyncio.Queue[Any]) -> None:
    while data := await streams.read():
        await outbox.put(control.AttachSandboxRequest(stdin=data))
    await outbox.put(control.AttachSandboxRequest(close_stdin=True))


def _offer(outbox: asyncio.Queue[Any], message: Any) -> None:
    with suppress(asyncio.QueueFull):  # a flood of signals: the command has those that fit
        outbox.put_nowait(message)


def _resized(outbox: asyncio.Queue[Any], streams: CallerStreams) -> None:
    size = streams.size()
    if size is not None:
        window = control.WindowSize(rows=size[0], columns=size[1])
        _offer(outbox, control.AttachSandboxRequest(resize=window))


def _client(session: Session) -> AsyncAdminClient:
    return AsyncAdminClient(
        ClientIdentity(session.auth),
        host=session.host,
        admin_port=session.admin_port,
        token_port=session.token_port,
    )


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InvalidInput(f"--env: {text!r} has to be NAME=VALUE")
    return name, value


def _mount(text: str) -> Any:
    parts: Sequence[str] = text.split(":")
    writable = len(parts) > 1 and parts[-1] == "rw"
    parts = parts[:-1] if writable or (len(parts) > 1 and parts[-1] == "ro") else parts
    if not 1 <= len(parts) <= 2 or not all(Path(part).is_absolute() for part in parts):
        raise InvalidInput(f"--mount: {text!r} has to be SRC[:DST][:rw] with absolute paths")
    return control.Mount(source=parts[0], target=parts[-1], read_only=not writable)


def _publish(text: str) -> Any:
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or (host and not host.isdecimal()):
        raise InvalidInput(f"--publish: {text!r} has to be [HOST:]PORT")
    return control.Publish(host_port=int(host or 0), port=int(port))
