"""
What every verb shares: how to reach the control plane, and how answers are printed.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import orjson

from clawker_cp.adminclient import AdminClient, ClientIdentity
from clawker_cp.adminclient.messages import control, to_json
from clawker_cp.errors import InvalidInput
from clawker_cp.telemetry.flows import printable

F = TypeVar("F", bound=Callable[..., Any])
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class Session:
    """
    Where the control plane is, whose identity is used, and whether people or programs read the answers.
    """

    auth: Path
    host: str
    admin_port: int
    token_port: int
    as_json: bool

    def client(self) -> AdminClient:
        """A client that is not open yet."""
        return AdminClient(
            ClientIdentity(self.auth), host=self.host, admin_port=self.admin_port, token_port=self.token_port
        )

    def call(self, method: str, request: Any) -> Any:
        """One call, over a channel of its own."""
        with self.client() as client:
            return client.call(method, request)

    def show(self, message: Any, text: Callable[[], Iterable[str]]) -> None:
        """Print an answer: JSON for programs, the lines of `text` for people."""
        if self.as_json:
            click.echo(orjson.dumps(to_json(message), option=orjson.OPT_INDENT_2))
            return
        for line in text():
            click.echo(line)

    def show_item(self, message: Any, text: str) -> None:
        """Print one item of a stream: a line either way."""
        click.echo(orjson.dumps(to_json(message)) if self.as_json else text)


def agent_ref(text: str) -> Any:
    """
    `project/agent`, `/agent` for one without a project, or a container id, a prefix of it, or a full name.
    """
    project, slash, agent = text.partition("/")
    if not slash:
        return control.AgentRef(container_id=text)
    if not agent:
        raise InvalidInput(f"agent: {text!r} has no name after the slash", hint="write project/agent, or /agent")
    return control.AgentRef(project=project, agent=agent)


def scope_of(agent: str, project: str) -> str:
    """
    The scope of `--agent` or `--project`; both are one too many, neither is `global`.
    """
    if agent and project:
        raise InvalidInput("--agent, --project: give one of both")
    if agent:
        if "/" not in agent:
            raise InvalidInput(f"--agent: {agent!r} has to be project/agent here, or /agent")
        return f"agent:{agent}"
    return f"project:{project}" if project else "global"


def seconds_of(text: str) -> int:
    """
    `90`, `90s`, `20m`, `2h` or `1d` as seconds.
    """
    number, unit = (text[:-1], text[-1:]) if text[-1:] in _UNITS else (text, "s")
    if not number.isascii() or not number.isdecimal() or not int(number):
        raise InvalidInput(f"time: {text!r} has to be a number with s, m, h or d, like 20m")
    return int(number) * _UNITS[unit]


def moment(unix: int) -> str:
    """
    A time as people read it, "-" for none.
    """
    return dt.datetime.fromtimestamp(unix, dt.UTC).strftime("%Y-%m-%d %H:%M:%SZ") if unix else "-"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """
    Rows in columns, a head above; whatever an agent chose is shown printable.
    """
    texts = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(len(cells[i]) for cells in [list(head), *texts]) for i in range(len(head))]
    for cells in [list(head), *texts]:
        yield "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def enum_word(message: Any, field: str) -> str:
    """
    An enum field's value without its prefix, in lower case.
    """
    descriptor = message.DESCRIPTOR.fields_by_name[field].enum_type
    name: str = descriptor.values_by_number[getattr(message, field)].name
    prefix = descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return name.removeprefix(prefix).lower()
