"""The command group answers help and version, and a usage error tells whose it was."""

from __future__ import annotations

from click.testing import CliRunner

from clawker_cp.cli.main import cli


def test_help_lists_the_commands() -> None:
    """`--help` and `-h` end with 0 and name every command."""
    for option in ("--help", "-h"):
        result = CliRunner().invoke(cli, [option])
        assert result.exit_code == 0
        assert all(name in result.output for name in ("run", "serve", "check"))


def test_version_names_everything_that_decides() -> None:
    """`--version` tells ours, Python, kernel, libbpf and the hot paths."""
    result = CliRunner().invoke(cli, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith("clawker-cp ")
    assert all(word in result.output for word in ("Python", "kernel", "libbpf", "hot paths"))


def test_a_usage_error_of_run_is_125() -> None:
    """An unknown option of `run` is our failure, not an exit code of the command in it."""
    result = CliRunner().invoke(cli, ["run", "--no-such-option"])
    assert result.exit_code == 125
    assert "no-such-option" in result.output


def test_a_usage_error_elsewhere_is_2() -> None:
    """Other commands keep the usual code for usage errors."""
    assert CliRunner().invoke(cli, ["check", "--no-such-option"]).exit_code == 2
    assert CliRunner().invoke(cli, ["no-such-command"]).exit_code == 2
