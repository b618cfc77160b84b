"""Commands are imported when called, and failures are lines with an exit code."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from clawker_cp.cli.ctl.main import cli as clawkerctl
from clawker_cp.cli.groups import ErrorsAsLines, exit_code
from clawker_cp.cli.main import cli as clawker_cp
from clawker_cp.errors import InvalidInput, Unavailable, Unsupported


def test_failures_map_to_codes() -> None:
    """Unsupported hosts are 3, wrong input 2, other failures 1, and everything of `run` 125."""
    unsupported = Unsupported("x", feature="f", needs="n")
    assert exit_code(unsupported, "check") == 3
    assert exit_code(InvalidInput("x"), "serve") == 2
    assert exit_code(Unavailable("x"), "serve") == 1
    assert exit_code(unsupported, "run") == 125


def test_a_failure_is_one_line_with_its_hint_below() -> None:
    """On standard error, with nothing on standard output and no traceback."""

    def fail() -> None:
        raise Unavailable("the door is shut", hint="open it")

    group = ErrorsAsLines("g", commands=[click.Command("fail", callback=fail)])
    done = CliRunner().invoke(group, ["fail"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "clawker-cp: the door is shut\n  hint: open it\n"


@pytest.mark.parametrize("group", [clawker_cp, clawkerctl], ids=["clawker-cp", "clawkerctl"])
def test_every_command_is_there_under_its_name(group: click.Group) -> None:
    """What is listed can be imported, and help names each; `why` is another name of `explain`."""
    context, told = click.Context(group), CliRunner().invoke(group, ["--help"]).output
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None and command.name == ("explain" if name == "why" else name)
        assert f"\n  {name} " in told


@pytest.mark.parametrize("program", ["clawker_cp.cli.main", "clawker_cp.cli.ctl.main"])
def test_what_a_command_does_not_need_is_not_imported(program: str) -> None:
    """Neither server nor engine is read for a version."""
    code = (
        f"import sys; sys.argv = ['x', '--version']; from {program} import cli; cli(standalone_mode=False); "
        "print([name for name in ('clawker_cp.app', 'docker') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("group", "words", "code"),
    [
        (clawkerctl, ["explain", "\udcff"], 2),
        (clawkerctl, ["--json", "sandbox", "attach", "\udcff"], 2),
        (clawker_cp, ["run", "--", "cat", "\udcff"], 125),
        (clawker_cp, ["serve", "--log-dir", "\udcff"], 2),
    ],
)
def test_arguments_that_are_no_text_are_refused_before_anything_is_done(
    group: click.Group, words: list[str], code: int
) -> None:
    """Bytes that are not UTF-8 are one line on standard error, whatever verb they were meant for."""
    done = CliRunner().invoke(group, words)
    assert done.exit_code == code
    assert done.stderr.endswith(": '\\udcff' is not UTF-8 text\n") and done.stderr.count("\n") == 1
