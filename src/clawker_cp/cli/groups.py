"""
Command groups of every program here: commands imported when they are called, and failures as lines.

One line on standard error per failure and a hint below it; exit codes 0 fine, 1 failed, 2 usage,
3 host not supported (house style), 125 for failures of `run` that are ours (ruling R40).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import click

from clawker_cp.errors import ClawkerError, InvalidInput, Unsupported

NOT_SUPPORTED = 3
OWN_FAILURE = 125  # ruling R40


_NO_TEXT, _COMMAND = f"{__name__}.no_text", f"{__name__}.command"


def _is_text(word: str) -> bool:
    """Whether an argument can be sent: bytes that are not UTF-8 come as lone surrogates."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


class LazyGroup(click.Group):
    """
    A group whose commands are imported when they are called: a short one need not wait for all that the others use.

    `lazy` says where each is, as "module:attribute". Help and completion import all of them. After Click's guide,
    "Lazily Loading Subcommands".
    """

    def __init__(self, *args: Any, lazy: Mapping[str, str] = MappingProxyType({}), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_NO_TEXT] = next((word for word in args if not _is_text(word)), None)
        ctx.meta[_COMMAND] = next((word for word in args if not word.startswith("-")), None)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        word = ctx.meta.get(_NO_TEXT)
        if word is not None:
            ctx.invoked_subcommand = ctx.meta[_COMMAND]
            raise InvalidInput(f"{word[:80]!a} is not UTF-8 text")
        return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self._lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self._lazy[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


class ErrorsAsLines(LazyGroup):
    """A group whose commands may raise `ClawkerError`; it becomes one line, a hint and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            error.show()
            ctx.exit(OWN_FAILURE if ctx.invoked_subcommand == "run" else error.exit_code)
        except ClawkerError as error:
            show_failure("clawker-cp", error)
            ctx.exit(exit_code(error, ctx.invoked_subcommand))


def show_failure(program: str, error: ClawkerError) -> None:
    """
    Write a failure and its hint to standard error.
    """
    click.echo(f"{program}: {error.message}", err=True)
    if error.hint:
        click.echo(f"  hint: {error.hint}", err=True)


def exit_code(error: ClawkerError, command: str | None) -> int:
    """
    The exit code of a failure: those of `run` are 125, all others belong to the command it runs.
    """
    if command == "run":
        return OWN_FAILURE
    if isinstance(error, Unsupported):
        return NOT_SUPPORTED
    return 2 if isinstance(error, InvalidInput) else 1
